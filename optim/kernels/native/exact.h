// Values in fp32 or bf16, rounded to the nearest as torch does. Sources that include this are compiled without
// fused multiply-adds, which round once where torch's operators round twice.
#pragma once

#include "round.h"

template <class T>
static inline float rounded(float value) {
    T held;
    narrow(value, &held);
    return widen(held);
}

// Calls step with a value of the dtype: fp32 where wide, else bf16.
template <class Step>
static inline void with_dtype(bool wide, Step step) {
    if (wide)
        step(float{});
    else
        step(bf16{});
}

// Calls step(row) for every row, by all threads.
template <class Step>
static inline void for_rows(int64_t rows, int64_t columns, int threads, Step step) {
#pragma omp parallel for num_threads(useful_threads(rows * columns, threads)) schedule(static)
    for (int64_t row = 0; row < rows; row++) step(row);
}
