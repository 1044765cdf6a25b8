// A gradient of which every row or column is multiplied by a number of its own: the squares that the numbers come
// from, and the step. Called by scaled.py, which says what they compute and holds the references.
#include <algorithm>
#include <vector>

#include "values.h"

struct Matrix {
    int64_t rows, columns;
};

constexpr int LANES = 16;
constexpr int64_t BLOCK_ROWS = 64;  // squares are added in fp32 that far, and from there in fp64

template <class Element>
static double row_squares(const Element* __restrict row, int64_t columns) {
    double total = 0;
    for (int64_t start = 0; start < columns; start += 16 * LANES) {
        const int64_t count = columns - start < 16 * LANES ? columns - start : 16 * LANES;
        float lanes[LANES] = {};
        for (int64_t i = 0; i < count / LANES; i++)
#pragma omp simd
            for (int lane = 0; lane < LANES; lane++) {
                const float g = widen(row[start + i * LANES + lane]);
                lanes[lane] += g * g;
            }
        for (int64_t i = count / LANES * LANES; i < count; i++) lanes[0] += widen(row[start + i]) * widen(row[start + i]);
        float sum = 0;
        for (int lane = 0; lane < LANES; lane++) sum += lanes[lane];
        total += sum;
    }
    return total;
}

template <class Element>
static void column_squares(const Element* gradient, Matrix shape, float* squares, int threads) {
    std::vector<double> total(shape.columns);
    const int64_t blocks = (shape.rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
#pragma omp parallel num_threads(useful_threads(shape.rows * shape.columns, threads))
    {
        std::vector<float> sum(shape.columns);
        float* __restrict sums = sum.data();
        // In the order of the blocks, whichever thread has them: the same sum with any number of threads.
#pragma omp for schedule(static, 1) ordered
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t end = std::min(shape.rows, (block + 1) * BLOCK_ROWS);
            std::fill(sum.begin(), sum.end(), 0.0f);
            for (int64_t row = block * BLOCK_ROWS; row < end; row++) {
                const Element* __restrict from = gradient + row * shape.columns;
                for (int64_t i = 0; i < shape.columns; i++) sums[i] += widen(from[i]) * widen(from[i]);
            }
#pragma omp ordered
            for (int64_t i = 0; i < shape.columns; i++) total[i] += sums[i];
        }
    }
    for (int64_t i = 0; i < shape.columns; i++) squares[i] = float(total[i]);
}

// Of every row or of every column.
extern "C" void squares(Gradient gradient, Matrix shape, bool by_rows, float* squares, int threads) {
    with_gradient(gradient, [&](auto* gradients) {
        if (!by_rows) return column_squares(gradients, shape, squares, threads);
#pragma omp parallel for num_threads(useful_threads(shape.rows * shape.columns, threads)) schedule(static)
        for (int64_t row = 0; row < shape.rows; row++)
            squares[row] = float(row_squares(gradients + row * shape.columns, shape.columns));
    });
}

// weight = keep * weight - scaling * gradient, with a number for every row or for every column.
extern "C" void scaled_step(float* weight, Gradient gradient, const float* scaling, Matrix shape, bool by_rows,
                            float keep, int threads) {
    with_gradient(gradient, [&](auto* gradients) {
#pragma omp parallel for num_threads(useful_threads(shape.rows * shape.columns, threads)) schedule(static)
        for (int64_t row = 0; row < shape.rows; row++) {
            float* __restrict w = weight + row * shape.columns;
            const auto* __restrict g = gradients + row * shape.columns;
            if (by_rows) {
                const float by = scaling[row];
                for (int64_t i = 0; i < shape.columns; i++) w[i] = w[i] * keep - by * widen(g[i]);
            } else {
                for (int64_t i = 0; i < shape.columns; i++) w[i] = w[i] * keep - scaling[i] * widen(g[i]);
            }
        }
    });
}

struct Limit {
    int64_t channels;     // rows or columns
    float before, after;  // factors of the scaling, inside and outside of the norm that is limited
    float limiter;        // 0: none
    int32_t by_channel, rest;
};

// sums: [3, channels], of R the squares, those of its direction, and what a basis that is not quite orthonormal adds
// to the first; gradient: the gradient's squares. The scalings, and the last norm, where there is a limiter.
extern "C" void limited(const float* sums, const float* gradient, float* last, float* scaling, Limit l, int) {
    const float *low = sums, *direction = low + l.channels, *common = direction + l.channels;
    double above = 0, below = 0, norm = 0;
    for (int64_t i = 0; i < l.channels; i++) above += direction[i], below += low[i];
    const float whole = below > 0 ? float(std::sqrt(above) / std::sqrt(below)) : 0.0f;
    for (int64_t i = 0; i < l.channels; i++) {
        // The quotient of the squares would overflow where R is tiny: its square is a denormal number then.
        const float each = low[i] > 0 ? std::sqrt(direction[i]) / std::sqrt(low[i]) : 0.0f;
        const float scaled = (l.by_channel ? each : whole) * l.before;
        const float left = gradient[i] - low[i] - common[i], squares = l.rest ? (left < 0 ? 0 : left) : gradient[i];
        norm += double(scaled) * scaled * squares;
        scaling[i] = scaled;
    }
    float factor = l.after;
    if (l.limiter > 0) {
        const double root = std::sqrt(norm), growth = *last > 0 ? root / *last : 0;
        const double limit = growth > l.limiter || growth != growth ? l.limiter / growth : 1;
        *last = float(root * limit);
        factor *= float(limit);
    }
    for (int64_t i = 0; i < l.channels; i++) scaling[i] *= factor;
}
