"""``prepare`` end to end: an ordinary loop is bit-equal to plain PyTorch, and ``close`` leaves no trace."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import memtrain
from memtrain.copy_guard import PlannedModelCopyError
from memtrain.offload.device import CpuDevice
from memtrain.offload.errors import OffloadError, PlanMismatchError
from memtrain.offload.optimizer import NonFiniteGradientError
from memtrain.planner import resident
from memtrain.planner.actions import Tier
from tests.memtrain.sessions import EVERYTHING_AWAY, Block, Net, build, loop, prepare, tokens


@pytest.fixture
def plain() -> tuple[list[Any], dict[str, torch.Tensor]]:
    model, optimizer = build()
    torch.manual_seed(1)
    found = loop(model, optimizer)
    return found, model.state_dict()


@pytest.mark.parametrize("schedule", ["sequential", "ahead"])
def test_an_ordinary_loop_is_bit_equal(
    tmp_path: Path, plain: tuple[list[Any], dict[str, torch.Tensor]], schedule: str
) -> None:
    model, optimizer = build()
    options = memtrain.PlannerOptions(force=EVERYTHING_AWAY, update_schedule=schedule)
    with prepare(model, optimizer, tmp_path, options=options) as session:
        torch.manual_seed(1)
        assert loop(session.model, session.optimizer) == plain[0]
        found = session.measure()
        assert found["steps"] == 5
        assert "predicted" in session.report()
        assert session.optimizer.refused_one_pass() == {
            "fused=True was not asked for": sum(1 for _ in model.parameters())
        }
        assert "own code instead of in one pass: fused=True was not asked for" in session.report()
        marks = {mark.name: mark for mark in session.high_water()}
        assert {"gradient", "update"} <= marks.keys()
        for name, mark in marks.items():
            assert 1 <= mark.slots_held <= mark.slots
            assert 1 <= mark.bytes_used <= mark.slot_bytes
            assert f"staging {name}: {mark.slots_held} of {mark.slots} slots held at once" in session.report()
    assert all(torch.equal(value, plain[1][name]) for name, value in model.state_dict().items())
    assert not list(tmp_path.iterdir())


def loop_of_two(models: list[nn.Module], optimizers: list[torch.optim.Optimizer]) -> None:
    """Forward, backward and updates of two models are mixed."""
    torch.manual_seed(1)
    for step in range(3):
        for micro in range(2):
            losses = [model(tokens(2 * step + micro)) for model in models]
            for loss in reversed(losses):
                (loss / 2).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_two_sessions_at_once_are_bit_equal(tmp_path: Path) -> None:
    plain, ours = [build() for _ in range(2)], [build() for _ in range(2)]
    loop_of_two([model for model, _ in plain], [optimizer for _, optimizer in plain])
    options = memtrain.PlannerOptions(force=EVERYTHING_AWAY, update_schedule="ahead")
    with (
        prepare(*ours[0], tmp_path, options=options) as one,
        prepare(*ours[1], tmp_path, options=options) as other,
    ):
        loop_of_two([one.model, other.model], [one.optimizer, other.optimizer])
    for (model, _), (expected, _) in zip(ours, plain, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters(), strict=True))
    assert not list(tmp_path.iterdir())


def autocast_loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    found = []
    for step in range(3):
        for micro in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(tokens(2 * step + micro))
            (loss / 2).backward()
            found.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize("action", [{"action": "keep"}, EVERYTHING_AWAY["block"]])
def test_autocast_is_planned_for_inside_it_and_refused_with_that_remedy(
    tmp_path: Path, action: dict[str, str]
) -> None:
    model, optimizer = build()
    torch.manual_seed(1)
    plain = autocast_loop(model, optimizer)
    options = memtrain.PlannerOptions(force={**EVERYTHING_AWAY, "block": action})

    other, optimizer = build()
    with (
        prepare(other, optimizer, tmp_path, options=options) as session,
        pytest.raises(PlanMismatchError, match=r"inside the same torch\.autocast"),
    ):
        autocast_loop(session.model, session.optimizer)

    twin, optimizer = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        session = prepare(twin, optimizer, tmp_path, options=options)
    with session:
        torch.manual_seed(1)
        assert autocast_loop(session.model, session.optimizer) == plain
    assert all(torch.equal(p, q) for p, q in zip(twin.parameters(), model.parameters(), strict=True))


def test_weights_read_by_name_wait_for_the_update(tmp_path: Path) -> None:
    model, optimizer = build()
    before = model.layers[2].two.weight.detach().clone()
    options = memtrain.PlannerOptions(force=EVERYTHING_AWAY, update_schedule="ahead")
    with prepare(model, optimizer, tmp_path, options=options) as session:
        model(tokens(0)).backward()
        session.optimizer.step()
        held = model.layers[2].two.weight
        assert torch.equal(held, before)  # pending, and nobody has asked
        by_name = dict(model.named_parameters())["layers.2.two.weight"]
        assert not torch.equal(by_name, before)


def pending(folder: Path) -> tuple[Net, memtrain.Session]:
    """A session whose update waits for the next forward."""
    model, optimizer = build()
    options = memtrain.PlannerOptions(force=EVERYTHING_AWAY, update_schedule="ahead")
    session = prepare(model, optimizer, folder, options=options)
    model(tokens(0)).backward()
    session.optimizer.step()
    session.optimizer.zero_grad()
    return model, session


def test_a_part_read_by_name_waits_for_the_update(tmp_path: Path) -> None:
    model, session = pending(tmp_path)
    before = build()[0].layers[1].state_dict()
    with session:
        saved = model.layers[1].state_dict()
        assert not any(torch.equal(saved[name], before[name]) for name in ("one.weight", "two.weight"))
        assert torch.equal(model.layers[2].two.weight, build()[0].layers[2].two.weight)  # still pending


def test_loaded_weights_are_not_updated_by_an_older_step(tmp_path: Path) -> None:
    model, session = pending(tmp_path)
    best = {name: torch.full_like(value, 0.5) for name, value in build()[0].state_dict().items()}
    with session:
        model.load_state_dict(best)
        session.flush()
        assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())


def test_another_device_is_refused(tmp_path: Path) -> None:
    model, _ = build()
    model = model.to("meta")
    with pytest.raises(ValueError, match="are on meta: memtrain trains on the CPU or on one CUDA device"):
        prepare(model, torch.optim.AdamW(model.parameters()), tmp_path)


def test_a_failure_while_installing_leaves_plain_pytorch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = build()

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("memtrain.session.ActivationExecutor.install", fail)
    with pytest.raises(ZeroDivisionError):
        prepare(model, optimizer, tmp_path)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert not list(tmp_path.iterdir())


def test_close_leaves_plain_pytorch(tmp_path: Path) -> None:
    model, optimizer = build()
    session = prepare(model, optimizer, tmp_path)
    model(tokens(0)).backward()
    session.close()
    session.close()
    assert "forward" not in model.layers[0].__dict__
    assert "named_parameters" not in model.__dict__
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    gradients = [p.grad for p in model.parameters()]
    assert all(type(gradient) is torch.Tensor for gradient in gradients)
    loop(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=1)


def test_a_copy_of_a_planned_model_is_refused_and_one_of_a_closed_session_is_plain(tmp_path: Path) -> None:
    model, optimizer = build()
    session = prepare(model, optimizer, tmp_path)
    for part in (model, model.layers[1], model.head, nn.ModuleList([model])):
        with pytest.raises(PlannedModelCopyError, match=r"before memtrain\.prepare\(\)"):
            copy.deepcopy(part)
    session.close()
    twin = copy.deepcopy(model).eval()
    assert torch.equal(twin(tokens(1)), model.eval()(tokens(1)))


def test_preparing_twice_is_refused_until_the_first_session_is_closed(tmp_path: Path) -> None:
    model, optimizer = build()
    with prepare(model, optimizer, tmp_path) as session:
        for again in (optimizer, session.optimizer):
            with pytest.raises(memtrain.PrepareError, match=r"close it with session\.close"):
                prepare(model, again, tmp_path)
    prepare(model, optimizer, tmp_path).close()


def test_a_graph_that_outlives_the_session_says_so(tmp_path: Path) -> None:
    model, optimizer = build()
    with prepare(model, optimizer, tmp_path):
        loss = model(tokens(0))
    with pytest.raises(OffloadError, match="session was closed"):
        loss.backward()


def test_an_error_in_the_loop_is_not_hidden_by_closing(tmp_path: Path) -> None:
    model, optimizer = build()
    session = prepare(model, optimizer, tmp_path)

    def fail() -> None:
        with session:
            loss = model(tokens(0))
            loss.item() / 0

    with pytest.raises(ZeroDivisionError):
        fail()


def test_infeasible_budget_says_what_is_short(tmp_path: Path) -> None:
    model, optimizer = build()
    budget = memtrain.Budget(device="64MiB", nvme=f"{tmp_path}:1GiB")
    with pytest.raises(memtrain.InfeasibleError, match="device by") as caught:
        prepare(model, optimizer, tmp_path, budget=budget)
    assert dict(caught.value.plan.shortfall_bytes)[Tier.DEVICE] > 0
    assert caught.value.plan.remedies
    assert "forward" not in model.layers[0].__dict__


def test_what_the_job_has_reached_before_counts_where_the_caller_says_so(tmp_path: Path) -> None:
    model, optimizer = build()
    with pytest.raises(memtrain.InfeasibleError) as caught:
        prepare(model, optimizer, tmp_path, reached_bytes=(3 << 30) + 5)
    assert caught.value.plan.shortfall_bytes == ((Tier.DEVICE, 5),)
    assert "loading and measuring the model took 3.000 GiB" in str(caught.value)
    assert "forward" not in model.layers[0].__dict__


class MarkedDevice(CpuDevice):
    """Its peak is 7 GiB, of somebody else's work, until it is set back, if that is permitted."""

    def __init__(self, *, permitted: bool) -> None:
        self.mark_bytes, self.permitted = 7 << 30, permitted

    def take(self, nbytes: int) -> None:
        self.mark_bytes = max(self.mark_bytes, nbytes)

    def peak_bytes(self) -> int:
        return self.mark_bytes

    def reset_peak(self) -> bool:
        self.mark_bytes *= not self.permitted
        return self.permitted


