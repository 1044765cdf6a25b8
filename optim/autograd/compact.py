"""CompAct: linear layers that save a random projection of their input and make a small gradient.

For ``y = x W^T + b`` with ``x`` [tokens, n] forward keeps ``z = x P`` [tokens, r], where ``E[P P^T] = 1``
and ``P`` follows from a seed. Backward gives ``R = g^T z`` [m, r]; ``R P^T`` is an unbiased estimate of the
weight's gradient ``g^T x``. The gradients of ``x`` and of the bias are exact. Shamshoum et al., arXiv
2410.15352 (NAACL 2025). Signs over sqrt(r) are the default: as unbiased as the paper's Gaussian, and cheap
to make again.

Departures, each the answer to a fault of public implementations:

- The seed belongs to the *input*: layers that are given the same tensor (query, key and value; gate and up)
  share one ``z``, where a seed per layer keeps three and two.
- ``R`` is a gradient like another: autograd adds up micro-batches and uses of a shared weight (in fp32), and
  ``torch.autograd.grad`` of something else does not touch it.
- A new seed while gradients of the old one are pending is refused, and so is a step of an optimizer that does
  not know ``R`` and would silently leave the weight where it is.

Where an optimizer projects with the same signs anyway, ``compact_gradients.feed_compact`` lets it choose the
seeds and gives it each ``R`` as it is. Otherwise the gradient is in ``weight.compressed_grad``, and
``compressed_grad.py`` makes an ordinary one of it. What CompAct saves beside the gradient is modest on a
Llama layer (14 % of eager's bytes at r = n/4), because attention and the gated product keep their own
tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtrain.optim.autograd.linears import Select, change_class, input_groups, linears_of, restore_class
from memtrain.optim.autograd.lossy_backward import (
    LossyBackwardError,
    PerInput,
    eager_only,
    refuse_second_derivative,
)
from memtrain.optim.autograd.recomputed import autocast_dtype, without_autocast
from memtrain.optim.compressed_grad import (
    add_compressed_grad,
    clear_compressed_grads,
    compressed_grads,
    dense_gradient,
    densify_grads,
)
from memtrain.optim.kernels.rademacher import rademacher_project
from memtrain.optim.projection import Projection, Projector, Stored
from memtrain.optim.projection.random import RIGHT_STREAM, read_key
from memtrain.optim.storage import RandomKey

__all__ = [
    "CompActBases",
    "CompActFeed",
    "CompActForward",
    "CompActHandle",
    "CompActInput",
    "CompActLinear",
    "apply_compact",
    "bases_of",
    "clear_compressed_grads",
    "compact_layers",
    "compact_linear",
    "compressed_grads",
    "dense_gradient",
    "densify_grads",
]

DEFAULT_DENSITY = 0.25
"""The paper's for pretraining."""
_KINDS = ("rademacher", "gaussian")


class CompActFeed(Protocol):
    """Who chooses an input's bases, and takes the gradients that are made in them."""

    def words(self) -> tuple[int, ...]:
        """Of the seed that the next forward pass is to use."""
        ...

    def receive(self, weight: Tensor, low: Tensor, stored: Stored) -> None:
        """``R`` [m, r] of one use of ``weight``, fp32, in the basis that ``stored`` names."""
        ...


