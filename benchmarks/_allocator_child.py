"""Forward and backward passes of one model under one allocator, in this process, one for each line of input.

    yes | head -5 | python benchmarks/_allocator_child.py --model data/models/smollm2-135m --sequence 1024

The allocator is the one that the environment loads, with ``--planned`` memtrain's arena on top of it. Prints
``ready`` after three steps that do not count (allocators grow in them, and the arena records two), a JSON
line for each step, and when the input ends one more for the process. ``digest`` is of the losses of all steps
and of the last step's gradients.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import xxhash

WARM_UP_STEPS = 3


def faults() -> int:
    """Page faults of this process so far that needed no disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def peak_bytes() -> int:
    """VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


class Passes:
    """One model, one batch."""

    def __init__(self, model: str, sequence: int, arena: Any) -> None:
        from transformers import AutoModelForCausalLM

        self._arena = arena
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        generator = torch.Generator().manual_seed(0)
        vocabulary = self._model.config.vocab_size
        self._tokens = torch.randint(vocabulary, (1, sequence), generator=generator)
        self.hashed = xxhash.xxh3_128()

    def step(self, *, last: bool = False) -> dict[str, float]:
        """Forward and backward; what they took. The last step's gradients are hashed."""
        begin, before, cpu = time.perf_counter(), faults(), time.process_time()
        with self._arena.step() if self._arena else contextlib.nullcontext():
            loss = self._model(input_ids=self._tokens, labels=self._tokens).loss
            loss.backward()
            self.hashed.update(loss.item().hex().encode())
            del loss
            took = {
                "seconds": time.perf_counter() - begin,
                "cpu_seconds": time.process_time() - cpu,
                "page_faults": faults() - before,
            }
            if last:
                for parameter in self._model.parameters():
                    self.hashed.update(parameter.grad.view(torch.uint8).numpy())
            self._model.zero_grad(set_to_none=True)
        return took


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--sequence", type=int, required=True)
    parser.add_argument("--planned", action="store_true")
    args = parser.parse_args()
    arena: Any = None
    if args.planned:
        from memtrain.arena import PlannedAllocator

        arena = PlannedAllocator()
    passes = Passes(args.model, args.sequence, arena)
    for _ in range(WARM_UP_STEPS):
        passes.step()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(passes.step()), flush=True)
    passes.step(last=True)
    report = {"peak_bytes": peak_bytes(), "digest": passes.hashed.hexdigest()}
    if arena:
        report["arena"] = dataclasses.asdict(arena.report())
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
