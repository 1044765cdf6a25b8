"""What a streamed optimizer refuses, by name, and what it leaves behind when it fails."""

from __future__ import annotations

import copy
import errno
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from memtrain.offload.engine import Engine
from memtrain.offload.errors import OffloadError, PlanMismatchError, TierFullError, TierIOError
from memtrain.offload.gradients import GradientStore
from memtrain.offload.io import Direction, Fault, FaultyBackend, IORequest, ThreadPoolBackend
from memtrain.offload.optimizer import OffloadedOptimizer
from memtrain.offload.optimizer_probe import UnsupportedOptimizerError
from memtrain.offload.tiers import MemoryStore
from memtrain.planner.actions import Tier
from memtrain.planner.plan import Staging
from tests.offload.late_device import LateDevice
from tests.offload.optimizer_runs import (
    AHEAD,
    OPTIMIZERS,
    train,
)
from tests.offload.training import (
    STAGING,
    batches,
    make_model,
    make_plan,
    open_engine,
    trainable,
    units_of,
    wrap,
)


def test_state_that_does_not_fit_is_refused_by_name() -> None:
    model = make_model()
    with open_engine() as engine:
        optimizer = wrap(model, OPTIMIZERS["adamw"](trainable(model)), engine)
        with pytest.raises(PlanMismatchError, match="'nobody', which is no trainable parameter"):
            optimizer.load_state([("nobody", "exp_avg", torch.zeros(3))], {})
        with pytest.raises(PlanMismatchError, match=r"first\.weight has no state tensor 'm'"):
            optimizer.load_state([("first.weight", "m", torch.zeros(683, 101))], {})
        with pytest.raises(PlanMismatchError, match=r"shape \(3,\), expected \(683, 101\)"):
            optimizer.load_state([("first.weight", "exp_avg", torch.zeros(3))], {})
        with pytest.raises(PlanMismatchError, match=r"first\.weight has \['exp_avg'\]"):
            optimizer.load_state([("first.weight", "exp_avg", torch.zeros(683, 101))], {})
        with pytest.raises(ValueError, match="parameter groups"):
            optimizer.load_state_dict({"state": {}, "param_groups": []})


class Counting(torch.optim.SGD):
    calls = 0

    def step(self, closure: Any = None) -> None:
        self.calls = self.calls + 1
        super().step()


class Listing(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["history"] = [1.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.LBFGS(p), r"LBFGS.step\(\) needs a closure"),
        (lambda p: Counting(p, lr=0.1), "Counting.step.* changes its own attributes"),
        (lambda p: Listing(p, lr=0.1), "Listing keeps state 'history' of type list"),
    ],
)
def test_optimizers_that_cannot_be_streamed_are_refused(make: Callable[[Any], Any], message: str) -> None:
    model = make_model()
    with open_engine() as engine, pytest.raises(UnsupportedOptimizerError, match=message):
        wrap(model, make(trainable(model)), engine)


def test_plans_that_do_not_fit_are_refused_with_numbers() -> None:
    model = make_model()
    small = Staging(
        gradient_slots=2,
        gradient_slot_bytes=8192,
        update_slots=3,
        update_slot_bytes=4096,
        update_shard_elements=50_000,
    )
    with open_engine() as engine:
        # 49152 elements: two moments and a gradient of 4 bytes each.
        with pytest.raises(
            PlanMismatchError, match="needs an update slot of 589824 bytes, the plan has 3 of 4096"
        ):
            wrap(model, OPTIMIZERS["adamw"](trainable(model)), engine, make_plan(staging=small))
        with pytest.raises(PlanMismatchError, match="in no parameter group"):
            wrap(model, OPTIMIZERS["adamw"]([model.first.weight]), engine)
        with pytest.raises(PlanMismatchError, match="in no unit"):
            OffloadedOptimizer(
                OPTIMIZERS["adamw"](trainable(model)),
                engine=engine,
                plan=make_plan(),
                units=units_of(model)[:1],
            )
    with open_engine(1 << 20) as engine:
        with pytest.raises(TierFullError, match="optimizer state of prologue shard"):
            wrap(model, OPTIMIZERS["adamw"](trainable(model)), engine)
        assert engine.store(Tier.HOST).used_bytes == 0


