"""``OffloadedGrad``: a gradient without storage that stands in ``param.grad`` while its bytes are on a tier.

Autograd accumulates into it, ``clip_grad_norm_`` takes its norm and scales it, ``zero_grad`` clears it: these
are done exactly. Scalings are remembered and applied, in order and by the very same operator, when the bytes
are next read. Everything else raises and names the way out, ``materialize()``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from memtrain.offload.errors import OffloadError, UnsupportedGradientOperation

aten = torch.ops.aten
Fingerprint = tuple[int, ...]


class StaleGradientError(OffloadError):
    """The gradient that a handle stood for has been replaced by a newer one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaling:
    """An in-place multiplication or division by a scalar that waits for the bytes."""

    operator: Callable[..., Any]
    """The one that was called: a foreach form rounds a scalar otherwise than the plain one (bf16)."""
    operand: Any
    foreach: bool = False

    def apply(self, tensor: Tensor) -> None:
        """Do it to ``tensor``, in the tensor's own dtype as PyTorch would."""
        if self.operator is aten._amp_foreach_non_finite_check_and_unscale_.default:
            self.operator([tensor], torch.zeros(1, device=tensor.device), self.operand)
        elif self.foreach:
            self.operator([tensor], self.operand)
        else:
            self.operator(tensor, self.operand)


class Home(Protocol):
    """What keeps a gradient's bytes: ``gradients.OffloadedGradient``."""

    name: str
    identity: int

    def accumulate(self, incoming: Tensor, alpha: Any, fingerprint: Fingerprint) -> None: ...
    def scale(self, scaling: Scaling) -> None: ...
    def zero(self) -> None: ...
    def norm(self, order: float, dtype: torch.dtype | None) -> Tensor: ...
    def finite(self) -> bool: ...
    def materialize(self) -> Tensor: ...


class OffloadedGrad(Tensor):
    """Shape, dtype and device of a gradient whose bytes are elsewhere."""

    home: Home
    identity: int

    @staticmethod
    def __new__(cls, like: Tensor, home: Home) -> OffloadedGrad:
        handle = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        handle.home = home
        handle.identity = home.identity
        return handle

    def __init__(self, like: Tensor, home: Home) -> None:
        super().__init__()

    def materialize(self) -> Tensor:
        """An ordinary tensor with this gradient's values. Assign it to ``param.grad`` to work on it.

        Raises:
            StaleGradientError: a newer gradient has taken its place.
        """
        return self._live().materialize()

    def finite(self) -> bool:
        """Whether every element is finite, known without reading the bytes."""
        return self._live().finite()

    def _live(self) -> Home:
        if self.identity != self.home.identity:
            raise StaleGradientError(
                f"this handle stood for gradient {self.identity} of {self.home.name}, which was replaced by "
                f"gradient "
                f"{self.home.identity}: read param.grad again"
            )
        return self.home

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        stale = ", stale" if self.identity != self.home.identity else ""
        return f"OffloadedGrad({self.home.name}, shape={tuple(self.shape)}, dtype={self.dtype}{stale})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialize().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _ELEMENT_CHECKS:
            return func(*[_real(arg) for arg in args], **(kwargs or {}))
        # The default would dress results, such as norms, as gradients.
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is aten.add_.Tensor and isinstance(args[0], OffloadedGrad):
            # Counted before anything here takes another reference: see gradients.exclusive_fingerprints.
            fingerprint = fingerprint_of(args)
            args[0]._live().accumulate(args[1], (kwargs or {}).get("alpha", 1), fingerprint)
            return args[0]
        handler = _HANDLERS.get(func)
        if handler is None:
            raise unsupported(func, args)
        return handler(func, *args, **(kwargs or {}))


def fingerprint_of(args: tuple[Any, ...]) -> Fingerprint:
    """How often the incoming gradient ``args[1]``, its storage and its base are referenced.

    Equal to that of a gradient known to have no other owner, it means that nobody else sees the memory.
    """
    incoming = args[1]
    if type(incoming) is not Tensor:
        return ()
    base = incoming._base
    return (
        incoming._use_count(),
        torch._C._storage_Use_Count(incoming.untyped_storage()._cdata),
        sys.getrefcount(incoming),
        *(() if base is None else (base._use_count(), sys.getrefcount(base))),
    )


def unsupported(func: Any, args: Sequence[Any]) -> UnsupportedGradientOperation:
    """The error for an operator that needs the bytes."""
    names = sorted({handle.home.name for handle in _handles(args)})
    return UnsupportedGradientOperation(
        f"{func} on the offloaded gradient of {', '.join(names)} cannot be done without its bytes: call "
        f"param.grad.materialize() and assign the result to param.grad, or keep this unit's gradients on "
        f"the device"
    )


