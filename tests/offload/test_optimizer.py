"""The streamed optimizer equals plain PyTorch bit for bit, and says no by name."""

from __future__ import annotations

import copy
import dataclasses
import errno
import io
import os
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from memtrain.offload.engine import Engine
from memtrain.offload.errors import OffloadError, PlanMismatchError, TierFullError, TierIOError
from memtrain.offload.gradients import GradientStore
from memtrain.offload.io import Direction, Fault, FaultyBackend, IORequest, ThreadPoolBackend
from memtrain.offload.offloaded_grad import OffloadedGrad
from memtrain.offload.optimizer import NonFiniteGradientError, OffloadedOptimizer
from memtrain.offload.optimizer_probe import UnsupportedOptimizerError
from memtrain.offload.optimizer_state import OffloadedState, StaleStateError
from memtrain.offload.shards import Shard
from memtrain.offload.tiers import MemoryStore
from memtrain.offload.update import Update
from memtrain.planner.actions import Tier, UpdateSchedule
from memtrain.planner.plan import Staging
from tests.offload.late_device import LateDevice
from tests.offload.training import (
    STAGING,
    Lion,
    batches,
    make_model,
    make_plan,
    open_engine,
    plain_run,
    trainable,
    units_of,
    wrap,
)

SEQUENTIAL, AHEAD = UpdateSchedule.SEQUENTIAL, UpdateSchedule.AHEAD
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adam amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "sgd nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "lion": lambda p: Lion(p, lr=1e-2, decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


def train(
    model: nn.Module,
    optimizer: OffloadedOptimizer,
    steps: int = 5,
    accumulate: int = 1,
    clip: Callable[[], Any] = lambda: None,
    scheduler: Any = None,
    zero: Callable[[], Any] | None = None,
    order: tuple[str, ...] = ("prologue", "block", "epilogue"),
) -> list[torch.Tensor]:
    """An ordinary loop, with the calls that pre-forward hooks make."""
    data, norms = iter(batches(steps * accumulate)), []
    for _ in range(steps):
        for _ in range(accumulate):
            for unit in order:
                optimizer.ensure(unit)
            (model(next(data)) / accumulate).backward()
        norms.append(clip())
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        (zero or optimizer.zero_grad)()
    optimizer.flush()
    return norms


def assert_equal_models(one: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def assert_equal_state(optimizer: OffloadedOptimizer, model: nn.Module, plain: Any) -> None:
    """Every state tensor equals plain PyTorch's, and none is missing."""
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    reference = dict(zip(names, [p for g in plain.param_groups for p in g["params"]], strict=True))
    seen = 0
    for name, key, tensor in optimizer.iter_state():
        expected = reference[name] if key == "master_weight" else plain.state[reference[name]][key]
        assert torch.equal(tensor, expected), (name, key)
        seen += key != "master_weight"
    for name, scalars in optimizer.scalar_state().items():
        for key, value in scalars.items():
            assert value == plain.state[reference[name]][key]
            seen += 1
    assert seen == sum(len(state) for state in plain.state.values())


@pytest.mark.parametrize(("kind", "schedule"), list(product(OPTIMIZERS, [SEQUENTIAL, AHEAD])))
def test_fp32_equals_plain_pytorch(kind: str, schedule: UpdateSchedule) -> None:
    make = OPTIMIZERS[kind]
    expected, plain, norms = plain_run(make, accumulate=3, max_norm=0.05)
    model = make_model()
    with open_engine() as engine:
        optimizer = wrap(model, make(trainable(model)), engine, make_plan(schedule))
        assert optimizer.layout.elementwise == (kind != "adafactor")
        order = ("epilogue", "prologue", "block")
        ours = train(
            model, optimizer, accumulate=3, order=order,
            clip=lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05),
        )  # fmt: skip
        assert float(norms[0]) > 0.05
        assert torch.equal(torch.stack(ours), torch.stack(norms))
        assert_equal_models(model, expected)
        assert_equal_state(optimizer, model, plain)
        optimizer.close()


