"""What the micro-batches of a model draw from the random generators, as dropout does in training.

In vertical order micro-batches are under way together, and each must begin where the one before it will leave
the generators (``offload/vertical.py``). How far a pass moves them on is measured where it runs by itself: a
step with a batch of a new kind goes one micro-batch after the other, whatever the plan's order, which is as
exact, and later ones of that kind in the plan's. A kind is what decides which functions run: shapes and types
of the batch, what is in training mode, autocast. A model that drew nothing while it was profiled is taken to
draw nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from memtrain.offload.errors import RandomDrawsError
from memtrain.offload.random_advance import NOTHING, Advance, advance_between
from memtrain.offload.surroundings import random_states
from memtrain.planner.decisions import PlannerOptions
from memtrain.planner.vertical import OrderError

_UNCOUNTED = (
    "random numbers that cannot be counted (a generator that is seeded in forward, or normal numbers of "
    "which half a pair is left over)"
)


class RandomWatch:
    """Whether a model's forward draws random numbers, and whether they can be counted.

    Attributes:
        drawn: whether any were drawn.
    """

    def __init__(self) -> None:
        self.drawn = False
        self._countable = True

    @contextmanager
    def watching(self, model: nn.Module, device: torch.device) -> Iterator[RandomWatch]:
        """Looks at every forward inside; the first that draws is counted."""
        began: list[list[Tensor]] = []

        def leave(*_: Any) -> None:
            before, after = began.pop(), random_states(device)
            if not self.drawn and not all(map(torch.equal, before, after)):
                self.drawn = True
                self._countable = advance_between(before, after) is not None

        hooks = [
            model.register_forward_pre_hook(lambda *_: began.append(random_states(device))),
            model.register_forward_hook(leave),
        ]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def possible(self, options: PlannerOptions) -> PlannerOptions:
        """``options`` without an order that would not be exact.

        Raises:
            OrderError: it was asked for.
        """
        if self._countable or options.micro_batch_order == "horizontal":
            return options
        if options.micro_batch_order == "vertical":
            raise OrderError(
                f"micro_batch_order is vertical, but the model's forward draws {_UNCOUNTED}: the "
                "micro-batches would draw others than one after the other. Set micro_batch_order to "
                "horizontal"
            )
        return dataclasses.replace(options, micro_batch_order="horizontal")


class Draws:
    """Advances of the generators by kind of batch.

    Args:
        model: its root.
        device: the one that is computed on.
        drawn: whether the model is known to draw random numbers.

    Attributes:
        steps: that were to be in vertical order.
        measured_steps: of those, how many went one micro-batch after the other, to be measured.
    """

    def __init__(self, model: nn.Module, device: torch.device, *, drawn: bool) -> None:
        self._model = model
        self._device = device
        self._known: dict[Hashable, Advance] = {}
        self._unseen = None if drawn else NOTHING
        """Of a kind that was never measured."""
        self.steps = self.measured_steps = 0

    def kinds(self, batches: Sequence[Any]) -> list[Hashable]:
        """Of each batch, as the model and autocast are now."""
        root = self._model.training
        turned = tuple(name for name, module in self._model.named_modules() if module.training is not root)
        precision = tuple(
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            for kind in dict.fromkeys(("cpu", self._device.type))
        )
        return [(root, turned, precision, *_described(batch)) for batch in batches]

    def of(self, kinds: Sequence[Hashable]) -> list[Advance] | None:
        """Of each; None where one of them must be measured first."""
        found = [self._known.get(kind, self._unseen) for kind in kinds]
        self.steps += 1
        self.measured_steps += None in found
        known = [advance for advance in found if advance is not None]
        return known if len(known) == len(found) else None

    def measured(self, kind: Hashable, run: Callable[[], Tensor]) -> Tensor:
        """``run()``, a pass over a batch of this kind by itself.

        Raises:
            RandomDrawsError: what it drew cannot be counted, or an equal batch drew more or fewer.
        """
        before = random_states(self._device)
        result = run()
        advance = advance_between(before, random_states(self._device), self._known.get(kind))
        if advance is None:
            raise RandomDrawsError(
                f"the model draws {_UNCOUNTED}, which vertical order needs; plan with "
                "micro_batch_order='horizontal'"
            )
        if self._known.setdefault(kind, advance) != advance:
            raise RandomDrawsError(
                f"the model draws random numbers by what is in a batch: {_of(advance)} where another batch "
                f"of equal shapes drew {_of(self._known[kind])}, so that in vertical order the micro-batches "
                "would draw others than one after the other. Where the model was changed, zero_grad() and "
                "the same batches again measure it anew; else plan with micro_batch_order='horizontal'"
            )
        return result

    def forget(self) -> None:
        """Something else was drawn than was known: everything is measured anew."""
        self._known.clear()
        self._unseen = None

    def lines(self) -> list[str]:
        """What measuring has cost, for people; nothing where it cost nothing."""
        if not self.measured_steps:
            return []
        return [
            f"vertical order: {self.measured_steps} of {self.steps} steps went one micro-batch after the "
            "other, to count the random numbers of batches of new shapes"
        ]


def _of(advance: Advance) -> str:
    return f"{advance.words} words" + (f" and {advance.offset} of the GPU's" if advance.offset else "")


def _described(batch: Any) -> tuple[Hashable, ...]:
    """Structure of the batch, and of each tensor shape and dtype."""
    leaves, structure = pytree.tree_flatten(dict(batch) if isinstance(batch, Mapping) else batch)
    return (str(structure), *map(_leaf, leaves))


def _leaf(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.dtype
    return leaf if isinstance(leaf, (bool, int, float, str, type(None))) else type(leaf).__qualname__
