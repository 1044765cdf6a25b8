"""The layer that is too large is named, with its bytes, the limit and what would help."""

import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import memtrain
from memtrain.planner import resident
from memtrain.streamed_models import streamed_model
from tests.memtrain.plans import AWAY
from tests.memtrain.sessions import MACHINE

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
        tight = memtrain.Budget(device=resident.rss_bytes() + 32 * MiB, nvme=f"{tmp_path}:2GiB")
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
