"""What the tracer asks about the weights of a streamed model (``planner.tracing.weights``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from torch import Tensor, nn

from memtrain.offload.parameters import ParameterStreamer
from memtrain.planner.tracing.live_bytes import storage_id


class TracedWeights:
    """Weights that a streamer brings (``planner.tracing.weights.Weights``).

    Args:
        streamer: installed, and not reading ahead.
    """

    def __init__(self, streamer: ParameterStreamer) -> None:
        self._streamer = streamer

    @contextmanager
    def present(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """Their units are held."""
        units = {unit: None for p in parameters if (unit := self._streamer.unit_of(p)) is not None}
        with ExitStack() as held:
            for unit in units:
                held.enter_context(self._streamer.hold(unit))
            yield

    def present_in(self, module: nn.Module) -> AbstractContextManager[None]:
        """As ``present``, for all that the module has."""
        return self.present(module.parameters())

    def key(self, tensor: Tensor) -> int:
        """Of a streamed weight its identity: it has a storage only for a while."""
        if self._streamer.unit_of(tensor) is not None:
            return id(tensor)
        weight = self._streamer.weight_at(tensor)
        return storage_id(tensor) if weight is None else id(weight)

    def size_bytes(self, tensor: Tensor) -> int:
        """Of a streamed weight all its bytes, wherever they are."""
        if self._streamer.unit_of(tensor) is not None:
            return tensor.nbytes
        weight = self._streamer.weight_at(tensor)
        return tensor.untyped_storage().nbytes() if weight is None else weight.nbytes

    def stays(self, parameter: nn.Parameter) -> bool:
        """Whether no unit takes it along."""
        return self._streamer.unit_of(parameter) is None

    def memory_bytes(self) -> int:
        """Of the windows."""
        return self._streamer.fill_windows()
