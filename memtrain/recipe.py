"""A recipe: one YAML file that says what to train, on what, how, and inside which budget.

    memtrain validate recipes/smollm2_135m_full_cpu.yaml
    memtrain run recipes/smollm2_135m_full_cpu.yaml -- training.steps=10 optimizer.lr=1e-5

Nothing is accepted and ignored: a key that no section knows is refused with the nearest one that exists.
YAML reads ``1e-5`` as a string, so numbers are taken from either form. Relative paths are those of the
working directory.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from memtrain.endurance import parse_endurance
from memtrain.optimizer_sections import (
    SECTIONS,
    GridSection,
    OptimizerSection,
    Positive,
    Section,
    SparseAdamSection,
)
from memtrain.planner.decisions import PlannerOptions
from memtrain.planner.machine import Budget
from memtrain.planner.units import parse_bytes


class RecipeError(ValueError):
    """The recipe cannot be read; the message names the file, the key, the value and the remedy."""


def _size(text: str | int) -> str | int:
    parse_bytes(text)
    return text


Lossy = Literal["int8", "int4", "fewbit2", "fewbit3", "fewbit4"]
"""``memtrain.forms.LOSSY``, which imports torch."""
Size = Annotated[str | int, AfterValidator(_size)]


class ModelSection(Section):
    """The model: a folder or hub name that ``from_pretrained`` reads, or fields of a configuration."""

    path: str | None = None
    config: dict[str, Any] | None = None
    """``model_type`` and what its configuration class takes; the weights are random, from the seed."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    streamed: bool = False
    """The weights are never whole in memory: they go straight to the fastest tier that has room for them, and
    the plan says which of them stay in memory. A ``path`` must then be a folder with safetensors files."""
    tile: Literal["auto", "off"] | Size = "auto"
    """Of a streamed model, the most that one window for weights holds: larger layers are cut into tiles of
    that size, which are streamed one after the other. auto: where the windows would take more than half of
    what the budget leaves."""

    sparse_tables: bool = False
    """The input embeddings lie on a tier by rows, weight and optimizer state, and a step reads and writes the
    rows that its tokens name. ``sparse_optimizer`` steps them."""

    @property
    def tile_bytes(self) -> int | str | None:
        """As ``memtrain.streamed_model`` takes it."""
        if self.tile == "off":
            return None
        return self.tile if self.tile == "auto" else parse_bytes(self.tile)

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        if (self.path is None) == (self.config is None):
            raise ValueError("give either model.path (a trained model) or model.config (random weights)")
        if self.tile not in ("auto", "off"):
            if not self.streamed:
                raise ValueError(
                    f"model.tile {self.tile} is for streamed weights: set model.streamed: true, or leave "
                    "it out"
                )
            if not parse_bytes(self.tile):
                raise ValueError("model.tile is a size above 0, auto or off")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("model.config needs model_type, such as llama")
        return self


class DataSection(Section):
    """Token files made by ``python -m memtrain.data``, or ``.txt`` files, whose bytes are the tokens."""

    train: Path
    heldout: Path
    sequence_length: Annotated[int, Field(ge=2)]


class BudgetSection(Section):
    """Bytes the job may use in each tier; see ``memtrain.Budget``."""

    device: Size
    host: str | int = 0
    cxl: str | None = None
    nvme: str | int | None = None
    """``DIRECTORY:SIZE`` with a directory that exists, or ``SIZE`` for ``swap`` in the output directory."""

    @model_validator(mode="after")
    def _readable(self) -> BudgetSection:
        self.budget(Path("unused"))  # its value errors are ours
        return self

    @property
    def swap_is_ours(self) -> bool:
        """The swap directory lies in the output directory, and the trainer makes it."""
        return self.nvme is not None and ":" not in str(self.nvme)

    def budget(self, output_directory: Path) -> Budget:
        """The budget, with the swap directory in ``output_directory`` where none is named."""
        nvme = self.nvme
        if self.swap_is_ours:
            nvme = f"{output_directory / 'swap'}:{parse_bytes(typing.cast('str | int', nvme))}"
        return Budget(
            device=self.device, host=self.host, cxl=self.cxl, nvme=None if nvme is None else str(nvme)
        )


class TierSection(Section):
    """How a tier keeps what waits there."""

    codec: Literal["exponent"] | None = None
    """Codes optimizer state on its way, exactly: fewer bytes are written, for processor time. Needs the extra
    ``lossless``."""
    weight_codec: Literal["exponent", "auto"] | None = None
    """The same of weights that live there; auto: where that is predicted to be faster."""


