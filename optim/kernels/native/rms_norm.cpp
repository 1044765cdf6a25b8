// RMSNorm between the sums: forward and backward in two passes each, rounded where eager torch rounds.
// Called by rms_norm_cpu.py, which says what they compute and lets torch add up.
#include "exact.h"

struct Rows {
    int64_t rows, columns;
    int32_t wide;  // fp32, else bf16
    int32_t form;  // 0 round then scale, 1 scale then round, 2 one plus weight
};

template <class T, int FORM>
struct Norm {
    const T* __restrict weight;

    float scale(int64_t i) const { return FORM == 2 ? 1.0f + widen(weight[i]) : widen(weight[i]); }
    float normalised(float x, float rstd) const { return FORM == 0 ? rounded<T>(x * rstd) : x * rstd; }
    // The gradient of the normalised value.
    float inner(float dy, int64_t i) const { return FORM == 0 ? rounded<T>(dy * scale(i)) : dy * scale(i); }
};

template <class Step>
static inline void with_norm(const Rows& shape, const void* weight, Step step) {
    with_dtype(shape.wide, [&](auto kind) {
        using T = decltype(kind);
        const T* weights = static_cast<const T*>(weight);
        if (shape.form == 0)
            step(Norm<T, 0>{weights}, kind);
        else if (shape.form == 1)
            step(Norm<T, 1>{weights}, kind);
        else
            step(Norm<T, 2>{weights}, kind);
    });
}

extern "C" void squares(const void* x, float* out, Rows shape, int threads) {
    with_dtype(shape.wide, [&](auto kind) {
        using T = decltype(kind);
        for_rows(shape.rows, shape.columns, threads, [&](int64_t row) {
            const T* __restrict in = static_cast<const T*>(x) + row * shape.columns;
            float* __restrict to = out + row * shape.columns;
            for (int64_t i = 0; i < shape.columns; i++) to[i] = widen(in[i]) * widen(in[i]);
        });
    });
}

// y, with the rstd that is written from the mean of the squares, or, where means is null, with the one that is there.
extern "C" void scale_rows(
    const void* x, const void* weight, const float* means, float* rstd, void* y, float eps, Rows shape, int threads) {
    with_norm(shape, weight, [&](auto norm, auto kind) {
        using T = decltype(kind);
        for_rows(shape.rows, shape.columns, threads, [&](int64_t row) {
            const T* __restrict in = static_cast<const T*>(x) + row * shape.columns;
            T* __restrict out = static_cast<T*>(y) + row * shape.columns;
            if (means) rstd[row] = 1.0f / std::sqrt(means[row] + eps);
            const float r = rstd[row];
            for (int64_t i = 0; i < shape.columns; i++)
                narrow(norm.normalised(widen(in[i]), r) * norm.scale(i), out + i);
        });
    });
}

// What backward adds up: dy times the normalised values over rows (in bf16 where the form rounds first), and
// along rows their gradient times x. Either may be null.
extern "C" void backward_terms(
    const void* dy, const void* x, const void* weight, const float* rstd, void* over_rows, float* along, Rows shape,
    int threads) {
    with_norm(shape, weight, [&](auto norm, auto kind) {
        using T = decltype(kind);
        auto each = [&](auto* products) {
            for_rows(shape.rows, shape.columns, threads, [&](int64_t row) {
                const int64_t start = row * shape.columns;
                const T* __restrict in = static_cast<const T*>(x) + start;
                const T* __restrict gradient = static_cast<const T*>(dy) + start;
                const float r = rstd[row];
                if (products) {
                    auto* __restrict out = products + start;
                    for (int64_t i = 0; i < shape.columns; i++)
                        narrow(widen(gradient[i]) * norm.normalised(widen(in[i]), r), out + i);
                }
                if (along) {
                    float* __restrict out = along + start;
                    for (int64_t i = 0; i < shape.columns; i++)
                        out[i] = norm.inner(widen(gradient[i]), i) * widen(in[i]);
                }
            });
        };
        if (shape.form == 0)
            each(static_cast<T*>(over_rows));
        else
            each(static_cast<float*>(over_rows));
    });
}

// sums are those of backward_terms' along. dx gets both terms of the gradient of x, or one of them where the other
// is asked for apart.
extern "C" void backward_input(
    const void* dy, const void* x, const void* weight, const float* rstd, const float* sums, void* dx, float* through,
    Rows shape, int threads) {
    with_norm(shape, weight, [&](auto norm, auto kind) {
        using T = decltype(kind);
        for_rows(shape.rows, shape.columns, threads, [&](int64_t row) {
            const int64_t start = row * shape.columns;
            const T* __restrict in = static_cast<const T*>(x) + start;
            const T* __restrict gradient = static_cast<const T*>(dy) + start;
            T* __restrict out = static_cast<T*>(dx) + start;
            const float r = rstd[row];
            const float factor = 2.0f * (-0.5f * sums[row] * (r * r * r) / float(shape.columns));
            if (through) {
                float* __restrict other = through + start;
                for (int64_t i = 0; i < shape.columns; i++) {
                    narrow(norm.inner(widen(gradient[i]), i) * r, out + i);
                    other[i] = widen(in[i]) * factor;
                }
            } else {
                for (int64_t i = 0; i < shape.columns; i++)
                    narrow(norm.inner(widen(gradient[i]), i) * r + widen(in[i]) * factor, out + i);
            }
        });
    });
}
