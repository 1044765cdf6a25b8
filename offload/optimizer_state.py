"""Optimizer state that lives in records: where it is, and how checkpoints read and write it piece by
piece."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from memtrain.offload.errors import ExtentStateError, OffloadError, PlanMismatchError
from memtrain.offload.gradient_home import Engine, Store, Ticket
from memtrain.offload.lower_halves import SECOND_KEY, LowerHalves, write_second
from memtrain.offload.shards import (
    MASTER_KEY,
    PAGE_BYTES,
    FlatIndex,
    Piece,
    Shard,
    ShardLayout,
    StateSpec,
    StateTensor,
)
from memtrain.offload.slab import Slot
from memtrain.planner.actions import Tier
from memtrain.planner.units import round_up


class StateOwner(Protocol):
    """Who can bring a state tensor back: ``optimizer.OffloadedOptimizer``."""

    state_count: int

    def read_state(self, name: str, key: str) -> Tensor: ...


class Keeper(Protocol):
    """Keeps what an update would overwrite until it has been copied: ``copy_on_write.CopyOnWrite``."""

    def before_step(self, owner: Any) -> None:
        """Return when weights of a shard and its record in memory may change."""
        ...

    def place(self, owner: Any, store: Store, extent: Any) -> Any:
        """The extent that the next generation of the owner's record or weight goes to; it waits where there
        is only this one."""
        ...

    def settle(self) -> None:
        """Return when everything may be overwritten."""
        ...


class StaleStateError(OffloadError):
    """A handle on optimizer state that has been stepped or loaded since."""


class OffloadedState(Tensor):
    """A state tensor in a ``state_dict``: shape and dtype now, the bytes when somebody uses it.

    Passing the dict on (as ``Accelerator.prepare`` does, with ``.to(device)`` on every tensor) moves nothing;
    copying or computing reads the state, one tensor at a time; pickling is refused. Once the state has
    changed the handle is stale: its bytes are gone, and the numbers beside it in its dict (``step``) belong
    to them.
    """

    owner: StateOwner
    name_and_key: tuple[str, str]
    state_count: int
    """The owner's, when the handle was made."""

    @staticmethod
    def __new__(
        cls,
        owner: StateOwner,
        name: str,
        key: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        state_count: int,
        device: torch.device,
    ) -> OffloadedState:
        handle = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        handle.owner, handle.name_and_key, handle.state_count = owner, (name, key), state_count
        return handle

    def __init__(self, *args: Any) -> None:
        super().__init__()

    def materialize(self) -> Tensor:
        """An ordinary tensor with the state's values. Raises StaleStateError."""
        self.check_fresh()
        return self.owner.read_state(*self.name_and_key)

    def check_fresh(self) -> None:
        """Raise StaleStateError where the state has changed since the handle was made."""
        if self.state_count != self.owner.state_count:
            raise StaleStateError(
                f"{self!r} was taken at change {self.state_count} of the optimizer's state, which has seen "
                f"{self.owner.state_count} by now: call state_dict() again, or keep a snapshot with "
                f"copy.deepcopy(optimizer.state_dict())"
            )

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OffloadedState({'/'.join(self.name_and_key)}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise OffloadError(
            f"pickling {self!r} would bring the optimizer's whole state back into memory: write it with "
            f"memtrain.offload.snapshot.save_checkpoint, under Accelerate after "
            f"memtrain.integrations.accelerate.stream_state(accelerator, session), or pickle a "
            f"copy.deepcopy() of the state dict where memory allows"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.materialize()

    __torch_function__ = torch._C._disabled_torch_function_impl  # results are ordinary tensors

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            handle = args[0]
            shape, dtype = tuple(handle.shape), handle.dtype
            return cls(handle.owner, *handle.name_and_key, shape, dtype, handle.state_count, handle.device)
        if func._schema.is_mutable and isinstance(args[0], OffloadedState):
            raise TypeError(
                f"{func} would change the optimizer state {args[0]!r} in place: read it with materialize(), "
                f"and write "
                f"it with load_state_dict()"
            )
        return func(*_real(args), **_real(kwargs or {}))


def _real(value: Any) -> Any:
    if isinstance(value, OffloadedState):
        return value.materialize()
    if isinstance(value, (list, tuple)):
        return type(value)(_real(item) for item in value)
    return {key: _real(item) for key, item in value.items()} if isinstance(value, dict) else value


class RecordStore:
    """The records of all shards: on a tier, or in the device's memory where the plan or their size says so.

    Args:
        layouts: by shard, of what is stored.
        specs: by parameter, as the optimizer sees it; master weights included.
        halves: masters of which the lower half is stored.

    Raises:
        TierFullError: no room for a record; nothing stays allocated.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        index: FlatIndex,
        layouts: Mapping[Shard, ShardLayout],
        specs: Mapping[str, StateSpec],
        tiers: Mapping[str, Tier],
        halves: LowerHalves,
    ) -> None:
        self._index, self._layouts, self._specs = index, layouts, specs
        self.halves = halves
        self._memory: dict[Shard, Tensor] = {}
        self._extents: dict[Shard, tuple[Store, Any]] = {}
        self._written: set[Shard] = set()
        self.scalars: dict[str, dict[str, Any]] = {}
        """``step`` and the like, by parameter."""
        self.initialised: set[str] = set()
        """Parameters that have state: from their first step, or loaded."""
        self.weight_versions: dict[str, int] = {}
        """PyTorch's version of each weight after its last update: another one means it was written to."""
        self.keeper: Keeper | None = None
        """Who still needs what updates are about to overwrite."""
        self.changed_bytes: Counter[Tier] = Counter()
        """State on tiers that steps have changed so far: pages of a record that hold no state, and state of
        parameters without a gradient, do not count."""
        self.changed_weight_bytes: Counter[str] = Counter()
        """By unit, weights to which steps have given other bits; those that are small left out."""
        resident: dict[Shard, int] = {}
        try:
            for shard, layout in layouts.items():
                if layout.record_bytes == 0:
                    continue
                if shard.small or tiers[shard.unit] is Tier.DEVICE:
                    resident[shard] = round_up(layout.record_bytes, PAGE_BYTES)
                else:
                    store = engine.state_store(tiers[shard.unit])
                    name = f"optimizer state of {shard.name}"
                    self._extents[shard] = (store, store.allocate(name, layout.record_bytes))
            if resident:
                # One block: an allocator rounds each of some hundred records up, by a twelfth of all state.
                block = engine.device.empty(sum(resident.values())).zero_()
                self._memory = dict(zip(resident, block.split(list(resident.values())), strict=True))
        except BaseException:
            self.close()
            raise

    def before_step(self, shard: Shard) -> None:
        """To be called before weights of the shard, or its record in memory, change."""
        if self.keeper is not None:
            self.keeper.before_step(shard)

    def home(self, shard: Shard) -> tuple[Store, Any] | None:
        """Store and extent of the record's latest generation; None where it is in memory."""
        return self._extents.get(shard)

    def extents(self) -> dict[Shard, tuple[Store, Any]]:
        """Of all records that are on a tier."""
        return dict(self._extents)

    def note_stepped(self, shard: Shard, piece: Piece, *, weight_changed: bool) -> None:
        """Count what a step has changed of a piece."""
        if shard in self._extents:
            self.changed_bytes[self._extents[shard][0].tier] += self._state_bytes(shard, piece)
        if weight_changed and not shard.small:
            self.changed_weight_bytes[shard.unit] += piece.elements * piece.parameter.dtype.itemsize

    def _state_bytes(self, shard: Shard, piece: Piece) -> int:
        return sum(tensor.bytes_for(piece.shape) for tensor in self._layouts[shard].specs[piece.name].tensors)

    def check_weights(self, names: Iterable[str], *, thorough: bool = False) -> None:
        """Raises WeightsWrittenError where lower halves no longer belong to the weights beside them; see
        ``LowerHalves.check``."""
        self.halves.check(names, self.weight_versions, initialised=self.initialised, thorough=thorough)

    def on_tier(self, shard: Shard) -> bool:
        """Whether the shard's record must be read and written."""
        return shard in self._extents

    def memory(self, shard: Shard, slot: Tensor | None) -> Tensor:
        """The bytes that hold the shard's record while it is in hand."""
        if shard in self._memory:
            return self._memory[shard]
        return slot if slot is not None else torch.empty(0, dtype=torch.uint8)

    def read(self, shard: Shard, slot: Tensor, part: slice | None = None) -> list[Ticket]:
        """Start reading the record, or a ``part`` of it (``pieces_of``), into its place in the slot."""
        if shard not in self._extents:
            return []
        if shard not in self._written:
            # Whatever else passed through the slot does not belong on the tier.
            slot[: self._layouts[shard].record_bytes].zero_()
            return []
        store, extent = self._extents[shard]
        part = part or self.whole(shard)
        return [store.read(extent, slot[part], part.start)]

    def whole(self, shard: Shard) -> slice:
        """All bytes of the record."""
        return slice(0, self._layouts[shard].record_bytes)

    def pieces_of(self, shard: Shard, span: slice) -> slice:
        """The bytes of the record that are read where those of ``span`` are wanted."""
        if shard not in self._extents:
            return self.whole(shard)
        unit = self._extents[shard][0].piece_bytes
        return slice(span.start // unit * unit, min(round_up(span.stop, unit), self.whole(shard).stop))

    def span(self, shard: Shard) -> list[slice]:
        """The record's bytes in a slot: none where the record is in memory."""
        return [self.whole(shard)] if shard in self._extents else []

    def write(self, shard: Shard, slot: Tensor) -> Ticket | None:
        """Start writing the record from the slot."""
        if shard not in self._extents:
            return None
        store, extent = self._extents[shard]
        if self.keeper is not None:
            extent = self.keeper.place(shard, store, extent)
            self._extents[shard] = (store, extent)
        ticket = store.write(extent, slot[: self._layouts[shard].record_bytes])
        self._written.add(shard)
        return ticket

    def close(self) -> None:
        """Give the tiers their room back."""
        for store, extent in self._extents.values():
            store.free(extent)
        self._extents.clear()
        self._memory.clear()

    def tensors(self, name: str) -> tuple[StateTensor, ...]:
        """The state tensors of parameter ``name``, as the optimizer sees them; empty before its first
        step."""
        return self._specs[name].tensors if name in self.initialised else ()

    def stored(self, name: str) -> tuple[StateTensor, ...]:
        """The same as records and checkpoints hold them."""
        shard, _ = self._index.pieces[name][0]
        return self._layouts[shard].specs[name].tensors if name in self.initialised else ()

    def scalars_on_device(self, name: str) -> frozenset[str]:
        """Scalars that the optimizer keeps where the parameter is (fused and capturable ones on a GPU)."""
        return self._specs[name].scalars_on_device

    def shape(self, name: str, tensor: StateTensor) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tensor.shape_for(tuple(self._index.parameters[name].shape))

    def find(self, name: str, key: str) -> StateTensor:
        """The description of one state tensor. Raises KeyError with both names."""
        for tensor in self._specs[name].tensors:
            if tensor.key == key:
                return tensor
        raise KeyError(f"{name} has no state tensor {key!r}")


class RecordCursor:
    """Holds one record at a time, so that neighbours in it cost one read, and one write when they changed."""

    def __init__(
        self, records: RecordStore, layouts: Mapping[Shard, ShardLayout], slot: Tensor | None
    ) -> None:
        self._records, self._layouts, self._slot = records, layouts, slot
        self.transfers: list[Ticket] = []
        """What may be using the slot."""
        self._shard: Shard | None = None
        self._dirty = False

    def at(self, shard: Shard, *, change: bool = False) -> Tensor:
        """The shard's record; what is written to it is kept where ``change`` is set."""
        if self._shard is not shard:
            self.leave()
            if self._records.on_tier(shard):
                assert self._slot is not None
                try:
                    self._finish(self._records.read(shard, self._slot))
                except ExtentStateError:
                    if not change:
                        raise
                    self._slot.zero_()  # its last write failed: it is being replaced, and nothing else
                self._shard = shard
        self._dirty |= change and self._shard is shard
        return self._records.memory(shard, self._slot)

    def part(self, shard: Shard, span: slice) -> Tensor:
        """The shard's record, of which only bytes ``span`` are to be looked at: no more than their pieces is
        read, where that is not all of it."""
        pieces = self._records.pieces_of(shard, span)
        if self._shard is shard or pieces == self._records.whole(shard):
            return self.at(shard)
        self.leave()
        assert self._slot is not None
        try:
            self._finish(self._records.read(shard, self._slot, pieces))
        except ExtentStateError:
            return self.at(shard)  # nothing can be read of it, and only the whole tells why
        return self._slot

    def leave(self) -> None:
        """Write the record back if it changed."""
        if self._dirty and self._shard is not None and self._slot is not None:
            ticket = self._records.write(self._shard, self._slot)
            self._finish([] if ticket is None else [ticket])
        self._shard, self._dirty = None, False

    def _finish(self, transfers: list[Ticket]) -> None:
        self.transfers = transfers
        for ticket in transfers:
            ticket.wait()


class StateAccess:
    """Reads and writes whole state tensors, never more than one in memory.

    Args:
        borrow: lends a slot (None where no record is on a tier), which is released here.
    """

    def __init__(
        self,
        records: RecordStore,
        index: FlatIndex,
        layouts: Mapping[Shard, ShardLayout],
        borrow: Callable[[], Slot | None],
    ) -> None:
        self._records, self._index, self._layouts, self._borrow = records, index, layouts, borrow

    @contextmanager
    def _cursor(self) -> Iterator[RecordCursor]:
        slot = self._borrow()
        cursor = RecordCursor(self._records, self._layouts, None if slot is None else slot.buffer)
        try:
            yield cursor
            cursor.leave()
        finally:
            if slot is not None:
                slot.release(after=cursor.transfers)

    def read(self, name: str, key: str) -> Tensor:
        """One state tensor of one parameter, where the parameter is."""
        with self._cursor() as cursor:
            whole = self._gather(cursor, name, self._records.find(name, key))
        return whole.to(self._index.parameters[name].device)

    def __iter__(self) -> Iterator[tuple[str, str, Tensor]]:
        """``(parameter, key, tensor)``, parameter by parameter, in main memory."""
        with self._cursor() as cursor:
            for name in self._index.parameters:
                for tensor in self._records.tensors(name):
                    yield name, tensor.key, self._gather(cursor, name, tensor)

    def stored_parts(self) -> Iterator[tuple[str, str, Tensor]]:
        """The same as records hold it, for a file, each tensor in parts, in the order of its elements, and at
        least one: a part is as large as a shard, and lies in the slot until the next is asked for.

        That weights still belong to lower halves is not looked at: whoever writes both has done so before."""
        with self._cursor() as cursor:
            for name in self._index.parameters:
                for tensor in self._records.stored(name):
                    for part in self._parts(cursor, name, tensor):
                        yield name, tensor.key, part

    def load(self, entries: Iterable[tuple[str, str, Any]], scalars: Mapping[str, Mapping[str, Any]]) -> None:
        """Replace all state by ``entries``; a value may be a tensor or a function that returns one.

        Raises:
            PlanMismatchError: unknown names, other shapes, or a parameter with part of its state only.
        """
        arrived: dict[str, set[str]] = {}
        with self._cursor() as cursor:
            for name, key, value in entries:
                self._scatter(cursor, name, key, value() if callable(value) else value)
                arrived.setdefault(name, set()).add(key)
        for name in arrived.keys() | scalars.keys():
            spec = self._records._specs.get(name)
            wanted = set() if spec is None else {tensor.key for tensor in spec.tensors}
            if (
                spec is None
                or arrived.get(name, set()) != wanted
                or set(scalars.get(name, {})) != spec.scalars
            ):
                raise PlanMismatchError(
                    f"the state of {name} has {sorted(arrived.get(name, ()))} and "
                    f"{sorted(scalars.get(name, ()))}, this "
                    f"optimizer keeps {sorted(wanted)} and {sorted(spec.scalars if spec else ())}: load the "
                    f"state of the "
                    f"same optimizer and precision"
                )
        self._records.initialised = set(arrived) | set(scalars)
        self._records.scalars = {
            name: {key: self._scalar(name, key, value) for key, value in values.items()}
            for name, values in scalars.items()
        }

    def restart_masters(self, names: Iterable[str]) -> list[str]:
        """Where of a master the lower half is stored, and its weight was written since: have it be the
        weight, all of it. Which those were, of ``names``."""
        halves, found = self._records.halves, []
        restarted: list[Piece] = []
        try:
            with self._cursor() as cursor:
                for name in names:
                    if name not in halves.names or name not in self._records.initialised:
                        continue
                    pieces = self._index.pieces[name]
                    with halves.hold(name):
                        if not any(halves.is_written(piece) for _, piece in pieces):
                            continue
                        for shard, piece in pieces:
                            cursor.at(shard)  # raises where moments cannot be read; a change begins at zeros
                            record = cursor.at(shard, change=True)
                            halves.restart(piece, self._layouts[shard].state(record, piece))
                            restarted.append(piece)
                    self._records.weight_versions[name] = self._index.parameters[name]._version
                    found.append(name)
        except BaseException:
            for piece in restarted:  # of which the record may not have been written
                halves.forget(piece)
                self._records.weight_versions.pop(piece.name, None)
            raise
        return found

    def _scalar(self, name: str, key: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        beside = key in self._records.scalars_on_device(name)
        return value.detach().clone().to(self._index.parameters[name].device if beside else "cpu")

    def _gather(self, cursor: RecordCursor, name: str, tensor: StateTensor) -> Tensor:
        halves = self._records.halves
        if name not in halves.names or tensor.key not in (MASTER_KEY, SECOND_KEY):
            return self._collect(cursor, name, tensor)
        if tensor.key == SECOND_KEY:
            return self._collect(cursor, name, tensor).abs_()
        whole = torch.empty(self._records.shape(name, tensor), dtype=tensor.dtype)
        with halves.hold(name):
            for shard, piece in self._index.pieces[name]:
                stored = self._layouts[shard].state(cursor.at(shard), piece)
                halves.read_master(piece, stored, piece.of(whole))
        return whole

    def _collect(self, cursor: RecordCursor, name: str, tensor: StateTensor) -> Tensor:
        whole = torch.empty(self._records.shape(name, tensor), dtype=tensor.dtype)
        for shard, piece in self._index.pieces[name]:
            tensor.part_of(whole, piece).copy_(self._stored(cursor, tensor, shard, piece))
        return whole

    def _parts(self, cursor: RecordCursor, name: str, tensor: StateTensor) -> Iterator[Tensor]:
        pieces = self._index.pieces[name]
        if tensor.shape is not None or not pieces:
            yield self._collect(cursor, name, tensor)
            return
        for shard, piece in pieces:
            yield self._stored(cursor, tensor, shard, piece)

    def _stored(self, cursor: RecordCursor, tensor: StateTensor, shard: Shard, piece: Piece) -> Tensor:
        """A piece of a state tensor in its record. Of a parameter in many records it is read alone: before
        its neighbours are asked for the others come by."""
        layout, pieces = self._layouts[shard], self._index.pieces[piece.name]
        start = layout.state_offset(piece, tensor.key)
        span = slice(start, start + tensor.bytes_for(piece.shape))
        record = cursor.part(shard, span) if len(pieces) > 1 else cursor.at(shard)
        return layout.state(record, piece)[tensor.key]

    def _scatter(self, cursor: RecordCursor, name: str, key: str, value: Tensor) -> None:
        if name not in self._index.parameters:
            raise PlanMismatchError(f"state for {name!r}, which is no trainable parameter of this model")
        try:
            tensor = self._records.find(name, key)
        except KeyError as error:
            raise PlanMismatchError(
                f"{error.args[0]}: load the state of the same optimizer and precision"
            ) from error
        if tuple(value.shape) != self._records.shape(name, tensor):
            raise PlanMismatchError(
                f"state {key!r} of {name} has shape {tuple(value.shape)}, expected "
                f"{self._records.shape(name, tensor)}"
            )
        value, halves = value.contiguous(), self._records.halves
        master = key == MASTER_KEY and name in halves.names
        with halves.hold(name) if master else nullcontext():
            for shard, piece in self._index.pieces[name]:
                stored = self._layouts[shard].state(cursor.at(shard, change=True), piece)
                part = tensor.part_of(value, piece)
                if master:
                    halves.write_master(piece, stored, part)
                elif key == SECOND_KEY and name in halves.names:
                    write_second(name, stored[key], part)
                else:
                    stored[key].copy_(part)
