"""A linear layer that does not save what the function before it can make again.

Autograd saves a norm twice: the norm keeps its input, and every linear layer that eats its output keeps the
output. Here the function that made a tensor is asked for it again in backward, so that nothing but its own
saved tensors exists between the passes. (LowMemoryBP, arXiv 2406.16282, shares a norm's output with the next
layer by folding the norm's scale into that layer's weight; here weights stay as they are.)

How the two find each other: ``linear`` looks at its input's ``grad_fn``. A view, a copy or an in-place change
has another ``grad_fn`` or version, so a tensor that is not exactly what the function returned is saved as
usual. Nothing is attached to tensors, and the graph is the ordinary one: hooks, gradient accumulation and the
order of the engine are those of ``torch.nn.functional.linear``, and so, to the bit, are the gradients.

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
    if held.output is None:
        saved = unpacked(node)
        with torch.no_grad():
            held.output = node._forward_cls.output_again(node, saved)
    return held.output


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, transposed: bool = False) -> Tensor:
    """``x @ weight.T + bias`` that does not save an ``x`` which a ``RecomputedOutput`` made.

    Any other ``x`` is given to ``torch.nn.functional.linear``, as everything is under ``torch.compile``,
    whose partitioner decides for itself what is saved. The result, and every gradient, is bit-equal to that
    of ``torch.nn.functional.linear``, under autocast as well (where the weight is cast again in backward, and
    the copy is not saved).

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]``; ``[in, out]`` if ``transposed`` (GPT-2's Conv1D).
        bias: ``[out]``.

    Raises:
        RuntimeError: in backward under ``create_graph=True``.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not is_recomputed(x):
        return plain_linear(x, weight, bias, transposed=transposed)
    result: Tensor = _Linear.apply(x, weight, bias, transposed)  # type: ignore[no-untyped-call]
    return result


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


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """``tensor`` in ``dtype``; as it is for None."""
    return tensor if dtype is None else tensor.to(dtype)


class _Linear(torch.autograd.Function):
    """Written for few Python instructions: behind products that clear the caches each costs several times
    what it does in a loop. Gradients may leave in autocast's dtype; the engine casts them to that of the
    input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        ctx.transposed, ctx.dtype = transposed, autocast_dtype(x)
        ctx.save_for_backward(weight)
        if ctx.dtype is None:
            return plain_linear(x, weight, bias, transposed=transposed)
        with without_autocast(x):
            bias = None if bias is None else bias.to(ctx.dtype)
            return plain_linear(x.to(ctx.dtype), weight.to(ctx.dtype), bias, transposed=transposed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("memtrain.optim.autograd.linear")
        with without_autocast(grad):
            (weight,) = ctx.saved_tensors
            needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
            rows = grad if grad.dim() == 2 else grad.reshape(-1, grad.shape[-1])
            grad_x = input_gradient(rows, weight, grad.shape[:-1], ctx) if needs_x else None
            grad_weight = None
            if needs_weight:
                x = cast(_output_again(ctx.next_functions[0][0]), ctx.dtype)
                grad_weight = weight_gradient(rows, x, ctx)
            return grad_x, grad_weight, rows.sum(0) if needs_bias else None, None


def input_gradient(rows: Tensor, weight: Tensor, shape: torch.Size, ctx: Any) -> Tensor:
    """``grad @ weight`` as autograd does it, ``[*shape, in]``; ``rows`` is ``grad`` in two dimensions."""
    weight = cast(weight, ctx.dtype)
    product = rows @ (weight.t() if ctx.transposed else weight)
    return product if len(shape) == 1 else product.view(*shape, product.shape[1])


def weight_gradient(rows: Tensor, x: Tensor, ctx: Any) -> Tensor:
    """``grad.T @ x`` as autograd computes it."""
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    return x.t() @ rows if ctx.transposed else rows.t() @ x
