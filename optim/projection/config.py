"""Which projection a parameter group asks for, checked, and bound to the shape of a parameter."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch

from memtrain.optim.projection.base import Kind, ProjectionError, Projector

Side = Literal["std", "reverse_std", "left", "right", "full"]
BasisDtype = Literal["fp32", "bf16"]

SPECTRAL = frozenset({"svd", "eigh", "power"})
RANDOM = frozenset({"gaussian", "rademacher", "semi_orthogonal"})
COORDINATE = frozenset({"columns", "rows", "randk", "block"})
BASIS_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Kind, size and side of a projection.

    Raises:
        ProjectionError: a field is out of range, or two fields contradict one another.
    """

    kind: Kind = "power"
    """Spectral (they look at the gradient): ``svd``; ``eigh`` of the Gram matrix; ``power``, one warm power
    iteration and QR. Random, from a seed: ``gaussian``, ``rademacher`` (both only unbiased, not orthonormal),
    ``semi_orthogonal``. Coordinates, from a seed: ``columns``, ``rows``, ``randk`` entries, ``block`` of
    neighbouring rows."""
    rank: int | None = None
    """Of the low-dimensional gradient. Exactly one of rank and density is given."""
    density: float | None = None
    """Instead of rank: the fraction of the shortened dimension (of all entries for randk)."""
    side: Side = "std"
    """Which dimension is shortened: the shorter one (``std``), the longer one (``reverse_std``), rows
    (``left``), columns (``right``), both (``full``). Coordinates choose by their kind and take ``std``."""
    basis_dtype: BasisDtype = "fp32"
    """bf16 halves a stored basis, and the products run in bf16 with fp32 accumulation."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ProjectionError(f"projection {self.kind!r} is unknown: one of {', '.join(get_args(Kind))}")
        if self.side not in get_args(Side):
            raise ProjectionError(f"side {self.side!r} is unknown: one of {', '.join(get_args(Side))}")
        if self.basis_dtype not in BASIS_DTYPES:
            raise ProjectionError(f"basis_dtype {self.basis_dtype!r} is unknown: fp32 or bf16")
        if (self.rank is None) == (self.density is None):
            raise ProjectionError(
                f"projection {self.kind!r} takes either rank or density, got rank={self.rank}, "
                f"density={self.density}: give one of them"
            )
        if self.rank is not None and self.rank < 1:
            raise ProjectionError(f"rank must be at least 1, got {self.rank}")
        if self.density is not None and not 0 < self.density <= 1:
            raise ProjectionError(f"density must be in (0, 1], got {self.density}")
        if self.kind in COORDINATE and self.side != "std":
            raise ProjectionError(
                f"projection {self.kind!r} chooses its side itself, got side={self.side!r}: leave it at 'std'"
            )
        if self.kind in COORDINATE and self.basis_dtype != "fp32":
            raise ProjectionError(f"projection {self.kind!r} has no basis to hold in {self.basis_dtype}")
        if self.kind == "randk" and self.rank is not None:
            raise ProjectionError(f"projection 'randk' takes density and no rank, got rank={self.rank}")

    def bind(self, shape: torch.Size) -> Projector:
        """The projector for a parameter of this shape, ``[m, n]`` or ``[E, m, n]``.

        Raises:
            ProjectionError: the shape has no two last dimensions, or the rank exceeds what it has.
        """
        return _bind(self, torch.Size(shape))

    def size_of(self, dimension: int, *, limit: int, shape: torch.Size) -> int:
        """The rank for a shortened dimension, at most ``limit``."""
        if self.density is not None:
            return min(max(1, round(self.density * dimension)), limit)
        assert self.rank is not None
        if self.rank > limit:
            raise ProjectionError(
                f"rank {self.rank} exceeds {limit}, the most that projection {self.kind!r} with side "
                f"{self.side!r} has for a parameter of shape {tuple(shape)}: give rank <= {limit}, or a "
                "density, or put the parameter into a group of its own"
            )
        return self.rank


@lru_cache(maxsize=4096)
def _bind(projection: Projection, shape: torch.Size) -> Projector:
    from memtrain.optim.projection.coordinates import CoordinateProjector
    from memtrain.optim.projection.random import RandomProjector
    from memtrain.optim.projection.spectral import SpectralProjector

    if len(shape) not in (2, 3):
        raise ProjectionError(
            f"projection {projection.kind!r} is for matrices [m, n] or stacks [E, m, n], got shape "
            f"{tuple(shape)}: put the parameter into a group without projection"
        )
    if projection.kind in COORDINATE:
        return CoordinateProjector(projection, shape)
    if projection.kind in RANDOM:
        return RandomProjector(projection, shape)
    return SpectralProjector(projection, shape)
