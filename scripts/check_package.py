"""Build the wheel and the sdist, install each where nothing of memtrain is, and use it from elsewhere.

    python scripts/check_package.py

An archive that was built from links could hold links, or nothing, in place of the rooms; and a test that runs
in the checkout would not notice. So each archive is looked into, installed into an environment that has the
planner's own dependencies only, and asked from the root of the file system for a plan.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIGHT = ["highspy", "numpy", "pulp", "pydantic", "pyyaml", "rich", "typer"]
"""What the planner, the recipes and the command line need; torch is not among them."""

USE = """
import sys
import memtrain
from memtrain.planner.machine import Budget, Link, Machine
from memtrain.planner.profile import BlockProfile, ModelProfile, UnitProfile
from memtrain.planner.actions import Tier
from memtrain.planner.solve import make_plan

assert "site-packages" in memtrain.__file__, memtrain.__file__
blocks = tuple(
    BlockProfile(
        name=f"layers.{i}", input_bytes=1 << 20, saved_bytes=8 << 20, attention_bytes=1 << 20,
        forward_seconds=0.1, backward_seconds=0.2, attention_seconds=0.02,
        forward_transient_bytes=1 << 20, backward_transient_bytes=2 << 20,
    )
    for i in range(4)
)
units = tuple(
    UnitProfile(
        name=f"layers.{i}", block=i, weight_bytes=1 << 20, gradient_bytes=1 << 20, state_bytes=8 << 20
    )
    for i in range(4)
)
profile = ModelProfile(
    model="tiny", batch="1 x 8", blocks=blocks, units=units, micro_batches=1, baseline_bytes=0,
    weight_bytes=4 << 20, prologue_forward_seconds=0.0, prologue_backward_seconds=0.0,
    epilogue_forward_seconds=0.01, epilogue_backward_seconds=0.01, epilogue_saved_bytes=0,
    epilogue_peak_bytes=1 << 20, state_bytes_per_element=8.0, gradient_bytes_per_element=2.0,
    largest_gradient_bytes=1 << 20, largest_parameter_elements=1 << 19,
)
machine = Machine(
    name="check", device="cpu", cores=2, dram_copy_bytes_per_second=8e9,
    links=(Link(tier=Tier.NVME, read_bytes_per_second=1e9, write_bytes_per_second=1e9,
                mixed_bytes_per_second=1.5e9),),
)
plan = make_plan(profile, machine, Budget(device="4GiB", nvme="/tmp:4GiB"))
assert plan.status == "optimal", plan.status
assert plan.action_counts() == {"keep": 4}, plan.action_counts()
assert "torch" not in sys.modules
assert memtrain.Budget is Budget
print("planned with", memtrain.__file__)
"""


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    """Run a command; a failure ends the script with its exit code."""
    print("+", *command, flush=True)
    code = subprocess.run([str(part) for part in command], cwd=cwd, check=False).returncode
    if code:
        sys.exit(code)


def contents(archive: Path) -> dict[str, int]:
    """Names and sizes of the regular files of an archive, below its own top folder for an sdist."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as file:
            return {entry.filename: entry.file_size for entry in file.infolist()}
    with tarfile.open(archive) as file:
        members = [member for member in file.getmembers() if member.isfile()]
        return {member.name.partition("/")[2]: member.size for member in members}


def check_contents(archive: Path) -> None:
    """Every module of the rooms and of the front is in the archive, as a file with its bytes in it."""
    found = contents(archive)
    wanted = {}
    for folder in ("memtrain", "planner", "offload", "optim"):
        # Without following the links inside memtrain/: each room is looked at where it lies.
        for path in (ROOT / folder).rglob("*.py"):
            prefix = "" if folder == "memtrain" else "memtrain/"
            wanted[f"{prefix}{path.relative_to(ROOT)}"] = path
    for name, path in wanted.items():
        if found.get(name) != path.stat().st_size:
            sys.exit(
                f"{archive.name}: {name} has {found.get(name)} bytes, the checkout {path.stat().st_size}"
            )
    print(f"{archive.name}: {len(wanted)} modules present")


def check_install(archive: Path, folder: Path) -> None:
    """Install ``archive`` into an empty environment and plan with it from the root directory."""
    environment = folder / f"venv-{archive.suffix.strip('.')}"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    pip = [
        python,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "-q",
        "-c",
        ROOT / "constraints.txt",
    ]
    run(*pip, *LIGHT, "setuptools", "wheel")
    run(*pip, "--no-deps", "--no-build-isolation", archive)
    run(python, "-c", USE, cwd=Path("/"))
    run(environment / "bin" / "memtrain", "--help", cwd=Path("/"))


def main() -> None:
    """Build, look, install, use."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", ROOT)
        archives = sorted((folder / "dist").iterdir())
        if sorted(archive.suffix for archive in archives) != [".gz", ".whl"]:
            sys.exit(f"expected one wheel and one sdist, got {[archive.name for archive in archives]}")
        for archive in archives:
            check_contents(archive)
            check_install(archive, folder)


if __name__ == "__main__":
    main()
