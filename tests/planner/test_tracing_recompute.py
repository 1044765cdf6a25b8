"""What an estimate calls nearly free really is computed again, from nothing but what it names, bit by bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

pytest.importorskip("transformers")

from memtrain.planner.estimate import LifetimeKind, TensorClass, TracedPart
from memtrain.planner.tracing.estimator import estimate_config
from memtrain.planner.tracing.recorder import Recorder, storage_key, tensors_in
from tests.planner.tracing_models import CONFIGS, ROWS, TOKENS, real_model


@dataclass
class View:
    """Of a storage, by its serial number."""

    serial: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    def on(self, storages: dict[int, torch.UntypedStorage]) -> Tensor:
        return torch.empty(0, dtype=self.dtype).set_(
            storages[self.serial], self.offset, self.size, self.stride
        )


class Log(Recorder):
    """Holds on to every tensor, so that each operation can be done again."""

    def __init__(self, excluded: set[int]) -> None:
        super().__init__(excluded)
        self.steps: list[tuple[Any, Any, list[int]]] = []
        self.values: dict[int, torch.UntypedStorage] = {}

    def _note(self, func: Any, args: Any, kwargs: Any, *rest: Any) -> None:
        given = tree_map_only(Tensor, self._view, (args, kwargs))
        super()._note(func, args, kwargs, *rest)
        made = [self.find(tensor).serial for tensor in tensors_in(rest[-1])]
        self.values.update(zip(made, (t.untyped_storage() for t in tensors_in(rest[-1])), strict=True))
        self.steps.append((func, given, made))

    def _view(self, tensor: Tensor) -> Any:
        storage = self.find(tensor)
        if storage is None:  # a parameter, or given to all blocks
            return tensor
        return View(storage.serial, tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype)

    def again(self, serial: int, sources: set[int]) -> torch.UntypedStorage:
        """The storage computed anew; raises KeyError where more than ``sources`` is needed."""
        storages = {source: self.values[source].clone() for source in sources}
        for index in sorted(self._needed(serial, sources)):
            func, given, made = self.steps[index]
            args, kwargs = tree_map_only(View, lambda view: view.on(storages), given)
            out = tensors_in(func(*args, **kwargs))
            storages.update(zip(made, (tensor.untyped_storage() for tensor in out), strict=True))
        return storages[serial]

    def _needed(self, serial: int, sources: set[int]) -> set[int]:
        writers, pending = set[int](), [serial]
        while pending:
            for writer in set(self.storages[pending.pop()].writers) - writers:
                writers.add(writer)
                pending += [s for s in self.calls[writer].inputs if s not in sources]
        return writers


def run_block(block: nn.Module, args: Any, kwargs: Any) -> Log:
    """The block's forward on a clone of its input, as the tracer runs it."""
    hidden = args[0].detach().clone().requires_grad_().clone()
    parameters = {storage_key(t) for t in (*block.parameters(), *block.buffers())}
    shared = {storage_key(t) for t in tensors_in((args[1:], kwargs))}
    log = Log(parameters | shared)
    storage = log.adopt(hidden, LifetimeKind.INPUT)
    log.values[storage.serial] = hidden.untyped_storage()
    with log, log.saving():
        block(hidden, *args[1:], **kwargs)
    return log


def first_block(name: str, dtype: torch.dtype) -> tuple[Log, TracedPart]:
    """Its real run and its estimate."""
    model, batch = real_model(CONFIGS[name], dtype, "default")
    block = model.get_submodule("transformer.h.0" if name == "gpt2" else "model.layers.0")
    calls = []
    hook = block.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        model(**batch)
    hook.remove()
    (call,) = calls
    estimate = estimate_config(CONFIGS[name], sequence=TOKENS, batch=ROWS, dtype=dtype)
    return run_block(block, *call), estimate.classes[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["grouped", "mixed-windows", "experts", "gpt2"])
def test_nearly_free_tensors_follow_from_what_they_name(name: str, dtype: torch.dtype) -> None:
    log, part = first_block(name, dtype)
    serials = sorted(log.saved)
    assert [log.storages[s].operator for s in serials] == [tensor.operator for tensor in part.saved]
    again = 0
    for serial, tensor in zip(serials, part.saved, strict=True):
        if not tensor.nearly_free:
            continue
        sources = {serials[index] for index in tensor.recompute_from}
        if tensor.recompute_from_input:
            sources.add(0)
        computed = log.again(serial, sources)
        assert bytes_of(computed).equal(bytes_of(log.values[serial])), tensor
        again += tensor.size_bytes
    assert again == part.nearly_free_bytes > 0


def bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_without_one_of_them_it_does_not_follow(dtype: torch.dtype) -> None:
    """The test above can fail: the SwiGLU product needs both of the tensors that it names."""
    log, part = first_block("grouped", dtype)
    serials = sorted(log.saved)
    (index,) = (i for i, t in enumerate(part.saved) if t.tensor_class is TensorClass.MLP_PRODUCT)
    assert len(part.saved[index].recompute_from) == 2
    enough = {serials[i] for i in part.saved[index].recompute_from}
    for left_out in enough:
        with pytest.raises(KeyError):
            log.again(serials[index], enough - {left_out})
