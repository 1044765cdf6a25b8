"""Recipes whose weights are streamed: the same numbers as without, a run taken up, and what is said."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from memtrain import train as train_module
from memtrain.planner.actions import Tier
from memtrain.planner.decisions import PlannerOptions
from memtrain.planner.plan import Plan
from memtrain.recipe import PlannerSection
from memtrain.report import Summary
from tests.memtrain.tiny_runs import metrics, recipe_for

LLAMA = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 272,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}
"""Every matrix has at least 65,536 elements, and so leaves memory."""


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe forces nothing; a budget that is just too small for these weights would be a matter of the
    libraries' size."""
    forced = PlannerOptions(force={"state": {"weight_tier": "nvme", "optimizer_tier": "nvme"}})
    monkeypatch.setattr(PlannerSection, "options", lambda section: forced)


def run(output: Path, *, streamed: bool, **sections: dict[str, Any]) -> Summary:
    recipe = recipe_for(
        output,
        model={"config": LLAMA, "streamed": streamed, "dtype": "bfloat16"},
        budget={"device": "4GiB", "nvme": "64MiB"},
        optimizer={"master_weights": True},
        checkpoint={"every": 2, "keep": 2},
        **sections,
    )
    return train_module.train(recipe)


def weights_after(output: Path, step: int) -> dict[str, torch.Tensor]:
    return dict(load_file(output / "checkpoint" / f"step-{step:06d}" / "model.safetensors"))


def same_run(first: Path, second: Path) -> None:
    assert [m["loss"] for m in metrics(first)] == [m["loss"] for m in metrics(second)]
    weights, expected = weights_after(first, 4), weights_after(second, 4)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_streamed_weights_change_no_number_and_a_run_is_taken_up(
    tmp_path: Path, away: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(tmp_path / "streamed", streamed=True)
    told = capsys.readouterr().out
    plan = Plan.from_json((tmp_path / "streamed" / "plan.json").read_text())
    assert sum(state.weight_tier is Tier.NVME for state in plan.states) == 4  # table, tied, and three blocks
    assert re.search(r"weights: of 5 units 4 on nvme, through \d windows of", told)
    assert "predicted peak" in told
    assert found.predicted_peak_bytes == plan.peak(Tier.DEVICE)
    assert found.measured_peak_bytes > 0
    summary = json.loads((tmp_path / "streamed" / "summary.json").read_text())
    assert summary["predicted_step_seconds"] > 0
    assert summary["measured_step_seconds"] > 0
    assert list((tmp_path / "streamed" / "swap").iterdir()) == []

    shutil.copytree(tmp_path / "streamed", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint" / "step-000004")
    run(tmp_path / "cut", streamed=True)
    assert "resumed after step 2" in capsys.readouterr().out
    same_run(tmp_path / "cut", tmp_path / "streamed")

    # A run that began streamed goes on in memory, and one in memory gives the same numbers.
    monkeypatch.setattr(PlannerSection, "options", lambda section: PlannerOptions())
    shutil.rmtree(tmp_path / "cut" / "checkpoint" / "step-000004")
    run(tmp_path / "cut", streamed=False)
    assert "resumed after step 2" in capsys.readouterr().out
    same_run(tmp_path / "cut", tmp_path / "streamed")
    run(tmp_path / "plain", streamed=False)
    same_run(tmp_path / "plain", tmp_path / "streamed")


def test_what_fits_comes_home(tmp_path: Path) -> None:
    run(tmp_path / "run", streamed=True)
    plan = Plan.from_json((tmp_path / "run" / "plan.json").read_text())
    assert {state.weight_tier for state in plan.states} == {Tier.DEVICE}


def test_a_run_whose_layers_are_in_tiles_says_so_and_is_taken_up(
    tmp_path: Path, away: None, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = {**LLAMA, "intermediate_size": 1024, "tie_word_embeddings": False, "vocab_size": 256}

    def once(output: Path) -> None:
        recipe = recipe_for(
            output,
            model={"config": wide, "streamed": True, "dtype": "bfloat16", "tile": "256KiB"},
            budget={"device": "4GiB", "nvme": "128MiB"},
            optimizer={"master_weights": True},
            checkpoint={"every": 2, "keep": 2},
        )
        train_module.train(recipe)

    once(tmp_path / "whole")
    told = capsys.readouterr().out
    assert "weights in tiles, each in a window by itself: " in told
    assert "model.layers.*.mlp.gate_proj (3 times) in 2 of at most 0.2 MiB" in told
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint" / "step-000004")
    once(tmp_path / "cut")
    assert "resumed after step 2" in capsys.readouterr().out
    same_run(tmp_path / "cut", tmp_path / "whole")
    names = weights_after(tmp_path / "whole", 4)
    assert names["model.layers.0.mlp.gate_proj.weight"].shape == (1024, 256)
    assert not any("tiles" in name for name in names)
