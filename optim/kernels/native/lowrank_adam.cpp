// Adam on the low-dimensional gradient: its moments in place, its direction beside them.
// Called by lowrank_adam.py, which says what it computes and holds the reference.
#include "values.h"

struct Direction {
    float gain1, beta2, gain2, rate, root, eps;
};

static inline void put(float* out, int64_t start, int count, const float* __restrict value) {
    for (int i = 0; i < count; i++) out[start + i] = value[i];
}

static inline void put(bf16* out, int64_t start, int count, const float* __restrict value) {
    for (int i = 0; i < count; i++) {
        const uint32_t bits = bits_of(value[i]);
        out[start + i] = is_nan(bits) ? bf16(0x7FC0) : bf16((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
    }
}

extern "C" void lowrank_adam(const float* low, float* mean, float* square, void* direction, int32_t wide,
                             int64_t numel, Direction d, int threads) {
    for_runs(numel, threads, [&](int64_t start, int count) {
        float m[RUN], v[RUN], n[RUN];
        const float* __restrict r = low + start;
        for (int i = 0; i < count; i++) {
            m[i] = mean[start + i] + (r[i] - mean[start + i]) * d.gain1;
            v[i] = square[start + i] * d.beta2 + r[i] * r[i] * d.gain2;
            n[i] = m[i] * d.rate / (std::sqrt(v[i]) * d.root + d.eps);
        }
        put(mean, start, count, m);
        put(square, start, count, v);
        if (wide)
            put(static_cast<float*>(direction), start, count, n);
        else
            put(static_cast<bf16*>(direction), start, count, n);
    });
}
