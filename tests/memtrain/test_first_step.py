"""The first step of a plan that cuts blocks is within its bill, though in it the executor looks at tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from memtrain.malloc import mimalloc_library, tuned_environment

ROOT = Path(__file__).parents[2]


def test_the_first_step_of_a_cut_model_is_within_its_bill(tmp_path: Path) -> None:
    """In a process of its own, with the allocator that training has."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment = tuned_environment(environment, mimalloc_library()) or environment
    command = [sys.executable, "-m", "tests.memtrain.first_step", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["cut"] == 2
    assert found["measured_bytes"] <= found["predicted_bytes"]
    # When a look held all that is saved, and ran beside it, 453 MB stood against a bill of 429.
    assert found["measured_forward_bytes"] <= found["predicted_forward_bytes"]
    assert found["probe_bytes"] <= 1.05 * found["block_forward_bytes"]
