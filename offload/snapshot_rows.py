"""Tables that are used by rows, and their optimizer's state, in checkpoints: some rows in memory at a time.

Weights are in the model's files under their names, as of any model. State is in files of its own,

    sparse_optimizer.json          groups, and counters by table
    sparse_optimizer.safetensors   its tensors, table/key

so that what reads the other optimizer's finds nothing that it does not know.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from memtrain.offload.atomic import FolderWriter
from memtrain.offload.errors import PlanMismatchError
from memtrain.offload.row_sparse import ReadRows, RowSparseOptimizer
from memtrain.offload.row_table import table_of
from memtrain.offload.snapshot_values import decode, encode
from memtrain.offload.snapshot_weights import raise_differences
from memtrain.offload.tensorfile import Entry, TensorFile, write_tensors

_DOCUMENT = "sparse_optimizer.json"
_TENSORS = "sparse_optimizer.safetensors"


def write_rows(writer: FolderWriter, optimizer: RowSparseOptimizer) -> None:
    """Write both files. Raises CheckpointError, OffloadError."""
    scalars = optimizer.scalar_state()
    entries = [entry for entry in _entries(optimizer) if entry.name.rpartition("/")[0] in scalars]
    document = {
        "optimizer": _kind(optimizer),
        "param_groups": [
            {
                key: encode(value, f"parameter group's {key}")
                for key, value in group.items()
                if key != "params"
            }
            for group in optimizer.param_groups
        ],
        "tables": [[_name(table) for table in group["params"]] for group in optimizer.param_groups],
        "scalars": {name: encode(values, f"state of {name}") for name, values in scalars.items()},
    }
    writer.write_text(_DOCUMENT, json.dumps(document, indent=1))
    with writer.create(_TENSORS) as file:
        write_tensors(file, entries, _parts(optimizer, entries))


class SavedRows:
    """The state of tables in a checkpoint, compared with a session's and not yet read."""

    def __init__(
        self, file: TensorFile | None, document: dict[str, Any], optimizer: RowSparseOptimizer | None
    ) -> None:
        self._file, self._document, self._optimizer = file, document, optimizer

    def load(self) -> None:
        """Replace the session's state. Raises OffloadError."""
        if self._optimizer is None:
            return
        assert self._file is not None
        scalars: dict[str, dict[str, Any]] = decode(self._document["scalars"])
        self._optimizer.load_rows({name: self._reader(name) for name in scalars}, scalars)
        for group, values in zip(self._optimizer.param_groups, self._document["param_groups"], strict=True):
            group.update({key: decode(value) for key, value in values.items()})

    def _reader(self, name: str) -> ReadRows:
        file = self._file
        assert file is not None

        def read(key: str, rows: slice) -> Tensor:
            entry = file.entries[f"{name}/{key}"]
            width = _row_elements(entry)
            flat = file.read_elements(entry.name, slice(rows.start * width, rows.stop * width))
            return flat.view(-1, *entry.shape[1:])

        return read


def refuse_other_tables(files: Iterable[str], optimizer: RowSparseOptimizer | None) -> None:
    """Raises PlanMismatchError where one of a checkpoint, of ``files``, and a session has tables."""
    there = _DOCUMENT in set(files)
    if there != (optimizer is not None):
        has, lacks = ("the checkpoint", "the session") if there else ("the session", "the checkpoint")
        raise PlanMismatchError(
            f"{has} has tables with a lazy optimizer (sparse_optimizer), {lacks} has none: prepare the model "
            f"{'with' if there else 'without'} a sparse_optimizer, as when the checkpoint was made"
        )


@contextmanager
def saved_rows(folder: Path, optimizer: RowSparseOptimizer | None) -> Iterator[SavedRows]:
    """``SavedRows`` of a folder, with its file open.

    Args:
        optimizer: of the session's tables; None where it has none.

    Raises:
        PlanMismatchError: the tables are others. Lists what differs.
    """
    if optimizer is None:
        yield SavedRows(None, {}, None)
        return
    document = json.loads((folder / _DOCUMENT).read_text())
    with TensorFile(folder / _TENSORS) as file:
        _check(document, file, optimizer)
        yield SavedRows(file, document, optimizer)


def _check(document: dict[str, Any], file: TensorFile, optimizer: RowSparseOptimizer) -> None:
    faults = []
    if document["optimizer"] != _kind(optimizer):
        faults.append(f"tables were stepped by {document['optimizer']}, here by {_kind(optimizer)}")
    here = [[_name(table) for table in group["params"]] for group in optimizer.param_groups]
    if document["tables"] != here:
        faults.append(f"its tables are {document['tables']}, here they are {here}")
    wanted = {e.name: e for e in _entries(optimizer) if e.name.rpartition("/")[0] in document["scalars"]}
    for name in sorted(wanted.keys() | file.entries.keys()):
        if wanted.get(name) != file.entries.get(name):
            faults.append(f"{file.entries.get(name, name)} in the checkpoint, here {wanted.get(name)}")
    raise_differences("the checkpoint's state of tables does not fit", faults)


def _kind(optimizer: RowSparseOptimizer) -> str:
    kind = type(optimizer.optimizer)
    return f"{kind.__module__}.{kind.__qualname__}"


def _name(weight: Tensor) -> str:
    table = table_of(weight)
    assert table is not None
    return table.name


def _entries(optimizer: RowSparseOptimizer) -> list[Entry]:
    return [
        Entry(name=f"{name}/{state.key}", dtype=state.dtype, shape=(records.rows, *records.row_shape))
        for name, records in optimizer.tables.items()
        for state in records.states
    ]


def _parts(optimizer: RowSparseOptimizer, entries: list[Entry]) -> Iterator[Tensor]:
    for entry in entries:
        name, _, key = entry.name.rpartition("/")
        yield from optimizer.state_parts(name, key)


def _row_elements(entry: Entry) -> int:
    count = 1
    for size in entry.shape[1:]:
        count *= size
    return count
