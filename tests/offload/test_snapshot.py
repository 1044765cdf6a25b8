"""Checkpoints: bit-equal resumption under any plan, whole or not at all, damage told by name."""

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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, load_model
from torch import nn

from memtrain.offload import atomic, snapshot
from memtrain.offload.atomic import CheckpointError, CorruptCheckpointError, publish
from memtrain.offload.errors import PlanMismatchError
from memtrain.offload.snapshot import (
    latest_checkpoint,
    load_checkpoint,
    load_optimizer_state,
    save_checkpoint,
)
from memtrain.offload.snapshot_values import decode, encode
from memtrain.planner.actions import Tier, UpdateSchedule
from tests.offload.training import (
    STAGING,
    Lion,
    batches,
    make_model,
    make_plan,
    open_engine,
    plain_run,
    trainable,
    wrap,
)

SEQUENTIAL, AHEAD = UpdateSchedule.SEQUENTIAL, UpdateSchedule.AHEAD
UNITS = ("prologue", "block", "epilogue")


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, betas=(0.8, 0.99))


@dataclass
class Run:
    """A session of three things, which is all that a checkpoint asks for."""

    model: nn.Module
    optimizer: Any

    def flush(self) -> None:
        self.optimizer.flush()

    def train(self, data: list[torch.Tensor]) -> None:
        for batch in data:
            for unit in UNITS:
                self.optimizer.ensure(unit)
            self.model(batch).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


@contextmanager
def open_run(
    plan: Any = None,
    dtype: torch.dtype = torch.float32,
    make: Any = adamw,
    seed_weights: bool = True,
    **config: Any,
) -> Iterator[Run]:
    model = make_model(dtype)
    if not seed_weights:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(7.0)
    with open_engine() as engine:
        optimizer = wrap(model, make(trainable(model)), engine, plan, **config)
        yield Run(model, optimizer)
        optimizer.close()


def states(optimizer: Any) -> dict[tuple[str, str], torch.Tensor]:
    return {(name, key): tensor for name, key, tensor in optimizer.iter_state()}


def assert_same(one: Run, other: Run) -> None:
    one.flush()
    other.flush()
    for (name, p), q in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    ours, theirs = states(one.optimizer), states(other.optimizer)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[place], theirs[place]) for place in ours)
    assert one.optimizer.scalar_state() == other.optimizer.scalar_state()


PLANS = {
    "host": make_plan(),
    "ahead": make_plan(AHEAD),
    "device": make_plan(gradient_tier=Tier.DEVICE, optimizer_tier=Tier.DEVICE),
    "small shards": make_plan(AHEAD, staging=replace(STAGING, update_shard_elements=9_000)),
}


@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize(("before", "after"), list(product(PLANS, PLANS)))
def test_resumed_run_equals_one_that_never_stopped(
    before: str, after: str, master: bool, tmp_path: Path
) -> None:
    dtype = torch.bfloat16 if master else torch.float32
    data = batches(5)
    with open_run(PLANS[before], dtype, master_weights=master) as whole:
        whole.train(data[:3])
        save_checkpoint(tmp_path / "at", whole, progress={"steps_done": 3})
        whole.train(data[3:])
        with open_run(PLANS[after], dtype, seed_weights=False, master_weights=master) as resumed:
            assert load_checkpoint(tmp_path / "at", resumed) == {"steps_done": 3}
            resumed.train(data[3:])
            assert_same(whole, resumed)


def test_loading_replaces_a_state_that_went_on(tmp_path: Path) -> None:
    data = batches(4)
    with open_run(PLANS["ahead"]) as run, open_run(PLANS["ahead"]) as reference:
        run.train(data[:2])
        save_checkpoint(tmp_path / "at", run, progress={})
        run.train(data[2:])
        for group in run.optimizer.param_groups:
            group["lr"] = 5.0
        load_checkpoint(tmp_path / "at", run)
        assert run.optimizer.param_groups[0]["lr"] == 1e-2
        assert run.optimizer.param_groups[0]["betas"] == (0.8, 0.99)
        reference.train(data[:2])
        assert_same(run, reference)


