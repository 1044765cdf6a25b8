// The products of the low-rank optimizers by AMX: down from the gradient, up into the weight.
// Called by lowrank_products.py, which says what they compute; lowrank_down.py and lowrank_up.py hold the
// references.
//
// The basis is packed once a call. With a right basis a thread takes 32 rows of the weight at a time, with a
// left one a strip of columns: what belongs to them of gradient, N and R is cast and packed into the cache, and
// sums leave the cache as R or in the weight alone. Each sum is formed in one order, whatever the threads.
#include <omp.h>

#include <type_traits>

#include "lowrank_up.h"

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#include "tiles.h"
#define HAS_TILES
#endif

struct Product {  // with a weight [rows, columns]
    int64_t rows, columns, rank;
    const bf16* basis;
    bf16* packed;   // room for the basis
    char* scratch;  // room for each thread
    int64_t scratch_bytes;
    int32_t right;
};

extern "C" void tiles_serve(int32_t* answer, int) {
#ifdef HAS_TILES
    *answer = tiles_granted();
#else
    *answer = 0;
#endif
}

#ifdef HAS_TILES

// 2048 x 512 and 512 x 2048, rank 256, one thread: 8, 16 and 32 pairs of tiles, and strips of 2, 4 and 8 blocks, are
// within a tenth of one another; a left basis is fastest with 8. lowrank_products.py knows both numbers.
constexpr int STEPS = 16;  // pairs of tiles that are summed before the next part of the gradient is packed
constexpr int STRIP = 8;   // blocks: columns of the weight that a thread takes at most with a left basis
// Of the weight, finished at a time. 2048 x 2048, right basis, one busy core: 8 blocks 2.5 ms; 4 blocks 2.8; without
// fetching ahead 3.4 and 3.6.
constexpr int RUN_COLUMNS = 8 * SIDE;

// Columns of a strip: narrower ones where there would be too few for all threads.
static inline int64_t strip_columns(const Product& p) {
    const int64_t threads = omp_get_num_threads(), share = (blocks_of(p.columns) + threads - 1) / threads;
    return std::min<int64_t>(STRIP, share) * SIDE;
}

template <bool ALONG, bool SECOND, class Number>
static void pack_all(const Number* from, int64_t stride, int64_t places, int64_t length, bf16* to) {
    const int64_t steps = blocks_of(length);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks_of(places); block++)
        pack<ALONG, SECOND>(from + block * SIDE * (ALONG ? stride : 1), stride, places - block * SIDE, length, steps,
                            to + block * steps * PAIR);
}

static void put(float* low, int64_t stride, const float* sums, int64_t sums_stride, int64_t rows, int64_t columns,
                bool add) {
    for (int64_t row = 0; row < rows; row++) {
        float* __restrict out = low + row * stride;
        const float* __restrict in = sums + row * sums_stride;
        if (add)
            for (int64_t i = 0; i < columns; i++) out[i] += in[i];
        else
            for (int64_t i = 0; i < columns; i++) out[i] = in[i];
    }
}

// R [rows, rank] = G Q; and, where wanted, the squares of the rows of G.
template <class Number>
static void down_right(const Product& p, const Number* gradient, float* low, float* squares, bool add, char* scratch) {
    const int64_t vectors = blocks_of(p.rank), steps = blocks_of(p.columns), width = vectors * SIDE;
    bf16* cast = reinterpret_cast<bf16*>(scratch);
    float* sums = reinterpret_cast<float*>(cast + STEPS * PAIR);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p.rows; row += SIDE) {
        const int64_t rows = std::min<int64_t>(SIDE, p.rows - row);
        float lanes[SIDE][16] = {};
        for (int64_t step = 0; step < steps; step += STEPS) {
            const int64_t count = std::min<int64_t>(STEPS, steps - step);
            const Number* from = gradient + row * p.columns + step * SIDE;
            pack<true, false>(from, p.columns, rows, p.columns - step * SIDE, count, cast, squares ? lanes[0] : nullptr);
            for (int64_t v = 0; v < vectors; v++)
                multiply(cast, p.packed + (v * steps + step) * PAIR, count, sums + v * SIDE, width, step > 0);
        }
        put(low + row * p.rank, p.rank, sums, width, rows, p.rank, add);
        for (int64_t i = 0; squares && i < rows; i++) {
            float sum = 0;
            for (int lane = 0; lane < 16; lane++) sum += lanes[i][lane];
            squares[row + i] = sum;
        }
    }
}

