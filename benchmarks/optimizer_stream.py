"""Streamed AdamW alone: bytes a second against fio with the same mix, and seconds a step against DeepSpeed.

The state of a parameter is an fp32 master and two fp32 moments. Weights and gradients are bf16 and stay in
memory, so of the master we keep the half that the weight does not hold: a step reads 10 bytes and writes 10
(``memtrain whole masters``: 12 and 12, to the same bits). There is no model, no forward and no backward:
every parameter has a gradient, ``step()`` is timed until the last byte is on the disk. So is DeepSpeed's:
``engine.step`` with gradients in its flat buffer, ZeRO stage 3, optimizer on NVMe, DeepSpeedCPUAdam, one
sub-group for each ``--group`` million parameters, with and without its pipelining; the faster of the two
counts, and is compared by its seconds. It moves about 29 bytes a parameter and step (it reads the gradient
back too), we 20: where the disk is the limit that is 1.45 times as fast. ``memtrain 8-bit`` shows beside it
what AdamW8bit, other arithmetic with 12 bytes a parameter and step, makes of the same disk.

fio moves the same mix in blocks of our own piece size and as many under way as we have I/O threads, reads
and writes interleaved one to one, with direct I/O in a preallocated file that was written once before;
``psync`` threads and ``libaio``, the faster counts. fio neither computes nor checks anything; we step AdamW
and verify a checksum of every byte read.

A round runs every side, in an order that turns; ratios are taken within a round, and the median of the
rounds counts. One billion parameters take 12 GB of disk for us, 12 or more for DeepSpeed and ``--fio-gib``
for fio, and 4 GB of memory for weights and gradients (DeepSpeed: 8 and more): ``--millions`` scales the
model down where that is too much, and the JSON line says so.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _harness import BENCHMARKS, DEEPSPEED_VENV, BenchmarkError, child_environment, publish, run_child, spread
from _harness import table as columns
from swap_bandwidth import FIO_ENGINES, require_fio

WHOLE_BYTES = 12
"""Of a parameter: master and two moments, read once and written once a step."""
STATE_BYTES = 10
"""The same with half of the master."""
PARAMETER_ELEMENTS = 1 << 24
"""Of each parameter: 4096 x 4096, as a layer of a 7 B model has."""
BILLION = 60 * PARAMETER_ELEMENTS  # 1.007 billion
STEPS = 3
"""After one that creates the state."""
DEEPSPEED_GROUP = 30
"""Millions of parameters: what served DeepSpeed best here (benchmarks/README.md), two parameters of ours."""
SIDES = (
    "memtrain",
    "memtrain whole masters",
    "memtrain 8-bit",
    "deepspeed",
    "deepspeed pipelined",
    *(f"fio {engine}" for engine in FIO_ENGINES),
)
TIMEOUT_SECONDS = 3600.0


def parameters(count: int) -> list[Any]:
    """``count`` bf16 parameters with gradients, the same in every engine."""
    import torch

    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        weight = torch.nn.Parameter(torch.empty(4096, 4096, dtype=torch.bfloat16))
        with torch.no_grad():
            weight.normal_(std=0.02, generator=generator)
        weight.grad = torch.full_like(weight, 1e-3)
        made.append(weight)
    return made


def run_memtrain(args: argparse.Namespace) -> dict[str, Any]:
    """``OffloadedOptimizer`` over torch's fused AdamW, with the rings and shards that a plan would have."""
    import torch

    from memtrain.offload.device import make_device
    from memtrain.offload.engine import Engine
    from memtrain.offload.optimizer import OffloadedOptimizer, OptimizerConfig
    from memtrain.offload.tiers import NvmeStore
    from memtrain.optim import AdamW8bit
    from memtrain.planner.actions import StateDecision, Tier, UpdateSchedule
    from memtrain.planner.decisions import UPDATE_SLOTS
    from memtrain.planner.plan import Plan, Staging

    weights = parameters(args.count)
    names = [f"layer{number}" for number in range(args.count)]
    # Record and gradient, which is widened beside a whole master; parameters are cut in whole shards.
    one = WHOLE_BYTES + 4 if args.whole_masters else STATE_BYTES + 2
    slots, slot_bytes, shard = UPDATE_SLOTS, one * args.shard, args.shard
    inner: Any = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.01, fused=True)
    if args.eight_bit:
        slot_bytes = 11 * shard  # master 4, codes and scales less than 3, widened gradient 4
        inner = AdamW8bit(weights, lr=1e-4, weight_decay=0.01)
    plan = Plan(
        status="heuristic", blocks=(), solver="by hand", micro_batches=1, bill=(), peaks=(), capacities=(),
        states=tuple(
            StateDecision(unit=name, gradient_tier=Tier.DEVICE, optimizer_tier=Tier.NVME) for name in names
        ),
        staging=Staging(
            update_slots=slots, update_slot_bytes=slot_bytes, update_shard_elements=shard
        ),
        update_schedule=UpdateSchedule.SEQUENTIAL, step_seconds=0.0, lower_bound_seconds=0.0, gap=0.0,
        bytes_moved_per_step=0,
    )  # fmt: skip
    store = NvmeStore(args.swap, WHOLE_BYTES * PARAMETER_ELEMENTS * args.count)
    with Engine({Tier.NVME: store}, make_device("cpu")) as engine:
        optimizer = OffloadedOptimizer(
            inner,
            engine=engine,
            plan=plan,
            units=[(name, [(name, weight)]) for name, weight in zip(names, weights, strict=True)],
            config=OptimizerConfig(master_weights=True, split_masters=not args.whole_masters),
        )

        def step() -> None:
            optimizer.step()
            optimizer.flush()

        result = time_steps(step)
        optimizer.close()
    return {**result, "staging_bytes": slots * slot_bytes}


