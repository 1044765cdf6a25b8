"""Train a model whose weights are streamed, in this process; ends with one JSON line.

python benchmarks/_streamed_child.py --blocks 8 --swap /var/tmp --budget 800MiB
python benchmarks/_streamed_child.py --model data/models/smollm2-135m --swap /var/tmp --budget 800MiB

``--blocks``: a random Llama of so many equal blocks, whose weights, gradients and state are all on the disk.
``--model``: a folder; what leaves memory is the planner's choice.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

from _train_child import (
    CLIP_NORM,
    INFEASIBLE_EXIT_CODE,
    LEARNING_RATE,
    WEIGHT_DECAY,
    memory_bytes,
    token_batches,
)

BLOCK = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
}
"""13.5 MiB of bf16 weights: four projections of 1.125 MiB, three of 3 MiB."""
VOCABULARY = 8192
SEQUENCE = 256
STEPS = 3
AWAY = {
    "block": {"action": "swap", "saved_tier": "nvme"},
    "state": {"weight_tier": "nvme", "gradient_tier": "nvme", "optimizer_tier": "nvme"},
}


def source_of(args: argparse.Namespace) -> Any:
    """What ``streamed_model`` takes."""
    from transformers import AutoConfig

    if args.model is not None:
        return args.model
    return AutoConfig.for_model(
        "llama", **BLOCK, num_hidden_layers=args.blocks, vocab_size=VOCABULARY, tie_word_embeddings=False
    )


def train(session: Any, batches: list[dict[str, Any]]) -> dict[str, Any]:
    """A step for each batch; seconds and losses."""
    seconds, losses = [], []
    for batch in batches:
        started = time.perf_counter()
        loss = session.model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        del loss
        session.optimizer.clip_grad_norm_(CLIP_NORM)
        session.optimizer.step()
        session.optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return {"losses": losses, "step_seconds": statistics.median(seconds[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--blocks", type=int)
    what.add_argument("--model")
    parser.add_argument("--sequence", type=int, default=SEQUENCE)
    parser.add_argument("--swap", required=True)
    parser.add_argument("--swap-size", default="12GiB")
    parser.add_argument("--budget", required=True)
    args = parser.parse_args()

    import torch

    import memtrain
    from memtrain.optimizers import measured_state_bytes

    budget = memtrain.Budget(device=args.budget, nvme=f"{args.swap}:{args.swap_size}")
    torch.manual_seed(0)
    # Equal blocks stay whole: what is compared is depth, and automatic tiles depend on what is free at first.
    tiles = "auto" if args.blocks is None else None
    made = memtrain.streamed_model(source_of(args), dtype=torch.bfloat16, budget=budget, tile_bytes=tiles)
    with made as streamed:
        built_peak_bytes = memory_bytes("VmHWM")
        model = streamed.model.train()
        model.config.use_cache = False
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
        )
        batches = token_batches(model.config.vocab_size, args.sequence, STEPS)
        try:
            session = memtrain.prepare(
                model,
                optimizer,
                batches[0],
                budget=budget,
                master_weights=True,
                options=memtrain.PlannerOptions(force=AWAY if args.model is None else {}),
            )
        except memtrain.InfeasibleError as error:
            short = sum(size for _, size in error.plan.shortfall_bytes)
            print(json.dumps({"shortfall_bytes": short, "message": str(error)}), flush=True)
            raise SystemExit(INFEASIBLE_EXIT_CODE) from error
        with session:
            found = train(session, batches)
            measured = session.measure()
            report = {
                "blocks": len(session.plan.blocks),
                "weight_bytes": sum(p.nbytes for p in model.parameters()),
                "state_bytes": measured_state_bytes(session.optimizer),
                "built_peak_bytes": built_peak_bytes,
                "peak_bytes": max(built_peak_bytes, int(measured["process_peak_bytes"])),
                "training_peak_bytes": measured["peak_bytes"],
                "predicted_peak_bytes": measured["predicted_peak_bytes"],
                "streamed_units": 0 if session.weights is None else len(session.weights.streamed),
                "bill": [(line.tier.value, line.category, line.size_bytes) for line in session.plan.bill],
                "staging": str(session.plan.staging),
                **found,
            }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
