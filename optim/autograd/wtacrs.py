"""WTA-CRS: linear layers that save a sample of their input's rows.

For ``y = x W^T + b`` the weight's gradient is a sum over tokens, ``sum_i g_i x_i^T``. Forward keeps ``k``
of the rows ``x_i``; backward adds up their terms with weights that make the sum's expectation the gradient
(Liu et al., arXiv 2305.15265). With probabilities ``p`` the ``c`` likeliest rows are taken for certain (the
winners), and ``k - c`` are drawn from the others:

    sum over winners of g_i x_i^T  +  (1 - P_C) / (k - c)  sum over draws of g_j x_j^T / p_j

``c`` minimises ``(1 - P_C) / (k - c)``. The gradients of ``x`` and of the bias are exact, and
``weight.grad`` is an ordinary gradient: clipping, accumulation, GradScaler and every optimizer work on it
unchanged.

Departures, each the answer to a fault of the public code:

- Unbiased from the first step: before gradient norms are known ``p_i ~ |x_i|``, *with* importance weights
  (there: none, a relative bias of .447 for the first epoch). No row that may matter has probability 0.
- Layers that are given the same tensor share one sample; one per layer would save three times a third.
- Norms are kept on the tokens' device and never copied to the host, and are optional.
- The dtype of ``x`` stays. Draws come from torch's default generator, as dropout's do, so a checkpoint's
  second run draws the same.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtrain.optim.autograd.linears import Select, change_class, input_groups, linears_of, restore_class
from memtrain.optim.autograd.lossy_backward import (
    PerInput,
    eager_only,
    refuse_second_derivative,
)
from memtrain.optim.autograd.recomputed import autocast_dtype, without_autocast
from memtrain.optim.autograd.row_sampling import GradientNorms, Sample, draw_rows
from memtrain.optim.kernels.wta_gradient import wta_weight_gradient

DEFAULT_RATIO = 0.3
"""The paper's share of rows."""


