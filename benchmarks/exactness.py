"""Bit-equality: training under every forced action and tier against plain PyTorch in memory.

    python benchmarks/exactness.py                        # twelve minutes on two cores
    python benchmarks/exactness.py --only gpt2 --plan "swap"

Twenty steps with dropout, accumulation 2 and clipping, in fp32 and in bf16 with fp32 master weights. The
reference is the loop in ``train_reference``: plain PyTorch, no memtrain but its chunked loss where the case
uses it. A case is equal when the losses, the gradient norms and the gradients of the first and the last step,
and the final weights are all ``torch.equal``.

Prefixes of tokens are bit-equal where this machine's kernels do not depend on the number of rows. Where the
probe says that they do, losses must be equal within rounding; a model whose tokens cannot be cut is refused.
Exit code 1 when a case is none of these.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from _exactness_models import SEQUENCE, SUBJECTS, VOCABULARY, Subject
from _harness import publish, table
from torch import nn

import memtrain
from memtrain.optim.autograd.causal_lm import install_chunked_loss
from memtrain.planner.block_parts import largest_difference

STEPS = 20
MICRO_BATCHES = 2
CLIP_NORM = 1.0
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.1
SEED = 1234
CAPTURED_STEPS = (0, STEPS - 1)
"""Steps whose gradients are compared; losses and norms are compared at every step."""

PREFIX, ATTENDED = SEQUENCE // 2, SEQUENCE // 4
"""Tokens that are computed again, and of those with attention."""
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""By how much a loss may differ, relative, where this machine's kernels depend on the number of rows: some
hundred times what one operation of the precision rounds."""
CANNOT_BE_CUT = "its tokens cannot be cut"
"""In the planner's refusal of a prefix that is forced."""

OF_ALL_TOKENS = {"recomputed_tokens": None, "attention_tokens": ATTENDED}

Force = Mapping[str, Mapping[str, str | int | None]]
_HERE = {"gradient_tier": "device", "optimizer_tier": "device"}
_AWAY = {"gradient_tier": "nvme", "optimizer_tier": "nvme"}


def _recompute(action: str, *, saved: str = "device", inputs: str = "device") -> dict[str, str | int | None]:
    return {"action": action, "saved_tier": saved, "input_tier": inputs}


def _prefix(action: str, *, rest: str = "device", inputs: str = "device") -> dict[str, str | int | None]:
    return {"action": action, "recomputed_tokens": PREFIX, "rest_tier": rest, "input_tier": inputs}


# Name: what is forced, and the update's schedule.
PLANS: dict[str, tuple[Force, str]] = {
    "keep": ({"block": {"action": "keep"}, "state": _HERE}, "sequential"),
    "swap": ({"block": {"action": "swap", "saved_tier": "nvme"}, "state": _HERE}, "sequential"),
    "recompute": ({"block": _recompute("recompute"), "state": _HERE}, "sequential"),
    "recompute, input nvme": (
        {"block": _recompute("recompute", inputs="nvme"), "state": _HERE},
        "sequential",
    ),
    "attention device": ({"block": _recompute("recompute_except_attention"), "state": _HERE}, "sequential"),
    "attention nvme, input nvme": (
        {"block": _recompute("recompute_except_attention", saved="nvme", inputs="nvme"), "state": _HERE},
        "sequential",
    ),
    "nearly free device": ({"block": _recompute("recompute_nearly_free"), "state": _HERE}, "sequential"),
    "nearly free nvme, input nvme": (
        {"block": _recompute("recompute_nearly_free", saved="nvme", inputs="nvme"), "state": _HERE},
        "sequential",
    ),
    "prefix, others device": ({"block": _prefix("recompute"), "state": _HERE}, "sequential"),
    "prefix, others nvme": (
        {"block": _prefix("recompute", rest="nvme", inputs="nvme"), "state": _HERE},
        "sequential",
    ),
    "attention of a prefix": (
        {
            "block": _recompute("recompute_except_attention", saved="nvme") | OF_ALL_TOKENS,
            "state": _HERE,
        },
        "sequential",
    ),
    "attention of a prefix of a prefix": (
        {
            "block": _prefix("recompute_except_attention", rest="nvme") | {"attention_tokens": ATTENDED},
            "state": _HERE,
        },
        "sequential",
    ),
    "gradients nvme": (
        {"block": {"action": "keep"}, "state": {"gradient_tier": "nvme", "optimizer_tier": "device"}},
        "sequential",
    ),
    "optimizer nvme": (
        {"block": {"action": "keep"}, "state": {"gradient_tier": "device", "optimizer_tier": "nvme"}},
        "sequential",
    ),
    "optimizer nvme, ahead": (
        {"block": {"action": "keep"}, "state": {"gradient_tier": "device", "optimizer_tier": "nvme"}},
        "ahead",
    ),
    "all nvme, ahead": ({"block": {"action": "swap", "saved_tier": "nvme"}, "state": _AWAY}, "ahead"),
    "mixed, ahead": (
        {
            "block.0": {"action": "keep"},
            "block.1": {"action": "swap", "saved_tier": "nvme"},
            "block.2": _recompute("recompute", inputs="nvme"),
            "block.3": _recompute("recompute"),
            "state": _AWAY,
        },
        "ahead",
    ),
}


