"""How many of 200 runs that are killed at a random moment go on bit for bit from a checkpoint that is whole?

    python benchmarks/kill_resume.py --kills 200

A run trains three layers with streamed AdamW (gradients and state on disk, updates ahead of the next
forward) and writes a checkpoint after every step, keeping two. It gets SIGKILL at a moment that is drawn
evenly over its length; the next one takes up the last checkpoint, compares the weights with those of plain
PyTorch at that step, and goes on, comparing after every step. Any difference, any checkpoint that does not
verify, any that is older than one that was reported complete, and any run that does not end in time count,
and fail the script.

Processes are forked from one that has imported everything, so that a trial takes a fraction of a second.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch
from _harness import publish, table
from torch import Tensor, nn

from memtrain.offload import atomic
from memtrain.offload.device import make_device
from memtrain.offload.engine import Engine
from memtrain.offload.optimizer import OffloadedOptimizer, OptimizerConfig
from memtrain.offload.snapshot import latest_checkpoint, load_checkpoint, save_checkpoint
from memtrain.offload.tiers import NvmeStore
from memtrain.planner.actions import StateDecision, Tier, UpdateSchedule
from memtrain.planner.plan import Plan, Staging

STEPS = 6
KEPT = 2
WIDTH = 260  # 67,600 elements a layer: large enough to leave memory
CAPACITY_BYTES = 16 << 20
DIFFERS, FAILED = 3, 4
TRIAL_SECONDS = 120.0
_STEP = re.compile(r"step-\d+")


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))


def batch(step: int) -> Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)


def digest(model: nn.Module) -> str:
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(parameter.detach().numpy().tobytes())
    return found.hexdigest()


def plain_digests() -> list[str]:
    """Of the weights of plain PyTorch before the first step and after each."""
    model = make_model()
    optimizer = make_optimizer(model)
    digests = [digest(model)]
    for step in range(STEPS):
        model(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        digests.append(digest(model))
    return digests


def make_plan(units: list[str]) -> Plan:
    return Plan(
        status="heuristic", blocks=(), update_schedule=UpdateSchedule.AHEAD, micro_batches=1,
        step_seconds=0.0,
        states=tuple(
            StateDecision(unit=unit, gradient_tier=Tier.NVME, optimizer_tier=Tier.NVME) for unit in units
        ),
        staging=Staging(
            gradient_slots=3, gradient_slot_bytes=64 << 10, update_slots=3, update_slot_bytes=1 << 20,
            update_shard_elements=40_000,
        ),
        lower_bound_seconds=0.0, gap=0.0, solver="by hand", bill=(), peaks=(), capacities=(),
        bytes_moved_per_step=0,
    )  # fmt: skip


@dataclass
class Run:
    """What a checkpoint is taken of."""

    model: nn.Module
    optimizer: OffloadedOptimizer
    units: list[str]

    def flush(self) -> None:
        self.optimizer.flush()


def train(directory: Path, expected: list[str], reports: int) -> int:
    """Take up the last checkpoint and train to the end; the exit code."""
    model = make_model()
    units = [(name, list(layer.named_parameters(prefix=name))) for name, layer in model.named_children()]
    names = [name for name, _ in units]
    with Engine({Tier.NVME: NvmeStore(directory / "swap", CAPACITY_BYTES)}, make_device("cpu")) as engine:
        optimizer = OffloadedOptimizer(
            make_optimizer(model), engine=engine, plan=make_plan(names), units=units,
            config=OptimizerConfig(elementwise=True),
        )  # fmt: skip
        run = Run(model, optimizer, names)
        latest = latest_checkpoint(directory / "checkpoints")
        done = 0 if latest is None else int(load_checkpoint(latest, run)["steps_done"])
        if digest(model) != expected[done]:
            return DIFFERS
        for step in range(done, STEPS):
            for name in names:
                optimizer.ensure(name)
            model(batch(step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            optimizer.flush()
            if digest(model) != expected[step + 1]:
                return DIFFERS
            folder = directory / "checkpoints" / f"step-{step + 1:02d}"
            save_checkpoint(folder, run, progress={"steps_done": step + 1})
            os.write(reports, bytes([step + 1]))
            for other in sorted((directory / "checkpoints").glob("step-[0-9][0-9]"))[:-KEPT]:
                shutil.rmtree(other)
        optimizer.close()
    return 0


@dataclass
class Tally:
    """What became of the trials."""

    killed: int = 0
    finished: int = 0
    in_a_save: int = 0
    """Killed with a checkpoint in the making."""
    resumed_at: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def trial(directory: Path, expected: list[str], delay_seconds: float | None) -> tuple[int, int]:
    """Run a child, kill it after ``delay_seconds``; its exit code, and the last step it reported saved."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = FAILED
        try:
            code = train(directory, expected, writer)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    deadline = time.monotonic() + (TRIAL_SECONDS if delay_seconds is None else delay_seconds)
    ended, status = 0, 0
    while not ended and time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.0005)
    if not ended:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as pipe:
        saved = pipe.read()
    return os.waitstatus_to_exitcode(status), max(saved, default=0)


