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

// A stretch of gradients in fp32: itself, or `into`.
static inline const float* widened(const float* from, int, float*) { return from; }
static inline const float* widened(const bf16* from, int count, float* into) {
    for (int i = 0; i < count; i++) into[i] = widen(from[i]);
    return into;
}

// LENGTH entries, of which `count` are there; all of them where they are FULL.
template <int LENGTH, bool FULL, class Moments>
static inline void adam_on_some(const float* __restrict weights, const float* __restrict gradients,
                                const Moments& means, const Moments& squares, const int32_t* __restrict at,
                                int64_t place, int count, float* __restrict w, const Adam& a) {
    float g[LENGTH], m[LENGTH], v[LENGTH];
    if (FULL)
        count = LENGTH;
    else
        for (int i = 0; i < LENGTH; i++) m[i] = v[i] = 0;
#pragma omp simd
    for (int i = 0; i < LENGTH; i++) {
        g[i] = gradients[at[i]];
        w[i] = weights[at[i]];
    }
    means.load(place, count, m);
    squares.load(place, count, v);
    adam_run(w, g, m, v, LENGTH, a);
    means.store(place, count, m);
    squares.store(place, count, v);
}

// The new weights of the chosen entries into `updated`, which holds `padded(count)`, their moments in place.
template <class Moments>
static inline void adam_on_chosen(const float* __restrict weights, const float* __restrict gradients,
                                  const Moments& means, const Moments& squares, const Chosen& chosen,
                                  float* __restrict updated, const Adam& a) {
    int start = 0;
    auto some = [&](auto step, int length) {
        for (; start + length <= chosen.count; start += length)
            step(weights, gradients, means, squares, chosen.positions + start, chosen.place + start, length,
                 updated + start, a);
    };
    some(adam_on_some<RUN, true, Moments>, RUN);
    some(adam_on_some<LANES, true, Moments>, LANES);
    if (start < chosen.count)
        adam_on_some<LANES, false>(weights, gradients, means, squares, chosen.positions + start, chosen.place + start,
                                   chosen.count - start, updated + start, a);
}
