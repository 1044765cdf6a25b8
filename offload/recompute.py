"""Recompute one block in backward: nothing saved but its input (and, if asked, attention outputs).

The forward pass builds the ordinary graph, except that every saved tensor is a *hole*. The first hole
that backward looks into runs the block's forward again, with the same input, RNG and autocast, and
fills all holes; the second graph is thrown away. Because the graph that backward walks is the one of
the first forward, hooks and gradients fire exactly as without recomputation.

The scheme is that of torch's non-reentrant checkpoint; ours differs in that the input and the attention
kernels' outputs may have left the device, and that anything which would make the second forward differ
from the first raises instead of training on.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from memtrain.offload.errors import OffloadError
from memtrain.offload.unmoved import Unmoved

Pack = Callable[[torch.Tensor], Any]
Unpack = Callable[[Any], torch.Tensor]

_ATTENTION_NAMES = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_flash_attention_forward",
    "_efficient_attention_forward",
)


def _is_attention(func: Any) -> bool:
    return func.namespace == "aten" and func._opname in _ATTENTION_NAMES


class _Complete(Exception):
    """All holes are filled; what is left of the second forward is not needed."""


class _Hole:
    """Stands for a saved tensor; carries it once it has been computed again."""

    __slots__ = ("__weakref__", "frame", "tensor")

    def __init__(self, frame: RecomputeFrame) -> None:
        self.frame = frame
        self.tensor: torch.Tensor | None = None


class _Surroundings:
    """RNG and autocast of a forward pass, to be entered again."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._device_types = ["cpu"] if device.type == "cpu" else ["cpu", device.type]
        self._cpu_rng = torch.get_rng_state()
        self._device_rng = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        self._autocast = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in self._device_types
        }
        self._cache = torch.is_autocast_cache_enabled()

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Same RNG and autocast inside; the present ones again afterwards."""
        now_cpu = torch.get_rng_state()
        now_device = torch.cuda.get_rng_state(self._device) if self._device_rng is not None else None
        torch.set_rng_state(self._cpu_rng)
        if self._device_rng is not None:
            torch.cuda.set_rng_state(self._device_rng, self._device)
        try:
            with contextlib.ExitStack() as stack:
                for kind, (enabled, dtype) in self._autocast.items():
                    stack.enter_context(
                        torch.autocast(kind, enabled=enabled, dtype=dtype, cache_enabled=self._cache)
                    )
                yield
        finally:
            torch.set_rng_state(now_cpu)
            if now_device is not None:
                torch.cuda.set_rng_state(now_device, self._device)


class _AttentionMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode without torch's wrapper, which imports the compiler in the middle of a forward pass."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class _StoreAttention(_AttentionMode):  # type: ignore[no-untyped-call]
    """Record the outputs of attention kernels; a kernel that draws random numbers is left alone.

    Skipping such a kernel in the second forward would leave the RNG behind, and every later dropout
    mask of the block would differ.
    """

    def __init__(self, record: list[Any], pack: Pack) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._record = record
        self._pack = pack

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if _is_attention(func):
            stored = None
            if _dropout(func, args, kwargs or {}) == 0.0:
                stored = pytree.tree_map_only(torch.Tensor, self._pack, output)
            self._record.append(stored)
        return output


class _ReplayAttention(_AttentionMode):  # type: ignore[no-untyped-call]
    """Answer attention kernels with what was recorded."""

    def __init__(self, record: list[Any], unpack: Unpack, name: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._record = iter(record)
        self._unpack = unpack
        self._name = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _is_attention(func):
            return func(*args, **(kwargs or {}))
        try:
            stored = next(self._record)
        except StopIteration:
            raise _differs(self._name, "more attention kernels ran") from None
        if stored is None:
            return func(*args, **(kwargs or {}))
        # A new tensor each time: autograd makes it an output of the second graph, which must die with it.
        return pytree.tree_map_only(_Stored, lambda item: item.tensor(self._unpack).detach(), stored)


class _AroundAttention(TorchFunctionMode):
    """Enters a dispatch mode for the calls that may reach an attention kernel, and for no others.

    A dispatch mode sends every operator through Python: 2 ms for a block of SmolLM2, in each of its forwards.
    """

    def __init__(self, mode: TorchDispatchMode) -> None:
        super().__init__()
        self._mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling():  # the compiler looks in here, and cannot follow into the mode
            return func(*args, **(kwargs or {}))
        around = self._mode if "attention" in getattr(func, "__name__", "") else contextlib.nullcontext()
        with around:
            return func(*args, **(kwargs or {}))


class _Stored:
    """One stored attention output."""

    __slots__ = ("_packed",)

    def __init__(self, packed: Any) -> None:
        self._packed = packed

    def tensor(self, unpack: Unpack) -> torch.Tensor:
        return unpack(self._packed)


class RecomputeFrame:
    """One block in one forward pass whose saved tensors are computed again in backward.

    Args:
        name: of the block, for errors.
        function: the block's forward.
        args, kwargs: what it was called with; the first tensor of ``args`` is the block's input.
        is_fixed: whether a tensor is a parameter or buffer, which is saved as it is.
        store_attention: keep the outputs of attention kernels.
        pack_input, pack_attention: how they leave the device; None keeps them there.
        unpack: brings back what the packs sent away.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        is_fixed: Callable[[torch.Tensor], bool],
        store_attention: bool,
        pack_input: Pack | None,
        pack_attention: Pack | None,
        unpack: Unpack,
    ) -> None:
        self.name = name
        self._function = function
        self._is_fixed = is_fixed
        self._store_attention = store_attention
        self._pack_attention = pack_attention or Unmoved.of
        self._unpack = unpack
        self._holes: list[weakref.ref[_Hole]] = []
        self._shapes: list[tuple[torch.Size, torch.dtype]] = []
        self._attention: list[Any] = []
        self._leaves, self._spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in self._leaves if isinstance(leaf, torch.Tensor)]
        self._surroundings = _Surroundings(tensors[0].device if tensors else torch.device("cpu"))
        self._call: tuple[Any, Any] | None = (args, kwargs)
        self._needs_grad: dict[int, bool] = {}
        first = True
        for index, leaf in enumerate(self._leaves):
            if not isinstance(leaf, torch.Tensor):
                continue
            self._needs_grad[index] = leaf.requires_grad
            pack = pack_input if first and pack_input is not None else Unmoved.of
            first = False
            self._leaves[index] = pack(leaf.detach())

    def forward(self) -> Any:
        """Run the block, saving nothing. Called once."""
        assert self._call is not None
        (args, kwargs), self._call = self._call, None
        mode: Any = contextlib.nullcontext()
        if self._store_attention:
            store = _StoreAttention(
                self._attention, lambda tensor: _Stored(self._pack_attention(tensor.detach()))
            )
            mode = _AroundAttention(store)
        with torch.autograd.graph.saved_tensors_hooks(self._dig, self._look_into), mode:
            return self._function(*args, **kwargs)

    def _dig(self, tensor: torch.Tensor) -> Unmoved | _Hole:
        if self._is_fixed(tensor):
            return Unmoved.of(tensor)
        hole = _Hole(self)
        self._holes.append(weakref.ref(hole))
        self._shapes.append((tensor.shape, tensor.dtype))
        return hole

    def _look_into(self, saved: Unmoved | _Hole) -> torch.Tensor:
        if isinstance(saved, Unmoved):
            return saved.get()
        if saved.tensor is None:
            self._compute_again()
        # Taken out: a graph that is walked twice must not hold the memory of every block in between.
        tensor, saved.tensor = saved.tensor, None
        assert tensor is not None
        return tensor

    def _compute_again(self) -> None:
        filled = 0

        def fill(tensor: torch.Tensor) -> Any:
            nonlocal filled
            if self._is_fixed(tensor):
                return tensor
            if filled == len(self._holes):
                raise _differs(self.name, f"more than {len(self._holes)} tensors were saved")
            if self._shapes[filled] != (tensor.shape, tensor.dtype):
                raise _differs(
                    self.name,
                    f"saved tensor {filled} was {tuple(self._shapes[filled][0])} {self._shapes[filled][1]} "
                    f"and is now {tuple(tensor.shape)} {tensor.dtype}",
                )
            hole = self._holes[filled]()
            if hole is not None:
                hole.tensor = tensor.detach()
            filled += 1
            if filled == len(self._holes):
                raise _Complete
            return None

        def never(_: Any) -> torch.Tensor:
            raise OffloadError(f"{self.name}: backward was called inside a forward that is being recomputed")

        args, kwargs = self._inputs()
        mode: Any = contextlib.nullcontext()
        if self._store_attention:
            mode = _AroundAttention(_ReplayAttention(self._attention, self._unpack, self.name))
        with (
            self._surroundings.again(),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(fill, never),
            mode,
            contextlib.suppress(_Complete),
        ):
            self._function(*args, **kwargs)
        if filled < len(self._holes):
            raise _differs(self.name, f"only {filled} of {len(self._holes)} tensors were saved")

    def _inputs(self) -> tuple[Any, Any]:
        leaves = list(self._leaves)
        for index, needs_grad in self._needs_grad.items():
            tensor = self._unpack(leaves[index])
            leaves[index] = tensor.detach().requires_grad_(needs_grad)
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return args, kwargs


def _dropout(func: Any, args: Any, kwargs: Any) -> float:
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            if argument.name in kwargs:
                return float(kwargs["dropout_p"])
            return float(args[position]) if position < len(args) else float(argument.default_value or 0.0)
    return 0.0


def _differs(name: str, how: str) -> OffloadError:
    return OffloadError(
        f"{name}: computing the block again went another way than its forward ({how}); it depends on "
        f"something beside its arguments and the random number generator: exclude recompute for it"
    )
