"""The checker's way to an event (see ``check``): found by name, long enough, and after what it needs."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable

from memtrain.planner.ranges.bytes_check import Loads
from memtrain.planner.ranges.model import DEVICE, Problem
from memtrain.planner.ranges.plan import RangePlan
from memtrain.planner.ranges.queue_check import ROUNDING_SECONDS, Faults, Transfer
from memtrain.planner.ranges.simulate import Event

Events = list[Event]


class EventFinder:
    """The events of one part of a step, and the copies among them that were asked for."""

    def __init__(self, plan: RangePlan, problem: Problem, part: int, transfers: list[Transfer]) -> None:
        self.machine, self.transfers = problem.machine, transfers
        self.names = [b.name for b in problem.blocks]
        self.events: dict[tuple[str, str], Events] = defaultdict(list)
        for event in plan.events:
            if event.part == part:
                self.events[event.name, event.resource].append(event)

    def need(
        self,
        name: str,
        resource: str,
        least: float,
        after: Iterable[Event],
        made: Events,
        *,
        candidates: Events | None = None,
    ) -> Faults:
        """Faults of the event of this name, which is appended to ``made``."""
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
                over = f"{other.name} on {other.resource} is over"
                yield "DEPENDENCY", f"{name} on {resource} starts before {over}"
        made.append(event)

    def copies(
        self,
        kind: str,
        index: int,
        loads: Loads,
        hop: int,
        way: str,
        after: Iterable[Event],
        made: Events,
        *,
        ahead: bool | None = None,
        by_cpu: bool = False,
    ) -> Faults:
        """The ``hop``-th copies of a block's ``loads``, each after ``after``.

        ``kind`` is ``parameters``, ``gradient``, ``update`` or, for saved tensors and what is fetched with
        them, empty; ``ahead`` tells updates apart, whose two phases share their names.
        """
        words = [way, kind, self.names[index], "by cpu" if by_cpu else ""]
        name, waited = " ".join(word for word in words if word), list(after)
        upward = {"": way == "write", "parameters": True, "gradient": False, "update": bool(ahead)}[kind]
        for resource, (least, size, places) in self.least(loads, hop, way).items():
            candidates, found = None, Events()
            if ahead is not None:
                candidates = self.of_phase(name, resource, ahead=ahead)
            yield from self.need(name, resource, least, waited, found, candidates=candidates)
            self.transfers += [
                Transfer(
                    event=event,
                    kind=f"{way} {kind}{words[3]}",
                    block=index,
                    upward=upward,
                    size_bytes=size,
                    places=places,
                )
                for event in found
            ]
            made += found

    def of_phase(self, name: str, resource: str, *, ahead: bool) -> Events:
        """Of two events of a name, an update's ahead and in backward, the one that is meant."""
        events = self.events[name, resource]
        if len(events) == 2:
            return [events[0 if ahead else 1]]
        return events

    def least(self, loads: Loads, hop: int, way: str) -> dict[str, tuple[float, int, tuple[str, ...]]]:
        """By queue, for what goes to or comes from places by their ``hop``-th copy: least seconds, bytes, and
        the places."""
        found: dict[str, tuple[float, int, tuple[str, ...]]] = {}
        for place, (size, copies) in loads.items():
            hops = self.machine.place(place).hops if place != DEVICE else ()
            if hop < len(hops) and size:
                rate = hops[hop].write_bytes_per_second if way == "write" else hops[hop].read_bytes_per_second
                queue = f"{way}:{hops[hop].link}"
                seconds, total, places = found.get(queue, (0.0, 0, ()))
                seconds += size / rate + copies * hops[hop].latency_seconds
                found[queue] = seconds, total + size, tuple(sorted({*places, place}))
        return found

    def before(self, events: Iterable[Event], use: str) -> Faults:
        """Faults of ``events`` that are not over when the arithmetic called ``use`` begins."""
        for event, after in itertools.product(events, self.events[use, "compute"]):
            if after.start_seconds < event.end_seconds - ROUNDING_SECONDS:
                yield "DEPENDENCY", f"{use} starts before {event.name} on {event.resource} is over"
