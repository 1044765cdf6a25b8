"""What stands around a model while ``prepare`` measures it: its weights, its loss, its blocks' forms."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn

from memtrain.forms import BlockForms
from memtrain.offload.device import Device
from memtrain.optim.autograd.causal_lm import ChunkedLossHandle, install_chunked_loss
from memtrain.planner.actions import EXACT
from memtrain.planner.decisions import PlannerOptions
from memtrain.refusals import PrepareError
from memtrain.streamed_models import stored_weights
from memtrain.streamed_tracing import TracedWeights, traced_weights


class PeakSinceNow:
    """The device's peak from here on, told apart from an older one, which is somebody else's."""

    def __init__(self, device: Device) -> None:
        self.before_bytes = device.peak_bytes()
        self._device, self._set_back = device, device.reset_peak()

    def known_bytes(self, libraries_bytes: int) -> int:
        """The peak, with what the device's own figure leaves out; 0 where an older and larger one could not
        be set back and hides it."""
        now_bytes = self._device.peak_bytes()
        known = self._set_back or now_bytes > self.before_bytes
        return now_bytes + libraries_bytes if known else 0


def weights_brought(
    model: nn.Module, blocks: Sequence[tuple[str, nn.Module]], device: Device
) -> AbstractContextManager[TracedWeights | None]:
    """For a streamed model, what brings its weights while it is measured."""
    stored = stored_weights(model)
    if stored is None or not stored.extents:
        return nullcontext()
    return traced_weights(model, blocks, stored, device)


def find_forms(
    model: nn.Module,
    blocks: Sequence[tuple[str, nn.Module]],
    sample_batch: Any,
    options: PlannerOptions,
    weights: TracedWeights | None,
) -> BlockForms:
    """The exact form always, lossy ones where the options name them. Raises PrepareError for a wrong name."""
    present = None if weights is None else weights.present_in
    try:
        return BlockForms(model, blocks, sample_batch, (EXACT, *options.allow_lossy), present=present)
    except ValueError as error:
        raise PrepareError(f"options.allow_lossy: {error}") from error


def install_loss(
    model: nn.Module, sample_batch: Any, weights: TracedWeights | None
) -> ChunkedLossHandle | None:
    """Only for a Hugging Face causal LM that computes its own loss from labels."""
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "config"):
        return None
    if not hasattr(sample_batch, "keys") or sample_batch.get("labels") is None:
        return None
    if weights is None:
        return install_chunked_loss(model)
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    return install_chunked_loss(model, probing=weights.probing(head))