def run_deepspeed(args: argparse.Namespace) -> dict[str, Any]:
    """``DeepSpeedZeroOptimizer_Stage3.step`` on one process, gradients put where backward would."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(args.port))
    import deepspeed
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    deepspeed.init_distributed(dist_backend="gloo")
    buffers = 8 if args.pipelined else 4  # parameter, gradient and two moments of each group in flight
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "aio": {"block_size": 1 << 20, "queue_depth": 8, "intra_op_parallelism": 2, "overlap_events": True},
        "steps_per_print": 1 << 30,
        "zero_optimization": {
            "stage": 3,
            "sub_group_size": args.group * 1_000_000,
            "reduce_bucket_size": 5_000_000,
            "stage3_prefetch_bucket_size": 5_000_000,
            "stage3_max_live_parameters": 10_000_000,
            "offload_optimizer": {
                "device": "nvme", "nvme_path": args.swap, "buffer_count": buffers, "pin_memory": False,
                "pipeline_read": args.pipelined, "pipeline_write": args.pipelined,
            },
        },
    }  # fmt: skip

    class Layers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(
                torch.nn.Linear(4096, 4096, bias=False) for _ in range(args.count)
            )

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                rows = torch.tanh(layer(rows))
            return rows

    with deepspeed.zero.Init(config_dict_or_path=config, dtype=torch.bfloat16):
        model = Layers()
    optimizer = DeepSpeedCPUAdam(model.parameters(), lr=1e-4, weight_decay=0.01, adamw_mode=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    rows = torch.randn(1, 4096, dtype=torch.bfloat16)

    def backward() -> None:
        # A single row: gradients get where the step wants them, in little time, which is not counted.
        engine.backward(engine(rows).float().square().mean())

    result = time_steps(engine.step, before=backward)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    largest = max(engine.optimizer.fp16_partitioned_groups_flat_numel)
    return {**result, "peak_bytes": used, "staging_bytes": buffers * largest * 4}


def disk_bytes() -> int:
    """What this process has read from and written to disks so far, as the kernel counts it."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["read_bytes"]) + int(counts["write_bytes"])


