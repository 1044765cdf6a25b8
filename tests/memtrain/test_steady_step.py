"""A step of a session on planned addresses, in a process with memtrain's allocator: no page fault."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from memtrain.malloc import mimalloc_library, tuned_environment

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import resource, sys
import torch
import memtrain
from memtrain.planner.actions import Action
from tests.memtrain.sessions import MACHINE, build, large

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

model, optimizer = build()
force = {f"block.{i}": {"action": action} for i, action in enumerate(("keep", "swap", "recompute"))}
force["state"] = {"gradient_tier": "device", "optimizer_tier": sys.argv[2]}
options = memtrain.PlannerOptions(force=force, update_schedule="sequential")
budget = memtrain.Budget(device="3GiB", nvme=f"{sys.argv[1]}:1GiB")
with memtrain.prepare(
    model, optimizer, (large(0),), budget=budget, options=options, machine=MACHINE, allocator="planned"
) as session:
    assert session.plan.staging.overlaid_bytes > 0
    assert {block.action for block in session.plan.blocks} == {Action.KEEP, Action.SWAP, Action.RECOMPUTE}
    batch = large(1)
    for step in range(16):
        before = faults()
        session.model(batch).backward()
        session.optimizer.step()
        session.optimizer.zero_grad()
        print(faults() - before)
    report = session.passes.report()
    assert report.deviations == (), report
    assert report.planned_steps == 2 * (16 - 3), report
"""


def faults_by_step(folder: Path, state: str) -> list[int]:
    tuned = tuned_environment({}, mimalloc_library())
    assert tuned is not None
    plain = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "PYTHONPATH")}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), state],
        cwd=ROOT,
        env=plain | tuned | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return [int(line) for line in result.stdout.split()]


def test_state_that_stays(tmp_path: Path) -> None:
    found = faults_by_step(tmp_path, "device")
    assert min(found[1:3]) > 100  # recorded: every large request has a mapping of its own
    assert min(found[5:]) == 0


def test_state_on_disk(tmp_path: Path) -> None:
    assert min(faults_by_step(tmp_path, "nvme")[5:]) == 0
