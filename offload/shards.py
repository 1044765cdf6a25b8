"""The flat index: parameters of a unit in order, cut into pieces, packed into shards, stored as records.

A *piece* is what the optimizer sees as one parameter; a *shard* is a run of pieces of one unit that is read,
stepped and written together; its *record* is the state of all its pieces in one extent. Piece starts are
multiples of ``PIECE_ALIGNMENT`` elements from the start of their parameter, so that offsets suit direct I/O
and every vector lane of the optimizer's loops falls as it does on the uncut parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memtrain.offload.errors import PlanMismatchError
from memtrain.planner.units import round_up

SMALL = 65536
"""Parameters of fewer elements keep gradient and state in memory: 12 bytes each of at most 64 Ki elements are
less than one transfer's worth (the disks measured need 4-8 MiB in flight)."""
PIECE_ALIGNMENT = 2048
"""Elements. 4 KiB of bf16, the direct-I/O block; a multiple of every vector width, and of the blocks of
quantised states."""
PAGE_BYTES = 4096
_RESIDENT_ALIGNMENT_BYTES = 64  # a cache line: records that never leave memory need no pages

MASTER_KEY = "master_weight"
"""State key of the fp32 master weights, beside the optimizer's own keys."""

Unit = tuple[str, Sequence[tuple[str, torch.nn.Parameter]]]
"""A unit's name and its parameters with their names, in forward order."""


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Piece:
    """Elements ``start`` to ``stop`` of one parameter, flattened."""

    name: str
    parameter: torch.nn.Parameter
    start: int
    stop: int
    whole: bool
    """The piece is its parameter and keeps the parameter's shape."""

    @property
    def elements(self) -> int:
        """How many elements the piece has."""
        return self.stop - self.start

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape for a whole piece, else ``(elements,)``."""
        return tuple(self.parameter.shape) if self.whole else (self.elements,)

    def of(self, tensor: Tensor) -> Tensor:
        """The piece's part of a contiguous tensor of the parameter's shape: a view in the piece's shape."""
        return tensor.view(-1)[self.start : self.stop].view(self.shape)

    def weight(self) -> Tensor:
        """The piece of the parameter itself. Shares its version counter, so that a change in place is seen
        by autograd."""
        return self.of(self.parameter.detach())


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Shard:
    """Pieces of one unit that are stepped together."""

    unit: str
    number: int
    pieces: tuple[Piece, ...]
    small: bool = False
    """Holds the unit's small parameters; never leaves memory."""

    @property
    def name(self) -> str:
        """For messages and extents, such as ``model.layers.3 shard 1``."""
        return f"{self.unit} small parameters" if self.small else f"{self.unit} shard {self.number}"

    @property
    def elements(self) -> int:
        """Elements of all pieces."""
        return sum(piece.elements for piece in self.pieces)


