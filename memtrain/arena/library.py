"""``planned.cpp`` and ``device.cpp`` as Python sees them: compiled when first asked for, and kept
(``optim.kernels.native``).

The one for the CPU is linked against the torch that is installed and uses the headers that came with it, so
its name in the cache carries torch's version. One g++ call of two seconds, once a machine and torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import torch

from memtrain.optim.kernels import native

_HERE = Path(__file__).parent
_TORCH = Path(torch.__file__).parent
_COMMON = "-std=c++17 -O2 -fPIC -shared".split()


class Request(ctypes.Structure):
    """``struct Request``: one of a plan's."""

    _fields_ = (("bytes", ctypes.c_uint64), ("offset", ctypes.c_int64))


class Outcome(ctypes.Structure):
    """``struct Outcome``: how a step went that was to follow a plan."""

    _fields_ = (
        ("kind", ctypes.c_int64),
        *(
            (name, ctypes.c_uint64)
            for name in "request planned actual occupied occupied_request outliving outliving_request".split()
        ),
    )


AS_PLANNED, SIZE, EXTRA, MISSING = range(4)
"""``Outcome.kind``."""


def _flags() -> list[str]:
    return [
        *_COMMON,
        "-Wl,--no-as-needed",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f'-DMEMTRAIN_TORCH_VERSION="{torch.__version__}"',  # for the name in the cache
        f"-I{_TORCH / 'include'}",
        str(_TORCH / "lib" / "libc10.so"),
    ]


_HANDLE, _COUNT = ctypes.c_void_p, ctypes.c_uint64
_ARENA: dict[str, tuple[Any, list[Any]]] = {
    "new": (_HANDLE, [_COUNT, _COUNT, ctypes.c_int]),
    "delete": (None, [_HANDLE]),
    "map": (ctypes.c_int, [_HANDLE, _COUNT]),
    "vacate": (None, [_HANDLE]),
    "vacant": (_COUNT, [_HANDLE]),
    "follows": (ctypes.c_int, [_HANDLE]),
    "requests": (_COUNT, [_HANDLE]),
    "record": (ctypes.c_int, [_HANDLE]),
    "replay": (ctypes.c_int, [_HANDLE, ctypes.POINTER(Request), _COUNT]),
    "end_record": (_COUNT, [_HANDLE]),
    "recorded": (None, [_HANDLE, ctypes.POINTER(_COUNT), ctypes.POINTER(ctypes.c_int64)]),
    "end_replay": (None, [_HANDLE, ctypes.POINTER(Outcome)]),
}
"""What every front end has."""
_DEVICE: dict[str, tuple[Any, list[Any]]] = {
    "alloc": (_HANDLE, [ctypes.c_ssize_t, ctypes.c_int, _HANDLE]),
    "free": (None, [_HANDLE, ctypes.c_ssize_t, ctypes.c_int, _HANDLE]),
    "record_stream": (None, [_HANDLE, _HANDLE]),
    "lingering": (_COUNT, []),
    "settle": (None, []),
    "use": (None, [_HANDLE, _HANDLE]),
}


def _declare(library: ctypes.CDLL, prefix: str, signatures: dict[str, tuple[Any, list[Any]]]) -> None:
    for name, (result, arguments) in signatures.items():
        entry = getattr(library, f"{prefix}_{name}")
        entry.restype, entry.argtypes = result, arguments


@functools.cache
def load() -> ctypes.CDLL:
    """The library, with its allocator in torch's place for the CPU.

    Raises:
        native.FAILURES: it cannot be compiled or loaded, or another allocator has taken the place.
    """
    library = native.load(_HERE / "planned.cpp", _flags())
    _declare(library, "memtrain_arena", {"install": (ctypes.c_int, []), **_ARENA})
    if error := library.memtrain_arena_install():
        raise OSError(error, f"torch's CPU allocator cannot be replaced: {os.strerror(error)}")
    return library


@functools.cache
def load_device() -> ctypes.CDLL:
    """The library for GPUs; nothing is installed. Raises native.FAILURES: it cannot be compiled or loaded."""
    library = native.load(_HERE / "device.cpp", _COMMON)
    _declare(library, "memtrain_arena", _ARENA)
    _declare(library, "memtrain_device", _DEVICE)
    return library


def compile_ahead() -> None:
    """Compile and load now, where there is time and memory; a failure is told when it is used."""
    with contextlib.suppress(*native.FAILURES):
        load()
