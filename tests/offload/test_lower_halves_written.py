"""Weights that somebody writes between steps: refused, or said to count; and what a failure leaves undone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from memtrain.offload import lower_halves
from memtrain.offload.async_snapshot import AsyncCheckpointer
from memtrain.offload.errors import ExtentStateError, OffloadError, PlanMismatchError
from memtrain.offload.in_backward import HalfDoneStepError
from memtrain.offload.lower_halves import WeightsWrittenError
from memtrain.offload.optimizer_state import StaleStateError
from memtrain.offload.snapshot import load_checkpoint, save_checkpoint
from memtrain.optim.kernels import fused_adamw
from memtrain.optim.kernels.fused_adamw import same_bits
from memtrain.planner.actions import Tier, UpdateSchedule
from tests.offload.lower_half_runs import LARGE, PLANS, fused_run
from tests.offload.snapshot_runs import assert_same, states
from tests.offload.training import STAGING, batches, make_plan

WRITTEN = r"of first.weight were written.*call weights_written\(\).*split_masters=False"
pytestmark = pytest.mark.skipif(
    not fused_adamw.agrees(), reason="this build of torch rounds in another order, or there is no compiler"
)


def test_weights_that_were_swapped_out_and_back_lose_nothing() -> None:
    data = batches(4)
    with fused_run(PLANS["ahead"]) as run, fused_run(split_masters=False) as reference:
        reference.train(data)
        run.train(data[:2])
        run.flush()
        weights = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        with torch.no_grad():
            for p in run.model.parameters():
                p.zero_()
            run.model.load_state_dict(weights, strict=False)
        run.train(data[2:])
        assert_same(run, reference)


@pytest.mark.parametrize("counted", [True, False])
def test_weights_that_were_written_are_refused_and_nothing_is_changed(counted: bool, tmp_path: Path) -> None:
    data = batches(3)
    with fused_run() as run, fused_run(split_masters=False) as reference:
        run.train(data[:2])
        reference.train(data)
        run.flush()
        weight = run.model.first.weight
        before = weight.detach().clone()
        with torch.no_grad():
            (weight if counted else weight.data)[5, 7].add_(1.0)

        def snapshot_beside() -> None:
            with AsyncCheckpointer(run) as snapshots:
                snapshots.save(tmp_path / "at", progress={})

        for use in (
            snapshot_beside,
            lambda: save_checkpoint(tmp_path / "at", run, progress={}),
            lambda: run.optimizer.read_state("first.weight", "master_weight"),
        ):
            with pytest.raises(WeightsWrittenError, match=WRITTEN):
                use()
        assert not (tmp_path / "at").exists()
        run.model(data[2]).backward()
        if counted:
            with pytest.raises(WeightsWrittenError, match=WRITTEN):
                run.optimizer.step()
            with torch.no_grad():
                weight.copy_(before)
            run.optimizer.zero_grad()
            run.train(data[2:])
            assert_same(run, reference)
            return
        with pytest.raises(WeightsWrittenError):  # found when its turn comes
            run.optimizer.step()
        with pytest.raises(OffloadError, match="Restore the last checkpoint"):
            run.optimizer.step()
        with pytest.raises(OffloadError):
            run.optimizer.read_state("embed.weight", "master_weight")


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("plan", PLANS)
def test_weights_that_are_said_to_count_are_the_masters(plan: str, counted: bool, tmp_path: Path) -> None:
    """All of a parameter of which one element was written, and nothing of any other."""
    data = batches(6)
    with fused_run(PLANS[plan]) as run, fused_run(split_masters=False) as reference:
        for one in (run, reference):
            one.train(data[:3])
            one.flush()
            weight = one.model.first.weight
            with torch.no_grad():
                (weight if counted else weight.data)[-1, -1] = -0.0
        entries = states(reference.optimizer)
        master = entries["first.weight", "master_weight"]
        assert not torch.equal(master, reference.model.first.weight.float())
        entries["first.weight", "master_weight"] = reference.model.first.weight.detach().float()
        reference.optimizer.load_state(entries, reference.optimizer.scalar_state())
        handle = run.optimizer.state_dict()["state"][1]["master_weight"]
        assert run.optimizer.weights_written() == ["first.weight"]
        with pytest.raises(StaleStateError):
            handle.materialize()
        found = states(run.optimizer)
        assert all(same_bits(found[place], tensor) for place, tensor in entries.items())
        assert run.optimizer.weights_written() == []
        folder = save_checkpoint(tmp_path / "at", run, progress={})
        run.train(data[3:])
        reference.train(data[3:])
        assert_same(run, reference)
        load_checkpoint(folder, run)
        run.train(data[3:])
        assert_same(run, reference)


def test_a_checkpoint_looks_at_weights_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with fused_run(PLANS["small shards"]) as run:
        run.train(batches(2))
        run.flush()
        weights = [p for name in LARGE - {"unused"} for _, p in run.optimizer.index.pieces[name]]
        looked_at: list[int] = []

        def digest(weight: torch.Tensor) -> bytes:
            looked_at.append(weight.data_ptr())
            return original(weight)

        original = lower_halves.digest
        monkeypatch.setattr(lower_halves, "digest", digest)
        save_checkpoint(tmp_path / "at", run, progress={})
        assert sorted(looked_at) == sorted(piece.weight().data_ptr() for piece in weights)


def test_what_is_said_to_count_may_be_named() -> None:
    with fused_run() as run:
        assert run.optimizer.weights_written() == []  # there is no state
        run.train(batches(2))
        run.flush()
        with torch.no_grad():
            run.model.first.weight.mul_(0.5)
            run.model.second.weight.mul_(0.5)
            run.model.second.bias.mul_(0.5)  # a whole master: it follows by itself
        with pytest.raises(PlanMismatchError, match=r"shape \(683, 101\) is none of the 6 parameters"):
            run.optimizer.weights_written([run.model.first.weight.detach()])
        found = run.optimizer.weights_written([run.model.second.weight, run.model.second.bias])
        assert found == ["second.weight"]
        run.model(batches(1)[0]).backward()
        with pytest.raises(WeightsWrittenError, match=WRITTEN):
            run.optimizer.step()
        assert run.optimizer.weights_written() == ["first.weight"]
        run.optimizer.step()


def test_a_step_that_was_refused_is_made_with_clipped_gradients() -> None:
    """Clipping leaves its factor with the gradient: it is to be there still when the step is made."""
    data = batches(3)
    found = []
    for refused in (False, True):
        with fused_run() as run:
            run.train(data[:2])
            run.flush()
            with torch.no_grad():
                run.model.first.weight.mul_(0.5)
            if not refused:
                run.optimizer.weights_written()
            run.model(data[2]).backward()
            assert run.optimizer.clip_grad_norm_(1e-3) > 1e-3
            if refused:
                with pytest.raises(WeightsWrittenError, match=WRITTEN):
                    run.optimizer.step()
                run.optimizer.weights_written()
            run.optimizer.step()
            run.flush()
            found.append({name: state.clone() for name, state in states(run.optimizer).items()})
    assert found[0].keys() == found[1].keys()
    assert all(same_bits(state, found[1][place]) for place, state in found[0].items())


def test_moments_that_cannot_be_read_are_not_taken_for_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading replaces a record whose last write failed; here its moments are to stay."""
    with fused_run() as run:
        run.train(batches(2))
        run.flush()
        with torch.no_grad():
            run.model.first.weight.mul_(0.5)

        def unreadable(shard: Any, slot: Any) -> Any:
            raise ExtentStateError("its last write failed")

        with monkeypatch.context() as patched:
            patched.setattr(run.optimizer.records, "read", unreadable)
            with pytest.raises(ExtentStateError):
                run.optimizer.weights_written()
        assert run.optimizer.weights_written() == ["first.weight"]
        assert states(run.optimizer)["first.weight", "exp_avg_sq"].all()