class FullDisk(FaultyBackend):
    """Has no room for writes while ``full``."""

    full = False

    def submit(self, request: IORequest) -> None:
        if self.full and request.direction is Direction.WRITE:
            self.plan[self.submitted] = Fault(error=errno.ENOSPC)
        super().submit(request)


def test_a_full_disk_in_mid_update_raises_and_stops() -> None:
    model = make_model()
    backend = FullDisk(ThreadPoolBackend(2, "test"))
    with open_engine(backend=backend) as engine:
        optimizer = wrap(model, OPTIMIZERS["adamw"](trainable(model)), engine)
        train(model, optimizer, steps=1)
        exp_avg = optimizer.read_state("second.weight", "exp_avg")
        model(batches(1)[0]).backward()
        optimizer.gradients.drain()
        backend.full = True
        with pytest.raises(TierIOError, match="optimizer state of prologue shard 1"):
            optimizer.step()
        backend.full = False
        assert torch.equal(optimizer.read_state("second.weight", "exp_avg"), exp_avg)
        with pytest.raises(OffloadError, match="an earlier update failed half-way"):
            optimizer.step()


@pytest.mark.parametrize("unit", ["prologue", "block", "epilogue"])
def test_after_a_failed_update_every_forward_raises(unit: str) -> None:
    """The update's last write fails when nothing of it waits any more."""
    model = make_model()
    backend = FullDisk(ThreadPoolBackend(2, "test"))
    with open_engine(backend=backend) as engine:
        optimizer = wrap(model, OPTIMIZERS["adamw"](trainable(model)), engine, make_plan(AHEAD))
        model(batches(1)[0]).backward()
        optimizer.gradients.drain()
        optimizer.step()
        for one in ("prologue", "block"):
            optimizer.ensure(one)
        optimizer._updates._pipeline.drain()
        backend.full = True
        optimizer.ensure("epilogue")  # its writes are still under way
        with pytest.raises(TierIOError, match="optimizer state of epilogue"):
            optimizer.flush()
        backend.full = False
        with pytest.raises(OffloadError, match="an earlier update failed half-way"):
            optimizer.ensure(unit)


def open_late_engine(**how: int) -> Engine:
    return Engine({Tier.HOST: MemoryStore(Tier.HOST, 64 << 20)}, LateDevice(**how))


def assert_untouched(model: nn.Module, engine: Engine) -> None:
    """Nothing of ours is left on the model or the tier, and plain PyTorch goes on."""
    assert engine.store(Tier.HOST).used_bytes == 0
    for name, parameter in model.named_parameters():
        assert not parameter._post_accumulate_grad_hooks, name
        assert not parameter._backward_hooks, name
    model(batches(1)[0]).backward()
    assert {type(p.grad) for p in trainable(model) if p.grad is not None} == {torch.Tensor}


@pytest.mark.parametrize("refused", [1, 2, 3])
def test_staging_memory_that_is_refused_leaves_nothing(refused: int) -> None:
    model = make_model()
    with open_late_engine(refuse_registration=refused) as engine:
        if refused <= 2:  # gradients' slots, then the update's
            with pytest.raises(OffloadError, match="the limit of locked memory"):
                wrap(model, OPTIMIZERS["adamw"](trainable(model)), engine)
            assert engine.device.ever_registered == refused - 1
        else:
            optimizer = wrap(model, OPTIMIZERS["adamw"](trainable(model)), engine)
            assert len(engine.device.registered) == 2
            optimizer.close()
        assert engine.device.registered == {}
        assert_untouched(model, engine)