@pytest.mark.parametrize(
    ("permitted", "taken_bytes", "known_bytes"),
    [(True, 2 << 30, 2 << 30), (True, 4 << 30, 4 << 30), (False, 4 << 30, 0), (False, 8 << 30, 8 << 30)],
    ids=["inside", "over", "hidden by the older mark", "over, and above the older mark"],
)
def test_a_peak_of_preparing_refuses_and_an_older_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, permitted: bool, taken_bytes: int, known_bytes: int
) -> None:
    device = MarkedDevice(permitted=permitted)
    monkeypatch.setattr("memtrain.preparing.make_device", lambda name: device)
    model, optimizer = build()
    model.register_forward_pre_hook(lambda *_: device.take(taken_bytes))
    if known_bytes > 3 << 30:
        with pytest.raises(memtrain.InfeasibleError) as caught:
            prepare(model, optimizer, tmp_path)
        assert caught.value.plan.shortfall_bytes == ((Tier.DEVICE, known_bytes - (3 << 30)),)
    else:
        with prepare(model, optimizer, tmp_path) as session:
            assert session.profile.prepare_peak_bytes == known_bytes
            assert session.measure()["process_peak_bytes"] == 7 << 30


def test_what_preparing_takes_is_measured(tmp_path: Path) -> None:
    if not resident.reset_peak():
        pytest.skip("the peak may not be set back here")
    model, optimizer = build()
    with prepare(model, optimizer, tmp_path) as session:
        held = session.profile.baseline_bytes + session.profile.weight_bytes
        assert held <= session.profile.prepare_peak_bytes <= resident.peak_bytes() + (1 << 30)


def test_a_plan_for_another_model_is_refused(tmp_path: Path) -> None:
    model, optimizer = build()
    with prepare(model, optimizer, tmp_path) as session:
        plan = session.plan
    torch.manual_seed(0)
    other = Net()
    other.layers.append(Block())
    with pytest.raises(PlanMismatchError, match="does not hold"):
        prepare(other, torch.optim.AdamW(other.parameters()), tmp_path, plan=plan)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite_gradients_raise_when_told_to(tmp_path: Path, value: float) -> None:
    model, optimizer = build()
    with prepare(model, optimizer, tmp_path, nonfinite="raise") as session:
        (model(tokens(0)) * value).backward()
        with pytest.raises(NonFiniteGradientError):
            session.optimizer.step()


def test_own_gradient_checkpointing_is_refused(tmp_path: Path) -> None:
    model, optimizer = build()
    model.layers[0].gradient_checkpointing = True
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        prepare(model, optimizer, tmp_path)
