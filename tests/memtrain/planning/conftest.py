"""A Llama of 0.4 M parameters, planned for a laptop's GPU with so little memory that something must leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memtrain.planner.parallel import Degrees
from memtrain.planning.answer import Answer, answer
from memtrain.planning.jobs import Jobs
from memtrain.planning.request import Hardware, PlanRequest, Search, Work

TINY = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config.json and no weights."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY))
    return folder


def request_of(model: Path, *, device: str = "12MiB", **changes: Any) -> PlanRequest:
    """256 tokens x 4 on a GPU that may use ``device``, and a gibibyte of memory beside it."""
    budget = (("device", device),)
    fields: dict[str, Any] = {
        "work": Work(model=str(model), sequence=256, micro_batch=4),
        "hardware": Hardware(gpu="rtx-4060-laptop", dram="2GiB", budget=budget),
        "degrees": Degrees(),
        "search": Search(seconds=4.0, chunks=4, gap=0.02),
    }
    return PlanRequest(**(fields | changes))


@pytest.fixture(scope="session")
def tight(tiny: Path) -> Answer:
    """A plan that cannot keep everything, with an ablation and an explanation."""
    return answer(Jobs(request_of(tiny)), with_ablation=True, block="layers.3")


@pytest.fixture(scope="session")
def impossible(tiny: Path) -> Answer:
    """No memory beside a device that holds not even the weights."""
    hardware = Hardware(gpu="rtx-4060-laptop", budget=(("device", "2MiB"),))
    return answer(Jobs(request_of(tiny, hardware=hardware)))
