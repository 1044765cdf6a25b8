"""What lives when in a training step, block by block: the input of ``step_addresses.pack_step``.

Operations are counted within a pass: lifetimes are ``[start, end)`` in them, as in ``Buffer``. A step is the
forward of blocks 0, 1, ..., then the backward of the last block, ..., of block 0. What stands before the
first block of the model and behind its last one are blocks as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from memtrain.planner.buffers import Buffer


@dataclass(frozen=True, kw_only=True, slots=True)
class Kept:
    """Bytes born in a block's forward that its backward reads.

    Raises:
        ValueError: no bytes.
    """

    name: str
    start: int
    """Operation of the forward pass that writes them."""
    end: int
    """One after the last operation of the block's backward that reads them; 0 if none of it does."""
    size: int

    def __post_init__(self) -> None:
        if self.size <= 0:
            raise ValueError(f"kept {self.name!r} has {self.size} bytes: leave out what is empty")


@dataclass(frozen=True, kw_only=True, slots=True)
class Handed:
    """What a pass hands to the next one: a forward its output, a backward the gradient of its input.

    Raises:
        ValueError: no bytes.
    """

    start: int
    """Operation of the pass that begins to write it."""
    size: int

    def __post_init__(self) -> None:
        if self.size <= 0:
            raise ValueError(f"a pass cannot hand over {self.size} bytes: say None")


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockClass:
    """The lifetimes of one kind of block. Sizes in bytes.

    Raises:
        ValueError: a name stands twice, or a lifetime leaves its pass.
    """

    name: str
    forward_ops: int
    backward_ops: int
    kept: tuple[Kept, ...] = ()
    forward: tuple[Buffer, ...] = ()
    """Born and dead within the forward pass."""
    backward: tuple[Buffer, ...] = ()
    output: Handed | None = None
    """What the forward hands to the next block."""
    input_end: int = 0
    """One after the last operation of this block's forward that reads what was handed to it."""
    input_kept_end: int = 0
    """One after the last operation of its backward that reads the same; 0: it is not kept for it."""
    output_kept_end: int = 0
    """One after the last operation of its backward that reads ``output``; 0: it is not kept for it."""
    input_gradient: Handed | None = None
    """What the backward hands to the block before."""
    output_gradient_end: int = 0
    """One after the last operation of this block's backward that reads the gradient handed to it."""

    def __post_init__(self) -> None:
        for pass_name, ops, transients in (
            ("forward", self.forward_ops, self.forward),
            ("backward", self.backward_ops, self.backward),
        ):
            for b in transients:
                self._check(b.name, b.start, b.end, pass_name, ops)
            self._check_names(pass_name, [b.name for b in transients])
        self._check_names("block", [k.name for k in self.kept])
        for k in self.kept:
            self._check(k.name, k.start, self.forward_ops, "forward", self.forward_ops)
            self._check(k.name, 0, k.end, "backward", self.backward_ops)
        self._check("input", 0, self.input_end, "forward", self.forward_ops)
        for name, end in (
            ("input", self.input_kept_end),
            ("output", self.output_kept_end),
            ("output gradient", self.output_gradient_end),
        ):
            self._check(name, 0, end, "backward", self.backward_ops)
        for name, handed, pass_name, ops in (
            ("output", self.output, "forward", self.forward_ops),
            ("input gradient", self.input_gradient, "backward", self.backward_ops),
        ):
            if handed:
                self._check(name, handed.start, handed.start + 1, pass_name, ops)

    def _check(self, name: str, start: int, end: int, pass_name: str, ops: int) -> None:
        if start < 0 or start > end or end > ops:
            raise ValueError(
                f"block class {self.name!r}: {name!r} lives in operations {start} to {end} of a {pass_name} "
                f"pass of {ops}; count operations from the start of the pass, end after start"
            )

    def _check_names(self, where: str, names: Sequence[str]) -> None:
        name, count = Counter(names).most_common(1)[0] if names else ("", 0)
        if count > 1:
            raise ValueError(
                f"block class {self.name!r}: {count} buffers of its {where} are called {name!r}; "
                "addresses are given by name, make it unique"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A step: which class each block is of, and what is of no block.

    Raises:
        ValueError: no block, a negative ring, or a spanning buffer that leaves the step.
    """

    blocks: tuple[BlockClass, ...]
    """In the order of the forward; equal blocks may be one object."""
    spanning: tuple[Buffer, ...] = ()
    """Over the operations of the whole step: what several blocks read, such as masks and rotary tables."""
    staging_slots: int = 0
    staging_slot_bytes: int = 0

    def __post_init__(self) -> None:
        if not self.blocks:
            raise ValueError("a step has at least one block")
        if self.staging_slots < 0 or self.staging_slot_bytes < 0:
            raise ValueError(
                f"staging of {self.staging_slots} slots of {self.staging_slot_bytes} bytes: "
                "neither can be negative"
            )
        operations = sum(block.forward_ops + block.backward_ops for block in self.blocks)
        for b in self.spanning:
            if b.start < 0 or b.end > operations:
                raise ValueError(
                    f"spanning {b.name!r} lives in operations {b.start} to {b.end} of a step of {operations}"
                )

    @property
    def forward_starts(self) -> tuple[int, ...]:
        """The operation with which each block's forward begins; then the end of all forwards."""
        return tuple(accumulate((block.forward_ops for block in self.blocks), initial=0))

    @property
    def backward_starts(self) -> tuple[int, ...]:
        """The operation with which each block's backward begins."""
        last_first = accumulate(
            (block.backward_ops for block in self.blocks[:0:-1]), initial=self.forward_starts[-1]
        )
        return tuple(last_first)[::-1]

    def output_is_kept(self, number: int) -> bool:
        """Whether what block ``number`` hands on is read by a backward, and so outlives all forwards."""
        after = self.blocks[number + 1 : number + 2]
        return bool(self.blocks[number].output_kept_end or any(block.input_kept_end for block in after))

    def buffers(self) -> tuple[Buffer, ...]:
        """Every buffer over the operations of the whole step, named ``<block>.<pass>.<name>``."""
        forward, backward = self.forward_starts, self.backward_starts
        everything = [Buffer(f"spanning.{b.name}", b.start, b.end, b.size) for b in self.spanning]
        for number, block in enumerate(self.blocks):
            begins, returns = forward[number], backward[number]
            for k in block.kept:
                everything.append(
                    Buffer(f"{number}.kept.{k.name}", begins + k.start, returns + k.end, k.size)
                )
            everything += _shifted(block.forward, f"{number}.forward", begins)
            everything += _shifted(block.backward, f"{number}.backward", returns)
            everything += self._handed(number, begins, returns)
        if self.staging_slot_bytes:
            end = backward[0] + self.blocks[0].backward_ops
            everything += [
                Buffer(f"staging.{slot}", 0, end, self.staging_slot_bytes)
                for slot in range(self.staging_slots)
            ]
        return tuple(everything)

    def _handed(self, number: int, begins: int, returns: int) -> Iterator[Buffer]:
        """The output of a block and the gradient of its input, until their last readers are done.

        Without a reader they live to the end of their own pass.
        """
        block = self.blocks[number]
        if block.output:
            ends = [begins + block.forward_ops]
            if block.output_kept_end:
                ends.append(returns + block.output_kept_end)
            if number + 1 < len(self.blocks):
                after = self.blocks[number + 1]
                ends.append(self.forward_starts[number + 1] + after.input_end)
                if after.input_kept_end:
                    ends.append(self.backward_starts[number + 1] + after.input_kept_end)
            yield Buffer(f"{number}.output", begins + block.output.start, max(ends), block.output.size)
        if block.input_gradient:
            start = returns + block.input_gradient.start
            reader_end = self.blocks[number - 1].output_gradient_end if number else 0
            end = returns + block.backward_ops + reader_end
            yield Buffer(f"{number}.input_gradient", start, end, block.input_gradient.size)


def _shifted(buffers: Iterable[Buffer], prefix: str, by: int) -> Iterator[Buffer]:
    return (Buffer(f"{prefix}.{b.name}", b.start + by, b.end + by, b.size) for b in buffers)
