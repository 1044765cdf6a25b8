"""Updates during backward equal the sequential schedule bit for bit, or are refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from memtrain.offload.engine import Engine
from memtrain.offload.in_backward import HalfDoneStepError, guard_modules, is_applied
from memtrain.offload.optimizer import OffloadedOptimizer
from memtrain.offload.tiers import MemoryStore
from memtrain.planner.actions import Tier, UpdateSchedule
from tests.offload.in_backward_runs import ADAMW, IN_BACKWARD, plan_of, run_one, wrapped
from tests.offload.late_device import LateDevice
from tests.offload.optimizer_runs import OPTIMIZERS, assert_equal_models, assert_equal_state, train
from tests.offload.streamed import (
    assert_same,
    assert_same_weights,
    llama,
    plain_steps,
    stream,
    streamed_optimizer,
    streamed_steps,
)
from tests.offload.streamed import open_engine as open_tiers
from tests.offload.test_grid_optimizers import OPTIMIZERS as GRID
from tests.offload.training import STAGING, make_model, open_engine, plain_run, trainable, wrap


@pytest.mark.parametrize(("kind", "accumulate"), list(product(OPTIMIZERS, [1, 3])))
def test_fp32_equals_plain_pytorch(kind: str, accumulate: int) -> None:
    expected, plain, _ = plain_run(OPTIMIZERS[kind], accumulate=accumulate)
    model = make_model()
    with wrapped(model, accumulate, OPTIMIZERS[kind]) as optimizer:
        train(model, optimizer, accumulate=accumulate)
        assert_equal_models(model, expected)
        assert_equal_state(optimizer, model, plain)
        optimizer.close()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("tiers", list(product([Tier.DEVICE, Tier.HOST], repeat=2)))
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("master", [False, True])
def test_every_pair_of_tiers(tiers: tuple[Tier, Tier], accumulate: int, master: bool) -> None:
    dtype = torch.bfloat16 if master else torch.float32
    expected, plain, _ = plain_run(ADAMW, accumulate=accumulate, dtype=dtype, master=master)
    model = make_model(dtype)
    with open_engine() as engine:
        plan = plan_of(accumulate, *tiers)
        optimizer = wrap(model, ADAMW(trainable(model)), engine, plan, master_weights=master)
        train(model, optimizer, accumulate=accumulate)
        assert_equal_models(model, expected)
        assert_equal_state(optimizer, model, plain)


@pytest.mark.parametrize(("kind", "accumulate"), list(product(GRID, [1, 2])))
def test_optimizers_of_the_grid(kind: str, accumulate: int) -> None:
    """Their groups count steps, and bf16 weights are rounded by bits that depend on the count."""
    make = GRID[kind]
    expected, plain, _ = plain_run(make, steps=4, accumulate=accumulate, dtype=torch.bfloat16)
    model = make_model(torch.bfloat16)
    with wrapped(model, accumulate, make) as optimizer:
        train(model, optimizer, steps=4, accumulate=accumulate)
        assert_equal_models(model, expected)
        assert_equal_state(optimizer, model, plain)
        assert [g["step"] for g in optimizer.param_groups] == [g["step"] for g in plain.param_groups]


@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("slots", [2, 20])
@pytest.mark.parametrize("tied", [False, True])
def test_streamed_weights(tied: bool, slots: int, master: bool, tmp_path: Path) -> None:
    dtype = torch.bfloat16 if master else torch.float32
    plain, model = llama(tied=tied, dtype=dtype), llama(tied=tied, dtype=dtype)
    expected = plain_steps(plain, ADAMW, master=master)
    with open_tiers(tmp_path) as engine:
        streamer = stream(model, engine, slots=slots, tier=Tier.NVME)
        with streamed_optimizer(
            model, streamer, engine, ADAMW, schedule=IN_BACKWARD, state_tier=Tier.NVME,
            gradient_tier=Tier.DEVICE, master_weights=master,
        ) as optimizer:  # fmt: skip
            assert_same(expected, streamed_steps(model, optimizer))
            assert_same_weights(plain, streamer, model)


@pytest.mark.parametrize(
    ("kind", "schedule"),
    [*product(["adamw fused"], UpdateSchedule), ("galore", IN_BACKWARD), ("adamw 8-bit", IN_BACKWARD)],
)
def test_streamed_weights_that_fused_kernels_change(kind: str, schedule: UpdateSchedule) -> None:
    """torch's fused AdamW does not count a weight's versions, which say what must be written to its tier."""
    make = {**OPTIMIZERS, **GRID}[kind]
    plain, model = llama(tied=True), llama(tied=True)
    expected = plain_steps(plain, make)
    with open_tiers() as engine:
        streamer = stream(model, engine, slots=2)
        with streamed_optimizer(model, streamer, engine, make, schedule=schedule) as optimizer:
            assert_same(expected, streamed_steps(model, optimizer))
            assert_same_weights(plain, streamer, model)


def test_groups_and_schedulers() -> None:
    def groups(parameters: list[Any]) -> list[dict[str, Any]]:
        return [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.3},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0, "lr": 3e-2},
        ]

    def cosine(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)

    expected, _, _ = plain_run(ADAMW, schedule=cosine, groups=groups)
    model = make_model()
    with wrapped(model, 1, lambda parameters: ADAMW(groups(parameters))) as optimizer:
        steps: list[str] = []
        optimizer.register_step_pre_hook(lambda *_: steps.append("before"))
        optimizer.register_step_post_hook(lambda *_: steps.append("after"))
        train(model, optimizer, scheduler=cosine(optimizer))
        assert steps == ["before", "after"] * 5
        assert_equal_models(model, expected)


def test_a_device_with_memory_of_its_own() -> None:
    expected, _, _ = plain_run(ADAMW)
    model = make_model()
    device = LateDevice(seed=3, eagerness=0.1)
    with Engine({Tier.HOST: MemoryStore(Tier.HOST, 64 << 20)}, device) as engine:
        optimizer = wrap(model, ADAMW(trainable(model)), engine, plan_of())
        train(model, optimizer)
        assert_equal_models(model, expected)
        optimizer.close()


class Layers(nn.Module):
    """Layers in any order, some used several times; each pass may leave some out."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList([nn.Linear(260, 260) for _ in range(max(order) + 1)])
        self.order = order

    def forward(self, x: Tensor, left_out: int) -> Tensor:
        for number in self.order:
            if number != left_out:
                x = x + torch.tanh(self.layers[number](x))
        return x.square().mean()


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    order=st.lists(st.integers(0, 4), min_size=1, max_size=8),
    unit_order=st.permutations(range(5)),
    micro_batches=st.integers(1, 3),
    left_out=st.lists(st.integers(-1, 4), min_size=9, max_size=9),
    away=st.booleans(),
    slots=st.integers(1, 4),
)
def test_any_order_of_layers(
    order: list[int], unit_order: list[int], micro_batches: int, left_out: list[int], away: bool, slots: int
) -> None:
    steps = 3
    plain, model = Layers(order), Layers(order)
    reference = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    data = torch.randn(steps * micro_batches, 3, 260, generator=torch.Generator().manual_seed(2))
    passes = [(data[i], left_out[i % 9] if set(order) != {left_out[i % 9]} else -1) for i in range(len(data))]
    units = [
        (str(n), [(f"{n}.{k}", p) for k, p in model.layers[n].named_parameters()])
        for n in unit_order
        if n < len(model.layers)
    ]
    staging = dataclasses.replace(STAGING, update_slots=slots)
    gradients = Tier.HOST if away else Tier.DEVICE
    plan = plan_of(micro_batches, gradients, staging=staging, units=tuple(name for name, _ in units))
    with open_engine() as engine:
        optimizer = OffloadedOptimizer(
            torch.optim.AdamW(model.parameters(), lr=1e-2), engine=engine, plan=plan, units=units
        )
        for step in range(steps):
            for each in passes[step * micro_batches : (step + 1) * micro_batches]:
                plain(*each).backward()
                model(*each).backward()
            for one in (reference, optimizer):
                one.step()
                one.zero_grad()
        optimizer.flush()
        assert_equal_models(model, plain)
        optimizer.close()


