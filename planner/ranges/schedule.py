"""Who does what in which order: the jobs of one step in the steady state.

One device computes, one CPU may update, every link has a queue per direction, first in, first out. Jobs are
listed so that what a job waits for stands before it. A ring of slots is turned by block number, whether or
not a block puts anything there. The rules (K slots on the device, H forwarding slots, two for state):

- Forward of l waits for the slot of l-K: for the first hop of what l-K sent. The first hop of l waits for the
  second of l-H.
- Backward fetches l into the slot that backward of l+K leaves, never before it was written. The last K
  blocks still lie in their slots. What comes over two hops waits for the forwarding slot of l+H.
- An update ahead of a forward reads up to two blocks ahead; one in backward follows its block's backward.
  Sequential updates go through the blocks as those ahead do, in a part of their own.
  State on its way in or out waits until the block two before has left its slot, wherever that slot is.

A job without bytes keeps its place in its queue. What it waits for never comes later than what the job
behind it waits for, except for a backlog to the second hop, which is bounded by H blocks.

A step is over when every queue is empty, and so is a micro-batch: then all are alike but the first, which
makes the updates ahead and writes gradients where the others add to them, and the program holds two of them
at most. That is conservative: what the queues still move when a micro-batch has computed, and what the next
could have fetched meanwhile, hides behind nothing. With several micro-batches in flight, forward and backward
passes of different ones alternate in an order that changes in the course of a step: each pass then begins
with empty queues, and fetches all that does not stay on the device.
"""

from __future__ import annotations

from collections.abc import Iterable

from memtrain.planner.ranges.choices import Choices, in_slots
from memtrain.planner.ranges.states import States
from memtrain.planner.ranges.terms import Formulation, Linear, Loads, together

COMPUTE = "compute"
CPU = "cpu"
STATE_SLOTS = 2
"""Slots of the device and of staging for state in flight: one is worked on, one arrives or leaves."""

Jobs = tuple[int, ...]


def schedule(form: Formulation, choices: Choices, states: States) -> None:
    """Append the parts of the step and their jobs to ``form``."""
    problem = choices.problem
    count = problem.micro_batches
    if count == 1:
        kinds = [("step", 1, True)]
    elif any(block.states for block in problem.blocks):
        kinds = [("first micro-batch", 1, True), ("further micro-batches", count - 1, False)]
    else:
        kinds = [("micro-batches", count, True)]
    if problem.updates_apart and count == 1:
        kinds = [("forward and backward", 1, True)]
    for name, times, first in kinds:
        batch = _MicroBatch(form, choices, states, first=first, times=times)
        form.begin(name if problem.in_flight == 1 else f"forward, {name}", times)
        batch.forward()
        if problem.in_flight > 1:
            form.begin(f"backward, {name}", times)
        batch.backward()
    if problem.updates_apart:
        form.begin("update", 1)
        _MicroBatch(form, choices, states, first=True, times=1).update()


