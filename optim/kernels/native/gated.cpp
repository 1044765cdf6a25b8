// The products of a gated MLP: one pass over what plain torch takes three over.
// Called by gated_cpu.py, which lets torch compute the activation.
#include "exact.h"

extern "C" void product(void* activated, const void* up, int64_t numel, bool wide, int threads) {
    with_dtype(wide, [&](auto kind) {
        using T = decltype(kind);
        for_runs(numel, threads, [&](int64_t start, int count) {
            T* __restrict a = static_cast<T*>(activated) + start;
            const T* __restrict u = static_cast<const T*>(up) + start;
            for (int i = 0; i < count; i++) narrow(widen(a[i]) * widen(u[i]), a + i);
        });
    });
}

// activated becomes the gradient of up, dproduct that of the activation; product is written.
extern "C" void products_backward(
    void* dproduct, void* activated, const void* up, void* product, int64_t numel, bool wide, int threads) {
    with_dtype(wide, [&](auto kind) {
        using T = decltype(kind);
        for_runs(numel, threads, [&](int64_t start, int count) {
            T* __restrict d = static_cast<T*>(dproduct) + start;
            T* __restrict a = static_cast<T*>(activated) + start;
            T* __restrict p = static_cast<T*>(product) + start;
            const T* __restrict u = static_cast<const T*>(up) + start;
            for (int i = 0; i < count; i++) {
                const float gradient = widen(d[i]), active = widen(a[i]), other = widen(u[i]);
                narrow(active * other, p + i);
                narrow(gradient * active, a + i);
                narrow(gradient * other, d + i);
            }
        });
    });
}
