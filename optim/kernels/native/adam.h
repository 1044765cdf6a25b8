// The arithmetic of one AdamW step: weight decay first and decoupled, eps on the corrected root.
#pragma once

#include "values.h"

struct Adam {  // AdamStep.kernel_numbers()
    float keep, rate, beta1, gain1, beta2, gain2, root, eps;
};

// Moments and weights of a run, in place.
static inline void adam_run(float* __restrict w, const float* __restrict g, float* __restrict m, float* __restrict v,
                            int count, const Adam& a) {
    for (int i = 0; i < count; i++) {
        m[i] = a.beta1 * m[i] + a.gain1 * g[i];
        v[i] = a.beta2 * v[i] + a.gain2 * g[i] * g[i];
        w[i] = w[i] * a.keep - a.rate * m[i] / (std::sqrt(v[i]) * a.root + a.eps);
    }
}
