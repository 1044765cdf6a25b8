"""Weights that live on a tier: which uses of a step find them in a window, and which wait for a read.

A unit whose weights are away has them on the device only while something uses it. A step's uses follow one
another in a known order, *turns*: every unit's forward, the backward passes in reverse and, where updates do
not run ahead, the updates. The windows hold the units that were used last. So the last units are still there
when backward turns round, the first ones when the next forward begins, and those are not read.

Of ``n`` windows one holds what is used and the others are read ahead into. So the read for a turn begins when
all turns are over but the last ``n - 1`` that use weights before it. An update that makes weights anew from
masters takes a window without a read.

A *tiled* unit never is in memory as a whole. Its tiles go through the windows one after the other, at every
pass over them, and what others had left there is gone afterwards. A turn with two passes (the epilogue's
forward and backward; a block that is computed again before its backward) reads it twice. Beside the tile that
is used there is one window for the rest of its unit. To the queues it is one read ahead of the turn: tiles
are really read while their turn runs, behind each other, so that a pipeline of several turns takes as long.

Index letters: ``u`` unit, ``n`` windows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from memtrain.planner.actions import MicroBatchOrder, StateDecision, Tier, UpdateSchedule
from memtrain.planner.profile import ModelProfile, UnitProfile

WEIGHT_SLOT_COUNTS = (2, 3, 4)
"""Two is the least: one is used while the next arrives. Beyond four nothing was gained in simulation."""
DEFAULT_WEIGHT_SLOTS = 3
BEYOND = 1 << 30
"""The place of the epilogue: after every block."""


def place_of(unit: UnitProfile) -> int:
    """Where forward needs the unit: its block's index, -1 before the blocks, ``BEYOND`` after them."""
    if unit.block is not None:
        return unit.block
    return BEYOND if unit.name == "epilogue" else -1


def is_away(decision: StateDecision) -> bool:
    """Whether the weights of a unit take turns in windows."""
    return decision.weight_tier is not Tier.DEVICE


def away_bytes(profile: ModelProfile, states: Sequence[StateDecision]) -> int:
    """Of ``profile.weight_bytes`` what is not there all the time."""
    decided = zip(profile.units, states, strict=True)
    return sum(unit.movable_weight_bytes for unit, decision in decided if is_away(decision))


def weight_slots(profile: ModelProfile, states: Sequence[StateDecision], wanted: int) -> tuple[int, int]:
    """Windows, and bytes of each: no more than units take turns, no fewer than two and what a turn needs."""
    units = {i: u for i, u in enumerate(profile.units) if is_away(states[i])}
    if not units:
        return 0, 0
    together = max(_at_once(profile, turn) for turn in _pass(profile, states))
    count = max(min(wanted, len(units)), together, WEIGHT_SLOT_COUNTS[0])
    return count, max(unit.largest_window_bytes for unit in units.values())


def _at_once(profile: ModelProfile, turn: Sequence[int]) -> int:
    """Windows that a turn needs: of tiled units one for what is no tile, and one for the tile in use."""
    return len(turn) + any(profile.units[unit].tiled for unit in turn)


@dataclass(frozen=True, slots=True)
class Turn:
    """One use of weights in a step, or of none."""

    reads: tuple[int, ...]
    """Units that are not in a window; a tiled one once for each pass over its tiles."""
    begins_after: int | None
    """The turn that must be over before they are read; None: the reads begin with the step."""
    evicts: tuple[int, ...]
    """Units that give way: what they have to write is written first."""


def step_turns(
    profile: ModelProfile,
    states: Sequence[StateDecision],
    schedule: UpdateSchedule,
    slots: int,
    order: MicroBatchOrder = MicroBatchOrder.HORIZONTAL,
    recomputed: Collection[int] = (),
) -> list[Turn]:
    """The turns of one step among many: per micro-batch prologue, blocks and epilogue, the blocks backward,
    and the prologue; then, under SEQUENTIAL, the update of every unit in order. In vertical order each of
    them comes as often as there are micro-batches before the next one.

    Args:
        recomputed: blocks whose forward runs again before their backward.
    """
    passes = list(_passes(profile, states, order))
    twice = list(_run_twice(profile, order, recomputed))
    uses = [*passes, *_updates(profile, states, schedule)]
    found = _Windows(slots, {index for index, unit in enumerate(profile.units) if unit.tiled})
    for units in uses:  # the step before: it leaves in the windows what this one finds there
        found.use(units)
    turns = []
    for index, units in enumerate(uses):
        missing, evicted = found.use(units)
        if index >= len(passes) and all(profile.units[unit].overwritten for unit in missing):
            missing = ()
        if index < len(passes) and twice[index]:
            missing = (*missing, *(unit for unit in missing if profile.units[unit].tiled))
        begins = _begins_after(uses, index, slots, missing) if missing else None
        turns.append(Turn(reads=missing, begins_after=begins, evicts=evicted))
    return turns


