"""Recipes with memtrain's own optimizers: what is projected, what it takes, and a run taken up again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from memtrain.optimizer_sections import SECTIONS, GridSection, grid_section
from memtrain.optimizers import CLASSES, make_optimizer, measured_state_bytes, predicted_state_bytes
from memtrain.recipe import RecipeError, load_recipe, parse_recipe
from memtrain.report import Summary
from memtrain.train import build_optimizer
from memtrain.weights import load_model

RECIPE = Path("recipes/tiny_llama_galore_cpu.yaml")
ARGUMENTS: dict[str, dict[str, Any]] = {
    "adamw-8bit": {},
    "galore": {"rank": 8, "proj_type": "full", "lazy": True},
    "natural-galore": {"rank": 8, "history": 3},
    "frugal": {"projection": "randk", "state_dtype": "bf16"},
    "fira": {"density": 0.25, "basis_dtype": "bf16"},
    "apollo": {"rank": 8, "state_dtype": "int8"},
    "apollo-mini": {"master": "split24"},
}


def test_every_name_has_a_section_and_a_class() -> None:
    own = {name for name, section in SECTIONS.items() if issubclass(section, GridSection)}
    assert own == CLASSES.keys() == ARGUMENTS.keys()


def small_model() -> nn.Module:
    torch.manual_seed(0)
    fields = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    recipe = load_recipe(RECIPE, [f"model.config.{key}={value}" for key, value in fields.items()])
    return load_model(recipe.model, torch.device("cpu"))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_bytes_are_predicted_to_the_byte(name: str) -> None:
    model = small_model()
    section = grid_section(name, ARGUMENTS[name], lr=1e-2)
    optimizer, roles = make_optimizer(name, model, overrides=None, **section.arguments())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    predicted = predicted_state_bytes(section, model, roles)
    assert predicted == measured_state_bytes(optimizer) > 0
    live = (v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor))
    assert predicted == sum(tensor.untyped_storage().nbytes() for tensor in live)


def test_the_section_reaches_the_groups() -> None:
    recipe = load_recipe(
        RECIPE, ["optimizer.betas=[0.8, 0.9]", "optimizer.overrides={'*.o_proj.weight': other}"]
    )
    optimizer, roles = build_optimizer(recipe, small_model())
    whole, projected = sorted(optimizer.param_groups, key=lambda group: group["projection"] is not None)
    assert (projected["rank"], projected["update_gap"], projected["scale"]) == (32, 8, 0.25)
    for group in (whole, projected):
        assert (group["betas"], group["master"], group["weight_decay"]) == ((0.8, 0.9), "split24", 0.01)
    # Two layers, each with q, gate, up and down; k and v have no more rows than the rank, o is overruled.
    assert len(projected["params"]) == 2 * 4
    assert sum(each.projected for each in roles) == 2 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": None}, "give either rank, such as 128, or density"),
        ({"density": 0.5}, "give either rank, such as 128, or density"),
        ({"rnk": 8}, "optimizer.rnk: unknown key; did you mean rank"),
        ({"master_weights": True}, "optimizer.master_weights: unknown key; did you mean master"),
        ({"update_proj_gap": 0}, "greater than 0"),
        ({"projection": "columns", "proj_type": "left"}, "chooses its side itself"),
    ],
)
def test_what_no_optimizer_has_is_refused(change: dict[str, Any], message: str) -> None:
    data = json.loads(load_recipe(RECIPE).model_dump_json())
    data["optimizer"] = {**{k: v for k, v in data["optimizer"].items() if v is not None}, **change}
    with pytest.raises(RecipeError, match=message):
        build_optimizer(parse_recipe(data), small_model())


def run(output: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    small = ["data.sequence_length=32", "training.steps=6", "optimizer.update_proj_gap=4"]
    sizes = ["training.accumulation=1", "checkpoint.every=2", "checkpoint.keep=5", "evaluation.batches=1"]
    command = [sys.executable, "-m", "memtrain.train", RECIPE]
    return subprocess.run(
        [*command, f"output.directory={output}", *small, *sizes, *overrides],
        capture_output=True,
        text=True,
        check=False,
    )


def test_end_to_end(tmp_path: Path) -> None:
    """Cut after step 2, in the middle of a refresh period, and taken up: the same losses and weights."""
    whole = run(tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    assert "model.layers.*.mlp.gate_proj.weight" in whole.stdout
    assert "tied to lm_head.weight" in whole.stdout
    summary = Summary.read(tmp_path / "whole" / "summary.json")
    assert summary.predicted_optimizer_bytes == summary.measured_optimizer_bytes > 0
    row = f"{summary.predicted_optimizer_bytes:,}  {summary.measured_optimizer_bytes:,}"
    assert row in whole.stdout

    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "cut" / "checkpoint" / f"step-{step:06d}")
    cut = run(tmp_path / "cut")
    assert cut.returncode == 0, cut.stderr
    assert "resumed after step 2" in cut.stdout
    first, second = (
        load_file(tmp_path / name / "checkpoint" / "step-000006" / "model.safetensors")
        for name in ("whole", "cut")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    states = [
        load_file(tmp_path / name / "checkpoint" / "step-000006" / "optimizer-00001-of-00001.safetensors")
        for name in ("whole", "cut")
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any(key.endswith("projector.right") for key in states[0])
