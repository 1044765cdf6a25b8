"""Memory and arithmetic that the basis of a grid optimizer takes beside what ``grid_bytes`` counts.

While a basis is renewed its decomposition needs memory: tensors, which are counted exactly, and the insides
of LAPACK, for which its own formulas give an upper estimate (geqrf and orgqr for QR, syevd, gesdd with
economical vectors). Index letters: E matrices of m rows and n columns, d the shortened side, r the rank.
"""

from __future__ import annotations

import math

from memtrain.planner.grid_bytes import (
    COORDINATE,
    FP32_BYTES,
    INT64_BYTES,
    KEY_WORDS,
    SPECTRAL,
    GridSettings,
    low_of,
    split_shape,
)

_DRAWN_BYTES = 20
"""An element, at the peak of drawing normal numbers: an int64 index, int32 words and masks."""


def refresh_workspace_bytes(
    shape: tuple[int, ...],
    settings: GridSettings,
    *,
    split: int = 1,
    element_bytes: int = 4,
    first: bool = False,
) -> int:
    """The peak of one refresh above gradient and state.

    Args:
        element_bytes: of the gradient.
        first: there is no basis yet to start from.
    """
    shape = split_shape(shape, split)
    kind = settings.projection
    if kind is None or len(shape) < 2 or not math.prod(shape) or kind == "block":
        return 0
    if kind in COORDINATE or kind in ("gaussian", "rademacher"):
        return KEY_WORDS * INT64_BYTES
    low = low_of(shape, settings)
    *batch, m, n = shape
    matrices, r, d = math.prod(batch), low.rank, max(low.sides)
    if kind == "semi_orthogonal":
        decomposed = (2 * d * r + r * r) * matrices * FP32_BYTES  # the argument, Q and R
        return max(_drawn(d * r * matrices), decomposed) + _qr(d, r)
    item_bytes = _item_bytes(settings) if kind == "power" else FP32_BYTES
    # The gradient in the dtype that the products run in.
    copied = 0 if element_bytes == item_bytes else m * n * item_bytes * matrices
    if kind == "svd":
        # U, the values, V; inside, 4 k^2 + 7 k, a copy, and one more of a tall matrix.
        k = min(m, n)
        inside = m * n * (2 if m > n else 1) + 4 * k * k + 7 * k
        return copied + (k * (m + n + 1) * matrices + inside) * FP32_BYTES
    if kind == "eigh":
        # The Gram matrix, vectors, values; inside, 2 d^2 + 6 d + 1.
        return copied + ((2 * d * d + d) * matrices + 2 * d * d + 6 * d + 1) * FP32_BYTES
    needed = matrices * max(_power_bytes(side, m + n - side, r, item_bytes, first) for side in low.sides)
    if first:
        needed = max(needed, _drawn(matrices * max(m + n - side for side in low.sides) * r))
    return copied + needed + _qr(d, r)


def _item_bytes(settings: GridSettings) -> int:
    return FP32_BYTES if settings.basis_dtype == "fp32" else FP32_BYTES // 2


def _power_bytes(d: int, other: int, r: int, item_bytes: int, first: bool) -> int:
    """One power iteration; the first of all starts from a random tensor of its own."""
    decomposing = _orthonormal_elements(d, r) * FP32_BYTES
    multiplying = (other + d) * r * item_bytes
    widening = d * r * (item_bytes + FP32_BYTES) if item_bytes != FP32_BYTES else 0
    basis = max(d, other) * r * item_bytes if first else 0
    return basis + max(decomposing, multiplying, widening)


def _orthonormal_elements(d: int, r: int) -> int:
    """CholeskyQR2: argument, Q of the first pass, Gram matrix, factor, scale as vector and matrix, inverse,
    and two numbers."""
    return 2 * d * r + 4 * r * r + r + 2


def _qr(d: int, r: int) -> int:
    """Inside Householder's QR, to which dependent columns go."""
    return d * r // 3 * FP32_BYTES


def _drawn(elements: int) -> int:
    """Normal numbers are drawn in pairs."""
    return _DRAWN_BYTES * 2 * -(-elements // 2)


def projection_flops(
    shape: tuple[int, ...], settings: GridSettings, *, update_gap: int, split: int = 1
) -> float:
    """Of the products with the basis in one step, and of a power iteration every ``update_gap`` steps.

    Down and up; twice up where a residual is taken; only down where the gradient itself is scaled. The QR
    decomposition, ``O(d r^2)`` once a refresh, is left out. A coordinate projection only gathers.
    """
    shape = split_shape(shape, split)
    if settings.projection is None or settings.projection in COORDINATE or len(shape) < 2:
        return 0.0
    one = 2.0 * math.prod(shape) * low_of(shape, settings).rank
    products = {"none": 2, "scale_only": 1}.get(settings.residual, 3)
    refresh = 2 if settings.projection in SPECTRAL else 0
    return one * (products + refresh / update_gap)