@dataclass(frozen=True, kw_only=True, slots=True)
class StateTensor:
    """One tensor of an optimizer's state per parameter."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...] | None = None
    """None where the tensor is cut with its parameter."""
    per: int = 1
    """Elements of the parameter to one of a tensor that is cut. 1: it has the parameter's shape. More: it is
    flat, such as the scales of blocks, or codes of which two lie in a byte; divides ``PIECE_ALIGNMENT``."""

    def shape_for(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Its own for a parameter or piece of ``shape``."""
        if self.shape is not None:
            return self.shape
        return shape if self.per == 1 else (-(-math.prod(shape) // self.per),)

    def bytes_for(self, shape: tuple[int, ...]) -> int:
        """What it takes for a parameter or piece of ``shape``."""
        return math.prod(self.shape_for(shape)) * self.dtype.itemsize

    def start_of(self, piece: Piece) -> int:
        """The element of the whole tensor at which the piece's part begins."""
        return piece.start // self.per if self.shape is None else 0

    def part_of(self, whole: Tensor, piece: Piece) -> Tensor:
        """The piece's part of the contiguous whole tensor: a view, in its shape for the piece."""
        shape, start = self.shape_for(piece.shape), self.start_of(piece)
        return whole.view(-1)[start : start + math.prod(shape)].view(shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class StateSpec:
    """What one parameter's state consists of after the first step."""

    tensors: tuple[StateTensor, ...] = ()
    scalars: frozenset[str] = frozenset()
    """Keys of 0-dim tensors and Python numbers, such as ``step``: kept in memory, one per parameter."""
    scalars_on_device: frozenset[str] = frozenset()
    """Those that are tensors on a GPU."""


class FlatIndex:
    """Where every trainable parameter lies.

    Args:
        units: forward order. A tied parameter belongs to the first unit that names it; parameters that need
            no gradient are left out.
        shard_elements: most elements of a shard, at least ``PIECE_ALIGNMENT``.
        whole_parameters: do not cut (optimizers that are not elementwise); a parameter larger than
            ``shard_elements`` is then a shard of its own.

    Raises:
        PlanMismatchError: a parameter that cannot be viewed flat, a repeated name, or a shard size too small.
    """

    def __init__(self, units: Iterable[Unit], shard_elements: int, *, whole_parameters: bool = False) -> None:
        self.whole_parameters = whole_parameters
        self.shard_elements = shard_elements // PIECE_ALIGNMENT * PIECE_ALIGNMENT
        self.parameters: dict[str, torch.nn.Parameter] = {}
        self.unit_of: dict[str, str] = {}
        self.shards: dict[str, tuple[Shard, ...]] = {}
        """By unit, in forward order; the small one first where there is one."""
        self.pieces: dict[str, list[tuple[Shard, Piece]]] = {}
        """By parameter, in order of ``start``."""
        seen: set[int] = set()
        for unit, members in units:
            fresh = []
            for name, parameter in members:
                if not parameter.requires_grad or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                self._admit(unit, name, parameter)
                fresh.append((name, parameter))
            if unit in self.shards:
                raise PlanMismatchError(f"two units are called {unit!r}: give each unit a name of its own")
            self.shards[unit] = tuple(self._pack(unit, fresh))
        for shards in self.shards.values():
            for shard in shards:
                for piece in shard.pieces:
                    self.pieces.setdefault(piece.name, []).append((shard, piece))

    def all_shards(self) -> list[Shard]:
        """Every shard in forward order."""
        return [shard for shards in self.shards.values() for shard in shards]

    def _admit(self, unit: str, name: str, parameter: torch.nn.Parameter) -> None:
        if name in self.parameters:
            raise PlanMismatchError(f"two parameters are called {name!r}: names must be unique")
        if not parameter.is_contiguous():
            raise PlanMismatchError(
                f"{name} is not contiguous (shape {tuple(parameter.shape)}, strides {parameter.stride()}) "
                f"and cannot "
                f"be cut into flat pieces: replace its data by parameter.data.contiguous()"
            )
        if not parameter.is_floating_point():
            raise PlanMismatchError(
                f"{name} is {parameter.dtype}: only floating-point parameters have an update that can be "
                f"streamed"
            )
        first = next(iter(self.parameters.items()), (name, parameter))
        if parameter.device != first[1].device:
            raise PlanMismatchError(
                f"{name} is on {parameter.device} and {first[0]} on {first[1].device}: all parameters must "
                f"be on one device; move the model there with model.to()"
            )
        self.parameters[name] = parameter
        self.unit_of[name] = unit

    def _pack(self, unit: str, members: list[tuple[str, torch.nn.Parameter]]) -> Iterable[Shard]:
        small = [(name, parameter) for name, parameter in members if parameter.numel() < SMALL]
        if small:
            yield Shard(unit=unit, number=0, small=True, pieces=tuple(_whole(*member) for member in small))
        large = [(name, parameter) for name, parameter in members if parameter.numel() >= SMALL]
        if large and self.shard_elements == 0:
            raise PlanMismatchError(
                f"update_shard_elements must be at least {PIECE_ALIGNMENT} for {large[0][0]} to be cut: "
                f"raise it"
            )
        number, room, pieces = 0, self.shard_elements, list[Piece]()
        for piece in self._cut(large):
            if pieces and piece.elements > room:
                yield Shard(unit=unit, number=number, pieces=tuple(pieces))
                number, room, pieces = number + 1, self.shard_elements, []
            pieces.append(piece)
            room -= piece.elements
        if pieces:
            yield Shard(unit=unit, number=number, pieces=tuple(pieces))

    def _cut(self, members: list[tuple[str, torch.nn.Parameter]]) -> Iterable[Piece]:
        """Cut so that shards fill up: a parameter's first piece takes what room the last shard has left."""
        room = self.shard_elements
        for name, parameter in members:
            elements = parameter.numel()
            if self.whole_parameters:
                yield _whole(name, parameter)
                continue
            start = 0
            while start < elements:
                if room < PIECE_ALIGNMENT:
                    room = self.shard_elements
                stop = min(elements, start + room // PIECE_ALIGNMENT * PIECE_ALIGNMENT)
                yield Piece(
                    name=name,
                    parameter=parameter,
                    start=start,
                    stop=stop,
                    whole=start == 0 and stop == elements,
                )
                room -= stop - start
                start = stop


def _whole(name: str, parameter: torch.nn.Parameter) -> Piece:
    return Piece(name=name, parameter=parameter, start=0, stop=parameter.numel(), whole=True)


def region(buffer: Tensor, offset_bytes: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A typed view of ``buffer`` (uint8) that starts at ``offset_bytes``."""
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    return buffer[offset_bytes : offset_bytes + nbytes].view(dtype).view(shape)


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class ShardLayout:
    """Byte offsets of a shard's record, and of its gradients behind the record, in an update slot. There are
    thousands of shards: what each takes in memory counts.

    Gradients that must be widened to fp32 get a region of twice their padded size, and are read into its
    upper
    half: widening then runs from the bottom within the region and needs no memory of its own.
    """

    shard: Shard
    specs: Mapping[str, StateSpec]
    """By parameter what is stored; master weights, or their lower halves, included."""
    widened: frozenset[str]
    """Parameters whose gradients become fp32."""
    _state_offsets: tuple[tuple[int, ...], ...] = field(init=False, default=())
    """By piece, of its state tensors in their order."""
    _gradient_offsets: tuple[int, ...] = field(init=False, default=())
    """By piece."""
    record_bytes: int = field(init=False, default=0)
    slot_bytes: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        alignment = _RESIDENT_ALIGNMENT_BYTES if self.shard.small else PAGE_BYTES
        offset = 0
        state: list[tuple[int, ...]] = []
        for piece in self.shard.pieces:
            found = []
            for tensor in self.specs[piece.name].tensors:
                found.append(offset)
                offset += round_up(tensor.bytes_for(piece.shape), alignment)
            state.append(tuple(found))
        object.__setattr__(self, "record_bytes", offset)
        offset = round_up(offset, PAGE_BYTES)
        gradients = []
        for piece in self.shard.pieces:
            gradients.append(offset)
            offset += self.gradient_region_bytes(piece)
        object.__setattr__(self, "slot_bytes", offset)
        object.__setattr__(self, "_state_offsets", tuple(state))
        object.__setattr__(self, "_gradient_offsets", tuple(gradients))

    def gradient_region_bytes(self, piece: Piece) -> int:
        """Bytes of the piece's gradient region in a slot."""
        padded = round_up(piece.elements * piece.parameter.dtype.itemsize, PAGE_BYTES)
        return 2 * padded if piece.name in self.widened else padded

    def state_offset(self, piece: Piece, key: str) -> int:
        """Where in the record a state tensor of the piece begins. Raises KeyError where it has none such."""
        return self._offsets_of(piece)[key]

    def _offsets_of(self, piece: Piece) -> dict[str, int]:
        offsets = self._state_offsets[self.shard.pieces.index(piece)]
        tensors = self.specs[piece.name].tensors
        return {tensor.key: offset for tensor, offset in zip(tensors, offsets, strict=True)}

    def state(self, record: Tensor, piece: Piece) -> dict[str, Tensor]:
        """The piece's state tensors as views of ``record`` (uint8)."""
        offsets = self._offsets_of(piece)
        return {
            tensor.key: region(record, offsets[tensor.key], tensor.shape_for(piece.shape), tensor.dtype)
            for tensor in self.specs[piece.name].tensors
        }

    def gradient_bytes(self, slot: Tensor, piece: Piece) -> Tensor:
        """Where the piece's gradient is read to: uint8, padded to pages."""
        return slot[self.gradient_span(piece)]

    def gradient_span(self, piece: Piece) -> slice:
        """The same as a range of the slot's bytes."""
        start = self._gradient_offsets[self.shard.pieces.index(piece)]
        size = self.gradient_region_bytes(piece)
        return slice(start + (size // 2 if piece.name in self.widened else 0), start + size)

    def gradient(self, slot: Tensor, piece: Piece) -> Tensor:
        """The gradient that was read, in its own dtype and the piece's shape."""
        return region(self.gradient_bytes(slot, piece), 0, piece.shape, piece.parameter.dtype)

    def widen(self, slot: Tensor, piece: Piece) -> Tensor:
        """Turn the gradient that was read into fp32, in place, and return it.

        Block ``[a, b)`` writes bytes ``4a .. 4b`` while its source lies from ``2n + 2a`` on: disjoint as long
        as
        ``b <= (n + a) / 2``. The blocks shrink by halves; the last one is copied aside.
        """
        start = self._gradient_offsets[self.shard.pieces.index(piece)]
        narrow = self.gradient(slot, piece).view(-1)
        wide = region(slot, start, (piece.elements,), torch.float32)
        done, count = 0, piece.elements
        while count - done > PIECE_ALIGNMENT:
            stop = (count + done) // 2
            wide[done:stop].copy_(narrow[done:stop])
            done = stop
        wide[done:].copy_(narrow[done:].clone())
        return wide.view(piece.shape)
