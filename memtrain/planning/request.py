"""What was asked of ``memtrain plan``, read and checked before anything heavy is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from memtrain.planner.optimizer_bytes import OptimizerRule
from memtrain.planner.parallel import Degrees

if TYPE_CHECKING:
    from memtrain.optimizer_sections import GridSection

Dtype = Literal["bfloat16", "float32"]
Attention = Literal["flash", "efficient", "cudnn", "sdpa", "math", "eager"]
Axis = Literal["seq", "batch"]
Schedule = Literal["auto", "sequential", "ahead", "in_backward"]
Order = Literal["auto", "horizontal", "vertical"]
ELEMENT_BYTES: dict[Dtype, int] = {"bfloat16": 2, "float32": 4}
HALF_ATTENTION: tuple[Attention, ...] = ("flash", "cudnn")
"""Kernels of fp16 and bf16 alone: torch's ``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp`` takes them
for no other dtype."""

LEAST_TOKENS = 2
"""Of a sequence: a token is predicted from the one before it."""
MOST_TOKENS = 1 << 26
"""Of a sequence; the search for the longest ends there. Not far above, sizes in bytes leave 64 bits."""
MOST_BATCH = 1 << 14
MOST_ACCUMULATE = 1 << 20
"""Of a step: among more passes than these an update's seconds are below the solver's tolerance of 1e-6."""


class PlanError(ValueError):
    """The command cannot be answered as it was given; one line that says what to change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """Values that one number of the job takes in turn."""

    axis: Axis
    values: tuple[int, ...]

    def __post_init__(self) -> None:
        least, most = (LEAST_TOKENS, MOST_TOKENS) if self.axis == "seq" else (1, MOST_BATCH)
        if min(self.values) < least:
            raise PlanError(f"--sweep {self.axis} must be at least {least}, got {min(self.values)}")
        if max(self.values) > most:
            raise PlanError(f"--sweep {self.axis} must be at most {most}, got {max(self.values)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnOptimizer:
    """One of memtrain's own optimizers, with what was said about it in the words of a recipe."""

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()

    @property
    def value(self) -> str:
        """As it is typed."""
        given = ", ".join(f"{name}={value}" for name, value in self.arguments)
        return f"{self.name}({given})" if given else self.name

    def section(self, lr: float) -> GridSection:
        """Of a recipe. Raises PlanError: a name or value that no recipe takes."""
        from memtrain.optimizer_sections import grid_section

        try:
            return grid_section(self.name, dict(self.arguments), lr=lr)
        except ValueError as error:
            raise PlanError(f"--optimizer {self.value}: {error}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What is trained, and how."""

    model: str
    """Name of a preset, folder with a ``config.json``, or such a file."""
    sequence: int
    micro_batch: int = 1
    accumulate: int = 1
    """Micro-batches of a data rank in one step."""
    optimizer: OptimizerRule | OwnOptimizer = OptimizerRule.ADAMW
    dtype: Dtype = "bfloat16"
    master_weights: bool = True
    clipping: bool = True
    chunked_loss: bool = True
    attention: Attention = "flash"
    update_schedule: Schedule = "auto"
    micro_batch_order: Order = "auto"

    def __post_init__(self) -> None:
        self._check_schedule()
        if not self.model.strip():
            raise PlanError("MODEL is empty: name a preset, a folder with a config.json, or such a file")
        for value, option, least, most in (
            (self.sequence, "--seq", LEAST_TOKENS, MOST_TOKENS),
            (self.micro_batch, "--micro-batch", 1, MOST_BATCH),
            (self.accumulate, "--accumulate", 1, MOST_ACCUMULATE),
        ):
            if value < least:
                raise PlanError(f"{option} must be at least {least}, got {value}")
            if value > most:
                raise PlanError(f"{option} must be at most {most}, got {value}")
        if self.dtype == "float32" and self.attention in HALF_ATTENTION:
            raise PlanError(
                f"--attention {self.attention} has no kernel for --dtype float32: take efficient, or leave "
                "--attention out"
            )

    def _check_schedule(self) -> None:
        """Raises PlanError as a recipe is refused."""
        if self.update_schedule == "in_backward":
            if self.micro_batch_order == "vertical":
                raise PlanError(
                    "--update-schedule is in_backward and --micro-batch-order vertical: a unit's last "
                    "gradient then comes from another micro-batch's graph than its turn. Leave one of both "
                    "to auto"
                )
            if self.clipping:
                raise PlanError(
                    "--update-schedule in_backward updates weights before all gradients are there, and "
                    "clipping (training.max_grad_norm of a recipe) looks at all of them first: give "
                    "--no-clipping, or --update-schedule auto"
                )
            if self.accumulate > 1:
                raise PlanError(
                    f"--update-schedule in_backward is planned here for a step of one micro-batch, and "
                    f"--accumulate is {self.accumulate}: give --accumulate 1, or --update-schedule auto. A "
                    "run can update in the last backward pass of several (planner.update_schedule)"
                )
        if self.micro_batch_order == "vertical" and self.accumulate == 1:
            raise PlanError(
                "--micro-batch-order is vertical, --accumulate 1: a step has one micro-batch. Raise "
                "--accumulate, or leave the order away"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Hardware:
    """One host of the machine, in the words of ``planner.flags``."""

    gpu: str
    gpus: int = 1
    """Of one host."""
    nodes: int = 1
    dram: str | None = None
    cxl: str | None = None
    nvme: str | None = None
    nvme_writes: str | None = None
    """Bytes that a step may write there."""
    host_link: str | None = None
    interconnect: str | None = None
    network: str | None = None
    """Between hosts."""
    machine: str | None = None
    """A file that ``memtrain profile`` wrote: its links take the place of quoted ones."""
    budget: tuple[tuple[str, str], ...] = ()
    """Bytes by tier, for one GPU."""
    overrides: tuple[tuple[str, float], ...] = ()
    """Numbers of the GPU that the user knows better."""

    def __post_init__(self) -> None:
        if self.nvme_writes is not None and self.nvme is None:
            raise PlanError(f"--nvme-writes {self.nvme_writes} limits a disk that is not there: give --nvme")
        for option, value in (("--gpus", self.gpus), ("--nodes", self.nodes)):
            if value < 1:
                raise PlanError(f"{option} must be at least 1, got {value}")
        if self.interconnect is not None and self.gpus == 1:
            raise PlanError(
                f"--interconnect {self.interconnect} ties GPUs of a host together, and it has one: "
                "give --gpus, or drop it"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """How long to look, and among what."""

    chunks: int | None = None
    """None: ``planner.job.CHUNKS``, or a chunk for each token where they are fewer."""
    seconds: float = 6.0
    gap: float = 5e-3
    """Far below what the rates are off by. A search that the clock ends may answer differently next time."""
    allow_lossy: tuple[str, ...] = ()
    error_budget: float | None = None
    """None: as much as the allowed codecs lose when everything is compressed."""

    def __post_init__(self) -> None:
        if self.chunks is not None and not 1 <= self.chunks <= 64:
            raise PlanError(f"--chunks must lie between 1 and 64, got {self.chunks}")
        if not 0 < self.seconds <= 3600:
            raise PlanError(f"--seconds must lie above 0 and at most 3600, got {self.seconds}")
        if not 0 <= self.gap < 1:
            raise PlanError(f"--gap must be at least 0 and below 1, got {self.gap}")
        if self.error_budget is not None and not self.allow_lossy:
            raise PlanError("--error-budget says how much codecs may lose: name them with --allow-lossy")
        # Written so that NaN, which is neither, is refused too.
        if self.error_budget is not None and not 0 <= self.error_budget < math.inf:
            raise PlanError(f"--error-budget must be finite and at least 0, got {self.error_budget}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRequest:
    """All that decides the answer."""

    work: Work
    hardware: Hardware
    degrees: Degrees
    search: Search = Search()

    def __post_init__(self) -> None:
        optimizer, degrees = self.work.optimizer, self.degrees
        self._check_order()
        if isinstance(optimizer, OptimizerRule):
            return
        for option, divided in (
            (f"--zero {degrees.zero_stage}", degrees.zero_stage > 0),
            (f"--tp {degrees.tensor}", degrees.tensor > 1),
            (f"--ep {degrees.expert}", degrees.expert > 1),
        ):
            if divided:
                raise PlanError(
                    f"--optimizer {optimizer.value} keeps states of whole matrices so far, and {option} "
                    f"divides them: give {option.split()[0]} {0 if 'zero' in option else 1}"
                )

    def _check_order(self) -> None:
        if self.work.micro_batch_order != "vertical":
            return
        if self.gpus > 1:
            raise PlanError(
                f"--micro-batch-order vertical is carried out by memtrain's own trainer, in one process, and "
                f"this job has {self.gpus} GPUs: plan for one, or leave the order away"
            )
        if not (self.hardware.dram or self.hardware.nvme or self.hardware.cxl):
            raise PlanError(
                "--micro-batch-order is vertical, but no weights may leave the device, and it would only "
                "take memory: give a tier for them (--dram, --nvme), or leave the order away"
            )

    @property
    def gpus(self) -> int:
        """In all hosts."""
        return self.hardware.gpus * self.hardware.nodes


@dataclass(frozen=True, kw_only=True, slots=True)
class Questions:
    """What is to be said beside the plan, or in its place."""

    what_fits: Axis | None = None
    sweep: Sweep | None = None
    ablation: bool = False
    explain: str | None = None
    """A block's name."""
    sources: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Outputs:
    """Where the answer goes."""

    json: bool = False
    csv: bool = False
    html: Path | None = None
    emit: Path | None = None
    """A folder for the files to run the plan with."""
    plan: Path | None = None

    def check(self, questions: Questions) -> None:
        """Raises PlanError for what does not go together, and for paths that cannot be written."""
        if self.json and self.csv:
            raise PlanError("--json and --csv both want standard output: drop one")
        if self.csv and (questions.explain is not None or questions.sources):
            raise PlanError("--csv is one table without room for --explain and --sources: take --json")
        if questions.sweep is not None:
            asked = {
                "--what-fits": questions.what_fits is not None,
                "--ablation": questions.ablation,
                "--explain": questions.explain is not None,
                "--sources": questions.sources,
                "--emit": self.emit is not None,
                "-o": self.plan is not None,
            }
            for option in (name for name, given in asked.items() if given):
                raise PlanError(f"{option} is about one plan and --sweep makes several: drop one of the two")
        for option, path in (("-o", self.plan), ("--html", self.html), ("--emit", self.emit)):
            if path is not None and not path.resolve().parent.is_dir():
                raise PlanError(
                    f"{option} {path}: folder {path.resolve().parent} does not exist; create it first"
                )
        for option, path in (("-o", self.plan), ("--html", self.html)):
            # Files are put in place by renaming, which would take the place of a device such as /dev/null.
            if path is not None and path.exists() and not path.is_file():
                raise PlanError(f"{option} {path} is there and no regular file; name another")
        if self.plan is not None and self.html is not None and self.plan.resolve() == self.html.resolve():
            raise PlanError(f"-o and --html both name {self.plan}: give one of them another file")
        if self.emit is not None and self.emit.exists() and not self.emit.is_dir():
            raise PlanError(f"--emit {self.emit} is a file; name a folder")