def test_a_unit_is_updated_in_the_last_pass_and_a_tied_table_behind_its_last_use() -> None:
    model = make_model()
    model.unused.requires_grad_(False)
    seen: dict[str, list[bool]] = {}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def look(name: str) -> Callable[[Tensor], None]:
        def arrived(gradient: Tensor) -> None:
            seen.setdefault(name, []).append(torch.equal(model.second.weight, before["second.weight"]))

        return arrived

    model.first.weight.register_hook(look("first"))
    model.embed.weight.register_hook(look("embed"))
    with wrapped(model, 2) as optimizer:
        run_one(model, 0)
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
        assert type(model.second.weight.grad) is Tensor
        run_one(model, 1)
        # The second layer's unit is complete before the first layer's gradient comes, in the last pass alone.
        assert seen == {"first": [True, False], "embed": [True, False]}
        changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
        assert {"second.weight", "first.weight", "embed.weight"} <= set(changed)
        assert is_applied(model.second.weight.grad)
        assert model.second.weight.grad.shape == model.second.weight.shape
        optimizer.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())


def test_a_unit_with_a_parameter_that_is_not_used_is_left_to_step() -> None:
    model = make_model()
    before = model.embed.weight.detach().clone()
    with wrapped(model) as optimizer:
        run_one(model)
        assert torch.equal(model.embed.weight, before)  # with the unused parameter in one unit
        assert type(model.embed.weight.grad) is Tensor
        assert is_applied(model.first.weight.grad)
        optimizer.step()
        assert not torch.equal(model.embed.weight, before)
        assert type(model.embed.weight.grad) is Tensor


