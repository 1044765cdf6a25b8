"""Sessions whose update's slots lie where the passes had activations and transfers: bits, bytes, and loops
that hold on to a graph."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import memtrain
from memtrain.offload.errors import OffloadError
from memtrain.offload.overlaid_slab import OverlaidSlab, OverlayWarning
from memtrain.planner.actions import Tier
from memtrain.session import Session
from tests.memtrain.sessions import MACHINE, build, large
from tests.memtrain.streamed_sessions import batch, optimizer_for
from tests.memtrain.vertical_sessions import COUNT, accumulated, plain
from tests.offload.streamed import llama

STEPS = 4
KEEP = {"action": "keep"}
SWAP = {"action": "swap", "saved_tier": "nvme"}
RECOMPUTE = {"action": "recompute", "input_tier": "nvme"}
AWAY, STAYS = "nvme", "device"


def loop(model: nn.Module, optimizer: torch.optim.Optimizer, micro_batches: int = 1) -> list[float]:
    found = []
    for step in range(STEPS):
        for micro in range(micro_batches):
            loss = model(large(micro_batches * step + micro))
            (loss / micro_batches).backward()
            found.append(loss.item())
        found.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return found


def trained(micro_batches: int = 1) -> tuple[list[float], dict[str, torch.Tensor]]:
    model, optimizer = build()
    torch.manual_seed(1)
    return loop(model, optimizer, micro_batches), model.state_dict()


def prepared(
    folder: Path, block: dict[str, Any], gradients: str = STAYS, *, overlay: bool = True, **arguments: Any
) -> Session:
    model, optimizer = build()
    state = {"gradient_tier": gradients, "optimizer_tier": "nvme"}
    return memtrain.prepare(
        model,
        optimizer,
        (large(0),),
        budget=memtrain.Budget(device="3GiB", nvme=f"{folder}:1GiB"),
        options=memtrain.PlannerOptions(
            force={"block": block, "state": state}, overlay=overlay, update_schedule="sequential"
        ),
        machine=MACHINE,
        **arguments,
    )


def slab_of(session: Session) -> OverlaidSlab:
    shared = session._activations.overlaid
    assert shared is not None
    return shared


def billed(session: Session, *categories: str) -> int:
    return sum(
        line.size_bytes
        for line in session.plan.bill
        if line.tier is Tier.DEVICE and line.category in categories
    )


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("gradients", [STAYS, AWAY])
@pytest.mark.parametrize("block", [KEEP, SWAP, RECOMPUTE], ids=["keep", "swap", "recompute"])
def test_bits_and_bytes(tmp_path: Path, block: dict[str, Any], gradients: str, micro_batches: int) -> None:
    losses, weights = trained(micro_batches)
    with prepared(tmp_path, block, gradients, micro_batches=micro_batches) as session:
        staging = session.plan.staging
        left = staging.pass_ring_bytes + staging.kept_slab_bytes - staging.overlaid_bytes
        assert staging.update_overlaid_bytes == min(staging.update_ring_bytes, left) > 0
        shared = slab_of(session)
        apart = 0 if shared.has_gradients else staging.gradient_slab_bytes
        planned = billed(session, "staging", "activations", "gradients")
        assert planned == shared.slab.nbytes + apart
        assert staging.coded == ()
        torch.manual_seed(1)
        assert loop(session.model, session.optimizer, micro_batches) == losses
        held = {mark.name: mark.slots_held for mark in session.high_water()}
        assert held["update"] > 1
    assert all(torch.equal(value, weights[name]) for name, value in session.model.state_dict().items())


def test_it_takes_so_much_less_on_the_bill(tmp_path: Path) -> None:
    peaks = []
    for overlay in (False, True):
        with prepared(tmp_path, SWAP, AWAY, overlay=overlay) as session:
            peaks.append(session.plan.peak(Tier.DEVICE) - billed(session, "slack", "libraries"))
            shared_bytes = session.plan.staging.update_overlaid_bytes
    assert peaks[0] - peaks[1] == shared_bytes > 0


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Session]:
    with prepared(tmp_path, KEEP) as session:
        torch.manual_seed(1)
        yield session


def test_a_graph_that_is_held_keeps_its_memory_and_is_told_of(kept: Session) -> None:
    plain, plain_optimizer = build()
    torch.manual_seed(1)

    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        model(large(0)).backward()
        held = model(large(1))  # its backward is never to come
        optimizer.step()
        found = [held.item()]
        del held
        optimizer.zero_grad()
        model(large(2)).backward()
        optimizer.step()
        optimizer.zero_grad()
        return [*found, model(large(3)).item()]

    expected = run(plain, plain_optimizer)
    torch.manual_seed(1)
    with pytest.warns(OverlayWarning, match="a graph is still held") as told:
        assert run(kept.model, kept.optimizer) == expected
    assert len(told) == 1
    assert kept.optimizer._updates._pipeline._ring is kept.optimizer._updates._slots.ring  # type: ignore[union-attr]


def test_a_graph_whose_tensors_are_on_a_tier_goes_there(tmp_path: Path) -> None:
    """It is walked a second time behind the update, of weights that no product of it needs."""
    with prepared(tmp_path, SWAP) as session:
        model = session.model
        torch.manual_seed(1)
        loss = model(large(0))
        loss.backward(retain_graph=True)
        first = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        with torch.no_grad():
            before = [p.clone() for p in model.parameters()]
        for group in session.optimizer.param_groups:
            group["lr"] = 0.0
            group["weight_decay"] = 0.0
        session.optimizer.step()
        assert all(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))
        session.optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            if name in first:
                assert torch.equal(first[name], parameter.grad), name  # type: ignore[arg-type]


def test_state_that_is_being_read_keeps_its_slot(kept: Session) -> None:
    loop(kept.model, kept.optimizer)
    reading = kept.optimizer.iter_state()
    next(reading)
    with pytest.warns(OverlayWarning, match="state is being read"):
        kept.model(large(0)).backward()
    kept.optimizer.zero_grad()
    reading.close()  # type: ignore[attr-defined]
    assert not kept.optimizer._updates._slots.ring.in_use()  # type: ignore[union-attr]


def test_a_ring_of_the_passes_says_who_has_its_memory(tmp_path: Path) -> None:
    with prepared(tmp_path, SWAP) as session:
        loop(session.model, session.optimizer)
        reading = session.optimizer.iter_state()
        next(reading)
        with pytest.raises(OffloadError, match="iter_state"):
            session.model(large(0))
        reading.close()  # type: ignore[attr-defined]
        session.model(large(0)).backward()


def test_state_is_read_while_a_graph_is_there(kept: Session) -> None:
    loop(kept.model, kept.optimizer)
    plain = {(name, key): value.clone() for name, key, value in kept.optimizer.iter_state()}
    held = kept.model(large(0))
    with pytest.warns(OverlayWarning, match="a graph is still held"):
        found = {(name, key): value.clone() for name, key, value in kept.optimizer.iter_state()}
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[key], plain[key]) for key in plain)
    held.backward()


@pytest.mark.parametrize("action", ["keep", "swap"])
def test_in_vertical_order_too(tmp_path: Path, action: str) -> None:
    losses, weights = plain(llama(tied=True))
    model = llama(tied=True)
    state = {"weight_tier": "nvme", "optimizer_tier": "nvme", "gradient_tier": "device"}
    with memtrain.prepare(
        model,
        optimizer_for(model),
        batch(0),
        budget=memtrain.Budget(device="3GiB", nvme=f"{tmp_path}:256MiB"),
        machine=MACHINE,
        options=memtrain.PlannerOptions(
            force={"block": {"action": action}, "state": state},
            update_schedule="sequential",
            micro_batch_order="vertical",
            overlay=True,
        ),
        micro_batches=COUNT,
        chunked_loss=False,
    ) as session:
        staging = session.plan.staging
        assert (staging.overlaid_bytes, staging.update_overlaid_bytes > 0) == (0, True)
        assert accumulated(session) == losses
    assert all(torch.equal(value, weights[name]) for name, value in session.model.state_dict().items())


@pytest.mark.parametrize(
    ("allocator", "overlay", "shares"),
    [("planned", None, True), ("planned", False, False), ("default", None, False), ("default", True, True)],
)
def test_what_the_caller_says_is_not_overridden(
    tmp_path: Path, allocator: str, overlay: bool | None, shares: bool
) -> None:
    model, optimizer = build()
    with memtrain.prepare(
        model,
        optimizer,
        (large(0),),
        budget=memtrain.Budget(device="3GiB", nvme=f"{tmp_path}:1GiB"),
        machine=MACHINE,
        options=memtrain.PlannerOptions(
            force={"block": KEEP, "state": {"optimizer_tier": "nvme"}},
            overlay=overlay,
            update_schedule="sequential",
        ),
        allocator=allocator,
    ) as session:
        staging = session.plan.staging
        assert (staging.overlaid_bytes > 0, staging.update_overlaid_bytes > 0) == (shares, shares)
