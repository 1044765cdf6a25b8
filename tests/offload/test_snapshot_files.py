"""A checkpoint is whole or not there; what does not fit it or is damaged is told by name."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from memtrain.offload import atomic, snapshot
from memtrain.offload.atomic import CheckpointError, CorruptCheckpointError, publish
from memtrain.offload.errors import PlanMismatchError
from memtrain.offload.snapshot import (
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from memtrain.offload.snapshot_values import decode, encode
from tests.offload.snapshot_runs import adamw, open_run
from tests.offload.training import (
    batches,
)


def test_differences_are_listed_and_nothing_is_changed(tmp_path: Path) -> None:
    with open_run() as run:
        run.train(batches(1))
        folder = save_checkpoint(tmp_path / "at", run, progress={})
    with open_run(dtype=torch.bfloat16, seed_weights=False) as other:
        with pytest.raises(PlanMismatchError, match=r"embed.weight/exp_avg float32 .*here .*bfloat16"):
            load_checkpoint(folder, other)
        assert float(other.model.first.weight.detach().min()) == 7.0
    with (
        open_run(dtype=torch.bfloat16, master_weights=True) as other,
        pytest.raises(PlanMismatchError, match=r"embed.weight/master_weight float32 .*is missing"),
    ):
        load_checkpoint(folder, other)
    with (
        open_run(make=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)) as other,
        pytest.raises(
            PlanMismatchError, match=r"made with torch.optim.adamw.AdamW, this is torch.optim.sgd.SGD"
        ),
    ):
        load_checkpoint(folder, other)
    with (
        open_run(make=lambda p: adamw([{"params": p[:2]}, {"params": p[2:]}])) as other,
        pytest.raises(PlanMismatchError, match=r"parameter groups have \[6\] parameters, these \[2, 4\]"),
    ):
        load_checkpoint(folder, other)


def test_weights_that_differ(tmp_path: Path) -> None:
    one, other = (
        nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)),
        nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4)),
    )
    other.append(nn.Linear(2, 2, bias=False))
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with publish(tmp_path / "at") as writer:
        snapshot.write_weights(writer, one)
    with pytest.raises(
        PlanMismatchError, match=r"1.weight float32 \[3, 3\] in .*here 1.weight float32 \[4, 3\].*2.weight"
    ):
        snapshot.load_weights([tmp_path / "at" / "model.safetensors"], other)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())
    one[1].weight = one[0].weight
    with pytest.raises(PlanMismatchError, match=r"0.weight and 1.weight are one tensor here"):
        snapshot.load_weights([tmp_path / "at" / "model.safetensors"], one)
    with publish(tmp_path / "tied") as writer:
        snapshot.write_weights(writer, one)
    with pytest.raises(PlanMismatchError, match="tied to another weight"):
        snapshot.load_weights(
            [tmp_path / "tied" / "model.safetensors"], nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        )


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    with open_run() as run:
        run.train(batches(1))
        folder = save_checkpoint(tmp_path / "at", run, progress={})
        for path in sorted(folder.iterdir()):
            whole = path.read_bytes()
            flipped = bytearray(whole)
            flipped[len(whole) // 2] ^= 1
            path.write_bytes(flipped)
            before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
            with pytest.raises(CorruptCheckpointError, match=path.name):
                load_checkpoint(folder, run)
            path.write_bytes(whole[:-1])
            with pytest.raises(CorruptCheckpointError, match=path.name):
                load_checkpoint(folder, run)
            assert latest_checkpoint(tmp_path) is None
            path.write_bytes(whole)
            assert all(torch.equal(before[n], t) for n, t in run.model.state_dict().items())
        (folder / "rng.json").unlink()
        with pytest.raises(CorruptCheckpointError, match=r"rng.json cannot be read"):
            load_checkpoint(folder, run)
        with pytest.raises(CheckpointError, match="no complete checkpoint"):
            load_checkpoint(tmp_path, run)


def test_a_later_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_run() as run:
        with monkeypatch.context() as patched:
            patched.setattr(snapshot, "WHOLE_VERSION", 4)
            folder = save_checkpoint(tmp_path / "at", run, progress={})
        with pytest.raises(CheckpointError, match="has format 4, this memtrain reads 1 to 3"):
            load_checkpoint(folder, run)


def test_what_json_cannot_hold_is_refused_by_name() -> None:
    values = {"a": (0.1, 2), "b": None, "c": torch.tensor(0.3), "d": [True, "x"], "e": float("inf")}
    again = decode(json.loads(json.dumps(encode(values, "group"))))
    assert again == values
    assert again["c"].dtype == torch.float32
    with pytest.raises(CheckpointError, match="the group's schedule is <function"):
        encode(open_run, "group's schedule")


def test_replacing_a_checkpoint(tmp_path: Path) -> None:
    with open_run() as run:
        save_checkpoint(tmp_path / "at", run, progress={"n": 1})
        save_checkpoint(tmp_path / "at", run, progress={"n": 2})
        assert load_checkpoint(tmp_path / "at", run) == {"n": 2}
        assert [path.name for path in tmp_path.iterdir()] == ["at"]


def test_latest(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") is None
    with open_run() as run:
        for name in ("step-9", "step-1"):
            save_checkpoint(tmp_path / name, run, progress={})
        (tmp_path / "step-99").mkdir()
        (tmp_path / "step-99" / "model.safetensors").write_bytes(b"")
        assert latest_checkpoint(tmp_path) == tmp_path / "step-1"


def test_error_in_the_middle_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_run() as run:
        run.train(batches(1))
        save_checkpoint(tmp_path / "at", run, progress={"n": 1})
        writes = []

        def full(self: Any, data: Any) -> None:
            writes.append(1)
            if len(writes) == 5:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(atomic.FileWriter, "write", full)
        with pytest.raises(CheckpointError, match=r"No space left.*bytes are free") as caught:
            save_checkpoint(tmp_path / "at", run, progress={"n": 2})
        assert caught.value.errno == errno.ENOSPC
        monkeypatch.undo()
        assert [path.name for path in tmp_path.iterdir()] == ["at"]
        assert load_checkpoint(tmp_path / "at", run) == {"n": 1}
        with pytest.raises(TypeError, match="not JSON serializable"):
            save_checkpoint(tmp_path / "at", run, progress={"n": object()})
        assert [path.name for path in tmp_path.iterdir()] == ["at"]


def test_a_file_size_limit_is_met_with_a_typed_error(tmp_path: Path) -> None:
    with open_run() as run:
        save_checkpoint(tmp_path / "at", run, progress={"n": 1})
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
            with pytest.raises(CheckpointError, match="ulimit -f"):
                save_checkpoint(tmp_path / "at", run, progress={"n": 2})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)
        assert load_checkpoint(tmp_path / "at", run) == {"n": 1}


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    dead = tmp_path / f"at.tmp-{'0' * 16}"
    dead.mkdir()
    (dead / "model.safetensors").write_bytes(b"half")
    (tmp_path / "notes.tmp-mine").mkdir()
    with publish(tmp_path / "first") as first:
        with publish(tmp_path / "second"):
            assert not dead.exists()
            assert first.path.is_dir()
        first.write_text("a", "1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "notes.tmp-mine", "second"]


WRITER = """
import sys
from pathlib import Path
from memtrain.offload.atomic import publish
directory = Path(sys.argv[1])
print("ready", flush=True)
number = 0
while True:
    with publish(directory / ("replaced" if number % 2 else f"step-{number % 6}")) as writer:
        for name in "abcde":
            writer.write_text(name, f"{number}" * 20_000)
    number += 1
