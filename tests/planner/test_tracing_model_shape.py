"""Sizes read from configurations, against published ones and against the parameters of the model itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("transformers")

from memtrain.planner.model_presets import PRESETS
from memtrain.planner.parallel import ModelShape
from memtrain.planner.tracing.fake_model import UnknownModelError, build, read_config
from memtrain.planner.tracing.model_shape import ModelShapeError, expert_count, model_shape


def shape(*sizes: int) -> ModelShape:
    names = ("layers", "hidden", "heads", "key_value_heads", "head_size", "intermediate")
    names += ("experts", "experts_per_token")
    return ModelShape(**dict(zip(names, sizes, strict=False)))


PUBLISHED = {
    "smollm2-135m": shape(30, 576, 9, 3, 64, 1536),
    "gpt2-xl": shape(48, 1600, 25, 25, 64, 6400),
    "llama-7b": shape(32, 4096, 32, 32, 128, 11008),
    "llama-2-70b": shape(80, 8192, 64, 8, 128, 28672),
    "llama-3-8b": shape(32, 4096, 32, 8, 128, 14336),
    "llama-3-70b": shape(80, 8192, 64, 8, 128, 28672),
    "mistral-7b": shape(32, 4096, 32, 8, 128, 14336),
    "qwen2.5-7b": shape(28, 3584, 28, 4, 128, 18944),
    # 8 heads of 256 are less than the hidden size of 2304, 16 of 256 more than 3584.
    "gemma-2-2b": shape(26, 2304, 8, 4, 256, 9216),
    "gemma-2-9b": shape(42, 3584, 16, 8, 256, 14336),
    "mixtral-8x7b": shape(32, 4096, 32, 8, 128, 14336, 8, 2),
}


def test_every_preset_is_compared() -> None:
    assert PUBLISHED.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_their_published_sizes(name: str) -> None:
    assert model_shape(name) == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_of_the_parameters(name: str) -> None:
    found = model_shape(name)
    fields = {**PRESETS[name], "n_layer" if name == "gpt2-xl" else "num_hidden_layers": 1}
    with FakeTensorMode():
        model = build(read_config(fields), torch.bfloat16, "default")
    rows = {path.rpartition(".")[2]: widths(module) for path, module in model.named_modules()}
    if name == "gpt2-xl":
        assert rows["c_attn"] == (1600, found.query_width + found.key_value_width)
        assert rows["c_fc"] == (1600, found.intermediate)
        return
    assert rows["q_proj"] == (found.query_width, found.hidden)
    assert rows["k_proj"] == rows["v_proj"] == (found.key_value_width // 2, found.hidden)
    if found.experts:
        gates = next(p for path, p in model.named_parameters() if path.endswith("gate_up_proj"))
        assert tuple(gates.shape) == (found.experts, 2 * found.intermediate, found.hidden)
    else:
        assert rows["up_proj"] == (found.intermediate, found.hidden)


def widths(module: nn.Module) -> tuple[int, ...]:
    weight = getattr(module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, torch.Tensor) else ()


@pytest.mark.parametrize(
    ("fields", "key_value_heads", "intermediate"),
    [
        ({"model_type": "falcon"}, 1, 4 * 4544),
        ({"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 8}, 8, 4 * 4544),
        ({"model_type": "gpt_bigcode"}, 1, 4 * 768),
        ({"model_type": "gpt_neo"}, 16, 4 * 2048),
        ({"model_type": "gpt2", "n_inner": 1000}, 12, 1000),
        ({"model_type": "opt"}, 12, 3072),
        ({"model_type": "qwen3_moe"}, 4, 768),  # of one expert; its dense layers would have 6144
    ],
)
def test_names_and_rules_of_other_families(
    fields: dict[str, Any], key_value_heads: int, intermediate: int
) -> None:
    found = model_shape(fields)
    assert (found.key_value_heads, found.intermediate) == (key_value_heads, intermediate)


def test_experts_are_counted_under_every_name() -> None:
    fields = ({"model_type": name} for name in ("mixtral", "qwen3_moe", "deepseek_v3", "llama"))
    assert [expert_count(read_config(f)) for f in fields] == [8, 128, 256, 0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "deepseek_v3"}, "deepseek_v3: heads of keys and of values differ in size"),
        ({"model_type": "mimo_v2_flash"}, "mimo_v2_flash: heads of keys and of values differ in size"),
        ({"model_type": "mamba"}, "mamba: the configuration gives no num_attention_heads"),
        ({"model_type": "gemma3n_text"}, "intermediate_size is .*one number for all layers"),
        ({"model_type": "gemma4_text"}, "head_dim differs from layer to layer"),
    ],
)
def test_what_one_number_cannot_say_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelShapeError, match=message):
        model_shape(fields)


def test_unknown_models_are_named() -> None:
    with pytest.raises(UnknownModelError, match="llama-9t is neither a preset"):
        model_shape("llama-9t")
