"""Checkpoints: the weights as ``from_pretrained`` reads them, the optimizer's state beside them, and all that
a run needs to go on as if it had never stopped.

    model.safetensors config.json tokenizer.json ...   the model, for whoever wants it
    optimizer.json optimizer-00001-of-00004.safetensors   its groups and counters, its tensors by parameter
    rng.json progress.json                             random generators; the caller's position
    manifest.json                                      size and checksum of each file, written last

State is named by parameter and whole, whatever plan it was kept under: a checkpoint loads under another
budget, and, through ``load_optimizer_state``, into a plain optimizer. Where records hold the lower halves of
masters (``lower_halves``), so does the checkpoint, which is then of format 2 and says which of its weights
have the upper ones; whoever reads state here is given whole masters. State is written shard by shard, and
read tensor by tensor. Gradients are not kept: save between ``step`` and the next backward.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from memtrain.offload.atomic import CheckpointError, FolderWriter, is_complete, publish, verify
from memtrain.offload.lower_halves import LOWER_KEY
from memtrain.offload.optimizer import OffloadedOptimizer
from memtrain.offload.row_sparse import RowSparseOptimizer
from memtrain.offload.shards import MASTER_KEY
from memtrain.offload.snapshot_rows import refuse_other_tables, saved_rows, write_rows
from memtrain.offload.snapshot_state import WEIGHT_FILE, StateFiles
from memtrain.offload.snapshot_values import decode, encode, rng_state, set_rng_state
from memtrain.offload.snapshot_weights import (
    SmallFiles,
    StreamedWeights,
    load_weights,
    names_in_files,
    raise_differences,
    write_pretrained_files,
    write_weights,
)
from memtrain.offload.tensorfile import Entry, split, write_tensors
from memtrain.offload.tiled_names import TiledNames

FORMAT_VERSION = 3
"""The latest that is read here: of checkpoints with tables that are used by rows."""
HALVES_VERSION = 2
"""Of those with lower halves of masters."""
WHOLE_VERSION = 1
"""Of the others: earlier readers know it."""
OPTIMIZER_SHARD_BYTES = 512 << 20


class Session(Protocol):
    """What is saved: ``memtrain.Session``, or any three such. ``weights`` beside them is what streams the
    model's weights, where something does."""

    model: nn.Module
    optimizer: OffloadedOptimizer

    def flush(self) -> None: ...


def save_checkpoint(
    folder: Path | str, session: Session, *, progress: dict[str, Any], source_folder: Path | str | None = None
) -> Path:
    """Write ``folder``, whole or not at all; one that is there is replaced in one step.

    Args:
        progress: the caller's, anything that JSON holds; ``load_checkpoint`` gives it back.
        source_folder: where the tokenizer's files are; by default the folder that the model was loaded from.

    Raises:
        CheckpointError: no space, no permission, or something that cannot be stored. The previous checkpoint
        is
            untouched and the temporary files are removed.
        WeightsWrittenError: a weight was written since the update that left half of its master in a record.
    """
    folder = Path(folder)
    session.flush()
    session.optimizer.check_masters()
    source = Path(source_folder) if source_folder is not None else None
    with publish(folder) as writer:
        write_weights(writer, session.model, weights_of(session))
        write_small_files(writer, session, progress, source)  # first: it refuses what cannot be stored
        _write_state(writer, session)
        if (tables := tables_of(session)) is not None:
            write_rows(writer, tables)
    return folder


