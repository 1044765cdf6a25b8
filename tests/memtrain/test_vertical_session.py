"""``Session.accumulate`` under plans of both orders: bit-equal to plain PyTorch, as predicted, or refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import memtrain
from memtrain.offload.errors import PlanMismatchError
from memtrain.planner.actions import MicroBatchOrder
from memtrain.recipe import PlannerSection, RecipeError
from memtrain.report import plan_text
from memtrain.train import train
from tests.memtrain.tiny_runs import recipe_for
from tests.memtrain.vertical_sessions import COUNT, accumulated, data, plain, prepare, recipe
from tests.offload.streamed import llama


@pytest.mark.parametrize(
    ("tied", "schedule", "action", "state"),
    [
        (False, "sequential", "keep", "device"),
        (True, "ahead", "recompute", "nvme"),
        (False, "ahead", "swap", "nvme"),
        (True, "sequential", "recompute_nearly_free", "nvme"),
    ],
)
def test_trains_bit_for_bit_and_reads_what_was_predicted(
    tmp_path: Path, tied: bool, schedule: str, action: str, state: str
) -> None:
    losses, weights = plain(llama(tied=tied))
    model = llama(tied=tied)
    force = {
        "block": {"action": action},
        "state": {"weight_tier": "nvme", "optimizer_tier": state, "gradient_tier": state},
    }
    with prepare(model, tmp_path, schedule=schedule, force=force) as session:
        assert session.plan.micro_batch_order is MicroBatchOrder.VERTICAL
        assert "vertical micro-batches" in plan_text(session.plan)
        assert session.weights is not None
        assert accumulated(session) == losses
        before = session.weights.statistics().reads
        session.accumulate(data(0))
        session.optimizer.step()
        session.optimizer.zero_grad()
        session.accumulate(data(1))  # so that the update has had its turns, wherever they are
        reads = session.weights.statistics().reads - before
        predicted = sum(event.name.startswith("read weights") for event in session.plan.timeline)
        # Up to a read for each window is counted that does not happen (docs/plan.md).
        windows = sum(each.slots for each in session.plan.staging.weight_windows)
        assert 2 * (predicted - windows) <= reads <= 2 * predicted
        peaks = session.measure()
        assert peaks["peak_bytes"] == pytest.approx(peaks["predicted_peak_bytes"], rel=0.08)
    model = llama(tied=tied)
    with prepare(model, tmp_path, schedule=schedule, force=force) as session:
        accumulated(session)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_both_orders_and_a_loop_of_ones_own_under_either(tmp_path: Path) -> None:
    losses, _ = plain(llama())
    with prepare(llama(), tmp_path, "horizontal") as session:
        assert session.plan.held_passes == 1
        assert accumulated(session) == losses
        horizontal = session.plan
    with prepare(llama(), tmp_path) as session:
        for each, expected in zip(data(0), losses, strict=False):
            loss = session.model(**each).loss
            (loss / COUNT).backward()
            assert loss.item() == expected
        assert session.plan.bytes_moved_per_step < horizontal.bytes_moved_per_step


def test_under_autocast_and_with_a_chunked_loss(tmp_path: Path) -> None:
    found = []
    for order in ("horizontal", "vertical"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model = llama(tied=True)
            with prepare(model, tmp_path, order, chunked_loss=True) as session:
                losses = [loss.item() for loss in session.accumulate(data(0))]
                gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((losses, gradients))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_a_loss_of_ones_own(tmp_path: Path) -> None:
    def loss_fn(output: Any, each: Any) -> torch.Tensor:
        return output.logits.float().square().mean() + each["labels"].float().mean()

    model = llama()
    expected = []
    for each in data(0):
        loss = loss_fn(model(**each), each)
        (loss / COUNT).backward()
        expected.append(loss.item())
    wanted = [p.grad for p in model.parameters()]
    other = llama()
    with prepare(other, tmp_path, loss_fn=loss_fn) as session:
        assert [loss.item() for loss in session.accumulate(data(0), loss_fn)] == expected
    assert all(torch.equal(a, p.grad) for a, p in zip(wanted, other.parameters(), strict=True))


def test_what_accumulate_cannot_do_is_said(tmp_path: Path) -> None:
    with prepare(llama(), tmp_path) as session:
        with pytest.raises(ValueError, match="no batches"):
            session.accumulate([])
        with pytest.raises(ValueError, match="outside no_grad"), torch.no_grad():
            session.accumulate(data(0))
        with pytest.raises(PlanMismatchError, match="4 micro-batches were given, the plan has memory for 3"):
            session.accumulate(data(0, 4))
        session.accumulate(data(0, 2))  # the last step of an epoch
        session.optimizer.zero_grad()


# -- the trainer -------------------------------------------------------------------------------------


def test_a_recipe_trains_to_the_same_weights_wherever_they_are_and_in_either_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The trainer's AdamW is torch's fused one, which does not count its changes in the weights' versions."""
    options = PlannerSection.options
    found = {}
    for tier, order in (("device", "horizontal"), ("nvme", "horizontal"), ("nvme", "vertical")):
        force = {"state": {"weight_tier": tier}}
        changed = lambda section, force=force: dataclasses.replace(options(section), force=force)  # noqa: E731
        monkeypatch.setattr(PlannerSection, "options", changed)
        run = tmp_path / tier
        train(recipe(run, order))
        assert ("; vertical micro-batches" in capsys.readouterr().out) is (order == "vertical")
        plan = json.loads((run / order / "plan.json").read_text())["plan"]
        assert (plan["micro_batch_order"], plan["micro_batches"]) == (order, 3)
        weights = load_file(run / order / "checkpoint" / "step-000002" / "model.safetensors")
        lines = (run / order / "metrics.jsonl").read_text().splitlines()
        found[tier, order] = weights, [json.loads(line)["loss"] for line in lines]
    (expected, losses), *others = found.values()
    assert len(losses) == 2
    for values, found_losses in others:
        assert found_losses == losses
        assert values.keys() == expected.keys()
        assert all(torch.equal(values[name], value) for name, value in expected.items())


def test_a_recipe_with_nothing_to_order_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"micro_batch_order is vertical, training\.accumulation 1"):
        recipe_for(tmp_path, planner={"micro_batch_order": "vertical"}, training={"accumulation": 1})
    with pytest.raises(RecipeError, match=r"micro_batch_order is vertical, training\.allocator planned"):
        recipe_for(
            tmp_path,
            planner={"micro_batch_order": "vertical"},
            training={"accumulation": 2, "allocator": "planned"},
        )
    assert recipe(tmp_path, "auto").planner.options().micro_batch_order == "auto"
    assert recipe_for(tmp_path).planner.options().micro_batch_order == "auto"
    assert memtrain.PlannerOptions().micro_batch_order == "horizontal"


def test_planned_addresses_are_of_one_pass_at_a_time(tmp_path: Path) -> None:
    with prepare(llama(), tmp_path) as session:
        plan = session.plan
    for given in ({}, {"plan": plan, "order": "horizontal"}):
        with pytest.raises(memtrain.PrepareError, match=r"for one pass at a time\. Use allocator 'default'"):
            prepare(llama(), tmp_path, allocator="planned", **given)
    with prepare(llama(), tmp_path, "auto", allocator="planned") as session:
        assert session.plan.micro_batch_order is MicroBatchOrder.HORIZONTAL
