"""Train a random Llama whose weights are streamed, in this process; ends with one JSON line.

python benchmarks/_streamed_child.py --blocks 8 --swap /var/tmp --budget 800MiB
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

from _train_child import LEARNING_RATE, WEIGHT_DECAY, memory_bytes, token_batches

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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--swap", required=True)
    parser.add_argument("--swap-size", default="24GiB")
    parser.add_argument("--budget", required=True)
    args = parser.parse_args()

    import torch
    from transformers import AutoConfig

    import memtrain

    budget = memtrain.Budget(device=args.budget, nvme=f"{args.swap}:{args.swap_size}")
    config = AutoConfig.for_model(
        "llama", **BLOCK, num_hidden_layers=args.blocks, vocab_size=VOCABULARY, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    with memtrain.streamed_model(config, dtype=torch.bfloat16, budget=budget) as streamed:
        built_peak_bytes = memory_bytes("VmHWM")
        model = streamed.model.train()
        model.config.use_cache = False
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
        )
        batches = token_batches(VOCABULARY, SEQUENCE, STEPS)
        with memtrain.prepare(
            model,
            optimizer,
            batches[0],
            budget=budget,
            master_weights=True,
            options=memtrain.PlannerOptions(force=AWAY),
        ) as session:
            seconds, losses = [], []
            for batch in batches:
                started = time.perf_counter()
                loss = session.model(**batch).loss
                loss.backward()
                session.optimizer.step()
                session.optimizer.zero_grad()
                losses.append(loss.item())
                seconds.append(time.perf_counter() - started)
            measured = session.measure()
            weight_bytes = sum(p.nbytes for p in model.parameters())
            state_bytes = sum(12 * p.numel() for p in model.parameters())
    print(
        json.dumps(
            {
                "blocks": args.blocks,
                "weight_bytes": weight_bytes,
                "state_bytes": state_bytes,
                "built_peak_bytes": built_peak_bytes,
                "peak_bytes": max(built_peak_bytes, int(measured["process_peak_bytes"])),
                "training_peak_bytes": measured["peak_bytes"],
                "predicted_peak_bytes": measured["predicted_peak_bytes"],
                "step_seconds": statistics.median(seconds[1:]),
                "losses": losses,
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()
