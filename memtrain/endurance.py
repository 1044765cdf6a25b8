"""What a run writes to its tiers, against the least that it could, and how long a disk lasts at that rate.

A solid-state disk is worn by what is written to it; its data sheet says how much that may be in all (TBW,
terabytes written, 1 TB = 1e12 bytes). What a step writes is counted where it is given to a tier, by what it
is of, beside the bytes of what had changed and so had to be written. The kernel's own count of this process
(``/proc/self/io``) stands beside both; what the disk's controller makes of it nobody here can see.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from memtrain.offload.contents import Content
from memtrain.planner.actions import Tier
from memtrain.planner.plan import Plan

if TYPE_CHECKING:
    from memtrain.offload.activations import ActivationExecutor
    from memtrain.offload.engine import Engine
    from memtrain.offload.optimizer import OffloadedOptimizer
    from memtrain.sparse_tables import SparseTables

_DAY_SECONDS = 86_400
_YEAR_DAYS = 365.25
_ENDURANCE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([TP])BW?\s*$", re.IGNORECASE)
_FACTORS = {"T": 10**12, "P": 10**15}


def parse_endurance(text: str) -> int:
    """``"600 TBW"`` or ``"1.2 PBW"``, as data sheets have it, in bytes.

    Raises:
        ValueError: it is something else, or nothing at all.
    """
    match = _ENDURANCE.match(text)
    size = 0 if match is None else round(float(match.group(1)) * _FACTORS[match.group(2).upper()])
    if not size:
        raise ValueError(
            f"endurance is {text!r}: write what the disk's data sheet says may be written to it in all, such "
            "as '600 TBW' or '1.2 PBW'"
        )
    return size


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What a step writes of one class of bytes to one tier, on average."""

    tier: str
    content: str
    written_bytes: float
    """Given to the tier; coded, where the tier has a codec."""
    changed_bytes: float
    """Of what had changed: the least that plain writing can do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Mark:
    """Counters at the end of a step."""

    written: dict[tuple[Tier, Content], int]
    changed: dict[tuple[Tier, Content], int]
    process_bytes: int | None


class WriteMeter:
    """Looks at the counters of a session's parts when a step ends.

    Between the ends of the first and the last step lies what the steps write, and nothing of setting up. An
    update that runs ahead of the next forward pass counts there.
    """

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        optimizer: OffloadedOptimizer,
        activations: ActivationExecutor,
        tables: SparseTables | None = None,
    ) -> None:
        self._tables = tables
        self._engine, self._optimizer, self._activations = engine, optimizer, activations
        self._weight_tiers = {state.unit: state.weight_tier for state in plan.states}
        self._marks: list[_Mark] = []
        """Of the first step's end and the latest's."""
        self._steps = 0
        """Between them."""

    def note_step(self) -> None:
        """A step has ended."""
        if self._marks:
            self._steps += 1
        self._marks[1:] = [self._look()]

    def per_step(self) -> tuple[Written, ...]:
        """By tier and class; empty before the second step has ended."""
        if not self._steps:
            return ()
        first, last = self._marks[0], self._marks[-1]
        found = []
        for key in last.written:
            written = last.written[key] - first.written[key]
            changed = last.changed.get(key, 0) - first.changed.get(key, 0)
            if written or changed:
                found.append(
                    Written(
                        tier=key[0].value,
                        content=key[1].value,
                        written_bytes=written / self._steps,
                        changed_bytes=changed / self._steps,
                    )
                )
        return tuple(found)

    def process_bytes_per_step(self) -> float | None:
        """What the kernel counts of the process: checkpoints and logs too. None: it does not say, or there
        is no second step yet."""
        if not self._steps:
            return None
        first, last = self._marks[0].process_bytes, self._marks[-1].process_bytes
        return None if first is None or last is None else (last - first) / self._steps

    def _look(self) -> _Mark:
        changed: dict[tuple[Tier, Content], int] = {}
        counters = (
            (Content.STATE, self._optimizer.records.changed_bytes),
            (Content.GRADIENTS, self._optimizer.gradients.changed_bytes),
            (Content.ACTIVATIONS, self._activations.changed_bytes),
        )
        for content, by_tier in counters:
            for tier, size in by_tier.items():
                changed[tier, content] = size
        for unit, size in self._optimizer.records.changed_weight_bytes.items():
            key = self._weight_tiers[unit], Content.WEIGHTS
            changed[key] = changed.get(key, 0) + size
        if self._tables is not None:
            tier = self._tables.store.tier
            for content, size in self._tables.changed_bytes().items():
                changed[tier, content] = changed.get((tier, content), 0) + size
        written = {
            (tier, content): size
            for tier in self._engine.tiers
            for content, size in self._engine.store(tier).written_bytes().items()
        }
        return _Mark(written=written, changed=changed, process_bytes=process_written_bytes())


def process_written_bytes() -> int | None:
    """What this process has sent to storage so far, as the kernel counts; None where it does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    counts = dict(line.split(": ") for line in lines)
    return int(counts["write_bytes"]) if "write_bytes" in counts else None


def written_rows(written: Sequence[Written]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of what a step writes, in MB."""
    rows = []
    for one in written:
        ratio = f"{one.written_bytes / one.changed_bytes:.3f}" if one.changed_bytes else "-"
        rows.append(
            [
                f"{one.tier} {one.content}",
                f"{one.written_bytes / 1e6:.2f}",
                f"{one.changed_bytes / 1e6:.2f}",
                ratio,
            ]
        )
    return ["written per step (MB)", "written", "changed", "ratio"], rows


def endurance_facts(
    written: Sequence[Written],
    step_seconds: float,
    endurance_bytes: int | None,
    process_bytes_per_step: float | None,
) -> list[str]:
    """What the rate of writing means for the disk; nothing where nothing is written there.

    Args:
        step_seconds: measured.
        endurance_bytes: what may be written to the disk in all; None: not known.
        process_bytes_per_step: as ``WriteMeter`` has it.
    """
    tiers_bytes = sum(one.written_bytes for one in written if one.tier == Tier.NVME.value)
    if not tiers_bytes or not step_seconds:
        return []
    facts = []
    if process_bytes_per_step is not None:
        facts.append(
            f"the kernel counts {process_bytes_per_step / 1e6:.2f} MB written a step by this process, "
            f"checkpoints and logs too; {tiers_bytes / 1e6:.2f} MB of it to the nvme tier"
        )
    day_bytes = max(tiers_bytes, process_bytes_per_step or 0.0) / step_seconds * _DAY_SECONDS
    text = f"at {step_seconds:.2f} s a step {day_bytes / 1e12:.2f} TB a day"
    if endurance_bytes is None:
        facts.append(f"{text}; tiers.nvme.endurance (TBW, from the data sheet) says how long the disk lasts")
    else:
        facts.append(f"{text}: {endurance_bytes / 1e12:,.0f} TBW are {_span(endurance_bytes / day_bytes)}")
    return facts


def _span(days: float) -> str:
    years = days / _YEAR_DAYS
    return f"{years:.1f} years of training" if years >= 1 else f"{days:.0f} days of training"
