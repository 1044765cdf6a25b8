"""Which modules use which streamed units, and how many units that takes at one time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import Tensor, nn

from memtrain.offload.weight_units import StreamedUnit


class WeightUsers:
    """The modules of a model by what they use.

    Args:
        model: its root.
        blocks: in forward order.
        names: of all units, in forward order.
        units: those that are streamed.
        borrowed: names of units that are used behind the last block, whoever owns them.
        tiles: modules of which each is a unit that its own forward alone uses, wherever it stands.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        names: Sequence[str],
        units: Mapping[str, StreamedUnit],
        block_names: Sequence[str],
        borrowed: Collection[str] = (),
        tiles: Collection[nn.Module] = (),
    ) -> None:
        self._model = model
        self._blocks = set(blocks)
        self._tiles = set(tiles)
        self._units = units
        self._unit_of = {id(weight.parameter): unit for unit in units.values() for weight in unit.weights}
        inside = {child for block in blocks for child in block.modules()} - self._tiles
        alone = {unit.name for tile in self._tiles for unit in self.of(tile)}
        self._outside = [module for module in model.modules() if module not in inside]
        place = {name: number for number, name in enumerate(names)}
        last = max((place[name] for name in block_names if name in place), default=-1)
        self.after_blocks = [
            unit
            for unit in units.values()
            if unit.name not in alone
            and (place[unit.name] > last or unit.name in borrowed or self._is_shared(unit))
        ]
        """Units outside the blocks whose weights are used when the last block is done: those behind it, and
        those that tied modules share."""

    def unit_of(self, parameter: Tensor) -> StreamedUnit | None:
        """Of a streamed weight; None for any other tensor."""
        return self._unit_of.get(id(parameter))

    def of(self, module: nn.Module) -> list[StreamedUnit]:
        """What the module's forward uses: of a block everything in it but tiles, of others what they own
        themselves."""
        if module in self._blocks:
            own = [p for child in self._around_tiles(module) for p in child._parameters.values()]
        else:
            own = list(module._parameters.values())
        found = {unit.name: unit for p in own if (unit := self._unit_of.get(id(p))) is not None}
        return list(found.values())

    def outside_blocks(self) -> Iterator[tuple[nn.Module, list[StreamedUnit]]]:
        """Modules that use streamed weights, neither blocks, nor in one, nor the model itself."""
        for module in self._outside:
            if module is not self._model and (units := self.of(module)):
                yield module, units

    def together(self, among: Collection[str]) -> int:
        """Of the units with these names, how many must be in memory at one time."""
        return max(len(names.intersection(among)) for names in self._together())

    def _together(self) -> Iterator[set[str]]:
        def below(module: nn.Module, held: set[str]) -> Iterator[set[str]]:
            held = held | {unit.name for unit in self.of(module)}
            yield held
            inner = (
                self._tiles.intersection(module.modules()) if module in self._blocks else module.children()
            )
            for child in inner:
                if child is not module:
                    yield from below(child, held)

        yield {unit.name for unit in (*self.of(self._model), *self.after_blocks)}
        yield from below(self._model, set())

    def _around_tiles(self, block: nn.Module) -> Iterator[nn.Module]:
        return (module for module in block.modules() if module is block or module not in self._tiles)

    def _is_shared(self, unit: StreamedUnit) -> bool:
        weights = {id(weight.parameter) for weight in unit.weights}
        owned = [id(p) for module in self._outside for p in module._parameters.values()]
        return any(owned.count(weight) > 1 for weight in weights)
