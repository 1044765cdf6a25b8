"""What a block saves for its backward pass, in 8 or 4 bits, whatever the block is.

A ``SavedTensorCompressor`` stands in the saved-tensor hooks of the blocks that it is attached to. Autograd
asks it to keep *every* tensor that a node needs, so most of this file is about what must not be encoded:

- parameters and buffers, and their views and transposes; under autocast their copies in the lower precision;
- arguments of the block that carry no gradient: masks (minus infinity has no code), rotary tables that all
  blocks share;
- the block's outputs: whoever receives them keeps them alive anyway;
- indices and masks by dtype; row statistics (log-sum-exp, rstd) by size: errors in them touch whole rows.

A storage is encoded once, however many views, nodes and blocks save it, and its views come back as views of
one tensor while backward holds any of them. A storage is identified by a weak reference and its version,
never by an address, which is reused. GACT (arXiv 2206.11357) and ActNN (arXiv 2104.14129) have the idea;
GACT's public code leaves bf16 alone without a word, and waits for the device at every tensor.

The loss and the head stay outside: attach the compressor to blocks. An error in a log-probability is an error
in every gradient. The gradients of the block's inputs and parameters are those of slightly different
activations; the forward pass is exact.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from memtrain.optim.autograd.group_codec import GroupCodec
from memtrain.optim.autograd.lossy_backward import LossyBackwardError, eager_only, refuse_second_derivative

_STATISTICS_RATIO = 32
"""What has less than this part of the largest argument's elements is kept as it is. Row statistics have one
element for a head of 64 or more features; what is as small as that is not worth a code either."""


class SavedCodec(Protocol):
    """How tensors become smaller ones: ``GroupCodec``, or without loss ``UniqueCodec``."""

    @property
    def exact(self) -> bool:
        """Whether what is decoded is what was encoded."""
        ...

    def takes(self, tensor: Tensor) -> bool: ...
    def encode(self, values: Tensor) -> Any:
        """A named tuple of tensors; None: they would not be smaller."""
        ...

    def decode(self, encoded: Any, shape: torch.Size, dtype: torch.dtype) -> Tensor: ...


@dataclass(slots=True)
class CompressionCounts:
    """What a compressor has done with storages so far."""

    encoded: int = 0
    plain_bytes: int = 0
    """Of those that it encoded."""
    encoded_bytes: int = 0
    left: int = 0
    """Storages that would not have become smaller."""
    left_bytes: int = 0


class SavedTensorCompressor:
    """Encodes what blocks save, by ``codec``. One compressor may serve all blocks of a model.

    Nothing happens while gradients are off, or in a block that a non-reentrant checkpoint runs: the
    checkpoint keeps the block's input alone, and what its second run saves lives for one block's backward.
    """

    def __init__(self, codec: SavedCodec | None = None) -> None:
        self.codec: SavedCodec = GroupCodec() if codec is None else codec
        self.counts = CompressionCounts()
        self._known: dict[tuple[Any, ...], weakref.ref[_Stored]] = {}
        self._live: weakref.WeakSet[_Stored] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        return {"codec": self.codec}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes and scales that graphs hold now."""
        return sum(stored.nbytes for stored in self._live)

    def attach(self, module: nn.Module) -> Attachment:
        """Encode what ``module`` saves from now on, until the returned attachment is removed."""
        return Attachment(self, module)

    @contextmanager
    def region(self, module: nn.Module, *arguments: Any) -> Iterator[Callable[[Any], Any]]:
        """Encode what is saved inside, where ``module`` runs on ``arguments``; for what is no module's call.

        Yields a function to be given the result, which it returns: what is an output is kept as it is.

        Other saved-tensor hooks that are on around it are handed what is kept: codes, scales, and tensors
        that are not encoded.
        """
        region = self._open(module, arguments)
        if region is None:
            yield lambda result: result
            return
        with region:
            yield region.keep_outputs

    def _open(self, module: nn.Module, arguments: Any) -> _Region | None:
        around = _hooks_around()
        if not torch.is_grad_enabled() or (around is not None and around.is_checkpoint):
            return None
        # A list at once: another thread may run a block of the same compressor.
        self._known = {key: known for key, known in list(self._known.items()) if known() is not None}
        return _Region(self, module, arguments, around)

    def _store(self, storage: torch.UntypedStorage, values: Tensor, hold: Hold) -> _Stored | None:
        """None where codes would take no less."""
        encoded = self.codec.encode(values)
        if encoded is None:
            self.counts.left += 1
            self.counts.left_bytes += values.nbytes
            return None
        stored = _Stored(self.codec, values, encoded, StorageWeakRef(storage), hold)  # type: ignore[no-untyped-call]
        self.counts.encoded += 1
        self.counts.plain_bytes += values.nbytes
        self.counts.encoded_bytes += stored.nbytes
        self._live.add(stored)
        return stored