def _handles(args: Any) -> list[OffloadedGrad]:
    if isinstance(args, OffloadedGrad):
        return [args]
    return [handle for arg in args for handle in _handles(arg)] if isinstance(args, (list, tuple)) else []


def _real(value: Any) -> Any:
    return value.materialize() if isinstance(value, OffloadedGrad) else value


def _detach(func: Any, handle: OffloadedGrad) -> OffloadedGrad:
    alias = OffloadedGrad(handle, handle.home)
    alias.identity = handle.identity
    return alias


def _scale(func: Any, handle: OffloadedGrad, operand: Any) -> OffloadedGrad:
    if not isinstance(handle, OffloadedGrad):
        raise unsupported(func, (operand,))
    _remember(func, handle, operand, foreach=False)
    return handle


def _foreach_scale(func: Any, tensors: list[Tensor], operand: Any) -> None:
    several = isinstance(operand, (list, tuple))
    for number, tensor in enumerate(tensors):
        own = [operand[number]] if several else operand
        if isinstance(tensor, OffloadedGrad):
            _remember(func, tensor, own, foreach=True)
        else:
            func([tensor], own)


def _remember(func: Any, handle: OffloadedGrad, operand: Any, *, foreach: bool) -> None:
    if isinstance(operand, Tensor):
        if operand.dim() != 0 or isinstance(operand, OffloadedGrad):
            raise unsupported(func, (handle, operand))
        operand = operand.detach().clone()  # it may change before the bytes are read
    handle._live().scale(Scaling(operator=func, operand=operand, foreach=foreach))


def _zero(func: Any, handle: OffloadedGrad) -> OffloadedGrad:
    handle._live().zero()
    return handle


def _vector_norm(
    func: Any, handle: Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Tensor:
    if not isinstance(handle, OffloadedGrad) or (dim is not None and len(dim) > 0) or keepdim:
        raise unsupported(func, (handle,))
    if float(ord) not in (2.0, float("inf")):
        raise UnsupportedGradientOperation(
            f"{func} of order {ord} on the offloaded gradient of {handle.home.name}: orders 2 and inf are "
            f"known "
            f"without its bytes; for another, use param.grad.materialize()"
        )
    return handle._live().norm(float(ord), dtype)


def _foreach_norm(func: Any, tensors: list[Tensor], ord: float = 2, dtype: Any = None) -> list[Tensor]:
    return [
        _vector_norm(func, tensor, ord, dtype=dtype)
        if isinstance(tensor, OffloadedGrad)
        else torch.linalg.vector_norm(tensor, ord, dtype=dtype)
        for tensor in tensors
    ]


def _foreach_zero(func: Any, tensors: list[Tensor]) -> None:
    for tensor in tensors:
        tensor.zero_()


def _unscale(func: Any, tensors: list[Tensor], found_inf: Tensor, inverse_scale: Tensor) -> None:
    """GradScaler's check: every element is looked at before it is scaled."""
    ordinary = [tensor for tensor in tensors if not isinstance(tensor, OffloadedGrad)]
    if ordinary:
        func(ordinary, found_inf, inverse_scale)
    for handle in _handles(tensors):
        home = handle._live()
        if not home.finite():
            found_inf.fill_(1.0)
        home.scale(Scaling(operator=func, operand=inverse_scale.detach().clone()))


def _copy(func: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if isinstance(target, OffloadedGrad):
        raise unsupported(func, (target, source))
    return target.copy_(_real(source))


def _clone(func: Any, handle: OffloadedGrad, **kwargs: Any) -> Any:
    return func(handle.materialize(), **kwargs)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _detach,
    aten.alias.default: _detach,
    aten.mul_.Tensor: _scale,
    aten.mul_.Scalar: _scale,
    aten.div_.Tensor: _scale,
    aten.div_.Scalar: _scale,
    aten._foreach_mul_.Scalar: _foreach_scale,
    aten._foreach_mul_.ScalarList: _foreach_scale,
    aten._foreach_mul_.Tensor: _foreach_scale,
    aten._foreach_div_.Scalar: _foreach_scale,
    aten._foreach_div_.ScalarList: _foreach_scale,
    aten._foreach_div_.Tensor: _foreach_scale,
    aten.zero_.default: _zero,
    aten._foreach_zero_.default: _foreach_zero,
    aten.linalg_vector_norm.default: _vector_norm,
    aten._foreach_norm.Scalar: _foreach_norm,
    aten._amp_foreach_non_finite_check_and_unscale_.default: _unscale,
    aten.copy_.default: _copy,
    aten.clone.default: _clone,
    aten._to_copy.default: _clone,
}
_ELEMENT_CHECKS = frozenset(
    {torch.isfinite, torch.isnan, torch.isinf, Tensor.isfinite, Tensor.isnan, Tensor.isinf}
)