class _Taken:
    """The sample of one input, for the layers that are given it in one forward pass."""

    def __init__(self, sample: Sample, norms: GradientNorms | None, ids: Tensor | None) -> None:
        self.sample, self._norms, self._ids = sample, norms, ids
        self._values: weakref.ref[Tensor] | None = None
        self._squares: Tensor | None = None

    def values(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows of ``x``; one tensor for all, as long as a graph holds it."""
        values = None if self._values is None else self._values()
        if values is None or values.dtype != dtype:
            values = x.detach().reshape(-1, x.shape[-1])[self.sample.rows].to(dtype)
            self._values = weakref.ref(values)
        return values

    def learn(self, grad: Tensor) -> None:
        """Add one layer's gradient rows to the norms; the layers of an input share their sum's root."""
        if self._norms is None or self._ids is None:
            return
        squares = _row_norms(grad).square()
        self._squares = squares if self._squares is None else self._squares + squares
        self._norms.store(self._ids, self._squares.sqrt())


class WTAInput:
    """How one input is sampled, shared by the layers that are given it.

    Args:
        ratio: rows to keep over rows; at least one is kept.
        norms: of the gradients behind this input; used where ``set_ids`` has said what a batch holds.
    """

    def __init__(self, ratio: float = DEFAULT_RATIO, norms: GradientNorms | None = None) -> None:
        if not 0 < ratio < 1:
            raise ValueError(f"ratio is {ratio}: the share of rows to keep lies between 0 and 1")
        self.ratio, self.norms = ratio, norms
        self.set_ids(None)

    def set_ids(self, ids: Tensor | None) -> None:
        """The samples of the next batches, int64 ``[batch]``; None: not known."""
        self._ids = ids
        self._taken: PerInput[_Taken] = PerInput()

    def rows_kept(self, rows: int) -> int:
        """Of so many."""
        return max(1, round(self.ratio * rows))

    def take(self, x: Tensor) -> _Taken:
        """The sample of ``x``."""
        return self._taken.get(x, None, lambda: self._sample(x.detach()))

    def _sample(self, x: Tensor) -> _Taken:
        norms = None if self._ids is None else self.norms
        weights = _row_norms(x.reshape(-1, x.shape[-1]))
        if norms is not None:
            assert self._ids is not None
            tokens = norms.norms.shape[1]
            if len(self._ids) * tokens != len(weights):
                raise ValueError(
                    f"an input of {len(weights)} rows is not {len(self._ids)} samples of {tokens} tokens: "
                    "call set_samples with the ids of this batch, or with None"
                )
            weights = weights * norms.of(self._ids)
        total = weights.sum()
        uniform = torch.full_like(weights, 1 / len(weights))
        probabilities = torch.where((total > 0) & total.isfinite(), weights / total, uniform)
        rows, factors = draw_rows(probabilities, self.rows_kept(len(weights)))
        # A row that is not finite must be seen in the gradient, even if it is not among those drawn.
        factors = torch.where(total.isfinite(), factors, math.nan)
        return _Taken(Sample(rows, factors), norms, self._ids)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ids": None}


def _row_norms(rows: Tensor) -> Tensor:
    wide = torch.promote_types(rows.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=wide)
    return norms


class WTALinear(nn.Linear):
    """An ``nn.Linear`` with WTA-CRS's backward; made by ``apply_wta``."""

    wta_input: WTAInput

    def forward(self, x: Tensor) -> Tensor:
        return wta_linear(x, self.weight, self.bias, self.wta_input)


@eager_only("WTA-CRS recognises an input that several layers share, which a graph cannot")
def wta_linear(x: Tensor, weight: Tensor, bias: Tensor | None, shared: WTAInput) -> Tensor:
    """``x @ weight.T + bias``; the gradient of ``weight`` from a sample of the rows of ``x``.

    Saved: ``round(ratio * rows)`` rows in the dtype of the product with an index and a factor each (12
    bytes), once for all layers given ``x``; the weight by reference. Without gradients, with a frozen weight,
    and for an ``x`` too short to be sampled, this is ``torch.nn.functional.linear``.

    Args:
        x: ``[..., n]``.
        weight: ``[m, n]``.
        bias: ``[m]`` or None.
        shared: how ``x`` is sampled.

    Raises:
        ValueError: ``x`` is not the batch that ``set_samples`` announced.
        LossyBackwardError: in backward under ``create_graph=True``.
    """
    rows = x.numel() // max(x.shape[-1], 1)
    if not (torch.is_grad_enabled() and weight.requires_grad) or shared.rows_kept(rows) >= rows:
        return F.linear(x, weight, bias)
    cast = autocast_dtype(x)
    with without_autocast(x):
        with torch.no_grad():
            taken = shared.take(x)
            values = taken.values(x, x.dtype if cast is None else cast)
        if cast is not None:
            x, weight, bias = x.to(cast), weight.to(cast), None if bias is None else bias.to(cast)
        result: Tensor = _WTA.apply(x, weight, bias, values, taken)  # type: ignore[no-untyped-call]
        return result


class _WTA(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, values: Tensor, taken: _Taken
    ) -> Tensor:
        ctx.shape, ctx.taken = x.shape, taken
        ctx.save_for_backward(values, *taken.sample, weight if ctx.needs_input_grad[0] else None)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("WTA-CRS")
        values, index, factors, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        ctx.taken.learn(rows)
        with without_autocast(grad):
            dx = None if weight is None else (rows @ weight).view(ctx.shape)
            dw = None
            if ctx.needs_input_grad[1]:
                dw = wta_weight_gradient(rows, values, index, factors)
            db = rows.sum(0) if ctx.needs_input_grad[2] else None
        return dx, dw, db, None, None


class WTAHandle:
    """What ``apply_wta`` changed; the batch's samples, and the way back."""

    def __init__(self, layers: dict[str, nn.Linear], inputs: list[WTAInput]) -> None:
        self._layers, self._inputs = layers, inputs

    @property
    def names(self) -> list[str]:
        """Of the treated layers."""
        return list(self._layers)

    def set_samples(self, ids: Tensor | None) -> None:
        """Which samples of the data set the next batches hold, int64 ``[batch]`` on the layers' device; None:
        it is not known, and rows are chosen by their own norms."""
        for shared in self._inputs:
            shared.set_ids(ids)

    def undo(self) -> None:
        """Make the layers ``nn.Linear`` again. Twice is harmless."""
        for layer in self._layers.values():
            if isinstance(layer, WTALinear):
                restore_class(layer, "wta_input")


def apply_wta(
    model: nn.Module,
    *,
    ratio: float = DEFAULT_RATIO,
    samples: int | None = None,
    tokens: int | None = None,
    select: Select | None = None,
) -> WTAHandle:
    """Give linear layers of ``model`` WTA-CRS's backward (which ones: ``linears.linears_of``).

    Adapters (LoRA) whose factors are ``nn.Linear`` are treated, the frozen layer beside them is left alone.

    Args:
        ratio: rows to keep over rows.
        samples, tokens: remember gradient norms for a data set of that size; 2 bytes per token and input.
            Then call ``set_samples`` before each batch.
        select: ``(name, layer) -> bool``.

    Raises:
        UnsupportedLinearError: a layer cannot be treated, or there is none.
        ValueError: ``ratio``; or one of samples and tokens without the other.
    """
    if (samples is None) != (tokens is None):
        raise ValueError(f"samples and tokens go together, got {samples} and {tokens}")
    layers = linears_of(model, select)
    inputs = []
    for names in input_groups(layers):
        norms = None
        if samples is not None and tokens is not None:
            norms = GradientNorms(samples, tokens, layers[names[0]].weight.device)
        inputs.append(WTAInput(ratio, norms))
    for shared, names in zip(inputs, input_groups(layers), strict=True):
        for name in names:
            change_class(layers[name], WTALinear, wta_input=shared)
    return WTAHandle(layers, inputs)
