"""Freed memory goes back to the kernel before the process outgrows its plan, and not sooner.

An allocator that returns what is freed at once pays a page fault for every 4 KiB of every temporary: a
third of a step. One that keeps everything creeps upwards, because what was freed does not always fit what is
asked for next. So mimalloc keeps freed memory for a second (``memtrain.malloc``), and this asks it to give
all of it back where a part of the step begins and what is resident comes within 1/64 of the plan's peak:

- with the part's transients on top where the kind of work changes (forward to loss, loss to backward, and so
  on), for little of what was freed may fit the new sizes;
- with what it needs beyond the parts before it, where the kind stays: the same sizes have been served.

Where all of that has its place already, because a step follows planned addresses, what is resident is all
that there will be, and nothing is asked back below the peak.

Where that was not enough, code of libraries that is not in use is unmapped too. Where it was barely enough,
what is freed goes back at once until a part has ample room without asking: a heap that has just been emptied
takes half as much again as is alive, for what it keeps does not fit the sizes that are asked for next.

A thread that is about to wait, as micro-batches in vertical order do, gives back what is kept for it alone:
by the allocator, and by MKL for its products (``memtrain.kernel_buffers``).

Measured on SmolLM2-135M under 1.2 GiB: docs/log.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from memtrain import kernel_buffers, malloc
from memtrain.planner import resident
from memtrain.planner.actions import UpdateSchedule
from memtrain.planner.bill import device_positions
from memtrain.planner.decisions import Decisions
from memtrain.planner.plan import Plan
from memtrain.planner.profile import ModelProfile

_CREEP = 64
"""Part of the peak that is kept free for what no bill foresees: fragments of a pass over one block."""
_SCATTER = 2
"""Part of what is needed that an empty heap takes on top while it keeps what is freed: 65 MiB for 42."""


class Reclaimer:
    """Watches resident memory at every block of a model on the CPU; ``remove`` takes the hooks away.

    Args:
        model: its root.
        blocks: in forward order.
        optimizer: whose ``step`` is a part of its own.
        limit_bytes: what must not be exceeded: the plan's peak.
        transients: bytes that each part needs for a moment: ``transients_of``.
        is_served: whether what a part needs for a moment is resident by now.
        rss_bytes, trim, drop_library_pages, give_back_buffers: read, and reduce, what is resident.
        keep_freed: how long the allocator keeps what is freed; returns whether it can be told.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[tuple[str, nn.Module]],
        optimizer: torch.optim.Optimizer,
        *,
        limit_bytes: int,
        transients: dict[str, int],
        is_served: Callable[[], bool] = lambda: False,
        rss_bytes: Callable[[], int] = resident.rss_bytes,
        trim: Callable[[], bool] = resident.trim,
        drop_library_pages: Callable[[], int] = resident.drop_library_pages,
        keep_freed: Callable[[malloc.Keep], bool] = malloc.keep_freed,
        give_back_buffers: Callable[[], None] = kernel_buffers.give_back,
    ) -> None:
        self._limit_bytes = limit_bytes
        self._transients = transients
        self._is_served = is_served
        self._rss_bytes, self._trim, self._drop_library_pages = rss_bytes, trim, drop_library_pages
        self._give_back_buffers = give_back_buffers
        self._keep_freed = keep_freed
        self._keeps_nothing = False
        self._kind = ""
        self._served_bytes = 0
        """Transients that there has been room for since this kind of work began."""
        self._left_bytes = 0
        """What a trim that was not enough has left: another is of no use before more is resident."""
        self.times = 0
        """How often memory was asked back."""
        self.short_times = 0
        """Behind how many of those freed memory was not kept."""
        self._hooks: list[Any] = [
            model.register_forward_pre_hook(lambda *_: self.enter("forward prologue")),
            optimizer.register_step_pre_hook(lambda *_: self.enter("update")),
            # What the caller does between steps, and the children it starts, are none of a step's parts.
            optimizer.register_step_post_hook(lambda *_: self._keep_for_a_while()),
        ]
        for index, (name, block) in enumerate(blocks):
            before = self._before(name, first=index == 0)
            self._hooks.append(block.register_forward_pre_hook(before, with_kwargs=True))
            self._hooks.append(block.register_forward_hook(self._after(name, last=index == len(blocks) - 1)))

    def remove(self) -> None:
        """Take the hooks off the model and the optimizer; those on graphs that still live do nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._keep_for_a_while()

    def line(self) -> str:
        """What it has done, for people."""
        not_kept = f", and not kept behind {self.short_times} of them" if self.short_times else ""
        return f"freed memory asked back {self.times} times{not_kept}"

    def enter(self, part: str) -> None:
        """``part``, such as ``backward model.layers.3``, is about to begin."""
        if not self._hooks:
            return
        kind = part if part.endswith("prologue") else part.partition(" ")[0]
        if kind != self._kind:
            self._kind, self._served_bytes, self._left_bytes = kind, 0, 0
        need, creep = self._transients.get(part, 0), self._limit_bytes // _CREEP
        if self._is_served():
            need = creep = 0
        # What has gone back at once serves nobody again.
        served = 0 if self._keeps_nothing else self._served_bytes
        self._served_bytes = max(self._served_bytes, need)
        self._make_room(creep + max(0, need - served), creep + need + need // _SCATTER)

    def leave(self) -> None:
        """This thread is about to wait for others, and what is kept for it nobody else could use."""
        if not self._hooks:
            return
        # Whoever comes next has been served nothing; and what one thread's trim has left, another's may give.
        self._served_bytes = self._left_bytes = 0
        need, creep = max(self._transients.values(), default=0), self._limit_bytes // _CREEP
        if self._rss_bytes() + need + creep > self._limit_bytes:
            self.times += 1
            self._give_back_buffers()
            self._trim()
            self._keep_nothing_without(creep + need + need // _SCATTER)

    def _make_room(self, room: int, ample: int) -> None:
        """Ask freed memory back where ``room`` bytes would not fit, unless that has just been of no use, and
        keep none of it until ``ample`` bytes do."""
        now, creep = self._rss_bytes(), self._limit_bytes // _CREEP
        if now + room <= self._limit_bytes:
            if now + ample <= self._limit_bytes:
                self._keep_for_a_while()
            return
        if self._left_bytes and now < self._left_bytes + creep:
            return
        self.times += 1
        self._trim()
        self._keep_nothing_without(ample)  # code that is dropped below comes back as it is used
        if self._rss_bytes() + room > self._limit_bytes:
            self._drop_library_pages()
        left = self._rss_bytes()
        self._left_bytes = left if left + room > self._limit_bytes else 0

    def _keep_nothing_without(self, ample: int) -> None:
        """What is freed goes back at once where a trim has not left ``ample`` bytes free."""
        if self._rss_bytes() + ample > self._limit_bytes and self._keep_freed(malloc.Keep.NOTHING):
            self._keeps_nothing = True
            self.short_times += 1

    def _keep_for_a_while(self) -> None:
        if self._keeps_nothing:
            self._keep_freed(malloc.Keep.A_WHILE)
            self._keeps_nothing = False

    def _before(self, name: str, *, first: bool) -> Callable[..., None]:
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.enter(f"forward {name}")
            if first:
                _on_gradient((args, kwargs), lambda: self.enter("backward prologue"))

        return enter

    def _after(self, name: str, *, last: bool) -> Callable[..., None]:
        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            _on_gradient(output, lambda: self.enter(f"backward {name}"))
            if last:
                self.enter("epilogue")

        return leave


def transients_of(plan: Plan, profile: ModelProfile) -> dict[str, int]:
    """Bytes that each part of a step needs for a moment, above what the plan keeps; on a CPU."""
    parts = {p.name: p.transient_bytes for p in device_positions(profile, Decisions.of(plan, on_cpu=True))}
    updates = {unit.name: parts.get(f"update {unit.name}", 0) for unit in profile.units}
    if plan.update_schedule is UpdateSchedule.AHEAD:
        # A unit is updated as its forward begins.
        for name, size in updates.items():
            part = name if name == "epilogue" else f"forward {name}"
            parts[part] = max(parts.get(part, 0), size)
    elif plan.update_schedule is UpdateSchedule.IN_BACKWARD:
        # As its backward ends.
        for name, size in updates.items():
            part = name if name == "epilogue" else f"backward {name}"
            parts[part] = max(parts.get(part, 0), size)
    else:
        parts["update"] = max(updates.values(), default=0)
    return parts


def _on_gradient(values: Any, call: Callable[[], None]) -> None:
    """Call when the gradient of the first tensor among ``values`` that a graph has made is known.

    Not of a leaf: it outlives the pass, and hooks would pile up on it.
    """
    for leaf in pytree.tree_leaves(values):
        if isinstance(leaf, Tensor) and leaf.requires_grad and not leaf.is_leaf:
            leaf.register_hook(lambda _: call())  # type: ignore[no-untyped-call]
            return