"""


def test_kill_at_any_moment(tmp_path: Path) -> None:
    """The writer is killed again and again; what it had published is whole, and its leftovers go."""
    source = Path(__file__).parents[2]
    rng, survived = random.Random(0), 0
    process = subprocess.Popen
    for _ in range(6):
        with process(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, cwd=source
        ) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0.01, 0.15))
            writer.send_signal(signal.SIGKILL)
        whole = [path for path in tmp_path.iterdir() if ".tmp-" not in path.name]
        for path in whole:
            assert len(atomic.verify(path)) == 5
            assert len({(path / name).read_bytes() for name in "abcde"}) == 1
        assert len([path for path in tmp_path.iterdir() if path not in whole]) <= 1
        latest = latest_checkpoint(tmp_path)
        assert (latest in whole) if whole else latest is None
        survived += len(whole)
    assert survived
    atomic.remove_leftovers(tmp_path)
    assert all(atomic.is_complete(path) for path in tmp_path.iterdir())


def test_every_prefix_of_the_system_calls_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forked child dies before its n-th call that changes the disk, for every n."""
    with publish(tmp_path / "at") as writer:
        writer.write_text("a", "old")
    calls = ("write", "fsync", "fdatasync", "rename", "mkdir")

    def attempt(deadline: int) -> bool:
        """Whether the child got to its end."""
        pid = os.fork()
        if pid == 0:
            left = [deadline]

            def dying(real: Any) -> Any:
                def call(*args: Any, **kwargs: Any) -> Any:
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **kwargs)

                return call

            for name in calls:
                setattr(os, name, dying(getattr(os, name)))
            atomic._exchange = dying(atomic._exchange)
            atomic.shutil.rmtree = dying(atomic.shutil.rmtree)
            with publish(tmp_path / "at") as writer:
                writer.write_text("a", "new")
                writer.write_text("b", "x" * 1000)
            os._exit(0)
        return os.waitpid(pid, 0)[1] == 0

    seen = []
    for deadline in range(100):
        finished = attempt(deadline)
        atomic.verify(tmp_path / "at")
        assert latest_checkpoint(tmp_path) == tmp_path / "at"
        seen.append((tmp_path / "at" / "a").read_text())
        if finished:
            break
        with publish(tmp_path / "at") as writer:
            writer.write_text("a", "old")
        assert [path.name for path in tmp_path.iterdir()] == ["at"]
    assert finished
    assert seen == sorted(seen, reverse=True)  # old, ..., old, new, ..., new
    assert set(seen) == {"old", "new"}
