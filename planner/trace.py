"""Measure a model: one real step, block by block, into a ``ModelProfile``.

Never more than one block's activations exist: the model runs once without gradients to see what each block
is given; then each block runs alone, forward and backward, on the output of the one before; and at last the
model runs with its blocks passing a known hidden state through, for what stands before and after them.

Bytes are counted, not estimated. *Saved* bytes are the storages that autograd packs; *peaks* come from a
dispatch mode that sees every storage born by an operator and, by weak reference, its death, and on a CPU what
a kernel takes for itself meanwhile. Both are exact and repeatable, unlike the resident memory of a process,
in which the allocator's habits are mixed. Blocks of one kind (class, configuration, shapes) are counted once
and timed each; the median of their times is used.

The resting state to which transients refer holds weights and saved tensors, so that a block's output, the
incoming gradient and, where it is not saved, the block's input are transients.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from memtrain.planner import resident
from memtrain.planner.bookkeeping import PARAMETER_OBJECT_BYTES, SHARD_OBJECT_BYTES
from memtrain.planner.profile import ModelProfile
from memtrain.planner.tracing.around_blocks import measure_around
from memtrain.planner.tracing.block_measures import measure_blocks
from memtrain.planner.tracing.blocks import find_blocks, first_pass
from memtrain.planner.tracing.kernel_bytes import hidden
from memtrain.planner.tracing.left_as_found import left_as_found
from memtrain.planner.tracing.live_bytes import tensors_in
from memtrain.planner.tracing.rehearsal import Rehearsal
from memtrain.planner.tracing.units import (
    KeepsHalf,
    KnownStates,
    WindowBytes,
    measure_optimizer,
    parameter_units,
)
from memtrain.planner.tracing.weights import InMemory, Weights, unique_bytes

_PAGE_BYTES = 4096


def profile_model(
    model: nn.Module,
    sample_batch: Any,
    *,
    optimizer: torch.optim.Optimizer,
    elementwise: bool,
    micro_batches: int = 1,
    master_weights: bool = False,
    keeps_half: KeepsHalf | None = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    block_names: Sequence[str] | None = None,
    rehearsal: Rehearsal | None = None,
    weights: Weights | None = None,
    window_bytes: WindowBytes | None = None,
    apart: Collection[nn.Parameter] = (),
) -> ModelProfile:
    """Measure one micro-batch of ``model`` and one step of its optimizer.

    Parameters, gradients, buffers, modes and random numbers are left as they were found, and hooks on
    parameters do not fire. An evaluating model is measured in training mode, and a Hugging Face model without
    its key-value cache, as it must be trained.

    Args:
        model: with its weights, on the device on which it will be trained.
        sample_batch: a mapping (``model(**batch)``), a tuple or list (``model(*batch)``) or one tensor.
        optimizer: over the model's parameters; a copy of its class is measured, it is not stepped.
        elementwise: a step on a parameter equals, bit for bit, steps on flat pieces of it, in every group.
        micro_batches: forward-backward passes per optimizer step.
        master_weights: the optimizer updates fp32 copies of lower-precision weights.
        keeps_half: of which large parameters with such a copy its lower half alone is kept; None: of none.
        loss_fn: ``loss_fn(output, batch)``; None: ``output.loss``, or the sum of a tensor output.
        block_names: as ``names`` of ``find_blocks``.
        rehearsal: what will carry the plan out; without it the profile allows no nearly free recompute and no
            token prefixes.
        weights: brings those that are not in memory; each block is measured with its own there.
        window_bytes: for a model with layers in tiles, what of some parameters, which are a unit's, would
            come by itself if they were streamed, each tile and all that is no tile; nothing: all together.
        apart: parameters in no unit and without bytes in memory: tables that are used by rows.

    Raises:
        BlocksNotFoundError: no blocks, or blocks that do not each run once, one after the other.
        TypeError: no loss can be had from the model's output.
        ValueError: the optimizer cannot be measured (it needs a closure, for example).
    """
    weights = weights or InMemory()
    blocks = find_blocks(model, block_names)
    if (reason := hidden()) and all(parameter.device.type == "cpu" for parameter in model.parameters()):
        warnings.warn(
            f"what torch's kernels take for themselves is not on the bill, because {reason}: measure and "
            "prepare outside of it, or leave the budget some room",
            stacklevel=2,
        )
    inside = {id(p) for _, block in blocks for p in block.parameters()}
    run = loss_runner(model, sample_batch, loss_fn)
    with left_as_found(model):
        trace = first_pass(model, blocks, run, weights)
        resident.trim()  # here and below: what one part has freed does not stand beside what the next needs
        profiles, last = measure_blocks(model, blocks, trace, rehearsal, weights)
        resident.trim()
        with weights.present(p for p in model.parameters() if id(p) not in inside):
            around = measure_around(blocks, trace, run, last)
        del last
        resident.trim()
        known = KnownStates.of(optimizer, master_weights)
        step = measure_optimizer(optimizer, master_weights, known, keeps_half)
        units = parameter_units(
            model,
            blocks,
            trace,
            step,
            known,
            whole=not elementwise,
            master_weights=master_weights,
            window_bytes=window_bytes,
            apart=apart,
        )
    beside = set(map(id, apart))
    parameters = [p for p in {id(p): p for p in model.parameters()}.values() if id(p) not in beside]
    baseline, slack = _baseline(parameters, model, optimizer, weights)
    trainable = [p for p in parameters if p.requires_grad]
    return ModelProfile(
        model=type(model).__name__,
        batch=", ".join(f"{list(t.shape)} {str(t.dtype)[len('torch.') :]}" for t in tensors_in(sample_batch)),
        blocks=tuple(profiles),
        units=tuple(units),
        micro_batches=micro_batches,
        baseline_bytes=baseline,
        allocator_slack_bytes=slack,
        parameter_object_bytes=PARAMETER_OBJECT_BYTES,
        shard_object_bytes=SHARD_OBJECT_BYTES,
        weight_bytes=unique_bytes([*parameters, *model.buffers()], weights),
        **around,
        update_workspace_bytes_per_element=step.workspace,
        state_bytes_per_element=step.state,
        state_tensors=step.tensors,
        gradient_bytes_per_element=max((float(p.element_size()) for p in trainable), default=0.0),
        largest_gradient_bytes=max((p.nbytes for p in trainable), default=0),
        elementwise=elementwise,
        largest_parameter_elements=max((p.numel() for p in trainable), default=0),
    )


def loss_runner(
    model: nn.Module, batch: Any, loss_fn: Callable[[Any, Any], Tensor] | None
) -> Callable[[], Tensor]:
    """What runs ``model`` on a batch and returns the loss, by the rules of ``profile_model``."""

    def run() -> Tensor:
        if isinstance(batch, Mapping):
            output = model(**batch)
        else:
            output = model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
        if loss_fn is not None:
            return loss_fn(output, batch)
        loss = getattr(output, "loss", None)
        if isinstance(loss, Tensor):
            return loss
        if isinstance(output, Tensor):
            return output.sum()
        raise TypeError(
            f"{type(model).__name__} returned {type(output).__name__} without a loss: put labels into the "
            "sample batch, or give loss_fn(output, batch)"
        )

    return run


def _baseline(
    parameters: list[nn.Parameter], model: nn.Module, optimizer: torch.optim.Optimizer, weights: Weights
) -> tuple[int, int]:
    """Resident bytes that are not tensors of the job, after a real step has loaded what it needs; and what
    the allocator keeps beyond them (CUDA).

    Weights that are memory-mapped are resident only once they were read, so every page of them is read
    first, and all their bytes can be subtracted.
    """
    gc.collect()
    present = [parameter for parameter in parameters if weights.stays(parameter)]
    tensors = [*present, *model.buffers(), *(p.grad for p in parameters)]
    tensors += tensors_in(list(optimizer.state.values()))
    if parameters[0].is_cuda:
        device = parameters[0].device
        torch.cuda.empty_cache()  # what profiling left in the allocator's cache, training uses again
        reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        free, total = torch.cuda.mem_get_info(device)
        return max(0, total - free - reserved), reserved - allocated
    for parameter in present:
        with torch.no_grad():
            parameter.detach().reshape(-1)[:: _PAGE_BYTES // parameter.element_size()].sum()
    # What the allocator holds back of freed memory is no slack: a session asks for it where it is needed.
    resident.trim()
    others = unique_bytes(tensors) + weights.memory_bytes()
    return max(0, resident.rss_bytes() - others), 0
