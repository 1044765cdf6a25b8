"""Layers that are too large for a window, cut into tiles that are streamed one after the other.

ZeRO-Infinity's memory-centric tiling (arXiv 2104.07857, section 5.1.3), as surgery on a model before its
weights are anywhere: in a unit (a block, or what stands before or after the blocks) with more bytes than a
tile may have, linear layers and embedding tables become ``TiledLinear`` and ``TiledEmbedding``, cut by rows.
The smallest weights stay together, as far as one tile's bytes hold them. So no window holds more than
``tile_bytes``.

A tile is a parameter to the optimizer and a unit to whatever moves bytes; a plan knows the unit that it is
part of, and how much of that is in memory at once. Checkpoints have the untiled names and shapes
(``offload.tiled_names``).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from memtrain.offload.errors import OffloadError
from memtrain.offload.shards import PIECE_ALIGNMENT, SMALL, Unit
from memtrain.offload.weight_units import window_bytes
from memtrain.offload.window_classes import FEWEST_SLOTS
from memtrain.optim.autograd.tiled_linear import Tile, Tiled, TiledEmbedding, TiledLinear
from memtrain.planner import resident
from memtrain.planner.machine import Budget
from memtrain.planner.plan import Plan
from memtrain.planner.units import MiB

AUTO = "auto"
_KEY = "_memtrain_cuts"
_ROWS = 64
"""Tiles begin at multiples of it: of whatever number of rows a matrix product works on at once."""
_WINDOWS_SHARE = 2
"""Windows of the largest unit may take one part in so many of what the budget leaves; the others are for
activations, gradients, staging and the update. Beyond it ``auto`` cuts."""
TILES_IN_FREE = 8
"""Tiles that would fill what the budget leaves: three windows are then three parts in eight."""


class TilingError(OffloadError):
    """A model cannot be cut into tiles of the size that was asked for; names the weight and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """What becomes tiles.

    Attributes:
        rows: of each tile, by the layer's name in the model.
        uncut: units that stay larger than a tile, and why.
        automatic_bytes: the size of tiles where nobody asked for it, but for the budget; None where
            somebody did.
    """

    rows: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    uncut: Mapping[str, str] = dataclasses.field(default_factory=dict)
    automatic_bytes: int | None = None

    def lines(self) -> list[str]:
        """What should have been cut and could not be, for people."""
        return [f"not in tiles: {why}" for why in self.uncut.values()]

    def parts(self, name: str, shape: Sequence[int]) -> list[tuple[str, tuple[int, ...]]]:
        """What a parameter becomes, name and shape by name and shape; itself where it is not cut."""
        path, _, own = name.rpartition(".")
        if path not in self.rows:
            return [(name, tuple(shape))]
        return [(f"{path}.tiles.{n}.{own}", (rows, *shape[1:])) for n, rows in enumerate(self.rows[path])]


