"""Why a block is planned as it is: what every other choice would cost, simulated, one change at a time.

For each class of saved tensors of one block: what its chunks weigh and what an action costs by itself
(seconds of recompute, seconds on each link), and then the step, simulated again, with one chunk or all chunks
moved to each other action and nothing else changed. Likewise for the pieces of each class of state and their
places. A change may be impossible for lack of bytes; the rows it breaks are named, and so is what binds the
plan itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from memtrain.planner.ranges.choices import Action, Kind, codec_of, stored_bytes
from memtrain.planner.ranges.formulate import Decisions, Formulated, formulate
from memtrain.planner.ranges.model import DEVICE, Problem, TensorClass
from memtrain.planner.ranges.plan import BlockPlan, RangePlan
from memtrain.planner.ranges.schedule import COMPUTE
from memtrain.planner.ranges.simulate import Timeline, simulate, step_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class ActionCost:
    """One action for all chunks of a class, by itself: nothing overlapped."""

    action: str
    arithmetic_seconds: float
    """Recompute, or compress and decompress."""
    transfer_seconds: tuple[tuple[str, float], ...]
    """By queue, such as ``write:host``."""
    device_bytes: int
    """Held on the device from forward to backward, outside slots."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbour:
    """The plan with some chunks of one class under another action."""

    tensor: str
    chunks: int
    action_before: str
    action_after: str
    step_seconds: float
    added_seconds: float
    """To the plan's step; negative where the change alone would be faster."""
    broken: tuple[tuple[str, float], ...]
    """Rows that no longer hold, with what they lack: empty where the change fits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassReport:
    """One class of the block."""

    tensor: str
    total_bytes: int
    chunks: int
    planned: tuple[tuple[str, int], ...]
    """Chunks by action."""
    costs: tuple[ActionCost, ...]
    neighbours: tuple[Neighbour, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class StateReport:
    """One class of the block's state, under one way to update."""

    state: str
    update: str
    piece_bytes: int
    planned: tuple[tuple[str, int], ...]
    """Pieces by place."""
    neighbours: tuple[Neighbour, ...]
    """``tensor`` is the class of state, ``chunks`` are pieces, actions are places."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Binding:
    """A place that is full, and when: less is left than the largest class of one block takes."""

    place: str
    position: str
    size_bytes: int
    capacity_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Explanation:
    """All of the above for one block."""

    block: str
    forward_seconds: float
    backward_seconds: float
    waits: tuple[tuple[str, float], ...]
    """Seconds that the device stood idle before the block's forward and backward, by part of the step."""
    busy: tuple[tuple[str, float], ...]
    """Of the step, the share that each queue was busy."""
    binding: tuple[Binding, ...]
    classes: tuple[ClassReport, ...]
    states: tuple[StateReport, ...]


def explain(problem: Problem, plan: RangePlan, block: str) -> Explanation:
    """Why ``block`` (its name, its number, or an unmistakable end of its name) is planned as it is.

    Raises:
        ValueError: no block is called so, or several are.
    """
    formulated = formulate(problem)
    decisions = decisions_of(formulated, plan)
    timeline = simulate(formulated, decisions)
    index = find_block(problem, block)
    chosen = problem.blocks[index]
    return Explanation(
        block=chosen.name,
        forward_seconds=chosen.forward_seconds,
        backward_seconds=chosen.backward_seconds,
        waits=_waits(timeline, chosen.name),
        busy=_busy(timeline),
        binding=tuple(_binding(problem, timeline)),
        classes=tuple(
            _class_report(formulated, decisions, timeline.step_seconds, index, k)
            for k in range(len(chosen.classes))
        ),
        states=tuple(_state_reports(formulated, decisions, timeline.step_seconds, index)),
    )


def find_block(problem: Problem, text: str) -> int:
    """The number of the block that ``text`` names. Raises ValueError listing what there is."""
    names = [block.name for block in problem.blocks]
    if text in names:
        return names.index(text)
    ends = [index for index, name in enumerate(names) if name.endswith(f".{text}")]
    if len(ends) == 1:
        return ends[0]
    what = "could be several blocks" if ends else "is no block"
    some = ", ".join(names if len(names) <= 4 else [*names[:2], "...", *names[-2:]])
    raise ValueError(f"{text!r} {what} of this plan: its blocks are {some}")


def decisions_of(formulated: Formulated, plan: RangePlan) -> Decisions:
    """The decisions that ``plan`` was written from. Raises KeyError: it is another problem's plan."""
    counts: dict[int, int] = {}
    for index, block in enumerate(plan.blocks):
        _read_ranges(formulated, index, block, counts)
        _read_state(formulated, index, block, counts)
    return formulated.decisions(counts)


def _read_ranges(formulated: Formulated, index: int, block: BlockPlan, counts: dict[int, int]) -> None:
    tensors = formulated.problem.blocks[index].classes
    variables = {
        (tensor.name, action.label): variable
        for tensor, chosen in zip(tensors, formulated.choices.counts[index], strict=True)
        for action, variable in chosen.items()
    }
    for part in block.ranges:
        variable = variables[part.tensor, part.action]
        counts[variable] = counts.get(variable, 0) + part.stop - part.start


def _read_state(formulated: Formulated, index: int, block: BlockPlan, counts: dict[int, int]) -> None:
    updates = {update.label: variable for update, variable in formulated.states.updated[index].items()}
    for label, pieces in block.updates:
        counts[updates[label]] = pieces
    places = {
        (placed.state.name, placed.update.label, placed.place): variable
        for placed, variable in formulated.states.placed[index].items()
    }
    for held in block.held:
        counts[places[held.state, held.update, held.place]] = held.pieces


