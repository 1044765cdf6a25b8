// Adam on some entries of a stretch of memory, sign or SGD on all: what columns and randk share.
#pragma once

#include "adam.h"
#include "rest.h"

// Entries of the stretch at rising positions, with moments that lie side by side from `place` on.
struct Chosen {
    const int32_t* positions;
    int count;
    int64_t place;
};

// The new weights of the chosen entries into `updated`, their moments in place.
template <class Moments>
static inline void adam_on_chosen(const float* __restrict weights, const float* __restrict gradients,
                                  const Moments& means, const Moments& squares, const Chosen& chosen,
                                  float* __restrict updated, const Adam& a) {
    auto step = [&](int start, int count) {
        float g[RUN], m[RUN], v[RUN], *w = updated + start;
        const int32_t* at = chosen.positions + start;
        for (int i = 0; i < count; i++) {
            g[i] = gradients[at[i]];
            w[i] = weights[at[i]];
        }
        means.load(chosen.place + start, count, m);
        squares.load(chosen.place + start, count, v);
        adam_run(w, g, m, v, count, a);
        means.store(chosen.place + start, count, m);
        squares.store(chosen.place + start, count, v);
    };
    const int full = chosen.count / RUN * RUN;
    for (int start = 0; start < full; start += RUN) step(start, RUN);  // a constant, to unroll by
    if (full < chosen.count) step(full, chosen.count - full);
}
