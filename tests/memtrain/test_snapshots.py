"""Snapshots beside training, from a recipe's words to a run that was killed and taken up again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import memtrain
from memtrain.offload.async_snapshot import AsyncCheckpointer, snapshot_bytes
from memtrain.offload.atomic import CheckpointError
from memtrain.offload.snapshot import load_checkpoint, save_checkpoint
from memtrain.planner.actions import Tier
from memtrain.recipe import RecipeError, parse_recipe
from memtrain.refusals import PrepareError
from memtrain.snapshots import MEMORY_BYTES, RunSnapshots
from tests.memtrain.sessions import EVERYTHING_AWAY, MACHINE, tokens
from tests.memtrain.test_coding import RECIPE, coding_machine
from tests.memtrain.test_coding import build as build_kind
from tests.offload.async_runs import assert_same_folders


def prepare(kind: str, folder: Path, schedule: str, **arguments: Any) -> memtrain.Session:
    model, optimizer, masters = build_kind(kind)
    return memtrain.prepare(
        model,
        optimizer,
        (tokens(0),),
        budget=arguments.pop("budget", memtrain.Budget(device="3GiB", nvme=f"{folder}:1GiB")),
        micro_batches=2,
        master_weights=masters,
        options=memtrain.PlannerOptions(force=EVERYTHING_AWAY, update_schedule=schedule),
        **{"machine": MACHINE, **arguments},
    )


def train(session: memtrain.Session, steps: range, after: Any = lambda step: None) -> list[float]:
    losses = []
    for step in steps:
        for micro in range(2):
            loss = session.model(tokens(2 * step + micro))
            (loss / 2).backward()
            losses.append(loss.item())
        losses.append(float(session.optimizer.clip_grad_norm_(0.5)))
        session.optimizer.step()
        session.optimizer.zero_grad()
        after(step)
    return losses


@pytest.mark.parametrize(
    ("kind", "schedule"),
    [("adamw", "ahead"), ("masters", "sequential"), ("galore", "ahead"), ("coded", "sequential")],
)
def test_sessions_with_all_state_on_disk(kind: str, schedule: str, tmp_path: Path) -> None:
    """Every step's snapshot is the synchronous checkpoint, training is as without, and it can be taken up."""
    codec: dict[str, Any] = {}
    if kind == "coded":
        pytest.importorskip("zstandard")
        codec, kind = {"codecs": {"nvme": "exponent"}, "machine": coding_machine()}, "adamw"
    with prepare(kind, tmp_path, schedule, **codec) as session:
        torch.manual_seed(1)

        def save(step: int) -> None:
            save_checkpoint(tmp_path / f"sync-{step}", session, progress={"step": step})

        losses = train(session, range(4), save)
        end = {name: value.clone() for name, value in session.model.state_dict().items()}
    spare = {Tier.NVME: 64 << 20}
    with prepare(kind, tmp_path, schedule, spare_state_bytes=sum(spare.values()), **codec) as session:
        torch.manual_seed(1)
        with AsyncCheckpointer(session, spare_bytes=spare) as snapshots:

            def begin(step: int) -> None:
                snapshots.save(tmp_path / f"async-{step}", progress={"step": step})

            assert train(session, range(4), begin) == losses
        assert all(torch.equal(end[name], value) for name, value in session.model.state_dict().items())
        for step in range(4):
            assert_same_folders(tmp_path / f"sync-{step}", tmp_path / f"async-{step}")
        size = sum(path.stat().st_size for path in (tmp_path / "sync-3").glob("*.safetensors"))
        assert size - 16384 < snapshot_bytes(session) <= size
        load_checkpoint(tmp_path / "async-1", session)
        assert train(session, range(2, 4)) == losses[6:]


