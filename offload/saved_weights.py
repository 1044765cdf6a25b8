"""What autograd saves of a streamed weight: a description instead of the tensor.

The hooks stand in front of those that were there before, an activation executor's, a checkpoint's or a
user's: what is no streamed weight is theirs, and where there are none, is kept as it is. The pack hook of a
block that is computed again has an attribute ``before_weights``: its second forward, which takes windows too,
comes before a weight is brought.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memtrain.offload.errors import SavedTensorModifiedError
from memtrain.offload.unmoved import Unmoved
from memtrain.offload.weight_units import StreamedUnit, StreamedWeight

_OWNER = "_memtrain_weights"  # attribute of our pack hook


@dataclass(eq=False, slots=True)
class SavedWeight:
    """A view of a streamed weight, without its bytes."""

    unit: StreamedUnit
    weight: StreamedWeight
    recall: Callable[[StreamedUnit, StreamedWeight], Tensor]
    """Has the weight's bytes there, and returns them in the weight's shape."""
    version: int
    start_bytes: int
    """From the weight's first byte."""
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    before: Callable[[int], None] | None
    """What has to be done first, given how often backward has asked for the weight."""
    walks: int = 0

    @classmethod
    def of(
        cls,
        tensor: Tensor,
        found: tuple[StreamedUnit, StreamedWeight],
        recall: Callable[[StreamedUnit, StreamedWeight], Tensor],
        before: Callable[[int], None] | None,
    ) -> SavedWeight:
        """Describe ``tensor``, whose bytes are those of the weight that was found."""
        unit, weight = found
        assert weight.present is not None
        start = tensor.data_ptr() - weight.present.data_ptr()
        like = tensor.dtype, tensor.shape, tensor.stride()
        return cls(unit, weight, recall, weight.version, start, *like, before)

    def get(self) -> Tensor:
        """The view as it was.

        Raises:
            SavedTensorModifiedError: the weight has been changed in place since.
            OffloadError: the tier failed, every window is in use, or the session is closed.
        """
        self.walks += 1
        if self.before is not None:
            self.before(self.walks)
        whole = self.recall(self.unit, self.weight)
        if self.weight.version != self.version:
            raise SavedTensorModifiedError(
                f"{self.weight.name}, which backward needs, was changed in place after forward had used it "
                f"(version {self.version}, now {self.weight.version}): call backward before the change"
            )
        start = whole.storage_offset() * whole.itemsize + self.start_bytes
        view = torch.empty(0, dtype=self.dtype, device=whole.device)
        view.set_(whole.untyped_storage(), start // self.dtype.itemsize, self.shape, self.stride)
        return view


@contextmanager
def saving_weights(
    owner: object,
    find: Callable[[int], tuple[StreamedUnit, StreamedWeight] | None],
    recall: Callable[[StreamedUnit, StreamedWeight], Tensor],
) -> Iterator[None]:
    """Inside, autograd saves descriptions of the weights that ``find`` knows by their address."""
    outer = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if outer is not None and getattr(outer[0], _OWNER, None) is owner:
        yield
        return
    before = getattr(outer[0], "before_weights", None) if outer is not None else None
    outer_pack, outer_unpack = outer if outer is not None else (Unmoved.of, Unmoved.get)

    def pack(tensor: Tensor) -> Any:
        if _is_plain(tensor) and (found := find(tensor.data_ptr())) is not None:
            return SavedWeight.of(tensor, found, recall, before)
        return outer_pack(tensor)

    def unpack(saved: Any) -> Tensor:
        return saved.get() if type(saved) is SavedWeight else outer_unpack(saved)

    setattr(pack, _OWNER, owner)
    pack.takes_weights = True  # type: ignore[attr-defined]  # optim/autograd/recomputed.py asks
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _is_plain(tensor: Tensor) -> bool:
    return (
        isinstance(tensor, Tensor)
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_meta
        and not tensor.is_conj()
        and not tensor.is_neg()
    )
