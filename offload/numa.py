"""NUMA without a library: three system calls through ctypes, and what sysfs says about nodes.

CXL memory comes up as a node that has memory and no processors. A range of addresses is given a policy with
``mbind`` before it is touched, and where its pages really lie is asked with ``move_pages`` afterwards: a
policy that was accepted is not yet a page that arrived.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
from collections import Counter
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path

from memtrain.offload.errors import PlacementError, UnsupportedPolicyError

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class Mode(IntEnum):
    """The kernel's numbers (include/uapi/linux/mempolicy.h)."""

    PREFERRED = 1
    BIND = 2
    INTERLEAVE = 3
    PREFERRED_MANY = 5
    WEIGHTED_INTERLEAVE = 6


_SINCE = {Mode.PREFERRED_MANY: "5.15", Mode.WEIGHTED_INTERLEAVE: "6.9"}
_NODES = Path("/sys/devices/system/node")
_WEIGHTS = Path("/sys/kernel/mm/mempolicy/weighted_interleave")
_SYSCALLS = {"x86_64": (237, 279), "aarch64": (235, 239)}  # mbind, move_pages
_MADV_POPULATE_WRITE = 23  # Linux 5.14
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


def node_bytes(node: int, line: str = "MemFree") -> int:
    """Free bytes of ``node``, or what another line of its meminfo says (``FilePages``: its page cache).

    Raises:
        PlacementError: no such node, or no such line.
    """
    try:
        text = (_NODES / f"node{node}" / "meminfo").read_text()
    except OSError as error:
        raise PlacementError(absent(node)) from error
    for row in text.splitlines():
        words = row.split()
        if len(words) >= 4 and words[2] == f"{line}:":
            return int(words[3]) << 10
    raise PlacementError(f"NUMA node {node} does not say its {line} (in {_NODES}/node{node}/meminfo)")


def interleave_weights(nodes: Sequence[int]) -> tuple[int, ...]:
    """The weights of ``nodes`` that the system's owner has set: pages of one turn, 1 to 255.

    Raises:
        UnsupportedPolicyError: the kernel has none.
    """
    try:
        return tuple(int((_WEIGHTS / f"node{node}").read_text()) for node in nodes)
    except (OSError, ValueError) as error:
        raise _unsupported(Mode.WEIGHTED_INTERLEAVE) from error


def supports(mode: Mode) -> bool:
    """Whether the kernel takes the policy, tried on a page of no use to anybody."""
    page = ctypes.create_string_buffer(2 * PAGE_BYTES)
    address = -(-ctypes.addressof(page) // PAGE_BYTES) * PAGE_BYTES
    nodes = online_nodes()[:1] or (0,)
    known = _mbind(address, PAGE_BYTES, mode, nodes) == 0
    _mbind(address, PAGE_BYTES, None, ())
    return known


def set_policy(address: int, nbytes: int, mode: Mode, nodes: Sequence[int]) -> None:
    """Say where untouched pages are to go. ``address`` is page aligned.

    Raises:
        UnsupportedPolicyError: the kernel is older than the policy.
        PlacementError: no such node, or the kernel refuses.
    """
    online = online_nodes()
    for node in nodes:
        if node < 0 or (online and node not in online):
            raise PlacementError(absent(node))
    number = _mbind(address, nbytes, mode, nodes)
    if number == errno.EINVAL and mode in _SINCE and not supports(mode):
        raise _unsupported(mode)
    if number:
        hint = {
            errno.EINVAL: f"; this process may use nodes {_allowed_nodes()} (its cgroup's cpuset.mems)",
            errno.EPERM: "; a container needs --cap-add SYS_NICE for it",
        }.get(number, "")
        raise PlacementError(
            f"mbind {mode.name} to NUMA node {','.join(map(str, nodes))} failed: {os.strerror(number)}{hint}"
            f". {remedy()}"
        )


def populate(address: int, nbytes: int) -> None:
    """Have the kernel find a page for each address of the range now. What stood there is lost.

    Raises:
        PlacementError: it has no memory for them, on any node.
    """
    if _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), _MADV_POPULATE_WRITE) == 0:
        return
    number = ctypes.get_errno()
    if number != errno.EINVAL:
        raise PlacementError(f"the kernel has no memory for {nbytes} bytes: {os.strerror(number)}")
    ctypes.memset(address, 0, nbytes)


def nodes_of_pages(address: int, nbytes: int) -> list[int]:
    """The node of each page of ``[address, address + nbytes)``; a negative errno where a page is not there
    yet.
    """
    count = -(-nbytes // PAGE_BYTES)
    nodes: list[int] = []
    for first in range(0, count, _PAGES_PER_CALL):
        n = min(_PAGES_PER_CALL, count - first)
        start = address + first * PAGE_BYTES
        pages = (ctypes.c_void_p * n)(*range(start, start + n * PAGE_BYTES, PAGE_BYTES))
        status = (ctypes.c_int * n)()
        if _call(1, 0, n, pages, None, status, 0) != 0:
            raise PlacementError(f"move_pages cannot tell where pages lie: {os.strerror(ctypes.get_errno())}")
        nodes.extend(status)
    return nodes


def pages_by_node(address: int, nbytes: int) -> Counter[int]:
    """How many pages of the range lie on each node; pages that are not there count under a negative errno."""
    return Counter(nodes_of_pages(address, nbytes))


def absent(node: int) -> str:
    """The message for a node that does not exist."""
    return f"NUMA node {node} does not exist. {remedy()}"


def remedy() -> str:
    """Which nodes could be named instead."""
    return (
        f"Nodes online: {list(online_nodes())}, memory only: {list(memory_only_nodes())}; "
        "name one of them in the budget, or leave the tier out"
    )


def _mbind(address: int, nbytes: int, mode: Mode | None, nodes: Sequence[int]) -> int:
    """0, or an errno. No mode gives the range back to the process's own policy."""
    words = max(nodes, default=0) // 64 + 1
    mask = (ctypes.c_ulong * words)()
    for node in nodes:
        mask[node // 64] |= 1 << (node % 64)
    # The kernel reads maxnode - 1 bits.
    failed = _call(0, address, nbytes, int(mode or 0), ctypes.byref(mask), words * 64 + 1, 0)
    return ctypes.get_errno() if failed else 0


def _unsupported(mode: Mode) -> UnsupportedPolicyError:
    name = mode.name.lower()
    return UnsupportedPolicyError(
        f"Linux {platform.release()} knows no memory policy {name}; Linux {_SINCE[mode]} and later do. Use "
        f"{'interleave' if mode is Mode.WEIGHTED_INTERLEAVE else 'interleave, or name one node'}"
    )


def _allowed_nodes() -> str:
    for row in Path("/proc/self/status").read_text().splitlines():
        if row.startswith("Mems_allowed_list:"):
            return row.split()[1]
    return "unknown"


def _call(which: int, *arguments: object) -> int:
    numbers = _SYSCALLS.get(platform.machine())
    if numbers is None:
        raise PlacementError(f"NUMA placement is not known on {platform.machine()}; leave the place out")
    # Integers go as 64-bit: syscall() is variadic, and a plain Python int would be passed as a C int.
    converted = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return int(_libc.syscall(ctypes.c_long(numbers[which]), *converted))
