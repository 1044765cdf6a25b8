"""``prepare`` under plans that stream weights: bit-equal to plain PyTorch, inside the bill, as predicted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from memtrain.offload.errors import PlanMismatchError, WeightAwayError
from memtrain.offload.parameters import ParameterStreamer
from memtrain.offload.weight_units import StreamedUnit
from memtrain.planner.actions import Tier
from memtrain.report import plan_text
from tests.memtrain.streamed_sessions import STEPS, loop, plain, prepare
from tests.offload.streamed import DEPTH, STREAMED, llama


@pytest.mark.parametrize(
    ("tied", "schedule", "action", "state"),
    [
        (False, "sequential", "keep", "device"),
        (True, "ahead", "recompute", "nvme"),
        (False, "ahead", "swap", "nvme"),
    ],
)
def test_streamed_weights_train_bit_for_bit(
    tmp_path: Path, tied: bool, schedule: str, action: str, state: str
) -> None:
    losses, weights = plain(llama(tied=tied))
    model = llama(tied=tied)
    force = {
        "block": {"action": action},
        "state": {"weight_tier": "nvme", "optimizer_tier": state, "gradient_tier": state},
    }
    session = prepare(model, tmp_path, force, schedule)
    staging = session.plan.staging
    streamer = session.weights
    assert isinstance(streamer, ParameterStreamer)
    # With a tied table the epilogue has nothing but a norm, which is small and stays.
    assert streamer.streamed == (STREAMED[:-1] if tied else STREAMED)
    assert streamer.windows == staging.weight_windows
    first = staging.weight_windows[0]
    assert f"{len(streamer.streamed)} on nvme, through {first.slots} windows of" in plan_text(session.plan)
    with pytest.raises(WeightAwayError):
        model.model.layers[0].mlp.up_proj.weight.sum()  # type: ignore[union-attr]
    written_before = streamer.statistics().bytes_written  # as they left
    torch.manual_seed(1)
    assert loop(session.model, session.optimizer) == losses
    session.flush()
    streamer.flush()
    found = streamer.statistics()
    assert found.peak_in_use == found.windows == sum(each.slots for each in staging.weight_windows)
    assert f"streamed through {first.slots} windows of" in session.report()
    # Each unit is written once a step.
    once = sum(u.movable_weight_bytes for u in session.profile.units)
    assert found.bytes_written - written_before == STEPS * once
    peaks = session.measure()
    # The libraries are most of it: what is predicted of the rest is within a few MiB.
    assert peaks["peak_bytes"] == pytest.approx(peaks["predicted_peak_bytes"], rel=0.08)
    session.close()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_frozen_weights_are_never_written(tmp_path: Path) -> None:
    def frozen() -> nn.Module:
        model = llama()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("norm" in name or name.startswith("model.layers.3."))
        return model

    losses, weights = plain(frozen())
    model = frozen()
    with prepare(model, tmp_path, {"state": {"weight_tier": "nvme"}, "block": {"action": "keep"}}) as session:
        written = [unit.written_extent_bytes > 0 for unit in session.profile.units]
        assert written == [False] * DEPTH + [True, False]
        streamer = session.weights
        assert streamer is not None
        before = streamer.statistics().bytes_written
        torch.manual_seed(1)
        assert loop(session.model, session.optimizer) == losses
        session.flush()
        streamer.flush()
        moved = streamer.statistics().bytes_written - before
        assert moved == STEPS * session.profile.units[DEPTH].movable_weight_bytes
        # A norm is trained in every block: updating it does not bring the block's weights.
        for unit in streamer.streamed[2:]:
            streamer.fetch(unit)
        reads = streamer.statistics().reads
        with streamer.updating("model.layers.0", ()):
            assert streamer.statistics().reads == reads
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_where_all_weights_stay_nothing_is_installed(tmp_path: Path) -> None:
    with prepare(llama(), tmp_path, {"block": {"action": "keep"}}) as session:
        assert session.weights is None
        assert {state.weight_tier for state in session.plan.states} == {Tier.DEVICE}
        assert "weights" not in session.report()


@pytest.mark.parametrize("schedule", ["sequential", "ahead"])
def test_a_table_has_a_window_of_its_own_and_memory_is_what_is_planned(tmp_path: Path, schedule: str) -> None:
    """Of 4096 words: a table of 4 MiB, blocks of little more than 2."""
    losses, weights = plain(llama(tied=True, vocabulary=4096))
    model = llama(tied=True, vocabulary=4096)
    force = {"block": {"action": "keep"}, "state": {"weight_tier": "nvme"}}
    session = prepare(model, tmp_path, force, schedule)
    small, large = session.plan.staging.weight_windows
    sizes = {unit.name: unit.weight_extent_bytes for unit in session.profile.units}
    assert (small.slot_bytes, large.slot_bytes) == (sizes["model.layers.0"], sizes["prologue"])
    assert large.slots == 1
    assert isinstance(session.weights, ParameterStreamer)
    held = session.weights.fill_windows()
    billed = [line.size_bytes for line in session.plan.bill if line.category == "weight windows"]
    assert [held] == billed == [small.slots * small.slot_bytes + large.slot_bytes]
    torch.manual_seed(1)
    assert loop(session.model, session.optimizer) == losses
    marks = {mark.name: mark for mark in session.high_water()}
    for name, each in (("weights", small), ("large weights", large)):
        assert marks[name].bytes_used == marks[name].slot_bytes == each.slot_bytes
        assert marks[name].slots_held == marks[name].slots == each.slots
    assert "staging large weights: 1 of 1 slots held at once, 4.00 of 4.00 MiB" in session.report()
    session.close()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_plan_with_other_windows_is_refused_and_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setattr(StreamedUnit, "nbytes", property(lambda self: 4096))
    with pytest.raises(PlanMismatchError, match=r"windows of \d+ bytes for weights, this model needs 4096"):
        prepare(model, tmp_path, {"block": {"action": "keep"}, "state": {"weight_tier": "nvme"}})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
