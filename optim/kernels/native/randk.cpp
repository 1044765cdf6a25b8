// Adam on single entries, one of each stratum, and sign or SGD on all others: one pass over the memory.
// Called by randk.py, which says what it computes and holds the reference; the strata are those of
// optim/projection/strata.py.
#include "chosen.h"

constexpr int CHUNK = 1024;  // elements whose weights, gradients and positions lie in the first cache

struct Strata {
    int64_t size, count, shift;
    Key key;

    // The last stratum that begins at or before an element; -1: the part of the last that lies at the beginning.
    int64_t of(int64_t element) const {
        const __int128 past = __int128(element + 1) * count - shift - 1 + size;  // not negative
        return int64_t(past / size) - 1;
    }

    // The places of the strata numbered from `first` on, counted from `origin`, near which they begin.
    void places(int64_t first, int strata, int64_t origin, int32_t* __restrict place) const {
        const double base = double(int64_t(__int128(first) * size + shift - __int128(origin) * count)) + 0.5;
        // No quotient of whole numbers lies so near below a whole number that + 0.5 would not keep it apart.
        const double step = double(size), inverse = 1.0 / double(count);
        const Words words = key.from(uint64_t(first));
        for (int i = 0; i < strata; i++) {
            const int64_t start = int64_t(std::floor((base + i * step) * inverse));
            const int64_t end = int64_t(std::floor((base + (i + 1) * step) * inverse));
            place[i] = int32_t(start + int64_t((uint64_t(words[i]) * uint64_t(end - start)) >> 32));
        }
    }
};

template <class Weights, class Element, class Moments>
static inline void chunk_step(const Weights& weights, const Element* gradients, const Moments& means,
                              const Moments& squares, const Strata& strata, int64_t start, int count, const Adam& a,
                              const Rest& rest) {
    float w[CHUNK], g[CHUNK], updated[CHUNK];
    int32_t places[CHUNK + 2];
    int64_t slot = strata.of(start);
    const int touched = int(strata.of(start + count - 1) - slot) + 1;
    weights.load(start, count, w);
    for (int i = 0; i < count; i++) g[i] = widen(gradients[start + i]);
    int first = 0, last = touched;
    if (slot < 0) {  // its number, and so its word and its moments, are those of the last
        strata.places(strata.count - 1, 1, strata.size + start, places);
        strata.places(0, touched - 1, start, places + 1);
    } else {
        strata.places(slot, touched, start, places);
    }
    // The first may have been taken in the chunk before, the last in the one behind; it may be the first.
    if (places[0] < 0) first++;
    if (last > first && places[last - 1] >= count) last--;
    int at = first;
    if (slot < 0 && first == 0 && last > 0) {
        adam_on_chosen(w, g, means, squares, {places, 1, strata.count - 1}, updated, a);
        at = 1;
    }
    adam_on_chosen(w, g, means, squares, {places + at, last - at, slot + at}, updated + at, a);
    rest_run(w, g, count, rest);
    for (int i = first; i < last; i++) w[places[i]] = updated[i];
    weights.store(start, count, w);
}

extern "C" void randk_adamw(Values weight, Gradient gradient, Values first, Values second, Strata strata, Adam a,
                            Rest rest, int threads) {
    const int64_t full = strata.size / CHUNK;
    with_weight(weight, [&](auto weights) {
        with_gradient(gradient, [&](auto* gradients) {
            with_moments(first, second, [&](auto means, auto squares) {
#pragma omp parallel for num_threads(useful_threads(strata.size, threads)) schedule(static)
                for (int64_t chunk = 0; chunk < full; chunk++)
                    chunk_step(weights, gradients, means, squares, strata, chunk * CHUNK, CHUNK, a, rest);
                if (strata.size % CHUNK)
                    chunk_step(weights, gradients, means, squares, strata, full * CHUNK, int(strata.size % CHUNK), a,
                               rest);
            });
        });
    });
}
