"""The layer that is too large is named, with its bytes, the limit and what would help."""

import dataclasses
import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import memtrain
from memtrain.largest_layer import with_tiles_kept
from memtrain.planner.infeasible import overrun
from memtrain.streamed_models import streamed_model
from memtrain.tiling import Cuts, cut, cuts_of, tiles_of
from tests.memtrain.plans import AWAY, infeasible_plan
from tests.memtrain.sessions import MACHINE, budget_beyond_now

MiB = 1 << 20
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 65536,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 300,
}
"""A block of 3 x 32 MiB and 4 x 128 KiB in bf16."""


@pytest.mark.parametrize("whole", [False, True])
def test_the_layer_is_named(tmp_path, whole):
    budget = memtrain.Budget(device="4GiB", nvme=f"{tmp_path}:2GiB")
    config = AutoConfig.for_model("llama", **SHAPE)
    torch.manual_seed(0)
    ids = torch.randint(0, 300, (1, 8))
    with streamed_model(config, dtype=torch.bfloat16, budget=budget, tile_bytes=None) as made:
        parameters = list(made.model.parameters())
        optimizer = torch.optim.Adafactor(parameters) if whole else torch.optim.AdamW(parameters)
        tight = budget_beyond_now(32 * MiB, tmp_path)
        with pytest.raises(memtrain.InfeasibleError) as raised:
            memtrain.prepare(
                made.model.train(),
                optimizer,
                {"input_ids": ids, "labels": ids},
                budget=tight,
                machine=MACHINE,
                options=memtrain.PlannerOptions(force=AWAY),
            )
    told = raised.value.plan.remedies[-1]
    assert "model.layers.0 has 0.094 GiB of weights in a window, the largest model.layers.0.mlp." in told
    assert "_proj.weight with 0.031 GiB, and 2 windows of 96.5 MiB, 0.188 GiB" in told
    assert f"stand in the device's {tight.device_bytes / (1 << 30):.3f} GiB" in told
    assert ("The optimizer takes whole parameters" in told) == whole
    found = re.search(r"Cut layers into tiles: streamed_model\(\.\.\., tile_bytes=(\d+)\)", told)
    assert found is not None
    assert 8 * MiB <= int(found[1]) <= 16 * MiB  # 64 rows of the widest layer are 8 MiB
    assert f"model.streamed: true and model.tile: {int(found[1]) // MiB}MiB" in told
    assert told in str(raised.value)


@pytest.mark.parametrize("asked", ["auto", 16 * MiB])
def test_tiles_that_a_small_budget_has_brought_about_are_to_be_kept(tmp_path, asked):
    config = AutoConfig.for_model("llama", **SHAPE)
    torch.manual_seed(0)
    ids = torch.randint(0, 300, (1, 8))
    # An eighth of it are 16 MiB, and two windows of 96 MiB more than half.
    budget = budget_beyond_now(132 * MiB, tmp_path)
    with streamed_model(config, dtype=torch.bfloat16, budget=budget, tile_bytes=asked) as made:
        size = cuts_of(made.model).automatic_bytes or 0
        assert bool(size) == (asked == "auto")
        assert tiles_of(made.model)
        with pytest.raises(memtrain.InfeasibleError) as raised:
            memtrain.prepare(
                made.model.train(),
                torch.optim.AdamW(made.model.parameters()),
                {"input_ids": ids, "labels": ids},
                budget=budget_beyond_now(8 * MiB, tmp_path),
                machine=MACHINE,
                options=memtrain.PlannerOptions(force=AWAY),
            )
        overrun_too = with_tiles_kept(overrun(raised.value.plan, 1 << 40), made.model)
    for plan in (raised.value.plan, overrun_too):
        told = [remedy for remedy in plan.remedies if "Keep them with" in remedy]
        assert [remedy for remedy in told if not remedy.startswith("device at least")] == []
        assert len(told) == (asked == "auto")
        for remedy in told:
            assert f"Keep them with streamed_model(..., tile_bytes={size})" in remedy
            assert f"model.streamed: true and model.tile: {size // MiB}MiB" in remedy


def test_what_could_not_be_cut_is_not_to_be_asked_for():
    model = torch.nn.Sequential(torch.nn.Linear(8, 128))
    device = "device at least 2 GiB instead of 1 GiB"
    plan = dataclasses.replace(infeasible_plan(), remedies=("allow swap", device))
    whole = Cuts(automatic_bytes=MiB)
    cut(model, whole)
    assert with_tiles_kept(plan, model) is plan  # no tile, and nothing to keep
    cut(model, Cuts(rows={"0": (64, 64)}, uncut={"prologue": "it cannot"}, automatic_bytes=MiB))
    allow, told = with_tiles_kept(plan, model).remedies
    assert allow == "allow swap"
    assert told.startswith(f"{device}, with layers in tiles of at most 0.001 GiB")
    assert told.endswith("No size can be set that keeps them, for prologue cannot be cut so far")
    elsewhere = dataclasses.replace(plan, remedies=("nvme 2 GiB instead of 1 GiB",))
    assert with_tiles_kept(elsewhere, model) is elsewhere


def test_nothing_is_added_where_weights_stay(tmp_path):
    config = AutoConfig.for_model("llama", **{**SHAPE, "intermediate_size": 272})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    ids = torch.randint(0, 300, (1, 8))
    with pytest.raises(memtrain.InfeasibleError) as raised:
        memtrain.prepare(
            model,
            torch.optim.AdamW(model.parameters()),
            {"input_ids": ids, "labels": ids},
            budget=memtrain.Budget(device=64 * MiB),
            machine=MACHINE,
        )
    assert not any("windows" in remedy for remedy in raised.value.plan.remedies)
