"""``planned.cpp`` as Python sees it: compiled when first asked for, and kept (``optim.kernels.native``).

The library is linked against the torch that is installed and uses the headers that came with it, so its name
in the cache carries torch's version. One g++ call of two seconds, once a machine and torch.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import torch

from memtrain.optim.kernels import native

_SOURCE = Path(__file__).parent / "planned.cpp"
_TORCH = Path(torch.__file__).parent


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
        *"-std=c++17 -O2 -fPIC -shared -Wl,--no-as-needed".split(),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f'-DMEMTRAIN_TORCH_VERSION="{torch.__version__}"',  # for the name in the cache
        f"-I{_TORCH / 'include'}",
        str(_TORCH / "lib" / "libc10.so"),
    ]


@functools.cache
def load() -> ctypes.CDLL:
    """The library, with its allocator in torch's place for the CPU.

    Raises:
        native.FAILURES: it cannot be compiled or loaded, or another allocator has taken the place.
    """
    library = native.load(_SOURCE, _flags())
    handle, count = ctypes.c_void_p, ctypes.c_uint64
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "install": (ctypes.c_int, []),
        "new": (handle, [count, count, ctypes.c_int]),
        "delete": (None, [handle]),
        "map": (ctypes.c_int, [handle, count]),
        "record": (ctypes.c_int, [handle]),
        "replay": (ctypes.c_int, [handle, ctypes.POINTER(Request), count]),
        "end_record": (count, [handle]),
        "recorded": (None, [handle, ctypes.POINTER(count), ctypes.POINTER(ctypes.c_int64)]),
        "end_replay": (None, [handle, ctypes.POINTER(Outcome)]),
    }
    for name, (result, arguments) in signatures.items():
        entry = getattr(library, f"memtrain_arena_{name}")
        entry.restype, entry.argtypes = result, arguments
    if error := library.memtrain_arena_install():
        raise OSError(error, f"torch's CPU allocator cannot be replaced: {os.strerror(error)}")
    return library
