"""Updates during backward through ``prepare``: an ordinary loop that does not clip is bit-equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import memtrain
from memtrain.offload.errors import OffloadError, PlanMismatchError, UnsupportedGradientOperation
from memtrain.offload.in_backward import HalfDoneStepError
from memtrain.planner.actions import Tier, UpdateSchedule
from tests.memtrain.sessions import MACHINE, build, tokens


def loop(model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: int) -> list[float]:
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    found = []
    for step in range(4):
        for micro in range(micro_batches):
            loss = model(tokens(2 * step + micro))
            (loss / micro_batches).backward()
            found.append(loss.item())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return found


def prepare(model: Any, optimizer: Any, folder: Path, micro_batches: int = 1, **other: Any) -> Any:
    force = other.pop("force", {"state": {"optimizer_tier": "nvme", "gradient_tier": "device"}})
    options = {"force": force, "update_schedule": "in_backward", "time_limit_seconds": 2.0, **other}
    return memtrain.prepare(
        model,
        optimizer,
        (tokens(0),),
        budget=memtrain.Budget(device="3GiB", nvme=f"{folder}:1GiB"),
        micro_batches=micro_batches,
        options=memtrain.PlannerOptions(**options),
        machine=MACHINE,
    )


EVERYTHING_AWAY = {
    "block": {"action": "swap"},
    "state": {"gradient_tier": "nvme", "optimizer_tier": "nvme", "weight_tier": "nvme"},
}


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("where", ["state away", "everything away", "all on the device"])
def test_an_ordinary_loop_is_bit_equal(tmp_path: Path, where: str, micro_batches: int) -> None:
    plain, reference = build()
    expected = loop(plain, reference, micro_batches)
    model, optimizer = build()
    force: dict[str, Any] = {"state": {"optimizer_tier": "device", "gradient_tier": "device"}}
    if where != "all on the device":
        force = EVERYTHING_AWAY if where == "everything away" else {"state": {"optimizer_tier": "nvme"}}
    with prepare(model, optimizer, tmp_path, micro_batches, force=force) as session:
        assert session.plan.update_schedule is UpdateSchedule.IN_BACKWARD
        assert loop(session.model, session.optimizer, micro_batches) == expected
        assert "in_backward" in memtrain.report.plan_text(session.plan)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), model.parameters(), strict=True))
    assert not list(tmp_path.iterdir())


def test_gradients_of_one_unit_at_a_time_have_a_place(tmp_path: Path) -> None:
    """The slab is that of the largest unit, and nothing is left in it by a step."""
    sizes = {}
    for schedule in ("sequential", "in_backward"):
        with prepare(*build(), tmp_path, update_schedule=schedule) as session:
            sizes[schedule] = session.plan.staging.gradient_slab_bytes
            loop(session.model, session.optimizer, 1)
    # A table of 300 x 272 and its bias-free head, blocks of square layers: pages, and a page a parameter.
    assert 0 < sizes["in_backward"] < sizes["sequential"]
    units = 5  # prologue, three blocks, epilogue
    assert sizes["sequential"] <= units * sizes["in_backward"]


def test_nothing_reads_weights_of_two_steps(tmp_path: Path) -> None:
    model, optimizer = build()
    with prepare(model, optimizer, tmp_path) as session:
        session.model(tokens(0)).backward()
        with pytest.raises(UnsupportedGradientOperation, match="clip_grad_norm_"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for use in (lambda: model(tokens(1)), model.state_dict, session.flush, session.optimizer.state_dict):
            with pytest.raises(HalfDoneStepError, match="Call step\\(\\) first"):
                use()
        session.optimizer.step()
        session.optimizer.zero_grad()
        model(tokens(1)).backward()
        session.optimizer.step()


def test_closing_in_the_middle_of_a_step_is_named(tmp_path: Path) -> None:
    model, optimizer = build()
    session = prepare(model, optimizer, tmp_path)
    model(tokens(0)).backward()
    with pytest.raises(OffloadError, match="were updated during backward"):
        session.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("offered", [{"update_schedule": "in_backward"}, {"gradients_untouched": True}])
def test_a_look_at_gradients_is_refused_before_anything_is_measured(offered: dict[str, Any]) -> None:
    model, optimizer = build()
    with pytest.raises(PlanMismatchError, match="nonfinite='skip' looks at all gradients"):
        memtrain.prepare(
            model,
            optimizer,
            (tokens(0),),
            budget=memtrain.Budget(device="3GiB"),
            nonfinite="skip",
            options=memtrain.PlannerOptions(**offered),
            machine=MACHINE,
        )


def test_it_is_not_offered_unasked(tmp_path: Path) -> None:
    with prepare(*build(), tmp_path, update_schedule="auto") as session:
        assert session.plan.update_schedule is not UpdateSchedule.IN_BACKWARD
        assert {s.optimizer_tier for s in session.plan.states} == {Tier.NVME}
