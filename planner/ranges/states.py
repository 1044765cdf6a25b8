"""Where parameters, gradients and the optimizer's state lie, and who updates them when, as integer counts.

A block's state is cut into pieces. Every piece has a way to be updated (``Update``), and each class of its
state a place. What follows from it:

- Parameters that do not lie on the device are fetched for forward and again for backward, into slots.
- An update on the device streams optimizer state in and out through slots. One on the CPU works where the
  state lies if the CPU can address it, in staging slots otherwise; it gets gradients through the link, and
  new parameters reach the device before the next forward of the block.
- Gradients of an update in backward live in slots only; those of one ahead of the next forward have a place,
  where those of further micro-batches are added to them, by the device or the CPU as the update is.

Index letters: ``u`` way to update, ``s`` class of state, ``p`` place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from memtrain.planner.ranges.model import DEVICE, Block, Problem, Role, StateClass, Update
from memtrain.planner.ranges.terms import Formulation, Linear, Load, Loads, Row, Unit


@dataclass(frozen=True, slots=True)
class Placement:
    """Pieces of one class, of one way to update, in one place."""

    state: StateClass
    update: Update
    place: str


def cpu_can(problem: Problem, place: str) -> bool:
    """Whether the CPU's optimizer may work on state in ``place``: in place, or through staging slots."""
    if place == DEVICE:
        return False
    found = problem.machine.place(place)
    return found.cpu_bytes_per_second > 0 or len(found.hops) == 2


def cpu_rate(problem: Problem, place: str) -> float:
    """Bytes per second of the CPU's optimizer on state of ``place``; staged where it cannot be addressed."""
    if place != DEVICE:
        own = problem.machine.place(place).cpu_bytes_per_second
        if own > 0:
            return own
    assert problem.machine.staging is not None
    return problem.machine.place(problem.machine.staging).cpu_bytes_per_second


def open_places(problem: Problem, state: StateClass, update: Update) -> tuple[str, ...]:
    """Where ``state`` may lie between steps (a gradient: until its update) under ``update``."""
    if state.role is Role.GRADIENT and not update.ahead:
        return ()
    if update.on_cpu and state.role is not Role.PARAMETER:
        return tuple(p for p in state.places if cpu_can(problem, p))
    return state.places


def open_updates(problem: Problem, block: Block) -> tuple[Update, ...]:
    """The allowed ways in which ``block`` can be updated."""
    staging = problem.machine.staging
    has_cpu = staging is not None and problem.machine.place(staging).cpu_bytes_per_second > 0
    return tuple(
        u
        for u in problem.updates
        if (has_cpu or not u.on_cpu)
        and (u.ahead or problem.micro_batches == 1)
        and all(open_places(problem, s, u) or (s.role is Role.GRADIENT and not u.ahead) for s in block.states)
    )


