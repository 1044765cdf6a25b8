"""A Llama-2-7B-shaped model takes full AdamW steps under a hard limit of 4 GiB, its weights streamed.

    python benchmarks/seven_billion.py                     # ten minutes on two idle cores, 50 GB of disk
    python benchmarks/seven_billion.py --layers 2          # the same widths, for trying; nothing is published
    python benchmarks/seven_billion.py --keep FOLDER       # draw the weights once; 13 GB more

32 layers, hidden size 4096, intermediate size 11008, 32,000 tokens, head and table untied: 6.74 billion bf16
parameters, drawn at random straight to the disk. Every parameter is trained, with AdamW, moments of 8 bits,
weights rounded at random (no masters). Weights, gradients and moments are on the disk: 40 GB. The kernel
enforces the limit (a memory group of its own); the group's peak has page cache in it too.

A step is as short as its transfers allow: with so few tokens the disk binds. What it moves is counted by
class at the tier's door, and beside it what the kernel says of the process. fio moves the same mix of reads
and writes, in blocks of our piece size and as many under way as we have threads, in a file of the same size,
before and after; the faster of its engines counts, in the faster of the two runs. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from _harness import BenchmarkError, GiB, MiB, child_environment, publish, run_child, table
from swap_bandwidth import FIO_ENGINES, require_fio

LIMIT_BYTES = 4 * GiB
RESERVE_BYTES = 64 * MiB
"""Of the limit, for the kernel: page tables, page cache of what is read and written beside the tier."""
LAYERS = 32
SEQUENCE = 256
STEPS = 4
SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "tie_word_embeddings": False,
    "use_cache": False,
}
AWAY = {"state": {"weight_tier": "nvme", "gradient_tier": "nvme", "optimizer_tier": "nvme"}}
BYTES_OF_PARAMETER = 6.0625
"""On the disk: 2 of weight, 2 of gradient, 2 of moments and a 16th of their scales."""
SPARE_GIB = 4
"""Of the tier, for activations and whole pages."""
READ_PERCENT = 58
"""What fio is told before the run: weights are read twice or thrice, gradients and moments once; each is
written once."""
CLASSES = {"weight": "weights", "gradient": "gradients", "activations": "activations"}
"""By the first word of an extent's name; all others are records of the optimizer's state."""
LEARNING_RATE = 2e-5
TIMEOUT_SECONDS = 3600.0


# the child --------------------------------------------------------------------------------------------


class Door:
    """Counts what passes a store, by class and direction. Reads and writes are the store's own."""

    def __init__(self, store: Any) -> None:
        self.moved: Counter[str] = Counter()
        for direction in ("read", "write"):
            setattr(store, direction, self._counting(direction, getattr(store, direction)))

    def _counting(self, direction: str, move: Any) -> Any:
        def counted(extent: Any, buffer: Any, offset: int = 0) -> Any:
            kind = CLASSES.get(extent.name.split()[0], "moments")
            self.moved[f"{kind} {direction}"] += buffer.numel()
            return move(extent, buffer, offset)

        return counted


