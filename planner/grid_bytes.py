"""Bytes of the optimizers of ``memtrain.optim``, from the parameters' shapes alone.

What is kept for a parameter ``[..., m, n]`` (E matrices, d the side that is shortened, r the rank):

- moments in the state format: ``fp32`` 4 bytes, ``bf16`` 2, ``int8`` 1 and ``int4`` 1/2 an element with an
  fp32 scale to 128 elements; below 4096 elements a moment stays fp32. Projected, a moment has r instead of d;
- the basis, ``E * d * r`` numbers, where it follows the gradient or is semi-orthogonal; else three words of a
  key (``block``: one);
- the master weights: none, one byte (``split24``) or four (``fp32``);
- counters: the updates, where the next refresh is due, what a lazy schedule remembers, the last norm of each
  matrix where the growth of the update is limited.

While a basis is renewed more is needed for a moment (``refresh_bytes``). The formulas are written down anew,
and compared with the optimizers to the byte by the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

_BLOCK = 128
_LEAST_QUANTISED = 4096
FP32_BYTES, INT64_BYTES = 4, 8
KEY_WORDS = 3
_LAZY_QUEUE = 5
SPECTRAL = ("svd", "eigh", "power")
SEEDED = ("gaussian", "rademacher", "semi_orthogonal")
COORDINATE = ("columns", "rows", "block", "randk")
_FORMATS: dict[str, Callable[[int], int]] = {
    "fp32": lambda n: 4 * n,
    "bf16": lambda n: 2 * n,
    "int8": lambda n: n + 4 * -(-n // _BLOCK),
    "int4": lambda n: -(-n // 2) + 4 * -(-n // _BLOCK),
}
_MASTERS = {"none": 0, "split24": 1, "fp32": 4}
_RESIDUALS = ("none", "sign", "sgd", "scaled", "scale_only")
_LIMITED = ("scaled", "scale_only")
_RULES = ("adam", "adam_mini", "adafactor", "lion", "momentum")


def _check(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class GridSettings:
    """What of an optimizer's settings decides its bytes; ``memtrain.optim.settings`` says what each means.

    Raises:
        ValueError: a value that no optimizer of ours has.
    """

    rule: str = "adam"
    projection: str | None = None
    rank: int | None = None
    density: float | None = None
    side: str = "std"
    basis_dtype: str = "fp32"
    lazy: bool = False
    residual: str = "none"
    limiter: bool = True
    """Whether the growth of the update is limited where ``residual`` is scaled or scale_only."""
    history: int = 0
    """Gradients kept for the natural gradient."""
    state_dtype: str = "fp32"
    master: str = "none"

    def __post_init__(self) -> None:
        _check("rule", self.rule, _RULES)
        _check("state_dtype", self.state_dtype, tuple(_FORMATS))
        _check("master", self.master, tuple(_MASTERS))
        _check("basis_dtype", self.basis_dtype, ("fp32", "bf16"))
        _check("side", self.side, ("std", "reverse_std", "left", "right", "full"))
        _check("residual", self.residual, _RESIDUALS)
        if self.projection is None:
            return
        _check("projection", self.projection, (*SPECTRAL, *SEEDED, *COORDINATE))
        if self.projection in COORDINATE and (self.side != "std" or self.basis_dtype != "fp32"):
            raise ValueError(
                f"{self.projection} chooses its side itself and has no basis to hold: leave out "
                f"side={self.side!r}, basis_dtype={self.basis_dtype!r}"
            )
        if self.lazy and self.projection not in SPECTRAL:
            raise ValueError(
                f"lazy=True asks whether the basis moves, and {self.projection} follows no gradient: use "
                "svd, eigh or power"
            )
        if (self.rank is None) == (self.density is None):
            raise ValueError(
                f"{self.projection} takes either rank or density, got rank={self.rank}, "
                f"density={self.density}: give one of them"
            )
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density must be above 0 and at most 1, got {self.density}")
        if self.projection == "randk" and self.density is None:
            raise ValueError(f"projection randk takes density and no rank, got rank={self.rank}")


@dataclass(frozen=True, kw_only=True, slots=True)
class GridBytes:
    """Of one parameter, or of several together."""

    moments: int = 0
    master: int = 0
    projector: int = 0
    counters: int = 0

    @property
    def total(self) -> int:
        """All four."""
        return self.moments + self.master + self.projector + self.counters

    def __add__(self, other: GridBytes) -> GridBytes:
        return GridBytes(
            moments=self.moments + other.moments,
            master=self.master + other.master,
            projector=self.projector + other.projector,
            counters=self.counters + other.counters,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Low:
    """The projection of one parameter."""

    shape: tuple[int, ...]
    """Of the low-dimensional gradient."""
    rank: int
    sides: tuple[int, ...]
    """The dimensions that have a basis."""


def parameter_bytes(
    shape: tuple[int, ...], settings: GridSettings, *, split: int = 1, element_bytes: int = 4
) -> GridBytes:
    """What is kept for one parameter.

    Args:
        shape: of the parameter.
        settings: with ``projection=None`` for one that is not projected; vectors never are.
        split: fused matrices that are projected each for itself.
        element_bytes: of the weight.

    Raises:
        ValueError: the rank exceeds what the shape has; the master is not for weights of this size.
    """
    if settings.master == "split24" and element_bytes != 2:
        raise ValueError(f"master split24 is for bf16 weights, not for those of {element_bytes} bytes")
    shape = split_shape(shape, split)
    elements = math.prod(shape)
    if not elements:
        return GridBytes()
    counters, projector, worked_on, history = FP32_BYTES, 0, shape, 0
    if settings.projection is not None and len(shape) >= 2:
        low = low_of(shape, settings)
        worked_on, history = low.shape, settings.history
        projector = _projector_bytes(shape, low, settings)
        counters += INT64_BYTES
        if settings.lazy:
            counters += INT64_BYTES + _LAZY_QUEUE * FP32_BYTES
        if settings.limiter and settings.residual in _LIMITED:
            counters += math.prod(shape[:-2]) * FP32_BYTES
    moments = sum(_moment_bytes(n, settings.state_dtype) for n in _moments(worked_on, settings.rule))
    if history:
        moments += _moment_bytes(history * math.prod(worked_on), settings.state_dtype)
    return GridBytes(
        moments=moments,
        master=_MASTERS[settings.master] * elements,
        projector=projector,
        counters=counters,
    )


def split_shape(shape: tuple[int, ...], parts: int) -> tuple[int, ...]:
    """What is worked on: the parameter's shape, or that of the stack it is split into."""
    if parts == 1 or len(shape) < 2:
        return tuple(shape)
    if len(shape) != 2 or shape[0] % parts:
        raise ValueError(f"split={parts} is for matrices whose rows it divides, got shape {shape}")
    return (parts, shape[0] // parts, shape[1])


def _moments(shape: tuple[int, ...], rule: str) -> tuple[int, ...]:
    """Elements of each moment of a gradient of this shape."""
    elements = math.prod(shape)
    if rule == "adam":
        return elements, elements
    if rule == "adam_mini":
        return elements, math.prod(shape[:-1])
    if rule == "adafactor":
        if len(shape) < 2:
            return (elements,)
        return math.prod(shape[:-1]), math.prod(shape[:-2]) * shape[-1]
    return (elements,)


def _moment_bytes(elements: int, state_dtype: str) -> int:
    if elements < _LEAST_QUANTISED and state_dtype in ("int8", "int4"):
        state_dtype = "fp32"
    return _FORMATS[state_dtype](elements)


def low_of(shape: tuple[int, ...], settings: GridSettings) -> Low:
    """The projection of a matrix or a stack. Raises ValueError: the rank exceeds what the shape has."""
    kind = settings.projection
    if len(shape) not in (2, 3):
        raise ValueError(f"{kind} projects matrices and stacks of them, got shape {shape}")
    *batch, m, n = shape
    if kind == "randk":
        size = math.prod(shape)
        return Low(shape=(_size(settings, size, limit=size, shape=shape),), rank=1, sides=())
    if kind in COORDINATE:
        size = n if kind == "columns" else m
        rank = _size(settings, size, limit=size, shape=shape)
        return Low(shape=(*batch, m, rank) if kind == "columns" else (*batch, rank, n), rank=rank, sides=())
    left = {"left": True, "right": False, "std": m < n, "reverse_std": m >= n}.get(settings.side)
    sides = (m, n) if left is None else (m,) if left else (n,)
    limit = min(m, n) if kind in SPECTRAL else min(sides)
    rank = _size(settings, min(sides), limit=limit, shape=shape)
    rows, columns = (m if left is False else rank), (n if left is True else rank)
    return Low(shape=(*batch, rows, columns), rank=rank, sides=sides)


def _size(settings: GridSettings, dimension: int, *, limit: int, shape: tuple[int, ...]) -> int:
    if settings.density is not None:
        return min(max(1, round(settings.density * dimension)), limit)
    assert settings.rank is not None
    if settings.rank > limit:
        raise ValueError(
            f"rank {settings.rank} exceeds {limit}, the most that {settings.projection} has for shape {shape}"
        )
    return settings.rank


def _projector_bytes(shape: tuple[int, ...], low: Low, settings: GridSettings) -> int:
    if settings.projection == "block":
        return INT64_BYTES
    if settings.projection not in (*SPECTRAL, "semi_orthogonal"):
        return KEY_WORDS * INT64_BYTES
    width = 2 if settings.basis_dtype == "bf16" else 4
    return math.prod(shape[:-2]) * sum(low.sides) * low.rank * width
