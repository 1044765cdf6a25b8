// Adam on some rows or columns of a matrix and sign or SGD on the others: one pass over the memory.
// Called by split_adamw.py, which says what it computes and holds the reference.
#include <vector>

#include "adam.h"
#include "rest.h"

struct Matrix {
    int64_t rows, columns;
};

// index: active columns, in any order; moments are [rows, active].
template <class Weights, class Element, class Moments>
static void columns_step(const Weights& weights, const Element* gradients, const Moments& means, const Moments& squares,
                         const int64_t* index, int64_t active, Matrix shape, Adam a, Rest rest, int threads) {
#pragma omp parallel num_threads(useful_threads(shape.rows * shape.columns, threads))
    {
        std::vector<float> row(shape.columns);
        std::vector<float> updated(active);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < shape.rows; r++) {
            const Element* gradient = gradients + r * shape.columns;
            weights.load(r * shape.columns, int(shape.columns), row.data());
            for (int64_t start = 0; start < active; start += RUN) {
                const int count = int(active - start < RUN ? active - start : RUN);
                float g[RUN], m[RUN], v[RUN], *w = updated.data() + start;
                for (int i = 0; i < count; i++) {
                    g[i] = widen(gradient[index[start + i]]);
                    w[i] = row[index[start + i]];
                }
                means.load(r * active + start, count, m);
                squares.load(r * active + start, count, v);
                adam_run(w, g, m, v, count, a);
                means.store(r * active + start, count, m);
                squares.store(r * active + start, count, v);
            }
            rest_run(row.data(), gradient, int(shape.columns), rest);
            for (int64_t i = 0; i < active; i++) row[index[i]] = updated[i];
            weights.store(r * shape.columns, int(shape.columns), row.data());
        }
    }
}

// slot: for every row its place among the moments' rows, or -1; moments are [active, columns].
template <class Weights, class Element, class Moments>
static void rows_step(const Weights& weights, const Element* gradients, const Moments& means, const Moments& squares,
                      const int64_t* slot, Matrix shape, Adam a, Rest rest, int threads) {
    const int64_t runs = (shape.columns + RUN - 1) / RUN;
#pragma omp parallel for num_threads(useful_threads(shape.rows * shape.columns, threads)) schedule(static)
    for (int64_t task = 0; task < shape.rows * runs; task++) {
        const int64_t r = task / runs, column = task % runs * RUN;
        const int count = int(shape.columns - column < RUN ? shape.columns - column : RUN);
        const int64_t start = r * shape.columns + column;
        float w[RUN], g[RUN], m[RUN], v[RUN];
        weights.load(start, count, w);
        if (slot[r] < 0) {
            rest_run(w, gradients + start, count, rest);
        } else {
            const int64_t place = slot[r] * shape.columns + column;
            for (int i = 0; i < count; i++) g[i] = widen(gradients[start + i]);
            means.load(place, count, m);
            squares.load(place, count, v);
            adam_run(w, g, m, v, count, a);
            means.store(place, count, m);
            squares.store(place, count, v);
        }
        weights.store(start, count, w);
    }
}

extern "C" void split_adamw(Values weight, Gradient gradient, Values first, Values second, const int64_t* index,
                            int64_t active, bool by_columns, Matrix shape, Adam a, Rest rest, int threads) {
    with_weight(weight, [&](auto weights) {
        with_gradient(gradient, [&](auto* gradients) {
            with_moments(first, second, [&](auto means, auto squares) {
                if (by_columns)
                    columns_step(weights, gradients, means, squares, index, active, shape, a, rest, threads);
                else
                    rows_step(weights, gradients, means, squares, index, shape, a, rest, threads);
            });
        });
    });
}
