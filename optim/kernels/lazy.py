"""Triton kernels whose module can be imported without Triton.

``import memtrain.optim`` must be cheap and must work where Triton is not installed (a CPU build of torch),
but ``triton.jit`` wants Triton when the function is defined. ``triton_kernel`` only remembers the function;
Triton is imported, and put into the function's module as ``tl``, when the kernel is first launched or
compiled:

    from __future__ import annotations

    if TYPE_CHECKING:
        import triton.language as tl

    @triton_kernel
    def _scale_kernel(x_ptr, count, factor, BLOCK: tl.constexpr): ...

    _scale_kernel[grid](x, x.numel(), 2.0, BLOCK=1024)

Device functions that kernels call are decorated alike, also when they come from another module.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


class MissingTritonError(ImportError):
    """A Triton kernel is needed where Triton is not installed."""


def require_triton() -> ModuleType:
    """The module ``triton``. Raises MissingTritonError, which names the extra to install."""
    try:
        import triton
        import triton.language
    except ImportError as error:
        raise MissingTritonError(
            'this needs Triton, which is not installed: pip install "memtrain[kernels]" (Linux only)'
        ) from error
    return triton  # type: ignore[no-any-return]


def takes_triton(tensor: Tensor) -> bool:
    """Whether a public call runs its Triton kernel on ``tensor``. Tests say yes for the interpreter."""
    return tensor.is_cuda and not torch.compiler.is_compiling()


class TritonKernel:
    """A Triton function that is handed to ``triton.jit`` when it is first needed."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    @property
    def name(self) -> str:
        """The function's name, which is also the entry's name in the binary."""
        return self.function.__name__

    @property
    def argument_names(self) -> tuple[str, ...]:
        """Every argument, ``constexpr`` or not, in order; known without Triton."""
        return self.function.__code__.co_varnames[: self.function.__code__.co_argcount]

    @cached_property
    def jit(self) -> Any:
        """What ``triton.jit`` made of it. Raises MissingTritonError."""
        triton = require_triton()
        namespace = self.function.__globals__
        namespace["tl"] = triton.language
        annotations = self.function.__annotations__
        for name, annotation in annotations.items():
            if "constexpr" in str(annotation):  # a string until now: ``tl`` did not exist
                annotations[name] = triton.language.constexpr
        for used in self.function.__code__.co_names:
            helper = namespace.get(used)
            if isinstance(helper, TritonKernel):
                # Triton resolves names in the module of the kernel and knows only its own functions there.
                namespace[used] = helper.jit
        return triton.jit(self.function)

    def __getitem__(self, grid: Any) -> Any:
        """The launcher for ``grid``, as ``kernel[grid](...)``."""
        return self.jit[grid]

    def __call__(self, *arguments: Any) -> Any:
        """Only kernels call device functions, and Triton compiles that call. Raises TypeError."""
        raise TypeError(f"{self.name} runs on a GPU: launch it as {self.name}[grid](...)")


def triton_kernel(function: Callable[..., Any]) -> TritonKernel:
    """Decorator: a Triton kernel, or device function, of a module that does not import Triton."""
    return TritonKernel(function)
