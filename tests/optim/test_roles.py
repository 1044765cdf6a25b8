"""Which parameters are projected, on real architectures."""

import pytest
import torch
from torch import nn

from memtrain.optim.named import GaLore
from memtrain.optim.roles import Role, classify, param_groups, role_table

transformers = pytest.importorskip("transformers")
SIZES = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=128,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def llama():
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config)


def by_name(roles):
    return {name: each for each in roles for name in each.names}


def test_llama(llama):
    roles = by_name(classify(llama))
    layer = "model.layers.1."
    expected = {
        "model.embed_tokens.weight": (Role.EMBEDDING, False),
        "lm_head.weight": (Role.EMBEDDING, False),
        "model.norm.weight": (Role.NORM, False),
        layer + "input_layernorm.weight": (Role.NORM, False),
        layer + "self_attn.q_proj.weight": (Role.ATTENTION, True),
        layer + "self_attn.k_proj.weight": (Role.ATTENTION, True),
        layer + "self_attn.o_proj.weight": (Role.ATTENTION, True),
        layer + "mlp.gate_proj.weight": (Role.MLP, True),
        layer + "mlp.down_proj.weight": (Role.MLP, True),
    }
    assert {name: (roles[name].role, roles[name].projected) for name in expected} == expected
    assert roles["lm_head.weight"] is roles["model.embed_tokens.weight"]
    assert "tied to lm_head.weight" in roles["lm_head.weight"].reason


def test_every_parameter_has_one_role(llama):
    roles = classify(llama)
    assert len(roles) == len(list(llama.parameters()))
    assert sum(torch.Size(each.shape).numel() for each in roles) == sum(p.numel() for p in llama.parameters())


def test_gpt2_is_transposed_and_its_fused_columns_stay_together():
    config = transformers.GPT2Config(
        n_embd=64, n_layer=1, n_head=4, vocab_size=128, bos_token_id=1, eos_token_id=2
    )
    roles = by_name(classify(transformers.GPT2LMHeadModel(config)))
    fused = roles["transformer.h.0.attn.c_attn.weight"]
    assert (fused.role, fused.projected, fused.split, fused.shape) == (Role.ATTENTION, True, 1, (64, 192))
    assert "transposed Conv1D, fused columns stay together" in fused.reason
    assert roles["transformer.h.0.mlp.c_proj.weight"].role == Role.MLP
    assert roles["transformer.h.0.attn.c_proj.weight"].role == Role.ATTENTION
    assert roles["transformer.h.0.attn.c_attn.bias"].role == Role.BIAS
    assert roles["transformer.wpe.weight"].role == Role.EMBEDDING


def test_fused_rows_are_split_where_they_are_blocks():
    roles = by_name(classify(transformers.Phi3ForCausalLM(transformers.Phi3Config(**SIZES))))
    assert roles["model.layers.0.self_attn.qkv_proj.weight"].split == 3
    assert roles["model.layers.0.mlp.gate_up_proj.weight"].split == 2
    assert roles["lm_head.weight"].role == Role.HEAD
    grouped = transformers.Phi3Config(**SIZES, num_key_value_heads=2)
    roles = by_name(classify(transformers.Phi3ForCausalLM(grouped)))
    fused = roles["model.layers.0.self_attn.qkv_proj.weight"]  # as many rows as the vocabulary, by chance
    assert (fused.role, fused.split, fused.projected) == (Role.ATTENTION, 1, True)
    assert "fused of unequal parts stays together" in fused.reason
    narrow = transformers.Phi3Config(**{**SIZES, "intermediate_size": 40})
    fused = by_name(classify(transformers.Phi3ForCausalLM(narrow), rank=48))[
        "model.layers.0.mlp.gate_up_proj.weight"
    ]
    assert (fused.shape, fused.split, fused.projected) == ((80, 64), 1, True)
    assert "2 parts within rank 48 stays together" in fused.reason
    neox = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES))
    fused = by_name(classify(neox))["gpt_neox.layers.0.attention.query_key_value.weight"]
    assert (fused.split, fused.projected) == (1, True)
    assert "interleaved by head" in fused.reason


def test_experts_are_stacks_and_their_router_is_whole():
    config = transformers.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)
    roles = by_name(classify(transformers.MixtralForCausalLM(config)))
    experts = [each for each in roles.values() if each.role == Role.EXPERTS]
    assert sorted(each.shape for each in experts) == [(4, 64, 96)] * 2 + [(4, 192, 64)] * 2
    assert all(each.projected for each in experts)
    assert [each.projected for each in roles.values() if each.role == Role.ROUTER] == [False, False]


