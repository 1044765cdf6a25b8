"""What is streamed of a model: units, their weights, and where the bytes are.

Loaders that put weights on a tier before there is a streamer use ``own_parameters`` and ``allocate_weight``:
what is streamed of a unit, and how it lies there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from memtrain.offload import away
from memtrain.offload.coded import CodedExtent, CodedStore
from memtrain.offload.device import Event
from memtrain.offload.errors import OffloadError, PlanMismatchError
from memtrain.offload.extents import Extent
from memtrain.offload.gradient_home import Ticket
from memtrain.offload.shards import SMALL, Unit
from memtrain.offload.slab import PAGE_BYTES
from memtrain.offload.store import Store
from memtrain.planner.actions import Tier
from memtrain.planner.units import round_up


@dataclass(kw_only=True, eq=False, repr=False, slots=True)
class StreamedWeight:
    """One parameter of a streamed unit."""

    name: str
    parameter: nn.Parameter
    extent: Extent | CodedExtent
    """Of the latest generation: at home, or in a spare that a snapshot has brought it to."""
    start: int
    """Of its bytes in the unit's window: a whole page."""
    where: str
    """What is said of it to whom uses it while it is away."""
    empty: Tensor = field(default_factory=lambda: torch.empty(0))
    """Its data while it is away."""
    present: Tensor | None = None
    """Its data while its unit has a window."""
    saved_version: int | None = None
    """Version of the parameter whose bytes are on the tier; None: none, or not known to be there."""

    @property
    def span(self) -> slice:
        """Its bytes in the window."""
        return slice(self.start, self.start + self.extent.nbytes)

    @property
    def version(self) -> int:
        """Counts changes in place, whoever makes them."""
        return self.parameter._version

    @property
    def dirty(self) -> bool:
        """Whether the tier has other bytes than the window."""
        return self.saved_version != self.version

    def free(self, store: Store) -> None:
        """Give the room on the tier back, wherever it is by then."""
        store.free(self.extent)


@dataclass(kw_only=True, eq=False, repr=False, slots=True)
class StreamedUnit:
    """A unit whose weights live on a tier."""

    name: str
    store: Any
    """A ``Store``, or a ``CodedStore``."""
    weights: list[StreamedWeight]
    window_bytes: int = 0
    """Of each of the windows that it takes turns in."""
    window: Window | None = None
    ready: bool = False
    """The parameters' data are views of the window."""
    reads: list[Ticket] = field(default_factory=list)
    writes: list[tuple[StreamedWeight, int | None, Ticket]] = field(default_factory=list)
    """Under way: what is written, and the version that it has; None where that is not known."""
    users: int = 0
    """Who uses the weights right now."""
    touched: int = 0
    """When it was last used, in touches."""
    references: list[tuple[torch.UntypedStorage, int]] = field(default_factory=list)
    """The storages of the views, and how often each is referred to when nobody else does."""

    @property
    def nbytes(self) -> int:
        """Of the window that it needs: whole pages for each parameter."""
        last = self.weights[-1]
        return round_up(last.start + max(last.extent.nbytes, 1), PAGE_BYTES)

    @property
    def tier(self) -> Tier:
        """Where its weights live."""
        tier: Tier = self.store.tier
        return tier

    @property
    def dirty(self) -> bool:
        """Whether something of it must be written before it leaves."""
        return self.ready and any(weight.dirty for weight in self.weights)

    @property
    def viewed(self) -> bool:
        """Whether somebody beside the parameters refers to the window's memory."""
        return any(references(storage) > own for storage, own in self.references)


@dataclass(kw_only=True, eq=False, repr=False, slots=True)
class Window:
    """Memory for one unit."""

    number: int
    buffer: Tensor
    """Where the arithmetic is, uint8."""
    host: Tensor
    """What the tier reads and writes: the same, where the device shares the host's memory."""
    unit: StreamedUnit | None = None
    arrivals: list[Event] | None = None
    """Copies from host to buffer, once they are queued."""
    lingering: list[Ticket] = field(default_factory=list)
    """Transfers of units that have left, which had not ended when the tier stalled: nobody gets the window
    before they have."""

    def finish_copies(self) -> None:
        """Return when the device has left the host's part."""
        for copy in self.arrivals or ():
            copy.synchronize()
        self.arrivals = None

    def await_lingering(self) -> None:
        """Return when no transfer of a unit that has left uses the window. Raises TierIOError where the tier
        stalls still."""
        for ticket in self.lingering:
            try:
                ticket.wait()
            except OffloadError:  # what became of it was told before
                if not ticket.done():
                    raise
        self.lingering.clear()


def is_streamed(parameter: nn.Parameter) -> bool:
    """Whether a parameter leaves memory with its unit: smaller ones stay."""
    return parameter.numel() >= SMALL


