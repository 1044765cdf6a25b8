"""State dicts, resumption and masters of a streamed optimizer."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from memtrain.offload import codec, coded
from memtrain.offload.device import make_device
from memtrain.offload.engine import Engine
from memtrain.offload.errors import ExtentStateError, OffloadError
from memtrain.offload.optimizer_state import OffloadedState, RecordCursor, StaleStateError
from memtrain.offload.slab import Slab
from memtrain.offload.tiers import MemoryStore
from memtrain.optim.storage.lossless import ExponentCodec
from memtrain.planner.actions import Tier, UpdateSchedule
from memtrain.planner.plan import Staging
from tests.offload.optimizer_runs import (
    AHEAD,
    OPTIMIZERS,
    SEQUENTIAL,
    assert_equal_models,
    assert_equal_state,
    train,
)
from tests.offload.training import (
    STAGING,
    batches,
    make_model,
    make_plan,
    open_engine,
    plain_run,
    trainable,
    wrap,
)


def test_state_dict_moves_nothing_until_it_is_used() -> None:
    model = make_model()
    with open_engine() as engine:
        make = OPTIMIZERS["adamw"]
        optimizer = wrap(model, make(trainable(model)), engine)
        assert optimizer.state_dict()["state"] == {}
        assert optimizer.state == {}
        train(model, optimizer, steps=2)
        read = engine.store(Tier.HOST).statistics().bytes_read
        saved = optimizer.state_dict()
        moved = {
            n: {k: v.to("cpu") if isinstance(v, torch.Tensor) else v for k, v in s.items()}
            for n, s in saved["state"].items()
        }
        optimizer.load_state_dict({**saved, "state": moved})
        assert engine.store(Tier.HOST).statistics().bytes_read == read
        _, plain, _ = plain_run(make, steps=2)
        expected = plain.state_dict()
        assert saved["param_groups"] == expected["param_groups"]
        assert saved["state"].keys() == expected["state"].keys()
        for number, state in expected["state"].items():
            assert all(torch.equal(saved["state"][number][key], value) for key, value in state.items())
            assert isinstance(saved["state"][number]["exp_avg"], OffloadedState)
        file = io.BytesIO()
        torch.save(copy.deepcopy(saved), file)
        file.seek(0)
        plain.load_state_dict(torch.load(file))


@pytest.mark.parametrize("through", ["state_dict", "plain state_dict", "load_state", "lazily"])
def test_resume_is_bit_equal(through: str) -> None:
    make = OPTIMIZERS["adamw"]
    data = batches(4)
    expected, _, _ = plain_run(make, steps=4)
    model = make_model()
    with open_engine() as engine, open_engine() as other:
        if through == "plain state_dict":
            model, plain, _ = plain_run(make, steps=2)
            saved = plain.state_dict()
        else:
            optimizer = wrap(model, make(trainable(model)), engine)
            train(model, optimizer, steps=2)
            saved = copy.deepcopy(optimizer.state_dict())
        resumed = make_model()
        resumed.load_state_dict(model.state_dict())
        staging = Staging(
            **{
                **{f: getattr(STAGING, f) for f in STAGING.__dataclass_fields__},
                "update_shard_elements": 8192,
            }
        )
        again = wrap(resumed, make(trainable(resumed)), other, make_plan(staging=staging))
        if through == "load_state":
            again.load_state(optimizer.iter_state(), optimizer.scalar_state())
        elif through == "lazily":
            lazy = {
                (n, k): (lambda n=n, k=k: optimizer.read_state(n, k)) for n, k, _ in optimizer.iter_state()
            }
            again.load_state(lazy, optimizer.scalar_state())
        else:
            again.load_state_dict(saved)
        for batch in data[2:]:
            resumed(batch).backward()
            again.step()
            again.zero_grad()
        assert_equal_models(resumed, expected)


def test_state_that_exists_is_taken_over() -> None:
    make = OPTIMIZERS["adamw"]
    expected, _, _ = plain_run(make, steps=4)
    model, inner, _ = plain_run(make, steps=2)
    with open_engine() as engine:
        optimizer = wrap(model, inner, engine)
        assert not inner.state
        for batch in batches(4)[2:]:
            model(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_equal_models(model, expected)


def test_an_old_state_dict_is_refused_and_a_copy_of_it_is_a_snapshot() -> None:
    """Its ``step`` would be the old one, and its moments those of now."""
    model = make_model()
    with open_engine() as engine:
        optimizer = wrap(model, OPTIMIZERS["adamw"](trainable(model)), engine, make_plan(AHEAD))
        train(model, optimizer, steps=2)
        saved = optimizer.state_dict()
        snapshot = copy.deepcopy(saved)
        optimizer.load_state_dict(saved)  # as Accelerator.prepare does, at once
        optimizer.param_groups[0]["lr"] = 0.5
        train(model, optimizer, steps=1)
        stale = r"embed\.weight/exp_avg, .* change 2 of .* 3 by now: .*copy\.deepcopy\(optimizer\.state_dict"
        with pytest.raises(StaleStateError, match=stale):
            optimizer.load_state_dict(saved)
        assert optimizer.param_groups[0]["lr"] == 0.5
        assert optimizer.scalar_state()["embed.weight"]["step"] == 3
        with pytest.raises(StaleStateError, match=stale):
            copy.deepcopy(saved)
        now = optimizer.state_dict()
        optimizer.load_state_dict(snapshot)
        assert optimizer.scalar_state()["embed.weight"]["step"] == 2
        number = next(iter(snapshot["state"]))
        assert torch.equal(
            optimizer.read_state("embed.weight", "exp_avg"), snapshot["state"][number]["exp_avg"]
        )
        with pytest.raises(StaleStateError, match=r"change 3 of .* 4 by now"):
            optimizer.load_state_dict(now)


@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD])
def test_masters_follow_weights_that_were_written_between_steps(schedule: UpdateSchedule) -> None:
    """Loading weights, clamping or swapping them counts; what was not written keeps its lower bits."""
    make = OPTIMIZERS["adamw"]
    torch.manual_seed(0)
    plain = make_model(torch.bfloat16)
    masters = [p.detach().float() for p in trainable(plain)]
    reference = make(masters)

    def plain_steps(data: list[Any]) -> None:
        for batch in data:
            plain(batch).backward()
            for master, p in zip(masters, trainable(plain), strict=True):
                master.grad, p.grad = None if p.grad is None else p.grad.float(), None
            reference.step()
            with torch.no_grad():
                for master, p in zip(masters, trainable(plain), strict=True):
                    p.copy_(master)

    def write(model: nn.Module) -> None:
        with torch.no_grad():
            model.first.weight.clamp_(-0.02, 0.02)
            kept = model.embed.weight.clone()
            model.embed.weight.zero_()
            model.embed.weight.copy_(kept)

    data = list(batches(4))
    plain_steps(data[:2])
    write(plain)
    with torch.no_grad():
        for master, p in zip(masters, trainable(plain), strict=True):
            master.copy_(torch.where(master.bfloat16() == p, master, p.float()))
    plain_steps(data[2:])
    model = make_model(torch.bfloat16)
    with open_engine() as engine:
        optimizer = wrap(model, make(trainable(model)), engine, make_plan(schedule), master_weights=True)
        for number, batch in enumerate(data):
            for unit in ("prologue", "block", "epilogue"):
                optimizer.ensure(unit)
            if number == 2:
                optimizer.flush()
                write(model)
            model(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.flush()
        assert float(model.first.weight.detach().abs().max()) < 0.06  # undone, it would be more
        assert_equal_models(model, plain)
        optimizer.close()


def test_pickling_offloaded_state_is_refused_with_the_remedy() -> None:
    """A pickle of the state dict would bring the whole state back into memory without a word."""

    class Owner:
        state_count = 0

        def read_state(self, name: str, key: str) -> torch.Tensor:
            raise AssertionError("read")

    state = OffloadedState(Owner(), "weight", "exp_avg", (2, 3), torch.float32, 0, torch.device("cpu"))
    with pytest.raises(OffloadError, match=r"weight/exp_avg.*save_checkpoint"):
        torch.save({"state": state}, io.BytesIO())


@contextmanager
def trained_in_pieces() -> Iterator[tuple[MemoryStore, Any]]:
    """Two steps; records lie in pieces that are much smaller than they."""
    model = make_model()
    store = MemoryStore(Tier.HOST, 64 << 20, piece_bytes=4096)
    with Engine({Tier.HOST: store}, make_device("cpu")) as engine:
        optimizer = wrap(model, OPTIMIZERS["adamw"](trainable(model)), engine)
        train(model, optimizer, steps=2)
        yield store, optimizer


def test_a_tensor_of_many_records_is_read_without_its_neighbours() -> None:
    with trained_in_pieces() as (store, optimizer):
        records = sum(extent.nbytes for _, extent in optimizer.records.extents().values())
        parameter = optimizer.index.parameters["embed.weight"]
        assert len(optimizer.index.pieces["embed.weight"]) > 1
        before = store.statistics().bytes_read
        parts = [(name, key, part.clone()) for name, key, part in optimizer.stored_parts()]
        read = store.statistics().bytes_read - before
        assert parameter.numel() * 8 < read < records + parameter.numel()  # once, and pieces at edges twice
        expected, plain, _ = plain_run(OPTIMIZERS["adamw"], steps=2)
        assert_equal_state(optimizer, expected, plain)
        for name, key, whole in optimizer.iter_state():
            found = [part for other, kind, part in parts if (other, kind) == (name, key)]
            assert torch.equal(torch.cat([part.flatten() for part in found]), whole.flatten())


def test_a_coded_record_is_read_in_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("zstandard")
    for module in (codec, coded):
        monkeypatch.setattr(module, "SEGMENT_BYTES", 16384)
    model = make_model()
    store = MemoryStore(Tier.HOST, 64 << 20)
    with Engine({Tier.HOST: store}, make_device("cpu"), {Tier.HOST: ExponentCodec()}) as engine:
        optimizer = wrap(model, OPTIMIZERS["adamw"](trainable(model)), engine)
        train(model, optimizer, steps=2)
        expected, plain, _ = plain_run(OPTIMIZERS["adamw"], steps=2)
        assert_equal_state(optimizer, expected, plain)


def test_a_record_of_one_piece_is_held_for_its_neighbours() -> None:
    model = make_model()
    with open_engine() as engine:
        optimizer = wrap(model, OPTIMIZERS["adamw"](trainable(model)), engine)
        train(model, optimizer, steps=2)
        shard, _ = optimizer.index.pieces["embed.weight"][0]
        slab = Slab(optimizer.layout.shards[shard].slot_bytes)
        cursor = RecordCursor(optimizer.records, optimizer.layout.shards, slab.buffer)
        cursor.part(shard, slice(0, 8))
        read = engine.store(Tier.HOST).statistics().bytes_read
        cursor.at(shard)
        assert engine.store(Tier.HOST).statistics().bytes_read == read
        slab.close()


def test_what_cannot_be_read_says_that_its_write_failed() -> None:
    with trained_in_pieces() as (_, optimizer):
        _, extent = optimizer.records.home(optimizer.index.pieces["embed.weight"][0][0])
        for chunk in list(extent.chunks.values()):
            extent.retract(chunk.offset, chunk.nbytes)
        extent.failures = {0: OffloadError("the disk died")}
        with pytest.raises(ExtentStateError, match="last write failed: the disk died"):
            optimizer.read_state("embed.weight", "exp_avg_sq")