def test_what_a_failure_has_left_undone_is_done_when_it_is_said_again() -> None:
    """Two parameters of one record, which was not written when the second's weights could not be had."""
    staging = replace(STAGING, update_shard_elements=200_000, update_slot_bytes=16 << 20)
    with fused_run(make_plan(gradient_tier=Tier.DEVICE, staging=staging)) as run:
        unused, halves = run.model.unused, run.optimizer.records.halves
        run.model(batches(1)[0]).backward()
        unused.grad = torch.ones_like(unused)
        run.optimizer.step()
        run.optimizer.zero_grad()
        with torch.no_grad():
            unused.mul_(0.3)
            run.model.embed.weight.mul_(0.3)
        hold = halves._hold

        def failing(name: str) -> Any:
            if name == "embed.weight":
                raise OSError("the weights cannot be read")
            return hold(name)

        halves._hold = failing
        with pytest.raises(OSError, match="cannot be read"):
            run.optimizer.weights_written()
        halves._hold = hold
        assert run.optimizer.weights_written() == ["unused", "embed.weight"]
        master = states(run.optimizer)["unused", "master_weight"]
        assert same_bits(master, unused.detach().float())


def test_in_backward_they_are_refused_before_any_unit_is_updated() -> None:
    with fused_run(make_plan(UpdateSchedule.IN_BACKWARD)) as run:
        run.train(batches(2))
        weight = run.model.first.weight
        before = weight.detach().clone()
        with torch.no_grad():
            weight.zero_()
        with pytest.raises(WeightsWrittenError):
            run.train(batches(1))
        with torch.no_grad():
            weight.copy_(before)
        run.optimizer.zero_grad()
        run.train(batches(1))  # nothing was lost
        with torch.no_grad():
            weight.zero_()
        run.model(batches(1)[0])
        assert run.optimizer.weights_written() == ["first.weight"]
        run.model(batches(1)[0]).backward()
        with pytest.raises(HalfDoneStepError):
            run.optimizer.weights_written()
        run.optimizer.step()


def test_state_of_other_weights_follows_the_weights_that_are_there() -> None:
    """As whole masters do at the next step."""
    data = batches(4)
    with fused_run() as run, fused_run(split_masters=False) as reference:
        for one in (run, reference):
            one.train(data[:2])
            entries, scalars = states(one.optimizer), one.optimizer.scalar_state()
            with torch.no_grad():
                one.model.first.weight[3:9].mul_(0.5)
            one.optimizer.load_state(entries, scalars)
            one.train(data[2:])
        assert_same(run, reference)
