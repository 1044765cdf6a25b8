from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memtrain import weights
from memtrain.recipe import ModelSection, RecipeError
from memtrain.weights import load_model, own_weights

CPU = torch.device("cpu")
FIELDS = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def saved(folder: Path, *, tied: bool) -> LlamaForCausalLM:
    fields = {name: value for name, value in FIELDS.items() if name != "model_type"}
    model = LlamaForCausalLM(LlamaConfig(**fields, tie_word_embeddings=tied)).to(torch.bfloat16)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_loaded_weights_are_those_of_the_file_and_our_own(tmp_path: Path, tied: bool) -> None:
    original = saved(tmp_path, tied=tied)
    model = load_model(ModelSection(path=str(tmp_path)), CPU)
    for name, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    assert model.training
    assert model.config.use_cache is False
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    with torch.no_grad():  # writing to them does not reach the file
        model.model.norm.weight.zero_()
    again = load_model(ModelSection(path=str(tmp_path)), CPU)
    assert torch.equal(again.model.norm.weight, original.model.norm.weight)


def test_only_what_lies_in_a_file_is_copied(tmp_path: Path) -> None:
    saved(tmp_path, tied=True)
    mapped = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = sum(p.nbytes for p in mapped.parameters())
    in_memory = torch.nn.Linear(8, 8)
    address = in_memory.weight.data_ptr()
    assert own_weights(in_memory) == 0
    assert in_memory.weight.data_ptr() == address
    assert own_weights(mapped) == expected
    assert own_weights(mapped) == 0


def test_random_weights_come_from_the_seed() -> None:
    section = ModelSection(config=FIELDS, dtype="float32")
    torch.manual_seed(5)
    first = load_model(section, CPU)
    torch.manual_seed(5)
    second = load_model(section, CPU)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert next(first.parameters()).dtype == torch.float32


def test_a_field_that_the_configuration_does_not_have_is_refused() -> None:
    section = ModelSection(config={**FIELDS, "hiden_size": 3})
    with pytest.raises(RecipeError, match="hiden_size: llama has no such field; did you mean hidden_size"):
        load_model(section, CPU)
    with pytest.raises(RecipeError, match="'lama' is unknown to transformers"):
        load_model(ModelSection(config={"model_type": "lama"}), CPU)


def test_a_missing_folder_is_told_with_its_full_path(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"no model at {tmp_path}/none; `make data`"):
        load_model(ModelSection(path=str(tmp_path / "none")), CPU)
    with pytest.raises(RecipeError, match="cannot be loaded"):
        load_model(ModelSection(path=str(tmp_path)), CPU)


def test_giving_back_part_of_a_page_gives_back_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights.ctypes, "CDLL", lambda *_, **__: pytest.fail("madvise was called"))
    weights._give_back(4096 * 7 + 1, 4096)  # bytes 1 of one page to 1 of the next: no whole page