@pytest.mark.parametrize(
    ("kind", "schedule"),
    list(product(["adamw", "adamw fused", "sgd", "lion", "adafactor"], [SEQUENTIAL, AHEAD])),
)
def test_bf16_with_masters_equals_plain_pytorch(kind: str, schedule: UpdateSchedule) -> None:
    make = OPTIMIZERS[kind]
    expected, plain, norms = plain_run(make, accumulate=2, max_norm=0.05, dtype=torch.bfloat16, master=True)
    model = make_model(torch.bfloat16)
    with open_engine() as engine:
        optimizer = wrap(model, make(trainable(model)), engine, make_plan(schedule), master_weights=True)
        ours = train(model, optimizer, accumulate=2, clip=lambda: optimizer.clip_grad_norm_(0.05))
        assert torch.equal(torch.stack(ours), torch.stack(norms))
        assert_equal_models(model, expected)
        assert_equal_state(optimizer, model, plain)
        optimizer.close()


@pytest.mark.parametrize("tiers", list(product([Tier.DEVICE, Tier.HOST], repeat=2)))
@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD])
@pytest.mark.parametrize("master", [False, True])
def test_every_pair_of_tiers(tiers: tuple[Tier, Tier], schedule: UpdateSchedule, master: bool) -> None:
    dtype = torch.bfloat16 if master else torch.float32
    expected, _, norms = plain_run(
        OPTIMIZERS["adamw"], accumulate=2, max_norm=0.05, dtype=dtype, master=master
    )
    model = make_model(dtype)
    with open_engine() as engine:
        plan = make_plan(schedule, gradient_tier=tiers[0], optimizer_tier=tiers[1])
        optimizer = wrap(model, OPTIMIZERS["adamw"](trainable(model)), engine, plan, master_weights=master)
        ours = train(model, optimizer, accumulate=2, clip=lambda: optimizer.clip_grad_norm_(0.05))
        assert torch.equal(torch.stack(ours), torch.stack(norms))
        assert_equal_models(model, expected)
        assert isinstance(model.first.weight.grad, OffloadedGrad) is False
        optimizer.close()


def test_with_everything_on_the_device_no_slab_is_needed() -> None:
    expected, _, _ = plain_run(OPTIMIZERS["adamw"])
    model = make_model()
    with open_engine() as engine:
        plan = make_plan(
            gradient_tier=Tier.DEVICE,
            optimizer_tier=Tier.DEVICE,
            staging=Staging(update_shard_elements=50_000),
        )
        optimizer = wrap(model, OPTIMIZERS["adamw"](trainable(model)), engine, plan)
        train(model, optimizer)
        assert_equal_models(model, expected)
        assert engine.store(Tier.HOST).statistics().peak_used_bytes == 0


@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD])
def test_groups_and_schedulers(schedule: UpdateSchedule) -> None:
    def groups(parameters: list[Any]) -> list[dict[str, Any]]:
        return [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.3},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0, "lr": 3e-2},
        ]

    def cosine(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)

    make = OPTIMIZERS["adamw"]
    expected, _, _ = plain_run(make, schedule=cosine, groups=groups)
    model = make_model()
    with open_engine() as engine:
        inner = make(groups(trainable(model)))
        optimizer = wrap(model, inner, engine, make_plan(schedule))
        assert isinstance(optimizer, torch.optim.Optimizer)
        assert optimizer.param_groups is inner.param_groups
        train(model, optimizer, scheduler=cosine(optimizer))
        assert_equal_models(model, expected)


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


def test_an_update_ahead_waits_for_ensure_and_survives_new_gradients() -> None:
    model, reference = make_model(), make_model()
    plain = OPTIMIZERS["adamw"](trainable(reference))
    first = batches(1)[0]
    reference(first).backward()
    plain.step()
    with open_engine() as engine:
        optimizer = wrap(model, OPTIMIZERS["adamw"](trainable(model)), engine, make_plan(AHEAD))
        before = model.first.weight.detach().clone()
        model(first).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(model.first.weight, before)
        # Nobody called ensure: the hook must, before a gradient that the update needs is overwritten.
        nn.functional.linear(torch.randn(3, 101), model.first.weight).sum().backward()
        assert torch.equal(model.first.weight, reference.first.weight)
        assert not torch.equal(model.second.weight, reference.second.weight)
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


