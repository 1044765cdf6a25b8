"""Checkpoints of layers that are stored in tiles: the untiled layer's names and shapes, in the same bytes.

A tile is a run of rows, so the bytes of a whole weight are those of its tiles, one after another; and so it
is with state that has its parameter's shape, or runs through it in blocks. Files are therefore written tile
by tile, the tiles of one weight side by side, and their headers name the whole alone. To be read, a whole
tensor is cut where the tiles of the model begin, which need not be those of the model that wrote it.

A module says that its parameters are parts by a method ``untiled_parameters``: by name of the whole the names
of its parts, along the first dimension.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from memtrain.offload.atomic import CheckpointError
from memtrain.offload.tensorfile import Entry, TensorFile

ShapeOf = Callable[[str, str], Sequence[int] | None]
"""Of the state of a part, by its name and key; None where it is not known."""


class TiledNames:
    """Which parameters of a model are parts of what.

    Attributes:
        parts: by name of the whole, in order.
        whole_of: the other way round.
    """

    def __init__(self, model: nn.Module) -> None:
        named = dict(model.named_parameters())
        self.parts: dict[str, list[str]] = {}
        self.found = False
        for path, module in model.named_modules():
            if not callable(getattr(type(module), "untiled_parameters", None)):
                continue
            self.found = True
            wholes: dict[str, list[str]] = module.untiled_parameters()  # type: ignore[operator]
            for whole, own in wholes.items():
                names = [f"{path}.{name}" if path else name for name in own]
                if all(name in named for name in names):
                    self.parts[f"{path}.{whole}" if path else whole] = names
        self.whole_of = {part: whole for whole, parts in self.parts.items() for part in parts}
        self._order = {self.whole_of.get(name, name): place for place, name in enumerate(reversed(named))}
        """Of every parameter, or whole: the more, the earlier it stands in the model."""
        self._shapes = {part: tuple(named[part].shape) for part in self.whole_of}

    def shape(self, whole: str) -> tuple[int, ...]:
        """Of a whole parameter."""
        return _joined(self._shapes[part] for part in self.parts[whole])

    # -- writing -------------------------------------------------------------------------------

    def grouped(self, entries: Sequence[Entry]) -> list[Entry]:
        """Entries of parameters, ``name``, or of their state, ``name/key``: parts of one whole together,
        where the first of them stood, and marked as such. State is in the order of the model's parameters, as
        it is of an untiled model.

        Raises:
            CheckpointError: tensors of several parts that are not the parts of one.
        """
        if not self.parts:
            return list(entries)
        groups: dict[str, list[Entry]] = {}
        for entry in entries:
            name, slash, key = entry.name.partition("/")
            groups.setdefault(f"{self.whole_of.get(name, name)}{slash}{key}", []).append(entry)
        found: list[Entry] = []
        for whole in self._in_order(groups):
            members = groups[whole]
            if members[0].name.partition("/")[0] not in self.whole_of:
                found += members
                continue
            if len({(member.dtype, member.shape[1:], bool(member.shape)) for member in members}) > 1 or not (
                members[0].shape
            ):
                raise CheckpointError(
                    f"{whole} is kept by tiles of shapes {[list(m.shape) for m in members]}, which are not "
                    "parts of one tensor: use an optimizer whose state has its parameter's shape, or do "
                    "without tiles"
                )
            shape = _joined(member.shape for member in members)
            found += [dataclasses.replace(member, part_of=(whole, shape)) for member in members]
        return found

    def joined(self, names: Iterable[str]) -> list[str]:
        """Names of parameters with wholes in the place of parts."""
        return list(dict.fromkeys(self.whole_of.get(name, name) for name in names))

    def joined_values(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """By parameter what its parts agree on.

        Raises:
            CheckpointError: they do not.
        """
        found: dict[str, Any] = {}
        for name, value in values.items():
            whole = self.whole_of.get(name, name)
            if found.setdefault(whole, value) != value:
                raise CheckpointError(
                    f"the tiles of {whole} have {found[whole]} and {value}, one parameter has one of them: "
                    "update all tiles of a layer together"
                )
        return {name: found[name] for name in (self._in_order(found) if self.parts else found)}

    def _in_order(self, names: Iterable[str]) -> list[str]:
        """Where all are of parameters or their state: in the model's order."""
        every = list(names)
        owners = [name.partition("/")[0] for name in every]
        if not self._order.keys() >= set(owners):
            return every
        return sorted(every, key=lambda name: -self._order[name.partition("/")[0]])

    # -- reading -------------------------------------------------------------------------------

    def cut(self, file: TensorFile, shape_of: ShapeOf | None = None) -> None:
        """Let the wholes in ``file`` be read by parts. What does not have the parts' shape stays whole.

        Args:
            shape_of: of state; None: those of the parameters.
        """
        for entry in list(file.entries.values()):
            name, slash, key = entry.name.partition("/")
            if name not in self.parts:
                continue
            parts = []
            for part in self.parts[name]:
                shape = shape_of(part, key) if slash and shape_of is not None else self._shapes[part]
                parts.append(
                    Entry(
                        name=f"{part}{slash}{key}",
                        dtype=entry.dtype,
                        shape=tuple(self._shapes[part] if shape is None else shape),
                    )
                )
            if _joined(part.shape for part in parts) == entry.shape:
                file.cut(entry.name, parts)

    def split_document(self, document: dict[str, Any], groups: Sequence[Sequence[str]]) -> dict[str, Any]:
        """What ``optimizer.json`` says of wholes, said of their parts.

        Args:
            groups: the names in the optimizer's groups, whose order the parts have then.
        """
        if not self.parts:
            return document

        def spread(values: Mapping[str, Any]) -> dict[str, Any]:
            return {part: value for name, value in values.items() for part in self.parts.get(name, [name])}

        shapes = spread(document["shapes"])
        for name, shape in document["shapes"].items():
            if name in self.parts and self.shape(name) == tuple(shape):
                shapes.update({part: list(self._shapes[part]) for part in self.parts[name]})
        split = []
        for number, group in enumerate(document["param_groups"]):
            names = [part for name in group["params"] for part in self.parts.get(name, [name])]
            ours = list(groups[number]) if number < len(groups) else []
            split.append({**group, "params": ours if sorted(ours) == sorted(names) else names})
        upper = {
            part: weight
            for name, stored in document.get("upper_halves", {}).items()
            for part, weight in zip(
                self.parts.get(name, [name]), self.parts.get(stored, [stored]), strict=True
            )
        }
        return {
            **document,
            **({"upper_halves": upper} if upper else {}),
            "param_groups": split,
            "shapes": shapes,
            "scalars": spread(document["scalars"]),
        }


def _joined(shapes: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """Of tensors one behind the other."""
    every = [tuple(shape) for shape in shapes]
    return (sum(shape[0] if shape else 0 for shape in every), *every[0][1:])
