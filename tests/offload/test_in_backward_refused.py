"""Updates during backward: what is counted, what stops half-way, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memtrain.offload.errors import OffloadError, PlanMismatchError, TierIOError, UnsupportedGradientOperation
from memtrain.offload.in_backward import (
    ChangedHyperparameterError,
    HalfDoneStepError,
    MicroBatchCountError,
    guard_modules,
)
from memtrain.planner.actions import Tier
from tests.offload.in_backward_runs import ADAMW, plan_of, run_one, wrapped
from tests.offload.optimizer_runs import assert_equal_models, assert_equal_state, train
from tests.offload.training import batches, make_model, open_engine, plain_run, trainable, wrap


def test_one_pass_fewer_is_named_and_may_be_made_up_for() -> None:
    expected, _, _ = plain_run(ADAMW, steps=1, accumulate=2)
    model = make_model()
    with wrapped(model, 2) as optimizer:
        first, second = batches(2)
        (model(first) / 2).backward()
        with pytest.raises(MicroBatchCountError, match=r"1 backward passes .* the plan has 2 micro-batches"):
            optimizer.step()
        (model(second) / 2).backward()
        optimizer.step()
        assert_equal_models(model, expected)
        with pytest.raises(MicroBatchCountError, match="0 backward passes"):
            optimizer.step()


@pytest.mark.parametrize("clear", [False, True])
def test_one_pass_more_is_named_and_poisons(clear: bool) -> None:
    model = make_model()
    with wrapped(model) as optimizer:
        run_one(model)
        if clear:
            model.zero_grad()
        with pytest.raises(MicroBatchCountError, match=r"2 backward passes .* the plan has 1 micro-batches"):
            run_one(model)
        with pytest.raises(OffloadError, match="Restore the last checkpoint"):
            optimizer.step()
        with pytest.raises(OffloadError, match="Restore the last checkpoint"):
            optimizer.ensure("block")


def test_a_second_pass_over_a_retained_graph_counts() -> None:
    model = make_model()
    with wrapped(model):
        loss = model(batches(1)[0])
        loss.backward(retain_graph=True)
        with pytest.raises((MicroBatchCountError, RuntimeError), match=r"2 backward passes|inplace op"):
            loss.backward()


def test_a_retained_graph_is_an_ordinary_micro_batch_where_planned() -> None:
    plain, model = make_model(), make_model()
    reference = ADAMW(trainable(plain))
    batch = batches(1)[0]
    loss = plain(batch)
    loss.backward(retain_graph=True)
    loss.backward()
    reference.step()
    with wrapped(model, 2) as optimizer:
        loss = model(batch)
        loss.backward(retain_graph=True)
        loss.backward()
        optimizer.step()
        assert_equal_models(model, plain)


def test_zero_grad_between_micro_batches_begins_anew() -> None:
    expected, _, _ = plain_run(ADAMW, steps=1, accumulate=2)
    model = make_model()
    with wrapped(model, 2) as optimizer:
        run_one(model, 2)
        optimizer.zero_grad()
        for batch in batches(2):
            (model(batch) / 2).backward()
        optimizer.step()
        assert_equal_models(model, expected)


def test_gradients_of_autograd_grad_do_not_count() -> None:
    expected, _, _ = plain_run(ADAMW, steps=1)
    model = make_model()
    with wrapped(model) as optimizer:
        torch.autograd.grad(model(batches(3)[2]), [model.first.weight, model.second.weight])
        run_one(model)
        optimizer.step()
        assert_equal_models(model, expected)


def fail_once(model: nn.Module, parameter: nn.Parameter) -> None:
    def fail(gradient: Tensor) -> None:
        handle.remove()
        raise ValueError("stop")

    handle = parameter.register_hook(fail)


def test_a_pass_that_stops_after_an_update_poisons() -> None:
    model = make_model()
    fail_once(model, model.first.weight)
    with wrapped(model) as optimizer:
        guards = guard_modules([model], optimizer.refuse_half_done)
        with pytest.raises(ValueError, match="stop"):
            run_one(model)
        with pytest.raises(HalfDoneStepError, match=r"forward after backward pass 1 of 1 did not end"):
            run_one(model)
        with pytest.raises(OffloadError, match="Restore the last checkpoint"):
            optimizer.step()
        for guard in guards:
            guard.remove()
        with pytest.raises(OffloadError, match="Restore the last checkpoint"):
            run_one(model)


def test_step_after_a_pass_that_stopped_is_refused() -> None:
    model = make_model()
    fail_once(model, model.first.weight)
    with wrapped(model) as optimizer:
        with pytest.raises(ValueError, match="stop"):
            run_one(model)
        with pytest.raises(HalfDoneStepError, match="did not end: 1 of 3 units, epilogue the last"):
            optimizer.step()


def test_a_pass_that_stops_before_any_update_may_be_run_again() -> None:
    expected, _, _ = plain_run(ADAMW, steps=1)
    model = make_model()
    fail_once(model, model.second.weight)
    with wrapped(model) as optimizer:
        with pytest.raises(ValueError, match="stop"):
            run_one(model)
        with pytest.raises(HalfDoneStepError, match="call zero_grad"):
            optimizer.step()
        optimizer.zero_grad()
        run_one(model)
        optimizer.step()
        assert_equal_models(model, expected)


def test_a_tier_that_fails_during_backward_poisons() -> None:
    model = make_model()
    with wrapped(model) as optimizer:
        train(model, optimizer, steps=1)

        def read(*_: Any) -> Any:
            raise TierIOError("no such device", 5)

        optimizer.records.read = read
        with pytest.raises(TierIOError, match="no such device"):
            run_one(model)
        with pytest.raises(OffloadError, match=r"half-way .no such device.*Restore the last"):
            optimizer.step()


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_look_at_all_gradients_is_refused(nonfinite: str) -> None:
    model = make_model()
    with open_engine() as engine:
        with pytest.raises(PlanMismatchError, match=f"nonfinite='{nonfinite}' looks at all gradients"):
            wrap(model, ADAMW(trainable(model)), engine, plan_of(), nonfinite=nonfinite)
        assert engine.store(Tier.HOST).used_bytes == 0
    run_one(model)
    assert type(model.first.weight.grad) is Tensor  # no hook is left


def test_clipping_is_refused() -> None:
    model = make_model()
    with wrapped(model) as optimizer:
        run_one(model)
        with pytest.raises(UnsupportedGradientOperation, match=r"the norm \(clip_grad_norm_\)"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with pytest.raises(UnsupportedGradientOperation, match="scaling"):
            model.first.weight.grad.mul_(0.5)
        with pytest.raises(PlanMismatchError, match=r"clip_grad_norm_\(\) needs the norm of all gradients"):
            optimizer.clip_grad_norm_(1.0)
        with pytest.raises(UnsupportedGradientOperation, match="was updated with it during backward"):
            model.first.weight.grad.materialize()
        assert repr(model.first.weight.grad).startswith("OffloadedGrad(first.weight")


def test_a_loss_scaler_is_refused() -> None:
    model = make_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    with wrapped(model) as optimizer:
        scaler.scale(model(batches(1)[0])).backward()
        with pytest.raises(UnsupportedGradientOperation, match="looking for NaN and inf"):
            scaler.step(optimizer)


def test_a_closure_is_refused() -> None:
    model = make_model()
    with wrapped(model) as optimizer, pytest.raises(PlanMismatchError, match=r"step\(closure\)"):
        optimizer.step(lambda: model(batches(1)[0]))


@pytest.mark.parametrize("key", ["lr", "weight_decay", "betas"])
def test_hyperparameters_that_change_during_the_step_are_named(key: str) -> None:
    model = make_model()
    with wrapped(model) as optimizer:
        old = optimizer.param_groups[0][key]
        new = (0.5, 0.6) if key == "betas" else 0.25
        run_one(model)
        optimizer.param_groups[0][key] = new
        with pytest.raises(ChangedHyperparameterError) as raised:
            optimizer.step()
        assert f"param_groups[0]['{key}'] was {old!r} during backward" in str(raised.value)
        assert f"is {new!r} at step()" in str(raised.value)
        assert "call scheduler.step() after optimizer.step()" in str(raised.value)
        with pytest.raises(OffloadError, match="Restore the last checkpoint"):
            optimizer.step()


def test_gradients_that_change_before_step_are_named() -> None:
    model = make_model()
    with wrapped(model) as optimizer:
        run_one(model)
        model.first.weight.grad = None
        with pytest.raises(HalfDoneStepError, match=r"gradient of first.weight was replaced or cleared"):
            optimizer.step()


def test_nothing_sees_weights_of_two_steps() -> None:
    model = make_model()
    with wrapped(model) as optimizer:
        guards = guard_modules([model], optimizer.refuse_half_done)
        run_one(model)
        for use in (
            lambda: model(batches(1)[0]),
            model.state_dict,
            optimizer.state_dict,
            optimizer.flush,
            lambda: list(optimizer.iter_state()),
            optimizer.zero_grad,
            lambda: optimizer.ensure("block"),
        ):
            with pytest.raises(HalfDoneStepError, match=r"2 of 3 units, block the last, were updated"):
                use()
        optimizer.step()
        optimizer.zero_grad()
        run_one(model, 1)
        optimizer.step()
        for guard in guards:
            guard.remove()


def test_gradients_are_not_accumulated_over_steps() -> None:
    model = make_model()
    with wrapped(model) as optimizer:
        run_one(model)
        optimizer.step()
        with pytest.raises(UnsupportedGradientOperation, match=r"set_to_none=False"):
            optimizer.zero_grad(set_to_none=False)
        with pytest.raises(UnsupportedGradientOperation, match=r"call zero_grad\(\) after step\(\)"):
            run_one(model)


def test_a_parameter_that_was_frozen_is_named() -> None:
    model = make_model()
    with wrapped(model) as optimizer:
        optimizer.param_groups[0]["params"].append(model.frozen.weight)
        model.frozen.requires_grad_(True)
        run_one(model)
        with pytest.raises(PlanMismatchError, match=r"frozen.weight .* has a gradient"):
            optimizer.step()


def test_state_goes_from_one_run_to_another() -> None:
    expected, plain, _ = plain_run(ADAMW, steps=2)
    model = make_model()
    with open_engine() as engine:
        optimizer = wrap(model, ADAMW(trainable(model)), engine, plan_of())
        train(model, optimizer, steps=1)
        tensors = [(name, key, value.clone()) for name, key, value in optimizer.iter_state()]
        scalars = optimizer.scalar_state()
        optimizer.close()
        again = wrap(model, ADAMW(trainable(model)), engine, plan_of())
        again.load_state(tensors, scalars)
        model(batches(2)[1]).backward()
        again.step()
        assert_equal_models(model, expected)
        assert_equal_state(again, model, plain)
