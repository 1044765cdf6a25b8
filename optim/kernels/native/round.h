// fp32 into the dtype of a tensor, rounded to the nearest as torch does.
#pragma once

#include "values.h"

static inline void narrow(float value, float* out) { *out = value; }
static inline void narrow(float value, bf16* out) {
    uint32_t bits = bits_of(value);
    *out = is_nan(bits) ? bf16(0x7FC0) : bf16((bits + 0x7FFFu + ((bits >> 16) & 1)) >> 16);
}

struct Target {  // a tensor to write: as Gradient, which is one to read
    void* data;
    int32_t wide;
};

template <class Step>
static inline void with_target(const Target& target, Step step) {
    if (target.wide)
        step(static_cast<float*>(target.data));
    else
        step(static_cast<bf16*>(target.data));
}
