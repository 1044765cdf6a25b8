"""The ``optimizer`` section of a recipe: one class for each name, with the arguments that people know.

    optimizer: {name: galore, lr: 1.0e-2, rank: 128, update_proj_gap: 200, scale: 0.25}

``memtrain plan --optimizer 'galore(rank=128)'`` reads its arguments with the same classes. ``AdamW`` and
``SGD`` are torch's; the others are memtrain's own (docs/optimizers.md), whose arithmetic is fp32 whatever the
weights are, and whose ``state_dtype`` and ``master`` say what is kept.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from memtrain.planner.grid_bytes import GridSettings
from memtrain.planner.grid_rule import named_settings


class Section(BaseModel):
    """Of a recipe: nothing unknown, nothing changed later."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_values(cls, data: Any) -> Any:
        """YAML reads ``yes`` and ``no`` as booleans, and Python would take those for 1 and 0."""
        for name, value in data.items() if isinstance(data, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field is not None and field.annotation is not bool:
                raise ValueError(f"{name} is not a yes-or-no key; YAML reads yes, no, on and off as {value}")
        return data


Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Density = Annotated[float, Field(gt=0, le=1)]
Side = Literal["std", "reverse_std", "left", "right", "full"]
Orthonormal = Literal["power", "svd", "eigh", "semi_orthogonal", "columns", "rows", "block", "randk"]
Projection = Literal[
    "power", "svd", "eigh", "gaussian", "rademacher", "semi_orthogonal", "columns", "rows", "block", "randk"
]


class AdamWSection(Section):
    """torch.optim.AdamW."""

    name: Literal["AdamW"] = "AdamW"
    lr: PositiveFloat
    weight_decay: NonNegative = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    fused: bool = True
    master_weights: bool = True
    """Keep fp32 copies of weights that are narrower, and step those."""


class SparseAdamSection(Section):
    """torch.optim.SparseAdam, over tables by rows: a row's moments stand still while no token names it."""

    lr: PositiveFloat | None = None
    """None: the other optimizer's. The schedule is for both."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8


class SGDSection(Section):
    """torch.optim.SGD."""

    name: Literal["SGD"]
    lr: PositiveFloat
    weight_decay: NonNegative = 0.0
    momentum: Fraction = 0.0
    fused: bool = True
    master_weights: bool = True


class GridSection(Section):
    """What all of memtrain's own optimizers have."""

    name: str
    lr: PositiveFloat
    weight_decay: NonNegative = 0.0
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    state_dtype: Literal["fp32", "bf16", "int8", "int4"] = "fp32"
    """How moments are kept."""
    master: Literal["none", "split24", "fp32"] = "none"
    """What is kept of a bf16 weight beside itself: nothing (it is rounded at random), one byte, or a copy."""
    seed: Annotated[int, Field(ge=0)] = 0

    deciding: ClassVar[dict[str, str]] = {"state_dtype": "state_dtype", "master": "master"}
    """Fields that decide bytes, and their names in ``GridSettings``."""

    @property
    def master_weights(self) -> bool:
        """Masters are the optimizer's own, and none of the executor's."""
        return False

    @property
    def update_every(self) -> int:
        """Steps from one refresh to the next."""
        return 1

    def arguments(self) -> dict[str, Any]:
        """Of the class in ``memtrain.optim``; what is not given is left to it."""
        return self.model_dump(exclude={"name"}, exclude_none=True)

    def grid_settings(self) -> GridSettings:
        """What decides the bytes. Raises ValueError."""
        given = {ours: getattr(self, theirs) for theirs, ours in self.deciding.items()}
        return named_settings(self.name, **given)


class AdamW8bitSection(GridSection):
    """AdamW with 8-bit states."""

    name: Literal["adamw-8bit"]
    state_dtype: Literal["fp32", "bf16", "int8", "int4"] = "int8"


class ProjectedSection(GridSection):
    """What all have that project the gradients of matrices."""

    rank: Positive | None = None
    density: Density | None = None
    """Instead of rank: of the shortened dimension."""
    basis_dtype: Literal["fp32", "bf16"] = "fp32"
    refresh: Literal["keep", "reset", "rotate"] | None = None
    """What becomes of the moments in a new basis; by default what suits the projection."""
    spread: bool = False
    """Parameters take turns at refreshing, so that no step waits for all."""
    overrides: dict[str, str] = {}
    """Roles by pattern of the parameter's name, such as ``"*.c_attn.weight": other`` to leave one whole."""

    deciding: ClassVar[dict[str, str]] = {
        **GridSection.deciding, "rank": "rank", "density": "density", "basis_dtype": "basis_dtype",
    }  # fmt: skip

    @model_validator(mode="after")
    def _one_size(self) -> ProjectedSection:
        if (self.rank is None) == (self.density is None):
            raise ValueError("give either rank, such as 128, or density, such as 0.25")
        self.grid_settings()  # its value errors are ours
        return self

    def arguments(self) -> dict[str, Any]:
        """See :class:`GridSection`; without ``overrides``, which is for the classifier."""
        return {key: value for key, value in super().arguments().items() if key != "overrides"}


class GaLoreSection(ProjectedSection):
    """GaLore: Adam in a subspace of the gradient."""

    name: Literal["galore"]
    projection: Projection = "power"
    update_proj_gap: Positive = 200
    scale: NonNegative = 0.25
    proj_type: Side = "std"
    lazy: bool = False
    """Refresh ever more seldom where the subspace has stopped moving (Q-GaLore)."""

    deciding: ClassVar[dict[str, str]] = {
        **ProjectedSection.deciding, "projection": "projection", "proj_type": "side", "lazy": "lazy",
    }  # fmt: skip

    @property
    def update_every(self) -> int:
        """See :class:`GridSection`."""
        return self.update_proj_gap


class NaturalGaLoreSection(GaLoreSection):
    """GaLore on natural gradients."""

    name: Literal["natural-galore"]  # type: ignore[assignment]
    history: Positive = 20
    damping: PositiveFloat = 1e-3

    deciding: ClassVar[dict[str, str]] = {**GaLoreSection.deciding, "history": "history"}


class FrugalSection(ProjectedSection):
    """FRUGAL: Adam in a subspace, a rule without state outside of it."""

    name: Literal["frugal"]
    weight_decay: NonNegative = 0.01
    projection: Orthonormal = "power"
    update_gap: Positive = 200
    inactive_update_rule: Literal["sign_sgd", "sgd", "no"] = "sign_sgd"
    proj_params_lr_scale: NonNegative = 1.0
    inactive_lr_scale: NonNegative = 1.0
    proj_side: Side = "std"

    deciding: ClassVar[dict[str, str]] = {
        **ProjectedSection.deciding, "projection": "projection", "proj_side": "side",
    }  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _density_unless_rank(cls, data: Any) -> Any:
        return {"density": None if "rank" in data else 0.25, **data} if isinstance(data, dict) else data

    def grid_settings(self) -> GridSettings:
        """See :class:`GridSection`; without a residual a product less."""
        residual = {"sign_sgd": "sign", "sgd": "sgd", "no": "none"}[self.inactive_update_rule]
        return replace(super().grid_settings(), residual=residual)

    @property
    def update_every(self) -> int:
        """See :class:`GridSection`."""
        return self.update_gap


class FiraSection(ProjectedSection):
    """Fira: GaLore, and what is outside of the subspace scaled as what is inside."""

    name: Literal["fira"]
    projection: Orthonormal = "power"
    update_proj_gap: Positive = 200
    scale: NonNegative = 0.25
    proj_type: Side = "std"

    deciding: ClassVar[dict[str, str]] = {
        **ProjectedSection.deciding, "projection": "projection", "proj_type": "side",
    }  # fmt: skip

    @property
    def update_every(self) -> int:
        """See :class:`GridSection`."""
        return self.update_proj_gap


class ApolloSection(ProjectedSection):
    """APOLLO: the gradient, scaled by what Adam does to a random sketch of it."""

    name: Literal["apollo"]
    proj: Literal["random", "svd", "gaussian", "rademacher", "semi_orthogonal", "power"] = "random"
    update_proj_gap: Positive = 200
    scale: NonNegative = 1.0
    scale_type: Literal["channel", "tensor"] = "channel"
    proj_type: Literal["std", "reverse_std", "left", "right"] = "std"

    deciding: ClassVar[dict[str, str]] = {
        **ProjectedSection.deciding, "proj": "projection", "proj_type": "side",
    }  # fmt: skip

    @property
    def update_every(self) -> int:
        """See :class:`GridSection`."""
        return self.update_proj_gap


class ApolloMiniSection(ApolloSection):
    """APOLLO-Mini: rank one and one scaling for a matrix."""

    name: Literal["apollo-mini"]  # type: ignore[assignment]
    rank: Positive | None = 1
    scale: NonNegative = 128.0
    scale_type: Literal["channel", "tensor"] = "tensor"


SECTIONS: dict[str, type[Section]] = {
    "AdamW": AdamWSection,
    "SGD": SGDSection,
    "adamw-8bit": AdamW8bitSection,
    "galore": GaLoreSection,
    "natural-galore": NaturalGaLoreSection,
    "frugal": FrugalSection,
    "fira": FiraSection,
    "apollo": ApolloSection,
    "apollo-mini": ApolloMiniSection,
}
"""By name."""
OptimizerSection = Annotated[
    AdamWSection
    | SGDSection
    | AdamW8bitSection
    | GaLoreSection
    | NaturalGaLoreSection
    | FrugalSection
    | FiraSection
    | ApolloSection
    | ApolloMiniSection,
    Field(discriminator="name"),
]


def grid_section(name: str, arguments: dict[str, Any], *, lr: float) -> GridSection:
    """One of memtrain's own by name, checked.

    Raises:
        ValueError: the name or an argument is unknown, or a value is out of range; in one line.
    """
    known = [each for each, section in SECTIONS.items() if issubclass(section, GridSection)]
    if name not in known:
        raise ValueError(f"{name!r} is none of {', '.join(known)}")
    try:
        return SECTIONS[name].model_validate({"name": name, "lr": lr, **arguments})  # type: ignore[return-value]
    except ValidationError as error:
        raise ValueError(f"{name}: {'; '.join(map(_words, error.errors()))}") from error


def _words(fault: Any) -> str:
    message = fault["msg"].removeprefix("Value error, ")
    where = ".".join(map(str, fault["loc"]))
    return f"{where}: {message}, got {fault['input']!r}" if where else message
