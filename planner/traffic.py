"""What a message between GPUs is: its bytes, how often it is sent, over which group, and its buffers.

Bytes are what one GPU *sends* (it receives as many), for ring algorithms: an all-gather or reduce-scatter
of B bytes over n ranks sends (n-1)/n B, an all-reduce twice that, an all-to-all of B local bytes (n-1)/n B
(Thakur et al., IJHPCA 2005). They are divided by an ``Interconnect``'s collective rate, which is measured the
same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from memtrain.planner.hardware import Interconnect, slower
from memtrain.planner.parallel import Group


class When(Enum):
    """How often one item of traffic is sent."""

    BLOCK_FORWARD = "block forward"
    """By every block in every micro-batch's forward pass, and again in each recomputation of it."""
    BLOCK_BACKWARD = "block backward"
    STAGE_FORWARD = "stage forward"
    """By a pipeline stage in every micro-batch."""
    STAGE_BACKWARD = "stage backward"
    STEP = "step"


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """One kind of message of one GPU."""

    name: str
    group: Group
    when: When
    count: int
    """Messages each time."""
    sent_bytes: float
    """By one GPU in all ``count`` messages."""
    buffer_bytes: float
    """Memory that exists only for them, at once."""
    overlaps: bool
    """Whether arithmetic that does not need the result can run meanwhile."""
    to_neighbour: bool = False
    """To one rank and from another; otherwise a collective of the whole group."""

    def seconds(self, link: Interconnect) -> float:
        """Time on ``link``, hidden or not.

        A neighbour is reached over one link where a collective uses all (MI300X), and never faster than a
        collective, whose ranks send and receive at once as well.
        """
        rate = link.collective_bytes_per_second
        if self.to_neighbour:
            rate = slower(rate, link.peer_bytes_per_second)
        return self.sent_bytes / rate.value
