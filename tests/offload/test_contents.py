"""Bytes that are written against bytes that have changed: what did not change is not written again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memtrain.offload.contents import Content, content_of
from memtrain.offload.device import make_device
from memtrain.offload.engine import Engine
from memtrain.offload.optimizer import OffloadedOptimizer, OptimizerConfig
from memtrain.offload.parameters import ParameterStreamer
from memtrain.offload.tiers import MemoryStore
from memtrain.planner.actions import Tier, UpdateSchedule
from memtrain.planner.plan import Staging
from tests.offload.training import make_plan

WIDTH = 256
WEIGHT = WIDTH * WIDTH * 4  # bytes of an expert in fp32: 64 pages
STATE = 2 * WEIGHT  # AdamW's two moments
STAGING = Staging(
    gradient_slots=3,
    gradient_slot_bytes=64 << 10,
    update_slots=3,
    update_slot_bytes=2 << 20,
    update_shard_elements=WIDTH * WIDTH,  # each expert is a record of its own
)


class Experts(nn.Module):
    """Each input goes to the experts that it names; the others get no gradient."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count))

    def forward(self, hidden: Tensor, chosen: tuple[int, ...]) -> Tensor:
        for number in chosen:
            hidden = hidden + torch.tanh(self.experts[number](hidden))
        return hidden


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = Experts()

    def forward(self, chosen: tuple[int, ...]) -> Tensor:
        torch.manual_seed(1)
        hidden = torch.randn(3, WIDTH).to(self.block.experts[0].weight.dtype)
        return self.block(hidden, chosen).square().mean()


def make_mixture(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return Mixture().to(dtype)


Run = tuple[Any, OffloadedOptimizer, MemoryStore]


@contextmanager
def streamed(model: Any, inner: Any, schedule: UpdateSchedule, **config: Any) -> Iterator[Run]:
    """All of the model on one tier: weights, gradients, state."""
    units = [("block", list(model.named_parameters()))]
    store = MemoryStore(Tier.HOST, 32 << 20)
    with Engine({Tier.HOST: store}, make_device("cpu")) as engine:
        streamer = ParameterStreamer(
            model, [("block", model.block)], units, tiers={"block": Tier.HOST}, engine=engine, slots=2
        )
        streamer.install()
        optimizer = OffloadedOptimizer(
            inner,
            engine=engine,
            plan=make_plan(schedule, staging=STAGING, units=("block",)),
            units=units,
            config=OptimizerConfig(**config),
            weights=streamer,
        )
        yield model, optimizer, store
        optimizer.close()
        streamer.remove()


def step(run: Run, chosen: tuple[int, ...]) -> dict[Content, int]:
    """One step; what it had written."""
    model, optimizer, store = run
    before = store.written_bytes()
    model(chosen).backward()
    optimizer.step()
    optimizer.flush()
    assert optimizer._weights is not None
    optimizer._weights.flush()
    optimizer.zero_grad()
    return {content: size - before[content] for content, size in store.written_bytes().items()}


def changed(run: Run) -> tuple[int, int, int]:
    """State, gradients and weights that have changed so far."""
    _, optimizer, _ = run
    records = optimizer.records
    return (
        records.changed_bytes[Tier.HOST],
        optimizer.gradients.changed_bytes[Tier.HOST],
        records.changed_weight_bytes["block"],
    )


@pytest.mark.parametrize("schedule", list(UpdateSchedule)[:2])
def test_experts_without_tokens_are_not_written(schedule: UpdateSchedule) -> None:
    model = make_mixture()
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with streamed(model, inner, schedule) as run:
        for chosen in [(0, 1, 2, 3), (1, 3), (2,), (0, 2)]:
            before = changed(run)
            written = step(run, chosen)
            count = len(chosen)
            assert written[Content.STATE] == count * STATE
            assert written[Content.GRADIENTS] == written[Content.WEIGHTS] == count * WEIGHT
            moved = [now - then for now, then in zip(changed(run), before, strict=True)]
            assert moved == [count * STATE, count * WEIGHT, count * WEIGHT]


def test_frozen_weights_are_written_when_they_are_sent_out_and_never_again() -> None:
    model = make_mixture()
    for expert in list(model.block.experts)[:3]:
        expert.requires_grad_(False)
    inner = torch.optim.AdamW([model.block.experts[3].weight], lr=1e-2)
    with streamed(model, inner, UpdateSchedule.SEQUENTIAL) as run:
        assert run[2].written_bytes()[Content.WEIGHTS] == 4 * WEIGHT
        for _ in range(3):
            written = step(run, (0, 1, 2, 3))
            assert written[Content.WEIGHTS] == WEIGHT
            assert written[Content.STATE] == STATE


def warm_up(inner: Any, advance: Callable[[float], None]) -> None:
    for rate in (0.0, 0.0, 0.1, 0.0):
        for group in inner.param_groups:
            group["lr"] = rate
        advance(rate)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("masters", [False, True])
def test_a_learning_rate_of_zero_writes_no_weights(name: str, masters: bool) -> None:
    dtype = torch.bfloat16 if masters else torch.float32

    def make(parameters: Any) -> Any:
        if name == "sgd":
            return torch.optim.SGD(parameters, lr=0.1)
        return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.3)

    weight = WEIGHT * dtype.itemsize // 4
    state = (STATE if name == "adamw" else 0) + (WEIGHT if masters else 0)
    model, plain = make_mixture(dtype), make_mixture(dtype)
    work = [nn.Parameter(p.detach().float()) if masters else p for p in plain.parameters()]
    reference = make(work)

    def plainly(rate: float) -> None:
        plain((0, 1)).backward()
        for parameter, master in zip(plain.parameters(), work, strict=True):
            if masters:
                master.grad = None if parameter.grad is None else parameter.grad.float()
        reference.step()
        for parameter, master in zip(plain.parameters(), work, strict=True):
            parameter.data.copy_(master.detach())
            parameter.grad = None

    warm_up(reference, plainly)
    inner = make(model.parameters())
    with streamed(model, inner, UpdateSchedule.SEQUENTIAL, master_weights=masters) as run:

        def ours(rate: float) -> None:
            before = changed(run)[2]
            written = step(run, (0, 1))
            moved = 2 * weight if rate else 0
            assert written[Content.WEIGHTS] == changed(run)[2] - before == moved
            assert written[Content.STATE] == 2 * state

        warm_up(inner, ours)
    for (key, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter, other), key


def test_decay_beside_the_learning_rate_is_written() -> None:
    """A learning rate of zero says nothing: the bits are looked at."""

    class Shrinking(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.mul_(0.5)

    model = make_mixture()
    with streamed(model, Shrinking(model.parameters(), lr=0.0), UpdateSchedule.SEQUENTIAL) as run:
        assert step(run, (0, 1))[Content.WEIGHTS] == 2 * WEIGHT


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("optimizer state of model.layers.0 shard 1", Content.STATE),
        ("spare extent 3", Content.STATE),
        ("gradient of weight", Content.GRADIENTS),
        ("activations of model.layers.1", Content.ACTIVATIONS),
        ("weight model.embed_tokens.weight", Content.WEIGHTS),
        ("probe 1", Content.OTHER),
    ],
)
def test_names_of_extents_say_what_they_hold(name: str, content: Content) -> None:
    assert content_of(name) is content
