"""A small model, a plan that sends its state away, and the plain PyTorch loops that results are compared
with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from memtrain.offload.device import make_device
from memtrain.offload.engine import Engine
from memtrain.offload.io import IOBackend
from memtrain.offload.optimizer import OffloadedOptimizer, OptimizerConfig
from memtrain.offload.shards import Unit
from memtrain.offload.tiers import MemoryStore
from memtrain.planner.actions import StateDecision, Tier, UpdateSchedule
from memtrain.planner.plan import Plan, Staging

STAGING = Staging(
    gradient_slots=3,
    gradient_slot_bytes=64 << 10,
    update_slots=3,
    update_slot_bytes=2 << 20,
    update_shard_elements=50_000,
)


class Lion(torch.optim.Optimizer):
    """As a user would write it: elementwise, one state tensor, no ``step``."""

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99), decay: float = 0.0
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_((m * group["betas"][0] + p.grad * (1 - group["betas"][0])).sign_(), alpha=-group["lr"])
                m.mul_(group["betas"][1]).add_(p.grad, alpha=1 - group["betas"][1])


class Tied(nn.Module):
    """Tied embedding, odd shapes, small and large parameters, one frozen and one never used."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(701, 101)  # 70801 elements: two shards and an odd tail
        self.first = nn.Linear(101, 683)  # 68983
        self.second = nn.Linear(683, 101)
        self.frozen = nn.Linear(101, 101)
        self.unused = nn.Parameter(torch.ones(300, 300))
        self.head = nn.Linear(101, 701, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        hidden = hidden + self.second(torch.tanh(self.first(self.frozen(hidden))))
        return 0.1 * nn.functional.cross_entropy(
            self.head(hidden).float().flatten(0, 1), tokens.roll(1, 1).flatten()
        )


def make_model(dtype: torch.dtype = torch.float32) -> Tied:
    torch.manual_seed(0)
    return Tied().to(dtype)


def units_of(model: nn.Module) -> list[Unit]:
    named = list(model.named_parameters())
    return [
        ("prologue", [(n, p) for n, p in named if n.startswith(("embed", "unused"))]),
        ("block", [(n, p) for n, p in named if n.startswith(("first", "frozen"))]),
        (
            "epilogue",
            [*((n, p) for n, p in named if n.startswith("second")), ("head.weight", model.head.weight)],
        ),
    ]


def make_plan(
    schedule: UpdateSchedule = UpdateSchedule.SEQUENTIAL,
    gradient_tier: Tier = Tier.HOST,
    optimizer_tier: Tier = Tier.HOST,
    staging: Staging = STAGING,
    units: tuple[str, ...] = ("prologue", "block", "epilogue"),
) -> Plan:
    return Plan(
        status="heuristic",
        blocks=(),
        states=tuple(
            StateDecision(unit=unit, gradient_tier=gradient_tier, optimizer_tier=optimizer_tier)
            for unit in units
        ),
        staging=staging,
        update_schedule=schedule,
        micro_batches=1,
        step_seconds=0.0,
        lower_bound_seconds=0.0,
        gap=0.0,
        solver="by hand",
        bill=(),
        peaks=(),
        capacities=(),
        bytes_moved_per_step=0,
    )


@contextmanager
def open_engine(capacity_bytes: int = 64 << 20, backend: IOBackend | None = None) -> Iterator[Engine]:
    with Engine(
        {Tier.HOST: MemoryStore(Tier.HOST, capacity_bytes, backend=backend)}, make_device("cpu")
    ) as engine:
        yield engine


def wrap(model: nn.Module, optimizer: Any, engine: Engine, plan: Plan | None = None, **config: Any) -> Any:
    return OffloadedOptimizer(
        optimizer,
        engine=engine,
        plan=plan or make_plan(),
        units=units_of(model),
        config=OptimizerConfig(**config),
    )


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 701, (2, 9), generator=generator) for _ in range(count)]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def plain_run(
    make: Callable[[Any], Any],
    steps: int = 5,
    accumulate: int = 1,
    max_norm: float | None = None,
    dtype: torch.dtype = torch.float32,
    master: bool = False,
    schedule: Callable[[Any], Any] | None = None,
    groups: Callable[[Any], Any] = lambda parameters: parameters,
) -> tuple[nn.Module, Any, list[Tensor]]:
    """The reference: plain PyTorch, with fp32 masters where asked for."""
    model = make_model(dtype)
    parameters = trainable(model)
    masters = [p.detach().float() for p in parameters] if master else parameters
    optimizer = make(groups(masters))
    scheduler = schedule(optimizer) if schedule else None
    data, norms = iter(batches(steps * accumulate)), []
    for _ in range(steps):
        for _ in range(accumulate):
            (model(next(data)) / accumulate).backward()
        if master:
            for m, p in zip(masters, parameters, strict=True):
                m.grad = None if p.grad is None else p.grad.float()
        if max_norm is not None:
            norms.append(torch.nn.utils.clip_grad_norm_(masters, max_norm))
        optimizer.step()
        if scheduler:
            scheduler.step()
        if master:
            with torch.no_grad():
                for m, p in zip(masters, parameters, strict=True):
                    p.copy_(m)
        for p in parameters:
            p.grad = None
    return model, optimizer, norms
