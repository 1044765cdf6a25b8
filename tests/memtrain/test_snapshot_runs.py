"""Whole runs with snapshots beside training, killed and taken up again."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import pytest

from memtrain import snapshots as snapshots_module
from memtrain import train as train_module
from memtrain.memory import MemoryLimit
from memtrain.recipe import load_recipe
from memtrain.report import Summary
from memtrain.train import RunFinished, main
from tests.memtrain.tiny_runs import TINY, kill_after, metrics
from tests.offload.async_runs import shared_memory_names

STEPS = 8
SMALL = [
    "data.sequence_length=32",
    f"training.steps={STEPS}",
    "budget.device=6GiB",
    "checkpoint.keep=2",
    "checkpoint.hours_between_failures=2",
]


def run(output: Path, *words: str) -> None:
    """To its end, in this process, which has loaded the libraries already."""
    train_module.train(load_recipe(TINY, [f"output.directory={output}", *words]))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never disturbed and wrote its checkpoint at the end."""
    output = tmp_path_factory.mktemp("plain")
    run(output, *SMALL[:4])
    return output


def assert_same_end(one: Path, other: Path) -> None:
    assert [m["loss"] for m in metrics(one)] == [m["loss"] for m in metrics(other)]
    ends = [path / "checkpoint" / f"step-{STEPS:06d}" for path in (one, other)]
    for path in ends[0].glob("*"):
        if path.name not in ("rng.json", "manifest.json"):  # Python's generator has a seed of its own
            assert path.read_bytes() == (ends[1] / path.name).read_bytes(), path.name


def holders(folder: Path) -> list[int]:
    """Of runs in ``folder``: other tests may run beside this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = path.read_bytes()
            if b"holder.py" in command and os.fsencode(folder) in command:
                found.append(int(path.parent.name))
    return found


def test_checkpoints_beside_training(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed in the middle; the losses, the weights and the state at the end are those of a plain run."""
    words = [*SMALL, "checkpoint.every=1", "checkpoint.asynchronous=true"]
    kill_after(tmp_path / "run", 4, *words)
    run(tmp_path / "run", *words)
    said = capsys.readouterr().out
    for text in (
        "resumed after step",
        "snapshots on disk: every 1 steps, beside training",
        " snapshots beside training: ",
        "at one failure in 2 h, with",
        "(Young 1974, Daly 2006); every 1 steps, as now, ",
    ):
        assert text in said
    assert_same_end(plain, tmp_path / "run")
    outcome = Summary.read(tmp_path / "run" / "summary.json").snapshots
    assert outcome is not None
    assert outcome.text() in " ".join(said.split())
    assert outcome.failure_seconds == 7200.0
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoint").iterdir())
    assert kept == [f"step-{STEPS - 1:06d}", f"step-{STEPS:06d}"]


def test_a_killed_run_goes_on_from_memory_and_nothing_is_left(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared, output = shared_memory_names(), tmp_path / "run"
    words = [*SMALL, "checkpoint.every=100", "checkpoint.hold_every=1", "checkpoint.spare=1MiB"]
    kill_after(output, 4, *words)
    assert len(holders(tmp_path)) == 1
    assert not list((output / "checkpoint").glob("*"))  # there is nothing on the disk to resume from
    run(output, *words)
    said = capsys.readouterr().out
    assert "resumed after step" in said
    assert "snapshots in memory: every 1 steps, " in said
    assert "on nvme not used: no state is kept there" in said
    assert_same_end(plain, output)
    assert holders(tmp_path) == []
    assert shared_memory_names() == shared
    assert not (output / "holder").exists()
    with pytest.raises(RunFinished, match=f"all {STEPS} steps are done"):
        run(output, *words)
    assert holders(tmp_path) == []


def test_one_that_starts_anew_or_fails_leaves_no_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    words = [*SMALL, "checkpoint.every=100", "checkpoint.hold_every=1"]
    kill_after(output, 3, *words)
    assert len(holders(tmp_path)) == 1
    run(output, *words, "training.steps=2", "checkpoint.resume=never")
    assert "resumed" not in capsys.readouterr().out
    assert holders(tmp_path) == []

    limit = MemoryLimit(limit_bytes=1 << 20, used_bytes=0, source="a small machine")
    monkeypatch.setattr(snapshots_module, "machine_memory", lambda: limit)
    arguments: list[Any] = [str(TINY), f"output.directory={tmp_path / 'other'}", *words]
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert "holding snapshots in memory takes" in message
    assert "(a small machine): take snapshots to disk" in message
    assert holders(tmp_path) == []
