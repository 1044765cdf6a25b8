"""A million tokens on eight A800: predictions of MEMO's policy and of our plan, beside what was published.

    python benchmarks/memo.py            # about a minute
    python benchmarks/memo.py --quick    # a smoke test, nothing kept

Every number but the published ones is a prediction: a traced model, quoted rates (each with its source,
``planner/gpus.py`` and ``links.py``) and the simulator of ``planner.ranges``. None was fitted to the paper.
``memo_published.json`` holds what could be read of the paper, where, and what could not.

MEMO's policy: parameters, gradients and the optimizer's state stay on the GPU, inputs and attention outputs
leave, of all else the tokens that a fraction alpha names; the rest is recomputed. Every alpha in sixteenths
that fits is simulated and the best taken, where MEMO takes the largest that its two inequalities allow. One
departure: MEMO's last two layers never leave; here the slots are those of the last layer and of the loss.

- ours_mfu, memo_policy_mfu: predicted for 7B, 1 M tokens, 8 A800-80G; attention counted under its mask.
- published_mfu: measured by MEMO's authors there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from _harness import BENCHMARKS, BenchmarkError, GiB, publish, table
from _memo_model import estimate, shape

from memtrain.planner.compose import machine_for
from memtrain.planner.estimate import TensorClass
from memtrain.planner.forecast import Forecast, make_forecast
from memtrain.planner.job import Job
from memtrain.planner.links import interconnect
from memtrain.planner.lowering import problem_of
from memtrain.planner.lowering.seconds import Clock
from memtrain.planner.lowering.tensors import Division, Fate, class_bytes
from memtrain.planner.parallel import Degrees
from memtrain.planner.ranges.baselines import RULES
from memtrain.planner.ranges.check import check
from memtrain.planner.ranges.choices import RECOMPUTE
from memtrain.planner.ranges.formulate import formulate
from memtrain.planner.ranges.model import DEVICE, Problem
from memtrain.planner.ranges.simulate import simulate
from memtrain.planner.ranges.solve import SolveOptions
from memtrain.planner.ranges.uniform_states import uniform_states

MEMO = "uniform alpha (MEMO)"
PUBLISHED: dict[str, Any] = json.loads((BENCHMARKS / "memo_published.json").read_text())
QUICK_SEQUENCE = 1 << 17


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """A plan of MEMO's making."""

    alpha: float
    step_seconds: float
    """Of the simulated program."""
    peak_bytes: Mapping[str, int]
    """By place."""


def job_of(point: Mapping[str, Any], sequence: int) -> Job:
    """One GPU of a published run."""
    machine = PUBLISHED["machine"]
    sizes = PUBLISHED["models"][point["model"]]
    hosts = point["gpus"] // machine["gpus_per_host"]
    degrees = Degrees(tensor=point["tensor"], context=point["context"], zero_stage=1)
    return Job(
        estimate=estimate(sizes, sequence),
        shape=shape(sizes),
        setup=machine_for(machine["gpu"], gpus=machine["gpus_per_host"], dram=machine["dram"]),
        degrees=degrees,
        network=interconnect("infiniband-hdr") if hosts > 1 else None,
    )


def memo_policy(problem: Problem) -> Policy:
    """The best of MEMO's plans. Raises BenchmarkError where none fits."""
    blocks = tuple(
        dataclasses.replace(b, states=tuple(dataclasses.replace(s, places=(DEVICE,)) for s in b.states))
        for b in problem.blocks
    )
    found = list(_memo_plans(dataclasses.replace(problem, blocks=blocks)))
    if not found:
        raise BenchmarkError("no alpha fits")
    return min(found, key=lambda policy: policy.step_seconds)


def _memo_plans(problem: Problem) -> Iterator[Policy]:
    formulated = formulate(problem)
    for plan in RULES[MEMO](problem):
        counts = {
            variables[action]: count
            for block, chosen in zip(formulated.choices.counts, plan, strict=True)
            for variables, actions in zip(block, chosen, strict=True)
            for action, count in actions.items()
        }
        decisions = formulated.decisions(counts | next(uniform_states(formulated)))
        timeline = simulate(formulated, decisions)
        if not formulated.excess(decisions):
            peaks = {peak.place: peak.size_bytes for peak in timeline.peaks}
            yield Policy(alpha=_alpha(problem, plan), step_seconds=timeline.step_seconds, peak_bytes=peaks)


