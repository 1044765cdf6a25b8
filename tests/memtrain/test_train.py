"""The trainer's loop against one written by hand, its output, its resume and its exit codes.

A plain session (the model and a torch optimizer, nothing installed) stands in for ``prepare`` where the loop
itself is the subject; ``test_end_to_end`` has the real one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import memtrain
from memtrain import checkpoints
from memtrain import train as train_module
from memtrain.accumulation import accumulate
from memtrain.data import Tokens, Windows
from memtrain.draws import Draws
from memtrain.endurance import Written
from memtrain.offload.device import make_device
from memtrain.offload.engine import Engine
from memtrain.offload.errors import TierFullError
from memtrain.planner.actions import Tier
from memtrain.recipe import Recipe, ScheduleSection, parse_recipe
from memtrain.report import Summary
from memtrain.tiling import Cuts, cut
from memtrain.train import build_optimizer, learning_rate_factor, main
from memtrain.weights import load_model
from tests.memtrain.plans import feasible_plan, infeasible_plan
from tests.memtrain.tiny_runs import TINY, metrics, recipe_for, told_in_one_line
from tests.planner.toys import make_profile


class PlainWrites:
    """Two megabytes of state a step, of which all but a tenth had changed; half a megabyte of checkpoints."""

    def per_step(self) -> tuple[Written, ...]:
        return (Written(tier="nvme", content="optimizer state", written_bytes=2e6, changed_bytes=1.8e6),)

    def process_bytes_per_step(self) -> float:
        return 2.5e6


class PlainSession:
    """What the trainer uses of a session, over plain PyTorch."""

    def __init__(self, model: torch.nn.Module, optimizer: Any) -> None:
        self.model, self.optimizer = model, optimizer
        self.plan, self.profile = feasible_plan(), make_profile(3)
        device = make_device("cpu")
        self.engine = Engine({}, device)
        self.device_peak_bytes, self.device_used_bytes = device.peak_bytes, device.used_bytes
        self.closed = False
        self.measure = lambda: {"process_peak_bytes": device.peak_bytes()}
        self.writes = PlainWrites()
        self.passes = self.sparse_optimizer = None
        parameters = list(model.parameters())
        optimizer.clip_grad_norm_ = lambda norm: torch.nn.utils.clip_grad_norm_(parameters, norm)

    def accumulate(self, batches: Any) -> list[torch.Tensor]:
        place = torch.device("cpu")
        return accumulate(
            self.model,
            [],
            self.plan,
            batches,
            None,
            place,
            Draws(self.model, place, drawn=False),
            lambda: None,
        )

    def coding_lines(self) -> list[str]:
        return ["nvme: optimizer state coded"]

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[PlainSession, dict[str, Any]]]:
    """Sessions that the trainer asked for, with the keywords it asked with."""
    made: list[tuple[PlainSession, dict[str, Any]]] = []

    def prepare(model: torch.nn.Module, optimizer: Any, batch: Any, **keywords: Any) -> PlainSession:
        keywords["directory"].joinpath("plan.json").write_text(feasible_plan().to_json())
        session = PlainSession(model, optimizer)
        capacity = keywords["budget"].device_bytes
        session.plan = dataclasses.replace(session.plan, capacities=((Tier.DEVICE, capacity),))
        made.append((session, {**keywords, "batch": batch}))
        return session

    monkeypatch.setattr(memtrain, "prepare", prepare, raising=False)
    return made


@pytest.fixture(autouse=True)
def snapshots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints by torch.save beside the plain session: their format is tested where it is written."""
    if "prepared" not in request.fixturenames:
        return

    def save(folder: Path, session: PlainSession, *, progress: dict[str, Any]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        state = {"model": session.model.state_dict(), "optimizer": session.optimizer.state_dict()}
        torch.save(state, folder / "all.pt")
        (folder / "progress.json").write_text(json.dumps(progress))

    def load(folder: Path, session: PlainSession) -> dict[str, Any]:
        state = torch.load(folder / "all.pt")
        session.model.load_state_dict(state["model"])
        session.optimizer.load_state_dict(state["optimizer"])
        return dict(json.loads((folder / "progress.json").read_text()))

    def latest(folder: Path) -> Path | None:
        return max(folder.glob("step-*"), default=None)

    for name, fake in (("save", save), ("load", load), ("latest", latest)):
        monkeypatch.setattr(checkpoints, f"{name}_checkpoint", fake)


def by_hand(recipe: Recipe, steps: int) -> tuple[torch.nn.Module, list[float]]:
    """The same training as a plain loop; the schedule's factors come from the formula, written out."""
    torch.manual_seed(recipe.training.seed)
    model = load_model(recipe.model, torch.device("cpu"))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, fused=True
    )
    windows = Windows(Tokens(recipe.data.train), sequence_length=16, batch_size=2, seed=0)
    losses = []
    for step in range(steps):
        total = 0.0
        for micro in range(2):
            ids = torch.from_numpy(windows.batch(2 * step + micro))
            loss = model(input_ids=ids, labels=ids).loss
            (loss / 2).backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        factors = [0.5, 1.0, 0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2, 0.1]
        optimizer.param_groups[0]["lr"] = 1e-2 * factors[step]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / 2)
    return model, losses


