"""Who does what in which order: the jobs of one step in the steady state.

One device computes, one CPU may update, every link has a queue per direction, first in, first out. Jobs are
listed so that what a job waits for stands before it. The rules (K slots on the device, H staging slots):

- Forward of l waits for the slot of l-K: for the first hop of what l-K sent. The first hop of l waits for the
  second of l-H. Slots are turned by block number, whether or not a block sends anything.
- Backward fetches l into the slot that backward of l+K leaves, never before it was written. The last K
  blocks still lie in their slots.
- An update ahead of a forward reads up to two blocks ahead; one in backward follows its block's backward.
- A step is over when every queue is empty.

A job without bytes keeps its place in its queue. What it waits for never comes later than what the job
behind it waits for, except for a backlog to the second hop, which is bounded by H blocks.
"""

from __future__ import annotations

from collections.abc import Iterable

from memtrain.planner.ranges.choices import Choices
from memtrain.planner.ranges.states import Bytes, States
from memtrain.planner.ranges.terms import Formulation, Job, Linear

COMPUTE = "compute"
CPU = "cpu"
STATE_SLOTS = 2
"""Slots of the device and of staging for state in flight: one is worked on, one arrives or leaves."""

Jobs = tuple[int, ...]


class Schedule:
    """Appends the jobs of a step to a formulation."""

    def __init__(self, form: Formulation, choices: Choices, states: States) -> None:
        self.form, self.choices, self.states = form, choices, states
        self.machine = choices.problem.machine
        self.blocks = choices.problem.blocks
        self._forward: dict[int, int] = {}
        self._sent: dict[int, Jobs] = {}
        self._sent_on: dict[int, Jobs] = {}
        self._fetched: dict[int, Jobs] = {}
        self._backward: dict[int, int] = {}
        self._gradient_left: dict[int, Jobs] = {}
        self._gradient_over: dict[int, Jobs] = {}
        self._arrived: dict[tuple[bool, int], tuple[Jobs, Jobs]] = {}
        """Of an update, ahead or not: the jobs that bring its state to staging, and on to the device."""
        self._cpu_over: dict[tuple[bool, int], Jobs] = {}
        self._device_over: dict[tuple[bool, int], Jobs] = {}
        for index in range(len(self.blocks)):
            self._forward_of(index)
        for index in reversed(range(len(self.blocks))):
            self._backward_of(index)

    def _job(self, name: str, resource: str, seconds: Linear, after: Iterable[int] = ()) -> int:
        self.form.jobs.append(Job(name, resource, seconds, tuple(dict.fromkeys(after))))
        return len(self.form.jobs) - 1

    def _work(self, name: str, resource: str, seconds: Linear, after: Iterable[int] = ()) -> Jobs:
        """A job, unless nothing could ever be done in it."""
        if not seconds.terms and not seconds.constant:
            return ()
        return (self._job(name, resource, seconds, after),)

    def _copy(self, name: str, sizes: Bytes, hop: int, after: Iterable[int], *, read: bool) -> Jobs:
        """One job per link for the ``hop``-th copy (0 at the device) of what goes to or comes from places."""
        by_link: dict[str, Linear] = {}
        waited = tuple(after)
        for place, size in sizes.items():
            hops = self.machine.place(place).hops
            if hop >= len(hops) or not size.terms:
                continue
            rate = hops[hop].read_bytes_per_second if read else hops[hop].write_bytes_per_second
            by_link.setdefault(hops[hop].link, Linear()).plus(size, 1 / rate)
            self.form.moved_bytes.plus(size)
        way = "read" if read else "write"
        return tuple(
            self._job(f"{way} {name}", f"{way}:{link}", by_link[link], waited)
            for link in self.machine.links
            if link in by_link
        )

    def _moving(self, *parts: Bytes) -> Linear:
        """Arithmetic that transfers cost, where device and processor are the same."""
        total = Linear()
        for sizes in parts:
            for place, size in sizes.items():
                total.plus(size, self.machine.place(place).compute_seconds_per_byte)
        return total

    def _forward_of(self, index: int) -> None:
        name, slots = self.blocks[index].name, self.machine.slots
        if index == 0:
            self._fetch_update(0, ahead=True)
        if index + 1 < len(self.blocks):
            self._fetch_update(index + 1, ahead=True)
        self._update(index, (), ahead=True)
        parameters = self.states.parameters_for_forward(index)
        slot = (self._forward[index - slots],) if index >= slots else ()
        free = (*self._cpu_over[True, index], *slot)
        far = self._copy(f"parameters {name}", parameters, 1, free, read=True)
        near = self._copy(f"parameters {name}", parameters, 0, (*free, *far), read=True)
        seconds = self.choices.forward_seconds(index).plus(self._moving(parameters))
        forward = self._job(f"forward {name}", COMPUTE, seconds, (*near, *self._sent.get(index - slots, ())))
        self._forward[index] = forward
        sent = self.choices.sent_bytes(index)
        staged = self._sent_on.get(index - self.machine.forwarding_slots, ())
        self._sent[index] = self._copy(name, sent, 0, (forward, *staged), read=False)
        self._sent_on[index] = self._copy(name, sent, 1, self._sent[index], read=False)

    def _backward_of(self, index: int) -> None:
        name, slots = self.blocks[index].name, self.machine.slots
        near: Jobs = ()
        parameters: Bytes = {}
        if index + slots < len(self.blocks):
            parameters = self.states.parameters_away(index)
            wanted = together(self.choices.sent_bytes(index), parameters)
            staged = self._fetched.get(index + self.machine.forwarding_slots, ())
            far = self._copy(name, wanted, 1, (*self._sent_on[index], *staged), read=True)
            after = (*far, *self._sent[index], self._backward[index + slots])
            near = self._copy(name, wanted, 0, after, read=True)
        self._fetched[index] = near
        self._fetch_update(index, ahead=False)
        gradients = self.states.gradients_away(index)
        seconds = self.choices.backward_seconds(index).plus(self._moving(parameters, gradients))
        slot = self._gradient_left.get(index + STATE_SLOTS, ())
        backward = self._job(f"backward {name}", COMPUTE, seconds, (*near, *slot))
        self._backward[index] = backward
        staged = self._gradient_over.get(index + STATE_SLOTS, ())
        out = self._copy(f"gradient {name}", gradients, 0, (backward, *staged), read=False)
        on = self._copy(f"gradient {name}", gradients, 1, out, read=False)
        self._update(index, out, ahead=False)
        self._gradient_left[index] = out
        self._gradient_over[index] = (*on, *self._cpu_over[False, index])

    def _fetch_update(self, index: int, *, ahead: bool) -> None:
        """State arrives in slots that the update of two blocks before has left."""
        name, states = f"update {self.blocks[index].name}", self.states
        before = ahead, index - STATE_SLOTS if ahead else index + STATE_SLOTS
        to_device = states.update_reads(index, ahead=ahead, on_cpu=False)
        to_staging = states.update_reads(index, ahead=ahead, on_cpu=True)
        _, moved_on = self._arrived.get(before, ((), ()))
        slot = (*self._cpu_over.get(before, ()), *moved_on)
        far = self._copy(name, together(to_device, to_staging), 1, slot, read=True)
        near = self._copy(name, to_device, 0, (*far, *self._device_over.get(before, ())), read=True)
        self._arrived[ahead, index] = far, near

    def _update(self, index: int, gradients: Jobs, *, ahead: bool) -> None:
        """The update itself on either side, and its results on their way."""
        name, states = f"update {self.blocks[index].name}", self.states
        far, near = self._arrived[ahead, index]
        on_cpu = self._work(name, CPU, states.cpu_seconds(index, ahead=ahead), (*far, *gradients))
        from_cpu = states.update_writes(index, ahead=ahead, on_cpu=True)
        stored = self._copy(f"{name} by cpu", from_cpu, 1, on_cpu, read=False)
        self._cpu_over[ahead, index] = (*on_cpu, *stored)
        reads = states.update_reads(index, ahead=ahead, on_cpu=False)
        out = states.update_writes(index, ahead=ahead, on_cpu=False)
        seconds = states.device_seconds(index, ahead=ahead).plus(self._moving(reads, out))
        stepped = self._work(name, COMPUTE, seconds, near)
        written = self._copy(name, out, 0, stepped, read=False)
        self._copy(name, out, 1, written, read=False)
        self._device_over[ahead, index] = (*stepped, *written)


def together(first: Bytes, second: Bytes) -> Bytes:
    """Both, place by place."""
    total = {place: Linear().plus(size) for place, size in first.items()}
    for place, size in second.items():
        total.setdefault(place, Linear()).plus(size)
    return total
