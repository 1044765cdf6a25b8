"""NUMA placement without a library: two system calls through ctypes, and what sysfs says about nodes.

CXL memory comes up as a node that has memory and no processors. Pages are bound with ``mbind`` before they
are touched, and where they really lie is asked with ``move_pages`` afterwards: a policy that was accepted
is not yet a page that arrived.
"""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

from memtrain.offload.errors import PlacementError

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

_NODES = Path("/sys/devices/system/node")
_SYSCALLS = {"x86_64": (237, 279), "aarch64": (235, 239)}  # mbind, move_pages
_MPOL_BIND = 2
_PAGES_PER_CALL = 1 << 14  # 64 MiB of pages a call: the two arrays of a call stay under 200 KiB

_libc = ctypes.CDLL(None, use_errno=True)


def _node_list(name: str) -> tuple[int, ...]:
    """Read a sysfs node list such as ``0-1,3``; empty where the kernel has none."""
    try:
        text = (_NODES / name).read_text().strip()
    except OSError:
        return ()
    nodes: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        nodes.extend(range(int(first), int(last or first) + 1))
    return tuple(nodes)


def online_nodes() -> tuple[int, ...]:
    """Nodes that exist; empty where the kernel does not say."""
    return _node_list("online")


def memory_only_nodes() -> tuple[int, ...]:
    """Nodes with memory and without processors: how CXL memory appears."""
    return tuple(sorted(set(_node_list("has_memory")) - set(_node_list("has_cpu"))))


def node_free_bytes(node: int) -> int:
    """Free bytes of ``node``. Raises PlacementError where it does not exist."""
    try:
        text = (_NODES / f"node{node}" / "meminfo").read_text()
    except OSError as error:
        raise PlacementError(_absent(node)) from error
    for line in text.splitlines():
        if "MemFree:" in line:
            return int(line.split()[-2]) << 10
    raise PlacementError(f"NUMA node {node} does not say how much memory is free")


def bind(address: int, nbytes: int, node: int) -> None:
    """Bind untouched pages to ``node``. ``address`` is page aligned.

    Raises:
        PlacementError: no such node, or the kernel refuses.
    """
    if node < 0 or (online_nodes() and node not in online_nodes()):
        raise PlacementError(_absent(node))
    words = node // 64 + 1
    mask = (ctypes.c_ulong * words)()
    mask[node // 64] = 1 << (node % 64)
    # The kernel reads maxnode - 1 bits.
    result = _call(0, address, nbytes, _MPOL_BIND, ctypes.byref(mask), words * 64 + 1, 0)
    if result != 0:
        number = ctypes.get_errno()
        raise PlacementError(f"mbind to NUMA node {node} failed: {os.strerror(number)}. {_remedy()}")


def nodes_of_pages(address: int, nbytes: int) -> list[int]:
    """The node of each page of ``[address, address + nbytes)``; a negative errno where a page is not there
    yet.
    """
    count = -(-nbytes // PAGE_BYTES)
    nodes: list[int] = []
    for first in range(0, count, _PAGES_PER_CALL):
        n = min(_PAGES_PER_CALL, count - first)
        pages = (ctypes.c_void_p * n)(*(address + (first + i) * PAGE_BYTES for i in range(n)))
        status = (ctypes.c_int * n)()
        if _call(1, 0, n, pages, None, status, 0) != 0:
            raise PlacementError(f"move_pages cannot tell where pages lie: {os.strerror(ctypes.get_errno())}")
        nodes.extend(status)
    return nodes


def verify(address: int, nbytes: int, node: int) -> None:
    """Check that every page lies on ``node``; the pages must have been touched.

    Raises:
        PlacementError: names how many pages are elsewhere.
    """
    astray = sum(where != node for where in nodes_of_pages(address, nbytes))
    if astray:
        raise PlacementError(
            f"{astray} of {-(-nbytes // PAGE_BYTES)} pages are not on NUMA node {node}. {_remedy()}"
        )


def _call(which: int, *arguments: object) -> int:
    numbers = _SYSCALLS.get(platform.machine())
    if numbers is None:
        raise PlacementError(f"NUMA placement is not known on {platform.machine()}; leave the cxl tier out")
    # Integers go as 64-bit: syscall() is variadic, and a plain Python int would be passed as a C int.
    converted = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return int(_libc.syscall(ctypes.c_long(numbers[which]), *converted))


def _absent(node: int) -> str:
    return f"NUMA node {node} does not exist. {_remedy()}"


def _remedy() -> str:
    return (
        f"Nodes online: {list(online_nodes())}, memory only: {list(memory_only_nodes())}; "
        "name one of them in budget.cxl, or leave it out"
    )
