"""memtrain's own optimizers by name, and one of them over the parameters of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from memtrain.planner.grid_bytes import GridSettings, parameter_bytes
from memtrain.planner.optimizer_bytes import ParameterSpec
from memtrain.planner.refresh_bytes import projection_flops, refresh_workspace_bytes

DEFAULT_UPDATE_GAP = 200

NAMED: dict[str, dict[str, Any]] = {
    "adamw-8bit": {"state_dtype": "int8"},
    "galore": {"projection": "power"},
    "natural-galore": {"projection": "power", "history": 20},
    "frugal": {"projection": "power", "residual": "sign", "density": 0.25},
    "fira": {"projection": "power", "residual": "scaled"},
    "apollo": {"projection": "gaussian", "residual": "scale_only"},
    "apollo-mini": {"projection": "gaussian", "residual": "scale_only", "rank": 1},
}
"""What a name stands for; those without rank and density need to be given one. ``adamw`` is torch's, of
``optimizer_bytes``."""
_FIELDS = tuple(each.name for each in dataclasses.fields(GridSettings))


def named_settings(name: str, **arguments: Any) -> GridSettings:
    """The settings of a named optimizer with fields of :class:`GridSettings` changed.

    Raises:
        ValueError: an unknown name or field, or a value out of range.
    """
    if name not in NAMED:
        raise ValueError(f"optimizer must be one of {', '.join(NAMED)}, got {name!r}")
    if unknown := [key for key in arguments if key not in _FIELDS]:
        raise ValueError(f"{name} has no {unknown[0]!r}: there are {', '.join(_FIELDS)}")
    settings = {**NAMED[name], **arguments}
    if "rank" in arguments and "density" not in arguments:
        settings["density"] = None
    if settings.get("projection") == "random":
        settings["projection"] = "gaussian"  # APOLLO's name for it
    return GridSettings(**settings)


@dataclass(frozen=True, kw_only=True, slots=True)
class GridRule:
    """A grid optimizer over a model, as a ``StateRule`` of ``optimizer_bytes``."""

    value: str
    """As it was written: ``galore(rank=128)``."""
    settings: GridSettings
    projected: Mapping[str, int] = field(default_factory=dict)
    """By name: in how many fused matrices a parameter is projected. Others are whole."""
    update_gap: int = DEFAULT_UPDATE_GAP

    def state_of(self, parameter: ParameterSpec) -> tuple[int, int]:
        """Bytes of moments, basis and counters, and of the master."""
        settings, split = self._of(parameter)
        width = parameter.element_bytes
        found = parameter_bytes(parameter.shape, settings, split=split, element_bytes=width)
        return found.total - found.master, found.master

    def flops_of(self, parameter: ParameterSpec) -> float:
        """Of one step's projection."""
        settings, split = self._of(parameter)
        return projection_flops(parameter.shape, settings, update_gap=self.update_gap, split=split)

    def workspace_of(self, parameter: ParameterSpec) -> int:
        """While its first basis is made, which takes most, beside gradient and what is kept."""
        settings, split = self._of(parameter)
        width = parameter.element_bytes
        return refresh_workspace_bytes(
            parameter.shape, settings, split=split, element_bytes=width, first=True
        )

    def _of(self, parameter: ParameterSpec) -> tuple[GridSettings, int]:
        split = self.projected.get(parameter.name)
        if split is None:
            return dataclasses.replace(self.settings, projection=None), 1
        return self.settings, split
