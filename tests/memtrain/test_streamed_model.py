"""Models built and read straight to a tier: the same weights, little memory, nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from memtrain import Budget
from memtrain.offload.errors import TierFullError, WeightAwayError
from memtrain.streamed_models import StreamedModelError, stored_weights, streamed_model
from memtrain.weight_folder import WeightFilesError

MiB = 1 << 20
CHILD = Path(__file__).with_name("streamed_children.py")
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 260,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 500,
}
"""In fp32 4 weights of 256 KiB, 3 of 260 KiB in each layer, the embedding and the head of 500 KiB; norms are
small."""


@pytest.fixture(autouse=True)
def quiet_bars():
    from transformers.utils import logging

    logging.disable_progress_bar()


@pytest.fixture
def budget(tmp_path):
    (tmp_path / "swap").mkdir()
    return Budget(device="1GiB", nvme=f"{tmp_path / 'swap'}:8MiB")


def llama(**fields):
    return AutoConfig.for_model("llama", **{**SHAPE, **fields})


def plain(config, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def assert_same(streamed, model):
    here = dict(streamed.model.named_parameters(remove_duplicate=False))
    there = dict(model.named_parameters(remove_duplicate=False))
    assert here.keys() == there.keys()
    for name, parameter in model.named_parameters():
        mine = here[name]
        assert (mine.shape, mine.dtype, mine.requires_grad) == (parameter.shape, parameter.dtype, True)
        assert (name in streamed.weights.extents) == (parameter.numel() >= 65536)
        values = streamed.weights.read(name) if name in streamed.weights.extents else mine
        assert torch.equal(values, parameter), name
    pairs = zip(streamed.model.named_buffers(), model.named_buffers(), strict=True)
    for (mine_name, mine), (name, buffer) in pairs:
        assert mine_name == name
        assert torch.equal(mine, buffer)
    assert ties(here) == ties(there)


def ties(named):
    return {tuple(sorted(n for n in named if named[n] is named[m])) for m in named}


@pytest.mark.parametrize("tie", [False, True])
def test_random_weights_are_those_of_the_plain_constructor(budget, tie):
    model = plain(llama(tie_word_embeddings=tie), torch.bfloat16)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    with streamed_model(llama(tie_word_embeddings=tie), dtype=torch.bfloat16, budget=budget) as streamed:
        assert_same(streamed, model)
        assert torch.equal(torch.get_rng_state(), state)


def test_any_constructor(budget):
    def make():
        return nn.Sequential(nn.Embedding(300, 300), nn.LayerNorm(300), nn.Linear(300, 300))

    torch.manual_seed(3)
    model = make()
    torch.manual_seed(3)
    with streamed_model(make, budget=budget) as streamed:
        assert_same(streamed, model)
    with pytest.raises(StreamedModelError, match="dtype is the constructor's business"):
        streamed_model(make, dtype=torch.float32, budget=budget)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_files_are_read_as_from_pretrained_reads_them(tmp_path, budget, stored, dtype):
    plain(llama(), stored).save_pretrained(tmp_path / "model")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
    state = torch.get_rng_state()
    with streamed_model(tmp_path / "model", dtype=dtype, budget=budget) as streamed:
        assert_same(streamed, expected)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("tie", [False, True])
def test_several_files_with_an_index(tmp_path, budget, tie):
    model = plain(llama(tie_word_embeddings=tie))
    model.save_pretrained(tmp_path / "model", max_shard_size="600kB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 4
    with streamed_model(tmp_path / "model", dtype=torch.float32, budget=budget) as streamed:
        assert_same(streamed, model)
        assert streamed.unexpected == ()


def rewrite(folder, change):
    """Change the tensors of a folder's one file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_base_model_s_prefix_and_a_tied_head_alone(tmp_path, budget):
    model = plain(llama(tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "model")

    def change(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)
        tensors["lm_head.weight"] = tensors.pop("embed_tokens.weight")

    rewrite(tmp_path / "model", change)
    with streamed_model(tmp_path / "model", dtype=torch.float32, budget=budget) as streamed:
        assert_same(streamed, model)


def test_tied_weights_that_are_both_there_must_be_equal(tmp_path, budget):
    model = plain(llama(tie_word_embeddings=True))
    model.save_pretrained(tmp_path / "model")

    def copy(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    rewrite(tmp_path / "model", copy)
    with streamed_model(tmp_path / "model", dtype=torch.float32, budget=budget) as streamed:
        assert_same(streamed, model)
    rewrite(tmp_path / "model", lambda tensors: tensors["lm_head.weight"][3].add_(1))
    with pytest.raises(
        WeightFilesError,
        match=r"model.embed_tokens.weight and lm_head.weight are one weight of the model, and",
    ):
        streamed_model(tmp_path / "model", dtype=torch.float32, budget=budget)


def test_what_differs_is_told_by_name_before_a_tier_is_opened(tmp_path):
    nowhere = Budget(device="1GiB", nvme=f"{tmp_path / 'not there'}:8MiB")
    plain(llama()).save_pretrained(tmp_path / "model")

    def change(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 4)
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(260, 256, dtype=torch.int8)
        del tensors["model.norm.weight"], tensors["lm_head.weight"]

    rewrite(tmp_path / "model", change)
    with pytest.raises(WeightFilesError) as raised:
        streamed_model(tmp_path / "model", dtype=torch.float32, budget=nowhere)
    for part in (
        "model.layers.0.mlp.up_proj.weight has shape [3, 4], the model's model.layers.0.mlp.up_proj.weight "
        "[260, 256]",
        "model.layers.1.mlp.up_proj.weight is torch.int8",
        "not in the files: model.norm.weight, lm_head.weight",
    ):
        assert part in str(raised.value)


def test_what_the_model_has_no_use_for_is_told_by_name(tmp_path, budget):
    model = plain(llama())
    model.save_pretrained(tmp_path / "model")

    def change(tensors):
        tensors["classifier.weight"] = torch.zeros(3)
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(32)  # of old files

    rewrite(tmp_path / "model", change)
    with streamed_model(tmp_path / "model", dtype=torch.float32, budget=budget) as streamed:
        assert_same(streamed, model)
        assert streamed.unexpected == (
            "classifier.weight",
            "model.layers.0.self_attn.rotary_emb.inv_freq",
        )


def test_weights_that_transformers_puts_together_are_refused(tmp_path, budget):
    shape = {**SHAPE, "num_local_experts": 2, "intermediate_size": 64}
    plain(AutoConfig.for_model("mixtral", **shape)).save_pretrained(tmp_path / "model")
    with pytest.raises(
        WeightFilesError, match=r"put together from several tensors by transformers: .*experts"
    ):
        streamed_model(tmp_path / "model", dtype=torch.float32, budget=budget)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "there is no .*but nothing like it"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "but pytorch_model.bin"),
        (lambda f: (f / "model.safetensors").write_bytes(b"no"), "no safetensors file that can be read"),
        (lambda f: (f / "model.safetensors").write_bytes(bytes([9] * 8) + b"{}"), "no safetensors file that"),
        (
            lambda f: (f / "model.safetensors").write_bytes(bytes([2] + [0] * 7) + b"[]"),
            "no safetensors file that",
        ),
        (lambda f: (f / "model.safetensors.index.json").write_text("{"), "index.json cannot be read"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"a": "../model.safetensors"}})
            ),
            "leads out of its folder",
        ),
        (
            lambda f: (f / "model.safetensors.index.json").write_text(
                json.dumps({"weight_map": {"absent.weight": "model.safetensors"}})
            ),
            "lists tensors that its files do not hold: absent.weight",
        ),
        (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    ],
)
def test_damaged_folders(tmp_path, budget, damage, message):
    plain(llama()).save_pretrained(tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(WeightFilesError, match=message):
        streamed_model(tmp_path / "model", dtype=torch.float32, budget=budget)


def test_a_file_that_is_cut_short_leaves_no_run_behind(tmp_path, budget):
    plain(llama()).save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(Exception, match="ends at byte"):
        streamed_model(tmp_path / "model", dtype=torch.float32, budget=budget)
    assert list((tmp_path / "swap").iterdir()) == []


def test_no_tier_has_room(tmp_path, budget):
    # 500 * 256 * 2 + 2 * (4 * 256 * 256 + 3 * 260 * 256) elements of 4 bytes, each weight in whole pages.
    pages = 4096
    need = 2 * 512000 // pages * pages + 2 * (4 * 262144 + 3 * 266240) + 2 * (512000 % pages > 0) * pages
    with pytest.raises(TierFullError, match=f"the weights take {need} bytes, and no tier .*none"):
        streamed_model(llama(), dtype=torch.float32, budget=Budget(device="1GiB"))
    (tmp_path / "swap").mkdir(exist_ok=True)
    exact = Budget(device="1GiB", nvme=f"{tmp_path / 'swap'}:{need}")
    streamed_model(llama(), dtype=torch.float32, budget=exact).close()
    short = Budget(device="1GiB", nvme=f"{tmp_path / 'swap'}:{need - pages}")
    with pytest.raises(TierFullError, match=rf"\(nvme {need - pages} bytes\)"):
        streamed_model(llama(), dtype=torch.float32, budget=short)


def test_weights_that_are_away_cannot_be_used_unawares(budget):
    with streamed_model(llama(), dtype=torch.float32, budget=budget) as streamed:
        assert stored_weights(streamed.model) is streamed.weights
        with pytest.raises(WeightAwayError, match=r"model\.embed_tokens\.weight, which are on nvme"):
            streamed.model(torch.tensor([[1, 2]]))
        for module in (streamed.model, streamed.model.model.layers[1].mlp):
            with pytest.raises(StreamedModelError, match="save_checkpoint"):
                module.state_dict()
        assert streamed.model.model.norm.state_dict()["weight"].shape == (256,)
    assert stored_weights(nn.Linear(2, 2)) is None


# -- in processes of their own -----------------------------------------------------------------------------


def child(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [sys.executable, str(CHILD), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def measured(*arguments):
    process = child(*arguments)
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return json.loads(out)


@pytest.mark.parametrize("layers", [3, 7])
def test_memory_is_one_weight_and_two_pieces_at_any_depth(tmp_path, layers):
    """The largest weights have 8 MiB, and so has a piece: 24 MiB, whatever the model has."""
    found = measured("build", tmp_path, layers)
    norms = (2 * layers + 1) * 1024 * 2
    assert found["weight_bytes"] == layers * 32 * MiB + 2 * 8 * MiB + norms
    assert found["peak_bytes"] - found["before_bytes"] <= (8 + 2 * 8) * MiB + 2 * MiB
    assert found["left_bytes"] <= 2 * MiB


def test_reading_takes_three_chunks(tmp_path):
    """A chunk of the file, two pieces: 24 MiB, for 112 MiB of weights; and what reads configurations."""
    from tests.memtrain.streamed_children import llama as large

    plain(large(3), torch.bfloat16).save_pretrained(tmp_path / "model")
    found = measured("read", tmp_path, tmp_path / "model")
    assert found["peak_bytes"] - found["before_bytes"] <= 3 * 8 * MiB + 4 * MiB


def test_a_build_that_is_killed_leaves_nothing_that_looks_complete(tmp_path):
    process = child("build", tmp_path, 7)
    deadline = time.monotonic() + 60
    while not any(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    for run in tmp_path.iterdir():
        assert not list(run.glob("*arena*"))  # unlinked as soon as it was open
    budget = Budget(device="1GiB", nvme=f"{tmp_path}:8MiB")
    streamed_model(llama(), dtype=torch.float32, budget=budget).close()
    assert list(tmp_path.iterdir()) == []  # the dead run's directory was reaped