// R [rank, columns] = P^T G; and, where wanted, the squares of the columns of G.
template <class Number>
static void down_left(const Product& p, const Number* gradient, float* low, float* squares, bool add, char* scratch) {
    const int64_t vectors = blocks_of(p.rank), steps = blocks_of(p.rows), width = strip_columns(p);
    bf16* cast = reinterpret_cast<bf16*>(scratch);
    float* sums = reinterpret_cast<float*>(cast + STRIP * STEPS * PAIR);
#pragma omp for schedule(static)
    for (int64_t start = 0; start < p.columns; start += width) {
        const int64_t columns = std::min(width, p.columns - start), blocks = blocks_of(columns);
        float lanes[STRIP * SIDE] = {};
        for (int64_t step = 0; step < steps; step += STEPS) {
            const int64_t count = std::min<int64_t>(STEPS, steps - step);
            for (int64_t b = 0; b < blocks; b++)
                pack<false, true>(gradient + step * SIDE * p.columns + start + b * SIDE, p.columns,
                                  columns - b * SIDE, p.rows - step * SIDE, count, cast + b * STEPS * PAIR,
                                  squares ? lanes + b * SIDE : nullptr);
            for (int64_t v = 0; v < vectors; v++)
                for (int64_t b = 0; b < blocks; b++)
                    multiply(p.packed + (v * steps + step) * PAIR, cast + b * STEPS * PAIR, count,
                             sums + v * SIDE * width + b * SIDE, width, step > 0);
        }
        put(low + start, p.columns, sums, width, p.rank, columns, add);
        if (squares) std::copy(lanes, lanes + columns, squares + start);
    }
}

extern "C" void lowrank_down(Product p, float* low, Gradient gradient, float* squares, int32_t add, int threads) {
    with_gradient(gradient, [&](auto* gradients) {
#pragma omp parallel num_threads(useful_threads(p.rows * p.columns, threads))
        {
            TileRegisters registers;
            char* scratch = p.scratch + omp_get_thread_num() * p.scratch_bytes;
            if (p.right) {
                pack_all<false, true>(p.basis, p.rank, p.rank, p.columns, p.packed);
                down_right(p, gradients, low, squares, add, scratch);
            } else {
                pack_all<false, false>(p.basis, p.rank, p.rank, p.rows, p.packed);
                down_left(p, gradients, low, squares, add, scratch);
            }
        }
    });
}

// What is done with the gradient once more: the sign of its residual, for which low is R; or, with a scaling of a
// number for each column (left basis) or row (right), `w -= scaling G`; or nothing, and all are null.
template <class Number>
struct Again {
    const Number* gradient;
    const float *low, *scaling;
};

// Some rows of the weight, from as many of P N and, for a sign, of P R.
template <class Weights, class Number>
static inline void finish(Weights weights, const Again<Number>& again, const float* update, const float* inner,
                          const Product& p, int64_t first_row, int64_t rows, int64_t column, int64_t columns,
                          const Up& up) {
    for (int64_t row = first_row; row < first_row + rows; row++, update += RUN_COLUMNS, inner += RUN_COLUMNS) {
        const int64_t place = row * p.columns + column;
        float w[RUN_COLUMNS];
        const auto step = [&](int count) {
            weights.load(place, count, w);
            up_run(w, update, count, up);
            const Number* gradient = again.gradient + place;
            if (again.low)
                sign_run(w, gradient, inner, count, up);
            else if (again.scaling && p.right)
                scaled_run(w, gradient, again.scaling[row], count);
            else if (again.scaling)
                scaled_run(w, gradient, again.scaling + column, count);
            weights.store(place, count, w);
        };
        if (columns == RUN_COLUMNS)
            step(RUN_COLUMNS);  // a constant, for the compiler to unroll by
        else
            step(int(columns));
    }
}

// Asks for a share of the rows that finish() will want, before each product: the hardware does not see runs of
// 1 KiB coming, and fetches them while the tiles multiply.
template <class Number>
static inline void fetch(const Number* from, const Product& p, int64_t rows, int64_t columns, int64_t block) {
    const int64_t blocks = blocks_of(columns);
    for (int64_t row = rows * block / blocks; row < rows * (block + 1) / blocks; row++) {
        const char* line = reinterpret_cast<const char*>(from + row * p.columns);
        for (int64_t byte = 0; byte < columns * int64_t(sizeof(Number)); byte += 64)
            _mm_prefetch(line + byte, _MM_HINT_T1);
    }
}

// What the way up holds of a thread: N and, with a residual, R, packed; sums of either.
struct UpScratch {
    bf16 *direction, *low;
    float *update, *inner;

