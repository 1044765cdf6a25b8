"""What a step will take: the executors' queues, replayed event by event.

One thread computes. Each tier has a read queue and a write queue, first in, first out. A step is a fixed
list of jobs per queue with dependencies between them (see docs/plan.md for which); the clock runs from the
end of one step's ``step()`` to the end of the next, everything written included, so that an update that
runs ahead of the forward is counted once.

While both directions of a tier are busy each runs at the same fraction of its own rate, such that together
they move ``mixed_bytes_per_second``. On a CPU the processor time of a transfer is added to the arithmetic
that starts or awaits it, and so are the copy of what is kept, swapped or stored out of the heap and the
passes over gradients (``decisions.gradient_passes``). It is not divided by the cores: arithmetic is cut into
equal parts, one a core, and the core that loses time to a transfer makes all others wait. On a CUDA device
none of this is added.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from memtrain.planner import tables
from memtrain.planner.actions import Action, MicroBatchOrder, StateDecision, Tier, UpdateSchedule
from memtrain.planner.block_parts import copied_bytes, is_recomputed, joined_bytes, recompute_seconds, traffic
from memtrain.planner.decisions import Decisions, gradient_passes, unit_elements
from memtrain.planner.machine import Machine
from memtrain.planner.plan import Event
from memtrain.planner.price import traffic_seconds_of
from memtrain.planner.profile import ModelProfile, UnitProfile
from memtrain.planner.queues import COMPUTE, Job, run
from memtrain.planner.slot_jobs import Read, ReadAhead, Slots
from memtrain.planner.weight_coding import weight_ways
from memtrain.planner.weight_jobs import WeightJobs

MAX_PIECES = 32
"""A unit's shards beyond this many are simulated as so many larger ones: the pipeline's ramp, one piece in
32, is below the error of the bandwidth measurement, and a 70 B model stays quick to simulate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """The predicted step."""

    step_seconds: float
    bytes_moved: int
    """Over all links, both directions, one optimizer step."""
    traffic_seconds: float
    """For which they occupy the queues (``price.traffic_seconds_of``)."""
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class _Group:
    """What one block has sent to one tier in a micro-batch: it has a slot of its own."""

    owner: tuple[int, int]
    """Block and micro-batch."""
    tier: Tier
    size_bytes: int
    slot: int
    write: int
    """The job."""


_Reads = dict[tuple[int, int], list[tuple[int, _Group]]]
"""By block and micro-batch the jobs that fetch what it has sent away, as far as it is fetched."""


def simulate(profile: ModelProfile, machine: Machine, decisions: Decisions) -> Timeline:
    """The timeline of one step in the steady state under ``decisions``.

    Args:
        profile: with the seconds that its parts take in a step (``ModelProfile.in_a_step``).
        machine: its links, and the speed of a copy on a CPU.
        decisions: all that was chosen.

    Raises:
        KeyError: a decision names a tier that ``machine`` has no link to.
    """
    schedule = _Schedule(profile, machine, decisions)
    jobs = schedule.jobs
    starts, ends = run(jobs, machine)
    return Timeline(
        step_seconds=round(max(ends, default=0.0), 9),
        bytes_moved=round(schedule.moved),
        traffic_seconds=traffic_seconds_of(jobs, machine),
        events=tuple(
            Event(
                name=job.name, resource=job.resource, start_seconds=round(start, 9), end_seconds=round(end, 9)
            )
            for job, start, end in zip(jobs, starts, ends, strict=True)
        ),
    )


