"""What was asked of ``memtrain plan``, read and checked before anything heavy is loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from memtrain.planner.hardware import suggest
from memtrain.planner.optimizer_bytes import OptimizerRule
from memtrain.planner.parallel import Degrees
from memtrain.planner.units import parse_bytes

Dtype = Literal["bfloat16", "float32"]
Attention = Literal["flash", "efficient", "cudnn", "sdpa", "math", "eager"]
Axis = Literal["seq", "batch"]
ELEMENT_BYTES: dict[Dtype, int] = {"bfloat16": 2, "float32": 4}
MAX_SWEEP = 24
"""Points of a sweep: each is a plan of its own, of some seconds."""

_FACTORS = {"": 1, "k": 1 << 10, "m": 1 << 20}
_COUNT = re.compile(r"^(\d+(?:\.\d+)?)\s*([kKmM]?)$")


class PlanError(ValueError):
    """The command cannot be answered as it was given; one line that says what to change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """Values that one number of the job takes in turn."""

    axis: Axis
    values: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What is trained, and how."""

    model: str
    """Name of a preset, folder with a ``config.json``, or such a file."""
    sequence: int
    micro_batch: int = 1
    accumulate: int = 1
    """Micro-batches of a data rank in one step."""
    optimizer: OptimizerRule = OptimizerRule.ADAMW
    dtype: Dtype = "bfloat16"
    master_weights: bool = True
    clipping: bool = True
    chunked_loss: bool = True
    attention: Attention = "flash"

    def __post_init__(self) -> None:
        for name, option in (
            ("sequence", "--seq"),
            ("micro_batch", "--micro-batch"),
            ("accumulate", "--accumulate"),
        ):
            if getattr(self, name) < 1:
                raise PlanError(f"{option} must be at least 1, got {getattr(self, name)}")


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
        for option, value in (("--gpus", self.gpus), ("--nodes", self.nodes)):
            if value < 1:
                raise PlanError(f"{option} must be at least 1, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """How long to look, and among what."""

    chunks: int = 16
    seconds: float = 6.0
    gap: float = 1e-3
    allow_lossy: tuple[str, ...] = ()
    error_budget: float | None = None
    """None: as much as the allowed codecs lose when everything is compressed."""

    def __post_init__(self) -> None:
        if not 1 <= self.chunks <= 64:
            raise PlanError(f"--chunks must lie between 1 and 64, got {self.chunks}")
        if not 0 < self.seconds <= 3600:
            raise PlanError(f"--seconds must lie above 0 and at most 3600, got {self.seconds}")
        if not 0 <= self.gap < 1:
            raise PlanError(f"--gap must be at least 0 and below 1, got {self.gap}")
        if self.error_budget is not None and not self.allow_lossy:
            raise PlanError("--error-budget says how much codecs may lose: name them with --allow-lossy")
        if self.error_budget is not None and self.error_budget < 0:
            raise PlanError(f"--error-budget must be at least 0, got {self.error_budget}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRequest:
    """All that decides the answer."""

    work: Work
    hardware: Hardware
    degrees: Degrees
    search: Search = Search()

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
        """Raises PlanError for what does not go together, and for folders that are not there."""
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
        for option, path in (("-o", self.plan), ("--html", self.html)):
            if path is not None and not path.resolve().parent.is_dir():
                raise PlanError(
                    f"{option} {path}: folder {path.resolve().parent} does not exist; create it first"
                )
        if self.emit is not None and self.emit.exists() and not self.emit.is_dir():
            raise PlanError(f"--emit {self.emit} is a file; name a folder")


def parse_count(option: str, text: str) -> int:
    """``8192``, ``8k`` (8192) or ``1M`` (1048576). Raises PlanError naming the value."""
    match = _COUNT.match(text.strip())
    value = float(match[1]) * _FACTORS[match[2].lower()] if match else 0.0
    if match is None or value != int(value) or value < 1:
        raise PlanError(
            f"{option}: cannot read {text!r} as a whole number above 0; write 8192, 8k (8 x 1024) or 1M"
        )
    return int(value)


def parse_sweep(text: str) -> Sweep:
    """``seq=8k..1M`` doubles from the first to the last; ``seq=8k,12k,16k`` names every value.

    Raises:
        PlanError: naming the value and how to write it.
    """
    axis, equals, values = text.partition("=")
    if axis == "seq":
        named: Axis = "seq"
    elif axis == "batch":
        named = "batch"
    else:
        raise PlanError(f"--sweep {text!r}: write seq=8k..1M, seq=8k,12k,16k or batch=1..16")
    if not equals or not values:
        raise PlanError(f"--sweep {text!r} names no values: write {axis}=8k..1M or {axis}=8k,16k")
    first, dots, last = values.partition("..")
    if dots:
        low, high = parse_count("--sweep", first), parse_count("--sweep", last)
        if low > high:
            raise PlanError(f"--sweep {text!r} ends at {high} below its start {low}: swap them")
        found = [low]
        while found[-1] * 2 < high:
            found.append(found[-1] * 2)
        found += [high] if high > found[-1] else []
    else:
        found = sorted({parse_count("--sweep", one) for one in values.split(",")})
    if len(found) > MAX_SWEEP:
        raise PlanError(
            f"--sweep {text!r} has {len(found)} values, at most {MAX_SWEEP} are planned: narrow it"
        )
    return Sweep(axis=named, values=tuple(found))


def parse_pairs(option: str, texts: Sequence[str], example: str) -> tuple[tuple[str, str], ...]:
    """``name=value``, each given once. Raises PlanError naming the text."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not (name and equals and value):
            raise PlanError(f"{option} {text!r}: write it as {example}")
        if name in found:
            raise PlanError(f"{option} {name} is given twice, {found[name]} and {value}: drop one")
        found[name] = value
    return tuple(found.items())


