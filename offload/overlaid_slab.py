"""One slab for what is never in use at the same time, where the plan has it share addresses.

What passes use lies at the low end: the rings through which bytes come and go, then blocks' places in the
blocks' order, which forward fills upwards and backward leaves downwards. Gradients that stay lie in the
order in which backward makes them from the high end down. So places and gradients are stacks that grow
towards each other, without gaps (``Staging.overlaid_bytes``). When the last gradient is there all below them
is free: the ring of an update that comes then begins at the low end too (``Staging.update_overlaid_bytes``).
The slab is as long as the most that is there at one time. Rings that share nothing have their own memory.

A loop may do otherwise: hold a graph beyond its backward, or gradients beyond the next forward. So nobody is
given a place before everybody who has bytes of it has left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from memtrain.offload.slab import Slab
from memtrain.planner.plan import Staging


class OverlayWarning(RuntimeWarning):
    """A loop holds gradients, or graphs, for longer than the plan has room for them."""


@dataclass(slots=True, eq=False)
class _Tenant:
    begin: int
    end: int
    in_use: Callable[[], bool]
    leave: Callable[[], bool]

    def overlaps(self, begin: int, end: int) -> bool:
        return self.begin < end and begin < self.end


def _never() -> bool:
    return False


class OverlaidSlab:
    """The memory, and who may be in it.

    Args:
        staging: the plan's slabs and rings, some of which overlap.
        held_passes: between their forward and their backward at one time; each has places of its own.

    Attributes:
        gradient_ring_offsets, saved_offsets, input_offsets, update_offsets: of each slot; None where the
            rings have memory of their own.
        kept_offsets: of each block's places, one for every pass that is held.
        has_gradients: whether gradients that stay lie at the high end.
    """

    def __init__(self, staging: Staging, held_passes: int = 1) -> None:
        end = 0

        def line(count: int, nbytes: int) -> list[int]:
            nonlocal end
            begin, end = end, end + count * nbytes
            return list(range(begin, end, nbytes)) if nbytes else [begin] * count

        self.update_offsets: list[int] | None = None
        self.gradient_ring_offsets: list[int] | None = None
        self.saved_offsets: list[int] | None = None
        self.input_offsets: list[int] | None = None
        if staging.update_overlaid_bytes:
            self.update_offsets = line(staging.update_slots, staging.update_slot_bytes)
            end = 0
            self.gradient_ring_offsets = line(staging.gradient_slots, staging.gradient_slot_bytes)
            self.saved_offsets = line(staging.saved_slots, staging.saved_slot_bytes)
            self.input_offsets = line(staging.input_slots, staging.input_slot_bytes)
        self.kept_offsets = [line(held_passes, nbytes) for nbytes in staging.kept_bytes]
        self.has_gradients = staging.overlaid_bytes > 0
        if self.has_gradients:
            end += staging.gradient_slab_bytes - staging.overlaid_bytes
        if staging.update_overlaid_bytes:
            end += staging.update_ring_bytes - staging.update_overlaid_bytes
        self.slab = Slab(end)
        self.slab.populate()
        self._tenants: list[_Tenant] = []

    def let(
        self, begin: int, nbytes: int, in_use: Callable[[], bool], leave: Callable[[], bool] = _never
    ) -> Callable[[], bool]:
        """Say who may use ``nbytes`` from ``begin`` on.

        Args:
            in_use: whether the tenant has the place now.
            leave: asks it to go, as far as it can; whether it has gone.

        Returns:
            Whether any of it is another tenant's now.
        """
        mine = _Tenant(begin, begin + nbytes, in_use, leave)
        self._tenants.append(mine)
        others: list[_Tenant] = []
        known = 0

        def is_taken() -> bool:
            nonlocal known
            later = self._tenants[known:]
            others.extend(t for t in later if t is not mine and t.overlaps(mine.begin, mine.end))
            known = len(self._tenants)
            return any(other.in_use() for other in others)

        return is_taken

    def clear(self, begin: int, nbytes: int, for_whom: Callable[[], bool]) -> bool:
        """Ask all others to leave ``nbytes`` from ``begin`` on; whether they have.

        Args:
            for_whom: the ``in_use`` of the tenant who wants it.

        Raises:
            OffloadError: a transfer failed that somebody had under way there.
        """
        return all(
            not tenant.in_use() or tenant.leave()
            for tenant in self._tenants
            if tenant.overlaps(begin, begin + nbytes) and tenant.in_use is not for_whom
        )

    def close(self) -> None:
        """Let go of the memory and of all tenants; tensors that lie there keep it until they die."""
        for tenant in self._tenants:
            tenant.in_use = tenant.leave = _never
        self.slab.close()
