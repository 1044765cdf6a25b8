"""mypy --strict over the planner and the public API.

    python scripts/typecheck.py

The modules are given by name, because the rooms are reached through links and must not be seen twice.
"""

from __future__ import annotations

import subprocess
import sys

PACKAGES = ["memtrain.planner", "memtrain.cli"]
MODULES = [
    "memtrain",
    "memtrain.api",
    "memtrain.charts",
    "memtrain.checkpoints",
    "memtrain.data",
    "memtrain.malloc",
    "memtrain.memory",
    "memtrain.page",
    "memtrain.progress",
    "memtrain.recipe",
    "memtrain.report",
    "memtrain.session",
    "memtrain.train",
    "memtrain.weights",
]


def main() -> int:
    """Run mypy; its exit code."""
    command = [sys.executable, "-m", "mypy", "--strict"]
    for package in PACKAGES:
        command += ["-p", package]
    for module in MODULES:
        command += ["-m", module]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