def _endurance(text: str) -> str:
    parse_endurance(text)
    return text


class NvmeSection(TierSection):
    """A disk, which wears."""

    endurance: Annotated[str, AfterValidator(_endurance)] | None = None
    """What may be written to the disk in all, from its data sheet, such as ``600 TBW``. The report then says
    how long it lasts at the run's rate."""

    @property
    def endurance_bytes(self) -> int | None:
        """The same in bytes."""
        return None if self.endurance is None else parse_endurance(self.endurance)


class TiersSection(Section):
    """Tiers beside the device."""

    host: TierSection = TierSection()
    cxl: TierSection = TierSection()
    nvme: NvmeSection = NvmeSection()

    def codecs(self) -> dict[str, str]:
        """Of ``memtrain.prepare``."""
        return {tier: each.codec for tier, each in self._named().items() if each.codec is not None}

    def weight_codecs(self) -> dict[str, str]:
        """Of ``memtrain.prepare`` and ``memtrain.streamed_model``."""
        return {
            tier: each.weight_codec for tier, each in self._named().items() if each.weight_codec is not None
        }

    def _named(self) -> dict[str, TierSection]:
        return {"host": self.host, "cxl": self.cxl, "nvme": self.nvme}


class PlannerSection(Section):
    """What the planner may choose."""

    exact_only: bool = True
    """Compute the first tokens of a row again only where that is bit-equal on this machine, as whatever else
    a plan does is, and end the run where a batch of another size shows otherwise; false also where it is
    equal within rounding."""
    allow_lossy: tuple[Lossy, ...] = ()
    """Forms in which blocks may run although their gradients are not those of plain PyTorch: activations in 8
    or 4 bits (int8, int4), few-bit activation functions of MLPs without a gate (fewbit2 to fewbit4). Needs
    ``exact_only: false``."""
    error_budget: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """The largest mean error of gradients over all saved bytes that the chosen forms may add up to."""
    update_schedule: Literal["auto", "sequential", "ahead", "in_backward"] = "auto"
    """When weights are updated: inside the step, unit by unit ahead of the next forward, or unit by unit in
    the last backward pass, which needs ``training.max_grad_norm: null`` and ``nonfinite: ignore``."""
    micro_batch_order: Literal["auto", "horizontal", "vertical"] = "auto"
    """Vertical: all micro-batches of a step pass a block before the next one's weights are read, where
    weights live on a tier; bit-equal. auto: whichever is predicted to be faster."""

    @model_validator(mode="after")
    def _consistent(self) -> PlannerSection:
        self.options()  # its value errors are ours
        return self

    def options(self) -> PlannerOptions:
        """As ``memtrain.prepare`` takes them."""
        return PlannerOptions(
            exact_only=self.exact_only,
            allow_lossy=self.allow_lossy,
            error_budget=self.error_budget,
            update_schedule=self.update_schedule,
            micro_batch_order=self.micro_batch_order,
        )


class TrainingSection(Section):
    """The loop."""

    steps: Positive
    """Optimizer steps."""
    micro_batch_size: Positive = 1
    """Sequences per forward pass."""
    accumulation: Positive = 1
    """Forward-backward passes per optimizer step."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    nonfinite: Literal["raise", "skip", "ignore"] = "raise"
    """What a NaN or an infinity in the gradients does to the step; ignore does not look."""
    chunked_loss: bool = True
    """Compute the loss by chunks of tokens, so that the logits of a sequence never exist at once."""
    seed: Annotated[int, Field(ge=0)] = 0
    threads: Positive | None = None
    """Of the arithmetic; None leaves torch's own choice."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    allocator: Literal["default", "planned"] = "default"
    """``planned``: on a CPU, passes that ask for the same bytes in the same order get packed addresses, and
    gradients those that activations have left."""
    log_every: Positive = 1

    @property
    def gradients_untouched(self) -> bool:
        """Whether nothing looks at gradients between backward and the step."""
        return self.max_grad_norm is None and self.nonfinite == "ignore"


class ScheduleSection(Section):
    """The learning rate as a fraction of ``optimizer.lr``, step by step."""

    name: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """What cosine and linear end at."""


class EvaluationSection(Section):
    """Held-out loss, before and after the run and every so many steps."""

    every: Positive | None = None
    batches: Positive = 4


