"""A model whose weights are on a tier from the start: it is never whole in memory.

    streamed = memtrain.streamed_model("models/llama-2-7b", dtype=torch.bfloat16, budget=budget)
    optimizer = torch.optim.AdamW(streamed.model.parameters())
    session = memtrain.prepare(streamed.model, optimizer, sample_batch, budget=budget)

Weights are read from safetensors files, or drawn: then they are what the plain constructor would have drawn
from the same state of the generator. On their way one weight at most is in memory (none, where it is read),
and two pieces of 8 MiB. Buffers, and weights of fewer than ``SMALL`` elements, are in memory as ever.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from memtrain.coding import WeightCoding, weight_codecs_for, weight_dtype
from memtrain.constructing import Blueprint
from memtrain.offload import away
from memtrain.offload.codec import Codec
from memtrain.offload.errors import OffloadError, TierFullError
from memtrain.offload.measure import measure_machine
from memtrain.offload.row_table import RowTable, as_rows, row_tables, table_of
from memtrain.offload.shards import SMALL, Unit
from memtrain.offload.store import Store
from memtrain.offload.stored_weights import StoredWeights, room_bytes
from memtrain.offload.tensorfile import Entry
from memtrain.offload.tiers import MemoryStore, NvmeStore
from memtrain.planner.actions import Tier
from memtrain.planner.machine import Budget
from memtrain.planner.tracing.blocks import BlocksNotFoundError, find_blocks
from memtrain.planner.weight_coding import is_faster
from memtrain.sparse_tables import tables_in, weight_bytes
from memtrain.tiling import AUTO, Cuts, automatic_tile_bytes, choose_cuts, cut
from memtrain.weight_folder import WeightFilesError, WeightFolder, match

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_KEY = "_memtrain_stored_weights"
Tables = Mapping[str, tuple[str, nn.Embedding]]
"""Embeddings that become tables by rows, with their paths, by the names of their weights."""


class StreamedModelError(OffloadError):
    """What would need all weights of a streamed model at once; the message names the remedy."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamedModel:
    """A model and where its weights are. A context manager.

    Attributes:
        model: its parameters have shapes, dtypes and gradients as ever; their values are on the tier.
        weights: the tier's part of it.
        unexpected: tensors of the files that the model has no use for.
        cuts: which layers are in tiles, and what should have been and cannot.
        tables: embeddings that are on the tier by rows, by the names of their weights.
    """

    model: nn.Module
    weights: StoredWeights
    unexpected: tuple[str, ...] = ()
    cuts: Cuts = field(default_factory=Cuts)

    @property
    def tables(self) -> dict[str, RowTable]:
        """Read from the model."""
        return row_tables(self.model)

    def close(self) -> None:
        """Give the tier back; the weights are gone. May be called twice."""
        with ExitStack() as undo:
            undo.callback(self.weights.close)
            for table in self.tables.values():
                undo.callback(table.close)

    def __enter__(self) -> StreamedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def streamed_model(
    source: str | Path | PretrainedConfig | Callable[[], nn.Module],
    *,
    budget: Budget,
    dtype: torch.dtype | None = None,
    weight_codecs: Mapping[str, str] | None = None,
    tile_bytes: int | str | None = AUTO,
    sparse_tables: bool = False,
) -> StreamedModel:
    """Construct a model and put its weights on a tier, one by one.

    Args:
        source: a folder with ``config.json`` and safetensors files; a configuration of a causal LM of
            transformers, whose weights are drawn from torch's generator; or any constructor, likewise.
        budget: its fastest tier beside the device that has room for all weights takes them.
        dtype: of the weights, for a folder or a configuration; None: the configuration's.
        weight_codecs: by tier how weights are coded there, such as ``{"nvme": "exponent"}``, exactly;
            ``auto`` where this machine's disk is slower than the codec. A session streams them as they lie.
        tile_bytes: the most that a window may have to hold at once. Layers of units that are larger become
            ``TiledLinear`` and ``TiledEmbedding``, whose tiles are streamed, differentiated and updated one
            after the other (``memtrain.tiling``). ``auto``: where the windows of the largest unit would take
            more than half of what the budget leaves, an eighth of that. None: every layer is whole.
        sparse_tables: the input embeddings become a table that is read and written by rows: give its weight,
            ``StreamedModel.tables``, to ``prepare(sparse_optimizer=...)`` and the others to the optimizer.
            Embeddings that a constructor makes with ``sparse=True`` do so in any case.

    Raises:
        StreamedModelError: ``dtype`` was given for a constructor; a codec for another tier than the weights
            go to, or ``auto`` for host memory.
        CodecError, MissingZstandardError: as ``prepare``.
        ConstructionError: the constructor does not allow it; says what and the remedy.
        WeightFilesError: the files and the model differ; lists what.
        TierFullError, TierIOError, SwapDirectoryError: the tier cannot serve.
        TilingError: a layer cannot be cut into tiles of that size; names it.
        BlocksNotFoundError: a size was given, and the model has no repeated blocks.
        SparseTableError: an embedding cannot be a table by rows.
    """
    if tile_bytes != AUTO and not (tile_bytes is None or (isinstance(tile_bytes, int) and tile_bytes > 0)):
        raise StreamedModelError(f"tile_bytes must be {AUTO!r}, None or bytes above 0, got {tile_bytes!r}")
    if isinstance(source, (str, Path)):
        return _read(Path(source), budget, dtype, weight_codecs, tile_bytes, sparse_tables)
    if not isinstance(source, nn.Module) and callable(source):
        if dtype is not None:
            raise StreamedModelError("dtype is the constructor's business: leave it out")
        return _drawn(source, budget, weight_codecs, tile_bytes, sparse_tables)
    return _drawn(_constructor(source, dtype), budget, weight_codecs, tile_bytes, sparse_tables)


