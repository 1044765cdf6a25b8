"""Sessions whose gradients come to lie where activations were: bit-equal, and what loops may do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import memtrain
from memtrain.offload.activations import OverlayWarning
from memtrain.planner.actions import Tier
from memtrain.session import Session
from tests.memtrain.sessions import MACHINE, build, large, tokens

STEPS = 6
Loop = Callable[[nn.Module, torch.optim.Optimizer], list[float]]


def loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    found = []
    for step in range(STEPS):
        loss = model(large(step))
        loss.backward()
        found.append(loss.item())
        found.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return found


def late(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """Gradients of the step before are let go of between forward and backward."""
    found = []
    for step in range(STEPS):
        loss = model(large(step))
        optimizer.zero_grad()
        loss.backward()
        found.append(loss.item())
        optimizer.step()
    return found


def two_graphs(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """One of them is walked when the gradients of the other are there."""
    found = []
    for step in range(STEPS):
        losses = [model(large(step)), model(large(step + 50))]
        for loss in losses:
            loss.backward()
            found.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return found


def trained(run: Loop) -> tuple[list[float], dict[str, torch.Tensor]]:
    model, optimizer = build()
    torch.manual_seed(1)
    return run(model, optimizer), model.state_dict()


def overlaid(folder: Path, block: dict[str, Any], **options: Any) -> Session:
    model, optimizer = build()
    state = {"gradient_tier": "device", "optimizer_tier": options.pop("state", "device")}
    return memtrain.prepare(
        model,
        optimizer,
        (large(0),),
        budget=memtrain.Budget(device="3GiB", nvme=f"{folder}:1GiB"),
        options=memtrain.PlannerOptions(force={"block": block, "state": state}, overlay=True, **options),
        machine=MACHINE,
    )


KEEP = {"action": "keep"}
RECOMPUTE = {"action": "recompute", "input_tier": "device"}


@pytest.mark.parametrize("schedule", ["sequential", "ahead"])
@pytest.mark.parametrize("block", [KEEP, RECOMPUTE], ids=["keep", "recompute"])
def test_an_ordinary_loop_is_bit_equal_and_all_has_its_place(
    tmp_path: Path, block: dict[str, Any], schedule: str
) -> None:
    losses, weights = trained(loop)
    with overlaid(tmp_path, block, state="nvme", update_schedule=schedule) as session:
        plan = session.plan
        assert plan.staging.overlaid_bytes > 0
        shared = session._activations.overlaid
        assert shared is not None
        slabs = plan.staging.kept_slab_bytes + plan.staging.gradient_slab_bytes
        update = plan.staging.update_ring_bytes - plan.staging.update_overlaid_bytes
        inside_too = schedule == "sequential"
        assert shared.slab.nbytes == slabs - plan.staging.overlaid_bytes + update * inside_too
        assert (plan.staging.update_overlaid_bytes > 0) == inside_too
        inside = range(shared.slab.address, shared.slab.address + shared.slab.nbytes)
        outside: list[int] = []

        def look(parameter: torch.Tensor) -> None:
            if parameter.numel() >= 65536 and parameter.grad is not None:
                outside.append(parameter.grad.data_ptr() not in inside)

        hooks = [p.register_post_accumulate_grad_hook(look) for p in session.model.parameters()]
        torch.manual_seed(1)
        assert loop(session.model, session.optimizer) == losses
        assert len(outside) == STEPS * 8  # the table, the head, two of each of three blocks
        assert not any(outside)
        kept = [mark for mark in session.high_water() if mark.name == "kept"]
        assert sum(mark.slots_held for mark in kept) == 3
        for hook in hooks:
            hook.remove()
    assert all(torch.equal(value, weights[name]) for name, value in session.model.state_dict().items())


@pytest.mark.parametrize(("run", "warns"), [(late, True), (two_graphs, False)])
def test_what_other_loops_do_is_right_and_told(tmp_path: Path, run: Loop, warns: bool) -> None:
    losses, weights = trained(run)
    with overlaid(tmp_path, KEEP) as session:
        torch.manual_seed(1)
        told = pytest.warns(OverlayWarning, match="zero_grad") if warns else contextlib.nullcontext()
        with told:
            assert run(session.model, session.optimizer) == losses
    assert all(torch.equal(value, weights[name]) for name, value in session.model.state_dict().items())


def test_gradients_that_are_zeroed_in_place_are_told_of(tmp_path: Path) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        found = []
        for step in range(3):
            loss = model(large(step))
            loss.backward()
            found.append(loss.item())
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        return found

    losses, _ = trained(run)
    with overlaid(tmp_path, KEEP) as session:
        torch.manual_seed(1)
        with pytest.warns(OverlayWarning, match="zero_grad"):
            assert run(session.model, session.optimizer) == losses


def test_a_planned_allocator_asks_for_it_and_the_default_one_does_not(tmp_path: Path) -> None:
    sizes = {}
    for allocator in ("planned", "default"):
        model, optimizer = build()
        with memtrain.prepare(
            model, optimizer, (large(0),), budget=memtrain.Budget(device="3GiB"), machine=MACHINE,
            options=memtrain.PlannerOptions(force={"block": KEEP}), allocator=allocator,
        ) as session:  # fmt: skip
            sizes[allocator] = (session.plan.staging.overlaid_bytes, session.plan.peak(Tier.DEVICE))
    assert sizes["planned"][0] > 0
    assert sizes["default"][0] == 0


def test_small_batches_leave_places_empty(tmp_path: Path) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        found = []
        for step in range(3):
            loss = model(tokens(step))
            loss.backward()
            found.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        return found

    losses, _ = trained(run)
    with overlaid(tmp_path, KEEP) as session:
        torch.manual_seed(1)
        assert run(session.model, session.optimizer) == losses
