"""Activations whose backward keeps 1 to 8 bits of each input.

The forward pass is exact. Backward multiplies by the level of the bin that the input lay in
(``fewbit_tables``); the bins' numbers are packed (``bitpack``). Few-bit backward: Novikov et al., arXiv
2202.00441; here with tables that are optimal for any width, activation and distribution of inputs.

Where it pays: the input is saved by nobody else, and the layer behind needs the output exactly, or saves it
in a smaller way of its own: with CompAct at a quarter of the features a GELU MLP keeps .875 bytes of bf16
per hidden feature (.5 and .375 for 3 bits), where the exact ``swiglu.activation_linear`` keeps 2. Not:

- before a plain Linear: that saves the output, 2 bytes, and ``activation_linear`` saves the input alone;
- in a gated MLP (SwiGLU, GeGLU), which needs the activation's value for the gate's product, and can compute
  it again exactly from the gate that is saved in any case; ``lossy.apply_fewbit`` refuses it by name;
- sigmoid and tanh, which save their output alone, as the next Linear does: bits come on top of it. They
  are for outputs that nobody saves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtrain.optim.autograd.bitpack import pack, unpack
from memtrain.optim.autograd.fewbit_tables import RANGE, Elementwise, FewBitTable, Histogram, optimal_table
from memtrain.optim.autograd.lossy_backward import refuse_second_derivative

DEFAULT_BITS = 3
"""The error of GELU's derivative is .0119 at 3 bits and .0406 at 2 (integral of its square); at 4, .0031."""
_COMPARED_BORDERS = 15
"""Up to so many borders one comparison each is faster on a CPU than a binary search: on 4 M values 94 ms
against 182 ms with 15 of them, 29 against 126 with 3 (one core)."""
_CPU_CHUNK = 1 << 16
_CALIBRATION_VALUES = 1 << 16
"""Inputs of one call that go into a histogram, evenly spaced: a bin's share is good to about a percent."""


@dataclass(frozen=True, kw_only=True)
class Activation:
    """An elementwise function with its derivative.

    Attributes:
        name: for messages.
        function: ``f``, of a tensor of any floating dtype.
        derivative: ``f'``, in fp64; used when a table is made.
        even: ``f'(-x) = f'(x)``: bins are of ``|x|``.
        unbounded: ``f'`` has no limit at infinity, so that no table is good for inputs of any spread.
    """

    name: str
    function: Elementwise
    derivative: Elementwise
    even: bool = False
    unbounded: bool = False

    def table(self, bits: int = DEFAULT_BITS, *, inputs: Histogram | None = None) -> FewBitTable:
        """The best table, for inputs with the distribution ``inputs`` (None: each input alike).

        Raises:
            ValueError: the derivative is unbounded and ``inputs`` is None.
        """
        if inputs is None and self.unbounded:
            raise ValueError(
                f"the derivative of {self.name} grows without bound, so a table is good for inputs of known "
                "spread alone: give their histogram (collect_histograms)"
            )
        if inputs is None and ACTIVATIONS.get(self.name) is self:
            return _table_called(self.name, bits)
        return self._make_table(bits, inputs)

    def _make_table(self, bits: int, inputs: Histogram | None) -> FewBitTable:
        bound = RANGE if inputs is None else max(RANGE, abs(inputs.low), abs(inputs.high))
        return optimal_table(
            self.function,
            self.derivative,
            bits,
            low=-bound,
            high=bound,
            parity=self.even,
            weight=None if inputs is None else inputs.density,
        )


@functools.cache
def _table_called(name: str, bits: int) -> FewBitTable:
    return ACTIVATIONS[name]._make_table(bits, None)


