"""Ways to keep less for backward: bytes that a Llama layer saves, time of a step, error of its gradients.

    python benchmarks/activations.py                # about five minutes on two idle cores

One layer (512 features, MLP 1376, 8 heads) on 512 tokens and on 2 x 1024, in bf16 and in fp32; one with
LayerNorm and a GELU MLP; and a model of twelve in bf16. Variants run in turns and ratios are taken inside a
round, all with one allocator, the one that memtrain uses. Bytes are those of all storages that are alive
between forward and backward. The peak of the twelve-layer step is a child's own (VmHWM: resident memory of
the process), above what it held before the step.

exact_vs_eager_time is the largest of the medians over all Llama layers and the model. The ratios of bytes are
those of the layer in bf16 on 2 x 1024 tokens, whose bytes are also known by hand; the text has the others.
exact_int8 is null where the checkout has no lossy treatments.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from typing import Any

from _harness import MiB, child_environment, publish, run_child, table

MODEL_BATCH, MODEL_TOKENS = 4, 512
MODEL_ROUNDS = 3
"""A round of all variants of the model takes ten seconds."""
TOKENS = (512, 2048)
DTYPES = ("bfloat16", "float32")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=16, help="of each layer")
    parser.add_argument("--child", choices=("layer", "gelu", "model", "peak"), help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help=argparse.SUPPRESS)
    parser.add_argument("--variant", default="eager", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, default=TOKENS[-1], help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.child is not None:
        print(json.dumps(_child(args)), flush=True)
        return
    layers = {
        f"layer {dtype}, {tokens} tokens": child("layer", dtype=dtype, rounds=args.rounds, tokens=tokens)
        for dtype in DTYPES
        for tokens in TOKENS
    }
    gelu = {"layer with a GELU MLP bfloat16": child("gelu", rounds=args.rounds)}
    model = {"model bfloat16": child("model", rounds=MODEL_ROUNDS)}
    peaks = {name: child("peak", variant=name) for name in model["model bfloat16"]}
    tables = layers | gelu | model
    times = {title: report["exact"]["vs_eager"] for title, report in (layers | model).items()}
    worst = max(times, key=lambda title: times[title])
    text = "\n\n".join(
        [f"{title}\n{_table(report)}" for title, report in tables.items()]
        + [f"peak of a step of the model, bfloat16\n{_peaks(peaks)}"]
        + [f"exact against eager, seconds: {times[worst]:.3f} at most ({worst})"]
    )
    known = layers[f"layer {DTYPES[0]}, {TOKENS[-1]} tokens"]
    int8 = known.get("exact + int8")
    summary = {
        "exact_vs_eager_bytes": round(known["exact"]["bytes_ratio"], 4),
        "exact_int8_vs_eager_bytes": None if int8 is None else round(int8["bytes_ratio"], 4),
        "exact_vs_eager_time": round(times[worst], 4),
    }
    publish("activations", text=text, summary=summary, details=tables | {"peak": peaks})


def child(what: str, **options: Any) -> Any:
    """What a process of its own reports."""
    command = [sys.executable, os.path.abspath(__file__), "--child", what]
    for key, value in options.items():
        command += [f"--{key}", str(value)]
    return dict(run_child(command, environment=child_environment("memtrain")).require())


def _child(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from _activation_variants import SEQUENCE, layer_job, model_job, peak_bytes, variants

    torch.set_num_threads(2)
    dtype = getattr(torch, args.dtype)
    sizes = {"batch": MODEL_BATCH, "tokens": MODEL_TOKENS}
    if args.child == "peak":
        model_job(dtype, args.variant, batch=1, tokens=8).step()
        job = model_job(dtype, args.variant, **sizes)
        before = peak_bytes()
        job.step()
        return {"step_bytes": peak_bytes() - before, "peak_bytes": peak_bytes()}
    if args.child != "model":
        gated = args.child == "layer"
        names = variants(gated=gated)
        shape = max(1, args.tokens // SEQUENCE), min(args.tokens, SEQUENCE)
        return _compared(
            {name: layer_job(dtype, name, shape=shape, gated=gated) for name in names}, args.rounds
        )
    return _compared({name: model_job(dtype, name, **sizes) for name in variants()}, args.rounds)


def _compared(jobs: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Bytes, error, seconds and ratios of every variant."""
    from _activation_variants import densify

    report: dict[str, dict[str, Any]] = {}
    for name, job in jobs.items():
        report[name] = {"bytes_per_token": job.saved_bytes_per_token()}
        _, out = job.step()
        densify(job)
        if name == "eager":
            plain_out, plain = out, job.gradients()
        gradients = job.gradients()
        distance = sum(float((gradients[key] - value).square().sum()) for key, value in plain.items())
        size = sum(float(value.square().sum()) for value in plain.values())
        report[name] |= {
            "bytes_ratio": report[name]["bytes_per_token"] / report["eager"]["bytes_per_token"],
            "gradient_error": (distance / size) ** 0.5,
            "forward_equal": bool((out == plain_out).all()),
        }
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    order = list(jobs)
    for index in range(rounds):
        for name in order if index % 2 else order[::-1]:
            seconds[name].append(jobs[name].step()[0])
    for name, times in seconds.items():
        report[name]["seconds"] = statistics.median(times)
        for other in ("eager", "checkpointing"):
            ratios = [a / b for a, b in zip(times, seconds[other], strict=True)]
            report[name][f"vs_{other}"] = statistics.median(ratios)
            report[name][f"vs_{other}_quartiles"] = statistics.quantiles(ratios, n=4)[::2]
    return report


def _table(report: dict[str, Any]) -> str:
    header = "variant,B/token,of eager,ms,of eager,(quartiles),of checkpointing,gradient error,forward".split(
        ","
    )
    rows = [
        (
            name,
            f"{row['bytes_per_token']:.0f}",
            f"{row['bytes_ratio']:.3f}",
            f"{1e3 * row['seconds']:.1f}",
            f"{row['vs_eager']:.3f}",
            "-".join(f"{q:.3f}" for q in row["vs_eager_quartiles"]),
            f"{row['vs_checkpointing']:.3f}",
            f"{row['gradient_error']:.2e}",
            "equal" if row["forward_equal"] else "differs",
        )
        for name, row in report.items()
    ]
    return table(header, rows)


def _peaks(report: dict[str, Any]) -> str:
    rows = [
        (name, f"{row['step_bytes'] / MiB:.0f}", f"{row['peak_bytes'] / MiB:.0f}")
        for name, row in report.items()
    ]
    return table(["variant", "MiB of the step", "MiB of the process"], rows)


if __name__ == "__main__":
    main()
