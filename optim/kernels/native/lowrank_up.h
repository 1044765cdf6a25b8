// The last step of the way up: what the products make of a run of the weight.
#pragma once

#include "rest.h"

struct Up {
    float keep, factor, residual_factor;
};

// w = keep w - factor (P N) - residual_factor sign(G - P R); gradient is null where there is no residual.
template <class Element, class Sum>
static inline void up_run(float* __restrict w, const Sum* __restrict update, const Sum* __restrict inner,
                          const Element* __restrict gradient, int count, const Up& up) {
    for (int i = 0; i < count; i++) w[i] = w[i] * up.keep - up.factor * widen(update[i]);
    if (gradient)
        for (int i = 0; i < count; i++)
            w[i] -= up.residual_factor * sign_of(widen(gradient[i]) - widen(inner[i]));
}
