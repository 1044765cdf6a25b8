"""The group codec on a CPU: fp32 and bf16 values to int8 or int4 codes and back, in one pass of C++.

The format, and the plain torch that it is compared with, are ``autograd.group_codec``'s. Passes of torch over
a chunk in the cache took 5 ms for 4 M values in int8 and 20 ms in int4 rounded at random (one core); one pass
that keeps a group in registers takes 1.3 and 2.7 ms in bf16, 2.6 and 3.0 in fp32.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from memtrain.optim.kernels import native

_GROUPS = (64, 128, 256)
_DTYPES = (torch.float32, torch.bfloat16)


class _Format(ctypes.Structure):
    """``struct Format``."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("group", "bits", "random")),
        ("word", ctypes.c_uint32),
    )


def serves(values: Tensor, group: int) -> bool:
    """Whether C++ can encode ``values``, or decode into a tensor like it."""
    fits = group in _GROUPS and values.dtype in _DTYPES and native.is_plain(values)
    return fits and native.function("groups", "encode_groups") is not None


def encode_groups(
    values: Tensor, *, group: int, bits: int, word: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes ``[groups, group * bits / 8]`` (int8, or two in a uint8) and scales ``[groups]`` (bf16).

    Args:
        values: that :func:`serves` says yes to, contiguous.
        word: int32 ``[1]``: round at random by it; None: to the nearest.
    """
    groups = -(-values.numel() // group)
    codes = torch.empty(
        groups, group * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8, device="cpu"
    )
    scales = torch.empty(groups, dtype=torch.bfloat16, device="cpu")
    encode = native.function("groups", "encode_groups")
    assert encode is not None
    form = _Format(group, bits, word is not None, 0 if word is None else int(word) & 0xFFFFFFFF)
    encode(
        native.gradient(values),
        native.pointer(codes, torch.int8, torch.uint8),
        native.pointer(scales, torch.bfloat16),
        native.count(values),
        form,
    )
    return codes, scales


def decode_groups_(values: Tensor, codes: Tensor, scales: Tensor, *, group: int, bits: int) -> None:
    """Write what the codes stand for into ``values``, which :func:`serves` says yes to, contiguous."""
    decode = native.function("groups", "decode_groups")
    assert decode is not None
    decode(
        native.pointer(codes, torch.int8, torch.uint8),
        native.pointer(scales, torch.bfloat16),
        native.gradient(values),
        native.count(values),
        _Format(group, bits, False, 0),
    )
