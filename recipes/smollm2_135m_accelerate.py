"""Fine-tune SmolLM2-135M in an ordinary Accelerate script, in a process of less than 1.2 GiB.

    accelerate launch --cpu --num_processes 1 recipes/smollm2_135m_accelerate.py --steps 10
    accelerate launch --cpu --num_processes 1 recipes/smollm2_135m_accelerate.py --tiny

memtrain is three lines of it: the plugin, the Accelerator that takes it, and the report at the end.
`make data` fetches the model and builds the corpus.
"""

from __future__ import annotations

if __name__ == "__main__":
    from memtrain.malloc import restart_with_allocator

    restart_with_allocator()  # before torch is loaded, or it would be loaded twice

import argparse
import itertools
from pathlib import Path

import torch
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from memtrain import Budget
from memtrain.data import Tokens
from memtrain.integrations.accelerate import Accelerator, MemtrainPlugin
from memtrain.weights import own_weights


class TokenWindows(Dataset[dict[str, torch.Tensor]]):
    """Windows of a token file that do not overlap; the labels are the tokens themselves."""

    def __init__(self, path: Path, length: int) -> None:
        self.tokens, self.length = Tokens(path), length

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.tokens.ids[index * self.length : (index + 1) * self.length].astype("int64")
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(ids)}


def load_model(options: argparse.Namespace) -> PreTrainedModel:
    """The model in bf16, in memory of its own; with ``--tiny`` a random one of 0.2 M parameters."""
    if options.tiny:
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            tie_word_embeddings=True,
        )
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    own_weights(model)  # the file's pages would stay in memory beside the weights
    return model.train()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="data/models/smollm2-135m", help="folder or hub name")
    parser.add_argument("--data", type=Path, default=Path("data/corpora/torch-sources/train.bin"))
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps, of two micro-batches each")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--budget", default="1.2GiB", help="of the whole process")
    parser.add_argument("--swap", default="6GiB", help="size of <output>/swap, or DIRECTORY:SIZE")
    parser.add_argument("--output", type=Path, default=Path("runs/smollm2_135m_accelerate"))
    parser.add_argument("--resume", action="store_true", help="go on from <output>/state")
    parser.add_argument("--tiny", action="store_true", help="a small random model on a text of tests/data")
    options = parser.parse_args()
    if options.tiny:
        options.data, options.sequence_length = Path("tests/data/corpus_train.txt"), 32
        options.budget, options.swap = "2GiB", "64MiB"
    if ":" not in options.swap:
        (options.output / "swap").mkdir(parents=True, exist_ok=True)
        options.swap = f"{options.output / 'swap'}:{options.swap}"
    return options


def main() -> None:
    """Train, and print the session's report."""
    options = parse()
    set_seed(0)
    plugin = MemtrainPlugin(
        budget=Budget(device=options.budget, nvme=options.swap), master_weights=True, nonfinite="raise"
    )
    accelerator = Accelerator(memtrain_plugin=plugin, gradient_accumulation_steps=2)

    model = load_model(options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, weight_decay=0.01, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    loader = DataLoader(TokenWindows(options.data, options.sequence_length), batch_size=1, shuffle=True)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    if options.resume:
        accelerator.load_state(str(options.output / "state"))

    step = scheduler.scheduler.last_epoch
    for batch in itertools.islice(loader, 2 * (options.steps - step)):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            step += 1
            accelerator.print(f"step {step}/{options.steps} loss {loss.item():.4f}", flush=True)

    accelerator.save_state(str(options.output / "state"))
    accelerator.print(accelerator.memtrain_session.report())
    accelerator.end_training()


if __name__ == "__main__":
    main()