def test_closure_hooks_and_frozen_groups() -> None:
    model = make_model()
    with open_engine() as engine:
        inner = OPTIMIZERS["sgd"](list(model.parameters()))  # frozen ones too
        fired: list[str] = []
        inner.register_step_pre_hook(lambda *_: fired.append("inner"))
        optimizer = wrap(model, inner, engine)
        optimizer.register_step_post_hook(lambda *_: fired.append("outer"))

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(batches(1)[0])
            loss.backward()
            return loss

        assert optimizer.step(closure).item() > 0
        assert fired == ["inner", "outer"]
        with pytest.raises(PlanMismatchError, match="add_param_group after the plan was made"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def test_state_dict_moves_nothing_until_it_is_used() -> None:
    model = make_model()
    with open_engine() as engine:
        make = OPTIMIZERS["adamw"]
        optimizer = wrap(model, make(trainable(model)), engine)
        assert optimizer.state_dict()["state"] == {}
        assert optimizer.state == {}
        train(model, optimizer, steps=2)
        read = engine.store(Tier.HOST).statistics().bytes_read
        saved = optimizer.state_dict()
        moved = {
            n: {k: v.to("cpu") if isinstance(v, torch.Tensor) else v for k, v in s.items()}
            for n, s in saved["state"].items()
        }
        optimizer.load_state_dict({**saved, "state": moved})
        assert engine.store(Tier.HOST).statistics().bytes_read == read
        _, plain, _ = plain_run(make, steps=2)
        expected = plain.state_dict()
        assert saved["param_groups"] == expected["param_groups"]
        assert saved["state"].keys() == expected["state"].keys()
        for number, state in expected["state"].items():
            assert all(torch.equal(saved["state"][number][key], value) for key, value in state.items())
            assert isinstance(saved["state"][number]["exp_avg"], OffloadedState)
        file = io.BytesIO()
        torch.save(copy.deepcopy(saved), file)
        file.seek(0)
        plain.load_state_dict(torch.load(file))


@pytest.mark.parametrize("through", ["state_dict", "plain state_dict", "load_state", "lazily"])
def test_resume_is_bit_equal(through: str) -> None:
    make = OPTIMIZERS["adamw"]
    data = batches(4)
    expected, _, _ = plain_run(make, steps=4)
    model = make_model()
    with open_engine() as engine, open_engine() as other:
        if through == "plain state_dict":
            model, plain, _ = plain_run(make, steps=2)
            saved = plain.state_dict()
        else:
            optimizer = wrap(model, make(trainable(model)), engine)
            train(model, optimizer, steps=2)
            saved = copy.deepcopy(optimizer.state_dict())
        resumed = make_model()
        resumed.load_state_dict(model.state_dict())
        staging = Staging(
            **{
                **{f: getattr(STAGING, f) for f in STAGING.__dataclass_fields__},
                "update_shard_elements": 8192,
            }
        )
        again = wrap(resumed, make(trainable(resumed)), other, make_plan(staging=staging))
        if through == "load_state":
            again.load_state(optimizer.iter_state(), optimizer.scalar_state())
        elif through == "lazily":
            lazy = {
                (n, k): (lambda n=n, k=k: optimizer.read_state(n, k)) for n, k, _ in optimizer.iter_state()
            }
            again.load_state(lazy, optimizer.scalar_state())
        else:
            again.load_state_dict(saved)
        for batch in data[2:]:
            resumed(batch).backward()
            again.step()
            again.zero_grad()
        assert_equal_models(resumed, expected)


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


def test_state_that_exists_is_taken_over() -> None:
    make = OPTIMIZERS["adamw"]
    expected, _, _ = plain_run(make, steps=4)
    model, inner, _ = plain_run(make, steps=2)
    with open_engine() as engine:
        optimizer = wrap(model, inner, engine)
        assert not inner.state
        for batch in batches(4)[2:]:
            model(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_equal_models(model, expected)


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


def test_shards_that_need_no_slot_are_not_walked_past(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    away = make_plan(AHEAD).state("epilogue")
    near = make_plan(AHEAD, Tier.DEVICE, Tier.DEVICE)
    plan = dataclasses.replace(near, states=(*near.states[:2], away))
    asked: list[str] = []
    needs_slot = Update.needs_slot

    def noted(update: Update, shard: Shard) -> bool:
        asked.append(shard.unit)
        return needs_slot(update, shard)

    with open_engine() as engine:
        optimizer = wrap(model, OPTIMIZERS["adamw"](trainable(model)), engine, plan)
        model(batches(1)[0]).backward()
        optimizer.step()
        monkeypatch.setattr(Update, "needs_slot", noted)
        assert len(optimizer._updates._update.waiting["prologue"]) == 3
        for _ in range(10):
            optimizer.ensure("some module's")  # both shards of the epilogue have been read ahead
        assert asked == []
        optimizer.flush()
        assert "epilogue" in asked


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


def test_a_forked_child_reads_state_that_stays() -> None:
    model = make_model()
    plan = make_plan(optimizer_tier=Tier.DEVICE)
    with open_engine() as engine:
        optimizer = wrap(model, OPTIMIZERS["adamw"](trainable(model)), engine, plan)
        train(model, optimizer, steps=1)
        expected = optimizer.read_state("first.bias", "exp_avg")
        assert expected.any()
        shard, piece = optimizer.index.pieces["first.bias"][0]
        state = optimizer.layout.shards[shard].state(optimizer._records.memory(shard, None), piece)
        child = os.fork()
        if child == 0:
            same = False
            try:
                same = torch.equal(state["exp_avg"], expected)
            finally:
                os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0
        optimizer.close()


def test_what_is_on_the_tier_and_in_slabs_in_bytes() -> None:
    model = make_model(torch.bfloat16)
    with open_engine() as engine:
        optimizer = wrap(model, OPTIMIZERS["adamw"](trainable(model)), engine, master_weights=True)
        page = 4096
        records = gradients = 0
        for shard in optimizer.index.all_shards():
            if not shard.small:
                records += sum(3 * -(-piece.elements * 4 // page) * page for piece in shard.pieces)
        for name in ("embed.weight", "unused", "first.weight", "second.weight"):
            gradients += -(-model.get_parameter(name).numel() * 2 // page) * page
        assert engine.store(Tier.HOST).used_bytes == records + gradients
        assert optimizer.gradients._ring.size_bytes == 3 * (64 << 10)
        assert optimizer._updates.ring_bytes == 3 * (2 << 20)
        train(model, optimizer, steps=2)
        assert engine.store(Tier.HOST).statistics().peak_used_bytes == records + gradients
        assert not optimizer.optimizer.state
        optimizer.close()
        assert engine.store(Tier.HOST).used_bytes == 0


def test_accelerate_moves_nothing_and_trains_alike() -> None:
    accelerate = pytest.importorskip("accelerate")

    def run(model: nn.Module, optimizer: Any) -> list[torch.Tensor]:
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        wrapped = accelerator.prepare(optimizer)
        scheduler = accelerator.prepare(
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        )
        norms = []
        for batch in batches(8):
            with accelerator.accumulate(model):
                accelerator.backward(model(batch))
                if accelerator.sync_gradients:
                    norms.append(accelerator.clip_grad_norm_(model.parameters(), 0.05))
                wrapped.step()
                scheduler.step()
                wrapped.zero_grad()
        return norms

    model, reference = make_model(), make_model()
    expected = run(reference, OPTIMIZERS["adamw"](trainable(reference)))
    with open_engine() as engine:
        optimizer = wrap(model, OPTIMIZERS["adamw"](trainable(model)), engine, make_plan(AHEAD))
        # No pre-forward hooks here: a pending update must not be read past.
        model.register_forward_pre_hook(lambda *_: optimizer.flush())
        norms = run(model, optimizer)
        optimizer.flush()
        assert torch.equal(torch.stack(norms), torch.stack(expected))
        assert_equal_models(model, reference)


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


def test_an_old_state_dict_is_refused_and_a_copy_of_it_is_a_snapshot() -> None:
    """Its ``step`` would be the old one, and its moments those of now."""
    model = make_model()
    with open_engine() as engine:
        optimizer = wrap(model, OPTIMIZERS["adamw"](trainable(model)), engine, make_plan(AHEAD))
        train(model, optimizer, steps=2)
        saved = optimizer.state_dict()
        snapshot = copy.deepcopy(saved)
        optimizer.load_state_dict(saved)  # as Accelerator.prepare does, at once
        optimizer.param_groups[0]["lr"] = 0.5
        train(model, optimizer, steps=1)
        stale = r"embed\.weight/exp_avg, .* change 2 of .* 3 by now: .*copy\.deepcopy\(optimizer\.state_dict"
        with pytest.raises(StaleStateError, match=stale):
            optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] == 0.5
        assert optimizer.scalar_state()["embed.weight"]["step"] == 3
        with pytest.raises(StaleStateError, match=stale):
            copy.deepcopy(saved)
        now = optimizer.state_dict()
        optimizer.load_state_dict(snapshot)
        assert optimizer.scalar_state()["embed.weight"]["step"] == 2
        number = next(iter(snapshot["state"]))
        assert torch.equal(
            optimizer.read_state("embed.weight", "exp_avg"), snapshot["state"][number]["exp_avg"]
        )
        with pytest.raises(StaleStateError, match=r"change 3 of .* 4 by now"):
            optimizer.load_state_dict(now)


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


@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD])
def test_masters_follow_weights_that_were_written_between_steps(schedule: UpdateSchedule) -> None:
    """Loading weights, clamping or swapping them counts; what was not written keeps its lower bits."""
    make = OPTIMIZERS["adamw"]
    torch.manual_seed(0)
    plain = make_model(torch.bfloat16)
    masters = [p.detach().float() for p in trainable(plain)]
    reference = make(masters)

    def plain_steps(data: list[Any]) -> None:
        for batch in data:
            plain(batch).backward()
            for master, p in zip(masters, trainable(plain), strict=True):
                master.grad, p.grad = None if p.grad is None else p.grad.float(), None
            reference.step()
            with torch.no_grad():
                for master, p in zip(masters, trainable(plain), strict=True):
                    p.copy_(master)

    def write(model: nn.Module) -> None:
        with torch.no_grad():
            model.first.weight.clamp_(-0.02, 0.02)
            kept = model.embed.weight.clone()
            model.embed.weight.zero_()
            model.embed.weight.copy_(kept)

    data = list(batches(4))
    plain_steps(data[:2])
    write(plain)
    with torch.no_grad():
        for master, p in zip(masters, trainable(plain), strict=True):
            master.copy_(torch.where(master.bfloat16() == p, master, p.float()))
    plain_steps(data[2:])
    model = make_model(torch.bfloat16)
    with open_engine() as engine:
        optimizer = wrap(model, make(trainable(model)), engine, make_plan(schedule), master_weights=True)
        for number, batch in enumerate(data):
            for unit in ("prologue", "block", "epilogue"):
                optimizer.ensure(unit)
            if number == 2:
                optimizer.flush()
                write(model)
            model(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.flush()
        assert float(model.first.weight.detach().abs().max()) < 0.06  # undone, it would be more
        assert_equal_models(model, plain)
        optimizer.close()


def test_pickling_offloaded_state_is_refused_with_the_remedy() -> None:
    """A pickle of the state dict would bring the whole state back into memory without a word."""

    class Owner:
        state_count = 0

        def read_state(self, name: str, key: str) -> torch.Tensor:
            raise AssertionError("read")

    state = OffloadedState(Owner(), "weight", "exp_avg", (2, 3), torch.float32, 0, torch.device("cpu"))
    with pytest.raises(OffloadError, match=r"weight/exp_avg.*save_checkpoint"):
        torch.save({"state": state}, io.BytesIO())
