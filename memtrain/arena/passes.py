"""Planned addresses under a loop that knows nothing of them: hooks say where its steps begin and end.

A *pass* reaches from the model's forward to the end of the backward that follows, of an evaluation to the end
of the forward; an *update* is ``optimizer.step()``. Each is a step of a ``PlannedAllocator``. What comes
between them (a loader's batch, logging, evaluation code) is served as ever.

Passes of one key ask for the same bytes in the same order. The key is of what the caller decides: the shapes
of the batch, whether gradients are wanted, autocast, the place among the micro-batches of an update, whether
an update that runs ahead is still to be done. So accumulation, evaluation and batches of several shapes each
get plans of their own, at most ``PATTERNS`` of them, in one arena as large as the largest. What is not in the
key (a mask that is made in some batches only) shows as a step that left its plan.

A pass whose backward never comes, or that an exception ends, is over when the next begins, and teaches
nothing.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from memtrain.arena.allocator import ArenaError, ArenaReport, ArenaSettings, ArenaWarning, PlannedAllocator
from memtrain.planner import resident
from memtrain.planner.actions import Tier
from memtrain.planner.decisions import Decisions
from memtrain.planner.together import Together, together
from memtrain.planner.units import format_gib

if TYPE_CHECKING:
    from memtrain.session import Session

ALLOCATORS = ("default", "planned")
"""Of a session and a recipe."""
PATTERNS = 16
UNRECORDED = 1
"""The first pass of a shape: it makes what outlives it, and may be the only one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pass:
    """What decides what a pass asks for."""

    learns: bool
    training: bool
    first: bool
    """Of an update's micro-batches."""
    last: bool
    update_waits: bool
    precision: torch.dtype | None
    """Of autocast."""
    batch: tuple[Hashable, ...]
    """Structure of the arguments, and of each tensor shape, dtype and whether it wants a gradient."""

    def __repr__(self) -> str:
        shapes = ", ".join(f"{list(leaf[0])}" for leaf in self.batch[1:] if isinstance(leaf, tuple))
        told = {"learns": self.learns, "first": self.first, "last": self.last, "update": self.update_waits}
        return f"pass of {shapes} ({', '.join(name for name, holds in told.items() if holds) or 'plain'})"


