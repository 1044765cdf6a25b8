"""What a plan must obey, and the word for what does not."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Rule(str, Enum):
    """What a plan must obey."""

    PROFILE_DIGEST = "made for another profile"
    MACHINE_DIGEST = "made for another machine"
    MICRO_BATCHES = "another number of micro-batches"
    ORDER = "vertical order only where there is something to order"
    BLOCK_DECIDED_ONCE = "every block decided exactly once"
    UNIT_DECIDED_ONCE = "every unit decided exactly once"
    TIER_EXISTS = "only tiers that machine and budget have"
    RECOMPUTABLE = "recompute, and other forms, only where they are possible"
    ERROR_BUDGET = "what lossy forms lose is what the plan says, and within its error budget"
    MOVABLE = "weights leave the device only where they may"
    STAGING = "staging slots large enough and present"
    BILL = "the bill sums to the peaks and covers every byte"
    DEVICE_PEAK = "the device's peak is what the decisions need"
    TIER_PEAK = "a tier's peak is what the decisions put there"
    CAPACITY = "no tier above its budget"
    PREPARING = "loading and measuring the model stayed inside the budget"
    OVERLAP = "one resource does one thing at a time"
    DEPENDENCY = "nothing starts before what it needs"
    DURATION = "nothing is faster than profile and links allow"
    WINDOWS = "no more units of weights in memory than there are windows of their size"
    BYTES_MOVED = "bytes moved are those of the decisions"
    STEP_SECONDS = "the step ends with its last event"
    GAP = "bound, gap and status agree"


@dataclass(frozen=True, kw_only=True, slots=True)
class Violation:
    """A rule that does not hold, and the numbers."""

    rule: Rule
    detail: str


Fault = tuple[Rule, str]
"""A rule that does not hold, and the numbers, before ``check`` makes a ``Violation`` of it."""
