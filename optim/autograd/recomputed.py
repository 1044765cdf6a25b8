"""A linear layer that does not save what the function before it can make again.

Autograd saves a norm twice: the norm keeps its input, and every linear layer that eats its output keeps the
output. Here the function that made a tensor is asked for it again in backward, so that nothing but its own
saved tensors exists between the passes. (LowMemoryBP, arXiv 2406.16282, shares a norm's output with the next
layer by folding the norm's scale into that layer's weight; here weights stay as they are.)

How the two find each other: ``linear`` looks at its input's ``grad_fn``. A view, a copy or an in-place change
has another ``grad_fn`` or version, so a tensor that is not exactly what the function returned is saved as
usual. Nothing is attached to tensors. The product and its backward are torch's own, run inside saved-tensor
hooks that keep the producer's node in the place of ``x``; hooks around it therefore see neither ``x`` nor the
weight. Gradient accumulation and the order of the engine are those of ``torch.nn.functional.linear``, and so,
to the bit, are the gradients.

In backward the first linear layer unpacks the producer's saved tensors and computes the output; the other
ones and the producer itself use the same. Saved-tensor hooks therefore see each tensor packed once and
unpacked once in a pass, which is what activation checkpointing asks for. What is held is dropped by the
producer's own backward, or at the end of the pass where that does not run.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import torch
from torch import Tensor


class Held:
    """What one backward pass has unpacked and computed of a producer; empty between passes."""

    __slots__ = ("__weakref__", "kept", "output", "saved")

    def __init__(self) -> None:
        self.saved: tuple[Tensor, ...] | None = None
        self.output: Tensor | None = None
        self.kept: Tensor | None = None
        """What the producer computed on the way to its output and can use in its own backward."""

    def drop(self) -> None:
        """Give the memory back."""
        self.saved = self.output = self.kept = None


class RecomputedOutput(torch.autograd.Function):
    """A function whose output is cheaply computed from what it saves.

    A subclass sets ``ctx.held = Held()`` in forward, reads its saved tensors through ``unpacked`` and drops
    them in backward.
    """

    @staticmethod
    def output_again(ctx: Any, saved: tuple[Tensor, ...]) -> Tensor:
        """The output of forward, to the bit, from ``ctx.saved_tensors``."""
        raise NotImplementedError


def unpacked(node: Any) -> tuple[Tensor, ...]:
    """The saved tensors of a producer's node, unpacked once in a backward pass."""
    held: Held = node.held
    if held.saved is None:
        held.saved = node.saved_tensors
        there = weakref.ref(held)

        def drop() -> None:
            if (still := there()) is not None:
                still.drop()

        torch.autograd.Variable._execution_engine.queue_callback(drop)
    return held.saved


def taken(node: Any) -> tuple[Tensor, ...]:
    """The saved tensors for the producer's own backward, after which nothing is held any more."""
    held: Held = node.held
    saved: tuple[Tensor, ...] = node.saved_tensors if held.saved is None else held.saved
    held.drop()
    return saved


def is_recomputed(x: Tensor) -> bool:
    """Whether ``linear`` will not save ``x``.

    A change in place under ``no_grad`` leaves ``grad_fn`` alone and shows in the version, which is 0 as the
    function returns it.
    """
    made_by = getattr(type(x.grad_fn), "_forward_cls", None)
    return made_by is not None and issubclass(made_by, RecomputedOutput) and x._version == 0


def _output_again(node: Any) -> Tensor:
    held: Held = node.held
    if held.output is not None:
        return held.output
    with torch.no_grad():
        if torch._C._current_graph_task_id() == -1:  # somebody looks at the graph from outside
            output: Tensor = node._forward_cls.output_again(node, node.saved_tensors)
            return output
        held.output = node._forward_cls.output_again(node, unpacked(node))
    return held.output


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False) -> Tensor:
    """``x @ weight.T + bias`` that does not save an ``x`` which a ``RecomputedOutput`` made.

    It is torch's own function with torch's own backward; only what that would save of such an ``x`` is made
    again when it is asked for, and so, under autocast, is the weight's copy. Under ``torch.compile``, whose
    partitioner decides for itself what is saved, nothing is changed.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]``; ``[in, out]`` if ``transposed`` (GPT-2's Conv1D).
        bias: ``[out]``.

    Raises:
        RuntimeError: in backward, if the weight has been changed in place since.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not is_recomputed(x):
        return plain_linear(x, weight, bias, transposed=transposed)
    node = x.grad_fn
    if (dtype := autocast_dtype(x)) is not None:
        x = x.to(dtype)  # as autocast would; here, so that its place is known
    place = x.data_ptr()
    around = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if around is not None and not getattr(around[0], "takes_weights", False):
        around = None

    def pack(saved: Tensor) -> _Again | _Weight:
        if saved.data_ptr() == place:
            return _Again(node, saved)
        return _Weight(weight, saved, around)

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        return plain_linear(x, weight, bias, transposed=transposed)


class _Again:
    """Stands for a saved output of ``node``: its rows, in a dtype that it was cast to."""

    __slots__ = ("dtype", "node", "shape")

    def __init__(self, node: Any, saved: Tensor) -> None:
        self.node, self.shape, self.dtype = node, saved.shape, saved.dtype

    def get(self) -> Tensor:
        output = _output_again(self.node)
        if output.dtype != self.dtype:
            output = output.to(self.dtype)
        return output.view(self.shape)


class _Weight:
    """Stands for a saved weight or its transpose; where autocast made a copy of it, the copy is made again.

    Autograd does not look at versions behind hooks, so this does. Hooks around that have weights elsewhere
    between the passes are handed what is kept of this one.
    """

    __slots__ = ("around", "dtype", "flipped", "kept", "version", "weight")

    def __init__(self, weight: Tensor, saved: Tensor, around: tuple[Any, ...] | None) -> None:
        self.weight, self.version, self.dtype, self.around = weight, weight._version, saved.dtype, around
        kept = saved if saved.dtype == weight.dtype else weight
        self.kept = kept if around is None else around[0](kept)
        self.flipped = saved.shape != weight.shape or saved.stride() != weight.stride()

    def get(self) -> Tensor:
        if self.weight._version != self.version:
            raise RuntimeError(
                f"a weight of shape {tuple(self.weight.shape)} that backward needs has been modified by an "
                f"inplace operation (version {self.version}, now {self.weight._version}): call backward "
                "before the change"
            )
        kept: Tensor = self.kept if self.around is None else self.around[1](self.kept)
        if kept.dtype == self.dtype:
            return kept
        copy = kept.detach().to(self.dtype)
        return copy.t() if self.flipped else copy


def _unpack(packed: _Again | _Weight) -> Tensor:
    return packed.get()


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool = False) -> Tensor:
    """The same in torch's own functions, as ``nn.Linear`` and ``Conv1D`` write it."""
    if not transposed:
        return torch.nn.functional.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    product = rows @ weight if bias is None else torch.addmm(bias, rows, weight)
    return product.view(*x.shape[:-1], weight.shape[1])


def refuse_double_backward(name: str) -> None:
    """Call first in every backward: its gradients carry no graph of their own.

    Raises:
        RuntimeError: backward runs under ``create_graph=True``.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} has no second derivative: call without create_graph=True")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What matrix products of ``x`` are computed in under the present autocast; None without."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """For arithmetic that has done its casts itself."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)
