"""``ModelEstimate`` of a configuration or of an own module: no weights, no GPU, a few seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._pytree import tree_map_only

from memtrain.planner.estimate import EstimatedBlock, LifetimeKind, ModelEstimate, TensorClass, TracedPart
from memtrain.planner.tracing import fake_model, walk
from memtrain.planner.tracing.attention import GPU_KERNELS
from memtrain.planner.tracing.blocks import find_blocks
from memtrain.planner.tracing.capture import capture
from memtrain.planner.tracing.kernel_shapes import KernelShapes
from memtrain.planner.tracing.model_shape import expert_count
from memtrain.planner.tracing.recorder import storage_key, tensors_in
from memtrain.planner.tracing.records import attention_window, part_record, shared_record, unit_records
from memtrain.planner.tracing.walk import Walk

Forward = Callable[[nn.Module, Any], Tensor]
"""``forward(model, batch)``: the loss of one micro-batch."""


class UntraceableError(ValueError):
    """The model looks at values, and fake tensors have none."""


def estimate_config(
    source: str | Path | Mapping[str, Any] | Any,
    *,
    sequence: int,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    attention: str = "default",
    forward: Forward | None = None,
) -> ModelEstimate:
    """One micro-batch of the causal language model that a Hugging Face configuration describes.

    Args:
        source: as ``fake_model.read_config``: preset, folder, ``config.json``, its contents, or the object.
        sequence: tokens in a row.
        batch: rows.
        dtype: of parameters and activations.
        attention: traced (``fake_model.TRACED_ATTENTION``) or by formula (``attention.FORMULA_KERNELS``). By
            that of a GPU, dropout and layer norms too keep what they keep on one.
        forward: for another loss than the model's own, such as a chunked one.

    Raises:
        UnknownModelError: no such configuration.
        ValueError: a size below 1, an unknown attention kernel, or one that the model cannot use.
        UntraceableError: the model's operations depend on values.
    """
    if sequence < 1 or batch < 1:
        raise ValueError(f"batch and sequence must be >= 1, got {batch} and {sequence}")
    config = fake_model.read_config(source)
    assumptions = ["every row holds one sequence without padding"]
    if attention == "flash":
        assumptions.append("attention keeps to windows and caps scores inside its kernel, as flash-attn does")
    experts = expert_count(config)
    if experts:
        assumptions.append(
            f"each token goes to its share of {experts} experts and none is dropped (no "
            "capacity limit): bytes and FLOPs of a block are then the same however tokens are shared out"
        )
    return _estimate(
        lambda: fake_model.build(config, dtype, attention),
        lambda: fake_model.token_batch(batch, sequence),
        attention=attention,
        forward=forward or _loss,
        block_names=None,
        assumptions=assumptions,
    )


def estimate_module(
    factory: Callable[[], nn.Module],
    sample_batch: Any,
    *,
    attention: str = "default",
    forward: Forward | None = None,
    block_names: Sequence[str] | None = None,
) -> ModelEstimate:
    """One micro-batch of the module that ``factory`` makes; it is called where tensors need no memory.

    Args:
        factory: makes the model.
        sample_batch: a mapping (``model(**batch)``), a tuple or list (``model(*batch)``) or one tensor; its
            tensors' values are not looked at.
        attention: as in ``estimate_config``; other than ``default`` it changes every
            ``F.scaled_dot_product_attention``.
        forward: the loss; None: ``output.loss``, or the sum of a tensor output.
        block_names: as ``names`` of ``tracing.blocks.find_blocks``.

    Raises:
        BlocksNotFoundError: no blocks, or blocks that do not run once each, in order.
        TypeError: no loss can be had from the model's output.
        ValueError, UntraceableError: as ``estimate_config``.
    """
    return _estimate(
        factory,
        lambda: tree_map_only(
            Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype), sample_batch
        ),
        attention=attention,
        forward=forward or _loss,
        block_names=block_names,
        assumptions=[],
    )


def _estimate(
    factory: Callable[[], nn.Module],
    make_batch: Callable[[], Any],
    *,
    attention: str,
    forward: Forward,
    block_names: Sequence[str] | None,
    assumptions: list[str],
) -> ModelEstimate:
    shapes = KernelShapes(on_gpu=attention in GPU_KERNELS)
    with FakeTensorMode(), shapes, fake_model.attention_kernel(attention), torch.enable_grad():
        try:
            model, batch = factory().train(), make_batch()
            blocks = find_blocks(model, block_names)
            with fake_model.unpacked_rows():
                return _trace(model, batch, attention, forward, blocks, assumptions)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise UntraceableError(
                "the model's operations depend on the values of its tensors, as where experts are looped "
                f"over (their grouped products can be traced): {error}"
            ) from error


def _trace(
    model: nn.Module,
    batch: Any,
    attention: str,
    forward: Forward,
    blocks: list[tuple[str, nn.Module]],
    assumptions: list[str],
) -> ModelEstimate:
    outside = {storage_key(t) for t in (*model.parameters(), *model.buffers(), *tensors_in(batch))}

    def run() -> Tensor:
        return forward(model, batch)

    given, last = capture(blocks, run)
    prologue = walk.walk_prologue(model, blocks, run, last, outside)
    before, needs_gradient = prologue.walk, prologue.needs_gradient
    hidden = given[0].hidden()
    rows = (hidden.shape[0], hidden.shape[1]) if hidden.dim() > 2 else (1, hidden.shape[0])
    source = f"formula: {attention}"

    walks: dict[str, Walk] = {}
    classes: list[TracedPart] = []
    members: list[EstimatedBlock] = []
    shared: dict[int, Tensor] = {}
    chain = [before]
    for (name, block), entry, made_before in zip(blocks, given, prologue.given, strict=True):
        own = {storage_key(t): t for t in entry.shared() if storage_key(t) not in outside}
        # What is frozen up to here saves less: such a block is of another class.
        kind = entry.fingerprint if needs_gradient else f"{entry.fingerprint}, input without gradient"
        if kind not in walks:
            walks[kind] = walk.walk_block(entry, outside | own.keys(), needs_gradient)
            window = attention_window(entry)
            classes.append(part_record(name, kind, walks[kind], rows, TensorClass.OTHER, source, window))
        chain.append(walks[kind])
        members.append(EstimatedBlock(name=name, part=list(walks).index(kind)))
        saved = walks[kind].recorder.saved_excluded
        shared.update((key, tensor) for key, tensor in own.items() if key in saved)
        for tensor, storage in zip(entry.shared(), made_before, strict=True):
            if storage is not None and storage_key(tensor) in saved:
                storage.kind = LifetimeKind.SHARED
        needs_gradient = needs_gradient or any(p.requires_grad for p in block.parameters())
    after = walk.walk_epilogue(model, blocks, run, last, outside, needs_gradient, prologue.tied)
    chain.append(after)
    return ModelEstimate(
        model=type(model).__name__,
        batch=rows[0],
        sequence=rows[1],
        attention=attention,
        classes=tuple(classes),
        blocks=tuple(members),
        prologue=part_record("prologue", "prologue", before, rows, TensorClass.OTHER, source, None),
        epilogue=part_record("epilogue", "epilogue", after, rows, TensorClass.LOSS, source, None),
        shared=tuple(shared_record(tensor, rows) for tensor in shared.values()),
        units=tuple(unit_records(model, blocks, before.recorder.read_excluded)),
        buffer_bytes=sum({storage_key(b): b.untyped_storage().nbytes() for b in model.buffers()}.values()),
        repeated_bytes=sum(
            first.output_bytes
            for first, second in pairwise(chain)
            if first.output_is_saved and second.input_is_saved
        ),
        assumptions=tuple(assumptions),
        sources={
            "lifetimes": "fake trace",
            "operations": "fake trace",
            "flops": "torch.utils.flop_counter; attention kernels by its formula, without regard to masks",
            "units": "shapes",
        },
    )


def _loss(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        output = model(**batch)
    else:
        output = model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    loss = getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    if isinstance(output, Tensor):
        return output.sum()
    raise TypeError(f"{type(model).__name__} returned {type(output).__name__} without a loss: give forward")
