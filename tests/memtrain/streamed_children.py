"""Processes that stream a model, for tests that measure or kill them.

python streamed_children.py build SWAP_DIRECTORY
python streamed_children.py read SWAP_DIRECTORY FOLDER
"""

import json
import sys

import torch
from transformers import AutoConfig

from memtrain import Budget
from memtrain.planner import resident
from memtrain.streamed_models import streamed_model

MiB = 1 << 20
SMALLEST = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
BLOCK = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8}
"""32 MiB in bf16: four projections of 2 MiB, three of 8 MiB, and norms."""
VOCABULARY = 4096  # embedding and head: 8 MiB each


def llama(layers):
    """112 MiB of weights with 3 layers, 240 MiB with 7; the largest weights have 8 MiB."""
    return AutoConfig.for_model("llama", **BLOCK, num_hidden_layers=layers, vocab_size=VOCABULARY)


def main(command, swap, *rest):
    resident.limit_heap()
    budget = Budget(device="1GiB", nvme=f"{swap}:512MiB")
    # Whatever is imported late, or touched first, counts as the libraries'.
    warm = AutoConfig.for_model("llama", **SMALLEST, vocab_size=2048)
    streamed_model(warm, dtype=torch.bfloat16, budget=budget).close()
    before = resident.read()
    source = rest[0] if command == "read" else llama(int(rest[0]))
    torch.manual_seed(0)
    with streamed_model(source, dtype=torch.bfloat16, budget=budget) as streamed:
        after = resident.read()
        weight_bytes = sum(p.numel() * 2 for p in streamed.model.parameters())
    print(
        json.dumps(
            {
                "weight_bytes": weight_bytes,
                "before_bytes": before.total_bytes,
                "peak_bytes": after.peak_bytes,
                "left_bytes": after.total_bytes - before.total_bytes,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
