"""One slab for activations that stay and for gradients that stay, where the plan has them share addresses.

Blocks' places lie in the blocks' order from the low end up: forward fills them upwards, backward leaves them
downwards. Gradients lie in the order in which backward makes them from the high end down. So both are stacks
that grow towards each other, without gaps, and the slab is as long as the most that is there at one time
(``Staging.overlaid_bytes``).

A loop may do otherwise: hold a graph beyond its backward, or gradients beyond the next forward. So nobody is
given a place before everybody who has bytes of it has left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from memtrain.offload.slab import Slab


class OverlaidSlab:
    """The memory, and who may be in it.

    Args:
        kept_bytes: of each block's place.
        gradient_bytes: of all gradients together.
        overlaid_bytes: of both, how many they share.
    """

    def __init__(self, kept_bytes: Sequence[int], gradient_bytes: int, overlaid_bytes: int) -> None:
        self.slab = Slab(sum(kept_bytes) + gradient_bytes - overlaid_bytes)
        self.kept_offsets = list(accumulate(kept_bytes, initial=0))[:-1]
        """Of each block's place."""
        self._tenants: list[tuple[int, int, Callable[[], bool]]] = []

    def let(self, begin: int, nbytes: int, in_use: Callable[[], bool]) -> Callable[[], bool]:
        """Say who may use ``nbytes`` from ``begin`` on.

        Args:
            in_use: whether the tenant has the place now.

        Returns:
            Whether any of it is another tenant's now.
        """
        end = begin + nbytes
        self._tenants.append((begin, end, in_use))
        others: list[Callable[[], bool]] = []
        known = 0

        def is_taken() -> bool:
            nonlocal known
            for start, stop, used in self._tenants[known:]:
                if start < end and begin < stop and used is not in_use:
                    others.append(used)
            known = len(self._tenants)
            return any(used() for used in others)

        return is_taken
