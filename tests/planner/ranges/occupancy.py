"""What really lies on the device and in staging at every moment of a timeline, buffer by buffer.

Knows when a buffer is filled and when it is last needed, and nothing of slots or rings: where it finds more
than the plan's peak, the rules that hand on slots are too generous. One micro-batch in flight.
"""

from __future__ import annotations

from collections import defaultdict

from memtrain.planner.ranges.bytes_check import Bill, Load, Loads, add
from memtrain.planner.ranges.model import DEVICE, Problem, Update
from memtrain.planner.ranges.plan import RangePlan
from memtrain.planner.ranges.simulate import Event

Span = tuple[float, float]


class Occupancy:
    """Bytes over time, from the events of a plan."""

    def __init__(self, plan: RangePlan, problem: Problem) -> None:
        self.plan, self.problem, self.bill, self.machine = plan, problem, Bill(plan, problem), problem.machine
        self.device: list[tuple[float, float, int]] = []
        """(from, to, bytes)."""
        self.staging: list[tuple[float, float, int]] = []
        self.count = len(problem.blocks)
        self.whole = (0.0, max(part.end_seconds for part in plan.parts))
        self._always()
        for number, part in enumerate(plan.parts):
            self.first, self.part = number == 0, (part.start_seconds, part.end_seconds)
            self.events: dict[str, list[Event]] = defaultdict(list)
            for event in plan.events:
                if event.part == number:
                    self.events[event.name].append(event)
            for index in range(self.count):
                self._tensors(index)
                self._parameters(index)
                self._gradients(index)
                for update in problem.updates if self.first else ():
                    if dict(plan.blocks[index].updates).get(update.label):
                        self._update(index, update)

    @staticmethod
    def peak(spans: list[tuple[float, float, int]]) -> int:
        """The most at once; what ends when another begins makes room for it."""
        changes = [(start, 1, size) for start, end, size in spans if end > start]
        changes += [(end, 0, -size) for start, end, size in spans if end > start]
        now = most = 0
        for _, _, size in sorted(changes):
            now += size
            most = max(most, now)
        return most

    def _span(self, name: str, resource: str = "compute", number: int = 0) -> Span:
        found = [e for e in self.events[name] if e.resource == resource]
        return found[number].start_seconds, found[number].end_seconds

    def _links(self, verb: str, name: str, loads: Loads, hop: int, number: int = 0) -> dict[str, Span]:
        """When the ``hop``-th copy for each place runs."""
        found = {}
        for place in loads:
            hops = self.machine.place(place).hops
            if hop < len(hops):
                resource = f"{verb}:{hops[hop].link}"
                same = [e for e in self.events[f"{verb} {name}"] if e.resource == resource]
                event = same[min(number, len(same) - 1)]
                found[place] = event.start_seconds, event.end_seconds
        return found

    def _far(self, loads: Loads) -> Loads:
        return {p: load for p, load in loads.items() if len(self.machine.place(p).hops) == 2}

    def _on_device(self, start: float, end: float, size: int) -> None:
        self.device.append((start, end, size))

    def _in_staging(self, start: float, end: float, size: int) -> None:
        self.staging.append((start, end, size))

    def _always(self) -> None:
        self._on_device(*self.whole, self.problem.reserved_bytes)
        for index in range(self.count):
            for role in ("parameter", "optimizer"):
                self._on_device(*self.whole, self.bill.held(index, role, DEVICE))
            place = self.machine.staging or ""
            own = sum(size for h, _, size in self.bill.states(index) if h.place == place)
            own += self.bill.sent[index][place] + self.bill.new_parameters(index)[0]
            self._in_staging(*self.whole, own)

    def _tensors(self, index: int) -> None:
        name, block = self.problem.blocks[index].name, self.problem.blocks[index]
        forward, backward = self._span(f"forward {name}"), self._span(f"backward {name}")
        self._on_device(*forward, block.forward_transient_bytes)
        self._on_device(*backward, block.backward_transient_bytes + self.bill.restored[index])
        self._on_device(forward[0], backward[1], self.bill.kept[index])
        if index + self.machine.slots >= self.count:
            self._on_device(forward[0], backward[1], self.bill.slot[index])
            return
        sent = self.bill.sent_loads(index)
        out, back = (self._links(verb, name, sent, 0) for verb in ("write", "read"))
        for place, (size, _) in sent.items():
            self._on_device(forward[0], out[place][1], size)
            self._on_device(back[place][0], backward[1], size)
        on, far = (self._links(verb, name, sent, 1) for verb in ("write", "read"))
        for place, (size, _) in self._far(sent).items():
            self._in_staging(out[place][0], on[place][1], size)
            self._in_staging(far[place][0], back[place][1], size)

    def _parameters(self, index: int) -> None:
        name = self.problem.blocks[index].name
        forward, backward = self._span(f"forward {name}"), self._span(f"backward {name}")
        stays = index + self.machine.slots >= self.count
        away = self.bill.loads(index, lambda u, role: role == "parameter")

        def fetched(update: Update, role: str) -> bool:
            return role == "parameter" and (not self.first or update.on_cpu or not update.ahead)

        loads = self.bill.loads(index, fetched)
        near = self._links("read", f"parameters {name}", loads, 0)
        far = self._links("read", f"parameters {name}", loads, 1)
        for place, (size, _) in away.items():
            got = loads.get(place, (0, 0))[0]
            if got:
                self._on_device(near[place][0], forward[1], got)
            # The rest comes from an update on the device just before.
            self._on_device(forward[0], forward[1], size - got)
            if place in far:
                self._in_staging(far[place][0], near[place][1], got)
        if stays:
            self._on_device(forward[1], backward[1], sum(size for size, _ in away.values()))
            return
        near = self._links("read", name, away, 0)
        far = self._links("read", name, away, 1)
        for place, (size, _) in away.items():
            self._on_device(near[place][0], backward[1], size)
            if place in far:
                self._in_staging(far[place][0], near[place][1], size)

    def _gradients(self, index: int) -> None:
        name = self.problem.blocks[index].name
        backward, staging = self._span(f"backward {name}"), self.machine.staging or ""
        here = self.bill.held(index, "gradient", DEVICE)
        if len(self.plan.parts) > 1:
            self._on_device(*self.part, here)
            self._on_device(*backward, self.bill.summed(index, on_cpu=False))
        else:
            self._on_device(backward[0], self.part[1], here)
            self._on_device(self.part[0], self._span(f"forward {name}")[0], here)
        self._on_device(*backward, self.bill.fleeting(index, on_cpu=False)[0])
        by_device = self.bill.loads(index, lambda u, role: role == "gradient" and not u.on_cpu)
        by_cpu = self.bill.loads(index, lambda u, role: role == "gradient" and u.on_cpu)
        handed: Load = (0, 0)
        if self.first:
            for place, load in by_cpu.items():
                add(by_device, place, load)
            handed = self.bill.fleeting(index, on_cpu=True)
            done = f"update {name}"
        else:
            for load in by_cpu.values():
                handed = handed[0] + load[0], handed[1] + load[1]
            done = f"add gradient {name}"
            for place, (size, _) in self._far(by_cpu).items():
                old = self._links("read", f"gradient {name} by cpu", by_cpu, 1)[place]
                new = self._links("write", f"gradient {name} by cpu", by_cpu, 1)[place]
                self._in_staging(old[0], new[1], size)
        loads = dict(by_device)
        add(loads, staging, handed)
        out = self._links("write", f"gradient {name}", loads, 0)
        on = self._links("write", f"gradient {name}", loads, 1)
        for place, (size, _) in loads.items():
            start = backward[0]
            if not self.first and place in by_device:
                start = self._links("read", f"gradient {name}", by_device, 0)[place][0]
            self._on_device(start, out[place][1], size)
            if place in on:
                self._in_staging(out[place][0], on[place][1], size)
                if not self.first:
                    far = self._links("read", f"gradient {name}", by_device, 1)[place]
                    near = self._links("read", f"gradient {name}", by_device, 0)[place]
                    self._in_staging(far[0], near[1], size)
        if handed[0]:
            self._in_staging(out[staging][0], self._span(done, "cpu", -1)[1], handed[0])

    def _update(self, index: int, update: Update) -> None:
        name, number = f"update {self.problem.blocks[index].name}", 0 if update.ahead else -1
        reads = self.bill.loads(index, lambda u, role: u == update and role != "parameter")
        writes = self.bill.loads(index, lambda u, role: u == update and role != "gradient")
        order = 0 if update.ahead else 1
        far = self._links("read", name, reads, 1, order)
        if update.on_cpu:
            stepped = self._span(name, "cpu", number)
            stored = self._links("write", f"{name} by cpu", writes, 1, order)
            for place, span in far.items():
                self._in_staging(span[0], stored.get(place, stepped)[1], reads[place][0])
            made = self.bill.loads(index, lambda u, role: u == update and role == "parameter")
            for place, (size, _) in self._far(made).items():
                self._in_staging(stepped[0], stored[place][1], size)
            return
        near, out = (self._links(*way, 0, order) for way in (("read", name, reads), ("write", name, writes)))
        on = self._links("write", name, writes, 1, order)
        for place, (size, _) in reads.items():
            if place in far:
                self._in_staging(far[place][0], near[place][1], size)
            if place not in out:
                self._on_device(near[place][0], near[place][1], size)
        for place, (size, _) in writes.items():
            start = near[place][0] if place in near else out[place][0]
            self._on_device(start, out[place][1], size)
            if place in on:
                self._in_staging(out[place][0], on[place][1], size)
