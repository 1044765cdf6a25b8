"""The words of ``memtrain plan``'s options, read into what ``request`` is made of."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Literal, get_args

from memtrain.planner.grid_rule import NAMED
from memtrain.planner.hardware import suggest
from memtrain.planner.optimizer_bytes import OptimizerRule
from memtrain.planner.parallel import Degrees
from memtrain.planner.units import parse_size
from memtrain.planning.request import (
    MOST_TOKENS,
    Attention,
    Axis,
    Dtype,
    Order,
    OwnOptimizer,
    PlanError,
    Questions,
    Schedule,
    Sweep,
)

MAX_SWEEP = 24
"""Points of a sweep: each is a plan of its own, of some seconds."""

DEFAULT_SEQUENCE = 8192
DEGREE_OPTIONS = {
    "data": "--dp",
    "tensor": "--tp",
    "context": "--cp",
    "pipeline": "--pp",
    "expert": "--ep",
}
"""Fields of ``Degrees`` as they are typed."""

_FACTORS = {"": 1, "k": 1 << 10, "m": 1 << 20}
_COUNT = re.compile(r"^(\d+(?:\.\d+)?)\s*([kKmM]?)$")


def parse_count(option: str, text: str) -> int:
    """``8192``, ``8k`` (8192) or ``1M`` (1048576). Raises PlanError naming the value."""
    match = _COUNT.match(text.strip())
    value = float(match[1]) * _FACTORS[match[2].lower()] if match else 0.0
    if value > MOST_TOKENS:
        raise PlanError(f"{option} must be at most {MOST_TOKENS}, got {text}")
    if match is None or value != int(value) or value < 1:
        raise PlanError(
            f"{option}: cannot read {text!r} as a whole number above 0; write 8192, 8k (8 x 1024) or 1M"
        )
    return int(value)


def parse_work_size(seq: str | None, micro_batch: int | None, questions: Questions) -> tuple[int, int]:
    """Tokens of a sequence and sequences of a micro-batch; None is the default, 8k and 1.

    Raises:
        PlanError: one of them is given beside a question that has values of its own for it.
    """
    asked = {"--sweep": questions.sweep and questions.sweep.axis, "--what-fits": questions.what_fits}
    given: dict[Axis, tuple[str, object]] = {"seq": ("--seq", seq), "batch": ("--micro-batch", micro_batch)}
    for question, axis in asked.items():
        option, value = given[axis] if axis else ("", None)
        if value is not None:
            raise PlanError(
                f"{option} {value} is one size, and {question} {axis} tries its own: drop {option}, or drop "
                f"{question}"
            )
    sequence = DEFAULT_SEQUENCE if seq is None else parse_count("--seq", seq)
    return sequence, 1 if micro_batch is None else micro_batch


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
            size = parse_size(value)
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


def parse_schedule(text: str) -> Schedule:
    """``--update-schedule``. Raises PlanError."""
    known: dict[str, Schedule] = {name: name for name in get_args(Schedule)}
    _check_known("--update-schedule", text, known)
    return known[text]


def parse_order(text: str) -> Order:
    """``--micro-batch-order``. Raises PlanError."""
    known: dict[str, Order] = {name: name for name in get_args(Order)}
    _check_known("--micro-batch-order", text, known)
    return known[text]


def _check_known(option: str, text: str, known: Collection[str]) -> None:
    if text not in known:
        raise PlanError(f"{option} {text!r}: give one of {', '.join(known)}")


def parse_codecs(text: str | None) -> tuple[str, ...]:
    """``int8,int4``; names are checked against the codecs later. Raises PlanError."""
    if text is None:
        return ()
    names = tuple(part.strip() for part in text.split(","))
    if not all(names):
        raise PlanError(f"--allow-lossy {text!r} has an empty name: write int8, int4 or int8,int4")
    if len(set(names)) < len(names):
        raise PlanError(f"--allow-lossy {text!r} names a codec twice: drop one")
    return names


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


def parse_attention(text: str | None, dtype: Dtype) -> Attention:
    """None is the kernel that a GPU takes of itself. Raises PlanError with the known names."""
    if text is None:
        return "flash" if dtype == "bfloat16" else "efficient"
    for name in get_args(Attention):
        if text == name:
            known: Attention = name
            return known
    raise PlanError(f"--attention {text!r} is not known; {suggest(text, list(get_args(Attention)))}")


def parse_optimizer(text: str) -> OptimizerRule | OwnOptimizer:
    """``adamw``, ``galore(rank=128)``, ``frugal(density=0.25, state_dtype=int8)``.

    Raises:
        PlanError: with the known names, or with what an argument should be.
    """
    name, bracket, rest = (part.strip() for part in text.partition("("))
    rules = [rule.value for rule in OptimizerRule]
    if name not in (*rules, *NAMED):
        raise PlanError(f"--optimizer {name!r} is not known; {suggest(name, [*rules, *NAMED])}")
    if bracket and (not rest.endswith(")") or name in rules):
        what = f"{name} takes no arguments" if name in rules else "write it as 'galore(rank=128)'"
        raise PlanError(f"--optimizer {text!r}: {what}")
    if name in rules:
        return OptimizerRule(name)
    pairs = [part for part in rest.removesuffix(")").split(",") if part.strip()]
    found = parse_pairs(f"--optimizer {name}", pairs, "galore(rank=128, update_proj_gap=200)")
    for unused in ("lr", "weight_decay", "eps", "seed"):
        if unused in dict(found):
            raise PlanError(
                f"--optimizer {name}: {unused} changes neither bytes nor seconds: set it in the recipe"
            )
    own = OwnOptimizer(name=name, arguments=tuple((key, _number(value)) for key, value in found))
    own.section(lr=1.0)  # checks the arguments
    return own


def _number(text: str) -> bool | int | float | str:
    """What YAML would read."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


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
    given = {"data": data, "tensor": tensor, "context": context, "pipeline": pipeline, "expert": expert}
    for field, value in given.items():
        if value is not None and value < 1:
            raise PlanError(f"{DEGREE_OPTIONS[field]} must be at least 1, got {value}")
    others = tensor * context * pipeline
    if data is None:
        if gpus % others:
            raise PlanError(
                f"--tp {tensor} x --cp {context} x --pp {pipeline} = {others} does not divide --gpus x "
                f"--nodes = {gpus}: change one"
            )
        data = gpus // others
    if data * others != gpus:
        raise PlanError(
            f"--dp {data} x --tp {tensor} x --cp {context} x --pp {pipeline} = {data * others}, but --gpus x "
            f"--nodes = {gpus}: change one, or leave --dp out"
        )
    replicas = data * context
    if zero_stage not in (None, 0, 1, 2, 3):
        raise PlanError(f"--zero must be 0, 1, 2 or 3, got {zero_stage}")
    if zero_stage and replicas == 1:
        raise PlanError(
            f"--zero {zero_stage} divides state over the ranks that hold the same weights, and --dp {data} x "
            f"--cp {context} leaves one: give more --gpus or a smaller --tp or --pp, or drop it"
        )
    if replicas % expert:
        raise PlanError(
            f"--ep {expert} does not divide --dp {data} x --cp {context} = {replicas}, out of which expert "
            "ranks are taken: give a divisor"
        )
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
    return Degrees(
        data=data,
        zero_stage=_stage(zero_stage, ranks=replicas),
        tensor=tensor,
        sequence_parallel=sequence_parallel is not False,
        context=context,
        context_method="ulysses" if context_method == "ulysses" else "ring",
        pipeline=pipeline,
        expert=expert,
    )


def _stage(given: int | None, *, ranks: int) -> Literal[0, 1, 2, 3]:
    """All state is sharded unless the user says otherwise, where there is anything to share it with."""
    stages: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
    if given is None:
        return 3 if ranks > 1 else 0
    return stages[given]
