// Adam on single entries, one of each stratum, and sign or SGD on all others: one pass over the memory.
// Called by randk.py, which says what it computes and holds the reference; the strata are those of
// optim/projection/strata.py.
#include "chosen.h"

struct Strata {
    int64_t size, count, shift;
    Key key;

    int64_t begin(int64_t stratum) const { return int64_t((__int128(stratum) * size + shift) / count); }

    // The last stratum that begins at or before an element; -1: the part of the last that lies at the beginning.
    int64_t of(int64_t element) const {
        const __int128 past = __int128(element + 1) * count - shift - 1 + size;  // not negative
        return int64_t(past / size) - 1;
    }

    // The places of `padded(strata)` strata from number `first` on, of which the first is the one of `origin` or
    // the one behind, counted from `origin`: none is further away than a stratum and a chunk.
    void places(int64_t first, int strata, int64_t origin, int32_t* __restrict place) const {
        const int32_t longest = int32_t(size / count) + 1;
        // Not negative, so that cutting is rounding down, and with 0.5 that no rounding of the product can reach
        // a whole number: the numbers are below 2^51.
        const int64_t base = int64_t(__int128(first) * size + shift - __int128(origin) * count) + longest * count;
        const double from = double(base) + 0.5, step = double(size), inverse = 1.0 / double(count);
        const Words words = key.from(uint64_t(first));
        for (int stratum = 0; stratum < strata; stratum += LANES) {
            int32_t start[LANES], length[LANES];
#pragma omp simd
            for (int i = 0; i < LANES; i++) {
                start[i] = int32_t((from + (stratum + i) * step) * inverse);
                length[i] = int32_t((from + (stratum + i + 1) * step) * inverse) - start[i];
            }
#pragma omp simd
            for (int i = 0; i < LANES; i++) {
                const uint64_t within = uint64_t(words[stratum + i]) * uint32_t(length[i]) >> 32;
                place[stratum + i] = start[i] + int32_t(within) - longest;
            }
        }
    }

    int64_t place(int64_t stratum) const {
        const __int128 begin = __int128(stratum) * size + shift;
        const int64_t start = int64_t(begin / count), length = int64_t((begin + size) / count) - start;
        const int64_t found = start + int64_t(uint64_t(key.from(uint64_t(stratum))[0]) * uint64_t(length) >> 32);
        return found < size ? found : found - size;
    }
};

// The chosen of a chunk of elements.
struct Taken {
    Chosen chosen;
    int64_t slot;  // of the first
    int64_t stray = -1;  // the place of the last stratum's, if it lies in this chunk, at the beginning of all

    Taken(const Strata& strata, int64_t start, int count) : slot(strata.of(start)) {
        int32_t places[CHUNK + 3 * LANES];
        const int touched = int(strata.of(start + count - 1) - slot) + 1;
        if (slot < 0) {
            const int64_t last = strata.place(strata.count - 1);
            if (last >= start && last < start + count && last < strata.begin(0)) stray = last;
        }
        const int behind = slot < 0;
        slot += behind;
        strata.places(slot, touched - behind, start, places);
        uint8_t taken[CHUNK + 1] = {};
        // The first may have been taken in the chunk before, the last in the one behind; it may be the first.
        const int before = touched > behind && places[0] < 0;
        for (int i = before; i < touched - behind; i++) taken[places[i] < count ? places[i] : CHUNK] = 1;
        slot += before;
        chosen.read(taken);
    }
};

template <class Weights, class Element, class Moments>
static inline void chunk_step(const Weights& weights, const Element* gradients, const Moments& means,
                              const Moments& squares, const Strata& strata, int64_t start, int count, const Adam& a,
                              const Rest& rest) {
    const Taken taken(strata, start, count);
    const auto step = [&] {
        chosen_step(weights, gradients, means, squares, taken.chosen, start, count, taken.slot, a, rest);
    };
    if (taken.stray < 0) return step();
    const Stray<Weights> stray(weights, gradients, means, squares, taken.stray, strata.count - 1, a);
    step();
    stray.put();
}

// All chosen places, in order but for the last, which may lie at the beginning.
extern "C" void strata_places(Strata strata, int64_t* place, int) {
    for (int64_t stratum = 0; stratum < strata.count; stratum++) place[stratum] = strata.place(stratum);
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