def assert_same_weights(first: torch.nn.Module, second: torch.nn.Module) -> None:
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_loop_is_the_loop_that_one_would_write(tmp_path: Path, prepared: list[Any]) -> None:
    recipe = recipe_for(tmp_path)
    summary = train_module.train(recipe)
    model, losses = by_hand(recipe, 4)
    session, keywords = prepared[0]
    assert_same_weights(session.model, model)
    assert [line["loss"] for line in metrics(tmp_path)] == losses
    assert [line["learning_rate"] for line in metrics(tmp_path)] == pytest.approx(
        [5e-3, 1e-2, 5.5e-3, 1e-3], rel=1e-12
    )
    assert summary.heldout_loss_after < summary.heldout_loss_before
    assert session.closed
    assert (keywords["micro_batches"], keywords["nonfinite"], keywords["master_weights"]) == (
        2,
        "raise",
        False,
    )
    assert keywords["batch"]["input_ids"].shape == (2, 16)
    assert keywords["budget"].device_bytes == 4 << 30
    assert keywords["options"].exact_only


def test_the_planner_need_not_keep_to_what_is_exact(tmp_path: Path, prepared: list[Any]) -> None:
    train_module.train(recipe_for(tmp_path, planner={"exact_only": False}))
    assert not prepared[0][1]["options"].exact_only


def test_what_a_run_leaves_behind(tmp_path: Path, prepared: list[Any]) -> None:
    summary = train_module.train(recipe_for(tmp_path))
    assert Summary.read(tmp_path / "summary.json") == summary
    names = [phase.name for phase in summary.phases]
    assert names == ["load", "plan", "evaluate", "train", "evaluate", "save"]
    assert summary.steps == 4
    assert 0 < summary.measured_peak_bytes <= summary.process_peak_bytes
    rows = (tmp_path / "memory.csv").read_text().splitlines()
    assert rows[0] == "seconds,resident_bytes"
    assert len(rows) > 2
    assert (tmp_path / "recipe.yaml").read_text() == recipe_for(tmp_path).to_yaml()
    assert summary.checkpoint == str(tmp_path / "checkpoint" / "step-000004")


def test_a_budget_that_beginning_has_overrun_is_refused_and_tiles_are_to_be_kept(
    tmp_path: Path, prepared: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module.Trainer, "_process_peak_bytes", lambda self: (4 << 30) + 1)
    real = train_module.load_model

    def load_in_tiles(*arguments: Any) -> torch.nn.Module:
        model = real(*arguments)
        head = model.get_output_embeddings().weight
        cut(model, Cuts(rows={"lm_head": (64, len(head) - 64)}, automatic_bytes=3 << 20))
        return model

    with pytest.raises(memtrain.InfeasibleError) as raised:
        train_module.train(recipe_for(tmp_path))
    assert "model.tile" not in str(raised.value)
    monkeypatch.setattr(train_module, "load_model", load_in_tiles)
    with pytest.raises(memtrain.InfeasibleError, match=r"device at least 4\.\d+ GiB .* model\.tile: 3MiB"):
        train_module.train(recipe_for(tmp_path))


