"""A streamed model while it is measured: every unit is brought when it is used and never before, so that what
is timed has its weights there, and nothing beside it is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

from torch import Tensor, nn

from memtrain.offload.away import is_away
from memtrain.offload.device import Device
from memtrain.offload.engine import Engine
from memtrain.offload.parameters import ParameterStreamer
from memtrain.offload.stored_weights import StoredWeights
from memtrain.planner.tracing import clock
from memtrain.planner.tracing.live_bytes import storage_id
from memtrain.streamed_models import traced_units
from memtrain.tiling import split_units, tiles_of

_WINDOWS_WITH_TILES = 3
"""What stands before and after the blocks is held together while it is measured, and a tile beside it."""


@contextmanager
def traced_weights(
    model: nn.Module, blocks: Sequence[tuple[str, nn.Module]], stored: StoredWeights, device: Device
) -> Iterator[TracedWeights]:
    """Inside, the weights can be brought, and are where they are a model runs within ``installed``. They are
    back on the tier, and ``stored``'s, at the end.

    Raises:
        OffloadError: no memory for the windows; the tier failed.
    """
    codecs = {} if stored.codec is None else {stored.store.tier: stored.codec}
    engine = Engine({stored.store.tier: stored.store}, device, weight_codecs=codecs, lent=[stored.store.tier])
    tiles = tiles_of(model)
    units = [  # what an earlier session has brought home for good stays there
        (unit, [(name, parameter) for name, parameter in members if name in stored.extents])
        for unit, members in split_units(model, traced_units(model, blocks))
    ]
    tiers = {name: stored.store.tier for name, _ in units}
    streamer = ParameterStreamer(
        model,
        blocks,
        units,
        tiers=tiers,
        engine=engine,
        slots=_WINDOWS_WITH_TILES if tiles else None,
        placed=stored.extents,
        tiles=tiles,
        reading=clock.stopped,
    )
    try:
        yield TracedWeights(streamer, tiles)
    finally:
        try:
            streamer.release()
        finally:
            engine.close()  # of the weights' codec; the store is lent


class TracedWeights:
    """Weights that a streamer brings (``planner.tracing.weights.Weights``)."""

    def __init__(self, streamer: ParameterStreamer, tiles: Sequence[nn.Module] = ()) -> None:
        self._streamer = streamer
        self._in_tiles = {id(parameter) for tile in tiles for parameter in tile.parameters()}

    def installed(self) -> AbstractContextManager[None]:
        """Inside, the model's modules have their weights brought."""
        return self._streamer.installed()

    @contextmanager
    def probing(self, head: nn.Module | None) -> Iterator[None]:
        """As ``installed``, with the weights of ``head`` there all the time."""
        with self.installed(), self.present([] if head is None else head.parameters()):
            yield

    @contextmanager
    def present(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Their units are held; but tiles come one by one, and no time passes meanwhile."""
        whole = (p for p in parameters if id(p) not in self._in_tiles)
        units = {unit: None for p in whole if (unit := self._streamer.unit_of(p)) is not None}
        with ExitStack() as held:
            for unit in units:
                held.enter_context(self._streamer.hold(unit))
            yield

    def present_in(self, module: nn.Module) -> AbstractContextManager[None]:
        """As ``present``, for all that the module has."""
        return self.present(module.parameters())

    def key(self, tensor: Tensor) -> int:
        """Of a streamed weight its identity: it has a storage only for a while."""
        if self._streamer.unit_of(tensor) is not None or is_away(tensor):
            return id(tensor)
        weight = self._streamer.weight_at(tensor)
        return storage_id(tensor) if weight is None else id(weight)

    def size_bytes(self, tensor: Tensor) -> int:
        """Of a streamed weight all its bytes, wherever they are."""
        if self._streamer.unit_of(tensor) is not None:
            return tensor.nbytes
        if is_away(tensor):  # a table by rows
            return 0
        weight = self._streamer.weight_at(tensor)
        return tensor.untyped_storage().nbytes() if weight is None else weight.nbytes

    def stays(self, parameter: nn.Parameter) -> bool:
        """Whether no unit takes it along."""
        return self._streamer.unit_of(parameter) is None

    def memory_bytes(self) -> int:
        """Of the windows."""
        return self._streamer.fill_windows()
