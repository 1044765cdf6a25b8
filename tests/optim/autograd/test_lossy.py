"""Lossy treatments of a whole model: applied, undone, added up, and as entries of a policy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memtrain.optim import GaLore, SmallGradients
from memtrain.optim.autograd import lossy_treatments  # noqa: F401  (registers the entries)
from memtrain.optim.autograd.apply import EXACT, Policy, Rule, apply_to, revert
from memtrain.optim.autograd.compact import (
    apply_compact,
    bases_of,
    clear_compressed_grads,
    compressed_grads,
    densify_grads,
)
from memtrain.optim.autograd.fewbit import FewBitActivation
from memtrain.optim.autograd.group_codec import GroupCodec
from memtrain.optim.autograd.lossy import apply_fewbit, compress_blocks
from memtrain.optim.autograd.saved_bytes import SavedBytes
from memtrain.optim.autograd.wtacrs import apply_wta
from memtrain.optim.compact_gradients import feed_compact

transformers = pytest.importorskip("transformers")

TOKENS = 64


def llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=97,
        max_position_embeddings=TOKENS,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(dtype)


def gpt_neox() -> nn.Module:
    config = transformers.GPTNeoXConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=97,
        max_position_embeddings=TOKENS,
    )
    torch.manual_seed(0)
    return transformers.GPTNeoXForCausalLM(config)


IDS = torch.randint(97, (2, TOKENS), generator=torch.Generator().manual_seed(0))


def loss_and_gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    densify_grads(model.parameters())
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert got.keys() == expected.keys()
    difference = sum(float((got[n] - g).double().square().sum()) for n, g in expected.items())
    return float((difference / sum(float(g.double().square().sum()) for g in expected.values())) ** 0.5)


def apply_int8(model: nn.Module) -> Callable[[], None]:
    return compress_blocks(model).undo


def apply_int4(model: nn.Module) -> Callable[[], None]:
    return compress_blocks(model, GroupCodec(bits=4)).undo


def apply_int8_policy(model: nn.Module) -> Callable[[], None]:
    apply_to(model, Policy(rules=(Rule(kind="layer", treatment="int8"),)))
    return lambda: revert(model)


def apply_int8_linears(model: nn.Module) -> Callable[[], None]:
    apply_to(model, Policy(rules=(Rule(kind="linear", treatment="int8"),)))
    return lambda: revert(model)


def apply_compact_policy(model: nn.Module) -> Callable[[], None]:
    apply_to(model, Policy(rules=(Rule(kind="linear", treatment="compact"),)))
    return lambda: revert(model)


def apply_exact_int8(model: nn.Module) -> Callable[[], None]:
    apply_to(model, EXACT.followed_by(Rule(kind="layer", treatment="int8")))
    return lambda: revert(model)


def apply_exact_and_hooks(model: nn.Module) -> Callable[[], None]:
    apply_to(model, EXACT)
    handle = compress_blocks(model)

    def undo() -> None:
        handle.undo()
        revert(model)

    return undo


def apply_compact_int8(model: nn.Module) -> Callable[[], None]:
    handles = apply_compact(model, density=1.0), compress_blocks(model)

    def undo() -> None:
        for handle in handles:
            handle.undo()

    return undo


TREATMENTS: dict[str, tuple[Callable[[nn.Module], Callable[[], None]], float]] = {
    "int8": (apply_int8, 0.02),
    "int4": (apply_int4, 0.4),
    "int8 by policy": (apply_int8_policy, 0.02),
    "exact and int8 by policy": (apply_exact_int8, 0.02),
    "exact and int8 by hooks": (apply_exact_and_hooks, 0.02),
    "CompAct": (lambda model: apply_compact(model, density=1.0).undo, 1.5),
    "int8 of norms' outputs by policy": (apply_int8_linears, 0.02),
    "CompAct by policy": (apply_compact_policy, 2.5),
    "WTA-CRS": (lambda model: apply_wta(model).undo, 2.5),
    "CompAct and int8": (apply_compact_int8, 1.5),
}


@pytest.mark.parametrize("name", TREATMENTS)
def test_applied_and_undone_on_a_llama(name: str) -> None:
    model = llama()
    keys = list(model.state_dict())
    classes = [type(module) for module in model.modules()]
    expected_loss, expected = loss_and_gradients(model)
    apply, limit = TREATMENTS[name]
    undo = apply(model)
    assert list(model.state_dict()) == keys
    torch.manual_seed(0)
    loss, got = loss_and_gradients(model)
    assert torch.equal(loss, expected_loss)  # the forward pass is exact
    assert 1e-3 < error(got, expected) < limit
    again = copy.deepcopy(model)
    torch.manual_seed(0)
    twice_loss, twice = loss_and_gradients(again)
    assert torch.equal(twice_loss, loss)
    assert all(torch.equal(twice[key], got[key]) for key in got)
    undo()
    undo()
    loss, got = loss_and_gradients(model)
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    assert [type(module) for module in model.modules()] == classes
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("name", TREATMENTS)
def test_with_gradient_checkpointing(name: str) -> None:
    model = llama()
    model.train()
    _, expected = loss_and_gradients(model)
    apply, limit = TREATMENTS[name]
    undo = apply(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    _, got = loss_and_gradients(model)
    assert error(got, expected) < limit
    undo()


def saved_bytes(model: nn.Module) -> int:
    """Of the decoder's layers: storages that autograd keeps, those of parameters and buffers apart."""
    x = torch.randn(2, TOKENS, 128).to(model.dtype).requires_grad_() * 1
    positions = torch.arange(TOKENS).unsqueeze(0)
    tables = model.model.rotary_emb(x, positions)
    with SavedBytes([x, *tables, *model.parameters(), *model.buffers()]) as saved:
        keep = model.model.layers[0](x, position_embeddings=tables)
    del keep
    return saved.total_bytes


