"""Forward and backward passes of one model under one allocator, in this process, one for each line of input.

    yes | head -5 | python benchmarks/_allocator_child.py --model data/models/smollm2-135m --sequence 1024

The allocator is the one that the environment loads, with ``--planned`` memtrain's arena on top of it. Prints
``ready`` after three steps that do not count (allocators grow in them, and the arena records two), a JSON
line for each step, and when the input ends one more for the process. ``digest`` is of the losses of all steps
and of the last step's gradients.

With ``--session`` a step is one of a ``memtrain.prepare`` session: forward, backward, update, ``zero_grad``.
A third of the blocks keeps what it saves, a third sends it to disk, a third computes it again; gradients and
state stay. Its digest is of the losses and of the trained weights.
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


def faults() -> int:
    """Page faults of this process so far that needed no disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def peak_bytes() -> int:
    """VmHWM of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


def load(model: str, sequence: int) -> tuple[Any, torch.Tensor]:
    """The model, and one batch of random tokens."""
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    return loaded, torch.randint(loaded.config.vocab_size, (1, sequence), generator=generator)


class Passes:
    """One model, one batch."""

    warm_up = 3
    """Two recorded, and one that meets its arena for the first time."""

    def __init__(self, model: str, sequence: int, arena: Any) -> None:
        self._arena = arena
        self._model, self._tokens = load(model, sequence)
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

    def report(self) -> dict[str, Any]:
        """Of the process and its arena."""
        found: dict[str, Any] = {"peak_bytes": peak_bytes(), "digest": self.hashed.hexdigest()}
        if self._arena:
            found["arena"] = dataclasses.asdict(self._arena.report())
        return found


class SessionSteps:
    """One model, one batch, under a plan that has something of everything."""

    warm_up = 4
    """The first of a shape is not recorded."""

    def __init__(self, model: str, sequence: int, allocator: str, directory: str) -> None:
        import memtrain

        self._model, tokens = load(model, sequence)
        self._batch = {"input_ids": tokens, "labels": tokens}
        actions = ("keep", "swap", "recompute")
        force: dict[str, Any] = {
            f"block.{i}": {"action": actions[i % 3]} for i in range(self._model.config.num_hidden_layers)
        }
        force["state"] = {"gradient_tier": "device", "optimizer_tier": "device"}
        self.session = memtrain.prepare(
            self._model,
            torch.optim.AdamW(self._model.parameters(), lr=1e-5, fused=True),
            self._batch,
            budget=memtrain.Budget(device="4GiB", nvme=f"{directory}:4GiB"),
            options=memtrain.PlannerOptions(force=force, update_schedule="sequential"),
            allocator=allocator,
        )
        self.hashed = xxhash.xxh3_128()

    def step(self, *, last: bool = False) -> dict[str, float]:
        """A training step; what it took. The weights that the last one has made are hashed."""
        begin, before, cpu = time.perf_counter(), faults(), time.process_time()
        loss = self.session.model(**self._batch).loss
        loss.backward()
        self.session.optimizer.step()
        self.session.optimizer.zero_grad()
        took = {
            "seconds": time.perf_counter() - begin,
            "cpu_seconds": time.process_time() - cpu,
            "page_faults": faults() - before,
        }
        self.hashed.update(loss.item().hex().encode())
        if last:
            for parameter in self._model.parameters():
                self.hashed.update(parameter.detach().view(torch.uint8).numpy())
        return took

    def report(self) -> dict[str, Any]:
        """Of the session since it was prepared."""
        from memtrain.planner.decisions import Decisions
        from memtrain.planner.together import together

        session = self.session
        sums = together(session.profile, Decisions.of(session.plan, on_cpu=True))
        found = {
            **session.measure(),
            "digest": self.hashed.hexdigest(),
            "held_bytes": sums.held_bytes,
            "load_bytes": sums.load_bytes,
            "bill": [dataclasses.astuple(line) for line in session.plan.bill],
        }
        if session.passes is not None:
            found["arena"] = dataclasses.asdict(session.passes.report())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--sequence", type=int, required=True)
    parser.add_argument("--planned", action="store_true")
    parser.add_argument("--session", metavar="DIRECTORY", help="steps of a session that swaps to there")
    args = parser.parse_args()
    if args.session:
        run(SessionSteps(args.model, args.sequence, "planned" if args.planned else "default", args.session))
        return
    arena: Any = None
    if args.planned:
        from memtrain.arena import PlannedAllocator

        arena = PlannedAllocator()
    run(Passes(args.model, args.sequence, arena))


def run(steps: Passes | SessionSteps) -> None:
    """As many as there are lines of input, one more, and the report."""
    for _ in range(steps.warm_up):
        steps.step()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(steps.step()), flush=True)
    steps.step(last=True)
    print(json.dumps(steps.report()), flush=True)


if __name__ == "__main__":
    main()
