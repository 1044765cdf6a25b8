"""Random numbers of a forward on the first tokens: those that the forward on all of them drew.

A generator gives numbers in the order in which they lie in a tensor, so a shorter tensor gets others, and
leaves the generator elsewhere. What is drawn is therefore drawn whole, and the first tokens are taken.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from memtrain.offload.compare import Mismatch, TwoTokenAxes
from memtrain.offload.results import AroundCalls, QuietMode
from memtrain.offload.token_rows import RowAxis, empty_in_order


def _calls_random(name: str) -> bool:
    """Whether a function of torch of this name may draw random numbers for a dropout."""
    return "dropout" in name or name == "bernoulli_"


def _is_random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


class ShapesDrawn(QuietMode):  # type: ignore[no-untyped-call]
    """Notes the shapes of what dropouts draw, in order."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: list[torch.Size] = []

    def watching(self) -> contextlib.AbstractContextManager[Any]:
        """Watch what runs inside."""
        return AroundCalls(self, _calls_random)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_random(func):
            self.shapes.append(args[0].shape)
        return func(*args, **(kwargs or {}))


class DrawnWhole(QuietMode):  # type: ignore[no-untyped-call]
    """Draws for ``tokens`` tokens and takes the first ``first`` of them.

    Args:
        axes: where the tokens lie in what is drawn, in order; None where there are none.
    """

    def __init__(self, axes: Sequence[RowAxis | None], tokens: int, first: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._axes = iter(axes)
        self._tokens = tokens
        self._first = first

    def drawing(self) -> contextlib.AbstractContextManager[Any]:
        """Answer what runs inside."""
        return AroundCalls(self, _calls_random)

    def axis(self, part: torch.Tensor) -> RowAxis | None:
        """Where the tokens lie in what is drawn next."""
        return next(self._axes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _is_random(func):
            return func(*args, **kwargs)
        part = args[0]
        axis = self.axis(part)
        if axis is None:
            return func(*args, **kwargs)
        whole = empty_in_order(part, axis.resized(part.shape, self._first, self._tokens))
        if func is torch.ops.aten.bernoulli_.float:
            func(whole, *args[1:], **kwargs)
            return part.copy_(axis.rows(whole, self._tokens, 0, self._first).reshape(part.shape))
        if func is torch.ops.aten.native_dropout.default:
            _, mask = func(whole.fill_(1.0), *args[1:], **kwargs)
            mask = axis.rows(mask, self._tokens, 0, self._first).reshape(part.shape)
            return part * mask * (1.0 / (1.0 - args[1])), mask
        raise Mismatch(f"random numbers of {func} cannot be drawn for all tokens")


class DrawnAsBefore(DrawnWhole):  # type: ignore[no-untyped-call]
    """The same, before the axes are known: they follow from the shapes that all tokens had.

    Attributes:
        axes: what was found.
    """

    def __init__(self, shapes: Sequence[torch.Size], tokens: int, first: int) -> None:
        super().__init__((), tokens, first)
        self._shapes = shapes
        self.axes: list[RowAxis | None] = []

    def axis(self, part: torch.Tensor) -> RowAxis | None:
        if len(self.axes) == len(self._shapes):
            raise Mismatch("more random numbers are drawn")
        whole = self._shapes[len(self.axes)]
        dims = [dim for dim, (a, b) in enumerate(zip(whole, part.shape, strict=True)) if a != b]
        if len(dims) > 1:
            raise TwoTokenAxes(f"random numbers of shape {tuple(whole)} are drawn")
        self.axes.append(RowAxis(dim=dims[0]) if dims else None)
        return self.axes[-1]