def disk_bytes() -> dict[str, int]:
    """What this process has read from and written to disks so far, as the kernel counts it."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {"read": int(counts["read_bytes"]), "write": int(counts["write_bytes"])}


def streamed(args: argparse.Namespace, budget: Any) -> Any:
    """The model on the disk: drawn, or read from the folder that an earlier run has kept."""
    import torch
    from transformers import AutoConfig

    import memtrain

    if args.keep and (Path(args.keep) / "config.json").exists():
        return memtrain.streamed_model(args.keep, dtype=torch.bfloat16, budget=budget)
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SHAPE, num_hidden_layers=args.layers)
    return memtrain.streamed_model(config, dtype=torch.bfloat16, budget=budget)


def keep(folder: str, session: Any) -> None:
    """Write the weights where ``streamed`` finds them."""
    from memtrain.offload.atomic import publish as publish_folder
    from memtrain.offload.snapshot_weights import write_pretrained_files, write_weights

    with publish_folder(Path(folder)) as writer:
        write_weights(writer, session.model, session.weights)
        write_pretrained_files(writer, session.model, None)


def take_steps(session: Any, batches: list[Any], door: Door) -> list[dict[str, Any]]:
    """One report a step: seconds and bytes of its phases."""
    steps = []
    for batch in batches:
        step: dict[str, Any] = {}
        at, moved, disk, cpu = time.perf_counter(), door.moved.copy(), disk_bytes(), time.process_time()
        began = at
        loss = session.model(**batch).loss
        step["forward_seconds"], at = time.perf_counter() - at, time.perf_counter()
        loss.backward()
        step["loss"] = loss.item()
        del loss
        step["backward_seconds"], at = time.perf_counter() - at, time.perf_counter()
        session.optimizer.step()
        session.optimizer.zero_grad()
        step["update_seconds"] = time.perf_counter() - at
        step["seconds"] = time.perf_counter() - began
        step["cpu_seconds"] = time.process_time() - cpu
        step["moved_bytes"] = dict(door.moved - moved)
        step["disk_bytes"] = {name: size - disk[name] for name, size in disk_bytes().items()}
        steps.append(step)
        print(f"loss {step['loss']:.4f}, {step['seconds']:.1f} s", flush=True)
    return steps


def child(args: argparse.Namespace) -> None:
    """Build, prepare, and take the steps; one JSON line."""
    import torch
    from _train_child import memory_bytes

    import memtrain
    from memtrain.optim import AdamW8bit
    from memtrain.planner.actions import Tier

    parameters = parameter_count(args.layers)
    budget = memtrain.Budget(
        device=args.child,
        nvme=f"{args.swap}:{math.ceil(BYTES_OF_PARAMETER * parameters / GiB) + SPARE_GIB}GiB",
    )
    start = time.perf_counter()
    with streamed(args, budget) as found:
        report: dict[str, Any] = {
            "parameters": sum(p.numel() for p in found.model.parameters()),
            "build_seconds": time.perf_counter() - start,
            "built_peak_bytes": memory_bytes("VmHWM"),
        }
        print(f"built in {report['build_seconds']:.0f} s", flush=True)
        model = found.model.train()
        optimizer = AdamW8bit(model.parameters(), lr=LEARNING_RATE)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(SHAPE["vocab_size"], (1, args.sequence), generator=generator)
        batch = {"input_ids": ids, "labels": ids}
        start = time.perf_counter()
        with memtrain.prepare(
            model, optimizer, batch, budget=budget, options=memtrain.PlannerOptions(force=AWAY)
        ) as session:
            plan = session.plan
            report |= {
                "prepare_seconds": time.perf_counter() - start,
                "predicted_peak_bytes": plan.peak(Tier.DEVICE),
                "predicted_step_seconds": plan.step_seconds,
                "bill": [(line.tier.value, line.category, line.size_bytes) for line in plan.bill],
                "staging": str(plan.staging),
                "actions": plan.action_counts(),
                "update_schedule": plan.update_schedule.value,
            }
            print(json.dumps(report, indent=1), flush=True)
            if args.keep and not (Path(args.keep) / "config.json").exists():
                keep(args.keep, session)
            report["steps"] = take_steps(session, [batch] * args.steps, Door(found.weights.store))
            report["peak_bytes"] = session.measure()["process_peak_bytes"]
            print(session.report(), flush=True)
    print(json.dumps(report), flush=True)


# the parent -------------------------------------------------------------------------------------------


def parameter_count(layers: int) -> int:
    """Of the model with so many layers."""
    hidden, wide, words = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["vocab_size"]
    return layers * (4 * hidden * hidden + 3 * hidden * wide + 2 * hidden) + 2 * words * hidden + hidden


def fio(directory: str, size_bytes: int, read_percent: int, seconds: float) -> dict[str, float]:
    """Bytes a second of each of fio's engines, in a file as large as what a step goes over, written before:
    what lies beneath a virtual disk may keep a smaller one."""
    from memtrain.offload.store import PIECE_BYTES
    from memtrain.offload.tiers import THREADS

    file = os.path.join(directory, "fio")
    size_bytes -= size_bytes % (THREADS * PIECE_BYTES)
    fill = ["--name=fill", "--rw=write", "--bs=4M", f"--size={size_bytes}", "--direct=1"]
    rates = {}
    try:
        run_fio([f"--filename={file}", *fill, "--ioengine=libaio", "--iodepth=4", "--fallocate=posix"])
        for engine in FIO_ENGINES:
            threads = THREADS if engine == "psync" else 1
            part = size_bytes // threads
            job = run_fio([
                "--name=mix", f"--filename={file}", "--rw=rw", f"--rwmixread={read_percent}",
                f"--ioengine={engine}", "--direct=1", f"--bs={PIECE_BYTES}",
                f"--iodepth={THREADS // threads}", f"--numjobs={threads}", "--thread",
                f"--size={part}", f"--offset_increment={part}",
                "--overwrite=1", "--fallocate=none", "--invalidate=0", "--time_based",
                f"--runtime={seconds}", "--group_reporting",
            ])  # fmt: skip
            moved = job["read"]["io_bytes"] + job["write"]["io_bytes"]
            rates[engine] = moved / (max(job["read"]["runtime"], job["write"]["runtime"]) / 1e3)
    finally:
        Path(file).unlink(missing_ok=True)
    return rates


def run_fio(options: list[str]) -> dict[str, Any]:
    """What fio says of its job. Raises BenchmarkError where it fails."""
    command = [require_fio(), *options, "--output-format=json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"fio failed: {done.stderr.strip() or done.stdout.strip()}")
    job: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return job


def read_percent(moved: dict[str, int]) -> int:
    """Of what was moved."""
    read = sum(size for name, size in moved.items() if name.endswith("read"))
    return round(100 * read / sum(moved.values()))


def check(report: dict[str, Any], layers: int) -> None:
    """Raises BenchmarkError where the run is not what it says."""
    losses = [step["loss"] for step in report["steps"]]
    if report["parameters"] != parameter_count(layers):
        raise BenchmarkError(f"{report['parameters']} parameters, {parameter_count(layers)} expected")
    if not all(loss == loss and abs(loss) < 100 for loss in losses) or len(set(losses)) != len(losses):
        raise BenchmarkError(f"the losses are not finite, or do not change: {losses}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--swap", default="/var/tmp", help="directory on a local disk with 50 GB free")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--sequence", type=int, default=SEQUENCE)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--limit", type=float, default=LIMIT_BYTES / GiB, help="GiB")
    parser.add_argument("--fio-seconds", type=float, default=10.0)
    parser.add_argument("--keep", default="", help="folder of the weights, written if it is not there")
    parser.add_argument("--child", type=int, metavar="BUDGET_BYTES", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        child(args)
        return
    if args.layers < 2:
        parser.error(f"--layers must be at least 2, got {args.layers}: one block is not repeated")
    limit_bytes = int(args.limit * GiB)
    with tempfile.TemporaryDirectory(prefix="memtrain_bench_", dir=args.swap) as directory:
        held_bytes = int(BYTES_OF_PARAMETER * parameter_count(args.layers))
        before = fio(directory, held_bytes, READ_PERCENT, args.fio_seconds)
        command = [sys.executable, str(Path(__file__).resolve()), "--child", str(limit_bytes - RESERVE_BYTES)]
        command += ["--swap", directory, "--keep", args.keep]
        command += [f"--{name}={getattr(args, name)}" for name in ("layers", "sequence", "steps")]
        run = run_child(
            command,
            limit_bytes=limit_bytes,
            environment=child_environment("memtrain"),
            timeout_seconds=TIMEOUT_SECONDS,
        )
        report = dict(run.require())
        check(report, args.layers)
        step = report["steps"][-1]
        after = fio(directory, held_bytes, read_percent(step["moved_bytes"]), args.fio_seconds)
    summarize(args, report, run.cgroup_peak_bytes, {"before": before, "after": after})


def summarize(
    args: argparse.Namespace, report: dict[str, Any], group_bytes: int | None, rates: dict[str, Any]
) -> None:
    """The table and the JSON line; the last step counts, for the first ones write to room that is new."""
    steps, step = report["steps"], report["steps"][-1]
    seconds = statistics.median(one["seconds"] for one in steps[1:]) if len(steps) > 1 else step["seconds"]
    moved = step["moved_bytes"]
    total = sum(moved.values())
    fio_rate = max(rate for engines in rates.values() for rate in engines.values())
    ratio = total / seconds / fio_rate
    peak = f"{report['peak_bytes'] / GiB:.2f} GiB, of building {report['built_peak_bytes'] / GiB:.2f}"
    phases = ", ".join(f"{step[name + '_seconds']:.1f} s" for name in ("forward", "backward", "update"))
    kernel_bytes = sum(step["disk_bytes"].values())
    rows = [
        ("parameters", f"{report['parameters'] / 1e9:.3f} billion, {args.layers} layers"),
        ("hard limit", f"{args.limit:.2f} GiB"),
        ("peak (VmHWM)", peak),
        ("peak of the group", "unknown" if group_bytes is None else f"{group_bytes / GiB:.2f} GiB"),
        ("peak predicted", f"{report['predicted_peak_bytes'] / GiB:.2f} GiB"),
        ("built, prepared", f"{report['build_seconds']:.0f} s, {report['prepare_seconds']:.0f} s"),
        ("steps", ", ".join(f"{one['seconds']:.1f} s" for one in steps)),
        ("forward, backward, update", phases),
        ("step predicted", f"{report['predicted_step_seconds']:.1f} s, update {report['update_schedule']}"),
        ("processor", f"{step['cpu_seconds']:.1f} s a step"),
        ("blocks", ", ".join(f"{count} {action}" for action, count in report["actions"].items())),
        ("losses", ", ".join(f"{one['loss']:.4f}" for one in steps)),
        *((name, f"{size / 1e9:.2f} GB a step") for name, size in sorted(moved.items())),
        ("moved", f"{total / 1e9:.2f} GB a step; the kernel says {kernel_bytes / 1e9:.2f}"),
        ("bandwidth", f"{total / seconds / 1e9:.2f} GB/s"),
    ]
    for when, found in rates.items():
        told = ", ".join(f"{engine} {rate / 1e9:.2f} GB/s" for engine, rate in found.items())
        rows.append((f"fio {when}", told))
    rows.append(("of fio's bandwidth", f"{ratio:.3f}"))
    summary = {
        "parameters": report["parameters"],
        "limit_bytes": int(args.limit * GiB),
        "peak_bytes": report["peak_bytes"],
        "group_peak_bytes": group_bytes,
        "step_seconds": round(seconds, 2),
        "moved_bytes": total,
        "vs_fio": round(ratio, 3),
        "losses": [round(one["loss"], 4) for one in steps],
    }
    text = table(("what", "value"), rows)
    if args.layers != LAYERS:
        print(text, json.dumps(summary), sep="\n")
        return
    publish("seven_billion", text=text, summary=summary, details={**report, "fio": rates})


if __name__ == "__main__":
    main()
