"""What functions with an inexact backward share: the error they raise, compilers, one result per input.

Every one of them computes its forward pass exactly and its gradients from less than autograd would save.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class LossyBackwardError(RuntimeError):
    """Backward asks of lossy saved tensors what they cannot give."""


def refuse_second_derivative(name: str) -> None:
    """Call first in a backward. Raises LossyBackwardError under ``create_graph=True``.

    ``once_differentiable`` would be silent where the incoming gradient carries no graph, and leave the term
    of ``f''`` out. A compiled graph has a refusal of its own (AOTAutograd).
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise LossyBackwardError(
            f"{name} has no second derivative: what it saved gives the first one alone, and nearly. "
            "Call backward without create_graph=True, or take the treatment off for this pass"
        )


def eager_only(reason: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function that ``torch.compile`` leaves to eager, with a graph break that gives ``reason``; under
    ``fullgraph=True`` that is the error. ``torch.compiler.disable`` would import the compiler at once, this
    at the first call, as every optimizer does."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        outside: Callable[P, R] = torch._disable_dynamo(function)  # type: ignore[attr-defined]

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling():
                torch._dynamo.graph_break(msg=f"{function.__name__}: {reason}")
            return outside(*args, **kwargs)

        return call

    return decorate


class PerInput(Generic[T]):
    """One result for all modules that are given the same tensor: query, key and value; gate and up.

    The same tensor means: the same view of the same version of the same storage. The storage is known by a
    weak reference, for an address is reused; the result too is held weakly, and lives as long as the graphs
    that use it.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], tuple[StorageWeakRef, weakref.ref[Any]]] = {}

    def get(self, tensor: Tensor, extra: Hashable, make: Callable[[], T]) -> T:
        """The result made for ``tensor`` and ``extra``, or a new one."""
        storage = tensor.untyped_storage()
        view = (tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())
        key = (storage._cdata, tensor._version, *view, extra)
        known = self._made.get(key)
        result: T | None = None if known is None else known[1]()
        if result is None:
            result = make()
            # The weak reference to the storage keeps its identity from being given to another one.
            made = StorageWeakRef(storage), weakref.ref(result)  # type: ignore[no-untyped-call]
            # A list at once: another thread may be here too.
            self._made = {of: old for of, old in list(self._made.items()) if old[1]() is not None}
            self._made[key] = made
        return result

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
