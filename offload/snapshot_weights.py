"""A model's weights as the safetensors files that ``from_pretrained`` reads, and back into a model in place.

Tensors that lie in the same memory are stored once; the other names are kept in the header, as
``safetensors.torch.save_model`` keeps them. Weights that are streamed are brought unit by unit.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from memtrain.offload.atomic import CheckpointError, FolderWriter
from memtrain.offload.errors import PlanMismatchError
from memtrain.offload.optimizer_state import Keeper
from memtrain.offload.row_table import as_rows, row_tables, table_of
from memtrain.offload.tensorfile import Entry, TensorFile, split, write_tensors
from memtrain.offload.tiled_names import TiledNames
from memtrain.offload.weight_units import StreamedWeight

SHARD_BYTES = 5_000_000_000
"""Of a weight file, as hubs like them."""
WEIGHT_INDEX = "model.safetensors.index.json"
_SHOWN = 8  # differences that a message lists
_TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.model",
    "*processor_config.json",
)


class StreamedWeights(Protocol):
    """What has the weights of a unit there: ``ParameterStreamer``."""

    keeper: Keeper | None
    """Who still needs what changed weights would overwrite on their tiers."""

    def unit_of(self, parameter: Tensor) -> str | None:
        """The unit of a streamed weight."""

    def hold(self, unit: str) -> AbstractContextManager[None]:
        """Its weights are there inside."""

    def mark_dirty(self, unit: str) -> None:
        """They have been changed."""

    def flush(self) -> None:
        """Every change is on its tier."""

    def extents(self) -> Mapping[StreamedWeight, tuple[Any, Any]]:
        """Store and extent of each."""


@dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """The files that a model's weights go to, and the tensors that belong there."""

    files: Mapping[str, Sequence[Entry]]
    """Entries by file name."""
    metadata: Mapping[str, Mapping[str, str]]
    """Of each file's header."""
    tensors: Mapping[str, Tensor]
    """The model's own, by entry."""
    index: str | None
    """``model.safetensors.index.json``, where there are several."""


