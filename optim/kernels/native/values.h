// Runs of numbers and what holds them: fp32, bf16 rounded at random, bf16 with an int8 correction.
// The arithmetic is that of optim/storage (random.py, masters.py), which the tests compare it with.
//
// A run is loaded and stored through a buffer that nothing aliases: int8_t may alias everything, which would
// keep the compiler from vectorising a loop that both computes and stores it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

using bf16 = uint16_t;  // the bit pattern

constexpr int RUN = 128;  // elements worked on at a time: a block of the 8-bit format, 16 KiB of buffers at most

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

static inline bool is_nan(uint32_t bits) { return (bits & 0x7FFFFFFFu) > 0x7F800000u; }

static inline float widen(float value) { return value; }
static inline float widen(bf16 value) { return float_of(uint32_t(value) << 16); }

static inline uint32_t mix(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7FEB352Du;
    x ^= x >> 15;
    x *= 0x846CA68Bu;
    return x ^ (x >> 16);
}

struct Words {  // of a key, from one element on
    uint32_t first, second, low, high;

    uint32_t operator[](int i) const {
        // The offset in halves, 32 bits a lane. Where the low half wraps round, the high half is one more.
        const uint32_t here = low + uint32_t(i);
        return mix(mix(here + first) ^ (second + (high + (here < low)) * 0x9E3779B9u));
    }
};

struct Key {  // RandomKey.words(); both zero: none
    uint32_t first, second;

    bool given() const { return first || second; }
    Words from(uint64_t place) const { return {first, second, uint32_t(place), uint32_t(place >> 32)}; }
};

constexpr int LINE = 64;  // bytes

// Asks for memory ahead of its use: the hardware's own prefetching ends at the end of a page of 4 KiB, and pauses
// while a run is computed with.
static inline void fetch(const void* from, int64_t bytes) {
    for (int64_t byte = 0; byte < bytes; byte += LINE) __builtin_prefetch(static_cast<const char*>(from) + byte);
}

struct Fp32 {
    float* data;

    void fetch(int64_t start, int count) const { ::fetch(data + start, 4 * count); }

    void load(int64_t start, int count, float* __restrict value) const {
#pragma omp simd
        for (int i = 0; i < count; i++) value[i] = data[start + i];
    }
    void store(int64_t start, int count, const float* __restrict value) const {
#pragma omp simd
        for (int i = 0; i < count; i++) data[start + i] = value[i];
    }
};

struct RandomBf16 {
    bf16* data;
    Key key;
    uint64_t offset;  // of data[0] within its parameter

    void fetch(int64_t start, int count) const { ::fetch(data + start, 2 * count); }
    void load(int64_t start, int count, float* __restrict value) const {
#pragma omp simd
        for (int i = 0; i < count; i++) value[i] = widen(data[start + i]);
    }
    void store(int64_t start, int count, const float* __restrict value) const {
        const Words random = key.from(offset + uint64_t(start));
        bf16* __restrict out = data + start;
        for (int i = 0; i < count; i++) {
            uint32_t bits = bits_of(value[i]);
            out[i] = is_nan(bits) ? bf16(0x7FC0) : bf16((bits + (random[i] & 0xFFFFu)) >> 16);
        }
    }
};

struct Split24 {
    bf16* data;
    int8_t* correction;
    Key key;
    uint64_t offset;

