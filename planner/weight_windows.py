"""Weights that live on a tier: which uses of a step find them in a window, and which wait for a read.

A unit whose weights are away has them on the device only while something uses it. A step's uses follow one
another in a known order, *turns*: every unit's forward, the backward passes in reverse and, where updates do
not run ahead, the updates. The windows hold the units that were used last. So the last units are still there
when backward turns round, the first ones when the next forward begins, and those are not read.

Of ``n`` windows one holds what is used and the others are read ahead into. So the read for a turn begins when
all turns are over but the last ``n - 1`` that use weights before it. An update that makes weights anew from
masters takes a window without a read: at a turn of its own, or at the first forward that it runs ahead of.

Windows have one size or two. A model's units are blocks, mostly alike, and tables around them which can be
many times as large. With two sizes the tables have one window (two, where they come in tiles), which is
theirs alone, and the blocks have the others: each size is a cache of its own, and all that is said above
holds of each; but nothing is read before what is used before it, so a table comes when it is one of the next
``n - 1`` units of any size. More than two sizes would not take less memory: only what follows one another
closely needs several windows, and whatever else is larger can share the one large window, whatever is smaller
the small ones. What shares it is never used one right after the other (``ordinary_bytes``), so the next can
come while blocks are used.

A *tiled* unit never is in memory as a whole. Its tiles go through the windows one after the other, at every
pass over them, and what others had left there is gone afterwards. Each goes through the smallest windows that
hold it: those of its largest tile, where the unit's reads are counted, and the smaller ones where its
smallest piece fits these. A turn with two passes (the epilogue's forward and backward; a block that is
computed again before its backward) reads it twice. Beside the tile that is used there is one window of the
same size for the rest of its unit, or the next tile. To the queues it is one read ahead of the turn: tiles
are really read while their turn runs, behind each other, so that a pipeline of several turns takes as long.

Index letters: ``u`` unit, ``n`` windows.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from memtrain.planner.actions import MicroBatchOrder, StateDecision, Tier, UpdateSchedule
from memtrain.planner.plan import WindowClass
from memtrain.planner.profile import ModelProfile, UnitProfile


@dataclass(frozen=True, slots=True)
class WantedWindows:
    """Windows to be made where any weights are away."""

    slots: int
    """In all."""
    sized: bool
    """One of them, or two where such units are in tiles, as large as the largest unit and the others as the
    largest ordinary one, where units of both kinds are away; False: all of them as large as the largest."""


MOST_ALIKE = 4
"""Of one size: beyond it nothing was gained in simulation."""
WANTED_WINDOWS = tuple(
    [WantedWindows(slots, sized=False) for slots in range(2, MOST_ALIKE + 1)]
    + [WantedWindows(slots, sized=True) for slots in (2, 3, 4, 5)]
)
"""Two are the least: one is used while the next arrives."""
DEFAULT_WINDOWS = WantedWindows(3, sized=True)
FEWEST_WINDOWS = WantedWindows(2, sized=True)
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


def wanted_of(windows: Sequence[WindowClass]) -> WantedWindows | None:
    """What was wanted where these have been made; None where there are none."""
    return WantedWindows(sum(each.slots for each in windows), len(windows) > 1) if windows else None


def ordinary_bytes(profile: ModelProfile) -> int:
    """Of the largest unit that is no large one: the least size above which units are never used together, nor
    one right after another in a forward. 0 where no weights may leave."""
    forward = _pass(profile, [unit.weight_extent_bytes > 0 for unit in profile.units])
    sizes = sorted({unit.largest_window_bytes for unit in profile.units} - {0})
    for size in sizes:
        large = [{u for u in turn if profile.units[u].largest_window_bytes > size} for turn in forward]
        if all(len(one | following) <= 1 for one, following in itertools.pairwise(large)):
            return size
    return 0


def weight_windows(
    profile: ModelProfile, states: Sequence[StateDecision], wanted: WantedWindows
) -> tuple[WindowClass, ...]:
    """Windows, the smallest first: of each size no more than units take turns, no fewer than a turn needs,
    and two where there is one size."""
    away = [is_away(decision) for decision in states]
    sizes = [unit.largest_window_bytes for unit, gone in zip(profile.units, away, strict=True) if gone]
    if not sizes:
        return ()
    ordinary = ordinary_bytes(profile) if wanted.sized else max(sizes)
    small = [size for size in sizes if size <= ordinary]
    turns = _pass(profile, away)

    def at_once(above: int, most: int) -> int:
        return max(
            _at_once(profile, [u for u in turn if _goes_through(profile.units[u], above, most)])
            for turn in turns
        )

    if len(small) in (0, len(sizes)):
        count = max(min(wanted.slots, MOST_ALIKE, len(sizes)), at_once(-1, max(sizes)), 2)
        return (WindowClass(slots=count, slot_bytes=max(sizes)),)
    large = at_once(max(small), max(sizes))
    count = max(min(wanted.slots - large, len(small)), at_once(-1, max(small)))
    return (
        WindowClass(slots=count, slot_bytes=max(small)),
        WindowClass(slots=large, slot_bytes=max(sizes)),
    )


def _goes_through(unit: UnitProfile, above: int, most: int) -> bool:
    """Whether any of the unit comes into windows of ``most`` bytes, the next smaller ones of ``above``."""
    return unit.smallest_window_bytes <= most and unit.largest_window_bytes > above


def _at_once(profile: ModelProfile, turn: Sequence[int]) -> int:
    """Windows that a turn needs: of tiled units one for what is no tile, and one for the tile in use."""
    return len(turn) + any(profile.units[unit].tiled for unit in turn)


@dataclass(frozen=True, slots=True)
class Read:
    """A unit that is not in a window when its turn comes."""

    unit: int
    begins_after: int | None
    """The turn that must be over before it is read; None: the read begins with the step."""
    evicts: tuple[int, ...]
    """Units that give way to it: what they have to write is written first."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One use of weights in a step, or of none."""

    reads: tuple[Read, ...]
    """Of units that are not in a window; of a tiled one once for each pass over its tiles."""
    evicts: tuple[int, ...]
    """Units that give way, to a read or to weights that are made anew."""


