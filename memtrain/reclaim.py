"""Freed memory goes back to the kernel before the process outgrows its plan, and not sooner.

An allocator that returns what is freed at once pays a page fault for every 4 KiB of every temporary: a
third of a step. One that keeps everything creeps upwards, because what was freed does not always fit what is
asked for next. So mimalloc keeps freed memory for a second (``memtrain.malloc``), and this asks it to give
all of it back where the plan's peak is near:

- where the kind of work changes (forward to loss, loss to backward, and so on), sizes change with it, and
  little of what was freed may fit: if the next part's transients on top of what is resident would come
  within 1/64 of the plan's peak;
- between two blocks of one kind, where the same sizes come again: if resident memory alone does.

Measured on SmolLM2-135M under 1.2 GiB: docs/log.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memtrain.planner import resident
from memtrain.planner.bill import device_positions
from memtrain.planner.decisions import Decisions
from memtrain.planner.plan import Plan
from memtrain.planner.profile import ModelProfile

_CREEP = 64
"""Part of the peak that is kept free for what no bill foresees: fragments of a pass over one block."""


class Reclaimer:
    """Watches resident memory at every block of a model on the CPU; ``remove`` takes the hooks away.

    Args:
        model: its root.
        blocks: in forward order.
        optimizer: whose ``step`` is a part of its own.
        limit_bytes: what must not be exceeded: the plan's peak.
        transients: bytes that each part needs for a moment: ``transients_of``.
        rss_bytes, trim: read, and reduce, what is resident.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[tuple[str, nn.Module]],
        optimizer: torch.optim.Optimizer,
        *,
        limit_bytes: int,
        transients: dict[str, int],
        rss_bytes: Callable[[], int] = resident.rss_bytes,
        trim: Callable[[], bool] = resident.trim,
    ) -> None:
        self._limit_bytes = limit_bytes
        self._transients = transients
        self._rss_bytes, self._trim = rss_bytes, trim
        self._kind = ""
        self.times = 0
        """How often memory was asked back."""
        self._hooks: list[Any] = [
            model.register_forward_pre_hook(lambda *_: self.enter("forward prologue")),
            optimizer.register_step_pre_hook(lambda *_: self.enter("update")),
        ]
        for index, (name, block) in enumerate(blocks):
            self._hooks.append(block.register_forward_pre_hook(self._before(name, first=index == 0)))
            last = index == len(blocks) - 1
            self._hooks.append(block.register_forward_hook(self._after(name, last=last)))

    def remove(self) -> None:
        """Take the hooks off the model and the optimizer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def enter(self, part: str) -> None:
        """``part``, such as ``backward model.layers.3``, is about to begin."""
        kind = part if part.endswith("prologue") else part.partition(" ")[0]
        changed, self._kind = kind != self._kind, kind
        room = self._limit_bytes // _CREEP
        if changed:
            room += self._transients.get(part, 0)
        if self._rss_bytes() + room > self._limit_bytes:
            self.times += 1
            self._trim()

    def _before(self, name: str, *, first: bool) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.enter(f"forward {name}")
            if first and (hidden := _tensor(args)) is not None:
                _on_gradient(hidden, lambda: self.enter("backward prologue"))

        return enter

    def _after(self, name: str, *, last: bool) -> Callable[..., None]:
        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if (hidden := _tensor(output)) is not None:
                _on_gradient(hidden, lambda: self.enter(f"backward {name}"))
            if last:
                self.enter("epilogue")

        return leave


def transients_of(plan: Plan, profile: ModelProfile) -> dict[str, int]:
    """Bytes that each part of a step needs for a moment, above what the plan keeps."""
    decisions = Decisions(
        blocks=plan.blocks,
        states=plan.states,
        staging=plan.staging,
        update_schedule=plan.update_schedule,
    )
    positions = device_positions(profile, decisions)
    parts = {position.name: position.transient_bytes for position in positions}
    parts["update"] = max((size for name, size in parts.items() if name.startswith("update ")), default=0)
    return parts


def _tensor(value: Any) -> Tensor | None:
    """The hidden state that a block is given or returns, where a gradient will come back for it."""
    leaves = value if isinstance(value, (tuple, list)) else (value,)
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            return leaf if leaf.requires_grad else None
    return None


def _on_gradient(tensor: Tensor, call: Callable[[], None]) -> None:
    """Call when the gradient of ``tensor`` is known."""
    tensor.register_hook(lambda _: call())  # type: ignore[no-untyped-call]
