"""Ways to keep less for backward: bytes that a Llama layer saves, time of a step, error of its gradients.

    python benchmarks/activations.py                # about three minutes on two idle cores

One layer (512 features, MLP 1376, 8 heads, 2 x 1024 tokens) and a model of twelve. Variants run in turns and
ratios are taken inside a round, all with one allocator, the one that memtrain uses. Bytes are those of all
storages that are alive between forward and backward. The peak of the twelve-layer step is a child's own
(resident memory of the process), above what it held before the step.

exact_vs_eager_time is the larger of the two ratios, layer and model, in bf16; exact_int8 is null where the
checkout has no lossy treatments. The layer is measured once more with 512 tokens, where Python and small
operators weigh more; that ratio is in the text alone.
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
FEW_TOKENS = 512
DTYPES = ("bfloat16", "float32")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="of the layer; of the model a quarter")
    parser.add_argument("--child", choices=("layer", "gelu", "model", "peak"), help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help=argparse.SUPPRESS)
    parser.add_argument("--variant", default="eager", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.child is not None:
        print(json.dumps(_child(args)), flush=True)
        return
    details: dict[str, Any] = {}
    for dtype in DTYPES:
        details[f"layer {dtype}"] = child("layer", dtype=dtype, rounds=args.rounds)
    few = f"layer bfloat16, {FEW_TOKENS} tokens"
    details[few] = child("layer", rounds=args.rounds, tokens=FEW_TOKENS)
    details["layer with a GELU MLP bfloat16"] = child("gelu", rounds=args.rounds)
    details["model bfloat16"] = child("model", rounds=max(3, args.rounds // 4))
    names = list(details["model bfloat16"])
    details["peak"] = {name: child("peak", variant=name) for name in names}
    text = "\n\n".join(
        [f"{title}\n{_table(details[title])}" for title in details if title != "peak"]
        + [f"peak of a step of the model, bfloat16\n{_peaks(details['peak'])}"]
    )
    layer, model = details["layer bfloat16"], details["model bfloat16"]
    text += f"\n\nexact against eager, seconds of the layer: {layer['exact']['vs_eager']:.3f}; "
    text += f"of {FEW_TOKENS} tokens: {details[few]['exact']['vs_eager']:.3f}"
    int8 = layer.get("exact + int8")
    summary = {
        "exact_vs_eager_bytes": round(layer["exact"]["bytes_ratio"], 4),
        "exact_int8_vs_eager_bytes": None if int8 is None else round(int8["bytes_ratio"], 4),
        "exact_vs_eager_time": round(max(r["exact"]["vs_eager"] for r in (layer, model)), 4),
    }
    publish("activations", text=text, summary=summary, details=details)


def child(what: str, **options: Any) -> Any:
    """What a process of its own reports."""
    command = [sys.executable, os.path.abspath(__file__), "--child", what]
    for key, value in options.items():
        command += [f"--{key}", str(value)]
    return dict(run_child(command, environment=child_environment("memtrain")).require())


def _child(args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from _activation_variants import BATCH, TOKENS, layer_job, model_job, peak_bytes, variants

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
        shape = (BATCH, TOKENS) if args.tokens is None else (1, args.tokens)
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