def test_a_resumed_run_equals_one_that_never_stopped(tmp_path: Path, prepared: list[Any]) -> None:
    checkpoint = {"every": 2, "keep": 2}
    train_module.train(recipe_for(tmp_path / "whole", checkpoint=checkpoint))
    train_module.train(recipe_for(tmp_path / "cut", checkpoint=checkpoint))
    folder = tmp_path / "cut" / "checkpoint"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000002", "step-000004"]
    (folder / "step-000004").rename(tmp_path / "lost")  # as if the run had been killed after step 2
    resumed = train_module.train(recipe_for(tmp_path / "cut", checkpoint=checkpoint))
    assert resumed.steps == 2
    assert_same_weights(prepared[0][0].model, prepared[2][0].model)
    assert [m["loss"] for m in metrics(tmp_path / "cut")] == [m["loss"] for m in metrics(tmp_path / "whole")]


def test_checkpoints_kept_and_let_go(tmp_path: Path, prepared: list[Any]) -> None:
    folder = tmp_path / "checkpoint"
    train_module.train(recipe_for(tmp_path, checkpoint={"every": 1, "keep": 2}))
    assert sorted(path.name for path in folder.iterdir()) == ["step-000003", "step-000004"]
    anew = {"every": 2, "keep": 1, "resume": "never"}
    train_module.train(recipe_for(tmp_path, training={"steps": 3}, checkpoint=anew))
    assert [path.name for path in folder.iterdir()] == ["step-000003"]


def test_a_checkpoint_of_another_run_is_not_taken_up_by_itself(
    tmp_path: Path, prepared: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(recipe_for(tmp_path / "o").to_yaml())
    assert main([str(path)]) == 0
    assert main([str(path), "optimizer.lr=1e-3", "training.steps=5"]) == 1
    assert "checkpoint.resume=never" in capsys.readouterr().err
    folder = tmp_path / "o" / "checkpoint" / "step-000004"
    assert folder.is_dir()
    assert main([str(path), "training.steps=5", f"checkpoint.resume={folder}"]) == 0
    assert main([str(path), "training.steps=2", f"checkpoint.resume={folder}"]) == 1
    assert main([str(path), "checkpoint.resume=nowhere"]) == 1
    assert "nowhere is not a checkpoint of a run" in capsys.readouterr().err


def test_a_finished_run_is_not_run_again(
    tmp_path: Path, prepared: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(recipe_for(tmp_path / "o").to_yaml())
    assert main([str(path)]) == 0
    written = (tmp_path / "o" / "summary.json").read_text()
    assert main([str(path)]) == 0
    assert "all 4 steps are done" in capsys.readouterr().out
    assert len(prepared) == 1
    assert (tmp_path / "o" / "summary.json").read_text() == written
    assert main([str(path), "checkpoint.resume=never"]) == 0
    assert len(prepared) == 2


def failing(error: Exception) -> Callable[..., Any]:
    def prepare(*_: Any, **__: Any) -> Any:
        raise error

    return prepare


def test_a_budget_that_cannot_work_exits_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = memtrain.InfeasibleError(infeasible_plan())  # type: ignore[attr-defined]
    monkeypatch.setattr(memtrain, "prepare", failing(error), raising=False)
    assert main([str(TINY), f"output.directory={tmp_path}"]) == 2
    told = capsys.readouterr().err
    assert "device: short by 123,456,789 bytes" in told
    assert "1. device=1.12GiB" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [([], "the following arguments are required: recipe"), ([str(TINY), "--bogus"], "--bogus")],
)
def test_usage_errors_exit_with_1(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 1
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("budget.host=1GiB", "budget.host is for machines with a GPU"),
        ("model.config.hidden_size=63", "hidden size (63) is not a multiple"),
        ("model.config.hidden_act=silly", "model.config: no model can be made of these values: KeyError"),
    ],
)
def test_what_cannot_be_had_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, told: str
) -> None:
    assert main([str(TINY), override, f"output.directory={tmp_path}"]) == 1
    assert told in told_in_one_line(capsys)


def test_a_run_file_that_cannot_be_written_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "recipe.yaml").symlink_to("/dev/full")
    assert main([str(TINY), f"output.directory={tmp_path}"]) == 1
    told = told_in_one_line(capsys)
    assert f"{tmp_path}/recipe.yaml cannot be written: No space left on device (errno 28). Free room" in told


