"""Tables by rows of models that are never whole in memory, and of recipes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import memtrain
from memtrain import train as train_module
from memtrain.offload.errors import WeightAwayError
from memtrain.offload.row_table import RowTable
from memtrain.offload.snapshot import load_checkpoint, save_checkpoint
from memtrain.optim.autograd.tiled_linear import TiledLinear
from memtrain.recipe import RecipeError
from memtrain.sparse_tables import SparseTableError, sparse_inputs
from memtrain.streamed_models import StreamedModel, streamed_model
from tests.memtrain.sessions import MACHINE
from tests.memtrain.test_sparse_session import TABLE, batch, loop, optimizers, same_state
from tests.memtrain.test_train_streamed import LLAMA
from tests.memtrain.tiny_runs import metrics, recipe_for
from tests.offload.streamed import llama


def plain() -> tuple[list[float], dict[str, Tensor], dict[str, Any]]:
    model = llama(tied=False)
    sparse_inputs(model)
    dense, lazy = optimizers(model)
    losses = loop(model, dense, lazy)
    return losses, model.state_dict(), lazy.state_dict()["state"][0]


def prepare(streamed: StreamedModel, budget: memtrain.Budget) -> memtrain.Session:
    (table,) = streamed.tables.values()
    others = [p for p in streamed.model.parameters() if p is not table.weight]
    return memtrain.prepare(
        streamed.model,
        torch.optim.AdamW(others, lr=1e-2),
        batch(0),
        budget=budget,
        sparse_optimizer=torch.optim.SparseAdam([table.weight], lr=1e-2),
        micro_batches=2,
        machine=MACHINE,
        chunked_loss=False,
        options=memtrain.PlannerOptions(force={"state": {"weight_tier": "nvme", "optimizer_tier": "nvme"}}),
    )


@pytest.mark.parametrize("read", [False, True])
def test_a_streamed_model_trains_and_is_taken_up(tmp_path: Path, read: bool) -> None:
    losses, weights, state = plain()
    budget = memtrain.Budget(device="3GiB", nvme=f"{tmp_path}:256MiB")
    source: Any = lambda: llama(tied=False)  # noqa: E731
    if read:
        llama(tied=False).save_pretrained(tmp_path / "model")  # type: ignore[operator]
        source = tmp_path / "model"
    with streamed_model(source, budget=budget, sparse_tables=True, tile_bytes=None) as streamed:
        assert list(streamed.tables) == [TABLE]
        assert TABLE not in streamed.weights.extents
        (table,) = streamed.tables.values()
        first = torch.cat([part.clone() for part in table.parts()])
        assert torch.equal(first, llama(tied=False).get_parameter(TABLE))
        with prepare(streamed, budget) as session:
            assert loop(session.model, session.optimizer) == losses
            assert session.sparse_optimizer is not None
            assert same_state(session.sparse_optimizer.state_dict()["state"][0], state)
            save_checkpoint(tmp_path / "saved", session, progress={})
        assert isinstance(streamed.model.get_submodule("model.embed_tokens"), RowTable)
        assert torch.equal(torch.cat([part.clone() for part in table.parts()]), weights[TABLE])
        table.put(torch.arange(300), torch.zeros_like(first))
        with pytest.raises(WeightAwayError):
            table.weight.sum()
        with prepare(streamed, budget) as session:  # another session of the same model
            load_checkpoint(tmp_path / "saved", session)
            assert torch.equal(torch.cat([part.clone() for part in table.parts()]), weights[TABLE])
            assert session.sparse_optimizer is not None
            assert same_state(session.sparse_optimizer.state_dict()["state"][0], state)
    found = load_file(tmp_path / "saved" / "model.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in found.items())


def test_beside_a_head_in_tiles(tmp_path: Path) -> None:
    budget = memtrain.Budget(device="3GiB", nvme=f"{tmp_path}:256MiB")
    source = lambda: llama(tied=False, vocabulary=4096)  # noqa: E731
    with streamed_model(source, budget=budget, sparse_tables=True, tile_bytes=1 << 20) as streamed:
        assert isinstance(streamed.model.get_submodule("lm_head"), TiledLinear)
        with prepare(streamed, budget) as session:
            loop(session.model, session.optimizer, steps=1)
            save_checkpoint(tmp_path / "saved", session, progress={})
            load_checkpoint(tmp_path / "saved", session)
    found = load_file(tmp_path / "saved" / "model.safetensors")
    assert found[TABLE].shape == found["lm_head.weight"].shape


def test_a_constructors_own_tables(tmp_path: Path) -> None:
    budget = memtrain.Budget(device="3GiB", nvme=f"{tmp_path}:64MiB")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(700, 128, sparse=True, padding_idx=3)
            self.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(2))

        def forward(self, tokens: Tensor) -> Tensor:
            hidden = self.table(tokens)
            for layer in self.layers:
                hidden = layer(hidden)
            return hidden.sum()

    with streamed_model(Model, budget=budget) as streamed:
        assert list(streamed.tables) == ["table.weight"]
        assert streamed.tables["table.weight"].padding_idx == 3
        optimizer = torch.optim.AdamW(
            [p for n, p in streamed.model.named_parameters() if n != "table.weight"]
        )
        with pytest.raises(SparseTableError, match=r"table.weight is a table .* in no lazy"):
            memtrain.prepare(
                streamed.model, optimizer, torch.arange(8).view(2, 4), budget=budget, machine=MACHINE
            )
    with pytest.raises(SparseTableError, match="tie_word_embeddings: false"):
        streamed_model(lambda: llama(tied=True), budget=budget, sparse_tables=True)


def run(output: Path, *, streamed: bool, **sections: dict[str, Any]) -> Any:
    return recipe_for(
        output,
        model={
            "config": {**LLAMA, "tie_word_embeddings": False},
            "streamed": streamed,
            "dtype": "float32",
            "sparse_tables": True,
            **sections.pop("model", {}),
        },
        budget={"device": "4GiB", "nvme": "64MiB"},
        optimizer={"master_weights": False},
        training={"max_grad_norm": None, **sections.pop("training", {})},
        checkpoint={"every": 2, "keep": 2, **sections.pop("checkpoint", {})},
        **sections,
    )


def test_a_recipe_with_tables_is_taken_up_and_may_be_streamed(tmp_path: Path) -> None:
    summary = train_module.train(run(tmp_path / "plain", streamed=False, sparse_optimizer={"lr": 1e-2}))
    assert {"nvme"} == {row.tier for row in summary.written}
    shutil.copytree(tmp_path / "plain", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint" / "step-000004")
    train_module.train(run(tmp_path / "cut", streamed=True, sparse_optimizer={"lr": 1e-2}))
    files = [tmp_path / name / "checkpoint" / "step-000004" for name in ("plain", "cut")]
    for name in ("model.safetensors", "sparse_optimizer.safetensors"):
        first, second = (load_file(file / name) for file in files)
        assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert [m["loss"] for m in metrics(tmp_path / "plain")][-2:] == [
        m["loss"] for m in metrics(tmp_path / "cut")
    ][-2:]


@pytest.mark.parametrize(
    ("match", "sections"),
    [
        ("max_grad_norm: null", {"training": {"max_grad_norm": 1.0}}),
        ("allocator: default", {"training": {"allocator": "planned"}}),
        ("asynchronous: false", {"checkpoint": {"asynchronous": True}}),
        ("tables have no masters", {"model": {"dtype": "bfloat16"}, "optimizer": {"master_weights": True}}),
        ("set model.sparse_tables: true", {"model": {"sparse_tables": False}, "sparse_optimizer": {}}),
    ],
)
def test_recipes_that_cannot_be(tmp_path: Path, match: str, sections: dict[str, Any]) -> None:
    given = {"optimizer": {"master_weights": False}, **sections}
    optimizer = given.pop("optimizer")
    with pytest.raises(RecipeError, match=match):
        recipe_for(
            tmp_path,
            model={
                "config": LLAMA,
                "streamed": True,
                "dtype": "float32",
                "sparse_tables": True,
                **given.pop("model", {}),
            },
            budget={"device": "4GiB", "nvme": "64MiB"},
            optimizer=optimizer,
            training={"max_grad_norm": None, **given.pop("training", {})},
            checkpoint={"every": 2, **given.pop("checkpoint", {})},
            **given,
        )
