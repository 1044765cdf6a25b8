"""Shards that are stepped in one pass: which are, that autograd hears of it, and the same bits without."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from memtrain.offload.optimizer_probe import Runner
from memtrain.optim.kernels import fused_adamw
from memtrain.planner.actions import Tier
from tests.offload.optimizer_runs import (
    OPTIMIZERS,
    SEQUENTIAL,
    assert_equal_models,
    assert_equal_state,
    train,
)
from tests.offload.snapshot_runs import assert_same, open_run
from tests.offload.training import batches, make_model, make_plan, open_engine, plain_run, trainable, wrap

FUSED = OPTIMIZERS["adamw fused"]

needs_agreement = pytest.mark.skipif(
    not fused_adamw.agrees(), reason="this build of torch rounds in another order, or there is no compiler"
)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements of each piece that was stepped in one pass."""
    seen: list[int] = []
    step = fused_adamw.step

    def counted(weight: torch.Tensor, *rest: Any, **settings: Any) -> None:
        seen.append(weight.numel())
        step(weight, *rest, **settings)

    monkeypatch.setattr(fused_adamw, "step", counted)
    return seen


@needs_agreement
@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DEVICE])
@pytest.mark.parametrize("master", [True, False])
def test_every_step_is_one_pass(tier: Tier, master: bool, passes: list[int]) -> None:
    dtype = torch.bfloat16 if master else torch.float32
    expected, plain, _ = plain_run(FUSED, accumulate=2, max_norm=0.05, dtype=dtype, master=master)
    model = make_model(dtype)
    with open_engine() as engine:
        plan = make_plan(SEQUENTIAL, gradient_tier=tier, optimizer_tier=tier)
        optimizer = wrap(model, FUSED(trainable(model)), engine, plan, master_weights=master)
        train(model, optimizer, accumulate=2, clip=lambda: optimizer.clip_grad_norm_(0.05))
        assert_equal_models(model, expected)
        assert_equal_state(optimizer, model, plain)
        in_vectors = sum(
            piece.elements
            for name in optimizer.scalar_state()
            for _, piece in optimizer.index.pieces[name]
            if piece.elements % fused_adamw.VECTOR == 0
        )
        assert sum(passes) == 5 * in_vectors > 0
        optimizer.close()


@needs_agreement
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("tier", [Tier.HOST, Tier.DEVICE])
def test_a_first_step_begins_at_zeros_whatever_its_record_held(
    split: bool, tier: Tier, passes: list[int]
) -> None:
    """Loaded state that leaves parameters out has them begin anew, beside what was there before."""
    plan = make_plan(SEQUENTIAL, gradient_tier=tier, optimizer_tier=tier)
    with (
        open_run(plan, torch.bfloat16, FUSED, master_weights=True, split_masters=split) as run,
        open_run(plan, torch.bfloat16, FUSED, master_weights=True, split_masters=split) as fresh,
    ):
        run.train(batches(3))
        run.flush()
        run.optimizer.load_state([], {})
        with torch.no_grad():
            for p, q in zip(run.model.parameters(), fresh.model.parameters(), strict=True):
                p.copy_(q)
        passes.clear()
        run.train(batches(1))
        fresh.train(batches(1))
        assert_same(run, fresh)
        sizes = Counter(passes)
        assert sizes
        assert all(count % 2 == 0 for count in sizes.values())
        model, plain, _ = plain_run(FUSED, steps=1, dtype=torch.bfloat16, master=True)
        assert_equal_models(run.model, model)
        assert_equal_state(run.optimizer, run.model, plain)


@pytest.mark.parametrize("master", [True, False])
def test_without_it_the_bits_are_the_same(
    master: bool, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_adamw, "agrees", lambda: False)
    dtype = torch.bfloat16 if master else torch.float32
    expected, plain, _ = plain_run(FUSED, accumulate=2, max_norm=0.05, dtype=dtype, master=master)
    model = make_model(dtype)
    with open_engine() as engine:
        optimizer = wrap(model, FUSED(trainable(model)), engine, make_plan(), master_weights=master)
        train(model, optimizer, accumulate=2, clip=lambda: optimizer.clip_grad_norm_(0.05))
        assert not passes
        assert_equal_models(model, expected)
        assert_equal_state(optimizer, model, plain)
        optimizer.close()


@needs_agreement
def test_the_optimizers_own_code_gets_what_is_left_over(
    passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A parameter whose size is no multiple of the vector beside one whose is."""
    stepped: list[int] = []
    run = Runner.run

    def counted(self: Runner, groups: list[dict[str, Any]], *rest: Any) -> Any:
        stepped.extend(p.numel() for group in groups for p in group["params"])
        return run(self, groups, *rest)

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.even = nn.Parameter(torch.randn(66_000, generator=generator))
            self.odd = nn.Parameter(torch.randn(65_999, generator=generator))

    ours, plain = Pair(), Pair()
    reference = FUSED(list(plain.parameters()))
    with open_engine() as engine:
        optimizer = wrap_pair(ours, engine)
        monkeypatch.setattr(Runner, "run", counted)
        for number in range(3):
            for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
                q.grad = torch.sin(q.detach() * (number + 1))
                p.grad = q.grad.clone()
            optimizer.step()
            reference.step()
        assert_equal_models(ours, plain)
        optimizer.close()
    # 50,000 elements of a shard are 49,152 when cut at pages: the last piece of each parameter is short.
    assert all(elements % fused_adamw.VECTOR == 0 for elements in passes)
    assert sum(stepped) + sum(passes) == 3 * (66_000 + 65_999)
    odd = [elements for elements in stepped if elements % fused_adamw.VECTOR]
    assert len(odd) == 3
    assert sum(stepped) - sum(odd) <= 66_000 + 65_999  # the rest of it is the first step


@needs_agreement
def test_autograd_hears_of_it(passes: list[int]) -> None:
    model = make_model()
    with open_engine() as engine:
        optimizer = wrap(
            model, FUSED(trainable(model)), engine, make_plan(SEQUENTIAL, gradient_tier=Tier.DEVICE)
        )
        train(model, optimizer, steps=2)
        assert passes
        rows = torch.randn(2, model.first.weight.shape[1], requires_grad=True)
        loss = model.first(rows).sum()
        for parameter in trainable(model):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        optimizer.close()


def wrap_pair(model: nn.Module, engine: Any) -> Any:
    from memtrain.offload.optimizer import OffloadedOptimizer, OptimizerConfig

    plan = make_plan(SEQUENTIAL, gradient_tier=Tier.DEVICE, units=("block",))
    return OffloadedOptimizer(
        FUSED(list(model.parameters())),
        engine=engine,
        plan=plan,
        units=[("block", list(model.named_parameters()))],
        config=OptimizerConfig(),
    )
