"""The point-wise kernels on a CPU: C++ beside this file, compiled on this machine when first called.

    python -m memtrain.optim.kernels.native        # compiles all of them now

One g++ call a source, 1.5 to 5 s and 100 to 160 MiB, once a machine; a job under a tight memory limit had
better not be the first to call, so ``make setup`` compiles, and ``memtrain.prepare`` and the trainer call
``compile_missing`` before their budget counts. The library is kept in ``$XDG_CACHE_HOME/memtrain/kernels``
(``~/.cache``) under a hash of its sources, flags, compiler and processor. It uses torch's own OpenMP threads,
and as many as ``torch.get_num_threads()`` says. Where there is no compiler, or it fails, a
NativeKernelWarning says so once and the kernels run their plain-torch reference by chunks. Of several
processes one compiles and the others wait for it, where the file system locks directories; elsewhere each
compiles, and replaces the whole library.

Why not torch.compile: an 8-bit AdamW step of 2,048 x 2,048 took 14.4 ms with it against 3.5 ms here (two idle
cores, medians), its first call 10 s, each shape is compiled anew, and it needs the same compiler.

Every call gets raw addresses: operands must be contiguous, on the CPU, and alive until it returns.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memtrain.optim.storage import RandomKey

_SOURCES = Path(__file__).parent / "native"
_FLAGS = "-std=c++17 -O3 -march=native -fopenmp -fPIC -shared".split()
# Otherwise a root or a floor may set errno or trap, and their loops are not vectorised. Infinities, NaN and
# signed zeros keep their meaning: no -ffast-math.
_FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
if platform.machine() == "x86_64":
    _FLAGS.append("-mprefer-vector-width=512")  # gcc's choice is 256 bits where AVX-512 is
_FLAGS_OF = dict.fromkeys(("fused_adamw", "gated", "rms_norm"), ("-ffp-contract=off",))
"""Sources that round where torch's operators do: a fused multiply-add would round once instead of twice."""
_COMPILERS = ("g++", "c++", "clang++")
_TIMEOUT_SECONDS = 300.0
FAILURES = (OSError, RuntimeError, subprocess.SubprocessError)  # RuntimeError: no home
"""What compiling and loading raise; ``remedy`` says what to do."""
_NO_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST)
_NO_LOCKS = (errno.ENOLCK, errno.EBADF, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


Function = Callable[..., None]


class NativeKernelWarning(RuntimeWarning):
    """A CPU kernel could not be compiled or loaded and runs as plain torch, ten to twenty times slower."""


class Values(ctypes.Structure):
    """``struct Values``: numbers that a step reads and writes."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("correction", ctypes.c_void_p),
        ("key_first", ctypes.c_uint32),
        ("key_second", ctypes.c_uint32),
        ("offset", ctypes.c_uint64),
        ("wide", ctypes.c_int32),
    )


class Gradient(ctypes.Structure):
    """``struct Gradient``: numbers that a step reads."""

    _fields_ = (("data", ctypes.c_void_p), ("wide", ctypes.c_int32))


class Adam(ctypes.Structure):
    """``struct Adam``: ``AdamStep.kernel_numbers()``."""

    _fields_ = tuple((name, ctypes.c_float) for name in "keep rate beta1 gain1 beta2 gain2 root eps".split())


class Averages(ctypes.Structure):
    """``struct Averages``: Lion's."""

    _fields_ = tuple((name, ctypes.c_float) for name in "beta1 gain1 beta2 gain2".split())


class Rest(ctypes.Structure):
    """``struct Rest``: an update without a second moment."""

    _fields_ = (("keep", ctypes.c_float), ("lr", ctypes.c_float), ("sign", ctypes.c_int32))


class Up(ctypes.Structure):
    """``struct Up``: of the low-rank optimizers' way up."""

    _fields_ = tuple((name, ctypes.c_float) for name in ("keep", "factor", "residual_factor"))


class Direction(ctypes.Structure):
    """``struct Direction``: of Adam on a low-dimensional gradient."""

    _fields_ = tuple((name, ctypes.c_float) for name in "gain1 beta2 gain2 rate root eps".split())


class Product(ctypes.Structure):
    """``struct Product``: a weight, the basis of its gradient, and room to work in."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "columns", "rank")),
        *((name, ctypes.c_void_p) for name in ("basis", "packed", "scratch")),
        ("scratch_bytes", ctypes.c_int64),
        ("right", ctypes.c_int32),
    )


class Matrix(ctypes.Structure):
    """``struct Matrix``."""

    _fields_ = (("rows", ctypes.c_int64), ("columns", ctypes.c_int64))


class Limit(ctypes.Structure):
    """``struct Limit``: of a norm's growth from step to step."""

    _fields_ = (
        ("channels", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("before", "after", "limiter")),
        ("by_channel", ctypes.c_int32),
        ("rest", ctypes.c_int32),
    )


class Strata(ctypes.Structure):
    """``struct Strata``: which entries ``projection/strata.py`` chooses."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("size", "count", "shift")),
        *((name, ctypes.c_uint32) for name in ("key_first", "key_second")),
    )


_WIDE = (torch.float32,)
_EITHER = (torch.float32, torch.bfloat16)
_CORRECTION = (torch.int8,)


def values(tensor: Tensor, key: RandomKey | None = None, correction: Tensor | None = None) -> Values:
    """A weight or a moment, fp32 or bf16; a bf16 one needs a key or a correction."""
    first, second = key.words() if key else (0, 0)
    return Values(
        _address(tensor, _EITHER),
        None if correction is None else _address(correction, _CORRECTION),
        first,
        second,
        key.offset if key else 0,
        tensor.dtype == torch.float32,
    )


def gradient(tensor: Tensor) -> Gradient:
    """A gradient, fp32 or bf16."""
    return Gradient(_address(tensor, _EITHER), tensor.dtype == torch.float32)


def pointer(tensor: Tensor, *dtypes: torch.dtype) -> ctypes.c_void_p:
    """The address of a contiguous CPU tensor of one of these dtypes; fp32 unless told otherwise."""
    return ctypes.c_void_p(_address(tensor, dtypes or _WIDE))


def flag(value: bool) -> ctypes.c_bool:
    """A truth."""
    return ctypes.c_bool(value)


def real(value: float) -> ctypes.c_float:
    """A number, in fp32."""
    return ctypes.c_float(value)


def count(tensor: Tensor) -> ctypes.c_int64:
    """The number of elements."""
    return ctypes.c_int64(tensor.numel())


def _address(tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> int:
    # C++ would read or write beyond the end of anything else. Raised: ``python -O`` drops assertions.
    if tensor.dtype not in dtypes or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise TypeError(
            f"C++ has contiguous CPU operands of {', '.join(map(str, dtypes))} here, got {tensor.dtype} on "
            f"{tensor.device} with strides {tensor.stride()}: a mistake of memtrain's, please report it"
        )
    return tensor.data_ptr()


def is_plain(*tensors: Tensor) -> bool:
    """Whether these are CPU tensors with memory of their own: no compiler's, no tracer's, no subclass."""
    return not torch.compiler.is_compiling() and all(
        type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu" for tensor in tensors
    )


def function(source: str, name: str) -> Function | None:
    """The C function ``name`` of ``native/<source>.cpp``, or None where it cannot be compiled.

    Arguments are structures, ``pointer`` and ctypes numbers; the number of threads is appended.
    """
    library = _library(source)
    return None if library is None else _entry(library, name)


def available(source: str) -> bool:
    """Whether ``native/<source>.cpp`` is compiled, or could be just now. Says nothing where it could not."""
    try:
        _compiled(source)
    except FAILURES:
        return False
    return True


_caller = threading.local()


@contextmanager
def one_thread() -> Iterator[None]:
    """Kernels that this thread calls inside use no other: for work beside threads that need the processors,
    where a team of OpenMP's would wait for its members by spinning."""
    before, _caller.alone = getattr(_caller, "alone", False), True
    try:
        yield
    finally:
        _caller.alone = before


@functools.cache
def _entry(library: ctypes.CDLL, name: str) -> Function:
    entry, threads = getattr(library, name), torch.get_num_threads
    entry.restype = None

    def call(*arguments: Any) -> None:
        # as a C int, which is what ctypes takes a number for
        entry(*arguments, 1 if getattr(_caller, "alone", False) else threads())

    return call


def serves_exactly(source: str, *operands: Tensor) -> bool:
    """Whether ``operands`` are what a source that rounds as torch does works on: contiguous, on the CPU, all
    fp32 or all bf16; and whether it can be compiled."""
    dtype = operands[0].dtype
    return (
        dtype in (torch.bfloat16, torch.float32)
        and is_plain(*operands)
        and all(tensor.dtype == dtype and tensor.is_contiguous() for tensor in operands)
        and _library(source) is not None
    )


@functools.cache
def _library(source: str) -> ctypes.CDLL | None:
    try:
        return load(_SOURCES / f"{source}.cpp", _flags(source))
    except FAILURES as error:
        warnings.warn(
            f"the CPU kernel {source} could not be compiled or loaded and runs as plain torch, ten to twenty "
            f"times slower; {remedy(error)}",
            NativeKernelWarning,
            stacklevel=4,
        )
        return None


def load(source: Path, flags: Sequence[str]) -> ctypes.CDLL:
    """The shared library that ``flags`` make of a C++ source and the headers beside it, compiled if this
    machine has not compiled these before.

    Raises:
        FAILURES: no compiler, no place to keep the library, or a source that it does not take: ``remedy``.
    """
    path = _library_of(source, flags)
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        # A machine that died, or a disk that was full, may have left half a library.
        path.unlink(missing_ok=True)
        return ctypes.CDLL(str(_library_of(source, flags)))


def remedy(error: Exception) -> str:
    """What to do, and what was said."""
    said = str(getattr(error, "stderr", None) or error).strip()[-500:]
    if isinstance(error, OSError) and error.errno in _NO_PLACE:
        return f"set XDG_CACHE_HOME to a folder that can be written and has room. {said}"
    return f"install g++ or set CXX. {said}"


def _compiled(source: str) -> Path:
    return _library_of(_SOURCES / f"{source}.cpp", _flags(source))


def _library_of(source: Path, flags: Sequence[str]) -> Path:
    compiler, path = _library_path(source, flags)
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _one_at_a_time(path.parent):
            if not path.exists():
                _compile([compiler, *flags, str(source)], path)
    return path


def _library_path(source: Path, flags: Sequence[str]) -> tuple[str, Path]:
    """The compiler, and where what it makes of ``source`` is kept."""
    compiler = next(filter(None, map(shutil.which, filter(None, (os.environ.get("CXX"), *_COMPILERS)))), None)
    if compiler is None:
        raise FileNotFoundError(f"no C++ compiler: looked for $CXX, {', '.join(_COMPILERS)}")
    return compiler, cache_directory() / f"{source.stem}-{_digest(source, flags, compiler)}.so"


def _compile(command: Sequence[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        made = Path(directory) / path.name
        _run([*command, "-o", str(made)], timeout=_TIMEOUT_SECONDS)
        made.replace(path)  # whole or not at all, also where several processes compile


@contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """One process compiles and the others wait; where directories cannot be locked (NFS) nobody waits."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(descriptor)


def _flags(source: str) -> list[str]:
    return [*_FLAGS, *_FLAGS_OF.get(source, ())]


def compile_all() -> list[Path]:
    """The libraries of all sources. Raises what the compiler's failure raises."""
    return [_compiled(source) for source in _names()]


def compile_missing() -> list[str]:
    """Compile what this machine has not compiled yet, and say so on stderr; the names of what was missing.

    For the moment before memory is counted: the compiler is a process of its own, but a memory limit of the
    job's group counts it too. A failure is told when a kernel is first called, as ever.
    """
    try:
        missing = [source for source in _names() if not _is_compiled(source)]
        if missing:
            print(
                f"memtrain: compiling CPU kernels ({', '.join(missing)}), once on this machine; "
                "`python -m memtrain.optim.kernels.native` does it beforehand",
                file=sys.stderr,
                flush=True,
            )
        for source in missing:
            _compiled(source)
    except FAILURES:
        return []
    return missing


def _is_compiled(source: str) -> bool:
    return _library_path(_SOURCES / f"{source}.cpp", _flags(source))[1].exists()


def _names() -> list[str]:
    return [path.stem for path in sorted(_SOURCES.glob("*.cpp"))]


def cache_directory() -> Path:
    """Where compiled kernels are kept."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "memtrain" / "kernels"


def _digest(source: Path, flags: Sequence[str], compiler: str) -> str:
    """Of all that the binary depends on."""
    version = _run([compiler, "--version"], timeout=_TIMEOUT_SECONDS)
    parts = [*flags, compiler, version, _processor()]
    for file in (*sorted(source.parent.glob("*.h")), source):
        parts.append(file.read_text())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _run(command: list[str], *, timeout: float) -> str:
    """What it printed. Compilers quote in the user's language, and Python may be in another."""
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, errors="replace", timeout=timeout
    )
    return done.stdout


def _processor() -> str:
    """Instruction sets of the first core: a cache in a shared home serves machines of different age."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line for line in lines if line.lower().startswith(("flags", "features"))), platform.machine()
    )


def main() -> int:
    """The command line: compile everything; 1 where that fails, with the remedy."""
    try:
        print(*compile_all(), sep="\n")
    except FAILURES as error:
        print(
            f"the CPU kernels were not compiled and will run as plain torch, ten to twenty times slower; "
            f"{remedy(error)}",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
