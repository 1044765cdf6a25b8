"""The optimizers that ``quality.py`` compares, and the learning rates that are tried of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from memtrain.optim import named

DENSITY = 0.25
"""Of every projection: a quarter of the shorter side, as in the papers."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One optimizer as it is compared."""

    optimizer: Callable[..., Any]
    rates: tuple[float, ...]
    """Tried with the first seed; the best is run with the others."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the matrices under test, beside density and gap."""
    others: dict[str, Any] = field(default_factory=dict)
    """Of everything else."""
    projects: bool = True

    def projected(self, update_gap: int) -> dict[str, Any]:
        """Settings of the groups of matrices."""
        if not self.projects:
            return dict(self.settings)
        return {"density": DENSITY, "update_gap": update_gap, **self.settings}

    def make(self, groups: list[dict[str, Any]], lr: float, *, master: str) -> Any:
        """The optimizer, without weight decay: it would differ between orders of decay."""
        return self.optimizer(groups, lr=lr, weight_decay=0.0, master=master)


ADAM_RATES = (5e-4, 1e-3, 2e-3)
LOW_RANK_RATES = (4e-3, 1e-2, 2e-2)

METHODS = {
    "adamw": Method(optimizer=named.AdamW, rates=ADAM_RATES, projects=False),
    "adamw 8-bit": Method(optimizer=named.AdamW8bit, rates=ADAM_RATES, projects=False),
    "galore keep": Method(optimizer=named.GaLore, rates=LOW_RANK_RATES, settings={"refresh": "keep"}),
    "galore rotate": Method(optimizer=named.GaLore, rates=LOW_RANK_RATES, settings={"refresh": "rotate"}),
    "natural galore": Method(optimizer=named.NaturalGaLore, rates=LOW_RANK_RATES),
    "frugal columns": Method(optimizer=named.FRUGAL, rates=ADAM_RATES, settings={"projection": "columns"}),
    "frugal power": Method(optimizer=named.FRUGAL, rates=(1e-3, 2e-3, 4e-3)),
    "fira": Method(optimizer=named.Fira, rates=LOW_RANK_RATES),
    "apollo": Method(optimizer=named.Apollo, rates=(1e-2, 2e-2, 4e-2)),
}