@dataclass(frozen=True, slots=True)
class _Derivative:
    """Of ``function``; a class and no closure, so that a model can be pickled."""

    function: Elementwise

    def __call__(self, points: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = points.detach().clone().requires_grad_()
            return torch.autograd.grad(self.function(leaf).sum(), leaf)[0]


def derivative_of(function: Elementwise) -> Elementwise:
    """``f'`` by autograd, for an ``f`` made of torch operations."""
    return _Derivative(function)


def relu2(values: Tensor) -> Tensor:
    """Squared ReLU (So et al., arXiv 2109.08668)."""
    return F.relu(values).square()


def _gelu_tanh(values: Tensor) -> Tensor:
    return F.gelu(values, approximate="tanh")


def _named(name: str, function: Elementwise, **properties: bool) -> Activation:
    return Activation(name=name, function=function, derivative=derivative_of(function), **properties)


ACTIVATIONS: Mapping[str, Activation] = {
    activation.name: activation
    for activation in (
        _named("gelu", F.gelu),
        _named("gelu_tanh", _gelu_tanh),
        _named("silu", F.silu),
        _named("relu2", relu2, unbounded=True),
        _named("mish", F.mish),
        _named("softplus", F.softplus),
        _named("selu", F.selu),
        _named("elu", F.elu),
        _named("sigmoid", torch.sigmoid, even=True),
        _named("tanh", torch.tanh, even=True),
    )
}


class FewBitActivation(nn.Module):
    """``activation`` with few-bit backward; without gradients, the activation itself.

    Args:
        activation: one of ``ACTIVATIONS``, by name or as it is, or one of your own.
        bits: of a table for inputs of any distribution; or give ``table`` (``Activation.table``).
        table: bins and levels.
    """

    borders: Tensor
    levels: Tensor

    def __init__(
        self, activation: Activation | str, bits: int = DEFAULT_BITS, *, table: FewBitTable | None = None
    ) -> None:
        super().__init__()
        self.activation = activation_called(activation)
        self.table = self.activation.table(bits) if table is None else table
        self.register_buffer(
            "borders", torch.tensor(self.table.borders, dtype=torch.float32), persistent=False
        )
        self.register_buffer("levels", torch.tensor(self.table.levels, dtype=torch.float32), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        return fewbit(values, self.activation.function, self.table, self.borders, self.levels)

    def extra_repr(self) -> str:
        return f"{self.activation.name}, bits={self.table.bits}"


def activation_called(activation: Activation | str) -> Activation:
    """The activation of that name. Raises ValueError, with the names there are."""
    if isinstance(activation, Activation):
        return activation
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"no few-bit activation is called {activation!r}; there are {', '.join(ACTIVATIONS)}, or give an "
            "Activation with your own function and derivative"
        )
    return ACTIVATIONS[activation]


def fewbit(
    values: Tensor,
    function: Elementwise,
    table: FewBitTable,
    borders: Tensor | None = None,
    levels: Tensor | None = None,
) -> Tensor:
    """``function(values)``, whose backward knows ``values`` by ``table``'s bins.

    ``borders`` and ``levels`` are the table's, in fp32 on the device of ``values``; made when not given.
    A second derivative raises LossyBackwardError.
    """
    if borders is None or levels is None:
        borders = torch.tensor(table.borders, dtype=torch.float32, device=values.device)
        levels = torch.tensor(table.levels, dtype=torch.float32, device=values.device)
    # Modules are cast as a whole (model.bfloat16()); bins and levels are not rounded with them.
    if borders.dtype != torch.float32 or levels.dtype != torch.float32:
        borders = torch.tensor(table.borders, dtype=torch.float32, device=values.device)
        levels = torch.tensor(table.levels, dtype=torch.float32, device=values.device)
    result: Tensor = _FewBit.apply(  # type: ignore[no-untyped-call]
        values, function, table.bits, table.parity, borders, levels
    )
    return result


class _FewBit(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        function: Elementwise,
        bits: int,
        parity: bool,
        borders: Tensor,
        levels: Tensor,
    ) -> Tensor:
        ctx.bits, ctx.shape, ctx.dtype = bits, values.shape, values.dtype
        if ctx.needs_input_grad[0]:
            codes = _bins(values.reshape(-1), borders, parity)
            ctx.save_for_backward(pack(codes, bits), levels)
        return function(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("a few-bit activation")
        packed, levels = ctx.saved_tensors
        flat = gradient.reshape(-1)
        codes = unpack(packed, ctx.bits, flat.numel())
        result = torch.empty(flat.numel(), dtype=ctx.dtype, device=flat.device)
        for part in _chunks(flat):
            result[part] = levels.index_select(0, codes[part].int()) * flat[part]
        return result.view(ctx.shape), None, None, None, None, None


def _bins(flat: Tensor, borders: Tensor, parity: bool) -> Tensor:
    """The number of borders that are not above each value, uint8. Compared in fp32 whatever the dtype is."""
    codes = torch.empty(flat.numel(), dtype=torch.uint8, device=flat.device)
    for part in _chunks(flat):
        values = flat[part].float()
        values = values.abs() if parity else values
        if len(borders) > _COMPARED_BORDERS:
            codes[part] = torch.bucketize(values, borders, out_int32=True, right=True)
            continue
        count = torch.zeros_like(values, dtype=torch.uint8)
        for border in borders:
            count += values >= border
        codes[part] = count
    return codes


def _chunks(flat: Tensor) -> Iterator[slice]:
    whole = flat.device.type != "cpu" or torch.compiler.is_compiling()
    step = max(flat.numel(), 1) if whole else _CPU_CHUNK
    for start in range(0, flat.numel(), step):
        yield slice(start, start + step)


@contextmanager
def collect_histograms(modules: Mapping[str, nn.Module]) -> Iterator[Callable[[], dict[str, Histogram]]]:
    """Watch the inputs of ``modules`` while batches run inside; the yielded function gives their histograms.

    For ``Activation.table(inputs=...)``. Up to ``_CALIBRATION_VALUES`` inputs of each call are held.
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            flat = args[0].detach().reshape(-1)
            seen[name].append(flat[:: -(-flat.numel() // _CALIBRATION_VALUES) or 1].float())

        return hook

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in modules.items()]
    try:
        yield lambda: {name: Histogram.of(torch.cat(parts)) for name, parts in seen.items() if parts}
    finally:
        for hook in hooks:
            hook.remove()