def test_optimizers_without_a_step_and_without_state(tmp_path: Path) -> None:
    for name, make in {
        "lion": lambda p: Lion(p, lr=1e-2),
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
        "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    }.items():
        data = batches(3)
        with open_run(make=make) as run, open_run(make=make, seed_weights=False) as resumed:
            run.train(data[:2])
            save_checkpoint(tmp_path / name, run, progress={})
            load_checkpoint(tmp_path / name, resumed)
            run.train(data[2:])
            resumed.train(data[2:])
            assert_same(run, resumed)


def test_before_the_first_step(tmp_path: Path) -> None:
    with open_run() as run, open_run(seed_weights=False) as resumed:
        save_checkpoint(tmp_path / "at", run, progress={})
        resumed.train(batches(1))
        load_checkpoint(tmp_path / "at", resumed)
        assert resumed.optimizer.scalar_state() == {}
        assert_same(run, resumed)


def test_random_generators_go_on_where_they_were(tmp_path: Path) -> None:
    def draw() -> list[Any]:
        return [torch.rand(3).tolist(), random.random(), numpy.random.rand(2).tolist(), random.gauss(0, 1)]

    random.gauss(0, 1)  # leaves a second value behind, which is part of the state
    with open_run() as run:
        save_checkpoint(tmp_path / "at", run, progress={"text": "ü", "nested": [1, {"a": None}]})
        expected = draw()
        assert load_checkpoint(tmp_path / "at", run) == {"text": "ü", "nested": [1, {"a": None}]}
        assert draw() == expected


def test_shards_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "OPTIMIZER_SHARD_BYTES", 600_000)
    with open_run() as run, open_run(seed_weights=False) as resumed:
        run.train(batches(2))
        folder = save_checkpoint(tmp_path / "at", run, progress={})
        # embed has 701*101 elements, first 683*101 and 683, second 101*683 and 101; fp32, two tensors each:
        # 2 x 283,204 | 2 x 275,932 + 2 x 2,732 | 2 x 275,932 + 2 x 404 bytes
        sizes = {path.name: path.stat().st_size for path in folder.glob("optimizer-*")}
        assert sorted(sizes) == [f"optimizer-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
        stored = [load_file(folder / name) for name in sorted(sizes)]
        assert [sum(t.nbytes for t in one.values()) for one in stored] == [566_408, 557_328, 552_672]
        expected = {f"{name}/{key}": tensor for (name, key), tensor in states(run.optimizer).items()}
        found = {name: tensor for one in stored for name, tensor in one.items()}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        load_checkpoint(folder, resumed)
        assert_same(run, resumed)


def test_plain_module_is_stored_once_and_read_by_safetensors(tmp_path: Path) -> None:
    with open_run() as run:
        folder = save_checkpoint(tmp_path / "at", run, progress={})
        stored = load_file(folder / "model.safetensors")
        assert "head.weight" not in stored
        assert stored.keys() == run.model.state_dict().keys() - {"head.weight"}
        fresh = make_model()
        with torch.no_grad():
            fresh.embed.weight.zero_()
        load_model(fresh, folder / "model.safetensors")
        assert torch.equal(fresh.head.weight, run.model.embed.weight)
        assert not (folder / "config.json").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_hugging_face_model_with_its_tokenizer(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    from memtrain.offload import snapshot_weights

    monkeypatch.setattr(snapshot_weights, "SHARD_BYTES", 20_000)
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text('{"version": "1.0"}')
    (source / "model.safetensors").write_bytes(b"not to be copied")
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.config._name_or_path = model.name_or_path = str(source)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    units = [("prologue", list(model.named_parameters())), ("block", []), ("epilogue", [])]
    with open_engine() as engine:
        from memtrain.offload.optimizer import OffloadedOptimizer

        offloaded = OffloadedOptimizer(optimizer, engine=engine, plan=make_plan(), units=units)
        folder = save_checkpoint(tmp_path / "at", Run(model, offloaded), progress={})
        offloaded.close()
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert (folder / "tokenizer.json").read_text() == '{"version": "1.0"}'
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert again.dtype == torch.bfloat16
    assert again.config.use_cache is True
    assert model.config.use_cache is False
    assert (again.lm_head.weight is again.model.embed_tokens.weight) is tied
    for (name, p), q in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name


# -- into a plain optimizer --------------------------------------------------------------------------------


def test_plain_adamw_goes_on_bit_for_bit(tmp_path: Path) -> None:
    expected, reference, _ = plain_run(adamw, steps=5)
    with open_run(PLANS["ahead"]) as run:
        run.train(batches(5)[:3])
        folder = save_checkpoint(tmp_path / "at", run, progress={})
    model = make_model()
    load_model(model, folder / "model.safetensors")
    plain = torch.optim.AdamW(trainable(model), lr=77.0)
    load_optimizer_state(folder, plain, model)
    for batch in batches(5)[3:]:
        model(batch).backward()
        plain.step()
        plain.zero_grad()
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q), name
    for p, q in zip(trainable(model), trainable(expected), strict=True):
        assert plain.state[p].keys() == reference.state[q].keys()
        assert all(torch.equal(plain.state[p][key], value) for key, value in reference.state[q].items())


def test_plain_optimizer_over_copies_takes_the_masters(tmp_path: Path) -> None:
    with open_run(dtype=torch.bfloat16, master_weights=True) as run:
        run.train(batches(2))
        folder = save_checkpoint(tmp_path / "at", run, progress={})
        expected = states(run.optimizer)
    model = make_model(torch.bfloat16)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    masters = [p.detach().float() for p in trainable(model)]
    plain = adamw(masters)
    load_optimizer_state(folder, plain, model)
    for name, master in zip(names, masters, strict=True):
        if (name, "master_weight") in expected:
            assert torch.equal(master, expected[name, "master_weight"])
            assert torch.equal(plain.state[master]["exp_avg_sq"], expected[name, "exp_avg_sq"])
            assert plain.state[master]["exp_avg"].dtype == torch.float32
            assert plain.state[master]["step"] == 2
    assert ("embed.weight", "master_weight") in expected
    with pytest.raises(
        PlanMismatchError, match=r"embed.weight has torch.float32 master weights .*fp32 copies"
    ):
        load_optimizer_state(folder, adamw(trainable(model)), model)


# -- what does not fit -------------------------------------------------------------------------------------


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
            patched.setattr(snapshot, "FORMAT_VERSION", 2)
            folder = save_checkpoint(tmp_path / "at", run, progress={})
        with pytest.raises(CheckpointError, match="has format 2, this memtrain reads 1"):
            load_checkpoint(folder, run)


def test_what_json_cannot_hold_is_refused_by_name() -> None:
    values = {"a": (0.1, 2), "b": None, "c": torch.tensor(0.3), "d": [True, "x"], "e": float("inf")}
    again = decode(json.loads(json.dumps(encode(values, "group"))))
    assert again == values
    assert again["c"].dtype == torch.float32
    with pytest.raises(CheckpointError, match="the group's schedule is <function"):
        encode(open_run, "group's schedule")


# -- whole or not at all -----------------------------------------------------------------------------------


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
