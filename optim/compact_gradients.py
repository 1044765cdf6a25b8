"""CompAct's small gradients, given to a low-rank optimizer that projects with the same signs.

    optimizer = GaLore(model.named_parameters(), rank=64, projection="rademacher", proj_type="right")
    gradients = SmallGradients(optimizer)
    apply_compact(model, density=None, rank=64, select=feedable(gradients))
    feed_compact(model, gradients)
    for batch in micro_batches:
        loss(batch).backward()
    gradients.clip_grad_norm_(1.0)
    optimizer.step()

GaLore projects the gradient, ``R = G P``; CompAct's backward makes ``R = g^T (x P)`` without ``G``. With one
``P`` for both these are the same number in another order of sums, so nothing needs to go up and down again:
what the layer makes is what the optimizer would have made of the whole gradient, and from there on it is a
projection like any other that ``SmallGradients`` accumulates, clips and unscales.

The optimizer chooses the basis: a layer asks for its seed in each forward pass, and the first one after a
step renews it where the schedule (``update_gap``) says so. Hence seeds are in ``optimizer.state_dict()``,
resuming is bit-equal, and no basis changes between the micro-batches of a step. The weights that read one
input share their seed and their schedule (``GridOptimizer.share_basis``), for they share ``x P``.

Refused by name, because it would be wrong: what needs the whole gradient (residuals of FRUGAL, Fira and
APOLLO; bases that follow from it; a left side), a stack of matrices, a weight that is used with two inputs,
updates in backward, sharded weights, more than one process.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from memtrain.optim.autograd.compact import CompActInput, compact_layers
from memtrain.optim.autograd.linears import Select
from memtrain.optim.cell import Cell, part
from memtrain.optim.compressed_grad import CompressedGradError, compressed_grads
from memtrain.optim.projection import Stored
from memtrain.optim.projection.matrix import RIGHT
from memtrain.optim.projection.random import SEED, RandomProjector
from memtrain.optim.small_gradients import SmallGradients

_UNBIASED = ("rademacher", "gaussian")


class FeedError(ValueError):
    """A weight's compressed gradient is not what its optimizer would project."""


def feedable(gradients: SmallGradients) -> Select:
    """For ``apply_compact(select=...)``: the layers whose weights the optimizer projects so that
    :func:`feed_compact` can serve them. Their ranks must still agree."""

    def select(name: str, layer: nn.Linear) -> bool:
        known = {p for group in gradients.optimizer.param_groups for p in group["params"]}
        return layer.weight in known and _why_not(gradients.optimizer.cell_of(layer.weight)) is None

    return select


def feed_compact(model: nn.Module, gradients: SmallGradients) -> CompActFeeds:
    """Let the optimizer of ``gradients`` choose the bases of the model's CompAct layers, and give it their
    gradients.

    Args:
        model: treated by ``apply_compact``, or by a policy with ``compact``.
        gradients: with ``update="step"``.

    Raises:
        FeedError: a weight's gradient cannot be taken; says which, why, and what to change.
        CompressedGradError: a weight holds a compressed gradient already.
    """
    layers = compact_layers(model)
    if not layers:
        raise FeedError(f"{type(model).__name__} has no CompAct layers: call apply_compact first")
    _check_gradients(gradients)
    if pending := compressed_grads(layer.weight for layer, _ in layers.values()):
        raise CompressedGradError(
            f"{len(pending)} weights hold compressed gradients: densify_grads or clear_compressed_grads first"
        )
    homes: dict[Tensor, CompActInput] = {}
    readers: dict[int, tuple[CompActInput, list[Tensor]]] = {}
    for name, (layer, shared) in layers.items():
        if not layer.weight.requires_grad:
            continue
        home = homes.setdefault(layer.weight, shared)
        if home is not shared:
            raise FeedError(
                f"{name} shares its weight with a layer that reads another input: one gradient would be in "
                "two bases. Leave both out of CompAct, or untie them"
            )
        _check_weight(name, layer.weight, shared, gradients)
        _, weights = readers.setdefault(id(shared), (shared, []))
        if all(weight is not layer.weight for weight in weights):
            weights.append(layer.weight)
    for _, weights in readers.values():
        try:
            gradients.optimizer.share_basis(weights)
        except ValueError as error:
            raise FeedError(f"{error} (they read one input, and CompAct projects it once)") from None
    for shared, weights in readers.values():
        shared.feed = _InputFeed(gradients, weights)
    return CompActFeeds([shared for shared, _ in readers.values()])


class CompActFeeds:
    """What ``feed_compact`` connected, and the way back."""

    def __init__(self, inputs: list[CompActInput]) -> None:
        self._inputs = inputs

    def remove(self) -> None:
        """From the next forward pass on the layers keep their last bases, and make ``compressed_grad``.
        Twice is harmless."""
        for shared in self._inputs:
            shared.feed = None


