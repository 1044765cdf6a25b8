"""A training step inside the guest, by a plan that the planner made outside.

The planner is imported where it is used: in the guest each module takes a while.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memtrain.offload.activations import ActivationExecutor
from memtrain.offload.engine import open_engine
from memtrain.offload.gradient_slab import GradientSlab
from memtrain.offload.optimizer import OffloadedOptimizer, OptimizerConfig
from memtrain.planner.actions import Action, Tier
from memtrain.planner.machine import Budget, Link, Machine
from memtrain.planner.plan import Plan
from memtrain.planner.units import MiB

WIDTH = 272
CXL = "1,2:32MiB"
_RATE = 2e9
MACHINE = Machine(
    name="guest",
    device="cpu",
    cores=1,
    dram_copy_bytes_per_second=5e9,
    links=(
        Link(
            tier=Tier.CXL,
            read_bytes_per_second=_RATE,
            write_bytes_per_second=_RATE,
            mixed_bytes_per_second=_RATE,
        ),
    ),
)


class Block(nn.Module):
    """Saves much and computes little: the guest's processor is emulated, and slow at floating point."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((WIDTH,), 0.9))
        self.shift = nn.Parameter(torch.full((WIDTH,), 0.1))

    def forward(self, hidden: Tensor) -> Tensor:
        gate = torch.relu(self.scale * hidden)
        return hidden + self.shift * (gate * hidden)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(300, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 300, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.table(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return torch.logsumexp(self.head(hidden.mean(1)), -1).mean()


def make_net() -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = Net()
    return net, torch.optim.AdamW(net.parameters(), lr=1e-2)


def batch(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"tokens": torch.randint(0, 300, (4, 256), generator=generator)}


def plan_for_the_guest() -> Plan:
    """Of a budget that misses 5 MiB of what the step would like to have, beside CXL memory that could take
    anything: saved activations, gradients or optimizer state."""
    from memtrain.planner.decisions import PlannerOptions
    from memtrain.planner.solve import make_plan
    from memtrain.planner.trace import profile_model

    net, optimizer = make_net()
    profile = profile_model(net, batch(0), optimizer=optimizer, elementwise=True)
    # Blocks as cheap as these it would rather compute again; the choice here is what goes to CXL memory.
    options = PlannerOptions(update_schedule="sequential", allow=frozenset({Action.KEEP, Action.SWAP}))
    ample = make_plan(profile, MACHINE, Budget(device="64GiB", cxl=CXL), options=options)
    wanted = dict(ample.peaks)[Tier.DEVICE]
    return make_plan(profile, MACHINE, Budget(device=wanted - 5 * MiB, cxl=CXL), options=options)


def units_of(net: nn.Module) -> list[tuple[str, list[tuple[str, nn.Parameter]]]]:
    units: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in net.named_parameters():
        unit = {"table": "prologue", "head": "epilogue"}.get(name.split(".")[0])
        units.setdefault(unit or ".".join(name.split(".")[:2]), []).append((name, parameter))
    return list(units.items())


def train_by_plan(path: Path, look: Any, steps: int = 2) -> tuple[list[float], Net, OffloadedOptimizer]:
    """Losses and what was trained; ``look(when, engine, net, optimizer)`` after each forward and update."""
    plan = Plan.from_json(path.read_text())
    net, optimizer = make_net()
    blocks = [(f"layers.{index}", layer) for index, layer in enumerate(net.layers)]
    losses = []
    with open_engine(Budget(device="1GiB", cxl=CXL)) as engine:
        executor = ActivationExecutor(net, blocks, plan, engine)
        streamed = OffloadedOptimizer(
            optimizer, engine=engine, plan=plan, units=units_of(net), config=OptimizerConfig()
        )
        slab = GradientSlab(
            index=streamed.index,
            tiers={decision.unit: decision.gradient_tier for decision in plan.states},
            slab_bytes=plan.staging.gradient_slab_bytes,
            before_overwrite=streamed.ensure,
        )
        executor.install()
        for step in range(steps):
            loss = net(**batch(step))
            look("forward", engine, net, streamed)
            loss.backward()
            look("backward", engine, net, streamed)
            streamed.step()
            look("update", engine, net, streamed)
            streamed.zero_grad()
            losses.append(loss.item())
        executor.remove()
        slab.close()
        streamed.close()
    return losses, net, streamed


def train_plainly(steps: int = 2) -> tuple[list[float], Net]:
    net, optimizer = make_net()
    losses = []
    for step in range(steps):
        loss = net(**batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, net
