"""Sessions on planned addresses: bit-equal, as planned from the fourth step on, safe where a step differs."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import memtrain
from memtrain.arena import ArenaWarning, library, passes
from memtrain.arena.passes import PlannedPasses
from memtrain.optim.kernels import native
from memtrain.planner.actions import Tier
from memtrain.recipe import RecipeError, load_recipe
from tests.memtrain.sessions import EVERYTHING_AWAY, Net, build, prepare, tokens
from tests.memtrain.streamed_sessions import batch, optimizer_for
from tests.memtrain.streamed_sessions import prepare as prepare_streamed
from tests.offload.streamed import llama

STEPS = 7


def loop(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> list[float]:
    """Two micro-batches a step, clipping, an evaluation after each."""
    found = []
    for step in range(steps):
        for micro in range(2):
            loss = model(tokens(2 * step + micro))
            (loss / 2).backward()
            found.append(loss.item())
        found.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            found.append(model(tokens(99)).item())
    return found


def trained(run: Any = loop) -> tuple[list[float], dict[str, torch.Tensor]]:
    model, optimizer = build()
    torch.manual_seed(1)
    return run(model, optimizer), model.state_dict()


def equal(model: nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.fixture
def session(tmp_path: Path) -> Iterator[memtrain.Session]:
    with prepare(*build(), tmp_path, allocator="planned") as session:
        torch.manual_seed(1)
        yield session


def passes_of(session: memtrain.Session) -> PlannedPasses:
    assert session.passes is not None
    return session.passes


@pytest.mark.parametrize("schedule", ["sequential", "ahead"])
@pytest.mark.parametrize("action", ["keep", "swap", "recompute"])
def test_an_ordinary_loop_is_bit_equal_and_goes_as_planned(
    tmp_path: Path, schedule: str, action: str
) -> None:
    losses, weights = trained()
    force = {**EVERYTHING_AWAY, "block": {"action": action}}
    options = memtrain.PlannerOptions(force=force, update_schedule=schedule)
    model, optimizer = build()
    with prepare(model, optimizer, tmp_path, options=options, allocator="planned") as session:
        torch.manual_seed(1)
        assert loop(session.model, session.optimizer) == losses
        report = passes_of(session).report()
        assert report.deviations == ()
        # First and last micro-batch, update and evaluation: each once as it comes and twice recorded.
        assert (report.ordinary_steps, report.recorded_steps) == (4, 8)
        assert report.planned_steps == 4 * (STEPS - 3)
        assert 0 < report.load_bytes <= report.arena_bytes <= passes_of(session).most_bytes
        assert "passes and updates as planned" in session.report()
    assert equal(model, weights)


@pytest.mark.parametrize("action", ["keep", "swap", "recompute"])
def test_weights_may_be_streamed(tmp_path: Path, action: str) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        found = []
        for step in range(6):
            for micro in range(2):
                loss = model(**batch(2 * step + micro)).loss
                (loss / 2).backward()
                found.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        return found

    plain = llama(tied=True)
    losses = run(plain, optimizer_for(plain))
    state = {"weight_tier": "nvme", "optimizer_tier": "nvme", "gradient_tier": "nvme"}
    model = llama(tied=True)
    force = {"block": {"action": action}, "state": state}
    with prepare_streamed(model, tmp_path, force, "ahead", allocator="planned") as session:
        assert run(session.model, session.optimizer) == losses
        report = passes_of(session).report()
        assert report.deviations == ()
        assert report.planned_steps > 0
    assert equal(model, plain.state_dict())


def test_batches_of_several_shapes_have_plans_of_their_own(tmp_path: Path) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        found = []
        for step in range(12):
            for micro in range(2):
                loss = model(tokens(step)[: 2 + 2 * (step % 2), : 4 + 4 * micro])
                loss.backward()
                found.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        return found

    losses, weights = trained(run)
    model, optimizer = build()
    with prepare(model, optimizer, tmp_path, allocator="planned") as session:
        torch.manual_seed(1)
        assert run(session.model, session.optimizer) == losses
        report = passes_of(session).report()
        assert report.deviations == ()
        assert report.plans >= 5  # two shapes of two micro-batches, and the update
        assert report.planned_steps >= 3 * (12 - 6) - 1
    assert equal(model, weights)


def test_shapes_that_never_come_again_stay_ordinary(session: memtrain.Session) -> None:
    for length in range(1, passes.PATTERNS + 10):
        with torch.no_grad():
            session.model(torch.zeros(4, length, dtype=torch.int64))
    report = passes_of(session).report()
    assert (report.recorded_steps, report.planned_steps, report.arena_bytes) == (0, 0, 0)
    assert report.ordinary_steps == passes.PATTERNS + 9


def test_a_pass_that_deviates_is_told_once_by_block(
    session: memtrain.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop(session.model, session.optimizer, 4)
    model = session.model
    assert isinstance(model, Net)
    mixed = torch.dropout

    def other(hidden: torch.Tensor, share: float, training: bool) -> torch.Tensor:
        torch.empty(123_456, dtype=torch.uint8)
        return mixed(hidden, share, training)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "dropout", other)
        with pytest.warns(
            ArenaWarning, match=r"left its plan: request \d+ \((forward|backward) of layers"
        ) as told:
            loop(session.model, session.optimizer, 1)
    assert len(told) == 1
    before = passes_of(session).report()
    assert before.deviating_steps >= 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop(session.model, session.optimizer, 6)
    assert passes_of(session).report().planned_steps >= before.planned_steps + 4


def test_an_exception_in_mid_pass_teaches_nothing(
    session: memtrain.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop(session.model, session.optimizer, 5)
    before = passes_of(session).report()

    def fail(*_: Any) -> None:
        raise InterruptedError

    def interrupted() -> None:
        loss = session.model(tokens(0))
        loss.register_hook(fail)
        loss.backward()

    with monkeypatch.context() as patch:
        patch.setattr(torch, "dropout", fail)
        with pytest.raises(InterruptedError):
            interrupted()
    with pytest.raises(InterruptedError):
        interrupted()
    session.optimizer.zero_grad()
    gc.collect()
    passes_of(session)._done = 0  # the loop starts its step again
    loop(session.model, session.optimizer, 2)
    report = passes_of(session).report()
    assert report.deviations == ()
    assert report.planned_steps == before.planned_steps + 8
    assert report.ordinary_steps == before.ordinary_steps + 2


@pytest.mark.filterwarnings("ignore:a step of key:memtrain.arena.ArenaWarning")
def test_a_backward_of_two_passes_is_bit_equal(tmp_path: Path) -> None:
    def run(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
        found = []
        for step in range(5):
            first, second = model(tokens(step)), model(tokens(step + 1))
            (first + second).backward()
            found += [first.item(), second.item()]
            del first, second
            optimizer.step()
            optimizer.zero_grad()
        return [*found, *loop(model, optimizer)]

    losses, weights = trained(run)
    model, optimizer = build()
    with prepare(model, optimizer, tmp_path, allocator="planned") as session:
        torch.manual_seed(1)
        assert run(session.model, session.optimizer) == losses
    assert equal(model, weights)


def test_two_sessions_in_turn(tmp_path: Path) -> None:
    plain = [trained(), trained()]
    ours = [build(), build()]
    with (
        prepare(*ours[0], tmp_path, allocator="planned") as one,
        prepare(*ours[1], tmp_path, allocator="planned") as other,
    ):
        for session, (losses, _) in zip((one, other), plain, strict=True):
            torch.manual_seed(1)
            assert loop(session.model, session.optimizer) == losses
            assert passes_of(session).report().planned_steps > 0


def test_two_sessions_at_once_share_the_thread_with_a_warning(tmp_path: Path) -> None:
    def mixed(sessions: list[memtrain.Session]) -> None:
        for _ in range(5):
            losses = [session.model(tokens(0)) for session in sessions]
            for loss in losses:
                loss.backward()
            for session in sessions:
                session.optimizer.step()
                session.optimizer.zero_grad()

    ours = [build(), build()]
    with (
        prepare(*ours[0], tmp_path, allocator="planned") as one,
        prepare(*ours[1], tmp_path, allocator="planned") as other,
    ):
        message = "a pass has the ordinary allocator: another arena has an open step"
        with pytest.warns(ArenaWarning, match=message) as told:
            mixed([one, other])
        assert len(told) == 1


def test_a_forked_child_computes_as_ever(tmp_path: Path) -> None:
    options = memtrain.PlannerOptions(
        force={"state": {"gradient_tier": "device", "optimizer_tier": "device"}}
    )
    model, optimizer = build()
    with prepare(model, optimizer, tmp_path, options=options, allocator="planned") as session:
        losses = loop(session.model, session.optimizer)

        def evaluated() -> float:
            torch.manual_seed(5)
            with torch.no_grad():
                return float(session.model(tokens(3)))

        expected = evaluated()
        if (child := os.fork()) == 0:
            os._exit(int(evaluated() != expected))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        before = passes_of(session).report()
        assert len(loop(session.model, session.optimizer, 2)) == len(losses) * 2 // STEPS
        report = passes_of(session).report()
        assert (report.planned_steps, report.deviations) == (before.planned_steps + 8, ())


def test_close_gives_the_arena_back_and_leaves_no_hook(tmp_path: Path) -> None:
    model, optimizer = build()
    session = prepare(model, optimizer, tmp_path, allocator="planned")
    loop(session.model, session.optimizer, 5)
    held = passes_of(session)
    assert held.report().arena_bytes > 0
    session.close()
    assert held.report().arena_bytes == 0
    assert not any(hooks for m in model.modules() for hooks in (m._forward_pre_hooks, m._forward_hooks))
    loop(model, optimizer, 1)


def test_the_arena_is_within_the_bill(session: memtrain.Session) -> None:
    lines = {line.category: line.size_bytes for line in session.plan.bill if line.tier is Tier.DEVICE}
    assert passes_of(session).most_bytes == lines["transients"] + lines["slack"]


def test_steps_that_need_more_than_the_bill_has_stay_ordinary(session: memtrain.Session) -> None:
    held = passes_of(session)
    held._arena.settings = type(held._arena.settings)(most_bytes=4096, unrecorded_steps=1)
    with pytest.warns(ArenaWarning, match=r"need an arena of .* and it may take 4096"):
        loop(session.model, session.optimizer, 4)
    assert held.report().arena_bytes == 0


def test_without_a_compiler_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise FileNotFoundError("no C++ compiler")

    assert native.FAILURES
    monkeypatch.setattr(library, "load", fail)
    losses, _ = trained()
    model, optimizer = build()
    with pytest.warns(ArenaWarning, match=r"torch's own is used; install g\+\+ or set CXX"):
        session = prepare(model, optimizer, tmp_path, allocator="planned")
    with session:
        torch.manual_seed(1)
        assert loop(session.model, session.optimizer) == losses


def test_an_unknown_allocator_is_refused(tmp_path: Path) -> None:
    with pytest.raises(memtrain.PrepareError, match=r"allocator is 'best' .* give one of default, planned"):
        prepare(*build(), tmp_path, allocator="best")


def test_a_recipe_names_it_and_it_decides_no_number() -> None:
    path = Path(__file__).resolve().parents[2] / "recipes" / "tiny_llama_cpu.yaml"
    planned = load_recipe(path, ["training.allocator=planned"])
    assert planned.training.allocator == "planned"
    assert planned.digest == load_recipe(path).digest
    with pytest.raises(RecipeError, match=r"training\.allocator"):
        load_recipe(path, ["training.allocator=best"])