def automatic_tile_bytes(units: Sequence[Unit], budget: Budget) -> int | None:
    """A size for tiles where the windows of the largest unit would take more than half of what the budget
    leaves on the device beside what the process holds now; None where they would not."""
    free = budget.device_bytes - resident.rss_bytes()
    largest = max((window_bytes(members) for _, members in units), default=0)
    if free <= 0 or FEWEST_SLOTS * largest * _WINDOWS_SHARE <= free:
        return None
    return max(MiB, free // TILES_IN_FREE // MiB * MiB)


def choose_cuts(model: nn.Module, units: Sequence[Unit], tile_bytes: int, *, required: bool = True) -> Cuts:
    """Cut what is needed for no unit, and no tile, to have more than ``tile_bytes`` in a window.

    Args:
        units: every parameter in one.
        required: False leaves a unit whole that cannot be cut so far.

    Raises:
        TilingError: a unit cannot be cut so far; names the weight.
    """
    names: Counter[int] = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    layers = {
        id(module.weight): (path, module) for path, module in model.named_modules() if _may_be_cut(module)
    }
    rows: dict[str, tuple[int, ...]] = {}
    uncut: dict[str, str] = {}
    for unit, members in units:
        if window_bytes(members) <= tile_bytes:
            continue
        try:
            rows.update(_cut_unit(unit, members, tile_bytes, layers, names))
        except TilingError as error:
            if required:
                raise
            uncut[unit] = str(error)
    return Cuts(rows=rows, uncut=uncut)


def _may_be_cut(module: nn.Module) -> bool:
    if type(module) is nn.Embedding:
        return not (module.max_norm or module.sparse or module.scale_grad_by_freq)
    return type(module) is nn.Linear and "forward" not in module.__dict__


def _cut_unit(
    unit: str,
    members: Sequence[tuple[str, nn.Parameter]],
    tile_bytes: int,
    layers: Mapping[int, tuple[str, nn.Module]],
    names: Mapping[int, int],
) -> Iterator[tuple[str, tuple[int, ...]]]:
    together = 0
    """Bytes of what stays in one piece."""
    open_: list[tuple[int, str, nn.Parameter]] = []
    for name, parameter in members:
        size = window_bytes([(name, parameter)])
        if id(parameter) in layers and names[id(parameter)] == 1:
            open_.append((size, layers[id(parameter)][0], parameter))
            continue
        together += size
        if together > tile_bytes:
            why = "is tied to another layer" if names[id(parameter)] > 1 else "is not of a plain nn.Linear"
            raise TilingError(
                f"{unit} cannot be cut into tiles of {tile_bytes} bytes: {name} of {size} bytes "
                f"{why}. Give larger tiles, untie the layers (tie_word_embeddings: false), or "
                "do without tiles (model.tile: off)"
            )
    for size, path, parameter in sorted(open_, key=lambda each: each[:2]):
        together += size
        if together > tile_bytes:
            together = tile_bytes  # nor does any larger one stay
            yield path, _rows(path, parameter, tile_bytes)


def _rows(path: str, weight: nn.Parameter, tile_bytes: int) -> tuple[int, ...]:
    """Of each tile: as few tiles as there may be, as equal as they may be. Each begins at a multiple of
    ``PIECE_ALIGNMENT`` elements, so that an elementwise optimizer's loops, and blocks of 8-bit state, fall as
    on the uncut weight; and each but the last has enough elements to leave memory."""
    rows, columns = weight.shape
    step = math.lcm(_ROWS, PIECE_ALIGNMENT // math.gcd(PIECE_ALIGNMENT, columns))
    step *= max(1, -(-SMALL // (step * columns)))
    row_bytes = columns * weight.dtype.itemsize
    most = tile_bytes // (step * row_bytes)  # in steps
    if rows * row_bytes <= tile_bytes:
        return (rows,)
    if not most:
        least = min(step, rows)
        raise TilingError(
            f"a tile of {path}.weight {list(weight.shape)} has at least {least} rows, {least * row_bytes} "
            f"bytes, and {tile_bytes} were asked for: give at least {least * row_bytes}, or do without tiles "
            "(model.tile: off)"
        )
    steps = -(-rows // step)
    count = -(-steps // most)
    cuts = [steps * number // count * step for number in range(count)]
    return tuple(b - a for a, b in zip(cuts, [*cuts[1:], rows], strict=True))


def cut(model: nn.Module, cuts: Cuts) -> None:
    """Put tiles in the place of layers, in the memory that these have."""
    for path, rows in cuts.rows.items():
        parent, _, name = path.rpartition(".")
        layer = model.get_submodule(path)
        made: nn.Module
        if isinstance(layer, nn.Embedding):
            made = TiledEmbedding(layer, rows)
        else:
            assert isinstance(layer, nn.Linear)
            made = TiledLinear.over(layer, rows)
        setattr(model.get_submodule(parent), name, made)
    if cuts.rows:
        model.__dict__[_KEY] = cuts


# -- a model with tiles --------------------------------------------------------------------------------------


def cuts_of(model: nn.Module) -> Cuts:
    """What ``cut`` has made tiles in ``model``; nothing in one that it has not seen."""
    cuts: Cuts = model.__dict__.get(_KEY, Cuts())
    return cuts


def tiles_of(model: nn.Module) -> list[Tile]:
    """All of them, in the order of modules."""
    return [module for module in model.modules() if isinstance(module, Tile)]


def windows_in_tiles(model: nn.Module) -> Callable[[Sequence[nn.Parameter]], list[int]] | None:
    """Of a unit's parameters what comes into a window by itself, in bytes: each tile, and all that is no
    tile; nothing of a unit that comes as a whole. None for a model without tiles."""
    of = {id(p): number for number, tile in enumerate(tiles_of(model)) for p in tile.parameters()}
    if not of:
        return None

    def pieces(parameters: Sequence[nn.Parameter]) -> list[int]:
        groups: dict[int | None, list[tuple[str, nn.Parameter]]] = {}
        for parameter in parameters:
            groups.setdefault(of.get(id(parameter)), []).append(("", parameter))
        return list(map(window_bytes, groups.values())) if len(groups) > 1 else []

    return pieces


def split_units(model: nn.Module, units: Sequence[Unit]) -> list[Unit]:
    """Every tile in a unit of its own, behind what its unit has beside tiles."""
    tile_names = {name: module for name, module in model.named_modules() if isinstance(module, Tile)}
    of = {id(p): name for name, tile in tile_names.items() for p in tile.parameters()}
    split: list[Unit] = []
    for unit, members in units:
        parts: dict[str, list[tuple[str, nn.Parameter]]] = {unit: []}
        for name, parameter in members:
            parts.setdefault(of.get(id(parameter), unit), []).append((name, parameter))
        split += list(parts.items())
    return split


def carried_out(plan: Plan, units: Sequence[Unit], split: Sequence[Unit]) -> Plan:
    """``plan`` for those who move the units: what is decided of one is decided of its tiles."""
    if len(split) == len(units):
        return plan
    states = {}
    for unit, members in units:
        states.update({id(parameter): plan.state(unit) for _, parameter in members})
    known = {unit for unit, _ in units}
    decided = [
        plan.state(unit) if unit in known else dataclasses.replace(states[id(members[0][1])], unit=unit)
        for unit, members in split
    ]
    return dataclasses.replace(plan, states=tuple(decided))


def tiling_lines(model: nn.Module) -> list[str]:
    """What was cut, for people; nothing for a model without tiles. Layers of one kind are one entry."""
    kinds: Counter[tuple[str, int, int]] = Counter()
    for path, module in model.named_modules():
        if isinstance(module, Tiled):
            largest = max(tile.weight.nbytes for tile in module.parts)
            kinds[re.sub(r"\.\d+\.", ".*.", path), len(module.parts), largest] += 1
    listed = [
        f"{path}{f' ({times} times)' if times > 1 else ''} in {count} of at most {size / MiB:.1f} MiB"
        for (path, count, size), times in kinds.items()
    ]
    return [f"weights in tiles, each in a window by itself: {', '.join(listed)}"] if listed else []
