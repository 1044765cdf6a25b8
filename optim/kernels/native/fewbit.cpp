// Bins of activations' inputs, packed in the pass that finds them, and their levels times the gradient.
// Called by fewbit_pack.py, which says what it computes and holds the reference; the layout is bitpack.py's.
//
// For a number of values divisible by 8 the parts of all fields line up, and an eighth of the values is a
// strip: byte j of a field of width w holds the fields of value j of each of its 8 / w parts.
#include "round.h"

constexpr int BORDERS = 15;  // of four bits
constexpr int STRIPS = 8;

struct Table {
    int32_t bits, even;
    int32_t count;  // of the borders, or of the levels
};

template <class Element>
static inline void bins_of(const Element* values, int count, const float* borders, const Table& table,
                           int32_t* __restrict code) {
    float v[RUN];
    for (int i = 0; i < count; i++) {
        v[i] = widen(values[i]);
        code[i] = 0;
    }
    if (table.even)
        for (int i = 0; i < count; i++) v[i] = std::fabs(v[i]);
    for (int b = 0; b < table.count; b++) {
        const float border = borders[b];
        for (int i = 0; i < count; i++) code[i] += v[i] >= border;
    }
}

extern "C" void fewbit_pack(Gradient values, uint8_t* packed, const float* borders, int64_t strip, Table table,
                            int threads) {
    with_gradient(values, [&](auto* data) {
        for_runs(strip, threads, [&](int64_t start, int count) {
            int32_t code[STRIPS][RUN];
            for (int q = 0; q < STRIPS; q++) bins_of(data + q * strip + start, count, borders, table, code[q]);
            uint8_t* field = packed;
            int shift = 0;
            for (int width = 4; width; width /= 2) {
                if (!(table.bits & width)) continue;
                const int parts = 8 / width, mask = (1 << width) - 1;
                for (int first = 0; first < STRIPS / parts; first++) {
                    // Strip q is in row q mod (8 / parts) of bytes, at place q div that.
                    int32_t byte[RUN] = {};
                    for (int place = 0; place < parts; place++)
                        for (int i = 0; i < count; i++)
                            byte[i] |= ((code[first + place * (STRIPS / parts)][i] >> shift) & mask) << (place * width);
                    uint8_t* __restrict out = field + first * strip + start;
                    for (int i = 0; i < count; i++) out[i] = uint8_t(byte[i]);
                }
                field += strip * width;
                shift += width;
            }
        });
    });
}

extern "C" void fewbit_apply(const uint8_t* packed, const float* levels, Gradient gradient, Target result,
                             int64_t strip, Table table, int threads) {
    float level[BORDERS + 1] = {};
    for (int i = 0; i < table.count; i++) level[i] = levels[i];
    with_gradient(gradient, [&](auto* grads) {
        with_target(result, [&](auto* results) {
            for_runs(strip, threads, [&](int64_t start, int count) {
                for (int q = 0; q < STRIPS; q++) {
                    int32_t code[RUN] = {};
                    const uint8_t* field = packed;
                    int shift = 0;
                    for (int width = 4; width; width /= 2) {
                        if (!(table.bits & width)) continue;
                        const int rows = width, mask = (1 << width) - 1, place = q / rows;
                        const uint8_t* in = field + (q % rows) * strip + start;
                        for (int i = 0; i < count; i++) code[i] |= ((in[i] >> (place * width)) & mask) << shift;
                        field += strip * width;
                        shift += width;
                    }
                    const int64_t at = q * strip + start;
                    float value[RUN];
                    for (int i = 0; i < count; i++) value[i] = level[code[i]] * widen(grads[at + i]);
                    for (int i = 0; i < count; i++) narrow(value[i], results + at + i);
                }
            });
        });
    });
}
