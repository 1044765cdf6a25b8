"""What a parameter group asks for: plain values in the group's dict, checked here and turned into parts.

Groups stay dicts of strings and numbers, as torch.optim has them, so that schedulers may change them, and
``state_dict`` saves them and loads them with ``weights_only=True``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from operator import is_
from typing import Any, Literal

from memtrain.optim.projection import SPECTRAL, Projection, ProjectionError
from memtrain.optim.refresh import RefreshPolicy
from memtrain.optim.residual import Residual
from memtrain.optim.rules import Adafactor, Adam, AdamMini, Lion, Momentum, Natural, Rule
from memtrain.optim.storage import master_format, state_format

RULES: dict[str, type[Any]] = {
    "adam": Adam,
    "adam_mini": AdamMini,
    "adafactor": Adafactor,
    "lion": Lion,
    "momentum": Momentum,
}
RULE_FIELDS = ("betas", "eps", "eps_on", "momentum", "nesterov", "beta2_decay", "clip_threshold")
_NATURAL_FIELDS = ("history", "damping")
_PROJECTION_FIELDS = ("rank", "density", "side", "basis_dtype")
_REFRESH_FIELDS = ("refresh", "update_gap", "spread", "lazy")
_RESIDUAL_FIELDS = ("residual", "scale", "residual_scale", "granularity", "limiter")
PROJECTED_FIELDS = (*_PROJECTION_FIELDS, *_REFRESH_FIELDS, *_RESIDUAL_FIELDS, *_NATURAL_FIELDS, "split")
_WHOLE_NUMBERS = ("rank", "split", "update_gap", "history", "seed")
NO_LIMIT = 0.0
"""``limiter`` of a group that wants none; None means the default."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one group. None everywhere: the default of the part that the field belongs to.

    Raises:
        ValueError: a value is out of range, or belongs to a part that the group has not.
    """

    rule: str = "adam"
    betas: tuple[float, float] | None = None
    eps: float | None = None
    eps_on: Literal["corrected", "uncorrected"] | None = None
    momentum: float | None = None
    nesterov: bool | None = None
    beta2_decay: float | None = None
    clip_threshold: float | None = None
    weight_decay: float = 0.0
    decay_order: Literal["before", "after"] = "before"
    """Decoupled weight decay before the update, or after it with the new weight, as galore-torch 1.0."""
    projection: str | None = None
    """None: whole gradients."""
    rank: int | None = None
    density: float | None = None
    side: str | None = None
    basis_dtype: str | None = None
    split: int | None = None
    """A fused matrix ``[split * m, n]``, as of q, k and v, is projected as ``split`` matrices ``[m, n]``."""
    refresh: str | None = None
    """None: rotate for spectral projections; reset for random and coordinate ones, whose new basis shares
    so little with the old one that rotated second moments would be far too small."""
    update_gap: int | None = None
    spread: bool | None = None
    lazy: bool | None = None
    residual: str | None = None
    scale: float | None = None
    residual_scale: float | None = None
    granularity: str | None = None
    limiter: float | None = None
    """0: none."""
    history: int | None = None
    """Low-dimensional gradients kept for the natural gradient (:mod:`memtrain.optim.rules.natural`)."""
    damping: float | None = None
    state_dtype: str = "fp32"
    master: str = "none"
    seed: int = 0
    path: Literal["auto", "reference"] = "auto"
    """``reference``: never a fused path; for comparison."""

    def __post_init__(self) -> None:
        for name in _WHOLE_NUMBERS:
            if not isinstance(value := getattr(self, name), int | None):
                raise ValueError(f"{name} must be an int, got {value!r}")
        if self.betas is not None and len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers, got {self.betas}")
        if self.rule not in RULES:
            raise ValueError(f"rule {self.rule!r} is unknown: one of {', '.join(RULES)}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be >= 0, got {self.weight_decay}")
        if self.decay_order not in ("before", "after"):
            raise ValueError(f"decay_order must be before or after, got {self.decay_order!r}")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed must be in [0, 2**63), got {self.seed}")
        if self.path not in ("auto", "reference"):
            raise ValueError(f"path must be auto or reference, got {self.path!r}")
        if self.split is not None and self.split < 1:
            raise ValueError(f"split must be at least 1, got {self.split}")
        known = {field.name for field in fields(RULES[self.rule])}
        self._refuse([n for n in RULE_FIELDS if n not in known], f"rule {self.rule!r} has no such number")
        if self.projection is None:
            self._refuse(PROJECTED_FIELDS, "the group has no projection: name one, or leave it out")
        state_format(self.state_dtype)
        master_format(self.master)
        # Each part checks itself; building them now makes a mistake fail at construction.
        _ = self.rule_part
        if self.projection is not None:
            _ = self.projection_part, self.refresh_part, self.residual_part, self.projected_rule_part

    def _refuse(self, names: Iterable[str], why: str) -> None:
        for name in names:
            if getattr(self, name) is not None:
                raise ValueError(f"{name}={getattr(self, name)!r}: {why}")

    @classmethod
    def of_group(cls, group: Mapping[str, Any]) -> Settings:
        """From a param group; keys that are not settings are not looked at."""
        values = {field.name: group[field.name] for field in fields(cls) if field.name in group}
        if values.get("betas") is not None:
            values["betas"] = tuple(values["betas"])
        try:
            return _settings(**values)
        except TypeError:  # something that cannot be hashed, of which the checks say what it should be
            return cls(**values)

    def _given(self, names: Iterable[str]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @cached_property
    def rule_part(self) -> Rule:
        """The inner rule."""
        rule: Rule = RULES[self.rule](**self._given(RULE_FIELDS))
        return rule

    # The parts below are for groups that have a projection.

    @cached_property
    def projected_rule_part(self) -> Rule:
        """The rule for projected gradients: with a natural gradient before it where one is asked for."""
        given = self._given(_NATURAL_FIELDS)
        if self.history is None:
            self._refuse(("damping",), "it belongs to history, which is not given")
            return self.rule_part
        if self.refresh_part.moments == "keep":
            raise ValueError(
                f"refresh='keep' with history={self.history} would mix gradients of different bases in one "
                "Fisher matrix: use refresh='rotate' or 'reset'"
            )
        return Natural(inner=self.rule_part, **given)

    @cached_property
    def projection_part(self) -> Projection:
        """The projection."""
        return Projection(kind=self.projection, **self._given(_PROJECTION_FIELDS))  # type: ignore[arg-type]

    @cached_property
    def refresh_part(self) -> RefreshPolicy:
        """When the basis is renewed, and what becomes of the moments."""
        if self.lazy and self.projection not in SPECTRAL:
            raise ProjectionError(
                f"lazy=True asks whether the leading singular vector moves, and projection "
                f"{self.projection!r} follows none: use svd, eigh or power, or a longer update_gap"
            )
        given = self._given(("update_gap", "spread", "lazy"))
        if "update_gap" in given:
            given["gap"] = given.pop("update_gap")
        default = "rotate" if self.projection in SPECTRAL else "reset"
        return RefreshPolicy(moments=self.refresh or default, **given)  # type: ignore[arg-type]

    @cached_property
    def residual_part(self) -> Residual:
        """What happens to the residual."""
        kind = self.residual or "none"
        unused = {
            "none": ("residual_scale", "granularity", "limiter"),
            "sign": ("granularity", "limiter"),
            "sgd": ("granularity", "limiter"),
            "scale_only": ("residual_scale",),
        }
        self._refuse(unused.get(kind, ()), f"residual {kind!r} makes no use of it")
        given = self._given(("scale", "residual_scale", "granularity", "limiter"))
        if given.get("limiter") == NO_LIMIT:
            given["limiter"] = None
        return Residual(kind=kind, **given)  # type: ignore[arg-type]


class Unchanged:
    """Whether a group still holds the very values that it held: every step asks, and a look at each is
    quicker than settings made of them and compared."""

    def __init__(self, group: Mapping[str, Any]) -> None:
        values = self._values(group)
        # What can change in place is never taken for the same.
        self._seen = None if any(type(value) not in _FIXED for value in values) else values

    def __call__(self, group: Mapping[str, Any]) -> bool:
        return self._seen is not None and all(map(is_, self._values(group), self._seen))

    @staticmethod
    def _values(group: Mapping[str, Any]) -> list[Any]:
        return list(map(group.get, _FIELDS))


_FIELDS = tuple(field.name for field in fields(Settings))
_FIXED = (type(None), bool, int, float, str, tuple)


@lru_cache(maxsize=256, typed=True)
def _settings(**values: Any) -> Settings:
    """Every step asks for those of every group: checking them anew takes 20 us, a tenth of a small step."""
    return Settings(**values)
