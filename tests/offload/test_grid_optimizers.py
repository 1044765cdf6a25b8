"""The optimizers of the grid under offload: bit for bit as without, on every tier and schedule."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn

from memtrain.offload.optimizer_probe import is_elementwise
from memtrain.optim import (
    FRUGAL,
    AdamW,
    AdamW8bit,
    Apollo,
    Fira,
    GaLore,
    NonFiniteGradientWarning,
    SmallGradients,
)
from memtrain.planner.actions import Tier, UpdateSchedule
from tests.offload.optimizer_runs import AHEAD, SEQUENTIAL, assert_equal_models, assert_equal_state, train
from tests.offload.training import batches, make_model, make_plan, open_engine, plain_run, trainable, wrap

GAP = 3
"""Steps from refresh to refresh: runs of five and eight steps cross one."""


def _groups(parameters: list[nn.Parameter], **projected: Any) -> list[dict[str, Any]]:
    """One parameter whole, the others projected; vectors are whole in any group."""
    return [{"params": parameters[:1], "projection": None}, {"params": parameters[1:], **projected}]


Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "galore": lambda p: GaLore(_groups(p, rank=8, update_proj_gap=GAP), lr=1e-2, weight_decay=0.1),
    "galore spread, 8-bit": lambda p: GaLore(
        _groups(p, rank=8, update_proj_gap=GAP, spread=True), lr=1e-2, state_dtype="int8"
    ),
    "galore seeded": lambda p: GaLore(_groups(p, rank=8, update_gap=GAP, projection="rademacher"), lr=1e-2),
    "frugal": lambda p: FRUGAL(_groups(p, density=0.25, update_gap=GAP), lr=1e-2),
    "frugal randk": lambda p: FRUGAL(
        _groups(p, density=0.1, update_gap=GAP, projection="randk"), lr=1e-2, state_dtype="bf16"
    ),
    "frugal block": lambda p: FRUGAL(_groups(p, update_gap=GAP, projection="block"), lr=1e-2),
    "fira": lambda p: Fira(_groups(p, rank=8, update_proj_gap=GAP), lr=1e-2),
    "apollo": lambda p: Apollo(_groups(p, rank=8, update_proj_gap=GAP), lr=1e-2),
    "adamw": lambda p: AdamW(p, lr=1e-2),
    "adamw 8-bit": lambda p: AdamW8bit(p, lr=1e-2),
    "adamw 4-bit": lambda p: AdamW(p, lr=1e-2, state_dtype="int4"),
}


@pytest.mark.parametrize(("kind", "schedule"), list(product(OPTIMIZERS, [SEQUENTIAL, AHEAD])))
def test_fp32_equals_plain_pytorch(kind: str, schedule: UpdateSchedule) -> None:
    make = OPTIMIZERS[kind]
    expected, plain, norms = plain_run(make, accumulate=2, max_norm=0.05)
    model = make_model()
    with open_engine() as engine:
        optimizer = wrap(model, make(trainable(model)), engine, make_plan(schedule))
        assert optimizer.layout.elementwise == kind.startswith("adamw")
        ours = train(
            model, optimizer, accumulate=2,
            clip=lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05),
        )  # fmt: skip
        assert torch.equal(torch.stack(ours), torch.stack(norms))
        assert_equal_models(model, expected)
        assert_equal_state(optimizer, model, plain)
        assert [g["step"] for g in optimizer.param_groups] == [g["step"] for g in plain.param_groups]
        optimizer.close()


@pytest.mark.parametrize("tiers", list(product([Tier.DEVICE, Tier.HOST], repeat=2)))
@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD])
@pytest.mark.parametrize("kind", ["galore", "frugal", "apollo", "adamw 8-bit"])
def test_every_pair_of_tiers_in_bf16(kind: str, schedule: UpdateSchedule, tiers: tuple[Tier, Tier]) -> None:
    """Weights of bf16 are rounded by random bits, which depend on the parameter's number and the step."""
    make = OPTIMIZERS[kind]
    expected, plain, _ = plain_run(make, steps=4, dtype=torch.bfloat16)
    model = make_model(torch.bfloat16)
    with open_engine() as engine:
        plan = make_plan(schedule, gradient_tier=tiers[0], optimizer_tier=tiers[1])
        optimizer = wrap(model, make(trainable(model)), engine, plan)
        train(model, optimizer, steps=4)
        assert_equal_models(model, expected)
        assert_equal_state(optimizer, model, plain)
        optimizer.close()


