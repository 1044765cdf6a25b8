// AdamW on 8-bit blocks: one pass over the memory, a block at a time in the first cache.
// Called by adamw8bit.py, which says what it computes and holds the reference.
#include "adam.h"

static inline float cube_root(float x) {  // of x in [0, 1]; one step of Halley's method: relative error 3e-5
    float c = float_of(bits_of(x) / 3 + 0x2A514067u);
    float cube = c * c * c;
    return x > 0 ? c * (cube + 2 * x) / (2 * cube + x) : 0.0f;
}

// The largest magnitude as a scale. Bit patterns of magnitudes are ordered as integers, NaN above all.
static inline float block_scale(const float* values, int count) {
    int32_t largest = 0;
    for (int i = 0; i < count; i++) {
        int32_t bits = int32_t(bits_of(values[i]) & 0x7FFFFFFFu);
        largest = bits > largest ? bits : largest;
    }
    if (largest >= 0x7F800000) return float_of(0x7FC00000u);
    return largest < 0x00800000 ? 0.0f : float_of(uint32_t(largest));
}

static inline float reciprocal(float scale) { return scale > 0 ? 1 / scale : 0.0f; }

template <class Weights, class Element>
static inline void block_step(const Weights& weights, const Element* gradient, int8_t* m_codes, float* m_scale,
                              uint8_t* v_codes, float* v_scale, int64_t start, int count, const Adam& a) {
    float w[RUN], g[RUN], m[RUN], v[RUN];
    const float m_unit = *m_scale / (127.0f * 127.0f), v_unit = *v_scale / (256.0f * 256.0f * 256.0f);
    weights.load(start, count, w);
    for (int i = 0; i < count; i++) {
        float mc = m_codes[start + i], vc = 1.0f + v_codes[start + i];
        g[i] = widen(gradient[start + i]);
        m[i] = mc * std::fabs(mc) * m_unit;
        v[i] = vc * vc * vc * v_unit;
    }
    adam_run(w, g, m, v, count, a);
    weights.store(start, count, w);
    *m_scale = block_scale(m, count);
    *v_scale = block_scale(v, count);
    const float m_inverse = reciprocal(*m_scale), v_inverse = reciprocal(*v_scale);
    const bool m_lost = std::isnan(*m_scale), v_lost = std::isnan(*v_scale);
    for (int i = 0; i < count; i++) {
        float y = std::floor(std::sqrt(std::fabs(m[i]) * m_inverse) * 127.0f + 0.5f);
        m_codes[start + i] = m_lost ? int8_t(0) : int8_t(int32_t(std::copysign(y, m[i])));
        float z = std::floor(cube_root(v[i] * v_inverse) * 256.0f - 0.5f);
        v_codes[start + i] = v_lost ? uint8_t(0) : uint8_t(int32_t(z < 0 ? 0.0f : z > 255 ? 255.0f : z));
    }
}

extern "C" void adamw8bit(Values weight, Gradient gradient, int8_t* m_codes, float* m_scales, uint8_t* v_codes,
                          float* v_scales, int64_t numel, Adam a, int threads) {
    with_weight(weight, [&](auto weights) {
        with_gradient(gradient, [&](auto* g) {
            for_runs(numel, threads, [&](int64_t start, int count) {
                int64_t block = start / RUN;
                block_step(weights, g, m_codes, m_scales + block, v_codes, v_scales + block, start, count, a);
            });
        });
    });
}
