"""``prepare`` with memtrain's own optimizers: planned by what they keep, bit-equal with all state on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import memtrain
from memtrain import preparing
from memtrain.offload.errors import PlanMismatchError
from memtrain.offload.snapshot import load_checkpoint, save_checkpoint
from memtrain.optim import FRUGAL, AdamW8bit, Apollo, GaLore, classify, param_groups
from memtrain.optimizers import measured_state_bytes
from memtrain.planner.decisions import state_extent_bytes
from tests.memtrain.sessions import EVERYTHING_AWAY, Net, loop, prepare

GAP = 4


def groups(model: nn.Module, rank: int | None = None) -> list[dict[str, Any]]:
    return param_groups(model, classify(model, rank=rank))


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "galore": lambda m: GaLore(groups(m, 16), lr=1e-2, rank=16, update_proj_gap=GAP),
    "galore 8-bit, in turns": lambda m: GaLore(
        groups(m, 16), lr=1e-2, rank=16, update_proj_gap=GAP, state_dtype="int8", spread=True
    ),
    "frugal columns": lambda m: FRUGAL(groups(m), lr=1e-2, projection="columns", update_gap=GAP),
    "apollo": lambda m: Apollo(groups(m, 16), lr=1e-2, rank=16, update_proj_gap=GAP),
    "adamw 8-bit": lambda m: AdamW8bit(m.parameters(), lr=1e-2),
}


def build(kind: str) -> tuple[Net, Any]:
    torch.manual_seed(0)
    model = Net()
    return model, OPTIMIZERS[kind](model)


@pytest.mark.parametrize(
    ("kind", "schedule"),
    [(kind, "ahead") for kind in OPTIMIZERS] + [("galore", "sequential"), ("adamw 8-bit", "sequential")],
)
def test_an_ordinary_loop_is_bit_equal(tmp_path: Path, kind: str, schedule: str) -> None:
    expected, optimizer = build(kind)
    torch.manual_seed(1)
    losses = loop(expected, optimizer)
    kept = measured_state_bytes(optimizer)

    model, optimizer = build(kind)
    options = memtrain.PlannerOptions(force=EVERYTHING_AWAY, update_schedule=schedule)
    with prepare(model, optimizer, tmp_path, options=options) as session:
        torch.manual_seed(1)
        assert loop(session.model, session.optimizer) == losses
        assert measured_state_bytes(session.optimizer) == kept
        assert session.profile.elementwise == (kind == "adamw 8-bit")
        # What the plan took for state is what is kept, but for counters and keys that stay in memory.
        planned = sum(unit.state_bytes for unit in session.profile.units)
        resident = sum(unit.resident_state_bytes for unit in session.profile.units)
        small = sum(p.nbytes for p in model.parameters() if p.numel() < 65536)
        counters = sum(
            value.nbytes
            for state in session.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor) and value.dim() == 0
        )
        assert planned + resident - small == kept - counters
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["galore", "adamw 8-bit"])
def test_a_checkpoint_within_a_refresh_period(tmp_path: Path, kind: str) -> None:
    """Written under one plan after three steps, loaded under another; a refresh comes before the sixth."""
    expected, optimizer = build(kind)
    torch.manual_seed(1)
    loop(expected, optimizer, steps=3)
    middle = torch.get_rng_state()
    loop(expected, optimizer, steps=3)

    model, optimizer = build(kind)
    with prepare(model, optimizer, tmp_path) as session:
        torch.manual_seed(1)
        loop(session.model, session.optimizer, steps=3)
        save_checkpoint(tmp_path / "saved", session, progress={"steps": 3})

    model, optimizer = build(kind)
    staying = {"block": {"action": "keep"}, "state": {"gradient_tier": "device", "optimizer_tier": "device"}}
    options = memtrain.PlannerOptions(force=staying)
    with prepare(model, optimizer, tmp_path, options=options) as session:
        assert load_checkpoint(tmp_path / "saved", session) == {"steps": 3}
        assert {group["step"] for group in session.optimizer.param_groups} == {3}
        for group in session.optimizer.param_groups:
            group["lr"] = group["initial_lr"]  # the second loop has a scheduler of its own
        torch.set_rng_state(middle)
        loop(session.model, session.optimizer, steps=3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in OPTIMIZERS if kind != "adamw 8-bit"])
def test_the_update_ring_is_what_shards_fill_to_the_byte(tmp_path: Path, kind: str, master: bool) -> None:
    torch.manual_seed(0)
    model = Net().to(torch.bfloat16 if master else torch.float32)
    options = memtrain.PlannerOptions(force=EVERYTHING_AWAY)
    optimizer = OPTIMIZERS[kind](model)
    with prepare(model, optimizer, tmp_path, options=options, master_weights=master) as session:
        staging, profile = session.plan.staging, session.profile
        layouts = [each for shard, each in session.optimizer.layout.shards.items() if not shard.small]
        assert staging.update_slot_bytes == max(each.slot_bytes for each in layouts)
        ring = session.optimizer._updates.ring_bytes
        assert ring == staging.update_slots * staging.update_slot_bytes
        records = sum(each.record_bytes for each in layouts)
        assert records == sum(state_extent_bytes(profile, unit) for unit in profile.units)
        assert records == sum(update.record_bytes for unit in profile.units for update in unit.updates)


def test_each_parameter_has_the_seconds_and_temporaries_of_its_kind(tmp_path: Path) -> None:
    """A table that is updated whole does not take the products of what is projected."""
    model, optimizer = build("galore")
    with prepare(model, optimizer, tmp_path) as session:
        profile = session.profile
        table, matrix = profile.units[0].updates[0], profile.units[1].updates[0]
        assert table.elements == model.table.weight.numel()
        assert table.refresh_bytes == 0 < matrix.refresh_bytes
        assert table.workspace_bytes == 0
        rates = [unit.update_seconds / sum(u.elements for u in unit.updates) for unit in profile.units[:2]]
        assert rates[0] != rates[1]


def test_the_update_ring_follows_the_largest_parameter(tmp_path: Path) -> None:
    """The table keeps two whole moments; what is projected must not be planned as if it did."""
    model, optimizer = build("galore")
    with prepare(model, optimizer, tmp_path) as session:
        block = next(unit for unit in session.profile.units if unit.block == 0)
        # Two matrices of 272 x 272: moments and basis of 272 x 16 in fp32.
        assert block.state_bytes == 2 * 3 * 272 * 16 * 4
        assert session.profile.state_bytes_per_element == 8.0


class _Stop(Exception):
    pass


def test_kernels_are_compiled_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only for an optimizer that has some."""

    def stop(*_: Any, **__: Any) -> None:
        raise _Stop

    def measured(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was measured first")

    monkeypatch.setattr(preparing.native, "compile_missing", stop)
    monkeypatch.setattr(preparing, "profile_model", measured)
    model, optimizer = build("adamw 8-bit")
    with pytest.raises(_Stop):
        prepare(model, optimizer, tmp_path)
    with pytest.raises(AssertionError, match="measured first"):
        prepare(model, torch.optim.AdamW(model.parameters()), tmp_path)


def test_a_parameter_that_the_optimizer_does_not_have_is_named(tmp_path: Path) -> None:
    model, _ = build("galore")
    left_out = max(model.named_parameters(), key=lambda named: named[1].numel())[0]
    members = [p for name, p in model.named_parameters() if name != left_out]
    with pytest.raises(PlanMismatchError, match=f"{left_out} needs a gradient but is in no parameter group"):
        prepare(model, GaLore([{"params": members}], lr=1e-2, rank=16), tmp_path)