def test_masters_of_the_executor() -> None:
    """Masters in the records: the optimizer sees fp32 weights and gradients."""
    make = OPTIMIZERS["galore"]
    expected, plain, _ = plain_run(make, dtype=torch.bfloat16, master=True)
    model = make_model(torch.bfloat16)
    with open_engine() as engine:
        optimizer = wrap(model, make(trainable(model)), engine, master_weights=True)
        train(model, optimizer)
        assert_equal_models(model, expected)
        assert_equal_state(optimizer, model, plain)
        optimizer.close()


@pytest.mark.parametrize("kind", ["galore", "adamw 8-bit", "apollo"])
def test_resume_within_a_refresh_period(kind: str) -> None:
    """State and counters go from one wrapped optimizer, through a plain one, to another."""
    make = OPTIMIZERS[kind]
    expected, _, _ = plain_run(make, steps=4)
    model = make_model()
    data = batches(4)
    with open_engine() as engine:
        optimizer = wrap(model, make(trainable(model)), engine)
        _steps(model, optimizer, data[:2])
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.close()
    plain = make(trainable(model))
    plain.load_state_dict(saved)
    with open_engine() as engine:
        optimizer = wrap(model, plain, engine, make_plan(AHEAD))  # state is taken over
        _steps(model, optimizer, data[2:3])
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer.close()
        optimizer = wrap(model, make(trainable(model)), engine)
        optimizer.load_state_dict(saved)
        assert {group["step"] for group in optimizer.param_groups} == {3}
        _steps(model, optimizer, data[3:])
        optimizer.close()
    assert_equal_models(model, expected)


def _steps(model: nn.Module, optimizer: Any, data: list[torch.Tensor]) -> None:
    for batch in data:
        for unit in ("prologue", "block", "epilogue"):
            optimizer.ensure(unit)
        model(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.flush()


def test_a_skipped_refresh_is_counted_where_it_belongs() -> None:
    model = make_model()
    with open_engine() as engine:
        optimizer = wrap(model, OPTIMIZERS["galore"](trainable(model)), engine)
        before = [p.detach().clone() for p in model.parameters()]
        model(batches(1)[0]).backward()
        assert model.first.weight.grad is not None
        model.first.weight.grad = torch.full_like(model.first.weight, torch.nan)
        with pytest.warns(NonFiniteGradientWarning, match="not finite at its refresh"):
            optimizer.step()
        assert [group["skipped_refreshes"] for group in optimizer.param_groups] == [0, 1]
        changed = {
            name
            for (name, p), old in zip(model.named_parameters(), before, strict=True)
            if not torch.equal(p, old)
        }
        assert "first.weight" not in changed
        assert "second.weight" in changed
        optimizer.close()


@pytest.mark.parametrize(("kind", "dtype"), list(product(OPTIMIZERS, [torch.float32, torch.bfloat16])))
def test_only_what_is_elementwise_may_be_cut(kind: str, dtype: torch.dtype) -> None:
    """Blocks of quantised states span elements, and random bits depend on the place in the parameter."""
    optimizer = OPTIMIZERS[kind]([nn.Parameter(torch.ones(64, 32, dtype=dtype)) for _ in range(2)])
    found = is_elementwise(optimizer, optimizer.param_groups[-1], dtype)
    assert found is kind.startswith("adamw")
    assert optimizer.param_groups[-1]["step"] == 0


def test_gradients_that_are_compressed_on_their_way_are_refused() -> None:
    """Nothing is updated without a word because ``grad`` is None."""
    model = make_model()
    plain = GaLore(_groups(trainable(model), rank=8), lr=1e-2)
    with open_engine() as engine:
        small = SmallGradients(plain)
        optimizer = wrap(model, plain, engine, make_plan(gradient_tier=Tier.DEVICE))
        model(batches(1)[0]).backward()
        with pytest.raises(RuntimeError, match="SmallGradients keeps gradients"):
            optimizer.step()
        plain.zero_grad()  # drops what was compressed
        small.remove()
        optimizer.close()