@pytest.mark.parametrize("refused", [1, 2, 3])
def test_device_memory_that_is_refused_leaves_nothing(refused: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The records of small parameters, and two mirrors of the update's slots."""
    model, empty, sizes = make_model(), LateDevice.empty, []

    def full(device: LateDevice, nbytes: int) -> torch.Tensor:
        sizes.append(nbytes)
        if len(sizes) == refused:
            raise torch.OutOfMemoryError("the device is full")
        return empty(device, nbytes)

    monkeypatch.setattr(LateDevice, "empty", full)
    with open_late_engine() as engine:
        with pytest.raises(torch.OutOfMemoryError, match="the device is full"):
            wrap(model, OPTIMIZERS["adamw"](trainable(model)), engine)
        assert sizes[1:] == [STAGING.update_slot_bytes] * (refused - 1)
        assert engine.device.registered == {}
        assert_untouched(model, engine)


@pytest.mark.parametrize("late", [False, True])
def test_state_that_cannot_be_taken_over_leaves_nothing(late: bool) -> None:
    model = make_model()
    plain = OPTIMIZERS["adamw"](trainable(model))
    for p in trainable(model):
        plain.state[p] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(p)}
    with open_late_engine() if late else open_engine() as engine:
        with pytest.raises(PlanMismatchError, match=r"has \['exp_avg'\] and \['step'\]"):
            wrap(model, plain, engine)
        assert len(plain.state) == len(trainable(model))
        if late:
            assert engine.device.registered == {}
        assert_untouched(model, engine)


def test_close_gives_back_the_rest_where_a_part_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    close = GradientStore.close

    def fail(gradients: GradientStore) -> None:
        close(gradients)
        raise OffloadError("the last write of a gradient failed")

    monkeypatch.setattr(GradientStore, "close", fail)
    with open_late_engine() as engine:
        optimizer = wrap(model, OPTIMIZERS["adamw"](trainable(model)), engine)
        with pytest.raises(OffloadError, match="the last write of a gradient"):
            optimizer.close()
        assert engine.device.registered == {}
        assert_untouched(model, engine)


@pytest.mark.parametrize("known", [True, False])
def test_a_parameter_unfrozen_after_planning_is_refused_by_name(known: bool) -> None:
    model = make_model()
    with open_engine() as engine:
        units = units_of(model)
        if not known:
            units[1] = ("block", [(n, p) for n, p in units[1][1] if p.requires_grad])
        optimizer = OffloadedOptimizer(
            OPTIMIZERS["adamw"](list(model.parameters())), engine=engine, plan=make_plan(), units=units
        )
        train(model, optimizer, steps=1)
        model.frozen.weight.requires_grad_(True)
        optimizer.step()  # unfrozen, but without a gradient: plain PyTorch does nothing either
        model(batches(1)[0]).backward()
        before = copy.deepcopy(model.state_dict())
        # unused, embed, first (2), second (2) come before.
        name = r"frozen\.weight" if known else "number 6"
        with pytest.raises(
            PlanMismatchError, match=rf"parameter {name} of shape \(101, 101\) has a gradient"
        ):
            optimizer.step()
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        model.frozen.weight.requires_grad_(False)
        model.frozen.weight.grad = None
        optimizer.step()
        assert not torch.equal(before["second.weight"], model.second.weight)


@pytest.mark.parametrize("master", [False, True])
def test_a_weight_changed_under_an_update_is_refused(master: bool) -> None:
    model = make_model(torch.bfloat16 if master else torch.float32)
    with open_engine() as engine:
        optimizer = wrap(
            model, OPTIMIZERS["adamw"](trainable(model)), engine, make_plan(AHEAD), master_weights=master
        )
        train(model, optimizer, steps=1)
        with torch.no_grad():
            model.first.weight.mul_(0.5)  # nothing is pending
        model(batches(1)[0]).backward()
        optimizer.step()
        optimizer.ensure("prologue")
        with torch.no_grad():
            model.embed.weight.mul_(0.5)  # its update is done
            model.first.weight.mul_(0.5)
        expected = model.first.weight.clone()
        with pytest.raises(OffloadError, match=r"^first\.weight was changed in place .* call flush\(\)"):
            optimizer.flush()
        assert torch.equal(model.first.weight, expected)