def test_a_head_without_a_name():
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 50))
    assert [each.role.value for each in classify(model) if len(each.shape) == 2] == [
        "embedding",
        "linear",
        "head",
    ]


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 2)
        self.conv = nn.Conv2d(3, 8, 3)
        self.plain = nn.Linear(32, 16)
        self.lora_A = nn.Linear(32, 4, bias=False)
        self.norm = nn.LayerNorm(32)
        self.table = nn.Parameter(torch.zeros(5, 6))
        self.frozen = nn.Linear(32, 32, bias=False).requires_grad_(False)


def test_odd_modules():
    roles = by_name(classify(Odd(), rank=8))
    found = {name: (each.role.value, each.projected, each.split) for name, each in roles.items()}
    assert found == {
        "table": ("other", False, 1),
        "attention.in_proj_weight": ("attention", True, 3),
        "attention.in_proj_bias": ("bias", False, 1),
        "attention.out_proj.weight": ("attention", True, 1),
        "attention.out_proj.bias": ("bias", False, 1),
        "conv.weight": ("convolution", False, 1),
        "conv.bias": ("bias", False, 1),
        "plain.weight": ("linear", True, 1),
        "plain.bias": ("bias", False, 1),
        "lora_A.weight": ("lora", False, 1),
        "norm.weight": ("norm", False, 1),
        "norm.bias": ("norm", False, 1),
        "frozen.weight": ("linear", True, 1),
    }
    # A matrix that rank 16 would not shorten.
    plain = by_name(classify(Odd(), rank=16))["plain.weight"]
    assert not plain.projected
    assert "shorter side within rank 16" in plain.reason


def test_overrides_and_choice_of_roles():
    roles = by_name(classify(Odd(), overrides={"table": "mlp", "attention.*": Role.OTHER}))
    assert (roles["table"].role, roles["table"].projected) == (Role.MLP, True)
    assert roles["attention.out_proj.weight"].reason == "override 'attention.*'"
    assert not roles["attention.out_proj.weight"].projected
    roles = by_name(classify(Odd(), project={"lora"}))
    assert [name for name, each in roles.items() if each.projected] == ["lora_A.weight"]
    # A convolution cannot be, whatever its role.
    roles = by_name(classify(Odd(), project={"convolution"}))
    assert not roles["conv.weight"].projected
    assert "not projected: 4-dimensional" in roles["conv.weight"].reason
    with pytest.raises(ValueError, match="role 'body' is unknown: one of embedding"):
        classify(Odd(), project={"body"})
    with pytest.raises(ValueError, match="override 'tables' matches no parameter"):
        classify(Odd(), overrides={"tables": "mlp"})


def test_groups_for_the_optimizer(llama):
    roles = classify(llama, rank=8)
    groups = param_groups(llama, roles, decay_vectors=False, rank=8)
    optimizer = GaLore(groups, lr=0.01, weight_decay=0.1)
    sizes = [
        (len(g["params"]), g["projection"], g["rank"], g["weight_decay"]) for g in optimizer.param_groups
    ]
    # The embedding; 7 matrices in each of 2 layers; 2 norms a layer and the last.
    assert sizes == [(1, None, None, 0.1), (14, "power", 8, 0.1), (5, None, None, 0.0)]
    assert optimizer.param_groups[0]["param_names"] == ["model.embed_tokens.weight"]
    llama(input_ids=torch.arange(16)[None], labels=torch.arange(16)[None]).loss.backward()
    optimizer.step()
    query = llama.model.layers[0].self_attn.q_proj.weight
    assert optimizer.state[query]["exp_avg.value"].shape == (64, 8)


def test_groups_of_fused_matrices_and_without_frozen_ones():
    model = Odd()
    groups = param_groups(model, classify(model, rank=8), rank=8)
    named = {name: group for group in groups for name, _ in group["params"]}
    assert named["attention.in_proj_weight"]["split"] == 3
    assert "frozen.weight" not in named
    with pytest.raises(ValueError, match=r"table is no parameter of this model"):
        param_groups(nn.Linear(2, 2), classify(model))


def test_the_table(llama):
    lines = role_table(classify(llama, rank=8)).splitlines()
    assert lines[0].split() == ["parameter", "count", "shape", "role", "update", "because"]
    assert len(lines) == 1 + 1 + 9 + 1  # heading, embedding, one layer for both, last norm
    query = next(line for line in lines if "q_proj" in line)
    assert query.split()[:2] == ["model.layers.*.self_attn.q_proj.weight", "2"]
    assert query.split()[2:] == "64 x 64 attention projected named q_proj".split()
    frozen = role_table(classify(Odd()))
    assert next(line for line in frozen.splitlines() if line.startswith("frozen")).split()[6] == "frozen"
