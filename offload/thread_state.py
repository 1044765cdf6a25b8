"""What torch keeps per thread, taken along: work that another thread does is then the caller's in every bit.

Grad mode, autocast, saved-tensor hooks, modes of dispatch and of functions, the number of threads and context
variables are a thread's own; a new one begins with none of them. Random numbers of the CPU are the process's,
and need nothing.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_Result = TypeVar("_Result")


class ThreadState:
    """The caller's state as it is now.

    Args:
        device: the one that is computed on.
    """

    def __init__(self, device: torch.device) -> None:
        self._autocast = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in {"cpu", device.type}
        }
        self._nesting = torch.autocast_increment_nesting() - 1
        torch.autocast_decrement_nesting()
        self._cache = torch.is_autocast_cache_enabled()
        self._grad = torch.is_grad_enabled()
        self._hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        self._functions = _get_current_function_mode_stack()
        self._dispatches = _get_current_dispatch_mode_stack()
        self._threads = torch.get_num_threads()
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._context = contextvars.copy_context()

    def run(self, work: Callable[[], _Result]) -> _Result:
        """``work()`` under this state, in a thread that was made for it: what cannot be taken back is left.

        Backward runs in this thread too, whatever the device.
        """
        return self._context.copy().run(self._run, work)

    def _run(self, work: Callable[[], _Result]) -> _Result:
        torch.set_num_threads(self._threads)
        torch.set_grad_enabled(self._grad)
        # Not torch.autocast(): leaving that clears a cache of casts that all threads share.
        for _ in range(self._nesting):
            torch.autocast_increment_nesting()
        torch.set_autocast_cache_enabled(self._cache)
        for kind, (enabled, dtype) in self._autocast.items():
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        if self._stream is not None:
            torch.cuda.set_stream(self._stream)
        with torch.autograd.set_multithreading_enabled(False), self._modes():
            return work()

    @contextmanager
    def _modes(self) -> Iterator[None]:
        """Pushed and not entered: entering is the caller's, and may do more (counters begin anew)."""
        pushed: list[Callable[[], Any]] = []
        try:
            for function in self._functions:
                torch._C._push_on_torch_function_stack(function)
                pushed.append(torch._C._pop_torch_function_stack)
            if self._hooks is not None:
                torch._C._autograd._push_saved_tensors_default_hooks(*self._hooks)
                pushed.append(torch._C._autograd._pop_saved_tensors_default_hooks)
            for dispatch in self._dispatches:
                torch._C._push_on_torch_dispatch_stack(dispatch)
                pushed.append(partial(torch._C._pop_torch_dispatch_stack, None))
            yield
        finally:
            for pop in reversed(pushed):
                pop()
