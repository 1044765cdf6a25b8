"""mypy --strict over the planner and the front door.

    python scripts/typecheck.py

Packages are given by name, because the rooms are reached through links and must not be seen twice.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FRONT = Path(__file__).resolve().parent.parent / "memtrain"
PACKAGES = ["memtrain.planner", "memtrain.arena", "memtrain.cli", "memtrain.planning", "memtrain.planpage"]


def main() -> int:
    """Run mypy; its exit code."""
    command = [sys.executable, "-m", "mypy", "--strict"]
    for package in PACKAGES:
        command += ["-p", package]
    for path in sorted(FRONT.glob("*.py")):
        command += ["-m", "memtrain" if path.stem == "__init__" else f"memtrain.{path.stem}"]
    return subprocess.run(command, cwd=FRONT.parent, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
