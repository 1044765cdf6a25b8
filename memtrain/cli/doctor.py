"""``memtrain doctor``: what this machine has, what a run may use, and what stands in the way."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from memtrain.malloc import environment_for_children
from memtrain.memory import cgroup_limit, machine_memory
from memtrain.planner.actions import Tier
from memtrain.planner.units import format_gib

_LIBRARIES = (
    "torch",
    "transformers",
    "accelerate",
    "pulp",
    "highspy",
    "deepspeed",
    "bitsandbytes",
    "matplotlib",
)

Rows = list[tuple[str, str]]


class Findings:
    """Rows of the table, and what would keep a run from working."""

    def __init__(self) -> None:
        self.rows: Rows = []
        self.faults: list[str] = []

    def add(self, name: str, text: str) -> None:
        """A fact."""
        self.rows.append((name, text))

    def fault(self, name: str, text: str) -> None:
        """A fact that stands in the way."""
        self.rows.append((name, text))
        self.faults.append(f"{name}: {text}")


def examine(swap: Path, *, measure: bool) -> int:
    """Print what was found; 0 when a run can work, 1 when something stands in the way."""
    found = Findings()
    parts: list[Callable[[Findings], None]] = [_libraries, _devices, _numa, _memory]
    for part in parts:
        part(found)
    usable = _swap_directory(found, swap, measure=measure)
    _uses(found, swap if usable else None)
    table = Table("", "", show_header=False, box=None, pad_edge=False)
    for row in found.rows:
        table.add_row(*row)
    Console().print(table)
    for fault in found.faults:
        print(f"in the way: {fault}")
    if not found.faults:
        print("nothing stands in the way")
    return 1 if found.faults else 0


def _libraries(found: Findings) -> None:
    found.add("python", f"{platform.python_version()} on {platform.platform()}")
    for name in _LIBRARIES:
        try:
            found.add(name, version(name))
        except PackageNotFoundError:
            if name in ("torch", "pulp", "highspy"):
                found.fault(name, f"not installed: pip install {name}")
            else:
                found.add(name, "not installed (optional)")


def _devices(found: Findings) -> None:
    try:
        import torch
    except ImportError:
        return
    found.add("cpu", f"{torch.get_num_threads()} threads of torch, {torch.backends.cpu.get_cpu_capability()}")
    if not torch.cuda.is_available():
        found.add("cuda", "no device")
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found.add(f"cuda:{index}", f"{facts.name}, {format_gib(facts.total_memory)}")


def _numa(found: Findings) -> None:
    from memtrain.offload import numa
    from memtrain.offload.dax import dax_devices

    nodes, memory_only = numa.online_nodes(), numa.memory_only_nodes()
    found.add("NUMA nodes", ", ".join(map(str, nodes)) or "the kernel shows none")
    for node in memory_only:
        found.add(
            f"NUMA node {node}", f"memory only, {format_gib(numa.node_bytes(node))} free: usable as cxl"
        )
    devices = dax_devices()
    for device in devices:
        size, node = format_gib(device.size_bytes), device.node
        found.add(device.path, f"{size} beside node {node}, in units of {device.align_bytes}: usable as cxl")
    if not memory_only and not devices:
        found.add("cxl", "neither a memory-only NUMA node nor a dax device: the tier cannot be used here")
    if len(nodes) > 1:
        policies = [mode.name.lower() for mode in numa.Mode if numa.supports(mode)]
        found.add("memory policies", ", ".join(policies) or "the kernel takes none")


def _memory(found: Findings) -> None:
    machine, group = machine_memory(), cgroup_limit()
    found.add("memory", f"{format_gib(machine.free_bytes)} available of {format_gib(machine.limit_bytes)}")
    if group is None:
        found.add("control group", "no memory limit")
    else:
        found.add("control group", f"{format_gib(group.limit_bytes)} at most ({group.source})")


def _swap_directory(found: Findings, swap: Path, *, measure: bool) -> bool:
    """Whether it can be used."""
    from memtrain.offload.errors import OffloadError
    from memtrain.offload.measure import measure_machine, probe_swap_directory

    probe = probe_swap_directory(swap)
    for name, text in probe.rows():
        found.add(name, text)
    if not probe.usable:
        found.faults.append(f"swap directory: {probe.problem}")
    if not probe.usable or not measure:
        return probe.usable
    try:
        link = measure_machine(swap, refresh=True).link(Tier.NVME)
    except OffloadError as error:
        found.fault("swap bandwidth", str(error))
        return False
    rates = (link.read_bytes_per_second, link.write_bytes_per_second, link.mixed_bytes_per_second)
    read, write, mixed = (f"{rate / 1e9:.2f} GB/s" for rate in rates)
    found.add("swap bandwidth", f"{read} read, {write} write, {mixed} both at once ({link.source})")
    return True


def _uses(found: Findings, swap: Path | None) -> None:
    group, machine = cgroup_limit(), machine_memory()
    free = min(machine.free_bytes, group.free_bytes if group else machine.free_bytes)
    nvme = "no nvme" if swap is None else f"nvme in {swap.resolve()}"
    found.add("a budget may be", f"device up to {format_gib(free)} now, {nvme}")
    tuned = environment_for_children()
    library = tuned.get("LD_PRELOAD")
    found.add("allocator", f"mimalloc ({library})" if library else "glibc, large blocks by mmap: slower")
