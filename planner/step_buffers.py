"""What lives when in a training step, block by block: the input of ``step_addresses.pack_step``.

Operations are counted within a pass: lifetimes are ``[start, end)`` in them, as in ``Buffer``. A step is the
forward of blocks 0, 1, ..., then the backward of the last block, ..., of block 0.
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
    input_gradient_bytes: int = 0
    """What the backward hands to the block before; 0: nothing."""
    input_gradient_start: int = 0
    """Operation of this block's backward that begins to write it."""
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
        self._check("output gradient", 0, self.output_gradient_end, "backward", self.backward_ops)
        if self.input_gradient_bytes:
            start = self.input_gradient_start
            self._check("input gradient", start, start + 1, "backward", self.backward_ops)

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
    """A step: which class each block is of, and the staging ring beside them.

    Raises:
        ValueError: no block, or a negative ring.
    """

    blocks: tuple[BlockClass, ...]
    """In the order of the forward; equal blocks may be one object."""
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

    def buffers(self) -> tuple[Buffer, ...]:
        """Every buffer over the operations of the whole step, named ``<block>.<pass>.<name>``."""
        forward = [0, *accumulate(block.forward_ops for block in self.blocks)]
        backward = [0] * (len(self.blocks) + 1)
        backward[-1] = forward[-1]
        for number in reversed(range(len(self.blocks))):
            backward[number] = backward[number + 1] + self.blocks[number].backward_ops
        # The backward of a block runs from the end of its successor's to its own.
        everything: list[Buffer] = []
        for number, block in enumerate(self.blocks):
            begins, returns = forward[number], backward[number + 1]
            for k in block.kept:
                everything.append(
                    Buffer(f"{number}.kept.{k.name}", begins + k.start, returns + k.end, k.size)
                )
            everything += _shifted(block.forward, f"{number}.forward", begins)
            everything += _shifted(block.backward, f"{number}.backward", returns)
            if block.input_gradient_bytes:
                reader_end = self.blocks[number - 1].output_gradient_end if number else 0
                everything.append(
                    Buffer(
                        f"{number}.gradient.input",
                        returns + block.input_gradient_start,
                        backward[number] + reader_end,
                        block.input_gradient_bytes,
                    )
                )
        if self.staging_slot_bytes:
            everything += [
                Buffer(f"staging.{slot}", 0, backward[0], self.staging_slot_bytes)
                for slot in range(self.staging_slots)
            ]
        return tuple(everything)


def _shifted(buffers: Iterable[Buffer], prefix: str, by: int) -> Iterator[Buffer]:
    return (Buffer(f"{prefix}.{b.name}", b.start + by, b.end + by, b.size) for b in buffers)
