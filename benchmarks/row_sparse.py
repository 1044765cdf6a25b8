"""State of a table on this disk, by rows, against all of it streamed, and against SparseAdam.

A table of SmolLM2's vocabulary and width, batches of tokens as frequent as words are (Zipf), a step a batch.
Sides: torch.optim.SparseAdam in memory; ``RowSparseOptimizer`` around it, with state on the disk; and, for
the bytes, dense AdamW streamed by ``OffloadedOptimizer`` (another update: it decays every row). Weights and
state of the first two must have the same bits at the end. The sides take turns.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from typing import Any

import torch
from _harness import BenchmarkError, publish, spread, table
from torch import Tensor, nn

from memtrain.offload.device import make_device
from memtrain.offload.engine import Engine
from memtrain.offload.optimizer import OffloadedOptimizer, OptimizerConfig
from memtrain.offload.row_sparse import RowSparseOptimizer
from memtrain.offload.tiers import NvmeStore
from memtrain.planner.actions import StateDecision, Tier, UpdateSchedule
from memtrain.planner.plan import Plan, Staging

ROWS, WIDTH = 49_152, 576
SHARD_ELEMENTS = 1 << 20
SIDES = ("memory", "rows", "dense")


def zipf_tokens(count: int, step: int) -> Tensor:
    """Token ids whose frequency falls with their rank."""
    generator = torch.Generator().manual_seed(step)
    weights = 1.0 / torch.arange(2, ROWS + 2, dtype=torch.float64)
    return torch.multinomial(weights, count, replacement=True, generator=generator)


def embedding(*, sparse: bool) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(ROWS, WIDTH, sparse=sparse)


def dense_plan() -> Plan:
    """State on the disk, gradient in memory."""
    slot_bytes = 3 * 4 * SHARD_ELEMENTS + (1 << 20)
    return Plan(
        status="heuristic", blocks=(), update_schedule=UpdateSchedule.SEQUENTIAL, micro_batches=1,
        states=(StateDecision(unit="table", gradient_tier=Tier.DEVICE, optimizer_tier=Tier.NVME),),
        staging=Staging(update_slots=3, update_slot_bytes=slot_bytes, update_shard_elements=SHARD_ELEMENTS),
        step_seconds=0.0, lower_bound_seconds=0.0, gap=0.0, solver="by hand", bill=(), peaks=(),
        capacities=(), bytes_moved_per_step=0,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--swap", default=".", help="directory on the disk to measure")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    tables = {side: embedding(sparse=side != "dense") for side in SIDES}
    with tempfile.TemporaryDirectory(prefix="memtrain_bench_", dir=args.swap) as directory:
        stores = {}
        for side in SIDES[1:]:
            os.mkdir(place := os.path.join(directory, side))
            stores[side] = NvmeStore(place, 420 << 20)
        engine = Engine({Tier.NVME: stores["dense"]}, make_device("cpu"))
        inner = torch.optim.SparseAdam(tables["rows"].parameters())
        optimizers: dict[str, Any] = {
            "memory": torch.optim.SparseAdam(tables["memory"].parameters()),
            "rows": RowSparseOptimizer(inner, store=stores["rows"], names=["table"]),
            "dense": OffloadedOptimizer(
                torch.optim.AdamW(tables["dense"].parameters(), fused=True),
                engine=engine,
                plan=dense_plan(),
                units=[("table", [("weight", tables["dense"].weight)])],
                config=OptimizerConfig(elementwise=True),
            ),
        }
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        used = []
        for step in range(args.steps + 1):
            tokens = zipf_tokens(args.tokens, step)
            used.append(tokens.unique().numel())
            if step == 1:
                start = {side: store.statistics() for side, store in stores.items()}
            for side in SIDES if step % 2 else SIDES[::-1]:
                tables[side](tokens).sin().sum().backward()
                began = time.perf_counter()
                optimizers[side].step()
                seconds[side].append(time.perf_counter() - began)
                optimizers[side].zero_grad()
        moved = {
            side: (now.bytes_read - start[side].bytes_read, now.bytes_written - start[side].bytes_written)
            for side, store in stores.items()
            for now in [store.statistics()]
        }
        _compare(tables, optimizers)
        optimizers["rows"].close()
        optimizers["dense"].close()
        stores["rows"].close()
        engine.close()
    rows = []
    summary: dict[str, Any] = {"rows_used": spread(used[1:])["median"], "steps": args.steps}
    for side in SIDES:
        median = spread(seconds[side][1:])["median"]
        read, written = (size / args.steps / 1e6 for size in moved.get(side, (0, 0)))
        rows.append((side, f"{1e3 * median:.1f}", f"{read:.2f}", f"{written:.2f}"))
        summary |= {f"{side}_ms": round(1e3 * median, 2), f"{side}_mb_written": round(written, 3)}
    least = summary["rows_used"] * 2 * WIDTH * 4 / 1e6
    summary["rows_written_by_least"] = round(summary["rows_mb_written"] / least, 3)
    text = "\n".join(
        [
            table(("state", "ms a step", "MB read a step", "MB written a step"), rows),
            f"{summary['rows_used']:.0f} of {ROWS} rows used a step (median): state of {least:.2f} MB",
        ]
    )
    publish("row_sparse", text=text, summary=summary, details={"seconds": seconds, "used": used})


def _compare(tables: dict[str, nn.Embedding], optimizers: dict[str, Any]) -> None:
    """Raises BenchmarkError where rows on the disk did not give SparseAdam's bits."""
    ours, plain = (optimizers[side].state_dict()["state"][0] for side in ("rows", "memory"))
    same = torch.equal(tables["rows"].weight, tables["memory"].weight) and ours["step"] == plain["step"]
    if not same or not all(torch.equal(ours[key], plain[key]) for key in ("exp_avg", "exp_avg_sq")):
        raise BenchmarkError("stepping by rows gave other bits than SparseAdam")


if __name__ == "__main__":
    main()
