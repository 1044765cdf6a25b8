"""Treating whole models: to the bit, to the byte, and back again."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from memtrain.optim.autograd import treatments
from memtrain.optim.autograd.apply import EXACT, Applied, Policy, Rule, apply_to, revert
from memtrain.optim.autograd.causal_lm import install_chunked_loss
from memtrain.optim.autograd.saved_bytes import SavedBytes
from memtrain.optim.autograd.treatments import NotServedError, Offer, register_treatment

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
CONFIGS: dict[str, Callable[[], object]] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True, attention_dropout=0.2),
    "llama, biases": lambda: transformers.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "mistral": lambda: transformers.MistralConfig(**SMALL),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "qwen3, norms of heads": lambda: transformers.Qwen3Config(**SMALL, head_dim=8),
    "gemma, 1 + weight": lambda: transformers.GemmaConfig(**SMALL, head_dim=8),
    "olmo2, norms behind": lambda: transformers.Olmo2Config(**SMALL),
    "phi3, one gate_up": lambda: transformers.Phi3Config(**SMALL, pad_token_id=0),
    "mixtral, experts": lambda: transformers.MixtralConfig(**SMALL),
    "gpt-neox, LayerNorm": lambda: transformers.GPTNeoXConfig(
        **{k: v for k, v in SMALL.items() if k != "num_key_value_heads"}, bos_token_id=0, eos_token_id=0
    ),
    "gpt2, gelu": lambda: transformers.GPT2Config(**GPT, activation_function="gelu", n_inner=96),
}


def causal_lm(config: object, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms of one and biases of zero would hide mistakes
            nn.init.normal_(parameter, 1.0, 0.3)
    return model.train()


def step(model: nn.Module, **options: object) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    ids = torch.randint(97, (2, 11), generator=torch.Generator().manual_seed(4))
    torch.manual_seed(3)
    loss = model(ids, labels=ids, use_cache=False, **options).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(mine: tuple[Tensor, dict[str, Tensor]], theirs: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.equal(mine[0], theirs[0])
    assert mine[1].keys() == theirs[1].keys()
    different = [name for name, gradient in mine[1].items() if not torch.equal(gradient, theirs[1][name])]
    assert different == []


def forwards(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_gradients_are_bit_equal(name: str, dtype: torch.dtype) -> None:
    model = causal_lm(CONFIGS[name](), dtype)
    theirs, keys, modules = step(model), list(model.state_dict()), list(model.modules())
    modes, state = [m.training for m in modules], torch.get_rng_state()
    applied = apply_to(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in modules] == modes
    assert applied.is_exact
    assert not [row for row in applied.rows if row.treatment == "keep"]
    assert {row.note for row in applied.treated} == {"bit-equal"}
    assert_same(step(model), theirs)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    applied.revert()
    revert(model)
    assert forwards(model) == []
    assert_same(step(model), theirs)


def test_gpt2_tanh_of_five_operators_is_equal_within_rounding() -> None:
    model = causal_lm(transformers.GPT2Config(**GPT))
    theirs = step(model)
    applied = apply_to(model)
    notes = {row.note for row in applied.treated if row.kind == "mlp"}
    assert notes == {"equal within rounding"}
    mine = step(model)
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-6, atol=0)
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(
            mine[1][name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max())
        )


def llama_layer(dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, Callable[..., Tensor]]:
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=1376, num_attention_heads=8, num_hidden_layers=1, vocab_size=8
    )
    config._attn_implementation = "sdpa"
    layer = LlamaDecoderLayer(config, 0).to(dtype)
    x = torch.randn(2, 256, 512).to(dtype)
    positions = LlamaRotaryEmbedding(config)(x, torch.arange(256)[None])
    return layer, lambda: layer(x.clone().requires_grad_(), position_embeddings=positions)


def saved_bytes_per_token(layer: nn.Module, run: Callable[..., Tensor]) -> float:
    with SavedBytes(layer.parameters()) as saved:
        kept = run()
    assert kept.requires_grad
    return saved.total_bytes / 512


def test_bytes_of_a_llama_layer() -> None:
    """bf16, d = 512, f = 1376, 8 heads, 2 x 256 tokens: by hand, and to the byte."""
    d, f, heads = 512, 1376, 8
    rope = 2 * 256 * 64 * 2 / 512  # cos and sin of 256 positions for both rows of the batch
    attention = 2 * 4 * d + 4 * heads  # q, k, v, output; log of the sum
    norms = 2 * (4 * d + 4 + 2 * d)  # x in fp32, rstd, normalised
    eager = norms + 2 * 2 * d + attention + 4 * 2 * f + rope
    exact = 2 * (2 * d + 4) + attention + 2 * 2 * f + rope
    assert (eager, exact) == (23464, 11816)
    layer, run = llama_layer()
    assert saved_bytes_per_token(layer, run) == eager
    applied = apply_to(layer, example=run)
    assert saved_bytes_per_token(layer, run) == exact
    assert applied.bytes_spared_per_token == eager - exact
    assert exact / eager < 0.51
    applied.revert()
    assert saved_bytes_per_token(layer, run) == eager


def test_table() -> None:
    layer, run = llama_layer()
    table = apply_to(layer, example=run).table()
    assert table.splitlines() == [
        "sites  kind       module        treatment  B/token  becomes",
        "2      linear     Linear        recompute  1024     0        bit-equal",
        "3      linear     Linear        recompute  0        0        bit-equal",
        "1      gated_mlp  LlamaMLP      recompute  11008    5504     bit-equal",
        "2      norm       LlamaRMSNorm  recompute  3076     1028     bit-equal",
        "spared: 11648 B/token",
    ]


def test_policies_say_what_and_where() -> None:
    model = causal_lm(CONFIGS["llama"]())
    theirs = step(model)
    policy = EXACT.followed_by(
        Rule(kind="gated_mlp", treatment="tiled", modules="model.layers.1.*"),
        Rule(kind="norm", treatment="keep", modules="model.norm"),
    )
    applied = apply_to(model, policy)
    done = {row.name: row.treatment for row in applied.rows}
    assert done["model.layers.0.mlp"] == "recompute"
    assert done["model.layers.1.mlp"] == "tiled"
    assert done["model.norm"] == "keep"
    assert "model.norm" not in forwards(model)
    mine = step(model)
    torch.testing.assert_close(mine[0], theirs[0])
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(mine[1][name], gradient, rtol=1e-3, atol=1e-6)


def test_under_checkpointing_autocast_frozen_weights_and_the_chunked_loss() -> None:
    config = CONFIGS["llama"]()
    for prepare in (
        lambda m: m.activation_checkpointing_enable({"use_reentrant": False}),
        lambda m: m.activation_checkpointing_enable({"use_reentrant": True}),
        lambda m: [p.requires_grad_("proj" in n) for n, p in m.named_parameters()],
        lambda m: m.get_input_embeddings().requires_grad_(False),
        install_chunked_loss,
    ):
        model = causal_lm(config)
        prepare(model)
        theirs = step(model)
        apply_to(model)
        assert_same(step(model), theirs)
    model = causal_lm(config)
    apply_to(model)
    install_chunked_loss(model)  # in the other order: the head is nobody else's
    with torch.autocast("cpu", torch.bfloat16):
        mine = step(model)
        revert(model)
        assert_same(mine, step(model))


def test_a_treated_model_can_be_copied_pickled_and_compiled() -> None:
    model = causal_lm(CONFIGS["llama"]())
    theirs = step(model)
    apply_to(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert forwards(twin) == forwards(model)
        assert all(
            module.forward.module is module for module in twin.modules() if "forward" in module.__dict__
        )
        assert_same(step(twin), theirs)
    layer, run = llama_layer(torch.float32)
    apply_to(layer, example=run)
    x = torch.randn(3, 512, requires_grad=True)
    compiled = torch.compile(layer.mlp, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer.mlp(x))


def test_what_stands_in_the_way_is_said() -> None:
    model = causal_lm(CONFIGS["llama"]())
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: None)
    model.model.layers[1].mlp.act_fn = nn.Tanh()
    original = model.model.norm.forward
    model.model.norm.forward = lambda x: original(x)
    notes = {row.name: row.note for row in apply_to(model).rows if row.treatment == "keep"}
    assert notes == {
        "model.layers.0.mlp": "down_proj carries a hook or a forward of its own, which would be passed by",
        "model.layers.1.mlp": "not a linear layer of silu, gelu, gelu_tanh, relu to the bit",
        "model.norm": "its forward has been replaced by something else",
    }
    with pytest.raises(ValueError, match="treated already; revert first"):
        apply_to(model)
    revert(model)
    assert forwards(model) == ["model.norm"]


class OddNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)


def test_refusals() -> None:
    x = torch.randn(2, 4)
    odd = nn.Sequential(OddNorm())
    with pytest.raises(ValueError, match="no known form of RMSNorm gives its output to the bit"):
        apply_to(odd, example=lambda: odd(x))
    with pytest.raises(ValueError, match="has no token embeddings to be tried with: pass example"):
        apply_to(odd)
    with pytest.raises(ValueError, match="meta device"):
        apply_to(nn.Linear(2, 2, device="meta"))
    empty = nn.Sequential(nn.Tanh())
    with pytest.raises(ValueError, match="no site was found"):
        apply_to(empty, example=lambda: empty(x))
    with pytest.raises(ValueError, match="kind must be one of norm, linear, gated_mlp, mlp, layer"):
        Rule(kind="attention", treatment="recompute")
    with pytest.raises(ValueError, match="no treatment 'int8' for norm; there are keep, recompute"):
        Rule(kind="norm", treatment="int8")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(treatments, "_REGISTRY", dict(treatments._REGISTRY))


class Halved:
    """A lossy treatment, for want of a sensible one."""

    exact = False

    def offer(self, site: treatments.Site) -> Offer:
        if site.name.endswith("1"):
            raise NotServedError("odd layers are left alone")
        return Offer(forward=halved_forward, plain_bytes=8.0, saved_bytes=4.0, equal="half of it")


def halved_forward(module: nn.Module, *args: object, **kwargs: object) -> object:
    return type(module).forward(module, *args, **kwargs) / 2


@pytest.mark.usefixtures("registry")
def test_other_treatments_register_themselves() -> None:
    register_treatment("layer", "halved", Halved())
    with pytest.raises(ValueError, match="'halved' for layer is already there"):
        register_treatment("layer", "halved", Halved())
    with pytest.raises(ValueError, match="kind must be one of"):
        register_treatment("head", "halved", Halved())
    model = causal_lm(CONFIGS["llama"]())
    applied: Applied = apply_to(model, Policy(rules=(Rule(kind="layer", treatment="halved"),)))
    assert not applied.is_exact
    assert [(row.name, row.treatment, row.note) for row in applied.rows] == [
        ("model.layers.0", "halved", "half of it"),
        ("model.layers.1", "keep", "odd layers are left alone"),
    ]
    assert applied.bytes_spared_per_token == 4.0
    assert step(model)[0].isfinite()


class Residual(nn.Module):
    """Looks like a norm, and cannot be called with one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * self.weight + y


class WithResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.residual = nn.LayerNorm(8), Residual()

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x)
        result: Tensor = self.residual(normed, x)
        return result


def test_a_module_that_cannot_be_tried_alone_is_kept_and_the_others_are_treated() -> None:
    model = WithResidual()
    applied = apply_to(model, example=lambda: model(torch.randn(1, 4, 8)))
    assert [(row.name, row.treatment) for row in applied.rows] == [
        ("norm", "recompute"),
        ("residual", "keep"),
    ]
    assert "it cannot be tried alone (TypeError" in applied.rows[1].note