def test_a_run_over_its_budget_before_step_0_exits_with_2(
    tmp_path: Path, prepared: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(recipe_for(tmp_path / "o", budget={"device": "16MiB"}).to_yaml())
    assert main([str(path)]) == 2
    told = capsys.readouterr()
    assert re.search(r"device: short by [0-9,]+ bytes \([0-9.]+ GiB\) of 0.016 GiB", told.err)
    assert re.search(r"device at least [0-9.]+ GiB instead of 0.016 GiB", told.err)
    assert "step 1/4" not in told.out
    session, keywords = prepared[0]
    assert session.closed
    # What loading took is handed on, so that the planner can say so at once.
    assert keywords["reached_bytes"] > 16 << 20


def test_a_tier_that_fails_exits_with_1_and_its_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memtrain, "prepare", failing(TierFullError("nvme is full")), raising=False)
    assert main([str(TINY), f"output.directory={tmp_path}"]) == 1
    assert capsys.readouterr().err == "error: nvme is full\n"


def test_more_than_one_process_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([str(TINY)]) == 1
    assert "WORLD_SIZE is 2: start it with --nproc-per-node 1" in capsys.readouterr().err


def test_what_prepare_refuses_exits_with_1_and_its_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = memtrain.PrepareError("the model's parameters are on cuda:0, cuda:1")
    monkeypatch.setattr(memtrain, "prepare", failing(error), raising=False)
    assert main([str(TINY), f"output.directory={tmp_path}"]) == 1
    assert capsys.readouterr().err == "error: the model's parameters are on cuda:0, cuda:1\n"


def test_cuda_in_vain_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert main([str(TINY), "training.device=cuda", f"output.directory={tmp_path}"]) == 1
    assert "torch finds no CUDA device" in capsys.readouterr().err


def test_tokens_beyond_the_models_vocabulary_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(TINY), "model.config.vocab_size=128", f"output.directory={tmp_path}"]) == 1
    assert "vocabulary of 256, the model's embedding 128" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.6, 0.2]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.6, 0.2]),  # three points of a cosine lie on the line
    ],
)
def test_the_learning_rate_of_each_step(name: Any, expected: list[float]) -> None:
    schedule = ScheduleSection(name=name, warmup_steps=2, final_fraction=0.2)
    assert [learning_rate_factor(schedule, step, 5) for step in range(5)] == pytest.approx(expected)


def test_a_cosine_between_its_ends() -> None:
    schedule = ScheduleSection(name="cosine")
    # A quarter of the way: (1 + cos 45 degrees) / 2.
    assert learning_rate_factor(schedule, 1, 5) == pytest.approx(0.8535533905932737)
    assert learning_rate_factor(schedule, 0, 1) == 1.0


def test_sgd_gets_its_own_options() -> None:
    recipe = recipe_for(Path("o"))
    data = json.loads(recipe.model_dump_json())
    data["optimizer"] = {"name": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "fused": False}
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    optimizer, roles = build_optimizer(parse_recipe(data), model)
    assert isinstance(optimizer, torch.optim.SGD)
    assert roles == []
    group = optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["weight_decay"], group["fused"]) == (0.1, 0.9, 0.01, False)
    assert group["params"] == [model.weight]


def test_what_steps_write_and_how_long_a_disk_lasts_are_told(
    tmp_path: Path, prepared: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    sections: dict[str, Any] = {"tiers": {"nvme": {"endurance": "1.2 PBW"}}, "budget": {"nvme": "1GiB"}}
    summary = train_module.train(recipe_for(tmp_path, **sections))
    assert summary.endurance_bytes == 1_200 * 10**12
    assert summary.process_written_bytes_per_step == 2.5e6
    assert [one.content for one in summary.written] == ["optimizer state"]
    assert Summary.read(tmp_path / "summary.json") == summary


def test_codecs_are_asked_for_and_what_they_did_is_told(
    tmp_path: Path,
    prepared: list[tuple[PlainSession, dict[str, Any]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    sections: dict[str, Any] = {"tiers": {"nvme": {"codec": "exponent"}}, "budget": {"nvme": "1GiB"}}
    train_module.train(recipe_for(tmp_path / "run", **sections))
    assert prepared[0][1]["codecs"] == {"nvme": "exponent"}
    assert "nvme: optimizer state coded" in capsys.readouterr().out


def test_a_codec_without_a_tier_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("zstandard")
    arguments = ["tiers.host.codec=exponent", f"output.directory={tmp_path / 'run'}"]
    assert main([str(TINY), *arguments]) == 1
    assert "the budget has no bytes in host: give budget.host a size" in capsys.readouterr().err