@pytest.mark.parametrize("master", [False, True])
def test_every_record_is_read_once_and_ahead_of_its_turn(master: bool) -> None:
    model = make_model(torch.bfloat16 if master else torch.float32)
    model.unused.requires_grad_(False)
    reads: list[int] = []
    with open_engine() as engine:
        optimizer = wrap(model, ADAMW(trainable(model)), engine, plan_of(), master_weights=master)
        train(model, optimizer, steps=1)
        store = engine.store(Tier.HOST)
        submitted = store.read
        store.read = lambda *args: (reads.append(len(at_turn)), submitted(*args))[1]
        at_turn: list[str] = []
        advance = optimizer._updates.advance
        optimizer._updates.advance = lambda update, unit, following: (
            at_turn.append(unit),
            advance(update, unit, following),
        )
        run_one(model)
        optimizer.step()
        shards = [s for s in optimizer.index.all_shards() if optimizer.records.on_tier(s)]
        assert at_turn == ["epilogue", "block", "prologue"]
        assert len(reads) == len(shards)
        # Three slots: two shards are read beside the first one, none of them waits for its unit's turn.
        assert reads.count(1) > len(optimizer.index.shards["epilogue"]) - 1


def test_backward_itself_may_not_take_a_checkpoint_of_a_half_done_step() -> None:
    """As the handler of a signal would, that comes while a hook runs."""
    model = make_model()
    told: list[bool] = []
    looks: list[Callable[[Any], Any]] = [
        lambda o: o.flush(), lambda o: o.scalar_state(), lambda o: list(o.iter_state()), lambda o: o.state,
        lambda o: o.state_dict(), lambda _: model.state_dict(), lambda o: o.ensure("block"),
    ]  # fmt: skip
    with wrapped(model) as optimizer:
        guards = guard_modules([model], optimizer.refuse_half_done)

        def is_refused(look: Callable[[Any], Any]) -> bool:
            try:
                look(optimizer)
            except HalfDoneStepError as error:
                return "in the midst of backward: 1 of 3 units" in str(error)
            return False

        def hook(_: Tensor) -> None:
            told.extend(map(is_refused, looks))

        model.first.weight.register_hook(hook)
        run_one(model)
        assert told == [True] * 6 + [False]  # not what a block that is computed again does
        optimizer.step()
        assert len(model.state_dict()) > 0
        for guard in guards:
            guard.remove()