def time_steps(step: Any, *, before: Any = None) -> dict[str, Any]:
    """``STEPS`` steps after one that creates the state; what is done ``before`` each is not timed."""
    seconds, cpu, moved = [], [], []
    for _ in range(STEPS + 1):
        if before is not None:
            before()
        start, start_cpu, start_moved = time.perf_counter(), time.process_time(), disk_bytes()
        step()
        moved.append(disk_bytes() - start_moved)
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
        print(f"step {len(seconds)}: {seconds[-1]:.2f} s", flush=True)
    return {
        "seconds": sorted(seconds[1:])[len(seconds[1:]) // 2],
        "cpu_seconds": sorted(cpu[1:])[len(cpu[1:]) // 2],
        "disk_bytes": sorted(moved[1:])[len(moved[1:]) // 2],
        "all_seconds": seconds,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def run_fio(file: str, size_bytes: int, engine: str, seconds: float) -> dict[str, Any]:
    """Reads and writes one to one, in pieces as large and as many under way as ours."""
    from memtrain.offload.store import PIECE_BYTES
    from memtrain.offload.tiers import THREADS

    threads = THREADS if engine == "psync" else 1
    part = size_bytes // threads // PIECE_BYTES * PIECE_BYTES
    command = [
        require_fio(), "--name=mix", f"--filename={file}", "--rw=rw", "--rwmixread=50",
        f"--ioengine={engine}", "--direct=1", f"--bs={PIECE_BYTES}", f"--iodepth={THREADS // threads}",
        f"--numjobs={threads}", "--thread", f"--size={part}", f"--offset_increment={part}", "--overwrite=1",
        "--fallocate=none", "--invalidate=0", "--time_based", f"--runtime={seconds}", "--group_reporting",
        "--output-format=json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"fio failed: {done.stderr.strip() or done.stdout.strip()}")
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    moved = job["read"]["io_bytes"] + job["write"]["io_bytes"]
    run_seconds = max(job["read"]["runtime"], job["write"]["runtime"]) / 1e3
    return {"bytes_per_second": moved / run_seconds}


def run_side(side: str, args: argparse.Namespace, fio_file: str, directory: str) -> dict[str, Any]:
    """One run: its bytes a second of state, and what else it reports."""
    if side.startswith("fio"):
        return run_fio(fio_file, args.fio_gib << 30, side.split()[1], args.fio_seconds)
    engine = "deepspeed" if side.startswith("deepspeed") else "memtrain"
    python = str(DEEPSPEED_VENV / "bin/python") if engine == "deepspeed" else sys.executable
    command = [python, str(BENCHMARKS / "optimizer_stream.py"), "--child", engine]
    command += [
        f"--swap={directory}",
        f"--count={args.count}",
        f"--group={args.group}",
        f"--shard={args.shard}",
    ]
    if side == "deepspeed pipelined":
        command.append("--pipelined")
    if side == "memtrain 8-bit":
        command.append("--eight-bit")
    if side == "memtrain whole masters":
        command.append("--whole-masters")
    run = run_child(command, environment=child_environment(engine), timeout_seconds=TIMEOUT_SECONDS)
    report = dict(run.require()) if engine == "memtrain" or run.finished else {"failed": run.log_tail}
    if "seconds" in report:
        one = STATE_BYTES if side == "memtrain" else WHOLE_BYTES
        moved = 2 * one * PARAMETER_ELEMENTS * args.count
        if side == "memtrain 8-bit":
            moved = report["disk_bytes"]
        report["bytes_per_second"] = moved / report["seconds"]
    for left in Path(directory).glob("zero_stage_3"):  # DeepSpeed never deletes its files
        subprocess.run(["rm", "-r", str(left)], check=True)
    return report


def summarize(
    rounds: list[dict[str, dict[str, Any]]], args: argparse.Namespace
) -> tuple[str, dict[str, Any]]:
    """The table and the JSON line of ``rounds``, each the reports by side."""
    rows = []
    for side in rounds[0]:
        reports = [reports_of[side] for reports_of in rounds if "bytes_per_second" in reports_of[side]]
        if not reports:
            rows.append((side, "failed", "", "", "", "", "", ""))
            continue
        rate = spread([report["bytes_per_second"] / 1e9 for report in reports])
        cells = ["", "", "", ""]
        if "seconds" in reports[0]:
            middle = {
                key: spread([r[key] for r in reports])["median"]
                for key in ("seconds", "cpu_seconds", "peak_bytes", "disk_bytes")
            }
            cells = [f"{middle['seconds']:.2f}", f"{middle['cpu_seconds']:.2f}"]
            cells.append(f"{middle['peak_bytes'] / (1 << 30):.2f}")
            cells.append(f"{middle['disk_bytes'] / (PARAMETER_ELEMENTS * args.count):.1f}")
        rows.append((side, *(f"{rate[key]:.2f}" for key in ("min", "median", "max")), *cells))
    summary: dict[str, Any] = {
        "parameters": PARAMETER_ELEMENTS * args.count,
        "scaled_down": PARAMETER_ELEMENTS * args.count < BILLION,
        "rounds": len(rounds),
    }
    text = columns(
        ("side", "GB/s min", "median", "max", "s a step", "CPU s", "VmHWM GiB", "B a parameter"), rows
    )
    for name, ratio_of in (
        ("fio", _of_fio),
        ("deepspeed", _seconds("deepspeed")),
        ("whole", _seconds("memtrain whole")),
    ):
        ratios = [ratio for one in rounds if (ratio := ratio_of(one)) is not None]
        if ratios:
            found = spread(ratios)
            summary[f"vs_{name}"] = round(found["median"], 3)
            summary[f"vs_{name}_spread"] = [round(found["min"], 3), round(found["max"], 3)]
            text += (
                f"\nmemtrain against {name}, the faster of its settings: {found['median']:.3f} "
                f"(from {found['min']:.3f} to {found['max']:.3f})"
            )
    eight_bit = [
        min(seconds) / one["memtrain 8-bit"]["seconds"]
        for one in rounds
        if (seconds := [r["seconds"] for s, r in one.items() if s.startswith("deepspeed") and "seconds" in r])
    ]
    if eight_bit:
        summary["eight_bit_vs_deepspeed_seconds"] = round(spread(eight_bit)["median"], 3)
        text += (
            f"\nmemtrain 8-bit, other arithmetic, against deepspeed: {spread(eight_bit)['median']:.3f} times"
        )
    return text, summary


def _of_fio(reports: dict[str, dict[str, Any]]) -> float | None:
    """Our bytes a second over fio's fastest of one round; None where it has not run."""
    rates = [r["bytes_per_second"] for s, r in reports.items() if s.startswith("fio")]
    return reports["memtrain"]["bytes_per_second"] / max(rates) if rates else None


def _seconds(peer: str) -> Callable[[dict[str, dict[str, Any]]], float | None]:
    """The seconds of a peer's fastest of one round over ours; None where it has not run."""

    def ratio(reports: dict[str, dict[str, Any]]) -> float | None:
        found = [r["seconds"] for s, r in reports.items() if s.startswith(peer) and "seconds" in r]
        return min(found) / reports["memtrain"]["seconds"] if found else None

    return ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--swap", default="/var/tmp", help="directory on the disk to measure")
    parser.add_argument("--rounds", type=int, default=5, help="at least 5 for a claim")
    parser.add_argument("--millions", type=int, default=BILLION // 1_000_000, help="parameters, in millions")
    parser.add_argument("--group", type=int, default=DEEPSPEED_GROUP, help="DeepSpeed: millions a sub-group")
    parser.add_argument("--shard", type=int, default=1 << 20, help="memtrain: parameters of a shard")
    parser.add_argument("--fio-gib", type=int, default=4)
    parser.add_argument("--fio-seconds", type=float, default=10.0)
    parser.add_argument("--without-deepspeed", action="store_true")
    parser.add_argument("--quick", action="store_true", help="67 M parameters, one round: to try it")
    for name, kind in (("--child", str), ("--count", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--pipelined", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--eight-bit", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--whole-masters", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=29513, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(
            json.dumps({"deepspeed": run_deepspeed, "memtrain": run_memtrain}[args.child](args)), flush=True
        )
        return
    args.count = max(1, round(args.millions * 1e6 / PARAMETER_ELEMENTS))
    if args.quick:
        args.count, args.rounds, args.fio_gib, args.fio_seconds = 4, 1, 1, 2.0
    sides = [side for side in SIDES if not (args.without_deepspeed and side.startswith("deepspeed"))]
    if not args.without_deepspeed and not (DEEPSPEED_VENV / "bin/python").exists():
        raise BenchmarkError(
            f"{DEEPSPEED_VENV} is missing: run scripts/setup_deepspeed.sh, or pass --without-deepspeed"
        )
    rounds = []
    with tempfile.TemporaryDirectory(prefix="memtrain_bench_", dir=args.swap) as directory:
        fio_file = os.path.join(directory, "fio")
        subprocess.run(
            [require_fio(), "--name=fill", f"--filename={fio_file}", "--rw=write", "--bs=4M",
             f"--size={args.fio_gib}G", "--direct=1", "--fallocate=posix"],
            check=True, capture_output=True,
        )  # fmt: skip
        for index in range(args.rounds):
            turn = index % len(sides)
            rounds.append(
                {side: run_side(side, args, fio_file, directory) for side in sides[turn:] + sides[:turn]}
            )
    text, summary = summarize(rounds, args)
    if args.quick:
        print(text, json.dumps(summary), sep="\n")
    else:
        publish("optimizer_stream", text=text, summary=summary, details={"rounds": rounds})


if __name__ == "__main__":
    main()
