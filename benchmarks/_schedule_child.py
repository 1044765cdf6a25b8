"""Train a streamed Llama under one schedule, in this process: an optimizer step for each line of input.

Prints ``ready`` after two steps that do not count, a JSON line for each step, and when the input ends one
more for the process, with a digest of all losses and of the weights at the end.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

WARM_UP_STEPS = 2
SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 8192,
    "tie_word_embeddings": False,
}
"""A block has 12.8 million parameters: 24.5 MiB of bf16 weights, 147 MiB of state with masters."""
AWAY = {"state": {"weight_tier": "nvme", "gradient_tier": "nvme", "optimizer_tier": "nvme"}}
LEARNING_RATE = 1e-4


def disk_bytes() -> int:
    """What this process has read from and written to disks so far, as the kernel counts it."""
    counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(counts["read_bytes"]) + int(counts["write_bytes"])


def batches(args: argparse.Namespace, number: int) -> list[dict[str, Any]]:
    """The micro-batches of step ``number``."""
    import torch

    generator = torch.Generator().manual_seed(number)
    shape = (args.micro_batches, 1, args.sequence)
    return [
        {"input_ids": ids, "labels": ids}
        for ids in torch.randint(SHAPE["vocab_size"], shape, generator=generator)
    ]


def step(session: Any, given: list[dict[str, Any]]) -> tuple[float, list[float]]:
    """Seconds of one optimizer step, an update that is still pending included, and its losses."""
    began = time.perf_counter()
    losses = [loss.item() for loss in session.accumulate(given)]
    session.optimizer.step()
    session.optimizer.zero_grad()
    return time.perf_counter() - began, losses


def weights_digest(session: Any) -> str:
    """Of all weights, unit by unit."""
    import torch
    import xxhash

    from memtrain.offload.snapshot_weights import present

    digest = xxhash.xxh3_128()
    for weight in present(session.model.parameters(), session.weights):
        digest.update(weight.detach().view(torch.uint8).numpy())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schedule", required=True)
    parser.add_argument("--order", default="horizontal")
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--micro-batches", type=int, required=True)
    parser.add_argument("--sequence", type=int, required=True)
    parser.add_argument("--swap", required=True)
    parser.add_argument("--budget", required=True)
    args = parser.parse_args()

    import torch
    from transformers import AutoConfig

    import memtrain

    budget = memtrain.Budget(device=args.budget, nvme=f"{args.swap}:{1 + args.blocks // 4}GiB")
    config = AutoConfig.for_model("llama", **SHAPE, num_hidden_layers=args.blocks, use_cache=False)
    torch.manual_seed(0)
    with memtrain.streamed_model(config, dtype=torch.bfloat16, budget=budget) as streamed:
        model = streamed.model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
        options = memtrain.PlannerOptions(
            force=AWAY,
            update_schedule=args.schedule,
            micro_batch_order=args.order,
            gradients_untouched=True,
        )
        with memtrain.prepare(
            model,
            optimizer,
            batches(args, 0)[0],
            budget=budget,
            master_weights=True,
            micro_batches=args.micro_batches,
            options=options,
        ) as session:
            losses: list[list[float]] = []
            for number in range(WARM_UP_STEPS):
                losses.append(step(session, batches(args, number))[1])
            print("ready", flush=True)
            for number, _ in enumerate(sys.stdin, WARM_UP_STEPS):
                before = disk_bytes()
                seconds, found = step(session, batches(args, number))
                losses.append(found)
                print(json.dumps({"seconds": seconds, "disk_bytes": disk_bytes() - before}), flush=True)
            session.flush()
            plan = session.plan
            report = {
                "digest": f"{[[loss.hex() for loss in step] for step in losses]} {weights_digest(session)}",
                "predicted_step_seconds": plan.step_seconds,
                "bytes_moved_per_step": plan.bytes_moved_per_step,
                "peak_bytes": session.measure()["process_peak_bytes"],
                "predicted_peak_bytes": session.measure()["predicted_peak_bytes"],
                "order": plan.micro_batch_order.value,
                "schedule": plan.update_schedule.value,
                "staging": str(plan.staging),
            }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
