"""How to plan: limits of the search, and what the planner may choose."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from memtrain.planner.actions import Action, Tier, UpdateSchedule
from memtrain.planner.block_choices import TOKEN_FIELDS, WHOLE_FIELDS, Wish

STATE_FIELDS = ("gradient_tier", "optimizer_tier", "weight_tier")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannerOptions:
    """How to plan: limits of the search, and what may be chosen."""

    time_limit_seconds: float = 10.0
    gap: float = 5e-3
    """Relative distance from the bound at which the search stops: about what a profile's seconds vary by."""
    allow: frozenset[Action] = frozenset(Action)
    force: Mapping[str, Wish] = field(default_factory=dict)
    """Restricts choices: ``{"block": {"action": "swap"}, "block.3": {"action": "keep"},
    "state": {"optimizer_tier": "nvme"}, "state.prologue": {"weight_tier": "device"}}``. An entry for one
    block or unit replaces the general one. Keys inside are those of BlockDecision and StateDecision; a
    number of tokens must be one of the profile's prefixes, or None for ``recomputed_tokens``: all. What no
    block may choose ``prepare`` does not measure: with an action forced it is done sooner."""
    exact_only: bool = True
    """Compute a token prefix again only where it was found bit-equal to the whole forward's first rows, as
    all else that a plan does is in any case. So a budget decides how fast a model trains, not to which
    weights. The plan carries it, and a run that finds otherwise ends with an error. False allows prefixes
    that are equal within rounding, what another order of additions gives; the report says which."""
    allow_lossy: tuple[str, ...] = ()
    """Forms (``BlockProfile.forms``) that may be chosen although gradients are not the plain form's:
    ``int8``, ``int4`` and so on. Needs ``exact_only=False``."""
    error_budget: float | None = None
    """Of the lossy forms that are chosen: the largest mean of their errors over all bytes that the blocks
    save (``block_parts.plan_error``). None: what the forms lose is not limited."""
    safety_margin: float = 0.015
    """Part of the predicted need that is left free on the device, on the bill as slack: 1.5 % covers what
    was seen between predicted and measured peaks when everything is measured on the same machine."""
    update_schedule: str = "auto"
    """``auto``, ``sequential``, ``ahead`` or ``in_backward``."""
    gradients_untouched: bool = False
    """Nothing looks at gradients, or changes them or a parameter group, between the last backward pass and
    ``step()``: no clipping, no loss scaler, no look for NaN, no closure. Then ``auto`` may choose
    ``in_backward`` too."""
    weight_tiers: tuple[Tier, ...] | None = None
    """Where weights may be beside the device; None: in every tier of the budget. Those of a streamed model
    are in one already, and ``prepare`` names it."""
    coding_optional: tuple[Tier, ...] = ()
    """Tiers whose weights are coded only where that is predicted to be faster; on all others they are
    wherever the machine was measured through a codec for them (``Link.weight_codec``)."""
    micro_batch_order: str = "horizontal"
    """``horizontal``, ``vertical`` or ``auto``: the faster of both, where weights are streamed. Only
    ``Session.accumulate`` carries vertical order out; a loop that calls the model itself is horizontal."""
    overlay: bool | None = None
    """On a CPU, give gradients addresses in memory that activations have left by then
    (``Staging.overlaid_bytes``), and the slots of a sequential update those that passes have left
    (``Staging.update_overlaid_bytes``). For loops that let go of a step's gradients (``zero_grad()``) before
    the next forward, and of graphs before ``step()``. None: as whoever plans wants it; ``prepare`` does under
    ``allocator="planned"``, and ``make_plan`` does not."""

    def __post_init__(self) -> None:
        if self.time_limit_seconds <= 0:
            raise ValueError(f"time_limit_seconds must be > 0, got {self.time_limit_seconds}")
        if not 0 <= self.gap < 1:
            raise ValueError(f"gap must be in [0, 1), got {self.gap}")
        if not 0 <= self.safety_margin < 1:
            raise ValueError(f"safety_margin must be in [0, 1), got {self.safety_margin}")
        if self.update_schedule not in ("auto", *(schedule.value for schedule in UpdateSchedule)):
            raise ValueError(
                "update_schedule must be auto, sequential, ahead or in_backward, got "
                f"{self.update_schedule!r}"
            )
        if self.micro_batch_order not in ("auto", "horizontal", "vertical"):
            raise ValueError(
                f"micro_batch_order must be auto, horizontal or vertical, got {self.micro_batch_order!r}"
            )
        if (self.update_schedule, self.micro_batch_order) == ("in_backward", "vertical"):
            raise ValueError(
                "update_schedule is in_backward and micro_batch_order vertical: a unit's last gradient then "
                "comes from another micro-batch's graph than its turn. Leave one of both to auto"
            )
        if self.allow_lossy and self.exact_only:
            raise ValueError(
                f"allow_lossy names {', '.join(self.allow_lossy)}, but exact_only is on, under which nothing "
                "is lossy: set exact_only to false, or take allow_lossy away"
            )
        if self.error_budget is not None and not self.allow_lossy:
            raise ValueError("error_budget says how much lossy forms may lose: name them in allow_lossy")
        if self.error_budget is not None and not 0 <= self.error_budget < math.inf:
            raise ValueError(f"error_budget must be finite and at least 0, got {self.error_budget}")
        if not self.allow:
            raise ValueError("allow is empty: name at least one action")
        for key, entry in self.force.items():
            _check_force(key, entry)


def _check_force(key: str, entry: Wish) -> None:
    kind, _, which = key.partition(".")
    known = {"block": (*WHOLE_FIELDS, *TOKEN_FIELDS, "form"), "state": STATE_FIELDS}
    if kind not in known or (kind == "block" and which and not which.isdigit()):
        raise ValueError(f"force key {key!r}: use block, block.INDEX, state or state.UNIT")
    for name, value in entry.items():
        if name not in known[kind]:
            raise ValueError(f"force[{key!r}] has {name!r}; it may have {', '.join(known[kind])}")
        if name == "form":
            if not isinstance(value, str):
                raise ValueError(f"force[{key!r}] has form {value!r}; it must be the name of one")
        elif name not in TOKEN_FIELDS:
            WHOLE_FIELDS.get(name, Tier)(value)
        elif not isinstance(value, int) and (name, value) != ("recomputed_tokens", None):
            raise ValueError(f"force[{key!r}] has {name} {value!r}; it must be a number of tokens")
