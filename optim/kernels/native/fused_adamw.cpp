// torch's fused AdamW on fp32 numbers, to the last bit, with what surrounds it where there are fp32 masters: the
// gradient widened and clipped on the way in, the weight rounded on the way out. One pass over the memory.
// Called by fused_adamw.py, which finds out whether this torch rounds so.
//
// Compiled without contraction: fma stands where torch's compiler has fused a product into a sum.
#include "round.h"

struct Rates {  // in double, as torch has them
    double lr, beta1, beta2, eps, weight_decay, step;
};

struct Factors {  // of clipping, applied one after another
    const float* data;
    int32_t count;
};

struct Numbers {
    float keep, gain1, beta2, gain2, root, eps, negative_rate;
};

static Numbers numbers_of(const Rates& r) {
    const double correction1 = 1 - std::pow(r.beta1, r.step), correction2 = 1 - std::pow(r.beta2, r.step);
    return {float(std::fma(-r.lr, r.weight_decay, 1.0)),
            float(1 - r.beta1),
            float(r.beta2),
            float(1 - r.beta2),
            float(std::sqrt(correction2)),
            float(r.eps),
            float(-(r.lr / correction1))};
}

template <class G>
static void step_run(int count, const Numbers& a, const Factors& factors, const G* __restrict gradients,
                     float* __restrict weights, float* __restrict first, float* __restrict second,
                     bf16* __restrict rounded) {
    float g[RUN];
    for (int i = 0; i < count; i++) g[i] = widen(gradients[i]);
    for (int32_t k = 0; k < factors.count; k++) {
        const float factor = factors.data[k];
        for (int i = 0; i < count; i++) g[i] *= factor;
    }
    for (int i = 0; i < count; i++) {
        const float m = std::fma(a.gain1, g[i] - first[i], first[i]);
        const float v = std::fma(a.gain2 * g[i], g[i], second[i] * a.beta2);
        first[i] = m;
        second[i] = v;
        weights[i] = weights[i] * a.keep + a.negative_rate * m / (std::sqrt(v) / a.root + a.eps);
    }
    if (rounded)
        for (int i = 0; i < count; i++) narrow(weights[i], rounded + i);
}

template <class G>
static void step_all(int64_t numel, const Numbers& a, const Factors& factors, const G* gradients, float* weights,
                     float* first, float* second, bf16* rounded, int threads) {
#pragma omp parallel for schedule(static) num_threads(useful_threads(numel, threads))
    for (int64_t start = 0; start < numel; start += RUN)
        step_run(int(numel - start < RUN ? numel - start : RUN), a, factors, gradients + start, weights + start,
                 first + start, second + start, rounded ? rounded + start : nullptr);
}

// ``rounded`` may be null: then ``weights`` are the parameter itself.
extern "C" void fused_adamw(Gradient gradient, float* weights, float* first, float* second, bf16* rounded,
                            int64_t numel, Rates rates, Factors factors, int threads) {
    const Numbers a = numbers_of(rates);
    with_gradient(gradient, [&](auto* gradients) {
        step_all(numel, a, factors, gradients, weights, first, second, rounded, threads);
    });
}
