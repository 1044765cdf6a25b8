// Adam on the low-dimensional gradient: its moments in place, its direction beside them.
// Called by lowrank_adam.py, which says what it computes and holds the reference.
#include <type_traits>

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

struct Matrix {
    int64_t rows, columns;
};

constexpr int LANES = 16;

// Sums over a row, by lanes, or over a column.
struct Sums {
    float low[RUN] = {}, direction[RUN] = {}, common[RUN] = {};
};

// A run of a row of R: as above, and added to the sums lane by lane (LANE_SUMS) or element by element.
template <bool LANE_SUMS>
static inline void summed_run(const float* low, float* mean, float* square, float* direction, const float* back,
                              int64_t start, int count, const Direction& d, Sums& sums) {
    float m[RUN], v[RUN], n[RUN];
    const float* __restrict r = low + start;
    for (int i = 0; i < count; i++) {
        m[i] = mean[start + i] + (r[i] - mean[start + i]) * d.gain1;
        v[i] = square[start + i] * d.beta2 + r[i] * r[i] * d.gain2;
        n[i] = m[i] * d.rate / (std::sqrt(v[i]) * d.root + d.eps);
    }
    put(mean, start, count, m);
    put(square, start, count, v);
    if (direction) put(direction, start, count, n);
    for (int first = 0; first < count; first += LANES) {
        const int lanes = count - first < LANES ? count - first : LANES, to = LANE_SUMS ? 0 : first;
        const auto add = [&](int lanes) {
#pragma omp simd
            for (int i = 0; i < lanes; i++) {
                sums.low[to + i] += r[first + i] * r[first + i];
                sums.direction[to + i] += n[first + i] * n[first + i];
                if (back) sums.common[to + i] += r[first + i] * back[start + first + i];
            }
        };
        lanes == LANES ? add(LANES) : add(lanes);
    }
}

// As lowrank_adam, and by row or column of R its squares, those of the direction and, with `back`, the products of the
// two: sums [3, rows or columns]. The direction is not kept where there is no room for it.
extern "C" void lowrank_adam_summed(const float* low, float* mean, float* square, float* direction, const float* back,
                                    Matrix shape, bool by_rows, float* sums, Direction d, int threads) {
    const int64_t runs = (shape.columns + RUN - 1) / RUN, channels = by_rows ? shape.rows : shape.columns;
    const auto run_of = [&](auto lane_sums, int64_t row, int64_t run, Sums& found) {
        const int64_t column = run * RUN, left = shape.columns - column, start = row * shape.columns + column;
        const auto step = [&](int count) {
            summed_run<decltype(lane_sums)::value>(low, mean, square, direction, back, start, count, d, found);
        };
        left >= RUN ? step(RUN) : step(int(left));  // a constant, to unroll by
    };
    if (by_rows) {
#pragma omp parallel for num_threads(useful_threads(shape.rows * shape.columns, threads)) schedule(static)
        for (int64_t row = 0; row < shape.rows; row++) {
            Sums found;
            for (int64_t run = 0; run < runs; run++) run_of(std::true_type{}, row, run, found);
            float total[3] = {};
            for (int lane = 0; lane < LANES; lane++) {
                total[0] += found.low[lane];
                total[1] += found.direction[lane];
                total[2] += found.common[lane];
            }
            for (int which = 0; which < 3; which++) sums[which * channels + row] = total[which];
        }
        return;
    }
#pragma omp parallel for num_threads(useful_threads(shape.rows * shape.columns, threads)) schedule(static)
    for (int64_t run = 0; run < runs; run++) {
        Sums found;
        for (int64_t row = 0; row < shape.rows; row++) run_of(std::false_type{}, row, run, found);
        const int64_t column = run * RUN;
        for (int64_t i = 0; i < RUN && column + i < channels; i++) {
            sums[column + i] = found.low[i];
            sums[channels + column + i] = found.direction[i];
            sums[2 * channels + column + i] = found.common[i];
        }
    }
}
