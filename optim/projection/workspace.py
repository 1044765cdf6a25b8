"""Bytes that a refresh allocates and frees again, for a plan to count on.

What torch's dispatcher sees is counted exactly. What kernels ask the allocator for inside, copies in column
order and LAPACK's workspaces, is an upper estimate from LAPACK's own formulas, beside what a process of one
thread was seen to grow by with the decomposition (m x n, k the smaller, MKL, fp32, in units of m n):

    svd  1536 x 1536   estimate 5.0   grew 4.5        qr  4096 x 1024   estimate .33   grew .29
    svd  2048 x 768             3.5        3.3        qr  4096 x 512             .33        .29
    svd  768 x 2048             2.5        2.4        eigh  1536                 2.0        2.4
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_ITEM_BYTES = torch.float32.itemsize
DRAW_BYTES = 20
"""An element, at the peak of drawing normal numbers: an int64 index and int32 words and masks."""


@dataclass(frozen=True, kw_only=True)
class Workspace:
    """The peak of one refresh above gradient and state."""

    tensor_bytes: int
    """Tensors alive at one time."""
    library_bytes: int = 0
    """Inside decompositions, beside their results; an upper estimate."""

    @property
    def bytes(self) -> int:
        """Both."""
        return self.tensor_bytes + self.library_bytes


def svd_library_bytes(m: int, n: int) -> int:
    """gesdd with the economical vectors: 4 k^2 + 7 k, a copy, and one more of a tall matrix."""
    k = min(m, n)
    return (m * n * (2 if m > n else 1) + 4 * k * k + 7 * k) * _ITEM_BYTES


def eigh_library_bytes(d: int) -> int:
    """syevd with vectors: 2 d^2 + 6 d + 1."""
    return (2 * d * d + 6 * d + 1) * _ITEM_BYTES


def qr_library_bytes(d: int, r: int) -> int:
    """geqrf and orgqr, blocked."""
    return d * r // 3 * _ITEM_BYTES


def draw_bytes(elements: int) -> int:
    """Normal numbers are drawn in pairs."""
    return DRAW_BYTES * 2 * -(-elements // 2)