def test_exact_and_int8_of_a_llama_layer_in_bytes() -> None:
    # T11. d = 128, f = 352, two heads, bf16, 128 tokens. The exact treatments keep both norms' inputs, q,
    # k, v, the attention's output, gate and up: 6d + 2f elements; and in fp32, not encoded, rstd of two norms
    # and the log-sum-exp of two heads.
    model = llama(torch.bfloat16)
    eager = saved_bytes(model)
    apply_to(model, EXACT)
    handle = compress_blocks(model)
    x = torch.randn(2, TOKENS, 128).bfloat16().requires_grad_() * 1
    tables = model.model.rotary_emb(x, torch.arange(TOKENS).unsqueeze(0))
    keep = model.model.layers[0](x, position_embeddings=tables)
    tokens = 2 * TOKENS
    codec = handle.compressor.codec
    expected = 6 * codec.size_bytes(tokens * 128) + 2 * codec.size_bytes(tokens * 352)
    assert handle.compressor.stored_bytes == expected
    assert expected == (6 * 128 + 2 * 352) * tokens * 65 // 64  # 8 bits and a scale of 2 bytes for 128 values
    statistics = tokens * 4 * (2 + 2)
    assert (expected + statistics) / eager < 0.27
    del keep


def test_entries_of_a_policy_that_are_not_served_say_why() -> None:
    model = llama()
    policy = Policy(rules=(Rule(kind="gated_mlp", treatment="fewbit3"), Rule(kind="linear", treatment="wta")))
    applied = apply_to(model, policy)
    assert not applied.is_exact
    assert {row.treatment for row in applied.rows if row.kind == "gated_mlp"} == {"keep"}
    assert "gives nothing in a gated MLP" in applied.table()
    linear = [row for row in applied.rows if row.kind == "linear"]
    assert {row.treatment for row in linear} == {"wta"}
    # q reads first, k and v share its sample; up shares gate's: .3 of 128 fp32 features, index and factor
    assert [row.saved_bytes for row in linear[:5]] == pytest.approx([0.3 * 524, 0.0, 0.0, 0.3 * 524, 0.0])
    _, got = loss_and_gradients(model)
    revert(model)
    _, expected = loss_and_gradients(model)
    assert 1e-3 < error(got, expected) < 2.5


def test_compact_by_policy_and_its_bases() -> None:
    model = llama()
    applied = apply_to(model, Policy(rules=(Rule(kind="linear", treatment="compact"),)))
    linear = [row for row in applied.rows if row.kind == "linear"]
    # q, k, v share 32 of 128 fp32 features; gate and up others
    assert [row.plain_bytes for row in linear[:5]] == [512.0, 0.0, 0.0, 512.0, 0.0]
    assert [row.saved_bytes for row in linear[:5]] == [128.0, 0.0, 0.0, 128.0, 0.0]
    bases = bases_of(model)
    assert len(bases.names) == 10
    saved = bases.state_dict()
    assert len({tuple(words.tolist()) for words in saved.values()}) == 4
    query = model.model.layers[0].self_attn.q_proj.weight

    def low() -> Tensor:
        clear_compressed_grads(model.parameters())
        model(IDS, labels=IDS).loss.backward()
        return query.compressed_grad.clone()

    first = low()
    clear_compressed_grads(model.parameters())
    bases.refresh(1)
    assert not torch.equal(low(), first)
    clear_compressed_grads(model.parameters())
    bases.load_state_dict(saved)
    assert torch.equal(low(), first)
    revert(model)
    with pytest.raises(ValueError, match="other layers"):
        bases_of(model).load_state_dict(saved)