class Attachment:
    """Hooks on one module; ``remove`` takes them off. Graphs that exist stay what they are."""

    def __init__(self, compressor: SavedTensorCompressor, module: nn.Module) -> None:
        self._compressor = compressor
        self._open: dict[int, list[_Region | None]] = {}
        """Of each thread, for saved-tensor hooks are a thread's own."""
        self._hooks = [
            module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
            module.register_forward_hook(self._leave, always_call=True),
        ]

    def remove(self) -> None:
        """Leave the module as it was found. Doing it twice is harmless."""
        for hook in self._hooks:
            hook.remove()

    @eager_only("saved-tensor hooks are entered and left around a graph, not inside it")
    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mine = self._open.setdefault(threading.get_ident(), [])
        mine.append(None)  # _leave is called even if this raises
        region = self._compressor._open(module, (args, kwargs))
        if region is not None:
            region.__enter__()
            mine[-1] = region

    @eager_only("saved-tensor hooks are entered and left around a graph, not inside it")
    def _leave(self, module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        mine = self._open.get(threading.get_ident(), [])
        region = mine.pop() if mine else None  # fullgraph=True refuses _enter, and comes here
        if not mine:
            self._open.pop(threading.get_ident(), None)
        if region is not None:
            region.__exit__(None, None, None)
            region.keep_outputs(result)


class _Region(torch.autograd.graph.saved_tensors_hooks):
    """One run of one block."""

    def __init__(
        self,
        compressor: SavedTensorCompressor,
        module: nn.Module,
        arguments: Any,
        around: _Around | None,
    ) -> None:
        super().__init__(self._pack, _unpack)
        self._compressor = compressor
        self.around = around
        self._own: dict[tuple[Any, ...], weakref.ref[_Stored]] = {}
        self._hold: Hold = _Kept if around is None else around.hold
        tensors = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
        inputs = [tensor for tensor in tensors if tensor.requires_grad]
        shared = [tensor for tensor in tensors if not tensor.requires_grad and tensor.is_floating_point()]
        if not inputs and shared:  # the first block under frozen embeddings: its input is the first argument
            inputs, shared = shared[:1], shared[1:]
        own = [*module.parameters(), *module.buffers()]
        # Addresses serve here: what they belong to lives as long as the region.
        self._fixed = {tensor.untyped_storage().data_ptr() for tensor in (*own, *shared)}
        self._smallest = max((tensor.numel() for tensor in inputs), default=0) // _STATISTICS_RATIO
        cast = torch.is_autocast_enabled(tensors[0].device.type if tensors else "cpu")
        self._weight_shapes = _weight_shapes(own) if cast else set()
        self._encoded: list[weakref.ref[_Stored]] = []

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        del self.pack_hook  # ours: a cycle, in which what is around would stay alive beyond the graph

    def keep_outputs(self, result: Any) -> Any:
        """Put back what was encoded of storages that the block returns."""
        for output in pytree.tree_leaves(result):
            if isinstance(output, Tensor):
                storage = StorageWeakRef(output.untyped_storage())  # type: ignore[no-untyped-call]
                for reference in self._encoded:
                    stored = reference()
                    if stored is not None and stored.storage == storage:
                        stored.keep(output)
        self._encoded.clear()
        return result

    def _pack(self, tensor: Tensor) -> _Kept | _Handed | _Packed:
        storage = tensor.untyped_storage()
        if not self._encodable(tensor, storage):
            return self._hold(tensor)
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        span = 1 + sum((size - 1) * stride for size, stride in steps)
        values = tensor.detach()
        key: tuple[Any, ...] = (storage._cdata, tensor._version, tensor.dtype)
        if storage.nbytes() <= 2 * span * tensor.element_size():
            values = values.as_strided((storage.nbytes() // tensor.element_size(),), (1,), 0)
            stride, offset = tensor.stride(), tensor.storage_offset()
        else:  # a small window of a large storage: the window alone
            key = (*key, tensor.storage_offset(), tensor.shape, tensor.stride())
            stride, offset = torch.empty(tensor.shape, device="meta").stride(), 0
        reference = self._known.get(key)
        stored = None if reference is None else reference()
        if stored is None:
            stored = self._compressor._store(storage, values, self._hold)
            if stored is None:
                return self._hold(tensor)
            self._known[key] = weakref.ref(stored)
            self._encoded.append(weakref.ref(stored))
        return _Packed(stored, tensor.shape, stride, int(offset))

    @property
    def _known(self) -> dict[tuple[Any, ...], weakref.ref[_Stored]]:
        """What is encoded already: by any block, unless hooks around keep each block's tensors apart."""
        return self._compressor._known if self.around is None else self._own

    def _encodable(self, tensor: Tensor, storage: torch.UntypedStorage) -> bool:
        return (
            tensor.layout is torch.strided
            and self._compressor.codec.takes(tensor)
            and tensor.numel() > self._smallest
            and not (tensor.is_leaf and tensor.requires_grad)
            and storage.data_ptr() not in self._fixed
            and tuple(tensor.shape) not in self._weight_shapes
        )


class _Stored:
    """One storage, or a window of one: encoded, or as it is when it turned out to be an output."""

    def __init__(
        self, codec: SavedCodec, values: Tensor, encoded: Any, storage: StorageWeakRef, hold: Hold
    ) -> None:
        self.storage = storage
        """Whose values these are; while it is referred to, no other storage is given its identity."""
        self._codec, self._shape, self._dtype = codec, values.shape, values.dtype
        self._form = type(encoded)
        self._encoded_bytes = sum(part.nbytes for part in encoded)
        self._hold = hold
        self._encoded: tuple[_Kept | _Handed, ...] | None = tuple(map(hold, encoded))
        self._output: _Kept | _Handed | None = None
        self._decoded: weakref.ref[Tensor] | None = None

    @property
    def exact(self) -> bool:
        return self._codec.exact

    @property
    def nbytes(self) -> int:
        return 0 if self._encoded is None else self._encoded_bytes

    def keep(self, output: Tensor) -> None:
        whole = output.untyped_storage().nbytes() // output.element_size()
        if self._shape == (whole,) and self._dtype == output.dtype:
            self._output, self._encoded = self._hold(output.detach().as_strided((whole,), (1,), 0)), None

    def values(self) -> Tensor:
        if self._encoded is None:
            assert self._output is not None
            return self._output.get()
        values = None if self._decoded is None else self._decoded()
        if values is None:
            encoded = self._form(*(part.get() for part in self._encoded))
            values = self._codec.decode(encoded, self._shape, self._dtype)
            self._decoded = weakref.ref(values)  # a view keeps its base alive, so nodes that overlap share it
        return values


class _Kept:
    """A saved tensor as it is. Autograd does not look at versions behind hooks, so this does."""

    def __init__(self, tensor: Tensor) -> None:
        # Detached (the version is shared): a node that saves its own result would otherwise hold itself.
        self._tensor, self._version = tensor.detach(), tensor._version
        self._original = tensor if tensor.is_leaf and tensor.requires_grad else None

    def get(self) -> Tensor:
        if self._tensor._version != self._version:
            raise LossyBackwardError(
                f"a tensor of shape {tuple(self._tensor.shape)} that backward needs was changed in place "
                f"after forward had saved it (version {self._version}, now {self._tensor._version})"
            )
        return self._tensor if self._original is None else self._original


class _Handed:
    """A tensor that the hooks around have taken."""

    def __init__(self, around: _Around, tensor: Tensor) -> None:
        self._unpack, self._saved = around.unpack, around.pack(tensor)

    def get(self) -> Tensor:
        return self._unpack(self._saved)


@dataclass(frozen=True, slots=True)
class _Around:
    """The saved-tensor hooks that were on before ours; only the innermost are asked by autograd."""

    pack: Callable[[Tensor], Any]
    unpack: Callable[[Any], Tensor]

    def hold(self, tensor: Tensor) -> _Handed:
        return _Handed(self, tensor)

    @property
    def is_checkpoint(self) -> bool:
        """Whether torch's own, which runs the block again, is what saves."""
        return getattr(self.pack, "__module__", "") == "torch.utils.checkpoint"


Hold = Callable[[Tensor], _Kept | _Handed]
"""How a region keeps what it wants to have again."""


class _Packed:
    """What autograd holds instead of a tensor: where its values are, and its view of them."""

    def __init__(self, stored: _Stored, shape: torch.Size, stride: tuple[int, ...], offset: int) -> None:
        self._stored, self._shape, self._stride, self._offset = stored, shape, stride, offset

    def get(self) -> Tensor:
        in_backward = torch._C._current_graph_task_id() != -1  # and not a look at a node from outside
        if in_backward and not self._stored.exact:
            refuse_second_derivative("a block whose saved tensors are encoded")
        return self._stored.values().as_strided(self._shape, self._stride, self._offset)


def _unpack(packed: _Kept | _Handed | _Packed) -> Tensor:
    return packed.get()


def _hooks_around() -> _Around | None:
    """The innermost hooks that are not ours; those around a region are also those around one inside it."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None:
        return None
    region = getattr(hooks[0], "__self__", None)
    return region.around if isinstance(region, _Region) else _Around(*hooks[:2])


def _weight_shapes(own: Iterable[Tensor]) -> set[tuple[int, ...]]:
    """Shapes of matrices and of their transposes: autocast saves copies of them, in storages of their own."""
    shapes = {tuple(tensor.shape) for tensor in own if tensor.dim() >= 2}
    return shapes | {shape[::-1] for shape in shapes}