def own_parameters(units: Sequence[Unit]) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """What of each unit leaves memory with it: a tied parameter with the first unit that names it."""
    seen: set[int] = set()
    own: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for unit, members in units:
        own[unit] = []
        for name, parameter in members:
            if id(parameter) not in seen and is_streamed(parameter):
                own[unit].append((name, parameter))
            seen.add(id(parameter))
    return own


def window_bytes(members: Iterable[tuple[str, nn.Parameter]]) -> int:
    """Of the window of a unit with these parameters, and of their extents: whole pages for each of those that
    are streamed."""
    return sum(
        round_up(parameter.numel() * parameter.dtype.itemsize, PAGE_BYTES)
        for _, parameter in members
        if is_streamed(parameter)
    )


def allocate_weight(store: Store | CodedStore, name: str, parameter: nn.Parameter) -> Any:
    """The extent of a parameter's bytes on a tier. Raises TierFullError."""
    return store.allocate(
        f"weight {name}",
        parameter.numel() * parameter.dtype.itemsize,
        dtype=str(parameter.dtype),
        shape=tuple(parameter.shape),
    )


def make_unit(
    name: str,
    members: Sequence[tuple[str, nn.Parameter]],
    store: Store | CodedStore,
    placed: Mapping[str, Extent | CodedExtent],
    undo: ExitStack,
) -> StreamedUnit:
    """A unit with an extent for each parameter.

    Args:
        members: what of it is streamed.
        placed: extents that exist already, with the bytes in them.
        undo: frees the extents that are made here.

    Raises:
        PlanMismatchError: a parameter cannot be streamed, or is there already and coded otherwise.
        TierFullError: no room for it.
    """
    known = [parameter_name in placed for parameter_name, _ in members]
    if any(known) and not all(known):
        raise PlanMismatchError(
            f"of unit {name} some parameters are on {store.tier.value} already, and "
            f"{members[known.index(False)][0]} is not: place all of a unit that are streamed, or none"
        )
    for parameter_name, _ in members if any(known) else ():
        _refuse_other_codec(name, store, placed[parameter_name])
    weights: list[StreamedWeight] = []
    start = 0
    for parameter_name, parameter in members:
        _refuse_unfit(parameter_name, parameter, parameter_name in placed)
        extent = placed.get(parameter_name)
        fresh = extent is None
        if extent is None:
            extent = allocate_weight(store, parameter_name, parameter)
        weight = StreamedWeight(
            name=parameter_name,
            parameter=parameter,
            extent=extent,
            start=start,
            where=_where(name, store.tier, parameter_name),
        )
        if fresh:
            undo.callback(weight.free, store)
        weights.append(weight)
        start += round_up(max(extent.nbytes, 1), PAGE_BYTES)
    return StreamedUnit(name=name, store=store, weights=weights)


def references(storage: torch.UntypedStorage) -> int:
    """How often a storage is referred to, by tensors and by Python."""
    count: int = torch._C._storage_Use_Count(storage._cdata)
    return count


def _refuse_other_codec(unit: str, store: Store | CodedStore, extent: Extent | CodedExtent) -> None:
    lies = extent.codec if isinstance(extent, CodedExtent) else None
    asked = store.codec.name if isinstance(store, CodedStore) else None
    if lies != asked:
        how, remedy = ("as they are", "without a codec")
        if lies is not None:
            how, remedy = f"coded ({lies})", f"with codec {lies}"
        raise PlanMismatchError(
            f"the weights of unit {unit} are on {store.tier.value} already, {how}: stream them {remedy} (it "
            f"is {asked or 'none'}), or load the model into memory first"
        )


def _where(unit: str, tier: Tier, name: str) -> str:
    return (
        f"{name}, which are on {tier.value}: they are in memory while a module of unit {unit} runs its "
        f"forward. To use them elsewhere, hold the unit: with streamer.hold({unit!r}): ..."
    )


def _refuse_unfit(name: str, parameter: nn.Parameter, placed: bool) -> None:
    if away.is_away(parameter) and not placed:
        raise PlanMismatchError(f"{name} is streamed already: remove or close what streams it first")
    if not away.is_away(parameter) and type(parameter) is not nn.Parameter:
        raise PlanMismatchError(
            f"{name} is a {type(parameter).__name__}, and only a plain nn.Parameter can be streamed: let its "
            "unit stay on the device"
        )
    if not parameter.is_contiguous() or parameter.layout is not torch.strided:
        raise PlanMismatchError(
            f"{name} is not contiguous (shape {tuple(parameter.shape)}, strides {parameter.stride()}) and "
            "has no one run of bytes to stream: replace its data by parameter.data.contiguous()"
        )
    if parameter.is_meta and not placed:
        raise PlanMismatchError(
            f"{name} is on the meta device and has no bytes: load the model first, or pass its "
            "extent in placed"
        )