def load_checkpoint(folder: Path | str, session: Session) -> dict[str, Any]:
    """Put a checkpoint into a session of the same model, optimizer and precision, under any plan.

    Every file is compared with its checksum, and every name, dtype and shape with the session's, before
    anything is changed.

    Returns:
        The ``progress`` that was saved.

    Raises:
        CheckpointError: not a checkpoint, or of a later version.
        CorruptCheckpointError: names the files that are damaged.
        PlanMismatchError: lists what differs.
    """
    folder = Path(folder)
    session.flush()
    files = verify(folder)
    refuse_other_tables(files, tables_of(session))
    optimizer, names = session.optimizer, TiledNames(session.model)
    saved = _split(_read_optimizer(folder), names, optimizer, session.model)
    _check_groups(saved, optimizer, session.model)
    kept = _kept(optimizer)

    def shape(name: str, key: str) -> tuple[int, ...] | None:
        return kept[name, key].shape if (name, key) in kept else None

    with (
        StateFiles(folder, files, saved, lambda file: names.cut(file, shape)) as state,
        saved_rows(folder, tables_of(session)) as rows,
    ):
        _check_state(saved, state, optimizer, kept)
        optimizer.await_snapshot()
        load_weights(_weight_files(folder, files), session.model, weights_of(session))
        entries = ((name, key, (lambda n=name, k=key: state.read(n, k))) for name, key in state.homes)
        optimizer.load_state(entries, decode(saved["scalars"]))
        rows.load()
    _set_groups(optimizer, saved)
    set_rng_state(json.loads((folder / "rng.json").read_text()))
    progress: dict[str, Any] = json.loads((folder / "progress.json").read_text())
    return progress