def weight_files(model: nn.Module, weights: StreamedWeights | None = None) -> WeightFiles:
    """What ``write_weights`` writes: ``model.safetensors``, or several files with an index.

    Args:
        weights: what streams some of them: those are named here, and not brought.

    Raises:
        CheckpointError: the state dict holds what is no tensor.
    """
    tensors, aliases = _stored(model, weights)
    entries = TiledNames(model).grouped(
        [Entry(name=name, dtype=t.dtype, shape=tuple(t.shape)) for name, t in tensors.items()]
    )
    shards = split(entries, SHARD_BYTES) or [[]]
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{n:05d}-of-{len(shards):05d}.safetensors"
        for n in range(1, len(shards) + 1)
    ]
    metadata = {}
    for name, shard in zip(names, shards, strict=True):
        stored = {entry.name for entry in shard}
        tied = {alias: kept for alias, kept in aliases.items() if kept in stored}
        metadata[name] = {"format": "pt", **tied}
    index = {
        "metadata": {"total_size": sum(entry.size_bytes for entry in entries)},
        "weight_map": {e.stored_name: name for name, shard in zip(names, shards, strict=True) for e in shard},
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    return WeightFiles(
        files=dict(zip(names, shards, strict=True)),
        metadata=metadata,
        tensors=tensors,
        index=text if len(shards) > 1 else None,
    )


def write_weights(writer: FolderWriter, model: nn.Module, weights: StreamedWeights | None = None) -> None:
    """Write ``weight_files``.

    Args:
        weights: what streams some of them; they are brought one unit at a time.

    Raises:
        CheckpointError: the state dict holds what is no tensor.
    """
    plan = weight_files(model, weights)
    for name, entries in plan.files.items():
        with writer.create(name) as file:
            found = _values((plan.tensors[e.name] for e in entries), weights)
            write_tensors(file, entries, found, plan.metadata[name])
    if plan.index is not None:
        writer.write_text(WEIGHT_INDEX, plan.index)


class SmallFiles(Protocol):
    """What small files are written through: ``atomic.FolderWriter``, or what notes them down for one."""

    def write_text(self, name: str, text: str) -> None: ...
    def copy(self, source: Path) -> None: ...


def write_pretrained_files(writer: SmallFiles, model: nn.Module, source_folder: Path | None) -> None:
    """For a Hugging Face model: configuration, and the tokenizer's files as they lie in its source folder.

    The key-value cache, which training switches off, is on again in the configuration that is written.
    """
    if not hasattr(model, "config") or not hasattr(model, "save_pretrained"):
        return
    config: Any = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = next(model.parameters()).dtype
    if hasattr(config, "use_cache"):
        config.use_cache = True
    writer.write_text("config.json", config.to_json_string(use_diff=True))
    source = source_folder or Path(getattr(model, "name_or_path", "") or "")
    if source.parts and source.is_dir():
        wanted = {path for pattern in _TOKENIZER_FILES for path in source.glob(pattern) if path.is_file()}
        wanted |= {path for path in source.glob("generation_config.json") if path.is_file()}
        for path in sorted(wanted):
            writer.copy(path)
        if source / "generation_config.json" in wanted:
            return
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        writer.write_text("generation_config.json", generation.to_json_string(use_diff=True))


def present(tensors: Iterable[Tensor], weights: StreamedWeights | None) -> Iterator[Tensor]:
    """Each tensor while its values are there: until the next one is asked for. Units are changed as seldom as
    the order of the tensors allows."""
    held, unit = ExitStack(), None
    with held:
        for tensor in tensors:
            wanted = None if weights is None else weights.unit_of(tensor)
            if wanted is not None and wanted != unit:
                held.close()
                assert weights is not None
                held.enter_context(weights.hold(wanted))
                unit = wanted
            yield tensor


def _values(tensors: Iterable[Tensor], weights: StreamedWeights | None) -> Iterator[Tensor]:
    """As ``present``; of tables that are used by rows their rows, some at a time."""
    for tensor in present(tensors, weights):
        table = table_of(tensor)
        yield from [tensor] if table is None else table.parts()


def load_weights(paths: Iterable[Path], model: nn.Module, weights: StreamedWeights | None = None) -> None:
    """Copy the tensors of ``paths`` into the model's own, one chunk at a time.

    Args:
        weights: as of ``write_weights``.

    Raises:
        PlanMismatchError: lists names, dtypes and shapes that differ; the model is then as it was.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(TensorFile(path)) for path in paths]
        names = TiledNames(model)
        for file in files:
            names.cut(file)
        home = {name: file for file in files for name in file.entries}
        aliases = {
            alias: kept for file in files for alias, kept in file.metadata.items() if alias != "format"
        }
        work = _match(_groups(model, weights), model, home, aliases)
        for name, tensor in zip(work, present(work.values(), weights), strict=True):
            if (table := table_of(tensor)) is not None:
                table.load(as_rows(home[name].parts(name), table.embedding_dim))
                continue
            home[name].read_into(name, tensor)
            if weights is not None and (unit := weights.unit_of(tensor)) is not None:
                weights.mark_dirty(unit)


def _match(
    groups: list[tuple[list[str], Tensor]],
    model: nn.Module,
    home: dict[str, TensorFile],
    aliases: dict[str, str],
) -> dict[str, Tensor]:
    """Where each stored tensor belongs."""
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    work: dict[str, Tensor] = {}
    faults: list[str] = []
    for names, tensor in groups:
        stored = sorted({aliases.get(n, n) for n in names if aliases.get(n, n) in home})
        if not stored:
            faults += [f"{names[0]} is missing in the checkpoint"] if not ignored.issuperset(names) else []
        elif len(stored) > 1:
            faults.append(
                f"{' and '.join(names)} are one tensor here, {' and '.join(stored)} in the checkpoint"
            )
        else:
            here = Entry(name=stored[0], dtype=tensor.dtype, shape=tuple(tensor.shape))
            if stored[0] in work:
                faults.append(
                    f"{' and '.join(names)} were tied to another weight when the checkpoint was made"
                )
            elif home[stored[0]].entries[stored[0]] != here:
                faults.append(f"{home[stored[0]].entries[stored[0]]} in the checkpoint, here {here}")
            work[stored[0]] = tensor
    faults += [f"{name} is unknown to the model" for name in sorted(home.keys() - work.keys())]
    raise_differences("the checkpoint's weights do not fit the model", faults)
    return work


def raise_differences(what: str, faults: list[str]) -> None:
    """Raise PlanMismatchError with the first few of ``faults``, if there are any."""
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise PlanMismatchError(
            f"{what}: {'; '.join(faults[:_SHOWN])}{more}. Load a checkpoint of the same model and precision"
        )


def _stored(model: nn.Module, weights: StreamedWeights | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by the name that is stored, and that name by each other one.

    Of names that are tied, Hugging Face models say which are the copies.
    """
    copies = set(getattr(model, "all_tied_weights_keys", None) or ())
    ignored = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for names, tensor in _groups(model, weights):
        if ignored.issuperset(names):
            continue
        kept = next((name for name in names if name not in copies), names[0])
        tensors[kept] = tensor
        aliases.update({name: kept for name in names if name != kept})
    return tensors, aliases


def _groups(model: nn.Module, weights: StreamedWeights | None) -> list[tuple[list[str], Tensor]]:
    """The state dict's tensors, each with all names that it has."""
    groups: dict[Any, tuple[list[str], Tensor]] = {}
    if (
        weights is not None or TiledNames(model).found or row_tables(model)
    ):  # whose state dict has copies, joined
        for name, tensor in _saved_tensors(model):
            groups.setdefault(id(tensor), ([], tensor))[0].append(name)
        return list(groups.values())
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor) or value.is_meta:
            raise CheckpointError(
                f"{name} in the model's state dict is {'meta' if type(value) is Tensor else type(value)}: "
                f"only tensors with values can be checkpointed"
            )
        groups.setdefault(place_of(value) if value.numel() else name, ([], value))[0].append(name)
    return list(groups.values())


def place_of(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same bytes, seen in the same way; not for a part, or another view, of a
    tensor, which may begin at its address. Says nothing of empty ones, which have none."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def names_in_files(
    model: nn.Module, weights: StreamedWeights | None, parameters: Mapping[str, Tensor]
) -> dict[str, str]:
    """By name of ``parameters`` under which name ``weight_files`` stores it; those that are not stored are
    left out."""
    stored = weight_files(model, weights).tensors
    objects = {id(tensor): name for name, tensor in stored.items()}
    places = {} if weights is not None else {place_of(t): name for name, t in stored.items() if t.numel()}
    found = {}
    for name, parameter in parameters.items():
        key = objects.get(id(parameter))
        if key is None and weights is None and parameter.numel():
            key = places.get(place_of(parameter))
        if key is not None:
            found[name] = key
    return found


def _saved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What a state dict holds, in its order, of a model whose weights are not all in memory: tensors are the
    same where they are the same object, for without bytes they have no address."""
    for path, module in model.named_modules(remove_duplicate=False):
        buffers = {
            name: value
            for name, value in module._buffers.items()
            if name not in module._non_persistent_buffers_set
        }
        for name, tensor in (*module._parameters.items(), *buffers.items()):
            if tensor is not None:
                yield f"{path}.{name}" if path else name, tensor
