"""A traced block's saved tensors as classes that share a fate, and what lives beside them.

Classes, in the order in which backward can restore them (each needs those before it):

- ``input``: what the block is given; it cannot be computed again within the block.
- ``routing``: a router's choices, never computed again: another order of tokens would be another model.
- ``qkv``: queries, keys and values, from the input by projections; token by token.
- ``attention``: the kernel's output with its log-sum-exp; a prefix costs its square (``ranges.model``).
- ``products``: outputs of the other matrix products, and what no cheaper way leads to.
- ``nearly_free``: norms, activations, products of elements (reference: half of a Llama layer's bytes).

A plan counts the input always. Autograd itself does not save it in bf16, where norms save an fp32 copy: what
keeps everything then needs a little less than is counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from memtrain.planner.estimate import (
    Lifetime,
    LifetimeKind,
    ModelEstimate,
    SavedTensor,
    TensorClass,
    TracedPart,
)
from memtrain.planner.parallel import ActivationClass, Degrees, ModelShape, activation_divisor


class Fate(str, Enum):
    """A class of tensors of the plan."""

    INPUT = "input"
    ROUTING = "routing"
    QKV = "qkv"
    ATTENTION = "attention"
    PRODUCTS = "products"
    NEARLY_FREE = "nearly_free"


_FATES = {
    TensorClass.BLOCK_INPUT: Fate.INPUT,
    TensorClass.ROUTING: Fate.ROUTING,
    TensorClass.MASK: Fate.ROUTING,
    TensorClass.QKV: Fate.QKV,
    TensorClass.ATTENTION_OUTPUT: Fate.ATTENTION,
}
_DIVIDED = {
    TensorClass.QKV: ActivationClass.HEADS,
    TensorClass.ATTENTION_OUTPUT: ActivationClass.HEADS,
    TensorClass.ATTENTION_WEIGHTS: ActivationClass.HEADS,
    TensorClass.MLP_GATE: ActivationClass.INTERMEDIATE,
    TensorClass.MLP_UP: ActivationClass.INTERMEDIATE,
    TensorClass.MLP_ACTIVATION: ActivationClass.INTERMEDIATE,
    TensorClass.MLP_PRODUCT: ActivationClass.INTERMEDIATE,
    TensorClass.LOSS: ActivationClass.LOGITS,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Division:
    """What one GPU has of a tensor."""

    estimate: ModelEstimate
    shape: ModelShape
    degrees: Degrees

    @property
    def tokens(self) -> int:
        """Of the micro-batch, undivided."""
        return self.estimate.batch * self.estimate.sequence

    def size(self, size_bytes: int, kind: ActivationClass) -> int:
        """Bytes on one GPU, rounded up."""
        return math.ceil(size_bytes / activation_divisor(kind, self.degrees, self.shape))

    def saved(self, tensor: SavedTensor) -> int:
        """Bytes on one GPU of a saved tensor."""
        return self.size(tensor.size_bytes, self.kind(tensor))

    def kind(self, tensor: SavedTensor) -> ActivationClass:
        """What divides a saved tensor."""
        kind = _DIVIDED.get(tensor.tensor_class)
        if kind is None:
            return self._by_size(tensor.size_bytes)
        values = math.prod(tensor.shape) / self.tokens
        if tensor.tensor_class is TensorClass.QKV and values < self.shape.query_width:
            return ActivationClass.KEY_VALUE
        return kind

    def lifetime(self, lifetime: Lifetime, part: TracedPart) -> int:
        """Bytes on one GPU of a buffer."""
        if lifetime.saved is not None:
            return self.saved(part.saved[lifetime.saved])
        return self.size(lifetime.size_bytes, self._by_size(lifetime.size_bytes))

    def ways(self, size_bytes: int) -> int:
        """Into how many parts a buffer without a class is cut."""
        return activation_divisor(self._by_size(size_bytes), self.degrees, self.shape)

    def _by_size(self, size_bytes: int) -> ActivationClass:
        """Of a buffer without a class: as wide as the residual stream or a vector of it, or inside a layer.

        Inside a layer all is divided by the tensor degree; the residual stream by sequence parallelism alone.
        """
        per_token = size_bytes / self.tokens
        hidden = self.shape.hidden
        residual = per_token <= 8 or per_token in (hidden, 2 * hidden, 4 * hidden)
        return ActivationClass.RESIDUAL if residual else ActivationClass.INTERMEDIATE


def fate(tensor: SavedTensor) -> Fate:
    """The class of the plan that a saved tensor belongs to."""
    known = _FATES.get(tensor.tensor_class)
    if known is not None:
        return known
    return Fate.NEARLY_FREE if tensor.nearly_free else Fate.PRODUCTS


def class_bytes(part: TracedPart, division: Division) -> dict[Fate, int]:
    """Bytes on one GPU by class, the input among them."""
    found = dict.fromkeys(Fate, 0)
    for tensor in part.saved:
        found[fate(tensor)] += division.saved(tensor)
    if not found[Fate.INPUT]:
        found[Fate.INPUT] = division.size(part.input_bytes, ActivationClass.RESIDUAL)
    return {name: size for name, size in found.items() if size}


def transient_bytes(
    part: TracedPart, division: Division, *, saved_too: bool = False, input_too: bool = False
) -> tuple[int, int]:
    """The most that lives in forward, and in backward, beside what the plan decides about.

    Left out: saved tensors unless ``saved_too``, the part's input unless ``input_too`` (it is a class of the
    plan), and parameters' gradients, which are state or, where tied, wait elsewhere. Backward is never less
    than forward: a tensor that backward makes again dies in forward, and its bytes are counted in backward
    alone.
    """
    change: dict[int, int] = {}
    for life in part.lifetimes:
        left_out = life.kind in (LifetimeKind.GRADIENT, LifetimeKind.TIED_GRADIENT)
        left_out |= life.kind is LifetimeKind.INPUT and not input_too
        left_out |= life.saved is not None and not saved_too
        if left_out:
            continue
        size = division.lifetime(life, part)
        change[life.start] = change.get(life.start, 0) + size
        change[life.end] = change.get(life.end, 0) - size
    peaks, now = [0, 0], 0
    for place in sorted(change):
        now += change[place]
        backward = place >= part.forward_operations
        peaks[backward] = max(peaks[backward], now)
    # What is alive when forward ends is there in backward's first operation.
    return peaks[0], max(peaks)


def held_bytes(estimate: ModelEstimate, division: Division) -> int:
    """What the prologue made and the model refers to until its blocks have run, saved or not: the embedding's
    output, masks. Of what blocks share, ``shared_bytes`` counts that which they save."""
    return sum(
        division.lifetime(life, estimate.prologue)
        for life in estimate.prologue.lifetimes
        if life.epilogue_end is not None and life.saved is None and life.kind is not LifetimeKind.SHARED
    )


def tied_gradient_bytes(estimate: ModelEstimate, degrees: Degrees) -> int:
    """Gradients of tied parameters, which wait from the epilogue's backward for the prologue's."""
    waiting = (t.size_bytes for t in estimate.epilogue.lifetimes if t.kind is LifetimeKind.TIED_GRADIENT)
    return math.ceil(sum(waiting) / degrees.tensor)


def shared_bytes(tensors: Iterable[SavedTensor], division: Division) -> int:
    """Tables and masks that all blocks are given, once; every tensor rank has those of all its tokens."""
    return sum(math.ceil(tensor.size_bytes / division.degrees.context) for tensor in tensors)
