// torch's fused AdamW on fp32 numbers, to the last bit, with what surrounds it where there are fp32 masters: the
// gradient widened and clipped on the way in, the weight rounded on the way out. One pass over the memory.
// Masters are whole, or stored as the lower half beside a bf16 weight (optim/storage/lower_half.py).
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

struct Whole {  // fp32 weights; ``rounded`` may be null: then they are the parameter itself
    float* weights;
    bf16* rounded;

    void load(int64_t start, int count, float* __restrict w, float* __restrict v, const float* second) const {
        for (int i = 0; i < count; i++) w[i] = weights[start + i];
        for (int i = 0; i < count; i++) v[i] = second[start + i];
    }
    void store(int64_t start, int count, const float* __restrict w, const float* __restrict v, float* second) const {
        for (int i = 0; i < count; i++) weights[start + i] = w[i];
        for (int i = 0; i < count; i++) second[start + i] = v[i];
        if (rounded)
            for (int i = 0; i < count; i++) narrow(w[i], rounded + start + i);
    }
};

struct Lower {  // the lower half of each master; the side of a tie is the sign of its second moment
    bf16* rounded;
    uint16_t* lower;

    void load(int64_t start, int count, float* __restrict w, float* __restrict v, const float* second) const {
        for (int i = 0; i < count; i++) {
            const uint32_t bits = bits_of(second[start + i]), low = lower[start + i];
            // 0x8000 and the sign together are more than 0x8000 on the upper side of a tie alone.
            const uint32_t down = low + (bits >> 31 & (low == 0x8000u)) > 0x8000u;
            w[i] = float_of(((uint32_t(rounded[start + i]) - down) << 16) | low);
            v[i] = float_of(bits & 0x7FFFFFFFu);
        }
    }
    void store(int64_t start, int count, const float* __restrict w, const float* __restrict v, float* second) const {
        for (int i = 0; i < count; i++) {
            const uint32_t bits = bits_of(w[i]), low = is_nan(bits) ? 0u : bits & 0xFFFFu;
            const uint32_t up = (low == 0x8000u) & (bits >> 16);
            second[start + i] = float_of((bits_of(v[i]) & 0x7FFFFFFFu) | (up & 1u) << 31);
            lower[start + i] = uint16_t(low);
            narrow(w[i], rounded + start + i);
        }
    }
};

template <class G, class Masters>
static void step_run(int64_t start, int count, const Numbers& a, const Factors& factors, const G* __restrict gradients,
                     const Masters& masters, float* __restrict first, float* second) {
    float g[RUN], w[RUN], v[RUN];
    for (int i = 0; i < count; i++) g[i] = widen(gradients[start + i]);
    for (int32_t k = 0; k < factors.count; k++) {
        const float factor = factors.data[k];
        for (int i = 0; i < count; i++) g[i] *= factor;
    }
    masters.load(start, count, w, v, second);
    for (int i = 0; i < count; i++) {
        const float m = std::fma(a.gain1, g[i] - first[start + i], first[start + i]);
        v[i] = std::fma(a.gain2 * g[i], g[i], v[i] * a.beta2);
        first[start + i] = m;
        w[i] = w[i] * a.keep + a.negative_rate * m / (std::sqrt(v[i]) / a.root + a.eps);
    }
    masters.store(start, count, w, v, second);
}

template <class G, class Masters>
static void step_all(int64_t numel, const Numbers& a, const Factors& factors, const G* gradients,
                     const Masters& masters, float* first, float* second, int threads) {
#pragma omp parallel for schedule(static) num_threads(useful_threads(numel, threads))
    for (int64_t start = 0; start < numel; start += RUN) {
        const int64_t left = numel - start;
        if (left >= RUN)
            step_run(start, RUN, a, factors, gradients, masters, first, second);  // a constant, to unroll by
        else
            step_run(start, int(left), a, factors, gradients, masters, first, second);
    }
}

// ``rounded`` may be null: then ``weights`` are the parameter itself. ``lower`` may be: then masters are ``weights``.
extern "C" void fused_adamw(Gradient gradient, float* weights, float* first, float* second, bf16* rounded,
                            uint16_t* lower, int64_t numel, Rates rates, Factors factors, int threads) {
    const Numbers a = numbers_of(rates);
    with_gradient(gradient, [&](auto* gradients) {
        if (lower)
            step_all(numel, a, factors, gradients, Lower{rounded, lower}, first, second, threads);
        else
            step_all(numel, a, factors, gradients, Whole{weights, rounded}, first, second, threads);
    });
}