class _InputFeed:
    """Between the weights that read one input and their optimizer."""

    def __init__(self, gradients: SmallGradients, weights: list[Tensor]) -> None:
        self._gradients, self._weights = gradients, weights
        self._seen_step = -1

    @torch.no_grad()
    def words(self) -> tuple[int, ...]:
        """See :class:`CompActFeed`. The first call after a step renews the basis if it is time."""
        optimizer = self._gradients.optimizer
        places = [optimizer.situation(weight) for weight in self._weights]
        step = places[0][2].step
        if step != self._seen_step and not optimizer.pending:
            optimizer.replan()  # a scheduler may have changed update_gap
            places = [optimizer.situation(weight) for weight in self._weights]
            self._seen_step = step
        present = {_words(state) for _, state, _ in places}
        # Weights that came by different bases, as from a checkpoint without CompAct, are brought together.
        if len(present) > 1 or any(cell.is_due(state, turn) for cell, state, turn in places):
            for weight, (cell, state, turn) in zip(self._weights, places, strict=True):
                self._refuse_pending(weight)
                assert cell.projected is not None
                cell.projected.refresh.now_(part(state, "refresh"), turn.step)
                cell.refresh_if_due_(weight.detach(), state, turn)
        return _words(places[0][1])

    def receive(self, weight: Tensor, low: Tensor, stored: Stored) -> None:
        """See :class:`CompActFeed`.

        Raises:
            CompressedGradError: the basis has been renewed since the forward pass.
        """
        optimizer = self._gradients.optimizer
        _refuse_processes()
        if tuple(stored[SEED].tolist()) != _words(optimizer.state[weight]):
            raise CompressedGradError(
                f"{optimizer.name_of(weight)}: backward of a forward pass that ran before the last refresh, "
                "whose basis the optimizer has no more: run backward before step()"
            )
        self._gradients.add_low(weight, low)

    def _refuse_pending(self, weight: Tensor) -> None:
        pending = self._gradients.optimizer.pending.get(weight)
        if pending is not None and pending.low is not None:
            raise CompressedGradError(
                f"{self._gradients.optimizer.name_of(weight)} is to get a new basis while a gradient in the "
                "old one is pending: step() or zero_grad() first"
            )


def _words(state: dict[str, Tensor]) -> tuple[int, ...]:
    return tuple(part(state, "projector")[SEED].tolist())


def _check_gradients(gradients: SmallGradients) -> None:
    if gradients.update != "step":
        raise FeedError(
            f"SmallGradients(update={gradients.update!r}) updates parameters when their whole gradients "
            "arrive; compressed ones are small, and add up until step(): leave update at 'step'"
        )
    if gradients.reduced_later is not None:
        raise FeedError(
            "with share_projections DistributedDataParallel projects what its buckets hold, and compressed "
            "gradients never get there: leave CompAct or DistributedDataParallel out"
        )
    _refuse_processes()


def _refuse_processes() -> None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise FeedError(
            f"{dist.get_world_size()} processes: compressed gradients of CompAct are not summed over them. "
            "Use densify_grads before an all-reduce of your own, or train in one process"
        )


def _check_weight(name: str, weight: Tensor, shared: CompActInput, gradients: SmallGradients) -> None:
    optimizer = gradients.optimizer
    if not any(weight is p for group in optimizer.param_groups for p in group["params"]):
        raise FeedError(
            f"the weight of {name} is not in the optimizer: give it, or leave the layer out (select)"
        )
    cell = optimizer.cell_of(weight)
    if why := _why_not(cell):
        raise FeedError(
            f"{name}: {why}. apply_compact(select=feedable(gradients)) leaves such layers out; their "
            "gradients stay whole"
        )
    assert cell.projected is not None
    theirs, ours = cell.projected.projector, shared.bound_to(weight.shape)
    assert isinstance(theirs, RandomProjector)
    assert isinstance(ours, RandomProjector)
    for what, wanted, have in (
        ("kind", theirs.kind, ours.kind),
        ("rank", theirs.rank, ours.rank),
        ("basis in", theirs.basis_dtype, ours.basis_dtype),
    ):
        if wanted != have:
            raise FeedError(
                f"{name}: the optimizer projects with {what} {wanted}, CompAct with {have}: give both one"
            )


def _why_not(cell: Cell) -> str | None:
    """Why a compressed gradient is not what this cell projects; None: it is."""
    if not cell.is_whole:
        return "its weight is sharded, and each process would have another gradient"
    if cell.projected is None:
        return "the optimizer does not project it"
    projector, _, residual = cell.projected
    if residual.kind != "none":
        return f"residual {residual.kind!r} needs the whole gradient, which CompAct never makes"
    if not isinstance(projector, RandomProjector) or projector.kind not in _UNBIASED:
        return f"projection {projector.kind!r} is not one that CompAct has ({', '.join(_UNBIASED)})"
    if projector.sides != (RIGHT,):
        return (
            f"the optimizer shortens {' and '.join(projector.sides)} of it, CompAct its inputs: side='right'"
        )
    if projector.batch:
        return "it is a stack of matrices, each with a basis of its own"
    return None
