// Adam on some entries of a stretch of memory, sign or SGD on all: what columns and randk share.
#pragma once

#include "adam.h"
#include "rest.h"

// Chosen entries are worked on so many at a time: a vector of the widest kind. Counts are hardly ever a multiple,
// and a compiler's scalar loop for what is left, with its root and its quotient, would take longer than all else.
constexpr int LANES = 16;

static inline int padded(int count) { return (count + LANES - 1) / LANES * LANES; }

// Entries at rising positions in the stretch, `padded(count)` of them, with moments that lie side by side from
// `place` on.
struct Chosen {
    const int32_t* positions;
    int count;
    int64_t place;
};

// The new weights of the chosen entries into `updated`, which holds `padded(count)`, their moments in place.
template <class Moments>
static inline void adam_on_chosen(const float* __restrict weights, const float* __restrict gradients,
                                  const Moments& means, const Moments& squares, const Chosen& chosen,
                                  float* __restrict updated, const Adam& a) {
    for (int start = 0; start < chosen.count; start += LANES) {
        float w[LANES], g[LANES], m[LANES] = {}, v[LANES] = {};
        const int32_t* at = chosen.positions + start;
        const int64_t place = chosen.place + start;
        const bool full = chosen.count - start >= LANES;
#pragma omp simd
        for (int i = 0; i < LANES; i++) {
            g[i] = gradients[at[i]];
            w[i] = weights[at[i]];
        }
        if (full) {
            means.load(place, LANES, m);
            squares.load(place, LANES, v);
        } else {
            means.load(place, chosen.count - start, m);
            squares.load(place, chosen.count - start, v);
        }
        adam_run(w, g, m, v, LANES, a);
        for (int i = 0; i < LANES; i++) updated[start + i] = w[i];
        if (full) {
            means.store(place, LANES, m);
            squares.store(place, LANES, v);
        } else {
            means.store(place, chosen.count - start, m);
            squares.store(place, chosen.count - start, v);
        }
    }
}
