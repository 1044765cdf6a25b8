"""How updates are done: what the user of an ``OffloadedOptimizer`` sets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """How updates are done."""

    master_weights: bool = False
    """Keep fp32 masters of bf16 and fp16 weights, and step those with fp32 gradients."""
    nonfinite: str = "ignore"
    """What ``step`` does about NaN or inf gradients: ``ignore`` (as PyTorch), ``skip`` the step, or
    ``raise``."""
    elementwise: bool | None = None
    """Whether the optimizer may be run on flat pieces; None tries it out, and True is refused where a trial
    of any group and dtype says otherwise."""
    split_masters: bool = True
    """Keep no more of a master than what its bf16 weight does not hold, where ``keeps_lower_half`` says that
    it can be: fewer bytes, the same bits; weights that anybody else writes between steps are then refused,
    until ``OffloadedOptimizer.weights_written`` says that they count."""

    def __post_init__(self) -> None:
        if self.nonfinite not in ("ignore", "skip", "raise"):
            raise ValueError(f"nonfinite must be 'ignore', 'skip' or 'raise', got {self.nonfinite!r}")