class _MicroBatch:
    """One kind of micro-batch: the first of a step, which begins with the updates ahead, or a further one; or
    the sequential updates alone."""

    def __init__(
        self, form: Formulation, choices: Choices, states: States, *, first: bool, times: int
    ) -> None:
        self.form, self.choices, self.states, self.first, self.times = form, choices, states, first, times
        self.ahead = first and not choices.problem.updates_apart
        self.problem = choices.problem
        self.machine, self.blocks = self.problem.machine, self.problem.blocks
        self.rates = self.problem.rates()
        self._forward: dict[int, int] = {}
        self._backward: dict[int, int] = {}
        # By block: the jobs after which its slot in a ring is free. A block that puts nothing there leaves it
        # to the next as it has found it; where its forward or backward has waited for it, there is no need.
        self._sent: dict[int, Jobs] = {}
        self._sent_on: dict[int, Jobs] = {}
        self._fetched: dict[int, Jobs] = {}
        self._gradient_left: dict[int, Jobs] = {}
        self._gradient_over: dict[int, Jobs] = {}
        self._arrived: dict[int, tuple[Jobs, Jobs]] = {}
        """Of the update that comes next: the jobs that bring its state to staging, and on to the device."""
        self._staging_left: dict[int, Jobs] = {}
        """By the state of updates, read and written, and by parameters on their way to forward."""
        self._device_left: dict[int, Jobs] = {}

    def forward(self) -> None:
        """The jobs of all blocks, from the first to the last."""
        for index in range(len(self.blocks)):
            self._forward_of(index)

    def backward(self) -> None:
        """The jobs of all blocks, from the last to the first."""
        for index in reversed(range(len(self.blocks))):
            self._backward_of(index)

    def update(self) -> None:
        """The jobs of a part that does the updates and nothing else: as ahead of a forward that never comes.
        Parameters that the CPU makes for the device are brought there in the end."""
        for index, block in enumerate(self.blocks):
            self._fetch_updates(index)
            made, _, _ = self._update(index, (), ahead=True)
            new = self.states.updated_by_cpu(index)
            if new.size.terms:
                assert self.machine.staging is not None
                loads, name = {self.machine.staging: new}, f"parameters {block.name}"
                near = self._copy(name, loads, 0, made, read=True)
                self._work(f"place {name}", COMPUTE, self._moving(loads), near)

    def _work(self, name: str, resource: str, seconds: Linear, after: Iterable[int] = ()) -> Jobs:
        """A job, unless nothing could ever be done in it."""
        if not seconds.terms and not seconds.constant:
            return ()
        return (self.form.job(name, resource, seconds, after),)

    def _copy(self, name: str, loads: Loads, hop: int, after: Iterable[int], *, read: bool) -> Jobs:
        """One job per link for the ``hop``-th copy (0 at the device) of what goes to or comes from places."""
        by_link: dict[str, Linear] = {}
        waited = tuple(after)
        for place, load in loads.items():
            hops = self.machine.place(place).hops
            if hop >= len(hops) or not load.size.terms:
                continue
            way = hops[hop]
            seconds = by_link.setdefault(way.link, Linear())
            seconds.plus(load.size, 1 / self.rates[way][read]).plus(load.copies, way.latency_seconds)
            self.form.moved_bytes.plus(load.size, self.times)
        verb = "read" if read else "write"
        return tuple(
            self.form.job(f"{verb} {name}", f"{verb}:{link}", by_link[link], waited)
            for link in self.machine.links
            if link in by_link
        )

    def _moving(self, *parts: Loads) -> Linear:
        """Arithmetic that transfers cost, where device and processor are the same."""
        total = Linear()
        for loads in parts:
            for place, load in loads.items():
                total.plus(load.size, self.machine.place(place).compute_seconds_per_byte)
        return total

    def _forward_of(self, index: int) -> None:
        name, slots = self.blocks[index].name, self.machine.slots
        updated, stored, stepped = Jobs(), Jobs(), Jobs()
        if self.ahead:
            self._fetch_updates(index)
            updated, stored, stepped = self._update(index, (), ahead=True)
        near, moving = self._fetch_parameters(index, updated, stored)
        seconds = self.choices.forward_seconds(index).plus(moving)
        after = (*near, *updated, *stepped, *self._sent.get(index - slots, ()))
        forward = self.form.job(f"forward {name}", COMPUTE, seconds, after)
        self._forward[index] = forward
        sent = self.choices.sent(index)
        staged = self._sent_on.get(index - self.machine.forwarding_slots, ())
        self._sent[index] = self._copy(name, sent, 0, (forward, *staged), read=False)
        self._sent_on[index] = self._copy(name, sent, 1, self._sent[index], read=False) or staged

    def _fetch_parameters(self, index: int, updated: Jobs, stored: Jobs) -> tuple[Jobs, Linear]:
        """Into the slot that forward of K blocks before has left; and the arithmetic that it costs."""
        loads = self.states.parameters_away(index)
        if self.ahead:
            loads = self.states.parameters_for_forward(index)
        name = f"parameters {self.blocks[index].name}"
        slots = self.machine.slots
        slot = (self._forward[index - slots],) if index >= slots else ()
        staged = self._staging_left.get(index - STATE_SLOTS, ())
        far = self._copy(name, loads, 1, (*slot, *updated, *stored, *staged), read=True)
        near = self._copy(name, loads, 0, (*slot, *updated, *far), read=True)
        if far:
            self._staging_left[index] = (*self._staging_left.get(index, ()), *near)
        return near, self._moving(loads)

    def _backward_of(self, index: int) -> None:
        name = self.blocks[index].name
        near, moving = self._fetch(index)
        old, old_moving = self._fetch_gradients(index)
        if self.first:
            self._fetch_update(index, ahead=False)
        gradients = (self.states.gradients_away if self.first else self.states.sent_gradients)(index)
        seconds = self.choices.backward_seconds(index).plus(moving).plus(old_moving)
        seconds.plus(self._moving(gradients))
        slot = self._gradient_left.get(index + STATE_SLOTS, ())
        self._backward[index] = self.form.job(f"backward {name}", COMPUTE, seconds, (*near, *old, *slot))
        staged = self._gradient_over.get(index + STATE_SLOTS, ())
        out = self._copy(f"gradient {name}", gradients, 0, (self._backward[index], *staged), read=False)
        on = self._copy(f"gradient {name}", gradients, 1, out, read=False)
        if self.first:
            used, _, _ = self._update(index, out, ahead=False)
        else:
            used = self._add_gradients(index, out)
        self._gradient_left[index] = out
        self._gradient_over[index] = (out and (*on, *used)) or staged

    def _fetch(self, index: int) -> tuple[Jobs, Linear]:
        """What backward needs and forward has not left in slots; and the arithmetic that parameters cost."""
        if in_slots(self.problem, index):
            return (), Linear()
        name, parameters = self.blocks[index].name, self.states.parameters_away(index)
        wanted = together(self.choices.sent(index), parameters)
        staged = self._fetched.get(index + self.machine.forwarding_slots, ())
        far = self._copy(name, wanted, 1, (*self._sent_on[index], *staged), read=True)
        later = index + self.machine.slots
        slot = (self._backward[later],) if later < len(self.blocks) else ()
        near = self._copy(name, wanted, 0, (*far, *self._sent[index], *slot), read=True)
        self._fetched[index] = near if far else staged
        return near, self._moving(parameters)

    def _fetch_gradients(self, index: int) -> tuple[Jobs, Linear]:
        """Sums to which the device adds; and the arithmetic that fetching them costs."""
        if self.first:
            return (), Linear()
        name, sums = f"gradient {self.blocks[index].name}", self.states.added_gradients(index, on_cpu=False)
        far = self._copy(name, sums, 1, self._gradient_over.get(index + STATE_SLOTS, ()), read=True)
        slot = self._gradient_left.get(index + STATE_SLOTS, ())
        return self._copy(name, sums, 0, (*far, *slot), read=True), self._moving(sums)

    def _add_gradients(self, index: int, arrived: Jobs) -> Jobs:
        """The CPU adds what has arrived in staging to the sums in their places."""
        name, sums = f"gradient {self.blocks[index].name}", self.states.added_gradients(index, on_cpu=True)
        staged = self._gradient_over.get(index + STATE_SLOTS, ())
        far = self._copy(f"{name} by cpu", sums, 1, staged, read=True)
        added = self._work(f"add {name}", CPU, self.states.adding_seconds(index), (*arrived, *far))
        return (*added, *self._copy(f"{name} by cpu", sums, 1, added, read=False))

    def _fetch_updates(self, index: int) -> None:
        """Ahead of a forward state arrives for the block that comes next as well."""
        for later in (0, 1) if index == 0 else (index + 1,):
            if later < len(self.blocks):
                self._fetch_update(later, ahead=True)

    def _fetch_update(self, index: int, *, ahead: bool) -> None:
        """State arrives in slots that the update of two blocks before has left."""
        name, states = f"update {self.blocks[index].name}", self.states
        before = index - STATE_SLOTS if ahead else index + STATE_SLOTS
        to_device = states.update_reads(index, ahead=ahead, on_cpu=False)
        to_staging = states.update_reads(index, ahead=ahead, on_cpu=True)
        staged = self._staging_left.get(before, ())
        far = self._copy(name, together(to_device, to_staging), 1, staged, read=True)
        near = self._copy(name, to_device, 0, (*far, *self._device_left.get(before, ())), read=True)
        self._arrived[index] = far, near

    def _update(self, index: int, gradients: Jobs, *, ahead: bool) -> tuple[Jobs, Jobs, Jobs]:
        """The update itself on either side, and its results on their way.

        Returns:
            The jobs of the CPU, those that store what it has made, and those after which the device's update
            is over.
        """
        name, states = f"update {self.blocks[index].name}", self.states
        before = index - STATE_SLOTS if ahead else index + STATE_SLOTS
        far, near = self._arrived[index]
        staged, slot = self._staging_left.get(before, ()), self._device_left.get(before, ())
        seconds = states.cpu_seconds(index, ahead=ahead)
        on_cpu = self._work(name, CPU, seconds, (*far, *gradients, *staged))
        from_cpu = states.update_writes(index, ahead=ahead, on_cpu=True)
        stored = self._copy(f"{name} by cpu", from_cpu, 1, on_cpu, read=False)
        reads = states.update_reads(index, ahead=ahead, on_cpu=False)
        out = states.update_writes(index, ahead=ahead, on_cpu=False)
        seconds = states.device_seconds(index, ahead=ahead).plus(self._moving(reads, out))
        waited = (*near, *(() if ahead else (self._backward[index],)), *slot)
        by_device = self._work(name, COMPUTE, seconds, waited)
        stepped = by_device or waited
        written = self._copy(name, out, 0, (*stepped, *staged), read=False)
        on = self._copy(name, out, 1, written, read=False)
        through = (*(near if far else ()), *(on_cpu if far or stored else ()), *stored, *on)
        self._staging_left[index] = (*self._staging_left.get(index, ()), *(through or staged))
        self._device_left[index] = (*self._device_left.get(index, ()), *stepped, *written)
        return on_cpu, stored, by_device or near