class PlannedPasses:
    """Has the steps of an ordinary loop follow plans; ``remove`` takes the hooks away and gives all back.

    Args:
        model: its root, whose forward a pass begins with.
        blocks: ``(name, module)``; a step that leaves its plan is said to have done so in one of them.
        optimizer: whose ``step`` is planned too.
        micro_batches: passes per update.
        update_waits: whether an update is still to be done that the next pass will do.
        most_bytes: that the arena may take.
        together: what the plan's slabs, rings and transients are together.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[tuple[str, nn.Module]],
        optimizer: torch.optim.Optimizer,
        *,
        micro_batches: int,
        update_waits: Callable[[], bool],
        most_bytes: int,
        together: Together,
    ) -> None:
        self.most_bytes = most_bytes
        self._together = together
        self._micro_batches = micro_batches
        self._update_waits = update_waits
        self._arena = PlannedAllocator(
            ArenaSettings(most_bytes=most_bytes, patterns=PATTERNS, unrecorded_steps=UNRECORDED)
        )
        self._process = os.getpid()
        self._done = 0
        """Passes with gradients since the last update began."""
        self._open: str | None = None
        """What ends the open step: ``forward``, ``backward`` or ``update``."""
        self._queued = False
        self._warned = False
        self._hooks: list[Any] = []
        if not self._arena.has_compiler:
            return  # It has said so.
        self._hooks = [
            model.register_forward_pre_hook(self._before_forward, prepend=True, with_kwargs=True),
            model.register_forward_hook(self._after_forward),
            optimizer.register_step_pre_hook(lambda *_: self._begin("update", "update")),
            optimizer.register_step_post_hook(self._after_update),
        ]
        for name, block in blocks:
            self._hooks.append(
                block.register_forward_pre_hook(self._marking(f"forward of {name}"), prepend=True)
            )
            self._hooks.append(block.register_forward_hook(self._marking_backward(f"backward of {name}")))

    @classmethod
    def of_session(cls, session: Session, blocks: Sequence[tuple[str, nn.Module]]) -> PlannedPasses:
        """For a session on a CPU whose optimizer stands. The arena may take what the plan's bill has for
        transients and slack."""
        plan = session.plan
        varying = ("transients", "slack")
        lines = (line for line in plan.bill if line.tier is Tier.DEVICE and line.category in varying)
        return cls(
            session.model,
            blocks,
            session.optimizer,
            micro_batches=plan.micro_batches,
            update_waits=lambda: session.optimizer.update_waits,
            most_bytes=sum(line.size_bytes for line in lines),
            together=together(session.profile, Decisions.of(plan, on_cpu=True)),
        )

    def remove(self) -> None:
        """Every pass from now on is ordinary. May be called twice."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._end(completed=False)
        self._arena.close()

    def report(self) -> ArenaReport:
        """How it went so far."""
        return self._arena.report()

    def vacate(self) -> None:
        """Outside of passes: give the arena's memory back until the next one, to what is done meanwhile."""
        self._arena.vacate()

    @property
    def follows(self) -> bool:
        """Whether a pass or update is under way for whose requests there is room in the arena."""
        return self._arena.follows

    def occupied_bytes(self) -> int:
        """Resident memory of this process; where no plan is followed, without what the arena has free for the
        next part of a step."""
        return resident.rss_bytes() - (0 if self.follows else self._arena.vacant_bytes())

    def lines(self) -> list[str]:
        """For a session's report."""
        found = self.report()
        if not found.arena_bytes:
            return [
                f"planned addresses: none yet, {found.recorded_steps} passes and updates recorded, "
                f"{found.ordinary_steps} ordinary"
            ]
        text = (
            f"planned addresses: {found.planned_requests} requests of a pass in "
            f"{format_gib(found.arena_bytes)}, alive at once {format_gib(found.load_bytes)}, on the bill "
            f"{format_gib(self.most_bytes)}; passes and updates as planned {found.planned_steps}, recorded "
            f"{found.recorded_steps}, left the plan {found.deviating_steps}, ordinary {found.ordinary_steps}"
        )
        return [text, self._together_line(), *(f"  {deviation}" for deviation in found.deviations[:3])]

    def _together_line(self) -> str:
        """What slabs, rings and the arena take together, against what one address space for all would."""
        found = self._together
        return (
            f"slabs, staging and transients {format_gib(found.held_bytes)}, in use at once at most "
            f"{format_gib(found.load_bytes)} ({found.position}): {found.over:.1%} more"
        )

    # where steps begin and end ----------------------------------------------------------------

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        learns = torch.is_grad_enabled()
        key = _Pass(
            learns=learns,
            training=module.training,
            first=learns and self._done == 0,
            last=learns and self._done == self._micro_batches - 1,
            update_waits=self._update_waits(),
            precision=torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None,
            batch=_shapes((args, kwargs)),
        )
        self._begin("backward" if learns else "forward", key)
        self._done += learns

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._open == "forward":
            self._end()
        elif self._open == "backward":
            for leaf in pytree.tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.requires_grad and not leaf.is_leaf:
                    leaf.register_hook(self._in_backward)  # type: ignore[no-untyped-call]

    def _in_backward(self, gradient: Tensor) -> None:
        """Backward has come to what the model returned: the pass is over when it ends."""
        if self._open == "backward" and not self._queued:
            self._queued = True
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._after_backward)

    def _after_backward(self) -> None:
        if self._open == "backward":
            self._end()

    def _after_update(self, *_: Any) -> None:
        self._done = 0
        if self._open == "update":
            self._end()

    def _begin(self, ends_with: str, key: Hashable) -> None:
        if not self._hooks or os.getpid() != self._process:
            return
        self._end(completed=False)  # of a step whose end never came
        try:
            self._arena.begin(key)
        except ArenaError as error:  # Another session's pass is open, or the machine has no memory left.
            if not self._warned:
                warnings.warn(f"a pass has the ordinary allocator: {error}", ArenaWarning, stacklevel=2)
            self._warned = True
            return
        self._open, self._queued = ends_with, False

    def _end(self, *, completed: bool = True) -> None:
        if self._open is not None:
            self._open = None
            self._arena.end(completed=completed)

    def _marking(self, part: str) -> Callable[..., None]:
        return lambda *_: self._arena.mark(part)

    def _marking_backward(self, part: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            for leaf in pytree.tree_leaves(output):
                if isinstance(leaf, Tensor) and leaf.requires_grad and not leaf.is_leaf:
                    leaf.register_hook(lambda _: self._arena.mark(part))  # type: ignore[no-untyped-call]
                    return

        return hook


def _shapes(values: Any) -> tuple[Hashable, ...]:
    leaves, structure = pytree.tree_flatten(values)
    return (str(structure), *map(_shape, leaves))


def _shape(leaf: Any) -> Any:
    return (tuple(leaf.shape), leaf.dtype, leaf.requires_grad) if isinstance(leaf, Tensor) else type(leaf)
