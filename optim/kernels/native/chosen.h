// Adam on some entries of a stretch of memory, sign or SGD on all others: what columns and randk share.
#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "adam.h"
#include "rest.h"

constexpr int LANES = 16;  // of a vector of the widest kind
constexpr int CHUNK = 512;  // elements whose weights and gradients lie in the first cache

// Which elements of a chunk are chosen, a bit for each. Their moments lie side by side.
struct Chosen {
    uint16_t lanes[CHUNK / LANES];

    // From a byte for each element, 1 or 0.
    void read(const uint8_t* taken) {
        for (int group = 0; group < CHUNK / LANES; group++, taken += LANES) {
#if defined(__AVX512BW__) && defined(__AVX512VL__)
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(taken));
            lanes[group] = _mm_test_epi8_mask(bytes, bytes);
#else
            lanes[group] = 0;
            for (int lane = 0; lane < LANES; lane++) lanes[group] |= uint16_t(taken[lane]) << lane;
#endif
        }
    }
};

// The chosen of LANES values to the beginning of `to`, which has room for LANES.
static inline void compress(const float* from, uint16_t chosen, float* to) {
#ifdef __AVX512F__
    // Not straight to memory: that is microcode on some processors.
    _mm512_storeu_ps(to, _mm512_maskz_compress_ps(chosen, _mm512_maskz_loadu_ps(chosen, from)));
#else
    for (int lane = 0; lane < LANES; lane++)
        if (chosen >> lane & 1) *to++ = from[lane];
#endif
}

// The other way: the chosen of LANES values from the beginning of `from`.
static inline void expand(float* into, uint16_t chosen, const float* from) {
#ifdef __AVX512F__
    _mm512_storeu_ps(into, _mm512_mask_expand_ps(_mm512_loadu_ps(into), chosen, _mm512_loadu_ps(from)));
#else
    for (int lane = 0; lane < LANES; lane++)
        if (chosen >> lane & 1) into[lane] = *from++;
#endif
}

// Chosen entries, RUN or fewer of them; `w` and `g` have room for whole vectors, of which no scalar loop is left
// over: its root and its quotient would take longer than all else.
template <class Moments>
static inline void adam_on_some(float* __restrict w, const float* __restrict g, const Moments& means,
                                const Moments& squares, int64_t place, int count, const Adam& a) {
    float m[RUN], v[RUN];
    const auto step = [&](int count, int padded) {
        means.load(place, count, m);
        squares.load(place, count, v);
        adam_run(w, g, m, v, padded, a);
        means.store(place, count, m);
        squares.store(place, count, v);
    };
    if (count == RUN) return step(RUN, RUN);  // a constant, for the compiler to unroll by
    const int padded = (count + LANES - 1) / LANES * LANES;
    for (int i = count; i < padded; i++) m[i] = v[i] = 0;
    step(count, padded);
}

// A stretch of gradients in fp32: itself, or `into`.
static inline const float* widened(const float* from, int, float*) { return from; }
static inline const float* widened(const bf16* from, int count, float* into) {
    for (int i = 0; i < count; i++) into[i] = widen(from[i]);
    return into;
}

// One step of `count` elements from `start` on; the moments of the chosen begin at `place`. How many were chosen.
template <class Weights, class Element, class Moments>
static inline int chosen_step(const Weights& weights, const Element* gradients, const Moments& means,
                              const Moments& squares, const Chosen& chosen, int64_t start, int count, int64_t place,
                              const Adam& a, const Rest& rest) {
    float w[CHUNK], wide[CHUNK], chosen_w[CHUNK + LANES], chosen_g[CHUNK + LANES];
    const int groups = (count + LANES - 1) / LANES;
    // All streams are read in order: what comes next is on its way while this chunk is computed with.
    weights.fetch(start + CHUNK, CHUNK);
    fetch(gradients + start + CHUNK, CHUNK * sizeof(Element));
    weights.load(start, count, w);
    const float* g = widened(gradients + start, count, wide);
    int many = 0;
    for (int group = 0; group < groups; group++) {
        compress(w + group * LANES, chosen.lanes[group], chosen_w + many);
        compress(g + group * LANES, chosen.lanes[group], chosen_g + many);
        many += __builtin_popcount(chosen.lanes[group]);
    }
    means.fetch(place + many, many);
    squares.fetch(place + many, many);
    for (int done = 0; done < many; done += RUN) {
        const int some = many - done < RUN ? many - done : RUN;
        adam_on_some(chosen_w + done, chosen_g + done, means, squares, place + done, some, a);
    }
    rest_run(w, g, count, rest);
    many = 0;
    for (int group = 0; group < groups; group++) {
        expand(w + group * LANES, chosen.lanes[group], chosen_w + many);
        many += __builtin_popcount(chosen.lanes[group]);
    }
    weights.store(start, count, w);
    return many;
}

// One chosen element whose moments lie apart from those of its neighbours. Made before, and put back after the step
// of its chunk.
template <class Weights>
struct Stray {
    const Weights& weights;
    int64_t element;
    float w[LANES] = {};

    template <class Element, class Moments>
    Stray(const Weights& weights, const Element* gradients, const Moments& means, const Moments& squares,
          int64_t element, int64_t place, const Adam& a)
        : weights(weights), element(element) {
        float g[LANES] = {widen(gradients[element])};
        weights.load(element, 1, w);
        adam_on_some(w, g, means, squares, place, 1, a);
    }
    void put() const { weights.store(element, 1, w); }
};
