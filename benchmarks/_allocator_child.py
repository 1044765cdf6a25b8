"""Forward and backward passes of one model under one allocator, in this process; ends with one JSON line.

    python benchmarks/_allocator_child.py --model data/models/smollm2-135m --sequence 1024 --planned

The allocator is the one that the environment loads, with ``--planned`` memtrain's arena on top of it. The
first steps are not counted: allocators grow in them, and the arena records two. ``digest`` is of the losses
of all steps and of the last step's gradients.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
import xxhash


def faults() -> int:
    """Page faults of this process so far that needed no disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def memory_bytes(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def digest(model: torch.nn.Module, losses: list[float]) -> str:
    """Of losses and gradients, bit by bit."""
    hashed = xxhash.xxh3_128(json.dumps([loss.hex() for loss in losses]).encode())
    for parameter in model.parameters():
        if parameter.grad is not None:
            hashed.update(parameter.grad.contiguous().view(torch.uint8).numpy())
    return hashed.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--sequence", type=int, required=True)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--planned", action="store_true")
    args = parser.parse_args()

    from transformers import AutoModelForCausalLM

    arena: Any = None
    if args.planned:
        from memtrain.arena import PlannedAllocator

        arena = PlannedAllocator()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (1, args.sequence), generator=generator)
    baseline_bytes = memory_bytes("VmRSS")
    steps: list[dict[str, float]] = []
    losses: list[float] = []
    for step in range(args.warm_up + args.steps):
        last = step == args.warm_up + args.steps - 1
        begin, before, cpu = time.perf_counter(), faults(), time.process_time()
        with arena.step() if arena else contextlib.nullcontext():
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            losses.append(loss.item())
            del loss
            seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu
            now = faults() - before
            checked = digest(model, losses) if last else ""
            model.zero_grad(set_to_none=True)
        steps.append({"seconds": seconds, "cpu_seconds": cpu_seconds, "page_faults": now})
    report = {
        "steps": steps[args.warm_up :],
        "warm_up": steps[: args.warm_up],
        "baseline_bytes": baseline_bytes,
        "peak_bytes": memory_bytes("VmHWM"),
        "digest": checked,
        "losses": losses,
    }
    if arena:
        said = arena.report()
        report["arena"] = {name: getattr(said, name) for name in said.__slots__ if name != "deviations"}
        report["deviations"] = said.deviations
    print(json.dumps(report))


if __name__ == "__main__":
    main()
