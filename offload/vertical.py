"""Vertical order: all micro-batches of a step pass a block before any of them enters the next one.

GreedySnake (arXiv 2512.17570) orders a step so where weights are streamed: they are then fetched once in
forward and once in backward of a step, and not of every micro-batch, for the price of every micro-batch's
boundary activations and saved tensors. Here

- the model is anybody's: each micro-batch runs its forward and its backward, as the loop would, in a thread
  of its own, and hands over at the edges of blocks (``turns.py``). One thread runs at a time, so the order is
  the same every time. The part behind the blocks, loss and its backward among it, is one turn.
- the result is the horizontal one's, bit for bit: every graph is what it would be, and what a block's
  backward adds to gradients comes from micro-batch 0 first.
- the snake is in the forward passes: the last micro-batch passes a block first, and in backward the first
  one. So backward meets activations in the reverse of the order in which they were made, as it does in a
  single pass, and what was stored last is needed first. A snake that turned round in backward too, as the
  paper's, would add up gradients in another order.

Random numbers are those of the horizontal order too: each micro-batch begins where the one before it will
leave the generators, and has them to itself during its turns. How far each moves them must be known
beforehand (``random_advance.py``); one that moves them otherwise is an error, and so are blocks that change
their buffers. The micro-batches must go through the blocks in one order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from memtrain.offload.errors import OffloadError, RandomDrawsError
from memtrain.offload.random_advance import NOTHING, Advance, advanced
from memtrain.offload.surroundings import random_states, set_random_states
from memtrain.offload.thread_state import ThreadState
from memtrain.offload.turns import Turns

_Result = TypeVar("_Result")
_REMEDY = "plan with micro_batch_order='horizontal'"


class _Traveller(threading.local):
    """Which micro-batch a thread is, and how often it has handed over."""

    number: int | None = None
    stage = 0
    at = "the part before the blocks"


class VerticalPass(Generic[_Result]):
    """One forward and backward of several micro-batches. Used once.

    Args:
        blocks: ``(name, module)`` in forward order.
        device: the one that is computed on.
        before_waiting: called by a micro-batch when it is about to hand over, or has ended.
    """

    def __init__(
        self,
        blocks: Sequence[tuple[str, nn.Module]],
        device: torch.device,
        before_waiting: Callable[[], None] = lambda: None,
    ) -> None:
        self._blocks = list(blocks)
        self._device = device
        self._before_waiting = before_waiting
        self._here = _Traveller()
        self._way: list[str] = []
        """What the micro-batches reach, in order: the same for each."""
        self._turns: Turns[_Result] | None = None
        self._states: list[list[Tensor]] = []
        """Of the generators, where each micro-batch begins; and where the last one ends."""
        self._buffers = [
            (f"{name}.{own}", buffer, buffer._version)
            for name, block in self._blocks
            for own, buffer in block.named_buffers()
        ]

    def run(
        self, passes: Sequence[Callable[[], _Result]], draws: Sequence[Advance] | None = None
    ) -> list[_Result]:
        """What each of ``passes`` returns; each is forward and backward of one micro-batch, in order.

        Args:
            draws: by how much each pass moves the random generators on; None: by nothing.

        Raises:
            RandomDrawsError: a pass moves them by something else.
            OffloadError: the micro-batches take different ways, or change buffers. As after any error in
                backward, gradients may be those of some of the micro-batches; the generators are where they
                were before this call.
            BaseException: what a pass raised, as it raised it. No thread is left, the others hold nothing.
        """
        state = ThreadState(self._device)
        self._states = [random_states(self._device)]
        for advance in draws or [NOTHING] * len(passes):
            self._states.append(advanced(self._states[-1], advance))

        def travelling(number: int) -> Callable[[], _Result]:
            def work() -> _Result:
                self._here.number = number
                set_random_states(self._device, self._states[number])
                result = passes[number]()
                self._refuse_other_draws(random_states(self._device), over=True)
                self._before_waiting()
                return result

            return lambda: state.run(work)

        self._turns = Turns([travelling(number) for number in range(len(passes))], "micro-batch")
        try:
            with self._watched():
                results = self._turns.run()
        except BaseException:
            set_random_states(self._device, self._states[0])
            raise
        set_random_states(self._device, self._states[-1])
        return results

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Hooks before all others: nothing of a block has begun, or is left, while a turn is awaited."""
        handles = []
        for index, (name, block) in enumerate(self._blocks):
            before = self._before(name, first=index == 0)
            after = self._after(name, last=index == len(self._blocks) - 1)
            handles.append(block.register_forward_pre_hook(before, prepend=True, with_kwargs=True))
            handles.append(block.register_forward_hook(after, prepend=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, name: str, *, first: bool) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._here.number is None:
                return
            self._reach(f"forward of {name}", last_first=True)
            if first:
                self._await_gradient((args, kwargs), "backward of the part before the blocks")

        return enter

    def _after(self, name: str, *, last: bool) -> Callable[..., None]:
        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._here.number is None:
                return
            self._await_gradient(output, f"backward of {name}")
            if last:
                self._refuse_changed_buffers()
                self._reach("the part behind the blocks")

        return leave

    def _await_gradient(self, values: Any, label: str) -> None:
        """A turn begins when backward reaches one of the tensors that are made by a graph."""
        reached = False

        def stop(_: Tensor) -> None:
            nonlocal reached
            if not reached:
                reached = True
                self._reach(label)

        for leaf in pytree.tree_leaves(values):
            if isinstance(leaf, Tensor) and leaf.requires_grad and not leaf.is_leaf:
                leaf.register_hook(stop)  # type: ignore[no-untyped-call]

    def _reach(self, label: str, *, last_first: bool = False) -> None:
        me, turns = self._here, self._turns
        assert me.number is not None
        assert turns is not None
        mine = random_states(self._device)
        self._refuse_other_draws(mine, over=False)
        me.stage, me.at = me.stage + 1, label
        if me.stage > len(self._way):
            self._way.append(label)
        elif self._way[me.stage - 1] != label:
            raise OffloadError(
                f"micro-batch {me.number} comes to the {label} where another one came to the "
                f"{self._way[me.stage - 1]}: vertical order needs micro-batches that go through the blocks "
                f"in one order; {_REMEDY}"
            )
        self._before_waiting()
        turns.reach(me.number, (me.stage, -me.number if last_first else me.number))
        set_random_states(self._device, mine)

    def _refuse_other_draws(self, now: Sequence[Tensor], *, over: bool) -> None:
        """Where nothing is to be drawn the first number is one too many; else the end of the pass tells."""
        number = self._here.number
        assert number is not None
        begin, end = self._states[number], self._states[number + 1]
        quiet = _equal(begin, end)
        if (over or quiet) and not _equal(now, end):
            what = (
                f"draws random numbers ({self._here.at}), as dropout does in training, where none were drawn"
                if quiet
                else "draws more or fewer random numbers than were drawn"
            )
            raise RandomDrawsError(
                f"micro-batch {number} {what} for a batch of this kind before: in vertical order the "
                "micro-batches would draw others than one after the other. Nothing has been updated, and the "
                "generators are where they were: zero_grad() and the same batches again measure it anew; "
                f"where what is drawn depends on values, {_REMEDY}, or have nothing drawn (dropout 0)"
            )

    def _refuse_changed_buffers(self) -> None:
        for name, buffer, version in self._buffers:
            if buffer._version != version:
                raise OffloadError(
                    f"the forward changes the buffer {name}: in vertical order the micro-batches would "
                    f"change it in another order than one after the other; {_REMEDY}"
                )


def _equal(states: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(states, others, strict=True))