def look(directory: Path, saved: int, tally: Tally) -> int:
    """Check what a killed run has left; the step that can be taken up."""
    checkpoints = directory / "checkpoints"
    latest = latest_checkpoint(checkpoints)
    step = 0 if latest is None else int(latest.name[5:])
    if step < saved:
        tally.faults.append(f"step {saved} was reported saved, {step} is the last that is there")
    for folder in checkpoints.glob("step-*") if latest is not None else ():
        if _STEP.fullmatch(folder.name) and atomic.is_complete(folder):
            try:
                atomic.verify(folder)
            except atomic.CheckpointError as error:
                tally.faults.append(str(error))
    tally.in_a_save += any(checkpoints.glob("*.tmp-*"))
    return step


def kill_and_resume(directory: Path, kills: int, seed: int) -> Tally:
    """Until so many runs have been killed."""
    rng, tally, expected = random.Random(seed), Tally(), plain_digests()
    seconds, saved = [], 0

    def anew() -> None:
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)

    (directory / "swap").mkdir()
    for _ in range(2):  # how long a whole run takes; it must end well
        began = time.monotonic()
        code, _ = trial(directory, expected, None)
        if code:
            raise SystemExit(f"a run that nobody killed ended with {code}")
        seconds.append(time.monotonic() - began)
        anew()
    while tally.killed < kills and not tally.faults:
        began = time.monotonic()
        code, newly = trial(directory, expected, rng.uniform(0.0, statistics.mean(seconds[-5:])))
        saved = max(saved, newly)
        if code == -signal.SIGKILL:
            tally.killed += 1
            saved = look(directory, saved, tally)
            tally.resumed_at.append(saved)
        elif code == 0:
            tally.finished += 1
            saved = 0
            seconds.append(time.monotonic() - began)  # the machine is quicker now than it was
            anew()
        else:
            tally.faults.append(f"a run ended with {code} ({DIFFERS}: other weights than plain PyTorch's)")
    code, _ = trial(directory, expected, None)  # and what the last one left goes to its end
    if code:
        tally.faults.append(f"the last run ended with {code}")
    if left := os.listdir(directory / "swap"):
        tally.faults.append(f"left in the swap directory: {left}")
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--directory", type=Path, help="on a local disk; default: beside the temporary files")
    parser.add_argument("--keep", action="store_true", help="write the outcome to benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory(dir=options.directory))
        began = time.monotonic()
        tally = kill_and_resume(Path(place), options.kills, options.seed)
    resumed = [tally.resumed_at.count(step) for step in range(STEPS + 1)]
    summary = {
        "killed": tally.killed,
        "killed_in_a_save": tally.in_a_save,
        "finished": tally.finished,
        "readable_and_bit_equal": tally.killed - len(tally.faults),
        "faults": len(tally.faults),
    }
    text = table(
        ("taken up at step", "runs"),
        [(step or "none saved yet", count) for step, count in enumerate(resumed)],
    )
    text += f"\n{tally.killed} killed, {tally.in_a_save} of them with a checkpoint in the making, "
    text += f"{tally.finished} finished before; {time.monotonic() - began:.0f} s"
    text += "".join(f"\n{fault}" for fault in tally.faults)
    if options.keep:
        publish(
            "kill_resume", text=text, summary=summary, details={"faults": tally.faults, "resumed": resumed}
        )
    else:
        print(text)
        print(json.dumps(summary))
    if tally.faults:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
