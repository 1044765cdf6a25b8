from __future__ import annotations

import errno
import io
import json
from pathlib import Path

import pytest

from memtrain import progress
from memtrain.progress import ProgressDisplay, StepRecord
from memtrain.runfiles import RunFileError

GIB = 1 << 30


def record(step: int, loss: float = 2.0) -> StepRecord:
    return StepRecord(
        step=step,
        loss=loss,
        learning_rate=1e-5,
        gradient_norm=float("inf"),
        seconds=2.0,
        tokens=2048,
        memory_now_bytes=GIB,
        memory_peak_bytes=GIB * 5 // 4,
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def show(path: Path, stream: io.StringIO, *, done: int = 0) -> None:
    with ProgressDisplay(
        path, total_steps=5, done_steps=done, budget_bytes=2 * GIB, log_every=2, stream=stream
    ) as display:
        for step in range(done + 1, 6):
            display.show(record(step))
        display.note("a note")


def test_metric_keys_carry_units_and_the_file_is_strict_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    show(path, io.StringIO())
    lines = [json.loads(line, parse_constant=lambda name: 1 / 0) for line in path.read_text().splitlines()]
    assert len(lines) == 5
    assert lines[0] == {
        "step": 1,
        "loss": 2.0,
        "learning_rate": 1e-5,
        "gradient_norm": "inf",
        "time/step(s)": 2.0,
        "throughput(tokens/s)": 1024.0,
        "memory/now(GiB)": 1.0,
        "memory/peak(GiB)": 1.25,
    }


def test_without_a_terminal_a_line_every_few_steps_and_at_the_end(tmp_path: Path) -> None:
    stream = io.StringIO()
    show(tmp_path / "m", stream)
    lines = stream.getvalue().splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [["step", "2/5"], ["step", "4/5"], ["step", "5/5"]]
    assert lines[0].endswith("loss 2.0000  1024 tokens/s  1.00 GiB now, 1.25 peak of 2.00")
    assert lines[3] == "a note"


def test_on_a_terminal_a_bar(tmp_path: Path) -> None:
    stream = Terminal()
    show(tmp_path / "m", stream)
    assert "5/5" in stream.getvalue()
    assert "step 2/5" not in stream.getvalue()
    assert "a note" in stream.getvalue()


def test_a_resumed_run_goes_on_in_the_same_file_and_a_new_one_begins_it(tmp_path: Path) -> None:
    path = tmp_path / "m"
    show(path, io.StringIO())
    path.write_text(path.read_text()[:-9])  # a crash cut the last line short
    show(path, io.StringIO(), done=3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]
    show(path, io.StringIO(), done=4)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5]
    show(path, io.StringIO())
    assert len(path.read_text().splitlines()) == 5


@pytest.mark.parametrize("done", [0, 3])
def test_a_full_disk_is_told_by_the_files_name_also_where_a_run_is_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: int
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    monkeypatch.setattr(progress, "_lines_until", lambda _, step: ["{}\n"] * step)
    with pytest.raises(RunFileError, match=r"metrics\.jsonl cannot be written: No space left") as caught:
        show(path, io.StringIO(), done=done)
    assert caught.value.errno == errno.ENOSPC
