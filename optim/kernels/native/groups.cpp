// int8 and int4 codes of groups that share a scale: one pass over the values, a group at a time.
// Called by kernels/group_codes.py; the format is autograd/group_codec.py's, which is the reference.
#include <type_traits>

#include "round.h"

constexpr int LARGEST = 256;  // of a group

struct Format {
    int32_t group, bits, random;
    uint32_t word;  // of the tensor: what random rounding depends on beside the place
};

static inline int32_t magnitude(float value) { return int32_t(bits_of(value) & 0x7FFFFFFFu); }
static inline bool finite(float value) { return magnitude(value) < 0x7F800000; }

// A whole number, ties to even, of a value below 2^22: adding 1.5 * 2^23 leaves it in the low bits.
static inline int32_t nearest(float value) { return int32_t(bits_of(value + 12582912.0f)) - 0x4B400000; }

// The scale of a group as bf16, rounded up; also whether all of it is finite.
template <int GROUP>
static inline bf16 scale_of(const float* v, int levels, bool* whole) {
    int32_t largest = 0, any = 0;
    for (int i = 0; i < GROUP; i++) {
        int32_t m = magnitude(v[i]);
        any = m > any ? m : any;
        m = m < 0x7F800000 ? m : 0;
        largest = m > largest ? m : largest;
    }
    *whole = any < 0x7F800000;
    return bf16((bits_of(float_of(uint32_t(largest)) / float(levels)) + 0xFFFFu) >> 16);
}

// Positions are those of halves: one hash serves a place in either half of the group, 16 bits each.
template <int GROUP>
static inline void round_at_random(const float* steps, int levels, uint32_t word, int64_t group, int32_t* code) {
    const uint32_t first = uint32_t(group) * (GROUP / 2);
    for (int i = 0; i < GROUP / 2; i++) {
        uint32_t bits = mix(mix(first + uint32_t(i)) ^ word);
        float low = (float(int32_t(bits & 0xFFFFu)) + 0.5f) * 0x1p-16f;
        float high = (float(int32_t(bits >> 16)) + 0.5f) * 0x1p-16f;
        int32_t a = int32_t(std::floor(steps[i] + low)), b = int32_t(std::floor(steps[GROUP / 2 + i] + high));
        code[i] = a < levels ? a : levels;
        code[GROUP / 2 + i] = b < levels ? b : levels;
    }
}

template <int GROUP>
static inline void encode_group(const float* v, const Format& f, int64_t group, uint8_t* __restrict out, bf16* scale) {
    const int levels = (1 << (f.bits - 1)) - 1;
    float steps[GROUP];
    int32_t code[GROUP];
    bool whole;
    *scale = scale_of<GROUP>(v, levels, &whole);
    const float unit = *scale ? widen(*scale) : 1.0f;
    for (int i = 0; i < GROUP; i++) steps[i] = (finite(v[i]) ? v[i] : 0.0f) / unit;
    if (f.random)
        round_at_random<GROUP>(steps, levels, f.word, group, code);
    else
        for (int i = 0; i < GROUP; i++) code[i] = nearest(steps[i]);
    if (!whole)
        for (int i = 0; i < GROUP; i++) code[i] = finite(v[i]) ? code[i] : -levels - 1;
    if (f.bits == 8)
        for (int i = 0; i < GROUP; i++) out[i] = uint8_t(code[i]);
    else
        for (int i = 0; i < GROUP / 2; i++) out[i] = uint8_t((code[i] & 15) | (code[GROUP / 2 + i] << 4));
}

template <int GROUP>
static inline void decode_group(const uint8_t* __restrict in, float scale, int bits, float* __restrict v) {
    const int32_t lowest = -(1 << (bits - 1));
    int32_t code[GROUP];
    if (bits == 8) {
        for (int i = 0; i < GROUP; i++) code[i] = int8_t(in[i]);
    } else {
        for (int i = 0; i < GROUP / 2; i++) {
            code[i] = int8_t(in[i] << 4) >> 4;
            code[GROUP / 2 + i] = int8_t(in[i]) >> 4;
        }
    }
    for (int i = 0; i < GROUP; i++) v[i] = code[i] == lowest ? float_of(0x7FC00000u) : float(code[i]) * scale;
}

// Calls step(group, start, count) for the groups of numel values, by all threads.
template <int GROUP, class Step>
static inline void for_groups(int64_t numel, int threads, Step step) {
    const int64_t groups = (numel + GROUP - 1) / GROUP;
#pragma omp parallel for num_threads(useful_threads(numel, threads)) schedule(static)
    for (int64_t group = 0; group < groups; group++) {
        int64_t left = numel - group * GROUP;
        step(group, group * GROUP, left < GROUP ? int(left) : GROUP);
    }
}

template <int GROUP>
static void encode_all(Gradient values, uint8_t* codes, bf16* scales, int64_t numel, const Format& f, int threads) {
    const int64_t row = GROUP * f.bits / 8;
    with_gradient(values, [&](auto* data) {
        for_groups<GROUP>(numel, threads, [&](int64_t group, int64_t start, int count) {
            float v[GROUP] = {};
            if (count == GROUP)
                for (int i = 0; i < GROUP; i++) v[i] = widen(data[start + i]);
            else
                for (int i = 0; i < count; i++) v[i] = widen(data[start + i]);
            encode_group<GROUP>(v, f, group, codes + group * row, scales + group);
        });
    });
}

template <int GROUP>
static void decode_all(const uint8_t* codes, const bf16* scales, Target values, int64_t numel, const Format& f,
                       int threads) {
    const int64_t row = GROUP * f.bits / 8;
    with_target(values, [&](auto* data) {
        for_groups<GROUP>(numel, threads, [&](int64_t group, int64_t start, int count) {
            float v[GROUP];
            decode_group<GROUP>(codes + group * row, widen(scales[group]), f.bits, v);
            if (count == GROUP)
                for (int i = 0; i < GROUP; i++) narrow(v[i], data + start + i);
            else
                for (int i = 0; i < count; i++) narrow(v[i], data + start + i);
        });
    });
}

// group is 64, 128 or 256.
template <class Step>
static inline void with_group(int group, Step step) {
    if (group == 64)
        step(std::integral_constant<int, 64>());
    else if (group == 128)
        step(std::integral_constant<int, 128>());
    else
        step(std::integral_constant<int, LARGEST>());
}

extern "C" void encode_groups(Gradient values, uint8_t* codes, bf16* scales, int64_t numel, Format format, int threads) {
    with_group(format.group, [&](auto group) { encode_all<group()>(values, codes, scales, numel, format, threads); });
}

extern "C" void decode_groups(const uint8_t* codes, const bf16* scales, Target values, int64_t numel, Format format,
                              int threads) {
    with_group(format.group, [&](auto group) { decode_all<group()>(codes, scales, values, numel, format, threads); });
}
