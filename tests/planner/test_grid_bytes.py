"""Bytes of the grid optimizers: by hand, and to the byte what the optimizers themselves keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn

from memtrain.optim import FRUGAL, AdamW, AdamW8bit, Apollo, ApolloMini, Fira, GaLore, NaturalGaLore
from memtrain.optim.grid import GridOptimizer
from memtrain.optim.projection import Projection
from memtrain.optim.roles import PROJECTED, classify, param_groups
from memtrain.planner.grid_bytes import GridBytes, GridSettings, parameter_bytes
from memtrain.planner.grid_rule import NAMED, GridRule, named_settings
from memtrain.planner.optimizer_bytes import ParameterSpec, StateBytes, state_bytes
from memtrain.planner.refresh_bytes import projection_flops, refresh_workspace_bytes

RANK = 8


def test_galore_by_hand() -> None:
    settings = GridSettings(projection="power", rank=8)
    # [100, 40]: the 40 columns are shortened to 8. Two moments of 100 x 8, a basis of 40 x 8; a count of
    # updates of 4 bytes and the step of the next refresh of 8.
    assert parameter_bytes((100, 40), settings) == GridBytes(
        moments=2 * 800 * 4, projector=320 * 4, counters=12
    )
    # The other way round the basis has the shape of the rows.
    assert parameter_bytes((40, 100), settings).projector == 320 * 4
    # Three fused matrices of [40, 40] are projected each for itself.
    fused = parameter_bytes((120, 40), settings, split=3)
    assert fused == GridBytes(moments=2 * 3 * 320 * 4, projector=3 * 320 * 4, counters=12)
    # A vector is whole.
    assert parameter_bytes((100,), settings) == GridBytes(moments=800, counters=4)


def test_formats_and_masters_by_hand() -> None:
    # 5000 elements: two bytes each, and 40 scales of 4 bytes twice.
    assert parameter_bytes((50, 100), GridSettings(state_dtype="int8")).moments == 2 * (5000 + 160)
    assert parameter_bytes((50, 100), GridSettings(state_dtype="int4")).moments == 2 * (2500 + 160)
    assert parameter_bytes((50, 100), GridSettings(state_dtype="bf16")).moments == 2 * 10000
    assert parameter_bytes((4095,), GridSettings(state_dtype="int8")).moments == 2 * 4095 * 4
    split = GridSettings(master="split24")
    assert parameter_bytes((50, 100), split, element_bytes=2).master == 5000
    with pytest.raises(ValueError, match="split24 is for bf16"):
        parameter_bytes((50, 100), split, element_bytes=4)


def test_seeded_and_limited_by_hand() -> None:
    mini = named_settings("apollo-mini")
    # Rank one of [100, 40]: two moments of 100; a key of three words; the last norm of the update.
    assert parameter_bytes((100, 40), mini) == GridBytes(moments=800, projector=24, counters=4 + 8 + 4)
    # Two experts share the key and have a norm each.
    assert parameter_bytes((2, 100, 40), mini) == GridBytes(moments=1600, projector=24, counters=4 + 8 + 8)


def test_flops_by_hand() -> None:
    galore = GridSettings(projection="power", rank=8)
    # Two products of 2 x 100 x 40 x 8, and two more every ten steps.
    assert projection_flops((100, 40), galore, update_gap=10) == 2 * 64000 + 0.1 * 2 * 64000
    apollo = named_settings("apollo", rank=8)
    assert projection_flops((100, 40), apollo, update_gap=10) == 64000
    frugal = named_settings("frugal", rank=8, projection="columns")
    assert projection_flops((100, 40), frugal, update_gap=10) == 0


def test_what_no_optimizer_has_is_refused() -> None:
    with pytest.raises(ValueError, match="one of adamw-8bit, galore"):
        named_settings("gallore")
    with pytest.raises(ValueError, match="galore has no 'rnk'"):
        named_settings("galore", rnk=8)
    with pytest.raises(ValueError, match="power takes either rank or density, got rank=None"):
        named_settings("galore")
    with pytest.raises(ValueError, match="either rank or density"):
        named_settings("galore", rank=8, density=0.5)
    with pytest.raises(ValueError, match="rank 50 exceeds 40"):
        parameter_bytes((100, 40), named_settings("galore", rank=50))
    for wrong in (dict(side="left"), dict(basis_dtype="bf16")):
        with pytest.raises(ValueError, match="columns chooses its side itself and has no basis"):
            named_settings("galore", rank=8, projection="columns", **wrong)
    with pytest.raises(ValueError, match="gaussian follows no gradient: use svd"):
        named_settings("galore", rank=8, projection="gaussian", lazy=True)


# -- against the optimizers --------------------------------------------------------------------------------

_SIZES = dict(vocab_size=96, bos_token_id=1, eos_token_id=2)


def _llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        **_SIZES, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**_SIZES, n_embd=64, n_layer=1, n_head=4, n_positions=32)
    )


def _phi3() -> nn.Module:
    """Fused q, k, v and fused gate and up, by rows."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Phi3Config(
        **_SIZES, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        pad_token_id=0,
    )  # fmt: skip
    return transformers.Phi3ForCausalLM(config)