    UpScratch(char* scratch, int64_t numbers) {
        direction = reinterpret_cast<bf16*>(scratch);
        low = direction + numbers;
        update = reinterpret_cast<float*>(low + numbers);
        inner = update + SIDE * RUN_COLUMNS;
    }
};

// W -= N Q^T, 32 rows at a time
template <class Weights, class Number, class Small>
static void up_right(const Product& p, Weights weights, const Again<Number>& again, const Small* direction,
                     const Up& up, char* scratch) {
    const int64_t steps = blocks_of(p.rank);
    const UpScratch at(scratch, steps * PAIR);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < p.rows; row += SIDE) {
        const int64_t rows = std::min<int64_t>(SIDE, p.rows - row);
        pack<true, false>(direction + row * p.rank, p.rank, rows, p.rank, steps, at.direction);
        if (again.low) pack<true, false>(again.low + row * p.rank, p.rank, rows, p.rank, steps, at.low);
        for (int64_t start = 0; start < p.columns; start += RUN_COLUMNS) {
            const int64_t columns = std::min<int64_t>(RUN_COLUMNS, p.columns - start);
            for (int64_t b = 0; b < blocks_of(columns); b++) {
                const bf16* basis = p.packed + (start / SIDE + b) * steps * PAIR;
                fetch(weights.data + row * p.columns + start, p, rows, columns, b);
                if (again.gradient) fetch(again.gradient + row * p.columns + start, p, rows, columns, b);
                multiply(at.direction, basis, steps, at.update + b * SIDE, RUN_COLUMNS, false);
                if (again.low) multiply(at.low, basis, steps, at.inner + b * SIDE, RUN_COLUMNS, false);
            }
            finish(weights, again, at.update, at.inner, p, row, rows, start, columns, up);
        }
    }
}

// W -= P N, a strip of columns at a time
template <class Weights, class Number, class Small>
static void up_left(const Product& p, Weights weights, const Again<Number>& again, const Small* direction,
                    const Up& up, char* scratch) {
    const int64_t steps = blocks_of(p.rank), width = strip_columns(p), panel = steps * PAIR;
    const UpScratch at(scratch, STRIP * panel);
#pragma omp for schedule(static)
    for (int64_t strip = 0; strip < p.columns; strip += width) {
        const int64_t end = std::min(strip + width, p.columns);
        for (int64_t column = strip, b = 0; column < end; column += SIDE, b++) {
            pack<false, true>(direction + column, p.columns, end - column, p.rank, steps, at.direction + b * panel);
            if (again.low)
                pack<false, true>(again.low + column, p.columns, end - column, p.rank, steps, at.low + b * panel);
        }
        for (int64_t row = 0; row < p.rows; row += SIDE) {
            const int64_t rows = std::min<int64_t>(SIDE, p.rows - row);
            const bf16* basis = p.packed + row / SIDE * panel;
            for (int64_t start = strip; start < end; start += RUN_COLUMNS) {
                const int64_t columns = std::min<int64_t>(RUN_COLUMNS, end - start);
                for (int64_t b = 0; b < blocks_of(columns); b++) {
                    const int64_t from = ((start - strip) / SIDE + b) * panel;
                    fetch(weights.data + row * p.columns + start, p, rows, columns, b);
                    if (again.gradient) fetch(again.gradient + row * p.columns + start, p, rows, columns, b);
                    multiply(basis, at.direction + from, steps, at.update + b * SIDE, RUN_COLUMNS, false);
                    if (again.low) multiply(basis, at.low + from, steps, at.inner + b * SIDE, RUN_COLUMNS, false);
                }
                finish(weights, again, at.update, at.inner, p, row, rows, start, columns, up);
            }
        }
    }
}

extern "C" void lowrank_up(Product p, Values weight, Gradient direction, Gradient gradient, const float* low,
                           const float* scaling, Up up, int threads) {
    with_weight(weight, [&](auto weights) {
        with_gradient(direction, [&](auto* directions) {
            with_gradient(gradient, [&](auto* gradients) {
                const Again<std::remove_const_t<std::remove_reference_t<decltype(*gradients)>>> again{gradients, low, scaling};
#pragma omp parallel num_threads(useful_threads(p.rows * p.columns, threads))
                {
                    TileRegisters registers;
                    char* scratch = p.scratch + omp_get_thread_num() * p.scratch_bytes;
                    if (p.right) {
                        pack_all<true, true>(p.basis, p.rank, p.columns, p.rank, p.packed);
                        up_right(p, weights, again, directions, up, scratch);
                    } else {
                        pack_all<true, false>(p.basis, p.rank, p.rows, p.rank, p.packed);
                        up_left(p, weights, again, directions, up, scratch);
                    }
                }
            });
        });
    });
}

#endif
