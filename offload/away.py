"""Parameters whose bytes may not be used now: they lie on a tier, or in memory that may pass to others.

Such a parameter keeps its identity, version, gradient, hooks, shape and dtype. While it is away its class is
``AwayParameter``, which answers whatever needs no bytes and raises ``WeightAwayError`` for everything else,
before any operator sees the storage of no bytes that is under it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from memtrain.offload.errors import PlanMismatchError, WeightAwayError

_WHERE = "_memtrain_away"  # key of a parameter's __dict__

_PROPERTIES = (
    "shape dtype device layout ndim requires_grad grad grad_dtype grad_fn is_leaf retains_grad name "
    "output_nr itemsize nbytes is_cpu is_cuda is_meta is_sparse is_sparse_csr is_quantized is_mkldnn "
    "is_nested _version _backward_hooks _post_accumulate_grad_hooks _grad"
).split()
_SETTABLE = "requires_grad grad grad_dtype _backward_hooks _post_accumulate_grad_hooks _grad".split()
_METHODS = (
    "size dim ndimension numel nelement stride element_size storage_offset get_device is_contiguous "
    "is_floating_point is_complex is_signed is_conj is_neg is_inference is_same_size is_pinned _is_view "
    "untyped_storage requires_grad_ register_hook register_post_accumulate_grad_hook new_empty new_zeros "
    "new_ones new_full __hash__ __len__"
).split()
_FUNCTIONS = (
    "numel is_floating_point is_complex is_conj is_neg is_inference is_same_size empty_like zeros_like "
    "ones_like full_like rand_like randn_like"
).split()

_NEEDS_NO_BYTES: frozenset[Any] = frozenset(
    [getattr(Tensor, name).__get__ for name in _PROPERTIES]
    + [getattr(Tensor, name).__set__ for name in _SETTABLE]
    + [getattr(Tensor, name) for name in _METHODS]
    + [getattr(torch, name) for name in _FUNCTIONS]
)

_GIVEN_ITSELF: dict[Any, Any] = {
    Tensor.data.__set__: None,  # type: ignore[attr-defined]
    torch._has_compatible_shallow_copy_type: True,
}
"""What ``module.to`` does with a parameter that ``to`` gave back as it was, and what it is answered."""


class AwayParameter(nn.Parameter):
    """The class of a parameter while it is away. Never made: parameters become it, and stop being it."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.to and _leaves_as_it_is(args[0], args[1:], kwargs or {}):
            return args[0]
        if func in _GIVEN_ITSELF and args[0] is args[1]:
            return _GIVEN_ITSELF[func]
        if func not in _NEEDS_NO_BYTES:
            raise WeightAwayError(_message(args, kwargs or {}, getattr(func, "__name__", str(func))))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Parameter of shape {tuple(self.shape)}, {self.dtype}, {self.__dict__.get(_WHERE, 'away')}"


def _leaves_as_it_is(parameter: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether ``to`` would give the parameter itself: ``module.to(device)`` asks for that where a model is on
    the device already."""
    try:
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    except (TypeError, RuntimeError):  # such as copy=True, which Module.to() never asks for
        return False
    same = device in (None, parameter.device) and dtype in (None, parameter.dtype)
    return same and memory_format is None


def is_away(tensor: object) -> bool:
    """Whether it is a parameter whose bytes may not be used now."""
    return type(tensor) is AwayParameter


def forbid(parameter: nn.Parameter, where: str) -> None:
    """From now on using the parameter's bytes raises WeightAwayError.

    Args:
        where: what the message says of it, such as ``layers.3.weight, which is on nvme: ...``.
    """
    parameter.__dict__[_WHERE] = where
    parameter.__class__ = AwayParameter


def permit(parameter: nn.Parameter) -> None:
    """Make it an ordinary parameter again; its data must be there."""
    parameter.__class__ = nn.Parameter
    parameter.__dict__.pop(_WHERE, None)


def put(parameter: nn.Parameter, data: Tensor) -> None:
    """Let the parameter's data be ``data``, whether or not it may be used; its version stays."""
    used, parameter.__class__ = parameter.__class__, nn.Parameter
    try:
        parameter.data = data
    finally:
        parameter.__class__ = used


def without_bytes(parameter: Tensor, place: torch.device | None = None) -> Tensor:
    """A tensor of the parameter's shape, strides and dtype, on its device or ``place``, whose storage has no
    bytes."""
    place = parameter.device if place is None else place
    empty = torch.empty(0, dtype=parameter.dtype, device=place)
    empty.set_(torch.UntypedStorage(0, device=place), 0, parameter.shape, parameter.stride())
    empty.untyped_storage().resize_(0)  # set_() has made it as large as the shape needs, untouched
    return empty


def born_away(parameter: nn.Parameter, place: torch.device, where: str) -> None:
    """Turn a parameter on the meta device into one of ``place`` that is away; it stays the same object.

    Raises:
        PlanMismatchError: it is not on the meta device.
    """
    if not parameter.is_meta:
        raise PlanMismatchError(f"only a parameter on the meta device can be born away, and {where}")
    made = nn.Parameter(without_bytes(parameter, place), requires_grad=parameter.requires_grad)
    torch.utils.swap_tensors(parameter, made)
    forbid(parameter, where)


def _message(args: tuple[Any, ...], kwargs: Mapping[str, Any], operation: str) -> str:
    found = [*args, *kwargs.values()]
    found += [each for group in found if isinstance(group, (list, tuple)) for each in group]
    where = next((each.__dict__.get(_WHERE, "a parameter is away") for each in found if is_away(each)), "")
    return f"{operation} needs the bytes of {where or 'a parameter that is away'}"
