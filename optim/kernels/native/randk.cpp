// Adam on single entries, one of each stratum, and sign or SGD on all others: one pass over the memory.
// Called by randk.py, which says what it computes and holds the reference; the strata are those of
// optim/projection/strata.py.
#include "chosen.h"
#include "strata.h"

// The chosen of a chunk of elements.
struct Taken {
    Chosen chosen;
    int64_t slot;  // of the first
    int64_t stray = -1;  // the place of the last stratum's, if it lies in this chunk, at the beginning of all

    Taken(const Places& strata, int64_t start, int count) : slot(strata.of(start)) {
        int32_t places[CHUNK + 3 * LANES];
        const int touched = int(strata.of(start + count - 1) - slot) + 1;
        if (slot < 0) {
            const int64_t last = strata.place(strata.count - 1);
            if (last >= start && last < start + count && last < strata.begin(0)) stray = last;
        }
        const int behind = slot < 0;
        slot += behind;
        strata.some<LANES>(slot, touched - behind, start, places);
        uint8_t taken[CHUNK] = {};
        // The first may have been taken in the chunk before, the last in the one behind; it may be the first.
        int many = touched - behind;
        const int before = many > 0 && places[0] < 0;
        if (many > before && places[many - 1] >= count) many--;
        for (int i = before; i < many; i++) taken[places[i]] = 1;
        slot += before;
        chosen.read(taken);
    }
};

template <class Weights, class Element, class Moments>
static inline void chunk_step(const Weights& weights, const Element* gradients, const Moments& means,
                              const Moments& squares, const Places& strata, int64_t start, int count, const Adam& a,
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
    const Places places(strata);
    for (int64_t stratum = 0; stratum < strata.count; stratum++) place[stratum] = places.place(stratum);
}

extern "C" void randk_adamw(Values weight, Gradient gradient, Values first, Values second, Strata strata, Adam a,
                            Rest rest, int threads) {
    const Places places(strata);
    const int64_t full = strata.size / CHUNK;
    with_weight(weight, [&](auto weights) {
        with_gradient(gradient, [&](auto* gradients) {
            with_moments(first, second, [&](auto means, auto squares) {
#pragma omp parallel for num_threads(useful_threads(strata.size, threads)) schedule(static)
                for (int64_t chunk = 0; chunk < full; chunk++)
                    chunk_step(weights, gradients, means, squares, places, chunk * CHUNK, CHUNK, a, rest);
                if (strata.size % CHUNK)
                    chunk_step(weights, gradients, means, squares, places, full * CHUNK, int(strata.size % CHUNK), a,
                               rest);
            });
        });
    });
}
