"""From the estimate of a model to the lifetimes of its whole training step.

Every part of an estimate was traced by itself: what it was given and what it gave back, forward and backward.
Here the parts are joined: one part's output is the next one's input, one buffer at one address; the same of
gradients on the way back; and what the prologue made for the blocks lives until its last reader. The bytes
alive at every operation are then those of the whole model run at once, and a test compares them with such a
run. Each part's backward begins with one operation of the trace's own, which makes the gradient that the part
is given; in a step it stands for the moment between two passes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from memtrain.planner.buffers import Buffer
from memtrain.planner.estimate import Lifetime, LifetimeKind, ModelEstimate, TracedPart
from memtrain.planner.step_buffers import BlockClass, Handed, Kept, Step

PROLOGUE, EPILOGUE = "prologue", "epilogue"
_BEFORE = {LifetimeKind.INPUT, LifetimeKind.INPUT_GRADIENT}
_AFTER = {LifetimeKind.OUTPUT, LifetimeKind.OUTPUT_GRADIENT}
"""What a part shares with the one before it, and with the one after."""


def step_of(
    estimate: ModelEstimate,
    *,
    kept: Mapping[str, Collection[int]] | None = None,
    kept_inputs: Collection[str] = (),
    staging_slots: int = 0,
    staging_slot_bytes: int = 0,
) -> Step:
    """One micro-batch: prologue, every block and epilogue as the blocks of a ``Step``.

    Args:
        kept: by the name of a part (``prologue``, a block's, ``epilogue``) the indices of its saved tensors
            that stay on the device from forward to backward; parts without an entry keep all of theirs. What
            is not kept lives to the end of its forward, when it has been copied or dropped, and again from
            the beginning of its backward, when it has been brought back or computed again, to its last use.
            Buffers that only computing it again needs are in no trace, and not in the step.
        kept_inputs: names of blocks whose input stays to the end of their backward, because something is
            computed again from it, whether or not autograd saves it.
        staging_slots: buffers for copies under way, of ``staging_slot_bytes`` each.

    Raises:
        ValueError: ``kept`` or ``kept_inputs`` names a part, or a saved tensor, that there is not; a staging
            size is negative; or a block returns the storage that it was given.
    """
    names = (PROLOGUE, *(block.name for block in estimate.blocks), EPILOGUE)
    parts = dict(zip(names, estimate.parts(), strict=True))
    _check_chain(parts)
    stays = _choices(parts, kept or {}, kept_inputs)
    # Blocks of one class and one choice become one object.
    sorted_parts = {
        (id(part), stays[name]): _Part(part, stays[name], is_last=name == EPILOGUE)
        for name, part in parts.items()
    }
    classes = {key: part.block_class() for key, part in sorted_parts.items()}
    step = Step(
        blocks=tuple(classes[id(part), stays[name]] for name, part in parts.items()),
        staging_slots=staging_slots,
        staging_slot_bytes=staging_slot_bytes,
    )
    prologue = sorted_parts[id(estimate.prologue), stays[PROLOGUE]]
    return replace(step, spanning=(*_made_for_blocks(prologue, step), *_tied_gradients(estimate, step)))


def _check_chain(parts: Mapping[str, TracedPart]) -> None:
    for (name, part), (next_name, following) in pairwise(parts.items()):
        is_given = any(life.kind is LifetimeKind.INPUT for life in following.lifetimes)
        if is_given and not any(life.kind is LifetimeKind.OUTPUT for life in part.lifetimes):
            raise ValueError(
                f"{name} gives {next_name} the very storage that it was given: what works on its input in "
                "place cannot be laid out block by block; let it return a tensor of its own"
            )


@dataclass(frozen=True, slots=True)
class _Stays:
    """What one part holds from forward to backward by a plan's choice."""

    saved: frozenset[int]
    input: bool


def _choices(
    parts: Mapping[str, TracedPart], kept: Mapping[str, Collection[int]], kept_inputs: Collection[str]
) -> dict[str, _Stays]:
    with_input = list(parts)[1:]
    for field, names, known in (("kept", kept, list(parts)), ("kept_inputs", kept_inputs, with_input)):
        if unknown := sorted(set(names).difference(known)):
            raise ValueError(f"{field} names {unknown[0]!r}; choose from {', '.join(known)}")
    chosen = {}
    for name, part in parts.items():
        everything = frozenset(range(len(part.saved)))
        saved = frozenset(kept.get(name, everything))
        if strangers := sorted(saved - everything):
            raise ValueError(
                f"kept names saved tensor {strangers[0]} of {name}, which has {len(part.saved)}, from 0 on"
            )
        chosen[name] = _Stays(saved, name in kept_inputs)
    return chosen


class _Part:
    """One part's lifetimes, sorted by the passes that they touch."""

    def __init__(self, part: TracedPart, stays: _Stays, *, is_last: bool) -> None:
        self.part, self.stays = part, stays
        self.turn = part.forward_operations
        # The loss and its gradient are handed to nobody.
        self.border_kinds = _BEFORE if is_last else _BEFORE | _AFTER

    def block_class(self) -> BlockClass:
        """As ``pack_step`` wants it; at the borders stand buffers that are handed over."""
        given, gradient = self._border(LifetimeKind.INPUT), self._border(LifetimeKind.OUTPUT_GRADIENT)
        made, passed = self._border(LifetimeKind.OUTPUT), self._border(LifetimeKind.INPUT_GRADIENT)
        return BlockClass(
            name=self.part.name,
            forward_ops=self.turn,
            backward_ops=len(self.part.operations) - self.turn,
            kept=tuple(self._kept()),
            forward=tuple(self._forward()),
            backward=tuple(self._backward()),
            output=Handed(start=made.start, size=made.size_bytes) if made else None,
            output_kept_end=self.kept_end(made),
            input_end=min(given.end, self.turn) if given else 0,
            input_kept_end=self.kept_end(given),
            input_gradient=Handed(start=passed.start - self.turn, size=passed.size_bytes) if passed else None,
            output_gradient_end=gradient.end - self.turn if gradient else 0,
        )

    def kept_end(self, life: Lifetime | None) -> int:
        """One after the last operation of the backward that reads it where it has stayed; 0: none does."""
        if life and life.kind is LifetimeKind.INPUT and self.stays.input:
            return len(self.part.operations) - self.turn
        return life.end - self.turn if life and self._stays(life) else 0

    def lifetimes(self) -> Iterator[tuple[str, Lifetime]]:
        for index, life in enumerate(self.part.lifetimes):
            if life.start < life.end:
                yield f"{index}.{life.kind.value}", life

    def _border(self, kind: LifetimeKind) -> Lifetime | None:
        found = (life for _, life in self.lifetimes() if life.kind is kind and not _is_spanning(life))
        return next(found, None) if kind in self.border_kinds else None

    def _inside(self) -> Iterator[tuple[str, Lifetime]]:
        for name, life in self.lifetimes():
            if not _is_spanning(life) and life.kind not in self.border_kinds:
                yield name, life

    def _stays(self, life: Lifetime) -> bool:
        chosen = life.saved is None or life.saved in self.stays.saved
        chosen |= life.kind is LifetimeKind.INPUT and self.stays.input
        return chosen and life.start < self.turn < life.end

    def _kept(self) -> Iterator[Kept]:
        for name, life in self._inside():
            if self._stays(life):
                yield Kept(name=name, start=life.start, end=life.end - self.turn, size=life.size_bytes)

    def _forward(self) -> Iterator[Buffer]:
        for name, life in self._inside():
            if life.start < self.turn and not self._stays(life):
                yield Buffer(name, life.start, min(life.end, self.turn), life.size_bytes)

    def _backward(self) -> Iterator[Buffer]:
        """Born in the backward, or brought back for it."""
        born = ((name, life) for name, life in self._inside() if life.start >= self.turn)
        back = ((name, life) for name, life in self.lifetimes() if life.start < self.turn < life.end)
        for name, life in (*born, *back):
            if not self._stays(life):
                start = max(life.start - self.turn, 0)
                yield Buffer(name, start, life.end - self.turn, life.size_bytes)


def _is_made_for_blocks(life: Lifetime) -> bool:
    return life.kind is LifetimeKind.SHARED or life.epilogue_end is not None


def _is_spanning(life: Lifetime) -> bool:
    return life.kind is LifetimeKind.TIED_GRADIENT or _is_made_for_blocks(life)


def _made_for_blocks(prologue: _Part, step: Step) -> Iterator[Buffer]:
    """What the prologue makes for others, until the last of them is done."""
    epilogue_start, (returns, first_block_returns) = step.forward_starts[-2], step.backward_starts[:2]
    for name, life in prologue.lifetimes():
        if not _is_made_for_blocks(life):
            continue
        ends = [prologue.turn, epilogue_start + (life.epilogue_end or 0)]
        if life.kind is LifetimeKind.SHARED:
            ends.append(returns)  # The first block is the last one that reads it.
        if life.kind is LifetimeKind.OUTPUT and step.blocks[1].input_kept_end:
            ends.append(first_block_returns + step.blocks[1].input_kept_end)
        if kept_end := prologue.kept_end(life):
            ends.append(returns + kept_end)
        yield Buffer(name, life.start, max(ends), life.size_bytes)


def _tied_gradients(estimate: ModelEstimate, step: Step) -> Iterator[Buffer]:
    """From where the epilogue produces them to where the prologue adds them."""
    parts = estimate.epilogue, estimate.prologue
    produced, added = (
        [life for life in part.lifetimes if life.kind is LifetimeKind.TIED_GRADIENT] for part in parts
    )
    end = step.backward_starts[0] - estimate.prologue.forward_operations
    end += max((life.end for life in added), default=0)
    for index, life in enumerate(produced):
        start = step.backward_starts[-1] + life.start - estimate.epilogue.forward_operations
        yield Buffer(f"{index}.tied_gradient", start, end, life.size_bytes)