def _alpha(problem: Problem, plan: Any) -> float:
    """Of the first layer's tokens, the fraction that leaves with the class that may be recomputed."""
    index = next(i for i, block in enumerate(problem.blocks) if block.classes)
    for tensor, chosen in zip(problem.blocks[index].classes, plan[index], strict=True):
        if tensor.recompute_seconds and not tensor.attention:
            return 1 - chosen.get(RECOMPUTE, 0) / tensor.chunks
    raise BenchmarkError("no class of tensors can be recomputed")


def ruled_alpha(job: Job) -> tuple[float, float]:
    """What MEMO's inequalities allow at the most: for the overlap, and by the host's memory (4.1)."""
    part = job.estimate.classes[0]
    sizes = class_bytes(part, Division(estimate=job.estimate, shape=job.shape, degrees=job.degrees))
    always = sizes.pop(Fate.INPUT) + sizes.pop(Fate.ATTENTION)
    window = layer_seconds(job)["forward"] * job.setup.host_link.write.value
    memory = job.setup.budget.host_bytes / (job.shape.layers - 2)
    return (window - always) / sum(sizes.values()), (memory - always) / sum(sizes.values())


def layer_seconds(job: Job) -> dict[str, float]:
    """Of one layer on one GPU: what a pass takes, and what of it is what."""
    clock = Clock(job, Division(estimate=job.estimate, shape=job.shape, degrees=job.degrees))
    part = job.estimate.classes[0]
    whole = clock.part(part, clock.traffic_of_block())
    found = {"forward": whole.forward, "backward": whole.backward}
    for index, op in enumerate(part.operations):
        backward = index >= part.forward_operations
        kind = "attention" if op.attention else "products" if op.flops else "other"
        name = f"{kind} {'backward' if backward else 'forward'}"
        found[name] = found.get(name, 0.0) + clock.operation(op, part, backward=backward)
    for name in ("forward", "backward"):
        computed = math.fsum(seconds for key, seconds in found.items() if key.endswith(f" {name}"))
        found[f"messages {name}"] = found[name] - computed
    return found


def hidden_from(point: Mapping[str, Any]) -> int:
    """The shortest sequence, in steps of 8 K, whose forward hides the copy of all that a layer saves."""
    step = 8 << 10
    for sequence in range(step, 1 << 20, step):
        if ruled_alpha(job_of(point, sequence))[0] >= 1:
            return sequence
    raise BenchmarkError("nothing up to 1 M tokens hides it")


def observed() -> dict[str, tuple[float, float]]:
    """What the paper says of 7B on 8 GPUs: predicted, and published."""
    said, point = PUBLISHED["observations"], PUBLISHED["points"][0]
    one = job_of(point, point["sequence"]).estimate
    layer = one.classes[0]
    attention = layer.class_bytes()[TensorClass.ATTENTION_OUTPUT]
    at = layer_seconds(job_of(point, said["attention_forward_share"]["sequence"]))
    predicted = {
        "skeletal_bytes": layer.saved_bytes * len(one.blocks),
        "attention_output_share": attention / layer.saved_bytes,
        "attention_forward_share": at["attention forward"] / at["forward"],
        "swap_hidden_from_tokens": hidden_from(point),
    }
    return {name: (value, said[name]["value"]) for name, value in predicted.items()}


