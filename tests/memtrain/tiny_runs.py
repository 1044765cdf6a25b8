"""Small recipes, their runs, and what these leave behind and tell."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from memtrain.recipe import Recipe, parse_recipe

CORPUS = Path(__file__).parents[1] / "data"
TINY = Path("recipes/tiny_llama_cpu.yaml")


def recipe_for(output: Path, **sections: dict[str, Any]) -> Recipe:
    data: dict[str, Any] = {
        "name": "test",
        "model": {
            "config": {
                "model_type": "llama",
                "vocab_size": 256,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
            },
            "dtype": "float32",
        },
        "data": {
            "train": str(CORPUS / "corpus_train.txt"),
            "heldout": str(CORPUS / "corpus_heldout.txt"),
            "sequence_length": 16,
        },
        "budget": {"device": "4GiB"},
        "training": {"steps": 4, "accumulation": 2, "micro_batch_size": 2, "max_grad_norm": 0.5},
        "optimizer": {"name": "AdamW", "lr": 1e-2, "weight_decay": 0.1, "master_weights": False},
        "schedule": {"name": "cosine", "warmup_steps": 1, "final_fraction": 0.1},
        "evaluation": {"batches": 2},
        "output": {"directory": str(output)},
    }
    for name, values in sections.items():
        data[name] = {**data.get(name, {}), **values}
    return parse_recipe(data)


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def told_in_one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What went to stderr: one line, without the bar that transformers may draw."""
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def run_tiny(output: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    small = ["data.sequence_length=32", "training.steps=4", "checkpoint.every=2", "checkpoint.keep=2"]
    program = Path(sys.executable).with_name("memtrain")
    return subprocess.run(
        [program, "run", TINY, "--", f"output.directory={output}", *small, *overrides],
        capture_output=True,
        text=True,
        check=False,
    )


def kill_after(output: Path, steps: int, *overrides: str) -> None:
    """Start the trainer, and kill -9 it as soon as so many steps stand in its metrics."""
    command = [sys.executable, "-m", "memtrain.train", str(TINY), f"output.directory={output}", *overrides]
    written = output / "metrics.jsonl"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not written.exists() or written.read_text().count("\n") < steps:
            assert process.poll() is None, f"the run ended before step {steps}"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