@torch.no_grad()
def load_optimizer_state(folder: Path | str, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Put a checkpoint's optimizer state into a plain optimizer, in memory. The weights are
    ``from_pretrained``'s.

    Its parameters are matched by their place in the groups, and by name where they are the model's. With
    master weights, it must be an optimizer over fp32 parameters, copies of the model's or a model loaded in
    fp32: they become the masters.

    Raises:
        PlanMismatchError: other groups, names, shapes, or narrow parameters for fp32 masters.
    """
    folder = Path(folder)
    files = verify(folder)
    names = TiledNames(model)
    saved = _split(_read_optimizer(folder), names, optimizer, model)
    places = _check_groups(saved, optimizer, model)
    with StateFiles(folder, files, saved, names.cut) as state:
        faults = []
        for name, key in state.homes:
            entry, parameter = state.entry(name, key), places[name]
            if key == MASTER_KEY and (parameter.dtype, tuple(parameter.shape)) != (entry.dtype, entry.shape):
                faults.append(
                    f"{name} has {entry.dtype} master weights of shape {list(entry.shape)}, the optimizer's "
                    f"parameter is {parameter.dtype} {list(parameter.shape)}: give it fp32 copies"
                )
        raise_differences("the checkpoint's master weights do not fit the optimizer", faults)
        optimizer.state.clear()
        for name, key in state.homes:
            if key == MASTER_KEY:
                state.read_into(name, key, places[name])
            else:
                optimizer.state[places[name]][key] = state.read(name, key).to(places[name].device)
        for name, values in decode(saved["scalars"]).items():
            optimizer.state[places[name]].update(values)
    _set_groups(optimizer, saved)


def latest_checkpoint(directory: Path | str) -> Path | None:
    """The complete checkpoint in ``directory`` that was written last, or None. Incomplete ones are passed
    over."""
    folders = [path for path in Path(directory).glob("*") if path.is_dir() and is_complete(path)]
    return max(
        folders, key=lambda path: ((path / "manifest.json").stat().st_mtime_ns, path.name), default=None
    )


def weights_of(session: Session) -> StreamedWeights | None:
    """What streams the session's weights; None where all are in memory."""
    return getattr(session, "weights", None)


def tables_of(session: Session) -> RowSparseOptimizer | None:
    """What steps the session's tables by rows; None where it has none."""
    return getattr(session, "sparse_optimizer", None)


# -- the optimizer's files ---------------------------------------------------------------------------------


def write_small_files(
    writer: SmallFiles, session: Session, progress: dict[str, Any], source_folder: Path | None
) -> None:
    """All files of a checkpoint but those of weights and state, as the session is at this moment."""
    write_pretrained_files(writer, session.model, source_folder)
    writer.write_text("optimizer.json", json.dumps(_optimizer_document(session), indent=1))
    writer.write_text("rng.json", json.dumps(rng_state()))
    writer.write_text("progress.json", json.dumps(progress))


def state_files(session: Session) -> dict[str, list[Entry]]:
    """The files that the optimizer's state goes to, and which tensors go there, in ``stored_parts``'s
    order."""
    optimizer = session.optimizer
    optimizer.flush()
    entries = [
        Entry(name=f"{name}/{tensor.key}", dtype=tensor.dtype, shape=optimizer.records.shape(name, tensor))
        for name in optimizer.index.parameters
        for tensor in optimizer.records.stored(name)
    ]
    shards = split(TiledNames(session.model).grouped(entries), OPTIMIZER_SHARD_BYTES)
    return {
        f"optimizer-{number:05d}-of-{len(shards):05d}.safetensors": shard
        for number, shard in enumerate(shards, 1)
    }


def _write_state(writer: FolderWriter, session: Session) -> None:
    files = state_files(session)
    parts = _parts(session.optimizer, (entry for shard in files.values() for entry in shard))
    for name, shard in files.items():
        with writer.create(name) as file:
            write_tensors(file, shard, parts)


def _parameter_names(session: Session) -> dict[int, str]:
    """By ``id``: the optimizer's names, and for what it does not know the model's."""
    names = {id(parameter): name for name, parameter in session.model.named_parameters()}
    names.update({id(parameter): name for name, parameter in session.optimizer.index.parameters.items()})
    return names


def _optimizer_document(session: Session) -> dict[str, Any]:
    optimizer, names = session.optimizer, _parameter_names(session)
    tiled = TiledNames(session.model)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    groups = [
        {
            **{
                key: encode(value, f"parameter group's {key}")
                for key, value in group.items()
                if key != "params"
            },
            "params": tiled.joined(names[id(parameter)] for parameter in group["params"]),
        }
        for group in optimizer.param_groups
    ]
    kind = type(optimizer.optimizer)
    halves = _upper_halves(session)
    return {
        "format_version": FORMAT_VERSION
        if tables_of(session)
        else HALVES_VERSION
        if halves
        else WHOLE_VERSION,
        **({"upper_halves": halves} if halves else {}),
        "optimizer": f"{kind.__module__}.{kind.__qualname__}",
        "master_weights": optimizer.config.master_weights,
        "param_groups": groups,
        "shapes": {
            tiled.whole_of.get(name, name): list(
                tiled.shape(tiled.whole_of[name]) if name in tiled.whole_of else parameter.shape
            )
            for name, parameter in ((names[id(parameter)], parameter) for parameter in parameters)
        },
        "scalars": tiled.joined_values(
            {name: encode(values, f"state of {name}") for name, values in optimizer.scalar_state().items()}
        ),
    }


def _upper_halves(session: Session) -> dict[str, str]:
    """By parameter of which the lower half of the master is stored, the name of its weight in the model's
    files."""
    records, index = session.optimizer.records, session.optimizer.index
    halves = {
        name: parameter
        for name, parameter in index.parameters.items()
        if any(tensor.key == LOWER_KEY for tensor in records.stored(name))
    }
    if not halves:
        return {}
    if tiles := TiledNames(session.model).whole_of.keys() & halves.keys():
        raise CheckpointError(
            f"{min(tiles)} is a tile, and of its fp32 master the optimizer keeps the lower half only: pass "
            f"split_masters=False to OptimizerConfig"
        )
    found = names_in_files(session.model, weights_of(session), halves)
    if missing := halves.keys() - found.keys():
        raise CheckpointError(
            f"{min(missing)} is not in the model's state dict, and of its fp32 master the optimizer keeps "
            f"the lower half only: pass split_masters=False to prepare() or OptimizerConfig"
        )
    return found


def _parts(optimizer: OffloadedOptimizer, expected: Iterator[Entry]) -> Iterator[Tensor]:
    """The state's tensors in parts, in the order of the entries."""
    entries = list(expected)
    if any(entry.part_of for entry in entries):  # tiles of one parameter together: no order of records
        for entry in entries:
            name, _, key = entry.name.rpartition("/")
            yield optimizer.read_state(name, key)
        return
    expected, last = iter(entries), None
    for name, key, part in optimizer.stored_parts():
        if (name, key) != last:
            assert f"{name}/{key}" == next(expected).name
        last = name, key
        yield part


def _read_optimizer(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "optimizer.json").read_text())
    if document["format_version"] not in range(1, FORMAT_VERSION + 1):
        raise CheckpointError(
            f"{folder} has format {document['format_version']}, this memtrain reads 1 to {FORMAT_VERSION}: "
            f"use the version of memtrain that wrote it"
        )
    return document