def step_turns(
    profile: ModelProfile,
    states: Sequence[StateDecision],
    schedule: UpdateSchedule,
    windows: Sequence[WindowClass],
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
    reads: list[list[Read]] = [[] for _ in uses]
    evicts: list[list[int]] = [[] for _ in uses]
    above, together = 0, sum(each.slots for each in windows)
    tiled = {index for index, unit in enumerate(profile.units) if unit.tiled}
    anew = set(_made_anew(profile, uses, passes=len(passes), schedule=schedule))
    for each in windows:  # which share nothing
        through = {u for u, unit in enumerate(profile.units) if _goes_through(unit, above, each.slot_bytes)}
        read_here = {u for u in through if profile.units[u].largest_window_bytes <= each.slot_bytes}
        own = [tuple(u for u in units if u in through) for units in uses]
        found = _Windows(each.slots, tiled)
        for units in own:  # the step before: it leaves in the windows what this one finds there
            found.use(units)
        for index, units in enumerate(own):
            gone, evicted = found.use(units)
            gone = tuple(unit for unit in gone if unit in read_here)
            missing = tuple(unit for unit in gone if (index, unit) not in anew)
            if index < len(passes) and twice[index]:
                missing = (*missing, *(unit for unit in gone if unit in tiled))
            begins = None
            if missing:
                room = (own, each.slots), (uses, together)
                ends = [_begins_after(turns, index, slots, missing) for turns, slots in room]
                begins = max((end for end in ends if end is not None), default=None)
            if not tiled.isdisjoint(missing):  # and what they turned out of smaller windows
                evicted = (*evicts[index], *evicted)
            reads[index] += [Read(unit, begins, evicted) for unit in missing]
            evicts[index] = list(dict.fromkeys((*evicts[index], *evicted)))
        above = each.slot_bytes
    return [Turn(reads=tuple(r), evicts=tuple(e)) for r, e in zip(reads, evicts, strict=True)]


def _made_anew(
    profile: ModelProfile, uses: Sequence[tuple[int, ...]], *, passes: int, schedule: UpdateSchedule
) -> Iterator[tuple[int, int]]:
    """Turns and units whose update writes all weights and reads none, before anything else uses them there.

    Args:
        passes: turns in ``uses`` that are of forward or backward passes; behind them are updates.
    """
    seen: set[int] = set()
    for index, units in enumerate(uses):
        for unit in units:
            first = schedule is UpdateSchedule.AHEAD and unit not in seen
            if profile.units[unit].overwritten and (first or index >= passes):
                yield index, unit
        seen.update(units)


class _Windows:
    """Units that are in windows of one size, the one that was not used for longest first."""

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
    forward = _pass(profile, [is_away(decision) for decision in states])
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


def _pass(profile: ModelProfile, away: Sequence[bool]) -> list[tuple[int, ...]]:
    """The units that are away, by turns of a forward: prologue, every block, epilogue."""
    by_name = {unit.name: index for index, unit in enumerate(profile.units)}
    places: dict[int, list[int]] = {place: [] for place in (-1, *range(len(profile.blocks)), BEYOND)}
    for index, unit in enumerate(profile.units):
        places[place_of(unit)] += [index, *(by_name[name] for name in unit.borrows)]
    return [tuple(dict.fromkeys(index for index in places[place] if away[index])) for place in sorted(places)]
