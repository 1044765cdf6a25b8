"""Runs that are killed at a random moment: the last checkpoint is whole, and what goes on from it is exact.

A few of what ``benchmarks/kill_resume.py`` does two hundred times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
KILLS = int(os.environ.get("MEMTRAIN_KILLS", "6"))


def test_what_was_killed_goes_on_bit_for_bit(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "kill_resume.py"
    command = [
        sys.executable,
        *(["-O"] if not __debug__ else []),
        script,
        "--kills",
        KILLS,
        "--directory",
        tmp_path,
    ]
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True, text=True, check=False, timeout=110, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert (summary["killed"], summary["readable_and_bit_equal"], summary["faults"]) == (KILLS, KILLS, 0)
