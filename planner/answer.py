"""What the solver's process sends back: in a file without PuLP, which must not be loaded to read it.

PuLP and HiGHS are 5 MiB of the process that is to train.
"""

from __future__ import annotations

from dataclasses import dataclass

from memtrain.planner.actions import BlockDecision, StateDecision
from memtrain.planner.weight_windows import WantedWindows


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What HiGHS proved and found for one schedule."""

    bound_seconds: float
    """No plan with this schedule takes less; ``inf`` if none exists, 0 if nothing was proved."""
    blocks: tuple[BlockDecision, ...] = ()
    """Empty when no choice was found."""
    states: tuple[StateDecision, ...] = ()
    knobs: tuple[int, int, WantedWindows | None, int] = (0, 0, None, 0)
    """saved_slots, input_slots, windows for weights, shard_elements."""
