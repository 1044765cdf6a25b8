"""The checker's own rules of time (see ``check``): what must come before what, and how long it takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from memtrain.planner.ranges.bytes_check import Bill, Loads, add
from memtrain.planner.ranges.event_check import EventFinder, Events
from memtrain.planner.ranges.model import Problem, Update
from memtrain.planner.ranges.plan import RangePlan
from memtrain.planner.ranges.queue_check import Faults, Transfer, queue_faults

Sizes = Mapping[str, int]
"""Bytes by place."""
STATE_SLOTS = 2


def timeline_faults(plan: RangePlan, problem: Problem, bill: Bill) -> Faults:
    """Rules that the events break, with the numbers."""
    transfers: list[Transfer] = []
    wanted = list(_parts(problem))
    found = [part.times for part in plan.parts]
    if found != [times for times, _, _ in wanted]:
        yield "PARTS", f"the step's parts take place {found} times, not {[times for times, _, _ in wanted]}"
        return
    for number, (_, first, passes) in enumerate(wanted):
        part = _Part(plan, problem, bill, number, first=first, passes=passes, transfers=transfers)
        yield from part.faults()
    yield from queue_faults(plan, problem, transfers)


def _parts(problem: Problem) -> Iterator[tuple[int, bool, tuple[str, ...]]]:
    """What a step consists of: how often, whether it is the first micro-batch, and its passes."""
    batches = problem.micro_batches
    stateful = any(block.states for block in problem.blocks)
    kinds = [(1, True), (batches - 1, False)] if stateful and batches > 1 else [(batches, True)]
    both = ("forward", "backward")
    for times, first in kinds:
        for passes in [both] if problem.in_flight == 1 else [both[:1], both[1:]]:
            yield times, first, passes
    if stateful and _apart(problem):
        yield 1, True, ("update",)


def _apart(problem: Problem) -> bool:
    """Whether updates wait for the end of the last backward."""
    return any(update.apart for update in problem.updates)


class _Part(EventFinder):
    """Walks the blocks and asks for every event of one part that the decisions call for."""

    def __init__(
        self,
        plan: RangePlan,
        problem: Problem,
        bill: Bill,
        number: int,
        *,
        first: bool,
        passes: tuple[str, ...],
        transfers: list[Transfer],
    ) -> None:
        super().__init__(plan, problem, number, transfers)
        self.plan, self.problem, self.bill = plan, problem, bill
        self.first, self.passes = first, passes
        self.far = {p.name for p in self.machine.places if len(p.hops) == 2}
        self.left: dict[str, dict[int, Events]] = defaultdict(lambda: defaultdict(list))
        """By ring of slots and block: what must be over before another block takes its slot."""

    def faults(self) -> Faults:
        """Arithmetic in order and long enough; every byte's way out and back; updates; slots."""
        yield from self._arithmetic()
        every = range(len(self.names))
        if "forward" in self.passes:
            for index in every:
                yield from self._forward(index)
        if "backward" in self.passes:
            for index in reversed(every):
                yield from self._backward(index)
        if "update" in self.passes:
            for index in every:
                yield from self._updates(index, ahead=True)
                yield from self._made_by_cpu(index)

    def _made_by_cpu(self, index: int) -> Faults:
        """Parameters of the device that a sequential update on the CPU has made are brought there."""
        loads: Loads = {}
        add(loads, self.machine.staging, self.bill.new_parameters(index))
        made = self.left["made"][index]
        yield from self.copies("parameters", index, loads, 0, "read", made, Events())

    def _forward(self, index: int) -> Faults:
        if self.first and not _apart(self.problem):
            yield from self._updates(index, ahead=True)
        yield from self._parameters(index)
        yield from self._send(index)

    def _backward(self, index: int) -> Faults:
        yield from self._fetch(index)
        yield from self._gradients(index)
        if self.first:
            yield from self._updates(index, ahead=False)

    def _goes_far(self, places: Iterable[str]) -> bool:
        return any(place in self.far for place in places)

    def _arithmetic(self) -> Faults:
        bill, before = self.bill, Events()
        blocks = list(enumerate(self.problem.blocks))
        order = []
        if "forward" in self.passes:
            for i, b in blocks:
                least = b.forward_seconds + bill.compress_seconds[i] + self._moving(bill.sent[i])
                order.append((f"forward {b.name}", least))
        if "backward" in self.passes:
            for i, b in reversed(blocks):
                again = bill.recompute_seconds[i] + bill.decompress_seconds[i] + self._moving(bill.sent[i])
                order.append((f"backward {b.name}", b.backward_seconds + again))
        for name, least in order:
            made = Events()
            yield from self.need(name, "compute", least, before, made)
            before = made or before

    def _moving(self, sizes: Sizes) -> float:
        """Arithmetic that transfers cost."""
        return sum(size * self.machine.place(p).compute_seconds_per_byte for p, size in sizes.items())

    # Saved tensors.

    def _send(self, index: int) -> Faults:
        """Out after forward, hop after hop, before the slot is used again."""
        name, sent = self.names[index], self.bill.sent_loads(index)
        out, on = Events(), Events()
        ring, staging = self.left["saved"], self.left["forwarding"]
        before = index - self.machine.slots
        for other in (before,) if before in ring else ():
            yield from self.before(ring[other], f"forward {name}")
        waited = list(self.events[f"forward {name}", "compute"])
        far = self._goes_far(sent)
        if far:
            waited += staging[index - self.machine.forwarding_slots]
        yield from self.copies("", index, sent, 0, "write", waited, out)
        yield from self.copies("", index, sent, 1, "write", out, on)
        ring[index] = out or ring[before]
        staging[index] = on or staging[index - self.machine.forwarding_slots]

    def _fetch(self, index: int) -> Faults:
        """Tensors and parameters back, never before they were written, in time for backward."""
        if not self.bill.fetched(index):
            return
        name, wanted = self.names[index], self.bill.sent_loads(index)
        for place, load in self.bill.loads(index, lambda u, role: role == "parameter").items():
            add(wanted, place, load)
        far, near = Events(), Events()
        written_on, fetching = self.left["forwarding"][index], self.left["fetching"]
        later = index + self.machine.forwarding_slots
        yield from self.copies("", index, wanted, 1, "read", [*written_on, *fetching[later]], far)
        waited = [*self.left["saved"][index], *far]
        if index + self.machine.slots < len(self.names):
            waited += self.events[f"backward {self.names[index + self.machine.slots]}", "compute"]
        yield from self.copies("", index, wanted, 0, "read", waited, near)
        fetching[index] = near if far else fetching[later]
        yield from self.before(near, f"backward {name}")

    # State.

    def _parameters(self, index: int) -> Faults:
        """Fetched before forward; through the staging place where the CPU has just updated them."""

        def wanted(update: Update, role: str) -> bool:
            here = self.first and update.ahead and not update.on_cpu and not update.apart
            return role == "parameter" and not here

        name, loads = self.names[index], self.bill.loads(index, wanted)
        if self.first and not _apart(self.problem):
            add(loads, self.machine.staging, self.bill.new_parameters(index))
        far, near = Events(), Events()
        staged = self.left["staging"][index - STATE_SLOTS]
        before = index - self.machine.slots
        slot = self.events[f"forward {self.names[before]}", "compute"] if before >= 0 else []
        made = [*slot, *self.left["made"][index]]
        full = [*staged, *made, *self.left["stored"][index]]
        yield from self.copies("parameters", index, loads, 1, "read", full, far)
        yield from self.copies("parameters", index, loads, 0, "read", [*far, *made], near)
        if far:
            self.left["staging"][index] = [*self.left["staging"][index], *near]
        yield from self.before(near, f"forward {name}")

    def _gradients(self, index: int) -> Faults:
        """Written once backward has made them; further micro-batches add to what is there."""
        backward = self.events[f"backward {self.names[index]}", "compute"]
        name, later = f"gradient {self.names[index]}", index + STATE_SLOTS
        leaving, staged = self.left["gradient"], self.left["gradient staging"]
        loads = self.bill.loads(index, lambda u, role: role == "gradient")
        yield from self.before(leaving[later], f"backward {self.names[index]}")
        added, out, on, used = Events(), Events(), Events(), Events()
        if self.first:
            handed = self.bill.fleeting(index, on_cpu=True)
        else:
            sums = self.bill.loads(index, lambda u, role: role == "gradient" and u.on_cpu)
            loads = self.bill.loads(index, lambda u, role: role == "gradient" and not u.on_cpu)
            far, near = Events(), Events()
            yield from self.copies("gradient", index, loads, 1, "read", staged[later], far)
            yield from self.copies("gradient", index, loads, 0, "read", [*far, *leaving[later]], near)
            yield from self.before(near, f"backward {self.names[index]}")
            yield from self.copies("gradient", index, sums, 1, "read", staged[later], added, by_cpu=True)
            handed = (sum(size for size, _ in sums.values()), sum(copies for _, copies in sums.values()))
        through = self._goes_far(loads) or handed[0] > 0
        add(loads, self.machine.staging, handed)
        waited = [*backward, *(staged[later] if through else [])]
        yield from self.copies("gradient", index, loads, 0, "write", waited, out)
        yield from self.copies("gradient", index, loads, 1, "write", out, on)
        if not self.first:
            least = self.bill.adding_seconds(index)
            yield from self.need(f"add {name}", "cpu", least, [*out, *added], used)
            yield from self.copies("gradient", index, sums, 1, "write", list(used), used, by_cpu=True)
        leaving[index] = out or leaving[later]
        staged[index] = [*on, *used] or staged[later]
        self.left["arrived"][index] = out

    def _updates(self, index: int, *, ahead: bool) -> Faults:
        """State read and gradients made before updates, results written and forward begun after them."""
        shares = dict(self.plan.blocks[index].updates)
        mine = [u for u in self.problem.updates if u.ahead is ahead and shares.get(u.label)]
        reads = self.bill.loads(index, lambda u, role: u in mine and role != "parameter")
        before, far = index + (-STATE_SLOTS if ahead else STATE_SLOTS), Events()
        staging = self.left["staging"]
        yield from self.copies("update", index, reads, 1, "read", staging[before], far, ahead=ahead)
        through = Events()
        for update in mine:
            one_side = self._on_cpu if update.on_cpu else self._on_device
            yield from one_side(index, update, before, far, through)
        staging[index] = [*staging[index], *(through or staging[before])]

    def _made(self, index: int, update: Update, waited: Events, done: Events) -> Faults:
        """The update itself."""
        block, seconds = self.problem.blocks[index], self.bill.update_seconds(index, update)
        name, resource = f"update {block.name}", "cpu" if update.on_cpu else "compute"
        if not update.ahead:
            waited = [*waited, *self.events[f"backward {block.name}", "compute"]]
        candidates = self.of_phase(name, resource, ahead=update.ahead)
        yield from self.need(name, resource, seconds, waited, done, candidates=candidates)
        if update.ahead:
            yield from self.before(done, f"forward {block.name}")

    def _on_cpu(self, index: int, update: Update, before: int, far: Events, through: Events) -> Faults:
        """By the CPU, in staging slots where it cannot address the place."""
        reads = self.bill.loads(index, lambda u, role: u == update and role != "parameter")
        writes = self.bill.loads(index, lambda u, role: u == update and role != "gradient")
        staged = self.left["staging"][before] if self._goes_far([*reads, *writes]) else []
        arrived = [] if update.ahead else self.left["arrived"][index]
        done, stored = Events(), Events()
        yield from self._made(index, update, [*far, *arrived, *staged], done)
        yield from self.copies(
            "update", index, writes, 1, "write", done, stored, ahead=update.ahead, by_cpu=True
        )
        self.left["made"][index], self.left["stored"][index] = done, stored
        if arrived:
            ring = self.left["gradient staging"]
            ring[index] = [*ring[index], *done]
        through += [*(done if self._goes_far(reads) else []), *stored]

    def _on_device(self, index: int, update: Update, before: int, far: Events, through: Events) -> Faults:
        """By the device, whose slots state passes through both ways."""
        ahead, slot = update.ahead, self.left["update"][before]
        reads = self.bill.loads(index, lambda u, role: u == update and role != "parameter")
        writes = self.bill.loads(index, lambda u, role: u == update and role != "gradient")
        near, done, out, on = Events(), Events(), Events(), Events()
        yield from self.copies("update", index, reads, 0, "read", [*far, *slot], near, ahead=ahead)
        yield from self._made(index, update, [*near, *(slot if reads or writes else [])], done)
        full = self.left["staging"][before] if self._goes_far(writes) else []
        waited = [*(done or near), *full]
        if ahead:
            yield from self.before(near, f"forward {self.names[index]}")
        else:
            waited += self.events[f"backward {self.names[index]}", "compute"]
        yield from self.copies("update", index, writes, 0, "write", waited, out, ahead=ahead)
        yield from self.copies("update", index, writes, 1, "write", out, on, ahead=ahead)
        if reads or writes:
            self.left["update"][index] = [*self.left["update"][index], *done, *out]
        through += [*(near if self._goes_far(reads) else []), *on]
