"""One training run of ``quality.py`` in this process, on one thread; ends with one JSON line.

    python benchmarks/_quality_child.py --task scratch --method "galore rotate" --lr 1e-2 --seed 0

Weights, the order of the data and the schedule follow from the seed alone, so that runs of one seed differ in
the method only. The matrices of attention and feed-forward layers get the method; embeddings, head and norms
get the same AdamW at the same rate under every method.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _quality_methods import METHODS
from torch import nn

from memtrain.data import Tokens, Windows
from memtrain.optim.roles import classify, param_groups

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 0.1
"""Of the steps; then a cosine down to a tenth of the rate."""
FINAL_RATE = 0.1


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model, its text, and how long it is trained."""

    make_model: Callable[[], nn.Module]
    corpus: str
    """Folder below data/corpora."""
    extension: str
    sequence: int
    batch: int
    steps: int
    heldout_batches: int
    other_lr: float
    """Of everything that is not under test."""
    update_gap: int
    rate: float
    """What the learning rates of ``_quality_methods`` are multiplied with."""


def tiny_llama() -> nn.Module:
    """10.8 M parameters over bytes, fp32; trained under bf16 autocast."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=256,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def smollm2() -> nn.Module:
    """SmolLM2-135M-Instruct in bf16; the optimizers keep fp32 masters."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(ROOT / "data/models/smollm2-135m", dtype=torch.bfloat16)


TASKS = {
    "scratch": Task(
        make_model=tiny_llama,
        corpus="shakespeare",
        extension="txt",
        sequence=128,
        batch=16,
        steps=200,
        heldout_batches=12,
        other_lr=3e-3,
        update_gap=50,
        rate=1.0,
    ),
    "continue": Task(
        make_model=smollm2,
        corpus="torch-sources",
        extension="bin",
        sequence=256,
        batch=2,
        steps=40,
        heldout_batches=24,
        other_lr=3e-5,
        update_gap=20,
        rate=0.03,
    ),
}


def batches(task: Task, split: str, seed: int | None) -> Windows:
    """Batches of one split; in order without a seed."""
    path = ROOT / "data/corpora" / task.corpus / f"{split}.{task.extension}"
    return Windows(Tokens(path), sequence_length=task.sequence, batch_size=task.batch, seed=seed)


@torch.no_grad()
def heldout_loss(model: nn.Module, task: Task) -> float:
    """Mean loss in nats a token over batches spread evenly over the held-out text."""
    windows = batches(task, "heldout", None)
    chosen = torch.linspace(0, windows.batches_per_pass - 1, task.heldout_batches).long().tolist()
    return sum(float(loss_of(model, windows, index)) for index in chosen) / len(chosen)


def loss_of(model: nn.Module, windows: Windows, index: int) -> torch.Tensor:
    """Of one batch."""
    ids = torch.from_numpy(windows.batch(index))
    with torch.autocast("cpu", torch.bfloat16):  # thrice as many steps of the fp32 model in the same time
        loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def schedule(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to ``FINAL_RATE``."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    angle = math.pi * (step - warm) / max(1, steps - warm)
    return FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(angle)) / 2


def run(task: Task, method: str, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """Train and evaluate."""
    torch.manual_seed(seed)
    model = task.make_model()
    made = METHODS[method]
    groups = param_groups(model, classify(model), **made.projected(task.update_gap))
    for group in groups:
        if group.get("projection", "") is None:
            group["lr"] = task.other_lr
            group |= made.others
    optimizer = made.make(groups, lr * task.rate, master="fp32" if task.rate != 1 else "none")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps))
    windows = batches(task, "train", seed)
    losses, began = [], time.monotonic()
    for step in range(steps):
        loss = loss_of(model, windows, step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    seconds = time.monotonic() - began
    found = optimizer.state_bytes()
    return {
        "heldout_nats": heldout_loss(model.eval(), task),
        "train_nats": losses,
        "state_bytes": sum(found.values()),
        "state_bytes_by_part": found,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds, 1),
        "steps": steps,
    }


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description="One run of quality.py.")
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--steps", type=int, help="instead of the task's")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    task = TASKS[asked.task]
    print(json.dumps(run(task, asked.method, asked.lr, asked.seed, asked.steps or task.steps)))


if __name__ == "__main__":
    main()
