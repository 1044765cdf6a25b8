"""A model whose weights are on a tier from the start: constructed and filled without ever being whole in memory.

    streamed = memtrain.streamed_model("models/llama-2-7b", dtype=torch.bfloat16, budget=budget)
    optimizer = torch.optim.AdamW(streamed.model.parameters())
    session = memtrain.prepare(streamed.model, optimizer, sample_batch, budget=budget)

Weights are read from safetensors files, or drawn: then they are what the plain constructor would have drawn
from the same state of the generator. On their way one weight at most is in memory (none, where it is read),
and two pieces of 8 MiB. Buffers are made for real.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from memtrain.constructing import Blueprint
from memtrain.offload import away
from memtrain.offload.errors import OffloadError, TierFullError
from memtrain.offload.store import Store
from memtrain.offload.stored_weights import StoredWeights, room_bytes
from memtrain.offload.tensorfile import Entry
from memtrain.offload.tiers import MemoryStore, NvmeStore
from memtrain.planner.actions import Tier
from memtrain.planner.machine import Budget
from memtrain.weight_folder import WeightFilesError, WeightFolder, match

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Source = "str | Path | PretrainedConfig | Callable[[], nn.Module]"
_KEY = "_memtrain_stored_weights"


class StreamedModelError(OffloadError):
    """What needs all weights of a streamed model at once, or a tier for them; the message names the remedy."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamedModel:
    """A model and where its weights are. A context manager.

    Attributes:
        model: its parameters have shapes, dtypes and gradients as ever; their values are on the tier.
        weights: the tier's part of it.
        unexpected: tensors of the files that the model has no use for.
    """

    model: nn.Module
    weights: StoredWeights
    unexpected: tuple[str, ...] = ()

    def close(self) -> None:
        """Give the tier back; the weights are gone. May be called twice."""
        self.weights.close()

    def __enter__(self) -> StreamedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def streamed_model(
    source: str | Path | PretrainedConfig | Callable[[], nn.Module],
    *,
    budget: Budget,
    dtype: torch.dtype | None = None,
) -> StreamedModel:
    """Construct a model and put its weights on a tier, one by one.

    Args:
        source: a folder with ``config.json`` and safetensors files; a configuration of a causal LM of
            transformers, whose weights are drawn from torch's generator; or any constructor, likewise.
        budget: its fastest tier beside the device that has room for all weights takes them.
        dtype: of the weights, for a folder or a configuration; None: the configuration's.

    Raises:
        StreamedModelError: no tier of the budget has room, or ``dtype`` was given for a constructor.
        ConstructionError: the constructor does not allow it; says what and the remedy.
        WeightFilesError: the files and the model differ; lists what.
        TierFullError, TierIOError, SwapDirectoryError: the tier cannot serve.
    """
    if isinstance(source, (str, Path)):
        return _read(Path(source), budget, dtype)
    if not isinstance(source, nn.Module) and callable(source):
        if dtype is not None:
            raise StreamedModelError("dtype is the constructor's business: leave it out")
        return _drawn(source, budget)
    return _drawn(_constructor(source, dtype), budget)


def stored_weights(model: nn.Module) -> StoredWeights | None:
    """Where the weights of a streamed model are; None for any other model."""
    found: StoredWeights | None = model.__dict__.get(_KEY)
    return found


def _drawn(make: Callable[[], nn.Module], budget: Budget) -> StreamedModel:
    blueprint = Blueprint(make)
    with _on_a_tier(blueprint.model, budget) as weights:
        model = blueprint.draw(weights.put)
        _take_away(model, weights)
    return StreamedModel(model=model, weights=weights)