def parse_budget(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """``device=70GiB``, one or several. Raises PlanError naming the text."""
    pairs = parse_pairs("--budget", texts, "device=70GiB")
    for name, value in pairs:
        try:
            size = parse_bytes(value)
        except ValueError as error:
            raise PlanError(f"--budget {name}={value}: {error}") from error
        if size == 0:
            raise PlanError(f"--budget {name}={value} leaves no bytes: raise it, or leave the tier out")
    return pairs


def parse_overrides(texts: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """``matmul_efficiency=0.6``; names are checked against the GPU later. Raises PlanError."""
    found = []
    for name, value in parse_pairs("--override", texts, "matmul_efficiency=0.6"):
        try:
            number = float(value)
        except ValueError as error:
            raise PlanError(f"--override {name}={value}: {value!r} is not a number") from error
        found.append((name, number))
    return tuple(found)


def parse_axis(text: str) -> Axis:
    """``seq`` or ``batch``. Raises PlanError."""
    if text == "seq":
        return "seq"
    if text == "batch":
        return "batch"
    raise PlanError(f"--what-fits {text!r} is not known: write seq or batch")


def parse_dtype(text: str) -> Dtype:
    """Raises PlanError with the known names."""
    for name in get_args(Dtype):
        if text == name:
            known: Dtype = name
            return known
    raise PlanError(f"--dtype {text!r} is not known; {suggest(text, list(get_args(Dtype)))}")


def parse_attention(text: str) -> Attention:
    """Raises PlanError with the known names."""
    for name in get_args(Attention):
        if text == name:
            known: Attention = name
            return known
    raise PlanError(f"--attention {text!r} is not known; {suggest(text, list(get_args(Attention)))}")


def parse_optimizer(text: str) -> OptimizerRule:
    """Raises PlanError with the known names."""
    names = [rule.value for rule in OptimizerRule]
    if text not in names:
        raise PlanError(f"--optimizer {text!r} is not known; {suggest(text, names)}")
    return OptimizerRule(text)


def parse_degrees(
    gpus: int,
    *,
    data: int | None,
    zero_stage: int | None,
    tensor: int,
    context: int,
    pipeline: int,
    expert: int,
    context_method: str | None,
    sequence_parallel: bool | None,
) -> Degrees:
    """Degrees over ``gpus``; None is the default.

    Data parallelism takes what the others leave and shards all state; tensor ranks cut the sequence too, and
    context ranks form a ring.

    Raises:
        PlanError: naming the option, the value and the limit.
    """
    others = tensor * context * pipeline
    if min(tensor, context, pipeline, expert) < 1:
        raise PlanError("--tp, --cp, --pp and --ep must be at least 1")
    if data is None:
        if gpus % others:
            raise PlanError(
                f"--tp {tensor} x --cp {context} x --pp {pipeline} = {others} does not divide {gpus} GPUs: "
                "change one"
            )
        data = gpus // others
    if data * others != gpus:
        raise PlanError(
            f"--dp {data} x --tp {tensor} x --cp {context} x --pp {pipeline} = {data * others}, but --gpus x "
            f"--nodes = {gpus}: change one, or leave --dp out"
        )
    if zero_stage not in (None, 0, 1, 2, 3):
        raise PlanError(f"--zero must be 0, 1, 2 or 3, got {zero_stage}")
    if sequence_parallel is not None and tensor == 1:
        raise PlanError(
            "--sequence-parallel cuts what --tp leaves whole, and --tp is 1: give --tp, or drop it"
        )
    if context_method is not None and context == 1:
        raise PlanError(
            f"--cp-method {context_method} says how --cp ranks exchange, and --cp is 1: give --cp, or drop it"
        )
    if context_method not in (None, "ring", "ulysses"):
        raise PlanError(f"--cp-method must be ring or ulysses, got {context_method!r}")
    try:
        return Degrees(
            data=data,
            zero_stage=_stage(zero_stage, ranks=data * context),
            tensor=tensor,
            sequence_parallel=sequence_parallel is not False,
            context=context,
            context_method="ulysses" if context_method == "ulysses" else "ring",
            pipeline=pipeline,
            expert=expert,
        )
    except ValueError as error:
        raise PlanError(str(error)) from error


def _stage(given: int | None, *, ranks: int) -> Literal[0, 1, 2, 3]:
    """All state is sharded unless the user says otherwise, where there is anything to share it with."""
    stages: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
    if given is None:
        return 3 if ranks > 1 else 0
    return stages[given]