class CompActInput:
    """The seeded projection of one input, shared by the layers that are given it.

    Args:
        features: of the input.
        projection: a random one from the right, ``rademacher`` or ``gaussian``.
        number: of the input within the model; with the seed it names the random numbers.
        seed: of the run.

    Raises:
        ValueError: another projection.
        ProjectionError: its rank exceeds ``features``.
    """

    def __init__(self, features: int, projection: Projection, *, number: int = 0, seed: int = 0) -> None:
        if projection.kind not in _KINDS or projection.side != "right":
            raise ValueError(
                f"CompAct projects inputs from the right, E[P P^T] = 1: one of {_KINDS} with side 'right', "
                f"got projection {projection.kind!r} with side {projection.side!r}"
            )
        self.projection = projection
        self._projector = projection.bind(torch.Size((1, features)))
        self.rank = self._projector.low_shape[-1]
        self._number, self._seed = number, seed
        self._projected: PerInput[Tensor] = PerInput()
        self.feed: CompActFeed | None = None
        self.stored: Stored = {}
        """The present seed, never written in place: graphs keep theirs."""
        self.refresh(0)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "feed": None}  # a copy's weights are not the optimizer's

    def bound_to(self, shape: torch.Size) -> Projector:
        """The projector of a weight ``[m, n]`` that reads this input."""
        return self.projection.bind(shape)

    def follow(self) -> None:
        """Take up the basis that the feed wants, if there is one."""
        if self.feed is not None and (words := self.feed.words()) != tuple(self.stored["seed"].tolist()):
            self.stored = {"seed": torch.tensor(words)}

    def refresh(self, step: int) -> None:
        """A new basis from the next forward pass on. Graphs that exist keep theirs."""
        stored = self._projector.empty("cpu")
        key = RandomKey(seed=self._seed, parameter=self._number, step=step)
        self._projector.refresh_(stored, None, key=key)
        self.stored = stored

    def project(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
        """``z`` [tokens, r] in ``dtype``, and the factor that it lacks."""
        # 1/sqrt(r) is rounded in bf16, by up to .4 %, in every product alike. A power of two is not.
        power = 2.0 ** round(0.5 * math.log2(self.rank))

        def make() -> Tensor:
            rows = x.detach().reshape(-1, x.shape[-1]).to(dtype)
            if self.projection.kind == "rademacher":
                key = read_key(self.stored["seed"]).fold(RIGHT_STREAM)
                return rademacher_project(rows, key, self.rank, scale=1 / power)
            basis = self._projector.open(self.stored, x.device)["right"]
            return rows @ (basis * (math.sqrt(self.rank) / power)).to(dtype)

        words = tuple(self.stored["seed"].tolist())
        return self._projected.get(x, (words, dtype), make), power / math.sqrt(self.rank)


class CompActLinear(nn.Linear):
    """An ``nn.Linear`` with CompAct's backward; made by ``apply_compact``."""

    compact_input: CompActInput
    compact_weight: tuple[nn.Parameter]
    """The weight that an optimizer was or will be given; in a tuple, for it is not a second parameter."""

    def forward(self, x: Tensor) -> Tensor:
        _refuse_replaced(self, self.compact_weight[0])
        return compact_linear(x, self.weight, self.bias, self.compact_input)


@dataclass(frozen=True, slots=True)
class CompActForward:
    """The same as the ``forward`` that a policy puts in place (``apply.py``)."""

    shared: CompActInput
    weight: tuple[Tensor]
    """The layer's, as an optimizer was or will be given it."""

    def __call__(self, module: nn.Linear, x: Tensor) -> Tensor:
        _refuse_replaced(module, self.weight[0])
        return compact_linear(x, module.weight, module.bias, self.shared)


def _refuse_replaced(layer: nn.Linear, weight: Tensor) -> None:
    if layer.weight is not weight:
        raise LossyBackwardError(
            f"the weight of a CompAct layer ({layer.in_features} to {layer.out_features} features) was "
            "replaced since (by sharding, functional_call, or a load with assign=True), and its gradient "
            "would be put where no optimizer looks: undo, and apply CompAct again; it cannot be sharded"
        )


def compact_layers(model: nn.Module) -> dict[str, tuple[nn.Linear, CompActInput]]:
    """Name, layer and input of all that has CompAct's backward, by ``apply_compact`` or by a policy."""
    found: dict[str, tuple[nn.Linear, CompActInput]] = {}
    for name, module in model.named_modules():
        of_policy = getattr(module.__dict__.get("forward"), "forward", None)
        if isinstance(module, CompActLinear):
            found[name] = module, module.compact_input
        elif isinstance(of_policy, CompActForward) and isinstance(module, nn.Linear):
            found[name] = module, of_policy.shared
    return found


@eager_only("CompAct hands its gradient to weight.compressed_grad, outside of any graph")
def compact_linear(x: Tensor, weight: Tensor, bias: Tensor | None, shared: CompActInput) -> Tensor:
    """``x @ weight.T + bias``; the gradient of ``weight`` goes to ``weight.compressed_grad``.

    Saved: ``z``, ``rows * rank`` elements in the dtype of the product, once for all layers given ``x``; the
    weight by reference. Without gradients, or with a frozen weight, this is ``torch.nn.functional.linear``.

    Args:
        x: ``[..., n]``.
        weight: ``[m, n]``, a leaf.
        bias: ``[m]`` or None.
        shared: the projection of ``x``.

    Raises:
        LossyBackwardError: in backward, under ``create_graph=True``, or when the weight holds a compressed
            gradient in another basis.
    """
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return F.linear(x, weight, bias)
    cast = autocast_dtype(x)
    dtype = x.dtype if cast is None else cast
    with without_autocast(x):
        with torch.no_grad():
            shared.follow()
            z, factor = shared.project(x, dtype)
        low = _receiver(weight, shared)
        used = weight.detach() if cast is None else weight.detach().to(cast)
        bias = bias if bias is None or cast is None else bias.to(cast)
        result: Tensor = _CompAct.apply(x.to(dtype), used, bias, low, z, factor)  # type: ignore[no-untyped-call]
        return result


class _CompAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, z: Tensor, factor: float
    ) -> Tensor:
        ctx.factor, ctx.shape = factor, x.shape
        ctx.save_for_backward(z, weight if ctx.needs_input_grad[0] else None)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("CompAct")
        z, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        with without_autocast(grad):
            dx = None if weight is None else (rows @ weight).view(ctx.shape)
            db = rows.sum(0) if ctx.needs_input_grad[2] else None
            wide = torch.promote_types(z.dtype, torch.float32)
            low = (rows.t() @ z).to(wide).mul_(ctx.factor) if ctx.needs_input_grad[3] else None
        return dx, None, db, low, None, None