def test_a_failed_snapshot_is_told_at_a_step_that_backward_has_begun(tmp_path: Path) -> None:
    """With updates in backward nothing is lost by it: the step is finished by asking for it again."""
    ends = []
    for fails in (False, True):
        model, optimizer, _ = build_kind("adamw")
        options = memtrain.PlannerOptions(force=EVERYTHING_AWAY, update_schedule="in_backward")
        budget = memtrain.Budget(device="3GiB", nvme=f"{tmp_path}:1GiB")
        with (
            memtrain.prepare(
                model, optimizer, (tokens(0),), budget=budget, options=options, machine=MACHINE
            ) as session,
            AsyncCheckpointer(session) as snapshots,
        ):
            for step in range(2):
                session.model(tokens(step)).backward()
                if fails and step == 1:
                    snapshots._error = CheckpointError("no room")
                    with pytest.raises(CheckpointError, match="no room"):
                        session.optimizer.step()
                session.optimizer.step()
                session.optimizer.zero_grad()
        ends.append(model.state_dict())
    plain, failed = ends
    assert all(torch.equal(plain[name], value) for name, value in failed.items())


def test_spares_are_room_beyond_the_plan(tmp_path: Path) -> None:
    with prepare("adamw", tmp_path, "ahead") as session:
        planned = session.plan.peak(Tier.NVME)
    enough = memtrain.Budget(device="3GiB", nvme=f"{tmp_path}:{planned + (8 << 20)}B")
    with prepare("adamw", tmp_path, "ahead", budget=enough, spare_state_bytes=8 << 20) as session:
        before = session.engine.statistics()[Tier.NVME].used_bytes
        with AsyncCheckpointer(session, spare_bytes={Tier.NVME: 8 << 20}) as snapshots:
            assert session.engine.statistics()[Tier.NVME].used_bytes > before
            train(session, range(2), lambda step: snapshots.save(tmp_path / "at", progress={}))
    short = memtrain.Budget(device="3GiB", nvme=f"{tmp_path}:{planned + (8 << 20) - 4096}B")
    with pytest.raises(PrepareError, match=r"8388608 bytes .* raise budget.nvme by 4096 bytes"):
        prepare("adamw", tmp_path, "ahead", budget=short, spare_state_bytes=8 << 20)


# -- the recipe --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"checkpoint": {"asynchronous": True}}, "asynchronous needs checkpoint.every"),
        ({"checkpoint": {"every": 2, "spare": "1MiB"}}, "spare is for snapshots beside training"),
        ({"checkpoint": {"hours_between_failures": 3}}, "hours_between_failures is for snapshots beside"),
        ({"checkpoint": {"hold_every": 2, "hours_between_failures": 0}}, "hours_between_failures"),
        (
            {"checkpoint": {"hold_every": 2, "spare": "1MiB"}, "budget": {"device": "1GiB"}},
            "checkpoint.spare is room on nvme",
        ),
    ],
)
def test_words_that_would_be_ignored_are_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe({**RECIPE, **sections})


def test_streamed_weights_and_coded_state_go_with_them() -> None:
    words = {
        "checkpoint": {"hold_every": 2, "spare": "1MiB"},
        "tiers": {"nvme": {"codec": "exponent"}},
        "model": {**RECIPE["model"], "streamed": True},
    }
    assert parse_recipe({**RECIPE, **words}).checkpoint.beside_training


def test_what_a_run_computes_does_not_depend_on_snapshots() -> None:
    plain = parse_recipe(RECIPE)
    words = {"every": 3, "asynchronous": True, "hold_every": 1, "spare": "1MiB", "hours_between_failures": 9}
    assert parse_recipe({**RECIPE, "checkpoint": words}).digest == plain.digest


def test_nothing_is_started_or_reserved_unasked(tmp_path: Path) -> None:
    snapshots = RunSnapshots(parse_recipe(RECIPE).checkpoint, tmp_path)
    assert (snapshots.wanted, snapshots.memory_bytes, snapshots.spare_bytes) == (False, 0, 0)
    assert snapshots.find_held() is None
    assert snapshots.attach(None, 0.0) == []  # type: ignore[arg-type]
    assert snapshots.lines(1.0) == []
    snapshots.wait()
    snapshots.close(finished=True)
    assert list(tmp_path.iterdir()) == []
    assert MEMORY_BYTES == 16 << 20
