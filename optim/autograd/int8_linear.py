"""Linear layers that keep their input in int8 groups, which the product of their weight's gradient unpacks.

What ``quantized_saved`` does to whatever a block saves, for one linear layer that is known: the input is
encoded once for all layers that are given it (query, key and value), and on CUDA no unpacked copy of it
exists in backward (``kernels.int8_product``; bf16 and fp16, inputs in whole groups). The forward pass and
the gradients of ``x`` and of the bias are exact, ``weight.grad`` is an ordinary gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memtrain.optim.autograd.group_codec import Encoded, GroupCodec
from memtrain.optim.autograd.lossy_backward import PerInput, eager_only, refuse_second_derivative
from memtrain.optim.autograd.recomputed import autocast_dtype, without_autocast
from memtrain.optim.kernels.int8_product import int8_weight_gradient


class _Coded:
    """The codes of one input, for the layers that are given it in one forward pass."""

    def __init__(self, encoded: Encoded) -> None:
        self.encoded = encoded


class Int8Input:
    """How inputs are encoded; one serves all layers, and recognises an input that several of them share."""

    def __init__(self, codec: GroupCodec | None = None) -> None:
        """Raises ValueError: the codec has other than 8 bits."""
        self.codec = GroupCodec() if codec is None else codec
        if self.codec.bits != 8:
            raise ValueError(
                f"bits is {self.codec.bits}: the product unpacks 8 (SavedTensorCompressor has 4)"
            )
        self._coded: PerInput[_Coded] = PerInput()

    def encode(self, x: Tensor, dtype: torch.dtype) -> _Coded:
        """Of ``x`` in ``dtype``."""
        return self._coded.get(x, dtype, lambda: _Coded(self.codec.encode(x.detach().to(dtype))))


@eager_only("an input that several layers share is recognised by its storage, which a graph has not")
def int8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, shared: Int8Input) -> Tensor:
    """``x @ weight.T + bias``; the gradient of ``weight`` from ``x`` in int8.

    Saved: 8.125 bits an element of ``x`` (groups of 128), once for all layers given it; the weight by
    reference. Without gradients, or with a frozen weight, this is ``torch.nn.functional.linear``.

    Args:
        x: ``[..., n]``.
        weight: ``[m, n]``.
        bias: ``[m]`` or None.
        shared: how ``x`` is encoded.

    Raises:
        LossyBackwardError: in backward under ``create_graph=True``.
    """
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return F.linear(x, weight, bias)
    cast = autocast_dtype(x)
    with without_autocast(x):
        with torch.no_grad():
            coded = shared.encode(x, x.dtype if cast is None else cast)
        if cast is not None:
            x, weight, bias = x.to(cast), weight.to(cast), None if bias is None else bias.to(cast)
        result: Tensor = _Int8Linear.apply(x, weight, bias, coded, shared.codec)  # type: ignore[no-untyped-call]
        return result


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, coded: _Coded, codec: GroupCodec
    ) -> Tensor:
        ctx.shape, ctx.coded, ctx.codec = x.shape, coded, codec  # the graph keeps what its layers share
        ctx.save_for_backward(*coded.encoded, weight if ctx.needs_input_grad[0] else None)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("a linear layer with an encoded input")
        codes, scales, weight = ctx.saved_tensors
        rows, inputs = grad.reshape(-1, grad.shape[-1]), ctx.shape[-1]
        with without_autocast(grad):
            dx = None if weight is None else (rows @ weight).view(ctx.shape)
            db = rows.sum(0) if ctx.needs_input_grad[2] else None
            dw = None
            if not ctx.needs_input_grad[1]:
                pass
            elif inputs % codes.shape[1] == 0:
                dw = int8_weight_gradient(rows, (codes, scales), inputs)
            else:
                x = ctx.codec.decode(Encoded(codes, scales), ctx.shape, rows.dtype)
                dw = rows.t() @ x.reshape(-1, inputs)
        return dx, dw, db, None, None
