// Random matrices from a key: quantiles of the normal distribution, or signs.
// Called by draw.py, which says what they are and holds the references.
#include "values.h"

static inline float narrowed(float value, float) { return value; }
static inline bf16 narrowed(float value, bf16) { return bf16(bits_of(value) >> 16); }  // a bf16 already

// Calls step(out, first word, words) by all threads for runs of words that make `each` elements each.
template <class Element, class Step>
static void for_words(Element* out, int64_t count, int each, int threads, Step step) {
    const int64_t runs = (count / each + RUN - 1) / RUN;
#pragma omp parallel for num_threads(useful_threads(count, threads)) schedule(static)
    for (int64_t run = 0; run < runs; run++) {
        const int64_t first = run * RUN, left = count / each - first;
        step(out + first * each, first, int(left < RUN ? left : RUN));
    }
    if (count % each) {
        Element last[32];
        step(last, count / each, 1);
        std::memcpy(out + count / each * each, last, count % each * sizeof(Element));
    }
}

// quantile: of half a normal distribution, 2^11 of them, rounded to what is drawn.
template <class Element>
static void quantiles(Element* out, int64_t count, Key key, const float* quantile, int threads) {
    for_words(out, count, 2, threads, [&](Element* __restrict to, int64_t first, int words) {
        const Words random = key.from(uint64_t(first));
        uint16_t halves[2 * RUN];
        float values[2 * RUN];
        for (int i = 0; i < words; i++) {
            const uint32_t word = random[i];
            std::memcpy(halves + 2 * i, &word, sizeof word);  // the low half first: little-endian
        }
#pragma omp simd
        for (int i = 0; i < 2 * words; i++) {
            const uint32_t half = halves[i];
            values[i] = float_of(bits_of(quantile[half & 0x7FFu]) | (half & 0x8000u) << 16);
        }
        for (int i = 0; i < 2 * words; i++) to[i] = narrowed(values[i], Element());
    });
}

template <class Element>
static void signs(Element* out, int64_t count, Key key, float scale, int threads) {
    for_words(out, count, 32, threads, [&](Element* __restrict to, int64_t first, int words) {
        const Words random = key.from(uint64_t(first));
        for (int i = 0; i < words; i++) {
            const uint32_t word = random[i];
            for (int bit = 0; bit < 32; bit++)
                to[32 * i + bit] = narrowed(float_of(bits_of(scale) ^ (~word >> bit & 1u) << 31), Element());
        }
    });
}

extern "C" void draw_quantiles(Values out, int64_t count, const float* quantile, int threads) {
    if (out.wide)
        quantiles(static_cast<float*>(out.data), count, out.key, quantile, threads);
    else
        quantiles(static_cast<bf16*>(out.data), count, out.key, quantile, threads);
}

extern "C" void draw_signs(Values out, int64_t count, float scale, int threads) {
    if (out.wide)
        signs(static_cast<float*>(out.data), count, out.key, scale, threads);
    else
        signs(static_cast<bf16*>(out.data), count, out.key, scale, threads);
}
