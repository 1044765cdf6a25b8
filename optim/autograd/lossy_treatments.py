"""Lossy treatments as entries of a policy (``apply.py``), beside the exact ones.

    import memtrain.optim.autograd.lossy_treatments  # registers them
    apply_to(model, EXACT.followed_by(Rule(kind="layer", treatment="int8")))

- ``layer``: ``int8``, ``int4``: what the whole layer saves, after the exact treatments inside it; and without
  loss ``unique``, of tensors with few distinct values;
- ``mlp``: ``fewbit2``, ``fewbit3``, ``fewbit4``: the activation of an MLP without a gate;
- ``gated_mlp``: the same names, which answer why they give nothing there;
- ``linear``: ``int8``, a norm's output encoded, where the layer is not encoded as a whole; ``wta``, a sample
  of its rows; ``compact``, its projection to a quarter of the features. The gradients of the latter go to an
  optimizer by ``compact_gradients.feed_compact``, which renews the bases; without it ``compact.bases_of``
  does, and ``densify_grads`` makes ordinary gradients.
"""

from __future__ import annotations

import itertools
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from memtrain.optim.autograd.compact import DEFAULT_DENSITY, CompActForward, CompActInput
from memtrain.optim.autograd.fewbit import fewbit
from memtrain.optim.autograd.fewbit_tables import FewBitTable
from memtrain.optim.autograd.group_codec import GroupCodec
from memtrain.optim.autograd.int8_linear import Int8Input, int8_linear
from memtrain.optim.autograd.lossy import activation_of, is_activation
from memtrain.optim.autograd.lossy_backward import eager_only
from memtrain.optim.autograd.quantized_saved import SavedCodec, SavedTensorCompressor
from memtrain.optim.autograd.sites import Site, features, is_linear
from memtrain.optim.autograd.treatments import (
    Bypassed,
    NotServedError,
    Offer,
    measured_bytes,
    refuse_hooks,
    register_treatment,
    same_when_training,
)
from memtrain.optim.autograd.unique_codec import UniqueCodec
from memtrain.optim.autograd.wtacrs import WTAInput, wta_linear
from memtrain.optim.projection import Projection