@dataclass(kw_only=True, slots=True)
class Record:
    """What one run leaves for comparison."""

    losses: list[float] = field(default_factory=list)
    norms: list[torch.Tensor] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    must_be_equal: bool = True
    """No prefix is computed again for which the probe found a difference."""


def build(subject: Subject, dtype: torch.dtype) -> nn.Module:
    """The same weights every time."""
    torch.manual_seed(SEED)
    return subject.build().to(dtype).train()


def batches() -> list[list[dict[str, torch.Tensor]]]:
    """Micro-batches by step."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(VOCABULARY, (STEPS, MICRO_BATCHES, 1, SEQUENCE), generator=generator)
    return [[{"input_ids": batch, "labels": batch} for batch in step] for step in ids]


def capture(record: Record, step: int, model: nn.Module) -> None:
    """Copy the gradients of ``model``, wherever they are."""
    if step not in CAPTURED_STEPS:
        return
    for name, parameter in model.named_parameters():
        gradient: Any = parameter.grad
        whole = gradient.materialize() if hasattr(gradient, "materialize") else gradient
        record.gradients[f"step {step}: {name}"] = whole.detach().clone()


def train_reference(subject: Subject, dtype: torch.dtype) -> Record:
    """Plain PyTorch in memory."""
    model = build(subject, dtype)
    if subject.chunked_loss:
        install_chunked_loss(model)
    weights = list(model.parameters())
    with_masters = dtype is torch.bfloat16
    masters = [weight.detach().float() for weight in weights] if with_masters else weights
    optimizer = torch.optim.AdamW(masters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    record = Record()
    torch.manual_seed(SEED)
    for step, micro_batches in enumerate(batches()):
        for batch in micro_batches:
            loss = model(**batch).loss / MICRO_BATCHES
            loss.backward()
            record.losses.append(loss.item())
        capture(record, step, model)
        if with_masters:
            for weight, master in zip(weights, masters, strict=True):
                master.grad = weight.grad.float()
        record.norms.append(nn.utils.clip_grad_norm_(masters, CLIP_NORM))
        optimizer.step()
        if with_masters:
            with torch.no_grad():
                for weight, master in zip(weights, masters, strict=True):
                    weight.copy_(master)
        model.zero_grad()
    record.weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    return record


def train_memtrain(subject: Subject, dtype: torch.dtype, force: Force, schedule: str, swap: str) -> Record:
    """The same under memtrain with a forced plan; the weights are read after ``close()``."""
    model = build(subject, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    data = batches()
    record = Record()
    torch.manual_seed(SEED)  # before prepare(): it must leave the generator as it found it
    session = memtrain.prepare(
        model,
        optimizer,
        data[0][0],
        budget=memtrain.Budget(device="6GiB", nvme=f"{swap}:2GiB"),
        micro_batches=MICRO_BATCHES,
        master_weights=dtype is torch.bfloat16,
        chunked_loss=subject.chunked_loss,
        options=memtrain.PlannerOptions(force=force, update_schedule=schedule, exact_only=False),
    )
    decided = zip(session.profile.blocks, session.plan.blocks, strict=True)
    record.must_be_equal = not any(largest_difference(block, decision) for block, decision in decided)
    try:
        for step, micro_batches in enumerate(data):
            for batch in micro_batches:
                loss = session.model(**batch).loss / MICRO_BATCHES
                loss.backward()
                record.losses.append(loss.item())
            capture(record, step, model)
            record.norms.append(session.optimizer.clip_grad_norm_(CLIP_NORM))
            session.optimizer.step()
            session.optimizer.zero_grad()
    finally:
        session.close()
    record.weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    return record


def first_difference(expected: Record, actual: Record) -> str | None:
    """Where two runs part, in the order in which a mistake would spread; None when they are bit-equal."""
    for index, (a, b) in enumerate(zip(expected.losses, actual.losses, strict=True)):
        if a != b:
            return f"loss of step {index // MICRO_BATCHES}: {a!r} and {b!r}"
        if (index + 1) % MICRO_BATCHES == 0:
            step = index // MICRO_BATCHES
            if not torch.equal(torch.as_tensor(expected.norms[step]), torch.as_tensor(actual.norms[step])):
                return f"gradient norm of step {step}: {expected.norms[step]} and {actual.norms[step]}"
    for kind in ("gradients", "weights"):
        wanted, found = getattr(expected, kind), getattr(actual, kind)
        if wanted.keys() != found.keys():
            return f"{kind}: {sorted(wanted.keys() ^ found.keys())} on one side only"
        for name, tensor in wanted.items():
            if tensor.dtype != found[name].dtype or not torch.equal(tensor, found[name]):
                return f"{kind}: {name}"
    return None


def judge(expected: Record, actual: Record, dtype: torch.dtype) -> str:
    """``bit-equal``, ``within rounding``, or where two runs part."""
    difference = first_difference(expected, actual)
    if difference is None or actual.must_be_equal:
        return difference or "bit-equal"
    pairs = zip(expected.losses, actual.losses, strict=True)
    worst = max(abs(a - b) / abs(a) for a, b in pairs)
    return "within rounding" if worst <= ROUNDING[dtype] else f"a loss differs by {worst:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="one model; nothing is published")
    parser.add_argument("--plan", choices=sorted(PLANS), help="one plan; nothing is published")
    parser.add_argument("--swap", default="/var/tmp", help="directory on a local disk")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    rows: list[tuple[str, ...]] = []
    results: list[str] = []
    with tempfile.TemporaryDirectory(prefix="memtrain_bench_", dir=args.swap) as swap:
        for subject in SUBJECTS:
            if args.only not in (None, subject.name):
                continue
            for dtype in (torch.float32, torch.bfloat16):
                expected = train_reference(subject, dtype)
                for name, (force, schedule) in PLANS.items():
                    if args.plan not in (None, name):
                        continue
                    if name.startswith("attention") and not subject.attention_kernel:
                        continue
                    start = time.perf_counter()
                    try:
                        result = judge(expected, train_memtrain(subject, dtype, force, schedule, swap), dtype)
                    except Exception as error:  # one broken case must not hide the others
                        first = error.__context__ or error  # closing after a failure may fail as well
                        refused = isinstance(error, ValueError) and CANNOT_BE_CUT in str(error)
                        result = "cannot be cut" if refused else f"{type(first).__name__}: {first}"
                    results.append(result)
                    regime = "fp32" if dtype is torch.float32 else "bf16, fp32 masters"
                    seconds = f"{time.perf_counter() - start:.1f}"
                    rows.append((subject.name, regime, name, result, seconds))
                    print("  ".join(rows[-1]), file=sys.stderr, flush=True)
                    gc.collect()
    text = table(("model", "regime", "forced plan", "result", "seconds"), rows)
    counts = {
        outcome: results.count(outcome) for outcome in ("bit-equal", "within rounding", "cannot be cut")
    }
    summary = {
        "cases": len(rows) - counts["cannot be cut"],
        "bit_equal": counts["bit-equal"],
        "within_rounding": counts["within rounding"],
        "refused": counts["cannot be cut"],
    }
    if args.only or args.plan:
        print(text)
    else:
        publish("exactness", text=text, summary=summary, details=rows)
    sys.exit(sum(counts.values()) != len(rows))


if __name__ == "__main__":
    main()
