"""The same faults under ``python -O``: nothing that moves or checks bytes may stand in an ``assert``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.offload.faults.runs_on_disk import assert_trained, open_run_in

ROOT = Path(__file__).parents[3]
ELSEWHERE = ("test_tier_faults.py", "test_io.py", "test_manifest.py")
SCHEDULES = 50


def test_assertions_of_the_helpers_hold_here(tmp_path: Path) -> None:
    """Also under -O, where only what pytest rewrites is checked: untrained weights are noticed."""
    with open_run_in(tmp_path) as run, pytest.raises(AssertionError):
        assert_trained(run, 1)


@pytest.mark.skipif(not __debug__, reason="this is that run")
def test_all_of_them_under_python_o() -> None:
    here = Path(__file__).parent
    files = [path for path in sorted(here.glob("test_*.py")) if path.name != "test_rows.py"]
    command = [
        sys.executable, "-O", "-m", "pytest", "-q", "-p", "no:cacheprovider",
        # It warns that assertions outside of tests and registered helpers are not executed: so it should be.
        "-W", "ignore:assertions not in test modules or plugins:pytest.PytestConfigWarning",
        *map(str, files), *(str(here.parent / name) for name in ELSEWHERE),
    ]  # fmt: skip
    environment = {**os.environ, "MEMTRAIN_SCHEDULES": str(SCHEDULES), "MEMTRAIN_KILLS": "2"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=900, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "failed" not in done.stdout
