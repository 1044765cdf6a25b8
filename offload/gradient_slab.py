"""A permanent place for gradients that stay in memory, where device and host are the same memory.

Autograd allocates a gradient in the middle of a backward pass, between activations that die soon after,
and it lives until the update. In glibc's heap that leaves holes which nothing fills: the process grows far
beyond what is alive. So the first gradient of a parameter is copied into a slab and its own memory is free
again at once; later micro-batches are added in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from memtrain.offload.errors import PlanMismatchError
from memtrain.offload.overlaid_slab import OverlaidSlab
from memtrain.offload.shards import PAGE_BYTES, SMALL, FlatIndex
from memtrain.offload.slab import Slab
from memtrain.planner.actions import Tier
from memtrain.planner.units import round_up


class GradientSlab:
    """Moves the gradients of units whose tier is the device into one slab, as they are produced.

    A gradient that somebody still refers to when the next one arrives keeps its memory; the new one then
    stays where autograd put it. So do gradients with a graph (``create_graph=True``) and windows of a larger
    storage, such as views of a flat buffer that the user assigned.

    Args:
        index: the trainable parameters.
        tiers: gradient tier of each unit; the others are left alone, and so are small parameters.
        slab_bytes: what the plan reserved.
        before_overwrite: called with the unit before a gradient's bytes are replaced.
        overlaid: the memory, where it is shared with what blocks keep; None: a slab of its own.
        latest_first: all units, in the order in which backward comes to them; for shared memory.
        one_unit_at_a_time: a unit's gradients are used up before the next one's come, so that all units have
            the same place. Where one's are there still, the next one's stay where autograd put them.

    Raises:
        PlanMismatchError: the plan reserved less than the gradients take.
    """

    def __init__(
        self,
        *,
        index: FlatIndex,
        tiers: Mapping[str, Tier],
        slab_bytes: int,
        before_overwrite: Callable[[str], None],
        one_unit_at_a_time: bool = False,
        overlaid: OverlaidSlab | None = None,
        latest_first: Sequence[str] = (),
    ) -> None:
        self._shared = one_unit_at_a_time
        self._unit_of = index.unit_of
        self._before_overwrite = before_overwrite
        self._offsets: dict[str, int] = {}
        self._views: dict[str, StorageWeakRef] = {}
        used = end = 0
        unit = ""
        for name, parameter in index.parameters.items():
            if one_unit_at_a_time and index.unit_of[name] != unit:
                unit, end = index.unit_of[name], 0
            if tiers[index.unit_of[name]] is Tier.DEVICE and parameter.numel() >= SMALL:
                self._offsets[name] = end
                end += round_up(parameter.numel() * parameter.element_size(), PAGE_BYTES)
                used = max(used, end)
        if used > slab_bytes:
            raise PlanMismatchError(
                f"gradients that stay in memory take {used} bytes, the plan reserved {slab_bytes}: "
                f"plan again for this model"
            )
        self._taken: dict[str, Callable[[], bool]] = {}
        """By parameter whether its place is somebody else's now; where memory is shared."""
        if overlaid is not None:
            self._share(overlaid, index, latest_first)
            self._slab: Slab | None = overlaid.slab
        else:
            self._slab = Slab(used) if used else None
            if self._slab is not None:
                self._slab.populate()
        self._is_lent = overlaid is not None
        self._bytes = self._slab.buffer.numpy() if self._slab is not None else None
        self._hooks: list[Any] = [
            index.parameters[name].register_post_accumulate_grad_hook(self._hook(name, index.unit_of[name]))
            for name in self._offsets
        ]

    def _share(self, overlaid: OverlaidSlab, index: FlatIndex, latest_first: Sequence[str]) -> None:
        """Places from the high end of the slab down, unit by unit."""
        members: dict[str, list[str]] = {unit: [] for unit in latest_first}
        for name in self._offsets:
            members[index.unit_of[name]].append(name)
        low = overlaid.slab.nbytes
        for name in (name for names in members.values() for name in names):
            parameter = index.parameters[name]
            size = round_up(parameter.numel() * parameter.element_size(), PAGE_BYTES)
            low -= size
            self._offsets[name] = low
            self._taken[name] = overlaid.let(low, size, partial(self._is_there, name))

    def _is_there(self, name: str) -> bool:
        """Whether the place of a parameter's gradient is in use."""
        view = self._views.get(name)
        return view is not None and not view.expired()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Remove the hooks. Gradients that lie in the slab keep it until they die."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._bytes = None
        if self._slab is not None and not self._is_lent:
            self._slab.close()
        self._slab = None

    def _hook(self, name: str, unit: str) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def settle(parameter: Tensor) -> None:
            gradient = parameter.grad
            if gradient is None or type(gradient) is not Tensor or gradient.layout is not torch.strided:
                return
            if gradient.requires_grad or gradient.untyped_storage().nbytes() > gradient.nbytes:
                return  # its graph, or the buffer that it is a window of, is somebody's
            if self._shared and self._others_there(unit):
                return
            before = self._views.get(name)
            if before is not None and not before.expired():  # type: ignore[no-untyped-call]
                if gradient.untyped_storage()._cdata == before.cdata:
                    return
                self._before_overwrite(unit)  # an update that waits is what most likely holds it
                if not before.expired():  # type: ignore[no-untyped-call]
                    return
            if name in self._taken and self._taken[name]():
                return  # A graph that is held beyond its backward has its saved tensors there.
            parameter.grad = self._copy(name, gradient)

        return settle

    def _others_there(self, unit: str) -> bool:
        """Whether another unit's gradients are where the unit's are to go."""
        return any(
            self._unit_of[name] != unit and not view.expired()  # type: ignore[no-untyped-call]
            for name, view in self._views.items()
        )

    def _copy(self, name: str, gradient: Tensor) -> Tensor:
        assert self._bytes is not None
        view = torch.frombuffer(
            self._bytes, dtype=gradient.dtype, count=gradient.numel(), offset=self._offsets[name]
        ).view(gradient.shape)
        view.copy_(gradient)
        self._views[name] = StorageWeakRef(view.untyped_storage())  # type: ignore[no-untyped-call]
        return view
