"""Kernels run in Triton's interpreter here, on CPU tensors (``TRITON_INTERPRET``: tests/conftest.py)."""

from typing import Any

import pytest


@pytest.fixture
def bf16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """``tl.dot`` of bf16 operands in the interpreter, which in Triton 3.7.1 multiplies their bit patterns as
    integers: widen them first."""
    pytest.importorskip("triton")
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    plain = interpreter.InterpreterBuilder.create_dot

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
