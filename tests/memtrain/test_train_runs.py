"""The trainer as its users start it: whole runs, killed ones, full disks, budgets that cannot work."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from memtrain import train as train_module
from memtrain.cli.validate import validate_file
from memtrain.progress import ProgressDisplay, StepRecord
from memtrain.report import Summary
from memtrain.train import main
from tests.memtrain.tiny_runs import TINY, kill_after, metrics, run_tiny, told_in_one_line


class FullAtStep3(ProgressDisplay):
    """The disk has no more room from the third step on: the kernel itself refuses the line."""

    def show(self, record: StepRecord) -> None:
        if record.step == 3:
            full = os.open("/dev/full", os.O_WRONLY)
            os.dup2(full, self._file.fileno())
            os.close(full)
        super().show(record)


def test_a_disk_that_fills_up_in_mid_run_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real session: one line that names the file, nothing left behind, and the run goes on from step 2
    as if nothing had happened."""
    small = ["data.sequence_length=32", "training.steps=4", "checkpoint.every=2", "evaluation.batches=1"]
    command = [str(TINY), *small, f"output.directory={tmp_path / 'full'}"]
    with monkeypatch.context() as patched:
        patched.setattr(train_module, "ProgressDisplay", FullAtStep3)
        assert main(command) == 1
    told = told_in_one_line(capsys)
    assert f"{tmp_path}/full/metrics.jsonl cannot be written: No space left on device (errno 28)" in told
    assert "checkpoints that were complete are intact" in told
    assert list((tmp_path / "full" / "swap").iterdir()) == []
    assert [path.name for path in (tmp_path / "full" / "checkpoint").iterdir()] == ["step-000002"]

    assert main(command) == 0
    assert "resumed after step 2" in capsys.readouterr().out
    assert main([*command[:-1], f"output.directory={tmp_path / 'whole'}"]) == 0
    assert [m["loss"] for m in metrics(tmp_path / "full")] == [m["loss"] for m in metrics(tmp_path / "whole")]


def test_end_to_end(tmp_path: Path) -> None:
    """``memtrain run``, the real session, a run cut short and taken up again: the same losses and weights."""
    whole = run_tiny(tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    for text in ("predicted peak", "step 4/4", "held-out loss after", "whole process: ", "report.html"):
        assert text in whole.stdout
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names >= {"plan.json", "profile.json", "machine.json", "metrics.jsonl", "recipe.yaml"}
    assert names >= {"summary.json", "report.html", "memory.csv", "checkpoint"}
    assert list((tmp_path / "whole" / "swap").iterdir()) == []
    assert validate_file(tmp_path / "whole" / "plan.json").startswith(str(tmp_path))

    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoint" / "step-000004")
    cut = run_tiny(tmp_path / "cut")
    assert cut.returncode == 0, cut.stderr
    assert "resumed after step 2" in cut.stdout
    assert [m["loss"] for m in metrics(tmp_path / "cut")] == [m["loss"] for m in metrics(tmp_path / "whole")]
    first, second = (
        load_file(tmp_path / run / "checkpoint" / "step-000004" / "model.safetensors")
        for run in ("whole", "cut")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_killed_twice_ends_like_one_that_never_stopped(tmp_path: Path) -> None:
    every = ["data.sequence_length=32", "training.steps=12", "checkpoint.every=1", "checkpoint.keep=2"]
    whole = run_tiny(tmp_path / "whole", *every)
    assert whole.returncode == 0, whole.stderr
    killed = tmp_path / "killed"
    kill_after(killed, 3, *every)
    kill_after(killed, 8, *every)
    rest = run_tiny(killed, *every)
    assert rest.returncode == 0, rest.stderr
    assert "resumed after step" in rest.stdout
    assert [m["loss"] for m in metrics(killed)] == [m["loss"] for m in metrics(tmp_path / "whole")]
    first, second = (
        load_file(folder / "checkpoint" / "step-000012" / "model.safetensors")
        for folder in (tmp_path / "whole", killed)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert list((killed / "swap").iterdir()) == []  # what the dead runs left has been reaped


def test_memtrain_run_passes_on_exit_code_2(tmp_path: Path) -> None:
    result = run_tiny(tmp_path, "budget.device=64MiB")
    assert result.returncode == 2
    assert "device: short by" in result.stderr


@pytest.mark.slow
def test_the_remedy_of_a_budget_that_cannot_work_works(tmp_path: Path) -> None:
    """With exactly the budget that is named the run ends well, and the whole process was inside it."""
    refused = run_tiny(tmp_path / "refused", "data.sequence_length=128", "budget.device=128MiB")
    assert refused.returncode == 2
    remedy = re.search(r"1\. device at least ([0-9.]+ GiB) instead of 0.125 GiB", refused.stderr)
    assert remedy is not None, refused.stderr
    budget = f"budget.device={remedy[1].replace(' ', '')}"
    run = run_tiny(tmp_path / "run", "data.sequence_length=128", budget)
    assert run.returncode == 0, run.stderr
    assert f"of {remedy[1]}" in run.stdout
    assert "OVER" not in run.stdout
    summary = Summary.read(tmp_path / "run" / "summary.json")
    assert summary.measured_peak_bytes <= summary.process_peak_bytes <= summary.budget_bytes
