"""One training step in a process of its own, every block cut at half of its tokens: its peak as predicted and
measured.

Run as ``python -m tests.memtrain.first_step FOLDER``; prints one JSON line. It is the step in which the
executor looks at the tokens of each block. Weights are small, and what outlives a block's forward is on NVMe.
"""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import memtrain
from memtrain.planner.actions import Tier
from memtrain.planner.bill import constant_bytes, device_positions, with_margin
from memtrain.planner.decisions import Decisions
from memtrain.planner.machine import Link, Machine

ROWS, TOKENS, WIDTH, DEPTH = 2, 1024, 256, 2
MACHINE = Machine(
    name="test",
    device="cpu",
    cores=2,
    dram_copy_bytes_per_second=5e9,
    links=(
        Link(
            tier=Tier.NVME,
            read_bytes_per_second=2e9,
            write_bytes_per_second=2e9,
            mixed_bytes_per_second=2e9,
        ),
    ),
)
CUT = {"action": "recompute", "recomputed_tokens": TOKENS // 2, "rest_tier": "nvme", "input_tier": "nvme"}


class Gated(nn.Module):
    """Norm, SwiGLU of four times the width, residual: a forward of 42 MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.gate, self.up = (nn.Linear(WIDTH, 4 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        return hidden + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(Gated() for _ in range(DEPTH))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.table(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden.square().mean()


def billed_forward_bytes(session: memtrain.Session) -> int:
    """Of the plan's bill what is there while the blocks run forward, margin included."""
    profile, decisions = session.profile, Decisions.of(session.plan, on_cpu=True)
    fixed = sum(constant_bytes(profile, decisions).values()) + profile.allocator_slack_bytes
    forward = [p.total_bytes for p in device_positions(profile, decisions) if p.name.startswith("forward")]
    return with_margin(fixed + max(forward), memtrain.PlannerOptions().safety_margin)


def main() -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    tokens = torch.randint(0, 50, (ROWS, TOKENS))
    with memtrain.prepare(
        model,
        optimizer,
        (tokens,),
        budget=memtrain.Budget(device="3GiB", nvme=f"{sys.argv[1]}:1GiB"),
        options=memtrain.PlannerOptions(force={"block": CUT}, exact_only=False),
        machine=MACHINE,
    ) as session:
        loss = model(tokens)
        forward_bytes = session.device_peak_bytes()
        loss.backward()
        session.optimizer.step()
        found = session.measure()
        block = session.profile.blocks[1]
        assert block.prefixes is not None
        print(
            json.dumps(
                {
                    "predicted_bytes": found["predicted_peak_bytes"],
                    "measured_bytes": found["peak_bytes"],
                    "predicted_forward_bytes": billed_forward_bytes(session),
                    "measured_forward_bytes": forward_bytes,
                    "block_forward_bytes": block.saved_bytes + block.forward_transient_bytes,
                    "probe_bytes": block.prefixes.probe_bytes,
                    "cut": sum(decision.recomputed_tokens == TOKENS // 2 for decision in session.plan.blocks),
                }
            )
        )


if __name__ == "__main__":
    main()