def measure(point: Mapping[str, Any], sequence: int, options: SolveOptions) -> dict[str, Any]:
    """One point under both policies. Raises BenchmarkError where ours is slower, or its plan is at fault."""
    job = job_of(point, sequence)
    ours = make_forecast(job, options)
    faults = check(ours.plan, ours.problem)
    if faults or not ours.fits:
        raise BenchmarkError(f"{point['model']}, {sequence} tokens: {ours.plan.status}, {faults[:3]}")
    memo = memo_policy(problem_of(job))
    outside = ours.step_seconds - ours.plan.step_seconds
    row = {
        "model": point["model"],
        "sequence": sequence,
        "gpus": point["gpus"],
        "published_mfu": point["mfu"] if sequence == point["sequence"] else None,
        "ours": _row(ours, ours.step_seconds, {p.name: p.peak_bytes for p in ours.places}),
        "memo_policy": _row(ours, memo.step_seconds + outside, memo.peak_bytes),
        "without_limit": _row(ours, ours.unlimited_seconds, {}),
        "alpha": memo.alpha,
        "alpha_by_rule": ruled_alpha(job),
        "layer_seconds": layer_seconds(job),
        "gap": ours.plan.gap,
        "solver": ours.plan.solver,
    }
    if ours.step_seconds > memo.step_seconds + outside:
        raise BenchmarkError(f"ours is slower than MEMO's policy: {row}")
    return row


def _row(forecast: Forecast, step_seconds: float, peaks: Mapping[str, int]) -> dict[str, Any]:
    job = forecast.job
    return {
        "mfu": forecast.mfu * forecast.step_seconds / step_seconds,
        "step_seconds": step_seconds,
        "tokens_per_gpu_second": job.tokens_per_step / step_seconds / job.degrees.gpus,
        "peak_bytes": dict(peaks),
    }


def report(rows: list[dict[str, Any]], facts: Mapping[str, tuple[float, float]]) -> str:
    """Tables."""
    names = list(rows[0]["layer_seconds"])
    layers = [[row["model"], *(f"{row['layer_seconds'][name]:.3f}" for name in names)] for row in rows]
    said = [[name, f"{predicted:.6g}", f"{value:.6g}"] for name, (predicted, value) in facts.items()]
    parts = [
        _policies(rows),
        "Alpha, and what MEMO's two inequalities allow\n" + _alphas(rows),
        "Seconds of one layer on one GPU\n" + table(["model", *names], layers),
        "7B on 8 GPUs\n" + table(["", "predicted", "published"], said),
    ]
    return "\n\n".join(parts)


def _policies(rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        what = f"{row['model']}, {row['sequence'] >> 10} K, {row['gpus']} GPUs"
        for policy in ("ours", "memo_policy", "without_limit"):
            one = row[policy]
            times = [f"{one['step_seconds']:.1f}", f"{one['tokens_per_gpu_second']:.1f}"]
            held = one["peak_bytes"]
            peaks = [f"{held[place] / GiB:.1f}" if held else "-" for place in (DEVICE, "host")]
            cells.append([what, policy, f"{100 * one['mfu']:.2f}", *times, *peaks])
        if row["published_mfu"]:
            cells.append([what, "(published)", f"{100 * row['published_mfu']:.2f}", *["-"] * 4])
    header = ["job", "predicted", "MFU %", "step s", "tokens/s/GPU", "GPU GiB", "host GiB, of a GPU"]
    return table(header, cells)


def _alphas(rows: list[dict[str, Any]]) -> str:
    return table(
        ["model", "best simulated", "overlap", "host's memory"],
        [[r["model"], *(f"{alpha:.3f}" for alpha in (r["alpha"], *r["alpha_by_rule"]))] for r in rows],
    )


def main() -> None:
    """Predict every point and publish."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the first point, with a short sequence")
    quick = parser.parse_args().quick
    points = PUBLISHED["points"][:1] if quick else PUBLISHED["points"]
    options = SolveOptions(seconds=4.0 if quick else 20.0)
    rows = [measure(point, QUICK_SEQUENCE if quick else point["sequence"], options) for point in points]
    facts = observed()
    summary = {
        "ours_mfu": rows[0]["ours"]["mfu"],
        "memo_policy_mfu": rows[0]["memo_policy"]["mfu"],
        "published_mfu": PUBLISHED["points"][0]["mfu"],
    }
    text = report(rows, facts)
    if quick:
        print(text)
        print(json.dumps(summary))
    else:
        publish("memo", text=text, summary=summary, details={"points": rows, "observations": facts})


if __name__ == "__main__":
    main()