def _read(folder: Path, budget: Budget, dtype: torch.dtype | None) -> StreamedModel:
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise WeightFilesError(f"{folder} holds no config.json: give a folder that save_pretrained() made")
    config = AutoConfig.from_pretrained(folder)
    model = Blueprint(_constructor(config, dtype)).model
    if in_fp32 := getattr(model, "_keep_in_fp32_modules_strict", None):
        raise WeightFilesError(
            f"transformers keeps {', '.join(sorted(in_fp32))} of {type(model).__name__} in fp32 whatever the "
            "dtype: such models cannot be streamed; load it with from_pretrained()"
        )
    with WeightFolder(folder) as files:
        found = match(model, files)
        with _on_a_tier(model, budget) as weights:
            for name, parameter in model.named_parameters():
                entry = Entry(name=name, dtype=parameter.dtype, shape=tuple(parameter.shape))
                weights.put_parts(entry, files.parts(found.sources[name]))
            _fill_buffers(model, files, found.sources)
            _take_away(model, weights)
    return StreamedModel(model=model, weights=weights, unexpected=found.unexpected)


@torch.no_grad()
def _fill_buffers(model: nn.Module, files: WeightFolder, sources: dict[str, str]) -> None:
    for name, buffer in model.named_buffers():
        if name in sources:
            parts = [part.to(buffer.dtype, copy=True) for part in files.parts(sources[name])]
            buffer.copy_(torch.cat(parts).view(buffer.shape) if parts else buffer)


def _constructor(config: Any, dtype: torch.dtype | None) -> Callable[[], nn.Module]:
    from transformers import AutoModelForCausalLM

    arguments = {} if dtype is None else {"dtype": dtype}

    def make() -> nn.Module:
        model: nn.Module = AutoModelForCausalLM.from_config(config, **arguments)
        return model

    return make


@contextmanager
def _on_a_tier(model: nn.Module, budget: Budget) -> Any:
    """A store with room for the model's parameters, for what happens inside to fill; closed if that fails."""
    entries = [
        Entry(name=name, dtype=parameter.dtype, shape=tuple(parameter.shape))
        for name, parameter in model.named_parameters()
    ]
    weights = StoredWeights(_open_store(budget, room_bytes(entries)))
    with ExitStack() as undo:
        undo.callback(weights.close)
        yield weights
        weights.finish()
        undo.pop_all()


def _open_store(budget: Budget, nbytes: int) -> Store:
    room = {Tier.HOST: budget.host_bytes, Tier.CXL: budget.cxl_bytes, Tier.NVME: budget.nvme_bytes}
    tier = next((tier for tier, size in room.items() if size >= nbytes), None)
    if tier is None:
        given = ", ".join(f"{tier.value} {size} bytes" for tier, size in room.items() if size) or "none"
        raise TierFullError(
            f"the weights take {nbytes} bytes, and no tier beside the device has as much in the budget "
            f"({given}): give budget.nvme, or raise it, to at least {nbytes} bytes"
        )
    if tier is Tier.NVME:
        assert budget.nvme_directory is not None
        return NvmeStore(budget.nvme_directory, nbytes)
    return MemoryStore(tier, nbytes, budget.cxl_node if tier is Tier.CXL else None)


def _take_away(model: nn.Module, weights: StoredWeights) -> None:
    """Leave the parameters without values, and say so to whoever wants them."""
    for name, parameter in model.named_parameters():
        away.put(parameter, away.without_bytes(parameter))
        away.forbid(
            parameter,
            f"{name}, which is on {weights.store.tier.value}: weights of a streamed model are in memory while a "
            "session computes with them; save with memtrain's checkpoints",
        )
    for module in model.modules():
        module.register_state_dict_pre_hook(_refuse_state_dict)  # type: ignore[no-untyped-call]
    model.__dict__[_KEY] = weights


def _refuse_state_dict(module: nn.Module, *_: object) -> NoReturn:
    raise StreamedModelError(
        f"state_dict() of {type(module).__name__}, whose weights are streamed, would need all of them in "
        "memory: use memtrain.offload.snapshot.save_checkpoint(), which writes the files of "
        "save_pretrained() one weight at a time"
    )
