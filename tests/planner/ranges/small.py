"""Small problems with round numbers, random ones, and the best of all their decisions by enumeration."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from memtrain.planner.ranges.formulate import Decisions, Formulated
from memtrain.planner.ranges.model import (
    ALL_UPDATES,
    DEVICE,
    Block,
    Codec,
    Hop,
    Machine,
    Place,
    Problem,
    Role,
    StateClass,
    TensorClass,
    Update,
)
from memtrain.planner.ranges.simulate import step_seconds


def hop(link: str, write: float = 10.0, read: float | None = None) -> Hop:
    """Bytes per second."""
    return Hop(link=link, write_bytes_per_second=write, read_bytes_per_second=write if read is None else read)


def place(name: str, capacity: int = 1000, *hops: Hop, **more: Any) -> Place:
    """A thousand bytes over a link of its own at 10 bytes a second."""
    return Place(name=name, capacity_bytes=capacity, hops=hops or (hop(name),), **more)


def tensors(
    chunks: int = 2, *, x: int = 5, a: int = 5, o: int = 20, again: tuple[float, ...] = (1.0, 3.0)
) -> tuple[TensorClass, ...]:
    """X cannot be recomputed; A costs ``again`` chunk by chunk; O costs a second a chunk. Bytes per chunk."""
    return (
        TensorClass(name="X", chunk_bytes=x, chunks=chunks, lossy=True),
        TensorClass(
            name="A",
            chunk_bytes=a,
            chunks=chunks,
            recompute_seconds=again[:chunks],
            needs=("X",),
            lossy=True,
            attention=True,
        ),
        TensorClass(
            name="O",
            chunk_bytes=o,
            chunks=chunks,
            recompute_seconds=(1.0,) * chunks,
            needs=("X", "A"),
            lossy=True,
        ),
    )


def block(index: int = 0, **changes: Any) -> Block:
    """Forward 4 s, backward 8 s, no transients, classes of ``tensors``."""
    fields: dict[str, Any] = {
        "name": f"layers.{index}",
        "forward_seconds": 4.0,
        "backward_seconds": 8.0,
        "classes": tensors(),
    }
    return Block(**(fields | changes))


def problem(count: int = 3, device: int = 100, *places: Place, **changes: Any) -> Problem:
    """``count`` blocks on a device of ``device`` bytes beside ``places``, one slot."""
    blocks = changes.pop("blocks", None) or tuple(block(i) for i in range(count))
    machine = Machine(
        device_capacity_bytes=device,
        places=places,
        slots=changes.pop("slots", 1),
        staging=changes.pop("staging", None),
        forwarding_slots=changes.pop("forwarding_slots", 2),
    )
    return Problem(blocks=blocks, machine=machine, **changes)


INT8 = Codec(
    name="int8",
    ratio=0.5,
    compress_bytes_per_second=50.0,
    decompress_bytes_per_second=100.0,
    error=1.0,
    places=("host",),
)


def states(
    parameters: tuple[str, ...] = (DEVICE,),
    gradients: tuple[str, ...] = (DEVICE,),
    optimizer: tuple[str, ...] = (DEVICE,),
    *,
    pieces: int = 1,
    sizes: tuple[int, int, int] = (4, 4, 24),
) -> tuple[StateClass, ...]:
    """Bytes of all pieces of parameters, gradients and optimizer state, and where each may lie."""
    roles = (Role.PARAMETER, Role.GRADIENT, Role.OPTIMIZER)
    return tuple(
        StateClass(name=role.value, role=role, piece_bytes=size // pieces, places=where)
        for role, size, where in zip(roles, sizes, (parameters, gradients, optimizer), strict=True)
    )


def update(where: str, when: str) -> Update:
    """``update("cpu", "ahead")``."""
    return Update(on_cpu=where == "cpu", ahead=when == "ahead")


def every(formulated: Formulated) -> Iterator[Decisions]:
    """All decisions whose counts add up; capacities ignored."""
    groups: list[list[dict[int, int]]] = []
    problem, choices, states = formulated.problem, formulated.choices, formulated.states
    for index, one in enumerate(problem.blocks):
        for tensor, chosen in zip(one.classes, choices.counts[index], strict=True):
            groups.append(list(_shared(list(chosen.values()), tensor.chunks)))
        if one.states:
            groups.append(list(_states(states, index, one.pieces)))
    for parts in itertools.product(*groups):
        counts: dict[int, int] = {}
        for part in parts:
            counts |= part
        yield formulated.decisions(counts)


def _shared(variables: list[int], total: int) -> Iterator[dict[int, int]]:
    if len(variables) == 1:
        yield {variables[0]: total}
        return
    for first in range(total + 1):
        for rest in _shared(variables[1:], total - first):
            yield {variables[0]: first} | rest


def _states(states: Any, index: int, pieces: int) -> Iterator[dict[int, int]]:
    for shares in _shared(list(states.updated[index].values()), pieces):
        parts: list[list[dict[int, int]]] = []
        for way, variable in states.updated[index].items():
            by_class: dict[str, list[int]] = {}
            for placement, placed in states.placed[index].items():
                if placement.update == way:
                    by_class.setdefault(placement.state.name, []).append(placed)
            parts += [list(_shared(group, shares[variable])) for group in by_class.values()]
        for chosen in itertools.product(*parts):
            counts = dict(shares)
            for part in chosen:
                counts |= part
            yield counts


def best_of_all(formulated: Formulated) -> float:
    """The least step of all decisions that fit; inf when none does."""
    return min(
        (step_seconds(formulated, d) for d in every(formulated) if not formulated.excess(d)), default=math.inf
    )


@st.composite
def problems(draw: st.DrawFn, *, most_blocks: int = 3) -> Problem:
    """Adversarial sizes: primes and ones, devices that miss up to a quarter of the need, any link."""
    size = st.sampled_from([7, 3, 0, 1, 2, 11, 13])
    seconds = st.sampled_from([1.0, 0.25, 0.5, 3.0])
    rate = st.sampled_from([10.0, 3.0, 1.0, 30.0])

    def some_block(index: int) -> Block:
        chunks = draw(st.integers(1, 2))
        first, second = draw(seconds), draw(seconds)
        again = (min(first, second), max(first, second))[:chunks]
        classes = tensors(chunks, x=draw(size), a=draw(size), o=draw(size), again=again)
        held = draw(st.sampled_from([classes, classes, classes[:2], classes[:1], ()]))
        return block(
            index,
            forward_seconds=draw(seconds),
            backward_seconds=draw(seconds),
            forward_transient_bytes=draw(size),
            backward_transient_bytes=draw(size),
            classes=held,
        )

    count = most_blocks + 1 - draw(st.integers(1, most_blocks))
    blocks = tuple(some_block(i) for i in range(count))
    need = sum(t.total_bytes for b in blocks for t in b.classes) + max(
        b.backward_transient_bytes for b in blocks
    )
    pcie = dataclasses.replace(
        hop("pcie", draw(rate), draw(rate)), latency_seconds=draw(st.sampled_from([0.0, 0.0, 0.25]))
    )
    capacity = st.integers(0, 60).map(lambda missing: 60 - missing)
    places = (
        place("host", draw(capacity), pcie),
        place("cxl", draw(capacity), hop("cxl", draw(rate))),
        place(
            "nvme",
            draw(capacity),
            pcie,
            hop("nvme", draw(rate), draw(rate)),
            write_limit_bytes=draw(st.sampled_from([None, 20, 5])),
        ),
    )
    chosen = draw(st.sampled_from([places[:1], (places[0], places[2]), places[:2], places[1:2], ()]))
    batches = draw(st.sampled_from([1, 1, 2, 3]))
    in_flight = draw(st.integers(1, batches))
    return problem(
        len(blocks),
        max(1, in_flight * need - draw(st.integers(0, need // 4 + 1))),
        *chosen,
        blocks=blocks,
        slots=draw(st.sampled_from([1, 1, 1, 2])),
        staging="host" if "host" in {p.name for p in chosen} else None,
        forwarding_slots=draw(st.sampled_from([1, 1, 1, 2])),
        codecs=draw(st.sampled_from([(), (INT8,)])) if "host" in {p.name for p in chosen} else (),
        error_budget=draw(st.sampled_from([0.0, 0.3, 1.0])),
        micro_batches=batches,
        in_flight=in_flight,
    )


@st.composite
def stateful_problems(draw: st.DrawFn, *, uniform: bool = False) -> Problem:
    """Chains of up to seven blocks with state and saved tensors here and there; room for all of it.

    Any class of state may lie anywhere; with ``uniform`` each in one place, and all updated in one way, so
    that nothing else hides what a slot too few does.
    """
    rate = st.sampled_from([5.0, 0.2, 1.0, 100.0])
    anywhere = (DEVICE, "host", "cxl", "nvme")
    way = draw(st.sampled_from(ALL_UPDATES))
    on_cpu = ("nvme", "host") if way.on_cpu else ("nvme", "host", DEVICE)
    chosen = tuple((draw(st.sampled_from(["nvme", "host", DEVICE] if k == 0 else on_cpu)),) for k in range(3))
    where = chosen if uniform else (anywhere,) * 3
    held = states(*where, pieces=2, sizes=draw(st.tuples(*(st.sampled_from([2, 4, 10]) for _ in range(3)))))
    sent = draw(st.booleans())

    def some_block(index: int) -> Block:
        return block(
            index,
            forward_seconds=draw(st.sampled_from([1.0, 0.1, 4.0])),
            backward_seconds=draw(st.sampled_from([2.0, 0.1])),
            classes=tensors(x=4, a=0, o=0)[:1] if sent and draw(st.integers(0, 3)) else (),
            states=held if draw(st.integers(0, 3)) else (),
            pieces=2,
            device_update_seconds=draw(st.sampled_from([0.0, 0.5, 3.0])),
        )

    blocks = tuple(some_block(i) for i in range(8 - draw(st.integers(1, 6))))
    pcie, cxl, nvme = (hop(name, draw(rate), draw(rate)) for name in ("pcie", "cxl", "nvme"))
    return problem(
        len(blocks),
        10_000,
        place("host", 10_000, pcie, cpu_bytes_per_second=draw(rate)),
        place("cxl", 10_000, cxl, cpu_bytes_per_second=draw(st.sampled_from([0.0, 2.0]))),
        place("nvme", 10_000, pcie, nvme),
        blocks=blocks,
        slots=draw(st.integers(1, 3)),
        staging="host",
        forwarding_slots=draw(st.integers(1, 3)),
        micro_batches=draw(st.integers(1, 2)) if way.ahead or not uniform else 1,
        updates=(way,) if uniform else ALL_UPDATES,
    )


def some_decisions(formulated: Formulated, seed: int) -> Decisions:
    """Counts that add up, drawn at random; capacities ignored. An odd seed sends all tensors to NVMe."""
    draw, counts = random.Random(seed), dict[int, int]()

    def share(variables: list[int], total: int) -> None:
        for _ in range(total):
            variable = draw.choice(variables)
            counts[variable] = counts.get(variable, 0) + 1

    for index, one in enumerate(formulated.problem.blocks):
        for tensor, chosen in zip(one.classes, formulated.choices.counts[index], strict=True):
            far = [v for a, v in chosen.items() if seed % 2 and a.label in ("swap:nvme", "slot")]
            share(far or list(chosen.values()), tensor.chunks)
        if one.states:
            share(list(formulated.states.updated[index].values()), one.pieces)
        for way, variable in formulated.states.updated[index].items():
            for state in one.states:
                placed = formulated.states.placed[index].items()
                group = [v for p, v in placed if p.update == way and p.state == state]
                share(group, counts.get(variable, 0) if group else 0)
    return formulated.decisions(counts)


def with_state_anywhere(rate: float = 3.0, seconds: float = 1.0, micro_batches: int = 1) -> Problem:
    """Two blocks whose parameters, gradients and optimizer state may lie in any of four places."""
    anywhere = (DEVICE, "host", "cxl", "nvme")
    held = states(anywhere, anywhere, anywhere)
    pcie = hop("pcie", rate, 5.0)
    return problem(
        2,
        1000,
        place("host", 1000, pcie, cpu_bytes_per_second=7.0),
        place("cxl", 1000, hop("cxl", 2.0), cpu_bytes_per_second=2.0),
        place("nvme", 1000, pcie, hop("nvme", 3.0, 4.0)),
        blocks=tuple(
            block(i, states=held, classes=tensors()[:1], device_update_seconds=seconds) for i in range(2)
        ),
        staging="host",
        micro_batches=micro_batches,
    )


def some_state(formulated: Formulated, number: int) -> Decisions:
    """One of the placements of ``with_state_anywhere``, by number; block 0 sends its input to the host."""
    counts: dict[int, int] = {}
    for index in range(2):
        updates = list(formulated.states.updated[index].items())
        way, variable = updates[(number + index) % len(updates)]
        counts[variable] = 1
        by_class: dict[str, list[int]] = {}
        for placement, placed in formulated.states.placed[index].items():
            if placement.update == way:
                by_class.setdefault(placement.state.name, []).append(placed)
        for position, group in enumerate(by_class.values()):
            counts[group[(number // 7 ** (position + 3 * index + 1)) % len(group)]] = 1
        chosen = {a.label: v for a, v in formulated.choices.counts[index][0].items()}
        counts[chosen["swap:host" if index == 0 else "keep"]] = 2
    return formulated.decisions(counts)