def _waits(timeline: Timeline, block: str) -> tuple[tuple[str, float], ...]:
    found = []
    free = [part.start_seconds for part in timeline.parts]
    for event in timeline.events:
        if event.resource != COMPUTE:
            continue
        for way in ("forward", "backward"):
            if event.name == f"{way} {block}":
                label = way if len(timeline.parts) == 1 else f"{way} ({timeline.parts[event.part].name})"
                found.append((label, event.start_seconds - free[event.part]))
        free[event.part] = event.end_seconds
    return tuple(found)


def _busy(timeline: Timeline) -> tuple[tuple[str, float], ...]:
    seconds: dict[str, float] = {}
    for event in timeline.events:
        took = (event.end_seconds - event.start_seconds) * timeline.parts[event.part].times
        seconds[event.resource] = seconds.get(event.resource, 0.0) + took
    step = timeline.step_seconds or 1.0
    return tuple((resource, busy / step) for resource, busy in seconds.items())


def _binding(problem: Problem, timeline: Timeline) -> Iterator[Binding]:
    largest = max((tensor.total_bytes for block in problem.blocks for tensor in block.classes), default=0)
    for peak in timeline.peaks:
        if peak.capacity_bytes - peak.size_bytes < largest:
            yield Binding(
                place=peak.place,
                position=peak.position,
                size_bytes=peak.size_bytes,
                capacity_bytes=peak.capacity_bytes,
            )


def _class_report(
    formulated: Formulated, decisions: Decisions, step: float, index: int, k: int
) -> ClassReport:
    problem = formulated.problem
    tensor = problem.blocks[index].classes[k]
    chosen = formulated.choices.counts[index][k]
    changes = _Changes(formulated, decisions, step)
    return ClassReport(
        tensor=tensor.name,
        total_bytes=tensor.total_bytes,
        chunks=tensor.chunks,
        planned=tuple((a.label, n) for a, v in chosen.items() if (n := changes.count(v))),
        costs=tuple(_cost(problem, tensor, action) for action in chosen),
        neighbours=tuple(changes.of(tensor.name, {a.label: v for a, v in chosen.items()})),
    )


def _state_reports(
    formulated: Formulated, decisions: Decisions, step: float, index: int
) -> Iterator[StateReport]:
    changes = _Changes(formulated, decisions, step)
    by_class: dict[tuple[str, str, int], dict[str, int]] = {}
    for placed, variable in formulated.states.placed[index].items():
        key = placed.state.name, placed.update.label, placed.state.piece_bytes
        by_class.setdefault(key, {})[placed.place] = variable
    for (state, update, size), places in by_class.items():
        planned = tuple((place, n) for place, v in places.items() if (n := changes.count(v)))
        if planned:
            yield StateReport(
                state=state,
                update=update,
                piece_bytes=size,
                planned=planned,
                neighbours=tuple(changes.of(state, places)),
            )


@dataclass(frozen=True, slots=True)
class _Changes:
    """Decisions with some of one count moved to another, simulated."""

    formulated: Formulated
    decisions: Decisions
    step: float

    def count(self, variable: int) -> int:
        """As planned."""
        return self.decisions[self.formulated.form.integers.index(variable)]

    def of(self, name: str, options: dict[str, int]) -> Iterator[Neighbour]:
        """One or all of every option that is used, moved to every other option."""
        for before, source in options.items():
            planned = self.count(source)
            for after, target in options.items() if planned else ():
                if after != before:
                    for moved in sorted({1, planned}):
                        yield self._neighbour(name, moved, (before, source), (after, target))

    def _neighbour(self, name: str, moved: int, before: tuple[str, int], after: tuple[str, int]) -> Neighbour:
        integers = self.formulated.form.integers
        changed = list(self.decisions)
        changed[integers.index(before[1])] -= moved
        changed[integers.index(after[1])] += moved
        seconds = step_seconds(self.formulated, changed)
        return Neighbour(
            tensor=name,
            chunks=moved,
            action_before=before[0],
            action_after=after[0],
            step_seconds=seconds,
            added_seconds=seconds - self.step,
            broken=tuple(self.formulated.excess(changed).items()),
        )


def _cost(problem: Problem, tensor: TensorClass, action: Action) -> ActionCost:
    arithmetic = 0.0
    if action.kind is Kind.RECOMPUTE:
        arithmetic = sum(tensor.recompute_seconds)
    elif action.codec:
        codec = codec_of(problem, action)
        both = 1 / codec.compress_bytes_per_second + 1 / codec.decompress_bytes_per_second
        arithmetic = tensor.total_bytes * both
    stored = stored_bytes(problem, tensor, action) * tensor.chunks
    transfers = []
    if action.place and action.place != DEVICE:
        rates = problem.rates()
        for hop in problem.machine.place(action.place).hops:
            for verb, rate in zip(("write", "read"), rates[hop], strict=True):
                transfers.append((f"{verb}:{hop.link}", stored / rate + hop.latency_seconds))
    return ActionCost(
        action=action.label,
        arithmetic_seconds=arithmetic,
        transfer_seconds=tuple(transfers),
        device_bytes=stored if action.kind in (Kind.KEEP, Kind.COMPRESS) else 0,
    )
