"""Compile every kernel ahead of time for GPUs that need not be there, and say what came out.

A kernel module describes its kernels in ``SPECS``; ``all_specs`` finds them. ``compile_variant`` runs
Triton's own compiler down to the binary of sm_80 (A100), sm_90 (H100) and sm_100 (B200) and reads registers
and spills from the very run of ptxas that made it (``ptxas -v``, which Triton always asks for), and shared
and tensor memory from Triton's metadata: Triton takes both dynamically at launch, where ptxas does not see
them. Nothing is taken from or put into Triton's cache.

Traffic: ``KernelVariant.moved_bytes`` and ``least_bytes`` are per element (``KernelSpec.element`` says of
what). The tests count what the kernel's code moves in Triton's interpreter (tests/optim/kernels/traffic.py)
and compare it with ``moved_bytes``.

Loads and stores are counted as often as the code asks for them, with one exception: of a product's
operands, and of small ones that every block reads (a norm's weight, a table), each byte counts once a
launch. Further reads of it are taken from the L2 cache; whether they are is a question of speed.

Speed is neither measured nor claimed here.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import pkgutil
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from memtrain.optim.kernels.lazy import TritonKernel, require_triton

TARGETS = (80, 90, 100)
"""Compute capabilities, as in sm_80: A100, H100, B200."""
SHARED_LIMIT_BYTES: Mapping[int, int] = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Shared memory that one block may take (CUDA C++ Programming Guide, technical specifications per compute
capability)."""
_POINTER_ALIGNMENT = 16  # what torch's allocator guarantees, and what Triton specialises a launch on


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelVariant:
    """One compilation of a kernel: the types of its arguments, its constants, its launch options."""

    label: str
    """What is special about it, usually the dtype: ``bf16``."""
    signature: Mapping[str, str]
    """Type of every run-time argument, as Triton writes them: ``*bf16`` (a pointer), ``i32``, ``fp32``. A
    suffix ``:16`` says that the value is divisible by 16, as a launch finds out by itself; pointers always
    are."""
    constexprs: Mapping[str, int | float | bool | str | None] = field(default_factory=dict)
    """Values of the ``constexpr`` arguments."""
    moved_bytes: float
    """Bytes read and written per element, as the code does it."""
    least_bytes: float
    """Bytes that anything which does the same must move per element."""
    num_warps: int = 4
    num_stages: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.least_bytes <= self.moved_bytes:
            raise ValueError(
                f"{self.label}: moved_bytes must be >= least_bytes > 0, "
                f"got {self.moved_bytes} and {self.least_bytes}"
            )
        if self.num_warps not in (1, 2, 4, 8, 16, 32):
            raise ValueError(f"{self.label}: num_warps must be a power of two up to 32, got {self.num_warps}")

    @property
    def bytes_ratio(self) -> float:
        """Bytes moved over the least possible."""
        return self.moved_bytes / self.least_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelSpec:
    """A kernel and the variants of it that are compiled ahead of time."""

    kernel: TritonKernel
    element: str
    """What traffic is counted per: ``element of x``, ``parameter``."""
    variants: Sequence[KernelVariant]

    def __post_init__(self) -> None:
        expected = set(self.kernel.argument_names)
        for variant in self.variants:
            given = [*variant.signature, *variant.constexprs]
            if len(given) != len(set(given)) or set(given) != expected:
                raise ValueError(
                    f"{self.kernel.name} {variant.label}: signature and constexprs must name every argument "
                    f"once; missing {sorted(expected - set(given))}, unknown {sorted(set(given) - expected)}"
                )

    @property
    def name(self) -> str:
        """The kernel's name without the underscore and suffix of the function."""
        return self.kernel.name.strip("_").removesuffix("_kernel")


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    """What one compilation came to."""

    kernel: str
    variant: str
    capability: int
    registers: int
    """Per thread."""
    spill_bytes: int
    """Stores and loads of registers that did not fit, per thread."""
    stack_bytes: int
    """Stack frame per thread."""
    shared_bytes: int
    """Shared memory per block."""
    tensor_memory_columns: int
    """Blackwell's tensor memory, of 512 columns; 0 elsewhere."""
    num_warps: int
    moved_bytes: float
    least_bytes: float


def all_specs() -> tuple[KernelSpec, ...]:
    """Every kernel of this package, in the order of its modules' names."""
    package = importlib.import_module("memtrain.optim.kernels")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."))
    found: list[KernelSpec] = []
    for name in names:
        found += getattr(importlib.import_module(name), "SPECS", ())
    return tuple(found)


def compile_variant(kernel: TritonKernel, variant: KernelVariant, capability: int) -> Compiled:
    """Compile down to a binary for ``capability`` (80 is sm_80); no GPU is needed.

    Raises:
        MissingTritonError: Triton is not installed.
        RuntimeError: the process runs Triton's interpreter, or ptxas did not say what it did.
    """
    triton = require_triton()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 leaves nothing to compile: unset it and start anew")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        kernel.jit, _full_signature(kernel, variant), dict(variant.constexprs), _divisible(kernel, variant)
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    log = io.StringIO()
    knobs = triton.knobs
    with (
        knobs.cache.scope(),
        knobs.compilation.scope(),
        knobs.nvidia.scope(),
        tempfile.TemporaryDirectory(prefix="memtrain-aot-") as directory,
        contextlib.redirect_stdout(log),
    ):
        knobs.cache.dir = directory
        knobs.compilation.always_compile = True
        knobs.nvidia.dump_ptxas_log = True
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    metadata = binary.metadata
    return Compiled(
        kernel=kernel.name,
        variant=variant.label,
        capability=capability,
        registers=_ptxas_number(r"Used (\d+) registers", log.getvalue()),
        spill_bytes=_ptxas_number(r"(\d+) bytes spill stores", log.getvalue())
        + _ptxas_number(r"(\d+) bytes spill loads", log.getvalue()),
        stack_bytes=_ptxas_number(r"(\d+) bytes stack frame", log.getvalue()),
        shared_bytes=metadata.shared,
        tensor_memory_columns=getattr(metadata, "tmem_size", None) or 0,
        num_warps=metadata.num_warps,
        moved_bytes=variant.moved_bytes,
        least_bytes=variant.least_bytes,
    )


def _full_signature(kernel: TritonKernel, variant: KernelVariant) -> dict[str, str]:
    return {
        name: "constexpr" if name in variant.constexprs else variant.signature[name].partition(":")[0]
        for name in kernel.argument_names
    }


def _divisible(kernel: TritonKernel, variant: KernelVariant) -> dict[tuple[int], list[list[object]]]:
    """Triton's attribute for arguments that are known to be divisible by 16."""
    return {
        (index,): [["tt.divisibility", _POINTER_ALIGNMENT]]
        for index, name in enumerate(kernel.argument_names)
        if (kind := variant.signature.get(name, "")).startswith("*") or kind.endswith(":16")
    }


def _ptxas_number(pattern: str, log: str) -> int:
    """The largest of the numbers that ptxas reports (one per entry and device function)."""
    found = [int(number) for number in re.findall(pattern, log)]
    if not found:
        raise RuntimeError(f"ptxas did not report {pattern!r}; it said:\n{log}")
    return max(found)