def stored_weights(model: nn.Module) -> StoredWeights | None:
    """Where the weights of a streamed model are; None for any other model."""
    found: StoredWeights | None = model.__dict__.get(_KEY)
    return found


@torch.no_grad()
def bring_home(stored: StoredWeights, members: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Have weights in memory for good. Raises OffloadError where the tier fails."""
    for name, parameter in members:
        if name in stored.extents:
            away.put(parameter, stored.read(name))
            away.permit(parameter)
            stored.drop(name)
    stored.finish()


def traced_units(model: nn.Module, blocks: Sequence[tuple[str, nn.Module]]) -> list[Unit]:
    """Every parameter in a unit, as far as it can be told before the model has run: what its modules own
    before the first block is the prologue's, and behind it the epilogue's."""
    inside = {id(parameter) for _, block in blocks for parameter in block.parameters()}
    first = blocks[0][1]
    before: dict[int, tuple[str, nn.Parameter]] = {}
    after: dict[int, tuple[str, nn.Parameter]] = {}
    place = before
    for path, module in model.named_modules():
        if module is first:
            place = after
        for name, parameter in module.named_parameters(path, recurse=False):
            if id(parameter) not in inside and id(parameter) not in before:
                place.setdefault(id(parameter), (name, parameter))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    of_blocks: list[Unit] = [
        (name, [(names[id(parameter)], parameter) for parameter in block.parameters()])
        for name, block in blocks
    ]
    return [("prologue", list(before.values())), *of_blocks, ("epilogue", list(after.values()))]


def _cuts(model: nn.Module, budget: Budget, tile_bytes: int | str | None, tables: Tables) -> Cuts:
    if tile_bytes is None:
        return Cuts()
    try:
        units = [
            (unit, [(name, parameter) for name, parameter in members if name not in tables])
            for unit, members in traced_units(model, find_blocks(model))
        ]
    except BlocksNotFoundError:
        if tile_bytes == AUTO:
            return Cuts()
        raise
    if isinstance(tile_bytes, int):
        return choose_cuts(model, units, tile_bytes)
    size = automatic_tile_bytes(units, budget)
    if size is None:
        return Cuts()
    return dataclasses.replace(choose_cuts(model, units, size, required=False), automatic_bytes=size)


def _drawn(
    make: Callable[[], nn.Module],
    budget: Budget,
    codecs: Mapping[str, str] | None,
    tile_bytes: int | str | None,
    sparse_tables: bool,
) -> StreamedModel:
    blueprint = Blueprint(make)
    tables = tables_in(blueprint.model, of_inputs=sparse_tables)
    cuts = _cuts(blueprint.model, budget, tile_bytes, tables)
    cut(blueprint.model, cuts)
    with _on_a_tier(blueprint.model, budget, codecs, tables) as weights:
        small: dict[str, Tensor] = {}
        made: dict[str, RowTable] = {}

        def put(name: str, tensor: Tensor) -> None:
            if name in tables:
                made[name] = _table(tables[name][1], name, [tensor], weights)
                return
            start = 0
            for part, shape in cuts.parts(name, tensor.shape):
                values = tensor if shape == tensor.shape else tensor[start : start + shape[0]]
                start += shape[0] if shape else 0
                if values.numel() < SMALL:
                    small[part] = values.clone()
                else:
                    weights.put(part, values)

        model = blueprint.draw(put)
        _stand_in(model, tables, made)
        cut(model, cuts)
        _settle(model, weights, small)
    return StreamedModel(model=model, weights=weights, cuts=cuts)


def _read(
    folder: Path,
    budget: Budget,
    dtype: torch.dtype | None,
    codecs: Mapping[str, str] | None,
    tile_bytes: int | str | None,
    sparse_tables: bool,
) -> StreamedModel:
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
        wanted = [(name, p.dtype, tuple(p.shape)) for name, p in model.named_parameters()]
        tables = tables_in(model, of_inputs=sparse_tables)
        cuts = _cuts(model, budget, tile_bytes, tables)
        cut(model, cuts)
        with _on_a_tier(model, budget, codecs, tables) as weights:
            small: dict[str, Tensor] = {}
            made: dict[str, RowTable] = {}
            for name, kind, shape in wanted:
                if name in tables:
                    rows = as_rows(files.parts(found.sources[name]), shape[1])
                    made[name] = _table(tables[name][1], name, rows, weights)
                    continue
                elements = _Elements(files.parts(found.sources[name]))
                for part, part_shape in cuts.parts(name, shape):
                    values = elements.take(math.prod(part_shape))
                    if math.prod(part_shape) < SMALL:
                        small[part] = _joined(
                            [value.to(kind, copy=True) for value in values], part_shape, kind
                        )
                    else:
                        weights.put_parts(Entry(name=part, dtype=kind, shape=part_shape), values)
            for name, buffer in model.named_buffers():
                if name in found.sources:
                    parts = [part.to(buffer.dtype, copy=True) for part in files.parts(found.sources[name])]
                    buffer.copy_(_joined(parts, buffer.shape, buffer.dtype))
            _stand_in(model, tables, made)
            _settle(model, weights, small)
    return StreamedModel(model=model, weights=weights, unexpected=found.unexpected, cuts=cuts)


def _table(embedding: nn.Embedding, name: str, rows: Iterable[Tensor], weights: StoredWeights) -> RowTable:
    return RowTable(
        embedding.num_embeddings,
        embedding.embedding_dim,
        rows,
        store=weights.store,
        dtype=embedding.weight.dtype,
        padding_idx=embedding.padding_idx,
        name=name,
        trainable=embedding.weight.requires_grad,
    )


def _stand_in(model: nn.Module, tables: Tables, made: Mapping[str, RowTable]) -> None:
    """Put tables in the place of embeddings."""
    for name, table in made.items():
        parent, _, own = tables[name][0].rpartition(".")
        setattr(model.get_submodule(parent), own, table)


def _joined(parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.cat(list(parts)).view(tuple(shape)) if parts else torch.empty(tuple(shape), dtype=dtype)


class _Elements:
    """Elements that come in parts, each in the memory of the one before, taken in other portions."""

    def __init__(self, parts: Iterator[Tensor]) -> None:
        self._parts = parts
        self._rest: Tensor | None = None

    def take(self, count: int) -> Iterator[Tensor]:
        """The next ``count``, or what is left."""
        while count:
            if self._rest is None or not self._rest.numel():
                self._rest = next(self._parts, None)
            if self._rest is None:
                return
            portion, self._rest = self._rest[:count], self._rest[count:]
            count -= portion.numel()
            yield portion


def _constructor(config: Any, dtype: torch.dtype | None) -> Callable[[], nn.Module]:
    from transformers import AutoModelForCausalLM

    arguments = {} if dtype is None else {"dtype": dtype}

    def make() -> nn.Module:
        model: nn.Module = AutoModelForCausalLM.from_config(config, **arguments)  # type: ignore[no-untyped-call]
        return model

    return make


@contextmanager
def _on_a_tier(
    model: nn.Module, budget: Budget, codecs: Mapping[str, str] | None, tables: Tables
) -> Iterator[StoredWeights]:
    """A tier with room for the model's weights, for what happens inside to fill; closed if that fails."""
    entries = [
        Entry(name=name, dtype=parameter.dtype, shape=tuple(parameter.shape))
        for name, parameter in model.named_parameters()
        if parameter.numel() >= SMALL and name not in tables
    ]
    beside = sum(weight_bytes(e.weight.shape, e.weight.dtype) for _, e in tables.values())
    coding = weight_codecs_for(codecs or {}, budget)
    tier, codec = _tier_for(entries, budget, coding, beside)
    if codec is not None and tier in coding.optional and not _pays(tier, codec, budget, weight_dtype(model)):
        codec = None
    weights = StoredWeights(open_store(budget, tier), codec)
    with ExitStack() as undo:
        undo.callback(weights.close)
        yield weights
        weights.finish()
        undo.pop_all()


def _tier_for(
    entries: Sequence[Entry], budget: Budget, coding: WeightCoding, beside: int
) -> tuple[Tier, Codec | None]:
    """The fastest tier with room for ``entries`` and ``beside`` bytes, and the codec of the entries there.

    Raises:
        StreamedModelError: a codec for another tier than that.
        TierFullError: no tier has room.
    """
    room = {Tier.HOST: budget.host_bytes, Tier.CXL: budget.cxl_bytes, Tier.NVME: budget.nvme_bytes}
    needs = {tier: room_bytes(entries, coding.codecs.get(tier)) + beside for tier in room}
    tier = next((tier for tier, size in room.items() if size >= max(1, needs[tier])), None)
    if tier is None:
        nbytes = needs[Tier.NVME]
        given = ", ".join(f"{tier.value} {size} bytes" for tier, size in room.items() if size) or "none"
        raise TierFullError(
            f"the weights take {nbytes} bytes, and no tier beside the device has as much in the budget "
            f"({given}): give budget.nvme, or raise it, to at least {nbytes} bytes"
        )
    if other := [each.value for each in coding.codecs if each is not tier]:
        raise StreamedModelError(
            f"weight_codecs[{other[0]!r}]: the weights go to {tier.value}, the fastest tier of the budget "
            f"that has room: name {tier.value} instead, or give {tier.value} no bytes"
        )
    return tier, coding.codecs.get(tier)


def _pays(tier: Tier, codec: Codec, budget: Budget, dtype: torch.dtype) -> bool:
    """Whether weights come and go faster through ``codec``, as this machine was measured."""
    if tier is Tier.HOST:
        raise StreamedModelError(
            "weight_codecs['host'] is 'auto', and host memory beside a GPU is not measured before there is a "
            "session: leave it out, for it is faster than the codec, or name 'exponent'"
        )
    machine = measure_machine(
        budget.nvme_directory if tier is Tier.NVME else None,
        cxl=budget.cxl_place if tier is Tier.CXL else None,
        weight_codecs={tier: codec},
        weight_dtype=dtype,
    )
    return is_faster(machine.link(tier))


def open_store(budget: Budget, tier: Tier) -> Store:
    """All that the budget has of a tier: a session will put there what else belongs to the tier."""
    if tier is Tier.NVME:
        assert budget.nvme_directory is not None
        return NvmeStore(budget.nvme_directory, budget.nvme_bytes)
    if tier is Tier.CXL:
        return MemoryStore(tier, budget.cxl_bytes, budget.cxl_place)
    return MemoryStore(tier, budget.host_bytes, budget.host_place)


def _settle(model: nn.Module, weights: StoredWeights, small: Mapping[str, Tensor]) -> None:
    """Give small weights their values, and take from the others what is under them, and say so to whoever
    wants it."""
    tier = weights.store.tier.value
    for name, parameter in model.named_parameters():
        if name in small:
            parameter.data = small[name]
            continue
        if table_of(parameter) is not None:
            continue
        away.put(parameter, away.without_bytes(parameter))
        away.forbid(
            parameter,
            f"{name}, which are on {tier}: the weights of a streamed model are in memory in turn, while a "
            "session computes with them. Prepare the model first",
        )
    for module in model.modules():
        if any(away.is_away(parameter) for parameter in module.parameters()):
            module.register_state_dict_pre_hook(_refuse_state_dict)  # type: ignore[no-untyped-call]
    model.__dict__[_KEY] = weights


def _refuse_state_dict(module: nn.Module, *_: object) -> None:
    if any(away.is_away(parameter) for parameter in module.parameters()):
        raise StreamedModelError(
            f"state_dict() of {type(module).__name__}, whose weights are streamed, would need all of them in "
            "memory: use memtrain.offload.snapshot.save_checkpoint(), which writes the files of "
            "save_pretrained() one weight at a time, or hold one unit, session.weights.hold(name), and ask "
            "its modules"
        )
