"""Addresses for a whole training step, on two levels.

After MEMO (arXiv 2407.12117): first the transients of one block's forward and of its backward are packed,
then each pass of a block counts as one buffer of that height. Departures: what a block keeps for its
backward is born in the order of the blocks and dies in the reverse one, so it is a stack, which loses
nothing; what is handed from block to block and staging slots are rings at fixed places, and so is what
spans blocks; so level 2 needs no solver. Its height is these + the most over blocks of (kept up to it + the
higher of its two passes).
Where that is above the load of the step, all buffers are packed flat in the time left, and the lower result
is taken.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

from memtrain.planner.addresses import Packing, pack
from memtrain.planner.buffers import Buffer
from memtrain.planner.step_buffers import Step
from memtrain.planner.units import round_up

RING_SLOTS = 2
"""A forward reads its input while it writes its output, a backward the gradient of its output while it writes
that of its input. One ring serves both: all of the first are dead before the first of the second is born."""
FLAT_SHARE = 0.5
"""Of the time left for level 1, which rarely needs a hundredth of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPacking:
    """Addresses of a step. All in bytes, sizes rounded up to the alignment."""

    offsets: Mapping[str, int]
    """By the names of ``Step.buffers``."""
    height: int
    load: int
    """The most that lives at once, staging included."""
    two_level_height: int
    """Of rings, stack and passes, whether or not it was taken."""
    passes_packed: int
    """Solutions of level 1: passes with equal lifetimes share one."""

    @property
    def fragmentation(self) -> float:
        """Height over load, less one; 0 is a certificate that no packing is lower."""
        return self.height / self.load - 1 if self.load else 0.0


def pack_step(step: Step, *, time_limit_seconds: float, alignment: int = 512, seed: int = 0) -> StepPacking:
    """Give every buffer of ``step`` an address.

    Args:
        time_limit_seconds: wall clock, as in ``pack``.
        alignment: bytes; 512 is what torch's CUDA allocator gives.

    Raises:
        ValueError: an argument out of range.
    """
    deadline = time.perf_counter() + time_limit_seconds
    level_one = _LevelOne(step, deadline, alignment, seed)
    offsets, height = _level_two(step, level_one, alignment)
    buffers = step.buffers()
    load = _load(buffers, alignment)
    two_level_height = height
    left = deadline - time.perf_counter()
    if height > load and left > 0:
        flat = pack(buffers, time_limit_seconds=left, alignment=alignment, seed=seed)
        if flat.height < height:
            offsets, height = dict(flat.offsets), flat.height
    return StepPacking(
        offsets=offsets,
        height=height,
        load=load,
        two_level_height=two_level_height,
        passes_packed=len(level_one.packings),
    )


def _load(buffers: Iterable[Buffer], alignment: int) -> int:
    change: Counter[int] = Counter()
    for b in buffers:
        size = round_up(b.size, alignment)
        change[b.start] += size
        change[b.end] -= size
    return max(accumulate(change[moment] for moment in sorted(change)), default=0)


class _LevelOne:
    """One packing for all passes with the same lifetimes, in the order of their buffers."""

    def __init__(self, step: Step, deadline: float, alignment: int, seed: int) -> None:
        self.packings: dict[tuple[tuple[int, int, int], ...], tuple[list[int], int]] = {}
        passes = {self._lifetimes(p): p for block in step.blocks for p in (block.forward, block.backward)}
        for position, (lifetimes, buffers) in enumerate(passes.items()):
            left = max(0.0, deadline - time.perf_counter()) * FLAT_SHARE
            share = left / (len(passes) - position)
            found: Packing = pack(buffers, time_limit_seconds=share, alignment=alignment, seed=seed)
            self.packings[lifetimes] = [found.offsets[b.name] for b in buffers], found.height

    @staticmethod
    def _lifetimes(buffers: Iterable[Buffer]) -> tuple[tuple[int, int, int], ...]:
        return tuple((b.start, b.end, b.size) for b in buffers)

    def of(self, buffers: tuple[Buffer, ...]) -> tuple[dict[str, int], int]:
        """Offsets within the pass by name, and its height."""
        offsets, height = self.packings[self._lifetimes(buffers)]
        return {b.name: offset for b, offset in zip(buffers, offsets, strict=True)}, height


def _level_two(step: Step, level_one: _LevelOne, alignment: int) -> tuple[dict[str, int], int]:
    """Rings at the bottom, kept buffers stacked on them, each pass on what is kept up to its block."""
    offsets, top = _whole_step(step, alignment)
    ring, slot = top, _ring_slot_bytes(step, alignment)
    top += RING_SLOTS * slot
    height = top
    for number, block in enumerate(step.blocks):
        if block.input_gradient:
            offsets[f"{number}.input_gradient"] = ring + number % RING_SLOTS * slot
        for k in block.kept:
            offsets[f"{number}.kept.{k.name}"] = top
            top += round_up(k.size, alignment)
        if block.output and step.output_is_kept(number):
            offsets[f"{number}.output"] = top
            top += round_up(block.output.size, alignment)
        elif block.output:
            offsets[f"{number}.output"] = ring + number % RING_SLOTS * slot
        for name, buffers in (("forward", block.forward), ("backward", block.backward)):
            inside, pass_height = level_one.of(buffers)
            offsets |= {f"{number}.{name}.{inner}": top + offset for inner, offset in inside.items()}
            height = max(height, top + pass_height)
    return offsets, max(height, top)


def _whole_step(step: Step, alignment: int) -> tuple[dict[str, int], int]:
    """Staging slots and what spans blocks, one above the other, and where they end."""
    sizes = [(f"staging.{slot}", step.staging_slot_bytes) for slot in range(step.staging_slots)]
    sizes += [(f"spanning.{b.name}", b.size) for b in step.spanning]
    offsets, top = {}, 0
    for name, size in sizes:
        if size:
            offsets[name] = top
            top += round_up(size, alignment)
    return offsets, top


def _ring_slot_bytes(step: Step, alignment: int) -> int:
    handed = [block.input_gradient for block in step.blocks]
    handed += [block.output for i, block in enumerate(step.blocks) if not step.output_is_kept(i)]
    return round_up(max((h.size for h in handed if h), default=0), alignment)