class States:
    """The counts of a problem's state, and what they sum to per block."""

    def __init__(self, problem: Problem, form: Formulation) -> None:
        self.problem, self.form = problem, form
        self.updated: list[dict[Update, int]] = []
        """Pieces by way to update: variables."""
        self.placed: list[dict[Placement, int]] = []
        for index, block in enumerate(problem.blocks):
            self.updated.append({})
            self.placed.append({})
            if block.states:
                self._of_block(index, block)

    def _of_block(self, index: int, block: Block) -> None:
        form, updated, placed = self.form, self.updated[index], self.placed[index]
        every = Linear()
        for update in open_updates(self.problem, block):
            count = form.variable(f"m_{index}_{update.label}", block.pieces, integer=True)
            updated[update] = count
            every.add(count, 1)
            for state in block.states:
                name = f"s_{index}_{state.name}_{update.label}"
                here = Linear()
                for place in open_places(self.problem, state, update):
                    variable = form.variable(f"{name}_{place}", block.pieces, integer=True)
                    placed[Placement(state, update, place)] = variable
                    here.add(variable, 1)
                if here.terms:
                    form.rows.append(Row(f"{name} pieces", here.add(count, -1), 0, Unit.COUNT, equal=True))
        form.rows.append(Row(f"m_{index} pieces", every, block.pieces, Unit.COUNT, equal=True))

    def loads(self, index: int, wanted: Callable[[Placement], bool]) -> Loads:
        """The placements that are ``wanted``, by place, the device among them."""
        found: Loads = {}
        for placement, variable in self.placed[index].items():
            if wanted(placement):
                found.setdefault(placement.place, Load()).add(variable, placement.state.piece_bytes)
        return found

    def on_device(self, index: int, role: Role) -> Linear:
        """Bytes of a role that lie on the device."""
        return self.loads(index, lambda p: p.state.role is role).get(DEVICE, Load()).size

    def away(self, index: int, wanted: Callable[[Placement], bool]) -> Loads:
        """As ``loads``, without the device."""
        return {p: load for p, load in self.loads(index, wanted).items() if p != DEVICE}

    def fleeting_gradients(self, index: int, *, on_cpu: bool) -> Load:
        """Gradients that an update in backward consumes at once."""
        total = Load()
        for update, variable in self.updated[index].items():
            if not update.ahead and update.on_cpu is on_cpu:
                for state in self._of_role(index, Role.GRADIENT):
                    total.add(variable, state.piece_bytes)
        return total

    def device_seconds(self, index: int, *, ahead: bool) -> Linear:
        """The optimizer's arithmetic on the device."""
        block, total = self.problem.blocks[index], Linear()
        for update, variable in self.updated[index].items():
            if not update.on_cpu and update.ahead is ahead:
                total.add(variable, block.device_update_seconds / block.pieces)
        return total

    def cpu_seconds(self, index: int, *, ahead: bool) -> Linear:
        """The optimizer on the CPU: it reads gradients, reads and writes its state, writes parameters."""
        total = Linear()
        for p, variable in self.placed[index].items():
            if p.update.on_cpu and p.update.ahead is ahead:
                passes = 2 if p.state.role is Role.OPTIMIZER else 1
                total.add(variable, passes * p.state.piece_bytes / cpu_rate(self.problem, p.place))
        if not ahead:
            arrived = self.fleeting_gradients(index, on_cpu=True).size
            if arrived.terms:
                total.plus(arrived, 1 / cpu_rate(self.problem, DEVICE))
        return total

    def adding_seconds(self, index: int) -> Linear:
        """The CPU adds gradients: it reads the new ones in staging, reads and writes the sum in its place."""
        total = Linear()
        for place, load in self.added_gradients(index, on_cpu=True).items():
            total.plus(load.size, 1 / cpu_rate(self.problem, DEVICE) + 2 / cpu_rate(self.problem, place))
        return total

    def _of_role(self, index: int, role: Role) -> Iterator[StateClass]:
        return (s for s in self.problem.blocks[index].states if s.role is role)

    # What travels, by place.

    def parameters_for_forward(self, index: int) -> Loads:
        """Fetched before the first forward of a step: what lies elsewhere, and what the CPU has updated.

        An update on the device just before leaves its parameters there.
        """

        def fetched(p: Placement) -> bool:
            return p.state.role is Role.PARAMETER and (p.update.on_cpu or not p.update.ahead)

        found = self.away(index, fetched)
        new = self.updated_by_cpu(index)
        return self._through_staging(found, new)

    def _through_staging(self, found: Loads, more: Load) -> Loads:
        if more.size.terms:
            assert self.problem.machine.staging is not None
            found.setdefault(self.problem.machine.staging, Load()).plus(more)
        return found

    def updated_by_cpu(self, index: int) -> Load:
        """Parameters that live on the device and come from the CPU: they wait in staging."""
        new = self.loads(index, lambda p: p.state.role is Role.PARAMETER and p.update.on_cpu)
        return new.get(DEVICE, Load())

    def parameters_away(self, index: int) -> Loads:
        """Fetched before a backward or a further forward, and what the parameter slots must hold."""
        return self.away(index, lambda p: p.state.role is Role.PARAMETER)

    def gradients_away(self, index: int) -> Loads:
        """Written in backward: to their place, or through staging to the CPU that consumes them at once."""
        found = self.away(index, lambda p: p.state.role is Role.GRADIENT)
        return self._through_staging(found, self.fleeting_gradients(index, on_cpu=True))

    def added_gradients(self, index: int, *, on_cpu: bool) -> Loads:
        """Gradients elsewhere to which a further micro-batch's are added, by the CPU or the device."""
        return self.away(index, lambda p: p.state.role is Role.GRADIENT and p.update.on_cpu is on_cpu)

    def sent_gradients(self, index: int) -> Loads:
        """Written by a further micro-batch: sums that the device has made, and through staging what the CPU
        adds."""
        found = self.added_gradients(index, on_cpu=False)
        new = Load()
        for load in self.added_gradients(index, on_cpu=True).values():
            new.plus(load)
        return self._through_staging(found, new)

    def update_reads(self, index: int, *, ahead: bool, on_cpu: bool) -> Loads:
        """Read for the update: optimizer state, and gradients that waited."""
        return self.away(
            index,
            lambda p: (
                p.state.role is not Role.PARAMETER and p.update.ahead is ahead and p.update.on_cpu is on_cpu
            ),
        )

    def update_writes(self, index: int, *, ahead: bool, on_cpu: bool) -> Loads:
        """Written by the update: optimizer state and parameters."""
        return self.away(
            index,
            lambda p: (
                p.state.role is not Role.GRADIENT and p.update.ahead is ahead and p.update.on_cpu is on_cpu
            ),
        )