class _Schedule:
    """The jobs of one step, in the order in which each queue gets them."""

    def __init__(self, profile: ModelProfile, machine: Machine, decisions: Decisions) -> None:
        self.profile, self.decisions = profile, decisions
        self.jobs: list[Job] = []
        on_cpu = machine.on_cpu
        self._cpu = {k.tier: k.cpu_seconds_per_byte * on_cpu for k in machine.links}
        self._links = {k.tier: k for k in machine.links}
        self._on_cpu = on_cpu
        self.moved = 0.0
        """Bytes over all links; a queue's amount is larger or smaller where they are coded."""
        self._copy_seconds_per_byte = on_cpu / machine.dram_copy_bytes_per_second
        staging = decisions.staging
        self._saved_ring = Slots(staging.saved_slots)
        self._input_ring = Slots(staging.input_slots)
        # Gradients pass in pieces of half the ring: two pieces overlap as well as four slots do.
        self._gradient_ring = Slots(min(2, staging.gradient_slots))
        self._gradient_piece = staging.gradient_slots * staging.gradient_slot_bytes // 2
        self._update_ring = Slots(staging.update_slots)
        self._last_compute: int | None = None
        self._gradient_written: dict[tuple[str, int], int] = {}
        self._open: dict[tuple[str, int], tuple[int, tuple[int, ...]]] = {}
        self._units = list(zip(profile.units, decisions.states, strict=True))
        ways = weight_ways(machine, staging.coded_weights)
        self._weights = WeightJobs(profile, decisions, ways, self._add)
        self._in_backward: ReadAhead | None = None
        """In the pass in which units are updated as their gradients come."""
        schedule = decisions.update_schedule
        ahead = schedule is UpdateSchedule.AHEAD
        every = range(profile.micro_batches)
        if decisions.micro_batch_order is MicroBatchOrder.VERTICAL:
            self._passes(every, update=ahead)
        else:
            for micro_batch in every:
                if schedule is UpdateSchedule.IN_BACKWARD and micro_batch == every[-1]:
                    self._in_backward = ReadAhead(
                        [(unit.name, self._state_reads(unit, d)) for _, unit, d in self._backward_order()],
                        self._update_ring,
                        self._add,
                    )
                self._passes([micro_batch], update=ahead and micro_batch == 0)
        if profile.tables:
            self._add("update tables", COMPUTE, tables.update_seconds(profile), self._after_compute())
            self.moved += tables.moved_bytes(profile)
        if schedule is UpdateSchedule.SEQUENTIAL:
            step_begins = self._after_compute() + self._slab_free()
            for index, (unit, decision) in enumerate(self._units):
                self._update(index, unit, decision, step_begins)
                self._weights.over(self._after_compute())

    def _add(
        self, name: str, resource: str, amount: float, after: tuple[int, ...] = (), moved: float | None = None
    ) -> int:
        self.jobs.append(Job(name, resource, amount, after))
        if resource == COMPUTE:
            self._last_compute = len(self.jobs) - 1
        else:
            self.moved += amount if moved is None else moved
        return len(self.jobs) - 1

    def _after_compute(self) -> tuple[int, ...]:
        return () if self._last_compute is None else (self._last_compute,)

    def _slab_free(self) -> tuple[int, ...]:
        """What must be over before the update's slots are filled, where they lie in those of the passes."""
        if not self.decisions.staging.update_overlaid_bytes:
            return ()
        rings = (self._saved_ring, self._input_ring, self._gradient_ring)
        return tuple(job for ring in rings for jobs in ring.free_after for job in jobs)

    def _of(self, block: int | None, name: str) -> Iterator[tuple[UnitProfile, StateDecision]]:
        for _, unit, decision in self._numbered(block, name):
            yield unit, decision

    def _numbered(self, block: int | None, name: str) -> Iterator[tuple[int, UnitProfile, StateDecision]]:
        for index, (unit, decision) in enumerate(self._units):
            here = "epilogue" if unit.name == "epilogue" else "prologue"
            if unit.block == block and (block is not None or here == name):
                yield index, unit, decision

    def _updates_here(self, block: int | None, name: str) -> None:
        """Updates that run ahead of a forward."""
        for index, unit, decision in self._numbered(block, name):
            self._update(index, unit, decision, ())

    def _passes(self, together: Sequence[int], *, update: bool) -> None:
        """Forward and backward of micro-batches that pass every block together: forward the last one first,
        so that backward, which begins with the first, meets what they have sent away in reverse."""
        profile = self.profile
        for micro_batch in together:
            first = update and micro_batch == together[0]
            self._part(None, "prologue", profile.prologue_forward_seconds, "forward", update=first)
        saved: list[_Group] = []
        moved: list[_Group] = []
        for index in range(len(profile.blocks)):
            for micro_batch in reversed(together):
                first = update and micro_batch == together[-1]
                self._forward(index, saved, moved, micro_batch, update=first)
        for micro_batch in together:
            self._loss(micro_batch, update=update and micro_batch == together[0])
        present: _Reads = {}
        for index in reversed(range(len(profile.blocks))):
            for micro_batch in together:
                self._backward(index, saved, moved, present, micro_batch)
        for micro_batch in together:
            self._backward_prologue(micro_batch)

    def _loss(self, micro_batch: int, *, update: bool) -> None:
        seconds = self.profile.epilogue_forward_seconds + self.profile.epilogue_backward_seconds
        seconds += self._gradient_copy(None, "epilogue", micro_batch)
        self._part(None, "epilogue", seconds, "loss", update=update)
        if self._in_backward is not None:
            self._in_backward.begin(self._after_compute())
        self._open_gradients(None, "epilogue", micro_batch)
        self._gradients(None, "epilogue", micro_batch)
        self._updates_in_backward(None, "epilogue")

    def _backward_prologue(self, micro_batch: int) -> None:
        self._open_gradients(None, "prologue", micro_batch)
        seconds = self.profile.prologue_backward_seconds + self._gradient_copy(None, "prologue", micro_batch)
        weights, fetch = self._weights.needed()
        self._used((self._add("backward prologue", COMPUTE, seconds + fetch, weights),))
        self._gradients(None, "prologue", micro_batch)
        self._updates_in_backward(None, "prologue")

    def _part(self, block: int | None, name: str, seconds: float, verb: str, *, update: bool) -> None:
        if update:
            self._updates_here(block, name)
        weights, fetch = self._weights.needed()
        job = self._add(f"{verb} {name}", COMPUTE, seconds + fetch, weights)
        if verb == "loss":
            self._used((job,))
        else:
            self._weights.over((job,))

    def _used(self, jobs: tuple[int, ...]) -> None:
        """Backward is done with a turn's weights; an update in backward follows in the same turn."""
        if self._in_backward is None:
            self._weights.over(jobs)

    def _gradient_copy(self, block: int | None, name: str, micro_batch: int) -> float:
        """Seconds to copy gradients that stay into their slab, or to add them to what is there."""
        resident = (u.gradient_bytes for u, d in self._of(block, name) if d.gradient_tier is Tier.DEVICE)
        passes = gradient_passes(stays=True, first=micro_batch == 0)
        return passes * sum(resident) * self._copy_seconds_per_byte

    def _traffic(self, index: int) -> tuple[tuple[Tier, int], ...]:
        return traffic(self.profile.blocks[index], self.decisions.blocks[index])

    def _forward(
        self, index: int, saved: list[_Group], moved: list[_Group], micro_batch: int, *, update: bool
    ) -> None:
        """Forward of a block, which waits for a slot for each tier that it sends something to."""
        block, decision = self.profile.blocks[index], self.decisions.blocks[index]
        if update:
            self._updates_here(index, block.name)
        weights, fetch = self._weights.needed()
        parts = sorted(self._traffic(index))  # by the tier's name, as the executor takes slots
        seconds = block.in_form(decision.form).forward_seconds
        seconds += copied_bytes(block, decision) * self._copy_seconds_per_byte
        seconds += sum(size * self._cpu[tier] for tier, size in parts) + fetch
        if not parts:
            self._weights.over((self._add(f"forward {block.name}", COMPUTE, seconds, weights),))
            return
        ring, held = (
            (self._saved_ring, saved) if decision.action is Action.SWAP else (self._input_ring, moved)
        )
        taken = [ring.take() for _ in parts]
        free = tuple(job for _, jobs in taken for job in jobs)
        forward = self._add(f"forward {block.name}", COMPUTE, seconds, (*free, *weights))
        self._weights.over((forward,))
        for (tier, size), (slot, _) in zip(parts, taken, strict=True):
            write = self._add(f"write {block.name}", f"write:{tier.value}", size, (forward,))
            ring.free_after[slot] = (write,)
            held.append(_Group((index, micro_batch), tier, size, slot, write))

    def _backward(
        self,
        index: int,
        saved: list[_Group],
        moved: list[_Group],
        present: _Reads,
        micro_batch: int,
    ) -> None:
        """Backward of a block: fetched, recomputed where it must be, its slots handed to earlier ones."""
        block, decision = self.profile.blocks[index], self.decisions.blocks[index]
        self._open_gradients(index, block.name, micro_batch)
        fetched = present.get((index, micro_batch), [])
        weights, fetch = self._weights.needed()
        reads = (*weights, *(job for job, _ in fetched))
        fetch += sum(self._cpu[group.tier] * group.size_bytes for _, group in fetched)
        if is_recomputed(decision):
            seconds = recompute_seconds(block, decision) + fetch
            seconds += joined_bytes(block, decision) * self._copy_seconds_per_byte
            self._add(f"recompute {block.name}", COMPUTE, seconds, reads)
            reads, fetch = (), 0.0
        seconds = block.in_form(decision.form).backward_seconds + fetch
        seconds += self._gradient_copy(index, block.name, micro_batch)
        backward = self._add(f"backward {block.name}", COMPUTE, seconds, reads)
        self._used((backward,))
        for ring, held in ((self._saved_ring, saved), (self._input_ring, moved)):
            self._hand_over((index, micro_batch), backward, ring, held, present)
        self._gradients(index, block.name, micro_batch)
        self._updates_in_backward(index, block.name)

    def _hand_over(
        self, owner: tuple[int, int], backward: int, ring: Slots, held: list[_Group], present: _Reads
    ) -> None:
        """Each slot of ``owner`` goes to the group ``ring.count`` places before, which is fetched."""
        for place in reversed([place for place, group in enumerate(held) if group.owner == owner]):
            group = held[place]
            ring.free_after[group.slot] = (backward, group.write)
            if place < ring.count:
                continue
            target = held[place - ring.count]
            name, resource = self.profile.blocks[target.owner[0]].name, f"read:{target.tier.value}"
            after = (backward, group.write, target.write)
            read = self._add(f"read {name}", resource, target.size_bytes, after)
            present.setdefault(target.owner, []).append((read, target))

    def _open_gradients(self, block: int | None, name: str, micro_batch: int) -> None:
        """As backward begins: the ring's first slots, and from the second micro-batch on the old sums."""
        started = self._after_compute()
        for unit, decision in self._of(block, name):
            if decision.gradient_tier is not Tier.DEVICE and unit.gradient_bytes:
                pieces = min(MAX_PIECES, -(-unit.gradient_bytes // self._gradient_piece))
                for piece in range(min(pieces, self._gradient_ring.count)):
                    self._open_piece(unit, decision.gradient_tier, pieces, piece, micro_batch, started)
                return

    def _open_piece(
        self,
        unit: UnitProfile,
        tier: Tier,
        pieces: int,
        piece: int,
        micro_batch: int,
        started: tuple[int, ...],
    ) -> None:
        slot, free = self._gradient_ring.take()
        if micro_batch > 0:
            old = self._gradient_written[unit.name, piece]
            resource = f"read:{tier.value}"
            size = unit.gradient_bytes / pieces
            free = (self._add(f"read gradient {unit.name}", resource, size, (*free, *started, old)),)
        self._open[unit.name, piece] = slot, free

    def _gradients(self, block: int | None, name: str, micro_batch: int) -> None:
        """Gradients leave in pieces; from the second micro-batch on they are added to the old sum first."""
        for unit, decision in self._of(block, name):
            tier = decision.gradient_tier
            if tier is Tier.DEVICE or not unit.gradient_bytes:
                continue
            pieces = min(MAX_PIECES, -(-unit.gradient_bytes // self._gradient_piece))
            size = unit.gradient_bytes / pieces
            moves = 2 if micro_batch > 0 else 1
            passes = gradient_passes(stays=False, first=micro_batch == 0)
            seconds = size * (passes * self._copy_seconds_per_byte + self._cpu[tier] * moves)
            for piece in range(pieces):
                if (unit.name, piece) not in self._open:
                    self._open_piece(unit, tier, pieces, piece, micro_batch, ())
                slot, free = self._open.pop((unit.name, piece))
                stored = self._add(f"gradient {unit.name}", COMPUTE, seconds, free)
                write = self._add(f"write gradient {unit.name}", f"write:{tier.value}", size, (stored,))
                self._gradient_ring.free_after[slot] = (write,)
                self._gradient_written[unit.name, piece] = write
                ahead = piece + self._gradient_ring.count
                if ahead < pieces:
                    self._open_piece(unit, tier, pieces, ahead, micro_batch, ())

    def _backward_order(self) -> list[tuple[int, UnitProfile, StateDecision]]:
        """Units in the order in which a backward pass has their gradients complete."""
        places: list[tuple[int | None, str]] = [(None, "epilogue")]
        places += [(index, block.name) for index, block in reversed(list(enumerate(self.profile.blocks)))]
        return [found for place in (*places, (None, "prologue")) for found in self._numbered(*place)]

    def _updates_in_backward(self, block: int | None, name: str) -> None:
        """Updates of units whose gradients are complete; where a pass has them, the turn ends with them."""
        if self._in_backward is None:
            return
        complete = self._after_compute()
        for index, unit, decision in self._numbered(block, name):
            self._update(index, unit, decision, complete)
        self._weights.over(self._after_compute())

    def _state_reads(self, unit: UnitProfile, decision: StateDecision) -> list[Read] | None:
        """Of each shard what may be read before its gradient is there. None where that comes from a tier: the
        executor reads both together."""
        streamed = decision.optimizer_tier is not Tier.DEVICE and unit.state_bytes > 0
        if decision.gradient_tier is not Tier.DEVICE and unit.gradient_bytes:
            return None
        if not streamed:
            return []
        link, pieces = self._links[decision.optimizer_tier], self._pieces(unit)
        state = float(unit.state_bytes)
        load = link.state_load(state, read=True) / pieces
        return [Read(f"read:{link.tier.value}", load, state * link.state_ratio / pieces)] * pieces

    def _pieces(self, unit: UnitProfile) -> int:
        shard = self.decisions.staging.update_shard_elements
        return max(1, min(MAX_PIECES, -(-unit_elements(self.profile, unit) // shard)))

    def _update(self, index: int, unit: UnitProfile, decision: StateDecision, after: tuple[int, ...]) -> None:
        """One unit's optimizer step on weights that are there: read shard k+1, step k, write k-1."""
        streamed = decision.optimizer_tier is not Tier.DEVICE and unit.state_bytes > 0
        reads: list[tuple[Tier, float, float]] = []  # tier, amount for its queue, bytes that move
        weights, fetch = self._weights.needed()
        if self._in_backward is not None or not after:
            fetch = 0.0  # the forward or backward of the same turn pays for the weights' way in
        seconds = unit.update_seconds + self._weights.writing_seconds(index) + fetch
        state = float(unit.state_bytes)
        if streamed:
            link = self._links[decision.optimizer_tier]
            reads.append((link.tier, link.state_load(state, read=True), state * link.state_ratio))
            seconds += 2 * state * link.state_cpu_seconds_per_byte * self._on_cpu
        if decision.gradient_tier is not Tier.DEVICE and unit.gradient_bytes:
            size = float(unit.gradient_bytes)
            reads.append((decision.gradient_tier, size, size))
            seconds += size * self._cpu[decision.gradient_tier]
        if not reads:
            if unit.update_seconds or self._weights.is_written(index):
                self._weights.updated(index, self._add(f"update {unit.name}", COMPUTE, seconds, weights))
            return
        pieces = self._pieces(unit)
        # Within this step the gradient's pieces must have been written; ahead, they were so a step ago.
        written = tuple(
            job for (name, _), job in self._gradient_written.items() if name == unit.name and after
        )
        # One name for all pieces: a plan keeps an event of each, of which there may be thousands.
        reading, stepping, writing = (f"{what}update {unit.name}" for what in ("read ", "", "write "))
        for _ in range(pieces):
            early = None if self._in_backward is None else self._in_backward.take(unit.name)
            if early is not None:
                slot, fetched = early
            else:
                slot, free = self._update_ring.take()
                needs = (*free, *after, *written)
                fetched = tuple(
                    self._add(reading, f"read:{tier.value}", load / pieces, needs, moved / pieces)
                    for tier, load, moved in reads
                )
            step = self._add(stepping, COMPUTE, seconds / pieces, (*fetched, *weights))
            self._update_ring.free_after[slot] = (step,)
            if streamed:
                where, load = f"write:{link.tier.value}", link.state_load(state, read=False)
                moved = state * link.state_ratio / pieces
                write = self._add(writing, where, load / pieces, (step,), moved)
                self._update_ring.free_after[slot] = (write,)
            if self._in_backward is not None:
                self._in_backward.go_on()
        if self._in_backward is not None:
            self._in_backward.done(unit.name)
        self._weights.updated(index, step)
