// The last step of the way up: what the products make of a run of the weight.
#pragma once

#include "rest.h"

struct Up {
    float keep, factor, residual_factor;
};

// w = keep w - factor (P N)
template <class Sum>
static inline void up_run(float* __restrict w, const Sum* __restrict update, int count, const Up& up) {
    for (int i = 0; i < count; i++) w[i] = w[i] * up.keep - up.factor * widen(update[i]);
}

// w -= residual_factor sign(G - P R)
template <class Element, class Sum>
static inline void sign_run(float* __restrict w, const Element* __restrict gradient, const Sum* __restrict inner,
                            int count, const Up& up) {
    for (int i = 0; i < count; i++)
        w[i] -= up.residual_factor * sign_of(widen(gradient[i]) - widen(inner[i]));
}

// w -= scaling G; the scaling one number, or one for each of them.
template <class Element>
static inline void scaled_run(float* __restrict w, const Element* __restrict gradient, float scaling, int count) {
    for (int i = 0; i < count; i++) w[i] -= scaling * widen(gradient[i]);
}

template <class Element>
static inline void scaled_run(float* __restrict w, const Element* __restrict gradient,
                              const float* __restrict scaling, int count) {
    for (int i = 0; i < count; i++) w[i] -= scaling[i] * widen(gradient[i]);
}