def _moe() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3MoeConfig(
        **_SIZES, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, head_dim=16,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


MODELS: dict[str, Callable[[], nn.Module]] = {"llama": _llama, "gpt2": _gpt2, "phi3": _phi3, "moe": _moe}
CASES: dict[str, tuple[Callable[..., GridOptimizer], GridSettings, dict[str, Any], dict[str, Any]]] = {
    # the class, our formula's settings, arguments of the class, settings of the projected groups
    "adamw": (AdamW, GridSettings(), {}, {}),
    "adamw-8bit": (AdamW8bit, named_settings("adamw-8bit"), {}, {}),
    "adamw-int4-master": (
        AdamW, GridSettings(state_dtype="int4", master="fp32"), dict(state_dtype="int4", master="fp32"), {},
    ),
    "galore": (GaLore, named_settings("galore", rank=RANK), {}, dict(rank=RANK)),
    "galore-full-bf16": (
        GaLore,
        named_settings("galore", rank=RANK, side="full", basis_dtype="bf16", projection="eigh", lazy=True),
        dict(proj_type="full", basis_dtype="bf16", projection="eigh", lazy=True),
        dict(rank=RANK),
    ),
    "galore-8bit": (
        GaLore, named_settings("galore", rank=24, state_dtype="int8", projection="svd"),
        dict(state_dtype="int8", projection="svd"), dict(rank=24),
    ),
    "natural-galore": (
        NaturalGaLore, named_settings("natural-galore", rank=RANK, history=3), {}, dict(rank=RANK, history=3),
    ),
    "frugal": (FRUGAL, named_settings("frugal"), {}, dict(density=0.25)),
    "frugal-columns": (
        FRUGAL, named_settings("frugal", projection="columns"), {}, dict(projection="columns"),
    ),
    "frugal-rows": (FRUGAL, named_settings("frugal", projection="rows"), {}, dict(projection="rows")),
    "frugal-randk": (
        FRUGAL, named_settings("frugal", projection="randk", state_dtype="bf16"), dict(state_dtype="bf16"),
        dict(projection="randk"),
    ),
    "frugal-block": (FRUGAL, named_settings("frugal", projection="block"), {}, dict(projection="block")),
    "frugal-orthogonal": (
        FRUGAL, named_settings("frugal", projection="semi_orthogonal"), {},
        dict(projection="semi_orthogonal"),
    ),
    "fira": (Fira, named_settings("fira", rank=RANK), {}, dict(rank=RANK)),
    "apollo": (Apollo, named_settings("apollo", rank=RANK), {}, dict(rank=RANK)),
    "apollo-svd": (
        Apollo, named_settings("apollo", rank=RANK, projection="svd"), {}, dict(rank=RANK, proj="svd"),
    ),
    "apollo-mini": (ApolloMini, named_settings("apollo-mini"), {}, dict(rank=1)),
    "apollo-unlimited": (
        Apollo, named_settings("apollo", rank=RANK, limiter=False), dict(limiter=0.0), dict(rank=RANK),
    ),
    "adafactor": (
        GridOptimizer, GridSettings(rule="adafactor", projection="eigh", rank=RANK), dict(rule="adafactor"),
        dict(projection="eigh", rank=RANK),
    ),
    "adam-mini": (
        GridOptimizer, GridSettings(rule="adam_mini", projection="rademacher", rank=RANK, side="reverse_std"),
        dict(rule="adam_mini"), dict(projection="rademacher", rank=RANK, side="reverse_std"),
    ),
    "lion": (GridOptimizer, GridSettings(rule="lion"), dict(rule="lion"), {}),
    "momentum": (GridOptimizer, GridSettings(rule="momentum"), dict(rule="momentum"), {}),
}  # fmt: skip


def test_every_named_optimizer_is_compared() -> None:
    assert NAMED.keys() <= CASES.keys()


def _live_bytes(optimizer: GridOptimizer) -> int:
    """Of the tensors that are there after a step, each storage once."""
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    }
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_predicted_is_live_to_the_byte(case: str, model_name: str, dtype: torch.dtype) -> None:
    make, settings, arguments, projected = CASES[case]
    torch.manual_seed(0)
    model = MODELS[model_name]().to(dtype)
    roles = classify(model, rank=projected.get("rank"), project=PROJECTED if projected else ())
    optimizer = make(param_groups(model, roles, **projected), **arguments)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()

    rule = GridRule(
        value=case,
        settings=settings,
        projected={each.names[0]: each.split for each in roles if each.projected},
    )
    specs = [
        ParameterSpec(name=name, shape=tuple(p.shape), dtype=str(p.dtype), element_bytes=p.element_size())
        for name, p in model.named_parameters()
    ]
    found = state_bytes(specs, rule)
    weights = sum(p.nbytes for p in model.parameters())
    measured = optimizer.state_bytes()
    assert found == StateBytes(
        weights=weights,
        gradients=weights,
        moments=measured["moments"] + measured["projector"] + measured["counters"],
        masters=measured["master"],
    )
    assert found.moments + found.masters == _live_bytes(optimizer)


@hypothesis_settings(max_examples=200, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["svd", "eigh", "power", "gaussian", "semi_orthogonal", "columns", "block"]),
    side=st.sampled_from(["std", "reverse_std", "left", "right", "full"]),
    shape=st.tuples(st.integers(1, 3), st.integers(4, 40), st.integers(4, 40)),
    rank=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    basis_dtype=st.sampled_from(["fp32", "bf16"]),
    first=st.booleans(),
)
def test_the_workspace_of_a_refresh_is_the_projectors(
    kind: str,
    side: str,
    shape: tuple[int, int, int],
    rank: int,
    dtype: torch.dtype,
    basis_dtype: str,
    first: bool,
) -> None:
    side, basis_dtype = (side, basis_dtype) if kind not in ("columns", "block") else ("std", "fp32")
    chosen: dict[str, Any] = dict(rank=rank, side=side, basis_dtype=basis_dtype)
    projector = Projection(kind=kind, **chosen).bind(torch.Size(shape))  # type: ignore[arg-type]
    settings = GridSettings(projection=kind, **chosen)
    found = refresh_workspace_bytes(shape, settings, element_bytes=dtype.itemsize, first=first)
    assert found == projector.refresh_workspace(dtype, first=first).bytes
    assert parameter_bytes(shape, settings).projector == projector.size_bytes()
