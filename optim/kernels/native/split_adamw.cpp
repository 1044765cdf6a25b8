// Adam on some rows or columns of a matrix and sign or SGD on the others: one pass over the memory.
// Called by split_adamw.py, which says what it computes and holds the reference.
#include <vector>

#include "chosen.h"

struct Matrix {
    int64_t rows, columns;
};

// index: active columns, best in rising order; moments are [rows, active].
template <class Weights, class Element, class Moments>
static void columns_step(const Weights& weights, const Element* gradients, const Moments& means, const Moments& squares,
                         const int64_t* index, int64_t active, Matrix shape, Adam a, Rest rest, int threads) {
    int64_t rising = active > 0;  // of the index, from its beginning: all but what a turned choice has at its end
    while (rising < active && index[rising - 1] < index[rising]) rising++;
    const int64_t chunks = (shape.columns + CHUNK - 1) / CHUNK;
    std::vector<uint8_t> taken(chunks * CHUNK);
    std::vector<Chosen> chosen(chunks);
    for (int64_t i = 0; i < rising; i++) taken[index[i]] = 1;
    for (int64_t chunk = 0; chunk < chunks; chunk++) chosen[chunk].read(taken.data() + chunk * CHUNK);
#pragma omp parallel num_threads(useful_threads(shape.rows * shape.columns, threads))
    {
        std::vector<Stray<Weights>> strays;
        strays.reserve(active - rising);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < shape.rows; row++) {
            const int64_t start = row * shape.columns;
            int64_t place = row * active;
            for (int64_t i = rising; i < active; i++)
                strays.emplace_back(weights, gradients, means, squares, start + index[i], place + i, a);
            for (int64_t chunk = 0; chunk < chunks; chunk++) {
                const int64_t column = chunk * CHUNK, left = shape.columns - column;
                const int count = left < CHUNK ? int(left) : CHUNK;
                place += chosen_step(weights, gradients, means, squares, chosen[chunk], start + column, count, place, a,
                                     rest);
            }
            for (const auto& stray : strays) stray.put();
            strays.clear();
        }
    }
}

constexpr int64_t AHEAD = 4 * RUN;

// index: active rows, in any order; moments are [active, columns].
template <class Weights, class Element, class Moments>
static void rows_step(const Weights& weights, const Element* gradients, const Moments& means, const Moments& squares,
                      const int64_t* index, int64_t active, Matrix shape, Adam a, Rest rest, int threads) {
    std::vector<int64_t> slot(shape.rows, -1);  // of every row its place among the moments' rows
    for (int64_t i = 0; i < active; i++) slot[index[i]] = i;
    const int64_t runs = (shape.columns + RUN - 1) / RUN;
    auto step = [&](int64_t start, int64_t place, int count) {
        float w[RUN], g[RUN], m[RUN], v[RUN];
        weights.fetch(start + AHEAD, RUN);
        fetch(gradients + start + AHEAD, RUN * sizeof(Element));
        weights.load(start, count, w);
        if (place < 0) {
            rest_run(w, gradients + start, count, rest);
        } else {
            for (int i = 0; i < count; i++) g[i] = widen(gradients[start + i]);
            means.fetch(place + AHEAD, RUN);
            squares.fetch(place + AHEAD, RUN);
            means.load(place, count, m);
            squares.load(place, count, v);
            adam_run(w, g, m, v, count, a);
            means.store(place, count, m);
            squares.store(place, count, v);
        }
        weights.store(start, count, w);
    };
#pragma omp parallel for num_threads(useful_threads(shape.rows * shape.columns, threads)) schedule(static)
    for (int64_t task = 0; task < shape.rows * runs; task++) {
        const int64_t r = task / runs, column = task % runs * RUN, left = shape.columns - column;
        const int64_t start = r * shape.columns + column, place = slot[r] < 0 ? -1 : slot[r] * shape.columns + column;
        if (left >= RUN)
            step(start, place, RUN);  // a constant, to unroll by
        else
            step(start, place, int(left));
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
                    rows_step(weights, gradients, means, squares, index, active, shape, a, rest, threads);
            });
        });
    });
}