class CheckpointSection(Section):
    """When the run can be taken up again, and whether this one takes one up."""

    every: Positive | None = None
    """Steps between checkpoints; one is written at the end in any case."""
    keep: Positive = 1
    asynchronous: bool = False
    """Write those of ``every`` while training goes on: the same files."""
    spare: Size = 0
    """Room on nvme beyond the plan for generations of optimizer state, and of streamed weights, that a
    snapshot still needs. Without it an update waits until the snapshot has copied what it overwrites."""
    hold_every: Positive | None = None
    """Steps between snapshots in the memory of a process that outlives this one; twice a snapshot's bytes,
    outside of the budget."""
    hours_between_failures: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """On average. The report then says how often snapshots should be taken, from what they cost."""
    resume: str = "auto"
    """``auto`` takes up the output directory's last checkpoint, or the snapshot in memory if that is newer,
    if there is one; ``never`` starts anew, anything else is the folder of a checkpoint."""

    @property
    def beside_training(self) -> bool:
        """Whether anything is written while training goes on."""
        return self.asynchronous or self.hold_every is not None

    @model_validator(mode="after")
    def _nothing_ignored(self) -> CheckpointSection:
        if self.asynchronous and self.every is None:
            raise ValueError("asynchronous needs checkpoint.every, the steps between checkpoints")
        for name, given in (
            ("spare", bool(parse_bytes(self.spare))),
            ("hours_between_failures", self.hours_between_failures is not None),
        ):
            if given and not self.beside_training:
                raise ValueError(
                    f"{name} is for snapshots beside training: set checkpoint.asynchronous or "
                    f"checkpoint.hold_every"
                )
        return self


class OutputSection(Section):
    """Where the run's files go."""

    directory: Path | None = None
    """``runs/<name>`` unless given."""


class Recipe(Section):
    """All of a run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    description: str = ""
    model: ModelSection
    data: DataSection
    budget: BudgetSection
    training: TrainingSection
    optimizer: OptimizerSection
    sparse_optimizer: SparseAdamSection | None = None
    """Of ``model.sparse_tables``; None: its defaults."""
    planner: PlannerSection = PlannerSection()
    tiers: TiersSection = TiersSection()
    schedule: ScheduleSection = ScheduleSection()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    output: OutputSection = OutputSection()

    @model_validator(mode="after")
    def _place_for_streamed_weights(self) -> Recipe:
        tiers = (self.budget.host, self.budget.cxl, self.budget.nvme)
        if self.model.streamed and not any(tiers):
            raise ValueError("model.streamed needs a tier for the weights: give budget.nvme")
        return self

    @model_validator(mode="after")
    def _tables_by_rows(self) -> Recipe:
        if not self.model.sparse_tables:
            if self.sparse_optimizer is not None:
                raise ValueError(
                    "sparse_optimizer is for tables by rows: set model.sparse_tables: true, or leave it out"
                )
            return self
        masters = self.model.dtype != "float32" and self.optimizer.master_weights
        for wrong, why in (
            (not (self.budget.cxl or self.budget.nvme), "a tier for the tables: give budget.nvme"),
            (isinstance(self.optimizer, GridSection), "optimizer AdamW or SGD for the other weights"),
            (
                self.training.max_grad_norm is not None,
                "training.max_grad_norm: null, for torch has no norm of sparse gradients",
            ),
            (masters, "model.dtype: float32, or optimizer.master_weights: false, for tables have no masters"),
            (
                self.training.allocator == "planned",
                "training.allocator: default, for each batch uses another number of rows",
            ),
            (
                self.checkpoint.beside_training,
                "checkpoint.asynchronous: false and no hold_every, for steps overwrite rows where they lie",
            ),
        ):
            if wrong:
                raise ValueError(f"model.sparse_tables needs {why}")
        return self

    @property
    def sparse_section(self) -> SparseAdamSection:
        """Of ``sparse_optimizer``, or its defaults."""
        return self.sparse_optimizer or SparseAdamSection()

    @model_validator(mode="after")
    def _disk_that_wears(self) -> Recipe:
        if self.tiers.nvme.endurance is not None and self.budget.nvme is None:
            raise ValueError(
                "tiers.nvme.endurance is of a disk that is not used: give budget.nvme, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _something_to_order(self) -> Recipe:
        if self.planner.micro_batch_order == "vertical" and self.training.accumulation == 1:
            raise ValueError(
                "planner.micro_batch_order is vertical, training.accumulation 1: a step has one micro-batch. "
                "Raise accumulation, or leave the order away"
            )
        if self.planner.micro_batch_order == "vertical" and self.training.allocator == "planned":
            raise ValueError(
                "planner.micro_batch_order is vertical, training.allocator planned: addresses are planned "
                "for one pass at a time. Set allocator to default, or micro_batch_order to horizontal"
            )
        return self

    @model_validator(mode="after")
    def _update_in_backward(self) -> Recipe:
        if self.planner.update_schedule == "in_backward" and not self.training.gradients_untouched:
            raise ValueError(
                "planner.update_schedule in_backward updates weights before all gradients are there, but "
                f"training.max_grad_norm {self.training.max_grad_norm} and training.nonfinite "
                f"{self.training.nonfinite} look at all of them first: set max_grad_norm to null and "
                "nonfinite to ignore, or choose update_schedule auto"
            )
        return self

    def planner_options(self) -> PlannerOptions:
        """As ``memtrain.prepare`` takes them."""
        return dataclasses.replace(
            self.planner.options(), gradients_untouched=self.training.gradients_untouched
        )

    @model_validator(mode="after")
    def _spares_have_a_tier(self) -> Recipe:
        if parse_bytes(self.checkpoint.spare) and self.budget.nvme is None:
            raise ValueError("checkpoint.spare is room on nvme: give budget.nvme, or no spare")
        return self

    @property
    def output_directory(self) -> Path:
        """The run's folder."""
        return self.output.directory or Path("runs") / self.name

    def memory_budget(self) -> Budget:
        """The budget of the run."""
        return self.budget.budget(self.output_directory)

    @property
    def digest(self) -> str:
        """Hash of what decides the numbers: not of the budget, the threads, the output, the logging or where
        weights lie; of the planner where it may lose some of them."""
        data = self.model_dump(mode="json", include={"model", "data", "training", "optimizer", "schedule"})
        for key in ("threads", "device", "allocator", "log_every"):
            del data["training"][key]
        del data["model"]["streamed"]
        if self.model.sparse_tables:
            data["sparse_optimizer"] = self.sparse_section.model_dump(mode="json")
        else:
            del data["model"]["sparse_tables"]
        if self.model.tile in ("auto", "off"):  # otherwise gradients are summed tile by tile
            del data["model"]["tile"]
        if self.planner.allow_lossy:
            data["planner"] = self.planner.model_dump(mode="json", include={"allow_lossy", "error_budget"})
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The recipe with every default written out."""
        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True))


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read ``path``, apply ``section.key=value`` overrides, check everything.

    Raises:
        RecipeError: the file, a key or a value cannot be used.
    """
    try:
        data = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise RecipeError(
            f"cannot read recipe {path}: {error.strerror}; `memtrain ls` lists recipes"
        ) from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{path} must hold the sections of a recipe, got {type(data).__name__}")
    for override in overrides:
        _override(data, override)
    return parse_recipe(data, source=str(path))