@eager_only("saved-tensor hooks are entered and left around a graph, not inside it")
def _encoded(
    compressor: SavedTensorCompressor, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    with compressor.region(module, args, kwargs) as result:
        return result(type(module).forward(module, *args, **kwargs))


@dataclass(frozen=True, slots=True)
class _EncodedForward:
    compressor: SavedTensorCompressor

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _encoded(self.compressor, module, args, kwargs)


class _Encode:
    """``quantized_saved.py``. Bytes are not foretold: they depend on what is done inside the layer."""

    def __init__(self, codec: SavedCodec) -> None:
        self.exact = codec.exact
        # One for all layers, so that what several of them save is encoded once.
        self._compressor = SavedTensorCompressor(codec)

    def offer(self, site: Site) -> Offer:
        return Offer(
            forward=_EncodedForward(self._compressor),
            plain_bytes=None,
            saved_bytes=None,
            equal="bit-equal" if self.exact else "forward exact; backward from encoded activations",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _FewBitForward:
    first: str
    activation: str
    second: str
    dropout: str | None
    table: FewBitTable
    bypassed: Bypassed

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        self.bypassed.check(module)
        first, activation, second = (getattr(module, n) for n in (self.first, self.activation, self.second))
        y: Tensor = second(fewbit(first(x), activation.forward, self.table))
        result: Tensor = y if self.dropout is None else getattr(module, self.dropout)(y)
        return result


class _FewBitMLP:
    """``fewbit.py``, with the table for inputs of any distribution."""

    exact = False

    def __init__(self, bits: int) -> None:
        self._bits = bits

    def offer(self, site: Site) -> Offer:
        if site.kind == "gated_mlp":
            raise NotServedError(
                "few-bit backward gives nothing in a gated MLP: the product needs the activation's value, "
                "which follows exactly from the saved gate (recompute)"
            )
        forward = self._forward(site)
        with torch.no_grad():
            same = site.output is not None and torch.equal(forward(site.module, site.input), site.output)
            if not (same and same_when_training(site, forward, 0.0)):
                raise NotServedError("not linear, activation, linear, dropout, one after the other")
        fixed = (site.input, *site.module.parameters())

        def saved(run: Any) -> float:
            return measured_bytes(lambda: run(site.input.detach().requires_grad_()), iter(fixed), site.tokens)

        return Offer(
            forward=forward,
            plain_bytes=saved(site.module),
            saved_bytes=saved(lambda x: forward(site.module, x)),
            equal=f"forward bit-equal; {self._bits}-bit derivative",
        )

    def _forward(self, site: Site) -> _FewBitForward:
        children = dict(site.module.named_children())
        linears = {name: child for name, child in children.items() if is_linear(child)}
        activations = [name for name, child in children.items() if is_activation(child)]
        dropouts = [name for name, child in children.items() if isinstance(child, nn.Dropout)]
        others = len(children) - len(linears) - len(activations) - len(dropouts)
        if len(activations) != 1 or len(dropouts) > 1 or others:
            raise NotServedError("not two linear layers, one activation that few-bit knows, and a dropout")
        refuse_hooks(children[activations[0]], activations[0])
        width = site.input.shape[-1]
        first = next((name for name, child in linears.items() if features(child)[0] == width), None)
        second = next((name for name in linears if name != first), None)
        if first is None or second is None:
            raise NotServedError("no linear layer takes the input")
        try:
            table = activation_of(children[activations[0]]).table(self._bits)
        except ValueError as error:
            raise NotServedError(str(error)) from error
        return _FewBitForward(
            first=first,
            activation=activations[0],
            second=second,
            dropout=dropouts[0] if dropouts else None,
            table=table,
            bypassed=Bypassed.of(children, activations[0]),
        )


@dataclass(frozen=True, slots=True)
class _Int8Forward:
    shared: Int8Input

    def __call__(self, module: nn.Linear, x: Tensor) -> Tensor:
        return int8_linear(x, module.weight, module.bias, self.shared)


class _EncodeInput:
    """``int8_linear.py``."""

    exact = False

    def __init__(self) -> None:
        # An input is recognised wherever it comes from, so one description serves all layers.
        self._shared = Int8Input()

    def offer(self, site: Site) -> Offer:
        _trainable_linear(site)
        first = site.first_to_read
        coded = self._shared.codec.size_bytes(site.input.numel()) / site.tokens
        return Offer(
            forward=_Int8Forward(self._shared),
            plain_bytes=site.input.nbytes / site.tokens if first else 0.0,
            saved_bytes=coded if first else 0.0,
            equal="forward exact; weight's gradient from an encoded input",
        )


@dataclass(frozen=True, slots=True)
class _WTAForward:
    shared: WTAInput

    def __call__(self, module: nn.Linear, x: Tensor) -> Tensor:
        return wta_linear(x, module.weight, module.bias, self.shared)


class _SampleRows:
    """``wtacrs.py`` without gradient norms."""

    exact = False

    def __init__(self) -> None:
        # An input is recognised wherever it comes from, so one description serves all layers.
        self._shared = WTAInput()

    def offer(self, site: Site) -> Offer:
        _trainable_linear(site)
        plain = site.input.nbytes / site.tokens if site.first_to_read else 0.0
        index_bytes = torch.int64.itemsize + torch.float32.itemsize
        saved = self._shared.ratio * (plain + index_bytes) if site.first_to_read else 0.0
        return Offer(
            forward=_WTAForward(self._shared),
            plain_bytes=plain,
            saved_bytes=saved,
            equal="forward exact; weight's gradient from a sample of rows",
        )


class _ProjectInput:
    """``compact.py`` with signs; one basis for each input, named by the first layer that reads it."""

    exact = False

    def __init__(self) -> None:
        self._inputs = WeakIdKeyDictionary()
        """By the probe's tensor, which goes with the probe."""

    def offer(self, site: Site) -> Offer:
        layer = _trainable_linear(site)
        new = site.input not in self._inputs
        if new:
            projection = Projection(kind="rademacher", density=DEFAULT_DENSITY, side="right")
            number = zlib.crc32(site.name.encode())
            self._inputs[site.input] = CompActInput(layer.in_features, projection, number=number)
        shared: CompActInput = self._inputs[site.input]
        return Offer(
            forward=CompActForward(shared, (layer.weight,)),
            plain_bytes=site.input.nbytes / site.tokens if site.first_to_read else 0.0,
            saved_bytes=float(shared.rank * site.input.element_size()) if new else 0.0,
            equal="forward exact; weight's gradient from a projection of its input",
        )


def _trainable_linear(site: Site) -> nn.Linear:
    if type(site.module) is not nn.Linear:
        raise NotServedError(f"{type(site.module).__name__} is not torch.nn.Linear")
    if not site.module.weight.requires_grad:
        raise NotServedError("its weight is frozen, so it saves nothing")
    return site.module


register_treatment("layer", "int8", _Encode(GroupCodec(bits=8)))
register_treatment("layer", "int4", _Encode(GroupCodec(bits=4)))
register_treatment("layer", "unique", _Encode(UniqueCodec()))
register_treatment("linear", "int8", _EncodeInput())
register_treatment("linear", "wta", _SampleRows())
register_treatment("linear", "compact", _ProjectInput())
for _kind, _bits in itertools.product(("mlp", "gated_mlp"), (2, 3, 4)):
    register_treatment(_kind, f"fewbit{_bits}", _FewBitMLP(_bits))