class _Windows:
    """Units that are in a window, the one that was not used for longest first."""

    def __init__(self, slots: int, tiled: Collection[int]) -> None:
        self._slots, self._tiled = slots, tiled
        self._present: OrderedDict[int, None] = OrderedDict()
        self._overwritten: set[int] = set()
        """Of those whose window tiles have been in: what they had to write may still be under way."""

    def use(self, units: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Units that must be read, and those that give way."""
        missing: list[int] = []
        evicted: list[int] = []
        for unit in units:
            if unit in self._tiled:  # its tiles take every window in turn
                self._overwritten.update(self._present)
            if unit in self._overwritten:  # and gives way to itself
                evicted.append(unit)
            if unit not in self._present or unit in self._overwritten:
                missing.append(unit)
                self._present[unit] = None
                self._overwritten.discard(unit)
            self._present.move_to_end(unit)
            if len(self._present) > self._slots:
                evicted.append(self._present.popitem(last=False)[0])
                self._overwritten.discard(evicted[-1])
        return tuple(missing), tuple(evicted)


def _begins_after(
    uses: list[tuple[int, ...]], index: int, slots: int, missing: tuple[int, ...]
) -> int | None:
    """The last turn that must be over: the turns behind it have room in the windows together, and none of
    them uses what is to be read again, behind the tiles of another unit."""
    held = set(uses[index])
    for before in reversed(range(index)):
        held.update(uses[before])
        if uses[before] and (len(held) > slots or not set(missing).isdisjoint(uses[before])):
            return before
    return None


def _passes(
    profile: ModelProfile, states: Sequence[StateDecision], order: MicroBatchOrder
) -> Iterator[tuple[int, ...]]:
    """The units that are away and used, turn by turn."""
    forward = _pass(profile, states)
    one = [*forward, *forward[-2::-1]]  # the epilogue's forward and backward are one turn
    together = profile.micro_batches if order is MicroBatchOrder.VERTICAL else 1
    for _ in range(profile.micro_batches // together):
        for units in one:
            yield from [units] * together


def _run_twice(profile: ModelProfile, order: MicroBatchOrder, recomputed: Collection[int]) -> Iterator[bool]:
    """For each turn of ``_passes`` whether it goes over its weights twice."""
    blocks = len(profile.blocks)
    one = (
        [False] * (1 + blocks) + [True] + [block in recomputed for block in reversed(range(blocks))] + [False]
    )
    together = profile.micro_batches if order is MicroBatchOrder.VERTICAL else 1
    for _ in range(profile.micro_batches // together):
        for twice in one:
            yield from [twice] * together


def _updates(
    profile: ModelProfile, states: Sequence[StateDecision], schedule: UpdateSchedule
) -> Iterator[tuple[int, ...]]:
    """The same of updates that have turns of their own."""
    if schedule is UpdateSchedule.SEQUENTIAL:
        for index, unit in enumerate(profile.units):
            updated = is_away(states[index]) and unit.written_extent_bytes > 0
            yield (index,) if updated else ()


def _pass(profile: ModelProfile, states: Sequence[StateDecision]) -> list[tuple[int, ...]]:
    """The turns of a forward: prologue, every block, epilogue."""
    by_name = {unit.name: index for index, unit in enumerate(profile.units)}
    places: dict[int, list[int]] = {place: [] for place in (-1, *range(len(profile.blocks)), BEYOND)}
    for index, unit in enumerate(profile.units):
        places[place_of(unit)] += [index, *(by_name[name] for name in unit.borrows)]
    return [
        tuple(dict.fromkeys(index for index in places[place] if is_away(states[index])))
        for place in sorted(places)
    ]
