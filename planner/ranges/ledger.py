"""What lies where at every position of the step, in bytes.

The device holds, all step long, what is reserved, state that lives there, and the slots: K for swapped
tensors and as many for fetched parameters, two for gradients that leave, two for state that an update
streams. In forward and backward of block l it also holds what blocks up to l keep, l's transients, gradients
that wait there for an update ahead of the next forward (of blocks from l on: the others are not made yet, or
used up) and, in backward, what l restores.

The staging place holds its share, H slots for activations on their way through, two for state on its way
through or under the CPU's update, and new parameters that wait for their block's next forward.
"""

from __future__ import annotations

from memtrain.planner.ranges.choices import Choices
from memtrain.planner.ranges.model import DEVICE, Role
from memtrain.planner.ranges.schedule import STATE_SLOTS, together
from memtrain.planner.ranges.states import Bytes, States
from memtrain.planner.ranges.terms import Formulation, Linear, Position, Row, Unit


class Ledger:
    """Appends the positions of a step to a formulation, and their rows."""

    def __init__(self, form: Formulation, choices: Choices, states: States) -> None:
        self.form, self.choices, self.states = form, choices, states
        self.problem = choices.problem
        self.machine = self.problem.machine
        self.blocks = range(len(self.problem.blocks))
        self._device()
        self._places()
        for position in form.positions:
            form.rows.append(
                Row(
                    f"{position.name} on {position.place}",
                    position.expression,
                    position.capacity_bytes,
                    Unit.BYTES,
                )
            )
        self._write_limits()

    def _device(self) -> None:
        form, states, blocks = self.form, self.states, self.problem.blocks
        always = Linear(self.problem.reserved_bytes)
        always.plus(form.maximum("slot", map(self.choices.slot_bytes, self.blocks)), self.machine.slots)
        away = (_sum(states.parameters_away(i)) for i in self.blocks)
        always.plus(form.maximum("parameter_slot", away), self.machine.slots)
        always.plus(form.maximum("gradient_slot", map(self._leaving, self.blocks)), STATE_SLOTS)
        always.plus(form.maximum("update_slot", map(self._streamed, self.blocks)), STATE_SLOTS)
        for index in self.blocks:
            here = states.bytes(index, lambda p: p.state.role is not Role.GRADIENT)
            always.plus(here.get(DEVICE, Linear()))
        always = form.running_sum("always", always) if always.terms else always
        kept = Linear()
        waiting = self._waiting_gradients()
        for index, block in enumerate(blocks):
            own = self.choices.kept_bytes(index)
            kept = form.running_sum(f"kept_{index}", own.plus(kept)) if own.terms else kept
            base = Linear().plus(always).plus(kept).plus(waiting[index])
            forward = Linear(block.forward_transient_bytes).plus(base)
            backward = Linear(block.backward_transient_bytes).plus(base)
            backward.plus(self.choices.restored_bytes(index))
            for name, expression in (("forward", forward), ("backward", backward)):
                self._add(f"{name} {block.name}", DEVICE, expression, self.machine.device_capacity_bytes)

    def _add(self, name: str, place: str, expression: Linear, capacity_bytes: int) -> None:
        self.form.positions.append(Position(name, place, expression, capacity_bytes))

    def _waiting_gradients(self) -> list[Linear]:
        """By block: gradients on the device of this and later blocks, there until their update."""
        after, found = Linear(), []
        for index in reversed(self.blocks):
            own = self.states.bytes(index, lambda p: p.state.role is Role.GRADIENT).get(DEVICE, Linear())
            if own.terms:
                after = self.form.running_sum(f"waiting_{index}", own.plus(after))
            found.append(after)
        return found[::-1]

    def _leaving(self, index: int) -> Linear:
        """Gradients that do not stay on the device: while they are made, and on their way or consumed."""
        return _sum(self.states.gradients_away(index)).plus(
            self.states.fleeting_gradients(index, on_cpu=False)
        )

    def _streamed(self, index: int) -> Linear:
        """State that passes through the device in the updates of a block, ahead or in backward."""
        reads = (self.states.update_reads(index, ahead=a, on_cpu=False) for a in (False, True))
        return _sum(together(*reads))

    def _places(self) -> None:
        totals: dict[str, Linear] = {place.name: Linear() for place in self.machine.places}
        for index in self.blocks:
            for sizes in (self.choices.sent_bytes(index), self.states.away(index, lambda p: True)):
                for name, size in sizes.items():
                    totals[name].plus(size)
        if self.machine.staging is not None:
            total = totals[self.machine.staging]
            through = (self._further(self.choices.sent_bytes(i)) for i in self.blocks)
            total.plus(self.form.maximum("forwarding_slot", through), self.machine.forwarding_slots)
            total.plus(self.form.maximum("staging_slot", map(self._staged, self.blocks)), STATE_SLOTS)
            for index in self.blocks:
                total.plus(self.states.updated_by_cpu(index))
        for place in self.machine.places:
            self._add("step", place.name, totals[place.name], place.capacity_bytes)

    def _further(self, sizes: Bytes) -> Linear:
        """The part that goes on over a second hop."""
        return _sum({p: size for p, size in sizes.items() if len(self.machine.place(p).hops) == 2})

    def _staged(self, index: int) -> Linear:
        """State of a block on its way through, and gradients that the CPU consumes as they arrive."""
        total = self._further(self.states.away(index, lambda p: True))
        return total.plus(self.states.fleeting_gradients(index, on_cpu=True))

    def _write_limits(self) -> None:
        for place in self.machine.places:
            if place.write_limit_bytes is None:
                continue
            written = Linear()
            for index in self.blocks:
                sizes = together(
                    self.choices.sent_bytes(index),
                    # Whatever its role, state in a place is written once a step.
                    self.states.away(index, lambda p: True),
                )
                written.plus(sizes.get(place.name, Linear()))
            self.form.rows.append(
                Row(f"bytes written to {place.name}", written, place.write_limit_bytes, Unit.BYTES)
            )


def _sum(sizes: Bytes) -> Linear:
    total = Linear()
    for size in sizes.values():
        total.plus(size)
    return total
