// AdamW with moments in fp32 or bf16: one pass over the memory.
// Called by adamw.py, which says what it computes and holds the reference.
#include "adam.h"

extern "C" void adamw(Values weight, Gradient gradient, Values first, Values second, int64_t numel, Adam a,
                      int threads) {
    with_weight(weight, [&](auto weights) {
        with_gradient(gradient, [&](auto* gradients) {
            with_moments(first, second, [&](auto means, auto squares) {
                for_runs(numel, threads, [&](int64_t start, int count) {
                    float w[RUN], g[RUN], m[RUN], v[RUN];
                    weights.load(start, count, w);
                    means.load(start, count, m);
                    squares.load(start, count, v);
                    for (int i = 0; i < count; i++) g[i] = widen(gradients[start + i]);
                    adam_run(w, g, m, v, count, a);
                    weights.store(start, count, w);
                    means.store(start, count, m);
                    squares.store(start, count, v);
                });
            });
        });
    });
}
