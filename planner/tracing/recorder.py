"""Watch operators go by: what each costs, which storages it makes, and when these die.

A storage is known by the pointer of its implementation as long as it lives, and by a serial number of its own
afterwards, because pointers are used again. Operators are numbered as they run; those that only make views
are not counted. Nothing here depends on tensors being fake: over real ones the same numbers come out, which
is what the tests do.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from memtrain.planner.estimate import LifetimeKind, Operation

_UNTOUCHED = ("aten::empty", "aten::new_empty")
"""Operators that allocate without writing."""


def storage_key(tensor: Tensor) -> int:
    """Identifies a storage while it lives."""
    return int(tensor.untyped_storage()._cdata)


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists and dictionaries."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


@dataclass(slots=True)
class Storage:
    """One storage, from birth to death."""

    serial: int
    size_bytes: int
    shape: tuple[int, ...]
    dtype: str
    operator: str
    module: str
    born: int
    kind: LifetimeKind = LifetimeKind.TRANSIENT
    died: int | None = None
    died_behind: int | None = None
    """Counted in the operations of ``Recorder.behind``."""
    writers: list[int] = field(default_factory=list)
    """The operations that wrote to it, the one that made it first."""


@dataclass(slots=True)
class Call:
    """What ``classify`` needs to know of an operation beyond its costs."""

    name: str
    module: str
    inputs: list[int]
    """Serials; parameters, buffers and what blocks share are left out."""
    outputs: list[int]
    random: bool
    flops: int


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operations, storages and saved tensors of whatever runs under it.

    Args:
        excluded: keys of storages that are no block's own: parameters, buffers, shared arguments.
    """

    def __init__(self, excluded: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.excluded = excluded
        self.active = True
        """What comes now is recorded."""
        self.module = ""
        """Where the operations belong that come now."""
        self.operations: list[Operation] = []
        self.calls: list[Call] = []
        self.storages: list[Storage] = []
        self.saved: dict[int, None] = {}
        """Serials, in the order in which autograd packed them."""
        self.saved_excluded: set[int] = set()
        """Keys of excluded storages that autograd packed."""
        self.read_excluded: set[int] = set()
        """Keys of excluded storages that an operator was given."""
        self.behind: Recorder | None = None
        """Of what runs after this part, while some of its storages still live."""
        self._alive: dict[int, tuple[Storage, weakref.ref[Any]]] = {}

    def adopt(self, tensor: Tensor, kind: LifetimeKind, operator: str = "") -> Storage:
        """Count a storage from now on, whoever made it."""
        key, raw = storage_key(tensor), tensor.untyped_storage()
        found = self._alive.get(key)
        if found is not None:
            return found[0]
        storage = Storage(
            serial=len(self.storages),
            size_bytes=raw.nbytes(),
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            operator=operator,
            module=self.module,
            born=len(self.operations),
            kind=kind,
        )

        def died(_: weakref.ref[Any]) -> None:
            storage.died = len(self.operations)
            if self.behind is not None:
                storage.died_behind = len(self.behind.operations)
            if self._alive.get(key, (None,))[0] is storage:
                del self._alive[key]

        self.storages.append(storage)
        self._alive[key] = (storage, weakref.ref(raw, died))
        return storage

    def find(self, tensor: Tensor) -> Storage | None:
        """The record of a living storage; None for one that is excluded or was never seen."""
        found = self._alive.get(storage_key(tensor))
        return found[0] if found else None

    def mark(self, tensor: Tensor, kind: LifetimeKind) -> None:
        """Say why a storage exists."""
        self.adopt(tensor, kind).kind = kind

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Note what autograd packs."""

        def pack(tensor: Tensor) -> Tensor:
            if not self.active:
                return tensor
            if storage_key(tensor) in self.excluded:
                self.saved_excluded.add(storage_key(tensor))
            else:
                self.saved[self.adopt(tensor, LifetimeKind.TRANSIENT).serial] = None
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.active:
            return func(*args, **kwargs)
        given = tensors_in((args, kwargs))
        out = func(*args, **kwargs)
        returned = tensors_in(out)
        known = {storage_key(tensor) for tensor in given}
        self.read_excluded |= known & self.excluded
        fresh = {storage_key(t): t for t in returned if storage_key(t) not in known}
        if fresh or (returned and func._schema.is_mutable):
            self._note(func, args, kwargs, given, returned, fresh, out)
        return out

    def _note(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        given: list[Tensor],
        returned: list[Tensor],
        fresh: dict[int, Tensor],
        out: Any,
    ) -> None:
        name = func._schema.name
        made = [self.adopt(tensor, LifetimeKind.TRANSIENT, name) for tensor in fresh.values()]
        written = [] if fresh else [s for t in returned if (s := self.find(t)) is not None]
        for storage in (*made, *written):
            storage.writers.append(len(self.operations))
        inputs = {s.serial for tensor in given if (s := self.find(tensor)) is not None}
        # Attention that is not fused is a product of two activations, head by head: no weight in it.
        product = "bmm" in name and not any(storage_key(tensor) in self.excluded for tensor in given)
        attention = "attention" in name or product
        flops = _flops(func, args, kwargs, out)
        self.calls.append(
            Call(
                name=name,
                module=self.module,
                inputs=sorted(inputs - {s.serial for s in made}),
                outputs=[s.serial for s in (*made, *written)],
                random=torch.Tag.nondeterministic_seeded in func.tags,
                flops=flops,
            )
        )
        touched = list(fresh.values()) or returned
        self.operations.append(
            Operation(
                name=name,
                module=self.module,
                flops=flops,
                read_bytes=_extent_bytes(given),
                written_bytes=0 if name.startswith(_UNTOUCHED) else _extent_bytes(touched),
                attention=attention,
            )
        )


def _extent_bytes(tensors: list[Tensor]) -> int:
    extents: dict[int, int] = {}
    for tensor in tensors:
        key, extent = storage_key(tensor), tensor.numel() * tensor.element_size()
        extents[key] = min(max(extent, extents.get(key, 0)), tensor.untyped_storage().nbytes())
    return sum(extents.values())


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """torch's own counter; by its formulas too for attention kernels that are not in its registry."""
    packet = func._overloadpacket
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    name = func._schema.name
    if "attention" in name and "backward" in name:
        shapes = (tuple(tensor.shape) for tensor in args[:4])
        return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]
    if "attention" in name:
        shapes = (tuple(tensor.shape) for tensor in args[:3])
        return int(sdpa_flop_count(*shapes))  # type: ignore[no-untyped-call]
    if "grouped_mm" in name:  # each row meets one expert's matrix, however rows are shared out
        rows, inner = args[0].shape
        return int(2 * rows * inner * args[1].shape[-1])
    return 0
