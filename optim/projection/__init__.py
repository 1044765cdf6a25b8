"""Projectors: ten ways from a gradient to its low-dimensional part and back."""

from memtrain.optim.projection.base import Overlap, ProjectionError, Projector, Stored
from memtrain.optim.projection.config import COORDINATE, RANDOM, SPECTRAL, Projection
from memtrain.optim.projection.workspace import Workspace

__all__ = [
    "COORDINATE",
    "RANDOM",
    "SPECTRAL",
    "Overlap",
    "Projection",
    "ProjectionError",
    "Projector",
    "Stored",
    "Workspace",
]
