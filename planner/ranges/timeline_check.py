"""The checker's own rules of time (see ``check``): what must come before what, and how long it takes."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from memtrain.planner.ranges.bytes_check import Bill
from memtrain.planner.ranges.model import DEVICE, Problem, Update
from memtrain.planner.ranges.plan import RangePlan
from memtrain.planner.ranges.simulate import Event

ROUNDING_SECONDS = 1e-8
"""Times are written with nine digits."""

Faults = Iterator[tuple[str, str]]
Events = list[Event]
Sizes = Mapping[str, int]
"""Bytes by place."""


def timeline_faults(plan: RangePlan, problem: Problem, bill: Bill) -> Faults:
    """Rules that the events break, with the numbers."""
    yield from _one_at_a_time(plan)
    yield from _Timeline(plan, problem, bill).faults()
    end = max((e.end_seconds for e in plan.events), default=0.0)
    if abs(end - plan.step_seconds) > ROUNDING_SECONDS:
        yield "STEP_SECONDS", f"the last event ends at {end}, the step takes {plan.step_seconds}"


def _one_at_a_time(plan: RangePlan) -> Faults:
    by_resource: dict[str, Events] = defaultdict(list)
    for event in plan.events:
        by_resource[event.resource].append(event)
    for resource, events in by_resource.items():
        events.sort(key=lambda e: (e.start_seconds, e.end_seconds))
        for before, after in itertools.pairwise(events):
            if after.start_seconds < before.end_seconds - ROUNDING_SECONDS:
                yield "OVERLAP", f"{resource}: {after.name} starts before {before.name} is over"


class _Timeline:
    """Walks the blocks and asks for every event that the decisions call for."""

    def __init__(self, plan: RangePlan, problem: Problem, bill: Bill) -> None:
        self.plan, self.problem, self.bill, self.machine = plan, problem, bill, problem.machine
        self.names = [b.name for b in problem.blocks]
        self.events: dict[tuple[str, str], Events] = defaultdict(list)
        for event in plan.events:
            self.events[event.name, event.resource].append(event)

    def faults(self) -> Faults:
        """Arithmetic in order and long enough; every byte's way out and back; updates."""
        yield from self._arithmetic()
        for index, block in enumerate(self.problem.blocks):
            yield from self._activations(index)
            if block.states:
                yield from self._parameters(index)
                yield from self._gradients(index)
                for update in self.problem.updates:
                    if dict(self.plan.blocks[index].updates).get(update.label):
                        yield from self._update(index, update)

    def _need(
        self, name: str, resource: str, least: float, after: Events, *, candidates: Events | None = None
    ) -> Iterator[tuple[str, str] | Event]:
        """Faults of the event of this name, and the event itself."""
        found = self.events[name, resource] if candidates is None else candidates
        if not found:
            if least > 0:
                yield "DEPENDENCY", f"{name} never happens on {resource}"
            return
        event = found[0]
        took = event.end_seconds - event.start_seconds
        if took < least - ROUNDING_SECONDS:
            yield "DURATION", f"{name} takes {took:.9f} s on {resource}, at least {least:.9f} s are needed"
        for other in after if least > 0 else ():
            if event.start_seconds < other.end_seconds - ROUNDING_SECONDS:
                yield "DEPENDENCY", f"{name} on {resource} starts before {other.name} is over"
        yield event

    def _job(self, name: str, least: float, after: Events, made: Events) -> Faults:
        """Arithmetic of the device; appended to ``made``."""
        yield from _collect(self._need(name, "compute", least, after), made)

    def _copies(
        self,
        what: str,
        sizes: Sizes,
        hop: int,
        way: str,
        after: Sequence[Event],
        made: Events,
        *,
        ahead: bool | None = None,
    ) -> Faults:
        """The ``hop``-th copies of ``sizes``, each after ``after``; appended to ``made``.

        ``ahead`` tells updates apart, whose two phases share their names.
        """
        for resource, least in self._least(sizes, hop, way).items():
            name, candidates = f"{way} {what}", None
            if ahead is not None:
                candidates = self._of_phase(name, resource, ahead=ahead)
            yield from _collect(self._need(name, resource, least, list(after), candidates=candidates), made)

    def _of_phase(self, name: str, resource: str, *, ahead: bool) -> Events:
        """Of two events of a name, an update's ahead and in backward, the one that is meant."""
        events = self.events[name, resource]
        if len(events) == 2:
            return [events[0 if ahead else 1]]
        return events

    def _least(self, sizes: Sizes, hop: int, way: str) -> dict[str, float]:
        """Least seconds by queue for bytes to or from places over their ``hop``-th copy."""
        least: dict[str, float] = defaultdict(float)
        for place, size in sizes.items():
            hops = self.machine.place(place).hops if place != DEVICE else ()
            if hop < len(hops) and size:
                rate = hops[hop].write_bytes_per_second if way == "write" else hops[hop].read_bytes_per_second
                least[f"{way}:{hops[hop].link}"] += size / rate
        return least

    def _arithmetic(self) -> Faults:
        bill, before = self.bill, Events()
        blocks = list(enumerate(self.problem.blocks))
        order = [
            (f"forward {b.name}", b.forward_seconds + bill.compress_seconds[i] + self._moving(bill.sent[i]))
            for i, b in blocks
        ]
        for i, b in reversed(blocks):
            again = bill.recompute_seconds[i] + bill.decompress_seconds[i] + self._moving(bill.sent[i])
            order.append((f"backward {b.name}", b.backward_seconds + again))
        for name, least in order:
            made = Events()
            yield from self._job(name, least, before, made)
            before = made or before

    def _moving(self, sizes: Sizes) -> float:
        """Arithmetic that transfers cost."""
        return sum(size * self.machine.place(p).compute_seconds_per_byte for p, size in sizes.items())

    def _activations(self, index: int) -> Faults:
        """Out after forward, hop after hop, before the slot is used again; back in time for backward."""
        name, slots, sent = self.names[index], self.machine.slots, self.bill.sent[index]
        out, on, far, near = Events(), Events(), Events(), Events()
        yield from self._copies(name, sent, 0, "write", self.events[f"forward {name}", "compute"], out)
        yield from self._copies(name, sent, 1, "write", out, on)
        if index + slots >= len(self.names):
            return
        later = self.names[index + slots]
        yield from self._before(out, f"forward {later}")
        wanted = defaultdict(int, sent)
        for held, state, size in self.bill.states(index):
            if state.role.value == "parameter" and held.place != DEVICE:
                wanted[held.place] += size
        free = self.events[f"backward {later}", "compute"]
        yield from self._copies(name, wanted, 1, "read", on, far)
        yield from self._copies(name, wanted, 0, "read", [*out, *far, *free], near)
        yield from self._before(near, f"backward {name}")

    def _before(self, events: Events, use: str) -> Faults:
        for event, after in itertools.product(events, self.events[use, "compute"]):
            if after.start_seconds < event.end_seconds - ROUNDING_SECONDS:
                yield "DEPENDENCY", f"{use} starts before {event.name} on {event.resource} is over"

    def _parameters(self, index: int) -> Faults:
        """Fetched before forward; through the staging place where the CPU has updated them."""
        name, wanted = self.names[index], defaultdict[str, int](int)
        for held, state, size in self.bill.states(index):
            update = self.bill.updates[held.update]
            if state.role.value == "parameter" and held.place != DEVICE:
                wanted[held.place] += size if update.on_cpu or not update.ahead else 0
        wanted[self.machine.staging or DEVICE] += self.bill.new_parameters(index)
        far, near = Events(), Events()
        yield from self._copies(f"parameters {name}", wanted, 1, "read", (), far)
        yield from self._copies(f"parameters {name}", wanted, 0, "read", far, near)
        yield from self._before(near, f"forward {name}")

    def _gradients(self, index: int) -> Faults:
        """Written once backward has made them."""
        name, sizes = f"gradient {self.names[index]}", defaultdict[str, int](int)
        for held, state, size in self.bill.states(index):
            if state.role.value == "gradient" and held.place != DEVICE:
                sizes[held.place] += size
        sizes[self.machine.staging or DEVICE] += self.bill.fleeting(index, on_cpu=True)
        out = Events()
        made = self.events[f"backward {self.names[index]}", "compute"]
        yield from self._copies(name, sizes, 0, "write", made, out)
        yield from self._copies(name, sizes, 1, "write", out, Events())

    def _update(self, index: int, update: Update) -> Faults:
        """State read and gradients made before it, results written and forward begun after it."""
        block, ahead = self.problem.blocks[index], update.ahead
        name = f"update {block.name}"
        mine = [(h, s, n) for h, s, n in self.bill.states(index) if self.bill.updates[h.update] == update]
        reads, writes = defaultdict[str, int](int), defaultdict[str, int](int)
        for held, state, size in mine:
            reads[held.place] += size * (state.role.value != "parameter")
            writes[held.place] += size * (state.role.value != "gradient")
        far, near, done, out = Events(), Events(), Events(), Events()
        yield from self._copies(name, reads, 1, "read", (), far, ahead=ahead)
        before = far
        if not update.on_cpu:
            yield from self._copies(name, reads, 0, "read", far, near, ahead=ahead)
            before = near
        if not ahead:
            before = [*before, *self.events[f"backward {block.name}", "compute"]]
        resource = "cpu" if update.on_cpu else "compute"
        candidates = self._of_phase(name, resource, ahead=ahead)
        everything = defaultdict[str, int](int)
        for held, state, size in mine:
            # An optimizer's state is read and written.
            everything[held.place] += size * (2 if state.role.value == "optimizer" else 1)
        seconds = self._update_seconds(index, update, everything)
        yield from _collect(self._need(name, resource, seconds, before, candidates=candidates), done)
        if update.on_cpu:
            yield from self._copies(f"{name} by cpu", writes, 1, "write", done, out, ahead=ahead)
        else:
            yield from self._copies(name, writes, 0, "write", done, out, ahead=ahead)
            yield from self._copies(name, writes, 1, "write", out, Events(), ahead=ahead)
        if ahead:
            yield from self._before(done, f"forward {block.name}")

    def _update_seconds(self, index: int, update: Update, sizes: Sizes) -> float:
        """What an update that goes over ``sizes`` bytes takes, on the CPU at the speed of each place."""
        block = self.problem.blocks[index]
        if not update.on_cpu:
            pieces = dict(self.plan.blocks[index].updates)[update.label]
            return block.device_update_seconds * pieces / block.pieces
        staged = self.machine.place(self.machine.staging or "").cpu_bytes_per_second
        total = 0.0 if update.ahead else self.bill.fleeting(index, on_cpu=True) / staged
        for place, size in sizes.items():
            own = 0.0 if place == DEVICE else self.machine.place(place).cpu_bytes_per_second
            total += size / (own or staged)
        return total


def _collect(found: Iterator[tuple[str, str] | Event], made: Events) -> Faults:
    """Faults go on, the event is kept."""
    for item in found:
        if isinstance(item, Event):
            made.append(item)
        else:
            yield item