    void fetch(int64_t start, int count) const {
        ::fetch(data + start, 2 * count);
        ::fetch(correction + start, count);
    }
    void load(int64_t start, int count, float* __restrict value) const {
        const bf16* __restrict in = data + start;
        const int8_t* __restrict low = correction + start;
        for (int i = 0; i < count; i++) {
            uint32_t high = uint32_t(in[i]) << 16;
            bool finite = (high & 0x7F800000u) != 0x7F800000u;
            value[i] = float_of(finite ? high + (uint32_t(int32_t(low[i])) << 8) : high);
        }
    }
    void store(int64_t start, int count, const float* __restrict value) const {
        if (!key.given()) return store_raised(start, count, value, [](int) { return 128u; });
        constexpr int MOST = 4 * RUN;
        for (int done = 0; done < count; done += MOST) {
            const int some = count - done < MOST ? count - done : MOST;
            // A word serves four elements, a byte each, the lowest first: little-endian.
            const uint64_t place = offset + uint64_t(start + done);
            const Words random = key.from(place / 4);
            const int behind = int(place % 4), needed = (behind + some + 3) / 4;
            uint32_t words[MOST / 4 + 1], raise[MOST];
            for (int i = 0; i < needed; i++) words[i] = random[i];
            // Widened beforehand: bytes may alias what store_raised writes.
            const uint8_t* bytes = reinterpret_cast<const uint8_t*>(words) + behind;
            for (int i = 0; i < some; i++) raise[i] = bytes[i];
            store_raised(start + done, some, value + done, [&](int i) { return raise[i]; });
        }
    }
    template <class Raise>  // by what the bit pattern is raised before the last 8 bits are cut
    void store_raised(int64_t start, int count, const float* __restrict value, Raise raise) const {
        bf16* __restrict out = data + start;
        int8_t* __restrict low = correction + start;
        for (int i = 0; i < count; i++) {
            uint32_t bits = bits_of(value[i]);
            uint32_t top = (bits + raise(i)) >> 8;
            uint32_t high = is_nan(bits) ? 0x7FC0u : (top + 128) >> 8;
            out[i] = bf16(high);
            low[i] = (high & 0x7F80u) == 0x7F80u ? int8_t(0) : int8_t(top - (high << 8));
        }
    }
};

// What the caller has: fields that do not apply are null or zero. The order is that of native.py.
struct Values {
    void* data;
    int8_t* correction;
    Key key;
    uint64_t offset;
    int32_t wide;
};

struct Gradient {
    const void* data;
    int32_t wide;
};

// Calls step(values) with the kind of values that the description means; one compiled step for each kind.
template <class Step>
static inline void with_weight(const Values& weight, Step step) {
    if (weight.wide)
        step(Fp32{static_cast<float*>(weight.data)});
    else if (weight.correction)
        step(Split24{static_cast<bf16*>(weight.data), weight.correction, weight.key, weight.offset});
    else
        step(RandomBf16{static_cast<bf16*>(weight.data), weight.key, weight.offset});
}

// As with_weight, for a moment: without a correction.
template <class Step>
static inline void with_moment(const Values& moment, Step step) {
    if (moment.wide)
        step(Fp32{static_cast<float*>(moment.data)});
    else
        step(RandomBf16{static_cast<bf16*>(moment.data), moment.key, moment.offset});
}

template <class Step>
static inline void with_moments(const Values& first, const Values& second, Step step) {
    if (first.wide)
        step(Fp32{static_cast<float*>(first.data)}, Fp32{static_cast<float*>(second.data)});
    else
        step(RandomBf16{static_cast<bf16*>(first.data), first.key, first.offset},
             RandomBf16{static_cast<bf16*>(second.data), second.key, second.offset});
}

template <class Step>
static inline void with_gradient(const Gradient& gradient, Step step) {
    if (gradient.wide)
        step(static_cast<const float*>(gradient.data));
    else
        step(static_cast<const bf16*>(gradient.data));
}

// Below torch's own grain (at::internal::GRAIN_SIZE) waking a second thread costs more than it does.
static inline int useful_threads(int64_t numel, int threads) { return numel < 32768 ? 1 : threads; }

// Calls step(start, count) for the runs of numel elements, by all threads.
template <class Step>
static inline void for_runs(int64_t numel, int threads, Step step) {
    const int64_t full = numel / RUN;
#pragma omp parallel for num_threads(useful_threads(numel, threads)) schedule(static)
    for (int64_t run = 0; run < full; run++) step(run * RUN, RUN);  // a constant, for the compiler to unroll by
    if (numel % RUN) step(full * RUN, int(numel % RUN));
}
