// The way up of GaLore and FRUGAL, behind the products: one pass over a run of rows of the weight.
// Called by lowrank_up.py, which says what it computes and holds the reference.
#include "lowrank_up.h"

// update is P N, inner P R in the same dtype; inner and gradient are null without a residual.
extern "C" void lowrank_up(
    Values weight, Gradient update, Gradient inner, Gradient gradient, int64_t numel, Up up, int threads) {
    with_weight(weight, [&](auto weights) {
        with_gradient(update, [&](auto* updates) {
            with_gradient(gradient, [&](auto* gradients) {
                const auto* inners = static_cast<decltype(updates)>(inner.data);
                for_runs(numel, threads, [&](int64_t start, int count) {
                    float w[RUN];
                    weights.load(start, count, w);
                    up_run(w, updates + start, count, up);
                    if (inners) sign_run(w, gradients + start, inners + start, count, up);
                    weights.store(start, count, w);
                });
            });
        });
    });
}
