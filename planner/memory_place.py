"""Where memory of the host and cxl tiers lies, in the words of a budget.

    1:64GiB                            node 1
    1,2:128GiB                         nodes 1 and 2, page by page in turn
    weighted_interleave:1,2:128GiB     the same by the weights that the system's owner has set
    bind:1:64GiB                       node 1, and nowhere else later on
    /dev/dax0.0:64GiB                  a device that is mapped, not a node

These are the kernel's policies (Documentation/admin-guide/mm/numa_memory_policy.rst). How they are carried
out is ``offload.placement``'s.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

MOST_NODES = 1024
"""The kernel is built for at most 2**CONFIG_NODES_SHIFT nodes, 10 being the largest shift."""
_DAX = re.compile(r"/dev/dax\d+\.\d+")


class Policy(str, Enum):
    """How pages are shared out among nodes. In each, a page that is not on a named node is an error."""

    PREFERRED = "preferred"
    """On the nodes as they have room. Should the kernel ever move a page later (swap), it may take another
    node; it never kills for want of this one."""
    BIND = "bind"
    """As ``PREFERRED``, and from then on the kernel may use no other node: it kills rather than that."""
    INTERLEAVE = "interleave"
    """In turn: the bandwidth of several nodes for whatever is long."""
    WEIGHTED_INTERLEAVE = "weighted_interleave"
    """In turn, each by its weight in /sys/kernel/mm/mempolicy/weighted_interleave (Linux 6.9)."""

    @property
    def shares_out(self) -> bool:
        """Whether each node has its share, rather than as much as fits."""
        return self in (Policy.INTERLEAVE, Policy.WEIGHTED_INTERLEAVE)


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlace:
    """NUMA nodes and a policy, or a dax device."""

    nodes: tuple[int, ...] = ()
    policy: Policy = Policy.PREFERRED
    dax: str | None = None
    """Path of a device in mode devdax, such as ``/dev/dax0.0``."""

    def __post_init__(self) -> None:
        if self.dax is not None:
            if self.nodes or self.policy is not Policy.PREFERRED:
                raise ValueError(f"a dax device has neither nodes nor a policy: name {self.dax} alone")
            if not _DAX.fullmatch(self.dax):
                raise ValueError(f"a dax device is named such as /dev/dax0.0, got {self.dax!r}")
            return
        if not self.nodes:
            raise ValueError("name at least one NUMA node, or a dax device")
        if wrong := [node for node in self.nodes if not 0 <= node < MOST_NODES]:
            raise ValueError(f"a NUMA node is a number from 0 to {MOST_NODES - 1}, got {wrong[0]}")
        if len(set(self.nodes)) < len(self.nodes):
            raise ValueError(f"each NUMA node is named once, got {list(self.nodes)}")
        if self.policy.shares_out and len(self.nodes) < 2:
            raise ValueError(
                f"{self.policy.value} needs two nodes or more, got {self.nodes[0]} alone: name another, or "
                f"write {self.nodes[0]} without a policy"
            )

    def __str__(self) -> str:
        if self.dax is not None:
            return self.dax
        nodes = ",".join(map(str, self.nodes))
        usual = Policy.PREFERRED if len(self.nodes) == 1 else Policy.INTERLEAVE
        return nodes if self.policy is usual else f"{self.policy.value}:{nodes}"


def parse_place(text: str) -> MemoryPlace:
    """Read ``NODES``, ``POLICY:NODES`` or ``/dev/daxX.Y``; nodes are numbers with commas between.

    Without a policy one node is preferred and several are interleaved.

    Raises:
        ValueError: naming the text, what is wrong with it and how to write it.
    """
    if text.startswith("/"):
        return MemoryPlace(dax=text)
    word, _, numbers = text.rpartition(":")
    nodes = numbers.split(",")
    if not all(re.fullmatch(r"[0-9]{1,9}", node) for node in nodes):
        raise ValueError(
            f"cannot read {text!r} as a place of memory: write a NUMA node such as '1', several such as "
            "'1,2' or 'weighted_interleave:1,2', or a device such as '/dev/dax0.0'"
        )
    try:
        policy = Policy(word) if word else Policy.PREFERRED if len(nodes) == 1 else Policy.INTERLEAVE
    except ValueError:
        known = ", ".join(policy.value for policy in Policy)
        raise ValueError(f"{word!r} in {text!r} is no policy: use one of {known}") from None
    return MemoryPlace(nodes=tuple(map(int, nodes)), policy=policy)