def _receiver(weight: Tensor, shared: CompActInput) -> Tensor:
    """A leaf without memory, of the shape of R: what autograd accumulates for it goes to ``weight``."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    leaf = torch.zeros((), dtype=wide, device=weight.device).expand(len(weight), shared.rank).requires_grad_()
    projection, stored, feed = shared.projection, shared.stored, shared.feed

    def receive(leaf: Tensor) -> None:
        low, leaf.grad = leaf.grad, None
        assert low is not None
        if feed is not None:
            feed.receive(weight, low, stored)
        else:
            add_compressed_grad(weight, low, projection, stored)

    leaf.register_post_accumulate_grad_hook(receive)  # type: ignore[no-untyped-call]
    return leaf


class CompActBases:
    """The bases of a model's CompAct layers, where no optimizer chooses them: new ones, and their state."""

    def __init__(self, layers: Mapping[str, nn.Linear], inputs: Mapping[str, CompActInput]) -> None:
        self._layers, self._inputs = layers, inputs

    @property
    def names(self) -> list[str]:
        """Of the treated layers."""
        return list(self._layers)

    def refresh(self, step: int) -> None:
        """New bases for all inputs, named by ``step``; every 50 to 200 optimizer steps in the paper.

        Raises:
            LossyBackwardError: compressed gradients are pending, or an optimizer chooses the bases.
        """
        self._refuse_fed("refresh()")
        if compressed_grads(layer.weight for layer in self._layers.values()):
            raise LossyBackwardError(
                "compressed gradients are pending in the present bases: step and clear them before a refresh"
            )
        for shared in self._inputs.values():
            shared.refresh(step)

    def state_dict(self) -> dict[str, Tensor]:
        """The words of each input's seed, by the name of its first layer. Raises LossyBackwardError where an
        optimizer chooses the bases."""
        self._refuse_fed("state_dict()")
        return {name: shared.stored["seed"].clone() for name, shared in self._inputs.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The bases that were saved.

        Raises:
            ValueError: the names are not those of this model's inputs.
            LossyBackwardError: an optimizer chooses the bases.
        """
        self._refuse_fed("load_state_dict()")
        if state.keys() != self._inputs.keys():
            raise ValueError(
                f"the saved seeds are of other layers: {sorted(state.keys() ^ self._inputs.keys())[:4]} are "
                "on one side only"
            )
        for name, shared in self._inputs.items():
            shared.stored = {"seed": state[name].clone()}

    def _refuse_fed(self, what: str) -> None:
        if any(shared.feed is not None for shared in self._inputs.values()):
            raise LossyBackwardError(
                f"{what} of bases that an optimizer chooses (feed_compact): its update_gap renews them, and "
                "its state_dict has them"
            )


def bases_of(model: nn.Module) -> CompActBases:
    """Those of a model that a policy has treated; ``apply_compact`` returns them itself."""
    layers = compact_layers(model)
    first: dict[int, str] = {}
    for name, (_, shared) in layers.items():
        first.setdefault(id(shared), name)
    inputs = {name: layers[name][1] for name in first.values()}
    return CompActBases({name: layer for name, (layer, _) in layers.items()}, inputs)


class CompActHandle(CompActBases):
    """What ``apply_compact`` changed, and the way back."""

    def undo(self) -> None:
        """Make the layers ``nn.Linear`` again. Pending compressed gradients stay. Twice is harmless."""
        for layer in self._layers.values():
            if isinstance(layer, CompActLinear):
                restore_class(layer, "compact_input", "compact_weight")


def apply_compact(
    model: nn.Module,
    *,
    density: float | None = DEFAULT_DENSITY,
    rank: int | None = None,
    kind: str = "rademacher",
    seed: int = 0,
    select: Select | None = None,
) -> CompActHandle:
    """Give linear layers of ``model`` CompAct's backward (which ones: ``linears.linears_of``).

    Args:
        density: rank over input features; or give ``rank`` (and density None).
        kind: ``rademacher`` or ``gaussian``.
        seed: of all bases.
        select: ``(name, layer) -> bool``.

    Raises:
        UnsupportedLinearError: a layer cannot be treated, or there is none.
        ValueError: density, rank (which must not exceed any layer's input features) or kind.
    """
    projection = Projection(kind=kind, rank=rank, density=density, side="right")  # type: ignore[arg-type]
    layers = linears_of(model, select)
    inputs: dict[str, CompActInput] = {}
    groups = input_groups(layers)
    for number, (first, *_) in enumerate(groups):
        inputs[first] = CompActInput(layers[first].in_features, projection, number=number, seed=seed)
    for first, *others in groups:
        for name in (first, *others):
            layer = layers[name]
            change_class(layer, CompActLinear, compact_input=inputs[first], compact_weight=(layer.weight,))
    return CompActHandle(layers, inputs)
