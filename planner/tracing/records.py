"""Turn what was recorded into the records of ``planner.estimate``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from memtrain.planner.estimate import (
    EstimatedUnit,
    Lifetime,
    LifetimeKind,
    SavedTensor,
    TensorClass,
    TracedPart,
)
from memtrain.planner.optimizer_bytes import ParameterSpec
from memtrain.planner.tracing.capture import Given
from memtrain.planner.tracing.classify import Places, saved_tensors, token_axis
from memtrain.planner.tracing.recorder import storage_key
from memtrain.planner.tracing.walk import Walk

_SAVED_KINDS = {LifetimeKind.TRANSIENT: LifetimeKind.SAVED}
"""An input or output that is saved keeps its kind; its lifetime names the saved tensor all the same."""


def part_record(
    name: str,
    fingerprint: str,
    of: Walk,
    rows: tuple[int, int],
    default: TensorClass,
    source: str,
    window: int | None,
) -> TracedPart:
    """One walk; ``rows`` are the batch's rows and the tokens in each."""
    recorder = of.recorder
    saved = saved_tensors(
        recorder,
        Places(classes=of.classes, norm_outputs=of.norm_outputs),
        forward_operations=of.forward_operations,
        batch=rows[0],
        sequence=rows[1],
        default=default,
        source=source,
    )
    return TracedPart(
        name=name,
        fingerprint=fingerprint,
        input_bytes=of.input_bytes,
        output_bytes=of.output_bytes,
        saved=saved,
        operations=tuple(recorder.operations),
        forward_operations=of.forward_operations,
        lifetimes=_lifetimes(of),
        attention_window=window,
    )


def _lifetimes(of: Walk) -> tuple[Lifetime, ...]:
    recorder = of.recorder
    end = len(recorder.operations)
    place = {serial: index for index, serial in enumerate(sorted(recorder.saved))}
    return tuple(
        Lifetime(
            start=storage.born,
            end=end if storage.died is None else storage.died,
            size_bytes=storage.size_bytes,
            kind=_SAVED_KINDS.get(storage.kind, storage.kind) if storage.serial in place else storage.kind,
            saved=place.get(storage.serial),
            epilogue_end=storage.died_behind,
        )
        for storage in recorder.storages
        if storage.size_bytes
    )


def shared_record(tensor: Tensor, rows: tuple[int, int]) -> SavedTensor:
    """What blocks share: a mask is square."""
    square = tuple(tensor.shape[-2:]) == (rows[1], rows[1])
    return SavedTensor(
        tensor_class=TensorClass.MASK if square else TensorClass.OTHER,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        size_bytes=tensor.untyped_storage().nbytes(),
        operator="",
        module="",
        token_axis=token_axis(tuple(tensor.shape), *rows),
        nearly_free=False,
    )


def attention_window(entry: Given) -> int | None:
    """Of the block's attention module, or else of its configuration, as transformers names it."""
    for module in entry.block.modules():
        if hasattr(module, "sliding_window"):
            window = module.sliding_window
            return window if isinstance(window, int) else None
    configs = (getattr(module, "config", None) for module in entry.block.modules())
    found = (getattr(config, "sliding_window", None) for config in configs)
    return next((window for window in found if isinstance(window, int)), None)


def unit_records(
    model: nn.Module, blocks: Sequence[tuple[str, nn.Module]], early: set[int]
) -> list[EstimatedUnit]:
    """Every parameter once, in the first unit that needs it; outside the blocks, as the prologue read it."""
    names = {id(p): name for name, p in model.named_parameters()}
    inside = {id(p) for _, block in blocks for p in block.parameters()}
    others = [p for p in model.parameters() if id(p) not in inside]
    members: list[tuple[str, int | None, list[nn.Parameter]]] = [
        ("prologue", None, [p for p in model.parameters() if storage_key(p) in early])
    ]
    members += [(name, index, list(block.parameters())) for index, (name, block) in enumerate(blocks)]
    members.append(("epilogue", None, others))
    taken: set[int] = set()
    units = []
    for name, index, parameters in members:
        own = [p for p in parameters if id(p) not in taken]
        taken.update(id(p) for p in own)
        specs = tuple(
            ParameterSpec(
                name=names[id(p)],
                shape=tuple(p.shape),
                dtype=str(p.dtype).removeprefix("torch."),
                element_bytes=p.element_size(),
                trainable=p.requires_grad,
            )
            for p in own
        )
        units.append(EstimatedUnit(name=name, block=index, parameters=specs))
    return units
