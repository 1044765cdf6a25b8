// Sign and Lion updates: one pass over the memory.
// Called by sign.py, which says what they compute and holds the references.
#include "rest.h"

struct Averages {
    float beta1, gain1, beta2, gain2;
};

extern "C" void plain(Values weight, Gradient gradient, int64_t numel, Rest rest, int threads) {
    with_weight(weight, [&](auto weights) {
        with_gradient(gradient, [&](auto* gradients) {
            for_runs(numel, threads, [&](int64_t start, int count) {
                float w[RUN];
                weights.load(start, count, w);
                rest_run(w, gradients + start, count, rest);
                weights.store(start, count, w);
            });
        });
    });
}

extern "C" void lion(Values weight, Gradient gradient, Values first, int64_t numel, Rest rest, Averages a, int threads) {
    with_weight(weight, [&](auto weights) {
        with_gradient(gradient, [&](auto* gradients) {
            with_moment(first, [&](auto means) {
                for_runs(numel, threads, [&](int64_t start, int count) {
                    float w[RUN], m[RUN], c[RUN];
                    weights.load(start, count, w);
                    means.load(start, count, m);
                    for (int i = 0; i < count; i++) {
                        float g = widen(gradients[start + i]);
                        c[i] = a.beta1 * m[i] + a.gain1 * g;
                        m[i] = a.beta2 * m[i] + a.gain2 * g;
                    }
                    rest_run(w, c, count, rest);
                    weights.store(start, count, w);
                    means.store(start, count, m);
                });
            });
        });
    });
}