def _split(
    document: dict[str, Any], names: TiledNames, optimizer: torch.optim.Optimizer, model: nn.Module
) -> dict[str, Any]:
    """What the checkpoint says of layers that are in tiles here, said of the tiles."""
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [[known.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups]
    return names.split_document(document, groups)


def _weight_files(folder: Path, files: dict[str, Any]) -> list[Path]:
    return [folder / name for name in sorted(files) if WEIGHT_FILE.fullmatch(name)]


def _check_groups(
    saved: dict[str, Any], optimizer: torch.optim.Optimizer, model: nn.Module
) -> dict[str, Tensor]:
    """The optimizer's parameters by the checkpoint's names, or PlanMismatchError."""
    theirs, ours = saved["param_groups"], optimizer.param_groups
    kind = type(optimizer.optimizer if isinstance(optimizer, OffloadedOptimizer) else optimizer)
    faults = []
    if saved["optimizer"] != (here := f"{kind.__module__}.{kind.__qualname__}"):
        faults.append(f"it was made with {saved['optimizer']}, this is {here}")
    sizes = [[len(group["params"]) for group in groups] for groups in (theirs, ours)]
    if sizes[0] != sizes[1]:
        raise_differences(
            "the checkpoint's optimizer differs",
            [*faults, f"its parameter groups have {sizes[0]} parameters, these {sizes[1]}"],
        )
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    places = {}
    for old, new in zip(theirs, ours, strict=True):
        for name, parameter in zip(old["params"], new["params"], strict=True):
            places[name] = parameter
            known, shape = names.get(id(parameter), [name]), saved["shapes"][name]
            if name not in known or shape != list(parameter.shape):
                faults.append(f"{name} {shape} in the checkpoint, here {known[0]} {list(parameter.shape)}")
    raise_differences("the checkpoint's optimizer differs", faults)
    return places


def _kept(optimizer: OffloadedOptimizer) -> dict[tuple[str, str], Entry]:
    """The state's tensors that the optimizer keeps, by parameter and key."""
    specs, parameters = optimizer.layout.specs, optimizer.index.parameters
    return {
        (name, tensor.key): Entry(
            name=f"{name}/{tensor.key}",
            dtype=tensor.dtype,
            shape=tensor.shape_for(tuple(parameters[name].shape)),
        )
        for name, spec in specs.items()
        for tensor in spec.tensors
    }


def _check_state(
    saved: dict[str, Any],
    state: StateFiles,
    optimizer: OffloadedOptimizer,
    kept: dict[tuple[str, str], Entry],
) -> None:
    """Compare the state's tensors with ``kept``."""
    specs = optimizer.layout.specs
    begun = {name for name, _ in state.homes} | saved["scalars"].keys()
    wanted = {place for place in kept if place[0] in begun}
    found = state.homes
    faults = [f"{kept[place]} is missing in the checkpoint" for place in sorted(wanted.difference(found))]
    for place in found:
        entry = state.entry(*place)
        if place not in kept:
            faults.append(f"{entry} is not kept here")
        elif kept[place] != entry:
            faults.append(f"{entry} in the checkpoint, here {kept[place]}")
    for name, values in saved["scalars"].items():
        if name not in specs or values.keys() != specs[name].scalars:
            faults.append(f"{name} has the numbers {sorted(values)}, which differ here")
    raise_differences("the checkpoint's optimizer state does not fit", faults)


def _set_groups(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    for group, values in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({key: decode(value) for key, value in values.items() if key != "params"})
