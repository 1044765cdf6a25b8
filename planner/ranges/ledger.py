"""What lies where at every position of the step, in bytes.

The device holds, all step long, what is reserved, state that lives there, and the slots: K for swapped
tensors and as many for fetched parameters, two for gradients that leave, two for state that an update streams
and the parameters that it makes. In forward and backward of block l it also holds what blocks up to l keep,
l's transients, gradients that wait there for an update ahead of the next forward (of blocks from l on: the
others are not made yet, or used up) and, in backward, what l restores, as far as l's slot, which is as large
as the largest block needs, has no room for it beside what was sent. Sequential updates use all gradients up
before the next forward; what they need themselves is never more than the first block's backward has.

With several micro-batches gradients that wait do so all step long, and l's new ones lie beside the sums to
which the device adds them. With several in flight, all that the others keep lies beside what blocks up to l
keep.

A place holds its state and what blocks send there, for every micro-batch in flight. The staging place also
has H slots for tensors on their way through, and parameters on theirs to a backward; two for other state on
its way through, or added to or updated by the CPU; and new parameters that wait for their block's next
forward.
"""

from __future__ import annotations

from memtrain.planner.ranges.choices import Choices
from memtrain.planner.ranges.model import DEVICE, Role
from memtrain.planner.ranges.schedule import STATE_SLOTS
from memtrain.planner.ranges.states import States
from memtrain.planner.ranges.terms import (
    Formulation,
    Linear,
    Load,
    Loads,
    Position,
    Row,
    Unit,
    all_bytes,
    together,
)


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
        form, states = self.form, self.states
        always = self._slots().plus(Linear(self.problem.reserved_bytes))
        for index in self.blocks:
            always.plus(states.on_device(index, Role.PARAMETER)).plus(states.on_device(index, Role.OPTIMIZER))
        always = form.running_sum("always", always) if always.terms else always
        kept, total = [], Linear()
        for index in self.blocks:
            own = self.choices.kept_bytes(index)
            total = form.running_sum(f"kept_{index}", own.plus(total)) if own.terms else total
            kept.append(total)
        always = Linear().plus(always).plus(total, self.problem.in_flight - 1)
        waiting = self._waiting_gradients()
        used_up = self.problem.updates_apart and self.problem.micro_batches == 1
        for index, block in enumerate(self.problem.blocks):
            base = Linear().plus(always).plus(kept[index])
            forward = Linear(block.forward_transient_bytes).plus(base)
            if not used_up:
                forward.plus(waiting[index])
            backward = Linear(block.backward_transient_bytes).plus(base).plus(waiting[index])
            backward.plus(self._beside_slot(index)).plus(self._new_gradients(index))
            for name, expression in (("forward", forward), ("backward", backward)):
                self._add(f"{name} {block.name}", DEVICE, expression, self.machine.device_capacity_bytes)

    def _slots(self) -> Linear:
        """All slots of the device."""
        form, states, total = self.form, self.states, Linear()
        self._slot = form.maximum("slot", map(self.choices.slot_bytes, self.blocks))
        total.plus(self._slot, self.machine.slots)
        away = (all_bytes(states.parameters_away(i)) for i in self.blocks)
        total.plus(form.maximum("parameter_slot", away), self.machine.slots)
        total.plus(form.maximum("gradient_slot", map(self._leaving, self.blocks)), STATE_SLOTS)
        streamed = (all_bytes(states.away(i, lambda p: not p.update.on_cpu)) for i in self.blocks)
        return total.plus(form.maximum("update_slot", streamed), STATE_SLOTS)

    def _beside_slot(self, index: int) -> Linear:
        """What backward restores, less the room that the block leaves of its slot."""
        restored, sent = self.choices.restored_bytes(index), self.choices.slot_bytes(index)
        if not restored.terms or not self._slot.terms:
            return restored
        return self.form.maximum(f"restored_{index}", [restored.plus(sent).plus(self._slot, -1)])

    def _add(self, name: str, place: str, expression: Linear, capacity_bytes: int) -> None:
        self.form.positions.append(Position(name, place, expression, capacity_bytes))

    def _waiting_gradients(self) -> list[Linear]:
        """By block: gradients on the device that wait for their update; with one micro-batch only those of
        this and later blocks."""
        after, found = Linear(), []
        for index in reversed(self.blocks):
            own = self.states.on_device(index, Role.GRADIENT)
            if own.terms:
                after = self.form.running_sum(f"waiting_{index}", own.plus(after))
            found.append(after)
        return found[::-1] if self.problem.micro_batches == 1 else [after] * len(found)

    def _new_gradients(self, index: int) -> Linear:
        """Gradients of a further micro-batch, until the device has added them."""
        if self.problem.micro_batches == 1:
            return Linear()
        sums = all_bytes(self.states.added_gradients(index, on_cpu=False))
        return sums.plus(self.states.on_device(index, Role.GRADIENT))

    def _leaving(self, index: int) -> Linear:
        """Gradients that do not stay on the device: while they are made, and on their way or consumed."""
        consumed = self.states.fleeting_gradients(index, on_cpu=False)
        return all_bytes(self.states.gradients_away(index)).plus(consumed.size)

    def _places(self) -> None:
        totals: dict[str, Linear] = {place.name: Linear() for place in self.machine.places}
        for index in self.blocks:
            for loads, times in (
                (self.choices.sent(index), self.problem.in_flight),
                (self.states.away(index, lambda p: True), 1),
            ):
                for name, load in loads.items():
                    totals[name].plus(load.size, times)
        if self.machine.staging is not None:
            total = totals[self.machine.staging]
            through = map(self._forwarded, self.blocks)
            total.plus(self.form.maximum("forwarding_slot", through), self.machine.forwarding_slots)
            total.plus(self.form.maximum("staging_slot", map(self._staged, self.blocks)), STATE_SLOTS)
            for index in self.blocks:
                total.plus(self.states.updated_by_cpu(index).size)
        for place in self.machine.places:
            self._add("step", place.name, totals[place.name], place.capacity_bytes)

    def _further(self, loads: Loads) -> Linear:
        """The part that goes on over a second hop."""
        return all_bytes({p: load for p, load in loads.items() if len(self.machine.place(p).hops) == 2})

    def _forwarded(self, index: int) -> Linear:
        """What a block sends on or fetches for its backward."""
        return self._further(together(self.choices.sent(index), self.states.parameters_away(index)))

    def _staged(self, index: int) -> Linear:
        """State of a block on its way through, and gradients that the CPU consumes or adds as they arrive."""
        total = self._further(self.states.away(index, lambda p: True))
        total.plus(self.states.fleeting_gradients(index, on_cpu=True).size)
        if self.problem.micro_batches > 1:
            total.plus(all_bytes(self.states.added_gradients(index, on_cpu=True)))
        return total

    def _write_limits(self) -> None:
        """Tensors and gradients are written by every micro-batch, other state once a step."""
        batches = self.problem.micro_batches
        for place in self.machine.places:
            if place.write_limit_bytes is None:
                continue
            written = Linear()
            for index in self.blocks:
                gradients = self.states.away(index, lambda p: p.state.role is Role.GRADIENT)
                often = together(self.choices.sent(index), gradients)
                once = self.states.away(index, lambda p: p.state.role is not Role.GRADIENT)
                written.plus(often.get(place.name, Load()).size, batches)
                written.plus(once.get(place.name, Load()).size)
            self.form.rows.append(
                Row(f"bytes written to {place.name}", written, place.write_limit_bytes, Unit.BYTES)
            )