def parse_recipe(data: dict[str, Any], source: str = "recipe") -> Recipe:
    """Check the sections of a recipe. Raises RecipeError that names every fault."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        faults = [_describe(fault) for fault in error.errors()]
        raise RecipeError("\n  ".join([f"{source} cannot be used:", *faults])) from error


def _override(data: dict[str, Any], override: str) -> None:
    """Set ``a.b=value`` in nested dictionaries; the value is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise RecipeError(
            f"an override must be section.key=value such as training.steps=10, got {override!r}"
        )
    *parents, last = key.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise RecipeError(f"override {override!r}: {parent} is a value, not a section")
    data[last] = yaml.safe_load(text)


def _describe(fault: Any) -> str:
    location = [str(part) for part in fault["loc"]]
    if fault["type"] != "extra_forbidden":
        message = fault["msg"].removeprefix("Value error, ")
        given = "" if fault["type"] in ("missing", "value_error") else f", got {fault['input']!r}"
        return f"{'.'.join(location) or 'recipe'}: {message}{given}"
    known = _fields(location[:-1])
    nearest = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else f"known keys: {', '.join(known)}"
    where = ".".join(part for part in location if part not in SECTIONS)
    return f"{where}: unknown key; {hint}"


def _fields(path: list[str]) -> list[str]:
    """Names of the fields of the section at ``path``; a union's member is named by its tag."""
    section: type[BaseModel] = Recipe
    for part in path:
        members = _models(section.model_fields[part].annotation) if part in section.model_fields else []
        if members:
            section = members[0]
        elif part in SECTIONS:
            section = SECTIONS[part]
    return list(section.model_fields)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        return [model for argument in typing.get_args(annotation) for model in _models(argument)]
    return []