def test_compact_by_policy_feeds_an_optimizer_beside_exact_and_int8() -> None:
    settings = {"lr": 1e-2, "density": 0.25, "projection": "rademacher", "proj_type": "right"}
    entries = Rule(kind="linear", treatment="compact"), Rule(kind="layer", treatment="int8")

    def trained(policy: Policy | None) -> list[float]:
        model = llama()
        layers = [p for n, p in model.named_parameters() if "layers" in n and p.dim() == 2]
        others = [p for p in model.parameters() if all(p is not one for one in layers)]
        groups = [{"params": layers}, {"params": others, "density": None}]
        optimizer = GaLore(groups, **settings)  # type: ignore[arg-type]
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for readers in (
                (attention.q_proj, attention.k_proj, attention.v_proj),
                (mlp.gate_proj, mlp.up_proj),
            ):
                optimizer.share_basis([reader.weight for reader in readers])
        gradients = SmallGradients(optimizer)
        if policy is not None:
            apply_to(model, policy)
            feed_compact(model, gradients)
        losses = []
        for _ in range(6):
            loss = model(IDS, labels=IDS).loss
            loss.backward()
            assert not compressed_grads(model.parameters())
            gradients.clip_grad_norm_(1.0)
            optimizer.step()
            losses.append(loss.item())
        return losses

    plain = trained(None)
    alone, stacked = trained(Policy(rules=entries[:1])), trained(EXACT.followed_by(*entries))
    assert alone[0] == stacked[0] == plain[0]
    assert alone == pytest.approx(plain, rel=1e-4)  # Adam makes much of small differences
    assert stacked[-1] == pytest.approx(alone[-1], rel=0.01)
    assert plain[-1] < 0.9 * plain[0]


def test_few_bits_by_policy_on_a_plain_mlp() -> None:
    model = gpt_neox().eval()
    expected_loss, expected = loss_and_gradients(model)
    policy = Policy(rules=(Rule(kind="mlp", treatment="fewbit4"),))
    applied = apply_to(model, policy)
    (first, *_) = [row for row in applied.rows if row.kind == "mlp"]
    assert first.treatment == "fewbit4"
    assert not first.exact
    # The plain MLP saves GELU's input and output (fp32, 256 features): the input becomes 4 bits.
    assert first.plain_bytes - first.saved_bytes == pytest.approx(256 * 4 - 256 / 2, rel=0.05)
    loss, got = loss_and_gradients(model)
    assert torch.equal(loss, expected_loss)
    assert 1e-4 < error(got, expected) < 0.1
    copy.deepcopy(model)
    revert(model)
    loss, got = loss_and_gradients(model)
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_few_bits_compact_and_int8_add_up() -> None:
    model = gpt_neox().eval()
    expected_loss, expected = loss_and_gradients(model)
    fewbit, compact = apply_fewbit(model, 4), apply_compact(model, density=0.5)
    blocks = compress_blocks(model)
    assert sum(isinstance(module, FewBitActivation) for module in model.modules()) == 2
    loss = model(IDS, labels=IDS).loss
    assert torch.equal(loss.detach(), expected_loss)
    model.zero_grad()
    loss.backward()
    assert len(compressed_grads(model.parameters())) == 8
    densify_grads(model.parameters())
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and parameter.grad is not None:  # biases and norms
            scale = expected[name].norm()
            assert float((parameter.grad - expected[name]).norm()) < 0.15 * float(scale) + 1e-6
    for handle in (blocks, compact, fewbit):
        handle.undo()
    _, got = loss_and_gradients(model)
    assert all(torch.equal(got[key], expected[key]) for key in expected)


def test_gradient_scaling_skips_a_step_that_overflows() -> None:
    model = llama()
    undo = apply_int8(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.inf
    scaler.scale(model(IDS, labels=IDS).loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**15
    changed = [n for (n, p), b in zip(model.named_parameters(), before, strict=True) if not torch.equal(p, b)]
    assert changed == ["model.layers.0.mlp.up_proj.weight"]  # where infinity was put
    undo()


def test_blocks_must_be_there() -> None:
    with pytest.raises(ValueError, match=r"no torch\.nn\.ModuleList"):
        compress_blocks(nn.Linear(2, 2))
    single: Any = nn.Linear(2, 2)
    compress_blocks(single, blocks=[single]).undo()
