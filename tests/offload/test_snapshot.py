"""Checkpoints resume bit-equal under any plan, and into a plain optimizer."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, load_model

from memtrain.offload import snapshot
from memtrain.offload.errors import PlanMismatchError
from memtrain.offload.snapshot import (
    load_checkpoint,
    load_optimizer_state,
    save_checkpoint,
)
from memtrain.planner.actions import Tier
from tests.offload.snapshot_runs import AHEAD, Run, adamw, assert_same, open_run, states
from tests.offload.training import (
    STAGING,
    Lion,
    batches,
    make_model,
    make_plan,
    open_engine,
    plain_run,
    trainable,
)

PLANS = {
    "host": make_plan(),
    "ahead": make_plan(AHEAD),
    "device": make_plan(gradient_tier=Tier.DEVICE, optimizer_tier=Tier.DEVICE),
    "small shards": make_plan(AHEAD, staging=replace(STAGING, update_shard_elements=9_000)),
}


@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize(("before", "after"), list(product(PLANS, PLANS)))
def test_resumed_run_equals_one_that_never_stopped(
    before: str, after: str, master: bool, tmp_path: Path
) -> None:
    dtype = torch.bfloat16 if master else torch.float32
    data = batches(5)
    with open_run(PLANS[before], dtype, master_weights=master) as whole:
        whole.train(data[:3])
        save_checkpoint(tmp_path / "at", whole, progress={"steps_done": 3})
        whole.train(data[3:])
        with open_run(PLANS[after], dtype, seed_weights=False, master_weights=master) as resumed:
            assert load_checkpoint(tmp_path / "at", resumed) == {"steps_done": 3}
            resumed.train(data[3:])
            assert_same(whole, resumed)


def test_loading_replaces_a_state_that_went_on(tmp_path: Path) -> None:
    data = batches(4)
    with open_run(PLANS["ahead"]) as run, open_run(PLANS["ahead"]) as reference:
        run.train(data[:2])
        save_checkpoint(tmp_path / "at", run, progress={})
        run.train(data[2:])
        for group in run.optimizer.param_groups:
            group["lr"] = 5.0
        load_checkpoint(tmp_path / "at", run)
        assert run.optimizer.param_groups[0]["lr"] == 1e-2
        assert run.optimizer.param_groups[0]["betas"] == (0.8, 0.99)
        reference.train(data[:2])
        assert_same(run, reference)


def test_optimizers_without_a_step_and_without_state(tmp_path: Path) -> None:
    for name, make in {
        "lion": lambda p: Lion(p, lr=1e-2),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
        "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    }.items():
        data = batches(3)
        with open_run(make=make) as run, open_run(make=make, seed_weights=False) as resumed:
            run.train(data[:2])
            save_checkpoint(tmp_path / name, run, progress={})
            load_checkpoint(tmp_path / name, resumed)
            run.train(data[2:])
            resumed.train(data[2:])
            assert_same(run, resumed)


def test_before_the_first_step(tmp_path: Path) -> None:
    with open_run() as run, open_run(seed_weights=False) as resumed:
        save_checkpoint(tmp_path / "at", run, progress={})
        resumed.train(batches(1))
        load_checkpoint(tmp_path / "at", resumed)
        assert resumed.optimizer.scalar_state() == {}
        assert_same(run, resumed)


def test_random_generators_go_on_where_they_were(tmp_path: Path) -> None:
    def draw() -> list[Any]:
        return [torch.rand(3).tolist(), random.random(), numpy.random.rand(2).tolist(), random.gauss(0, 1)]

    random.gauss(0, 1)  # leaves a second value behind, which is part of the state
    with open_run() as run:
        save_checkpoint(tmp_path / "at", run, progress={"text": "ü", "nested": [1, {"a": None}]})
        expected = draw()
        assert load_checkpoint(tmp_path / "at", run) == {"text": "ü", "nested": [1, {"a": None}]}
        assert draw() == expected


def test_shards_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "OPTIMIZER_SHARD_BYTES", 600_000)
    with open_run() as run, open_run(seed_weights=False) as resumed:
        run.train(batches(2))
        folder = save_checkpoint(tmp_path / "at", run, progress={})
        # embed has 701*101 elements, first 683*101 and 683, second 101*683 and 101; fp32, two tensors each:
        # 2 x 283,204 | 2 x 275,932 + 2 x 2,732 | 2 x 275,932 + 2 x 404 bytes
        sizes = {path.name: path.stat().st_size for path in folder.glob("optimizer-*")}
        assert sorted(sizes) == [f"optimizer-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
        stored = [load_file(folder / name) for name in sorted(sizes)]
        assert [sum(t.nbytes for t in one.values()) for one in stored] == [566_408, 557_328, 552_672]
        expected = {f"{name}/{key}": tensor for (name, key), tensor in states(run.optimizer).items()}
        found = {name: tensor for one in stored for name, tensor in one.items()}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        load_checkpoint(folder, resumed)
        assert_same(run, resumed)


def test_plain_module_is_stored_once_and_read_by_safetensors(tmp_path: Path) -> None:
    with open_run() as run:
        folder = save_checkpoint(tmp_path / "at", run, progress={})
        stored = load_file(folder / "model.safetensors")
        assert "head.weight" not in stored
        assert stored.keys() == run.model.state_dict().keys() - {"head.weight"}
        fresh = make_model()
        with torch.no_grad():
            fresh.embed.weight.zero_()
        load_model(fresh, folder / "model.safetensors")
        assert torch.equal(fresh.head.weight, run.model.embed.weight)
        assert not (folder / "config.json").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_hugging_face_model_with_its_tokenizer(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    from memtrain.offload import snapshot_weights

    monkeypatch.setattr(snapshot_weights, "SHARD_BYTES", 20_000)
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text('{"version": "1.0"}')
    (source / "model.safetensors").write_bytes(b"not to be copied")
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.config._name_or_path = model.name_or_path = str(source)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    units = [("prologue", list(model.named_parameters())), ("block", []), ("epilogue", [])]
    with open_engine() as engine:
        from memtrain.offload.optimizer import OffloadedOptimizer

        offloaded = OffloadedOptimizer(optimizer, engine=engine, plan=make_plan(), units=units)
        folder = save_checkpoint(tmp_path / "at", Run(model, offloaded), progress={})
        offloaded.close()
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert (folder / "tokenizer.json").read_text() == '{"version": "1.0"}'
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert again.dtype == torch.bfloat16
    assert again.config.use_cache is True
    assert model.config.use_cache is False
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_plain_adamw_goes_on_bit_for_bit(tmp_path: Path) -> None:
    expected, reference, _ = plain_run(adamw, steps=5)
    with open_run(PLANS["ahead"]) as run:
        run.train(batches(5)[:3])
        folder = save_checkpoint(tmp_path / "at", run, progress={})
    model = make_model()
    load_model(model, folder / "model.safetensors")
    plain = torch.optim.AdamW(trainable(model), lr=77.0)
    load_optimizer_state(folder, plain, model)
    for batch in batches(5)[3:]:
        model(batch).backward()
        plain.step()
        plain.zero_grad()
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q), name
    for p, q in zip(trainable(model), trainable(expected), strict=True):
        assert plain.state[p].keys() == reference.state[q].keys()
        assert all(torch.equal(plain.state[p][key], value) for key, value in reference.state[q].items())


def test_plain_optimizer_over_copies_takes_the_masters(tmp_path: Path) -> None:
    with open_run(dtype=torch.bfloat16, master_weights=True) as run:
        run.train(batches(2))
        folder = save_checkpoint(tmp_path / "at", run, progress={})
        expected = states(run.optimizer)
    model = make_model(torch.bfloat16)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    masters = [p.detach().float() for p in trainable(model)]
    plain = adamw(masters)
    load_optimizer_state(folder, plain, model)
    for name, master in zip(names, masters, strict=True):
        if (name, "master_weight") in expected:
            assert torch.equal(master, expected[name, "master_weight"])
            assert torch.equal(plain.state[master]["exp_avg_sq"], expected[name, "exp_avg_sq"])
            assert plain.state[master]["exp_avg"].dtype == torch.float32
            assert plain.state[master]["step"] == 2
    assert ("embed.weight", "master_weight") in expected
    with pytest.raises(
        PlanMismatchError, match=r"embed.weight has torch.float32 master weights .*fp32 copies"
    ):
        load_optimizer_state(folder, adamw(trainable(model)), model)
