// Updates without a second moment: the sign of the gradient, or the gradient itself.
#pragma once

#include "values.h"

struct Rest {
    float keep, lr;  // w = w * keep - lr * (sign of the) gradient
    int32_t sign;
};

static inline float sign_of(float x) { return float(x > 0) - float(x < 0); }

template <class Element>
static inline void rest_run(float* __restrict w, const Element* __restrict gradient, int count, const Rest& rest) {
    if (rest.sign)
        for (int i = 0; i < count; i++) w[i] = w[i] * rest.keep - rest.lr * sign_of(widen(gradient[i]));
    else
        for (int i = 0; i < count; i++) w[i] = w[i] * rest.keep - rest.lr * widen(gradient[i]);
}
