"""Carries out where memory is to lie, and proves it page by page.

A node can fill up while its pages are being taken: another process takes them too. Under the kernel's BIND
that ends in an out-of-memory kill, so pages are always taken under a policy that may fall back on other
nodes, a few at a time, and are looked at before more are taken. A page that went elsewhere is an error, as is
asking for more than is free to begin with; neither kills, and neither leaves other nodes full. BIND proper
follows once every page is where it belongs.

Nothing here needs torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from memtrain.offload import numa
from memtrain.offload.errors import NodeFullError, PlacementError
from memtrain.offload.numa import PAGE_BYTES, Mode
from memtrain.planner.memory_place import MemoryPlace, Policy
from memtrain.planner.units import format_gib

HUGE_PAGE_BYTES = 2 << 20
STEP_BYTES = 64 << 20
"""Pages are taken and looked at by so many bytes: what can go astray before it is noticed."""


def settle(address: int, nbytes: int, place: MemoryPlace) -> None:
    """Take the untouched pages of ``[address, address + nbytes)`` from the nodes of ``place``, and look.

    Raises:
        NodeFullError: a node has no room; the caller gives back the range.
        UnsupportedPolicyError: the kernel is older than the policy.
        PlacementError: no such node, or the kernel refuses.
    """
    weights = node_weights(place)
    _check_room(nbytes, place, weights)
    numa.set_policy(address, nbytes, _falling_back(place), place.nodes)
    for first in range(0, nbytes, STEP_BYTES):
        size = min(STEP_BYTES, nbytes - first)
        numa.populate(address + first, size)
        verify(address + first, size, place.nodes)
    if place.policy.shares_out:
        _check_shares(numa.pages_by_node(address, nbytes), place, weights)
    if place.policy is Policy.BIND:
        numa.set_policy(address, nbytes, Mode.BIND, place.nodes)


def verify(address: int, nbytes: int, nodes: Sequence[int]) -> None:
    """Check that every page lies on one of ``nodes``; the pages must have been touched.

    Raises:
        NodeFullError: they lie elsewhere because the nodes are full.
        PlacementError: they lie elsewhere, or nowhere.
    """
    found = numa.pages_by_node(address, nbytes)
    astray = {node: count for node, count in sorted(found.items()) if node not in nodes}
    if not astray:
        return
    where = ", ".join(
        f"{count} on node {node}" if node >= 0 else f"{count} nowhere" for node, count in astray.items()
    )
    told = f"{sum(astray.values())} of {found.total()} pages are not on {_named(nodes)} but {where}"
    if min(astray) >= 0 and all(node in numa.online_nodes() for node in nodes):
        raise NodeFullError(f"{told}. {_room(nodes)}")
    raise PlacementError(f"{told}. {numa.remedy()}")


def node_weights(place: MemoryPlace) -> tuple[int, ...]:
    """Pages that each node of ``place`` takes in one turn; all 1 where pages are not shared out by weight."""
    if place.policy is Policy.WEIGHTED_INTERLEAVE:
        return numa.interleave_weights(place.nodes)
    return (1,) * len(place.nodes)


def _falling_back(place: MemoryPlace) -> Mode:
    """The kernel's policy under which pages are taken: one that never kills."""
    if place.policy.shares_out:
        return Mode[place.policy.name]
    return Mode.PREFERRED if len(place.nodes) == 1 else Mode.PREFERRED_MANY


def _check_room(nbytes: int, place: MemoryPlace, weights: Sequence[int]) -> None:
    if place.policy.shares_out:
        wanted = [
            ((node,), nbytes * weight // sum(weights))
            for node, weight in zip(place.nodes, weights, strict=True)
        ]
    else:
        wanted = [(place.nodes, nbytes)]
    for nodes, share in wanted:
        if share > sum(map(numa.node_bytes, nodes)):
            raise NodeFullError(f"{_named(nodes)} cannot take {format_gib(share)}. {_room(nodes)}")


def _check_shares(found: Counter[int], place: MemoryPlace, weights: Sequence[int]) -> None:
    """Pages go round by their addresses: shares are off by one turn at most, of huge pages at most."""
    turn = sum(weights) * (HUGE_PAGE_BYTES // PAGE_BYTES)
    for node, weight in zip(place.nodes, weights, strict=True):
        due = found.total() * weight // sum(weights)
        if abs(found[node] - due) > turn:
            raise NodeFullError(
                f"NUMA node {node} took {found[node]} of {found.total()} pages, and its share is {due} "
                f"(weights {list(weights)} of nodes {list(place.nodes)}). {_room(place.nodes)}"
            )


def _named(nodes: Sequence[int]) -> str:
    return f"NUMA node {nodes[0]}" if len(nodes) == 1 else f"NUMA nodes {','.join(map(str, nodes))}"


def _room(nodes: Sequence[int]) -> str:
    rooms = []
    for node in nodes:
        free, cache = format_gib(numa.node_bytes(node)), format_gib(numa.node_bytes(node, "FilePages"))
        rooms.append(f"node {node} {free} (page cache {cache})")
    return (
        f"Free: {', '.join(rooms)}; lower the tier's budget, name more nodes, end what uses them, or have "
        f"the page cache dropped (sync; echo 1 > /proc/sys/vm/drop_caches)"
    )
