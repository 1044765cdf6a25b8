"""Clearing, adding to, clipping and scaling gradients around a streamed step; gradients not finite."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from memtrain.offload import clipping
from memtrain.offload.errors import OffloadError
from memtrain.offload.optimizer import NonFiniteGradientError, OffloadedOptimizer
from memtrain.planner.actions import Tier, UpdateSchedule
from tests.offload.optimizer_runs import (
    AHEAD,
    OPTIMIZERS,
    SEQUENTIAL,
    assert_equal_models,
    train,
)
from tests.offload.training import (
    batches,
    make_model,
    make_plan,
    open_engine,
    trainable,
    wrap,
)


@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD])
@pytest.mark.parametrize("gradient_tier", [Tier.HOST, Tier.DEVICE])
@pytest.mark.parametrize("way", ["optimizer", "optimizer zeros", "model zeros", "model", "none"])
def test_ways_to_clear_gradients(schedule: UpdateSchedule, gradient_tier: Tier, way: str) -> None:
    model, reference = make_model(), make_model()
    plain = OPTIMIZERS["adamw"](trainable(reference))

    def clear(model: nn.Module, optimizer: Any) -> None:
        if way.startswith("optimizer"):
            optimizer.zero_grad(set_to_none=way == "optimizer")
        elif way.startswith("model"):
            if (
                isinstance(optimizer, OffloadedOptimizer)
                and gradient_tier is Tier.DEVICE
                and way == "model zeros"
            ):
                optimizer.flush()  # without it: refused, see test_gradients_changed_under_an_update
            model.zero_grad(set_to_none=way == "model")
        else:
            for p in model.parameters():
                p.grad = None

    for batch in batches(4):
        reference(batch).backward()
        plain.step()
        clear(reference, plain)
    with open_engine() as engine:
        optimizer = wrap(
            model, OPTIMIZERS["adamw"](trainable(model)), engine, make_plan(schedule, gradient_tier)
        )
        train(model, optimizer, steps=4, zero=lambda: clear(model, optimizer))
        assert_equal_models(model, reference)


def test_gradients_changed_under_an_update_are_refused() -> None:
    model = make_model()
    with open_engine() as engine:
        optimizer = wrap(model, OPTIMIZERS["adamw"](trainable(model)), engine, make_plan(AHEAD, Tier.DEVICE))
        model(batches(1)[0]).backward()
        optimizer.step()
        model.zero_grad(set_to_none=False)
        with pytest.raises(OffloadError, match=r"embed.weight was changed in place while an update waited"):
            optimizer.flush()
        with pytest.raises(OffloadError, match="an earlier update failed half-way"):
            optimizer.step()


def test_gradients_that_are_not_cleared_accumulate_over_steps() -> None:
    model, reference = make_model(), make_model()
    plain = OPTIMIZERS["sgd nesterov"](trainable(reference))
    for batch in batches(3):
        reference(batch).backward()
        plain.step()
    with open_engine() as engine:
        optimizer = wrap(model, OPTIMIZERS["sgd nesterov"](trainable(model)), engine, make_plan(AHEAD))
        for batch in batches(3):
            for unit in ("prologue", "block", "epilogue"):
                optimizer.ensure(unit)
            model(batch).backward()
            optimizer.step()
        optimizer.flush()
        assert_equal_models(model, reference)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("gradient_tier", [Tier.HOST, Tier.DEVICE])
def test_nonfinite_gradients(value: float, gradient_tier: Tier) -> None:
    with open_engine() as engine:
        for policy in ("skip", "raise"):
            model = make_model()
            optimizer = wrap(
                model,
                OPTIMIZERS["adamw"](trainable(model)),
                engine,
                make_plan(AHEAD, gradient_tier),
                nonfinite=policy,
            )
            before = copy.deepcopy(model.state_dict())
            handle = model.first.weight.register_hook(lambda g: g.index_fill(0, torch.tensor([3]), value))
            model(batches(1)[0]).backward()
            handle.remove()
            if policy == "raise":
                with pytest.raises(NonFiniteGradientError, match=r"1 parameters, first first\.weight"):
                    optimizer.step()
            else:
                optimizer.step()
                assert optimizer.last_step_skipped
            optimizer.flush()
            assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
            assert optimizer.scalar_state() == {}
            optimizer.zero_grad()
            model(batches(1)[0]).backward()
            optimizer.step()
            assert not optimizer.last_step_skipped
            optimizer.close()


def test_nonfinite_ignored_is_plain_pytorch() -> None:
    model, reference = make_model(), make_model()
    plain = OPTIMIZERS["adamw"](trainable(reference))
    with open_engine() as engine:
        optimizer = wrap(model, OPTIMIZERS["adamw"](trainable(model)), engine)
        for m, o in ((model, optimizer), (reference, plain)):
            m.second.weight.register_hook(lambda g: g.index_fill(0, torch.tensor([3]), float("inf")))
            m(batches(1)[0]).backward()
            assert torch.isinf(torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0))
            o.step()
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.equal(p.isnan(), q.isnan())
            assert torch.equal(p.nan_to_num(), q.nan_to_num())


def test_grad_scaler() -> None:
    def run(model: nn.Module, optimizer: Any) -> list[float]:
        scaler, scales = torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_interval=2), []
        for batch in batches(6):
            scaler.scale(model(batch) * 1e3).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
        return scales

    model, reference = make_model(), make_model()
    expected = run(reference, OPTIMIZERS["adamw"](trainable(reference)))
    with open_engine() as engine:
        optimizer = wrap(model, OPTIMIZERS["adamw"](trainable(model)), engine)
        assert run(model, optimizer) == expected
        assert_equal_models(model, reference)


def test_clipping_twice_and_changing_after_clipping_with_masters() -> None:
    model = make_model(torch.bfloat16)
    with open_engine() as engine:
        optimizer = wrap(model, OPTIMIZERS["adamw"](trainable(model)), engine, master_weights=True)
        model(batches(1)[0]).backward()
        total = optimizer.clip_grad_norm_(0.05)
        again = optimizer.clip_grad_norm_(0.05)
        assert float(total) > 0.05
        assert float(again) == pytest.approx(0.05, rel=1e-4)
        model(batches(1)[0]).backward()
        with pytest.raises(OffloadError, match="changed between clip_grad_norm_"):
            optimizer.step()


def test_torch_clipping_with_masters_scales_the_narrow_gradient() -> None:
    model, reference = make_model(torch.bfloat16), make_model(torch.bfloat16)
    masters = [p.detach().float() for p in trainable(reference)]
    plain = OPTIMIZERS["adamw"](masters)
    with open_engine() as engine:
        optimizer = wrap(model, OPTIMIZERS["adamw"](trainable(model)), engine, master_weights=True)
        for batch in batches(3):
            for m in (model, reference):
                m(batch).backward()
            ours = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            assert torch.equal(ours, torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.05))
            optimizer.step()
            optimizer.zero_grad()
            for m, p in zip(masters, trainable(reference), strict=True):
                m.grad = None if p.grad is None else p.grad.float()
            plain.step()
            with torch.no_grad():
                for m, p in zip(masters, trainable(reference), strict=True):
                    p.copy_(m)
                    p.grad = None
        assert_equal_models(model, reference)


@pytest.mark.parametrize("gradient_tier", [Tier.HOST, Tier.DEVICE])
@pytest.mark.parametrize("zero", ["optimizer zeros", "model zeros", "none"])
def test_clipping_with_masters_where_gradients_survive_the_step(gradient_tier: Tier, zero: str) -> None:
    model, reference = make_model(torch.bfloat16), make_model(torch.bfloat16)
    masters = [p.detach().float() for p in trainable(reference)]
    plain = OPTIMIZERS["adamw"](masters)
    with open_engine() as engine:
        optimizer = wrap(
            model,
            OPTIMIZERS["adamw"](trainable(model)),
            engine,
            make_plan(SEQUENTIAL, gradient_tier),
            master_weights=True,
        )
        for batch in batches(3):
            model(batch).backward()
            reference(batch).backward()
            for m, p in zip(masters, trainable(reference), strict=True):
                m.grad = None if p.grad is None else p.grad.float()
            assert torch.equal(optimizer.clip_grad_norm_(0.05), torch.nn.utils.clip_grad_norm_(masters, 0.05))
            optimizer.step()
            plain.step()
            with torch.no_grad():
                for m, p in zip(masters, trainable(reference), strict=True):
                    p.copy_(m)
            if zero != "none":
                (optimizer if zero == "optimizer zeros" else model).zero_grad(set_to_none=False)
                reference.zero_grad(set_to_none=False)
        assert_equal_models(model, reference)


def test_a_clip_ends_with_zero_grad_and_with_a_skipped_step() -> None:
    model = make_model(torch.bfloat16)
    with open_engine() as engine:
        optimizer = wrap(
            model, OPTIMIZERS["adamw"](trainable(model)), engine, master_weights=True, nonfinite="skip"
        )
        model(batches(1)[0]).backward()
        norm = optimizer.clip_grad_norm_(0.05)
        optimizer.zero_grad(set_to_none=False)
        model(batches(1)[0]).backward()
        assert torch.equal(optimizer.clip_grad_norm_(0.05), norm)
        model.second.weight.grad.mul_(float("inf"))
        optimizer.step()
        assert optimizer.last_step_skipped
        model.zero_grad(set_to_none=False)
        model(batches(1)[0]).backward()
        assert torch.equal(optimizer.clip_grad_norm_(0.05), norm)


def test_a_finite_norm_answers_for_the_gradients_it_was_taken_of_and_no_longer() -> None:
    grads = [torch.tensor([3.0]), torch.tensor([4.0])]
    clipping.note_finite(grads, torch.tensor(5.0), 1.0)
    grads[0].data.fill_(float("nan"))  # behind the version counter's back: so it was not looked at
    assert clipping.is_finite(grads[0])
    grads[0].fill_(float("nan"))
    assert not clipping.is_finite(grads[0])
    assert not clipping.is_finite(torch.tensor([3.0, float("inf")]))


@pytest.mark.parametrize("max_norm", [-1.0, float("nan")])
def test_a_factor_that_may_be_above_one_answers_nothing(max_norm: float) -> None:
    grad = torch.tensor([3.0])
    clipping.note_finite([grad], torch.tensor(3.0), max_norm)
    grad.data.fill_(float("nan"))
    assert not clipping.is_finite(grad)


def test_a_norm_that_overflows_does_not_skip_finite_gradients() -> None:
    model = make_model()
    with open_engine() as engine:
        optimizer = wrap(
            model,
            torch.optim.SGD(model.parameters(), lr=1e-3),
            engine,
            make_plan(gradient_tier=Tier.DEVICE),
            nonfinite="skip",
        )
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, 1e30)  # squares are above fp32's range
        assert not torch.isfinite(optimizer.clip_grad_norm_(1.0))
        optimizer.step()
        # Scaled by 1 / inf: zeros, which are finite.
        assert not optimizer.last_step_skipped
        optimizer.close()
