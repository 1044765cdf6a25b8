"""Memory that MKL keeps for its own products, by thread.

A matrix product packs its operands into buffers, and keeps them for the next product of the same thread
until that thread ends: 8.2 MiB with two cores. Another thread that multiplies has as much again, though one
of the two may only be waiting.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch


def kept_bytes() -> int:
    """What MKL keeps now for all threads; 0 where torch was built without it."""
    statistics = _mkl("mkl_serv_mem_stat")
    return 0 if statistics is None else int(statistics(ctypes.byref(ctypes.c_int())))


def give_back() -> None:
    """Have MKL free what no product that is under way uses, of all threads. The next product asks again."""
    free = _mkl("mkl_serv_free_buffers")
    if free is not None:
        free()


@cache
def _mkl(name: str) -> Callable[..., int] | None:
    """A function of the MKL that torch was built with, or links to."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        function = getattr(ctypes.CDLL(str(library)), name)
    except (AttributeError, OSError):
        return None
    function.restype = ctypes.c_longlong
    found: Callable[..., int] = function
    return found
