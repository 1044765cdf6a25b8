"""``memtrain profile``: how fast this machine moves bytes, measured now and kept for later planning."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from memtrain.planner.machine import Machine
from memtrain.planner.memory_place import parse_place
from memtrain.recipe import RecipeError
from memtrain.runfiles import replace_text

_DEVICE = re.compile(r"cpu|cuda(:\d+)?")


def profile(swap: Path | None, *, device: str, cxl: str | None, output: Path | None, json: bool) -> int:
    """Measure, print, and write; 0, or 1 where a tier cannot serve.

    Raises:
        RecipeError: a device, a place or an output that cannot be.
    """
    if not _DEVICE.fullmatch(device):
        raise RecipeError(f"--device {device!r} is not known: use cpu, cuda or cuda:N")
    if output is not None and not output.resolve().parent.is_dir():
        raise RecipeError(f"-o {output}: folder {output.resolve().parent} does not exist; create it first")
    try:
        place = None if cxl is None else parse_place(cxl)
    except ValueError as error:
        raise RecipeError(f"--cxl: {error}") from error
    from memtrain.offload.errors import OffloadError
    from memtrain.offload.measure import measure_machine

    try:
        machine = measure_machine(swap, device=device, cxl=place, refresh=True)
    except OffloadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if output is not None:
        _write(output, machine)
    if json:
        print(machine.to_json())
    else:
        _show(machine, output)
    return 0


def _write(output: Path, machine: Machine) -> None:
    try:
        replace_text(output, machine.to_json() + "\n")
    except OSError as error:
        raise RecipeError(f"-o {output}: {error.strerror}; choose a file that can be written") from error


def _show(machine: Machine, output: Path | None) -> None:
    print(f"{machine.name}: {machine.device}, {machine.cores} cores, {machine.source}")
    table = Table("link", "read", "write", "both at once", "CPU s/GB", "latency", box=None, pad_edge=False)
    copy = machine.dram_copy_bytes_per_second
    table.add_row("memory, one copy", f"{copy / 1e9:.2f} GB/s", "", "", "", "")
    for link in machine.links:
        rates = (link.read_bytes_per_second, link.write_bytes_per_second, link.mixed_bytes_per_second)
        table.add_row(
            link.tier.value,
            *(f"{rate / 1e9:.2f} GB/s" for rate in rates),
            f"{link.cpu_seconds_per_byte * 1e9:.3f}",
            f"{link.latency_seconds * 1e3:.2f} ms",
        )
    Console().print(table)
    if not machine.links:
        print("no tier beside the device was measured: name a swap directory with --swap")
    print(f"written to {output}" if output else "not written: give -o machine.json to keep it")
