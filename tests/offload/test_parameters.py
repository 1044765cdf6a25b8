"""Streamed weights: losses, gradients and weights are those of plain PyTorch, and memory is bounded."""

from __future__ import annotations

import copy
import ctypes
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from memtrain.offload import away
from memtrain.offload.errors import PlanMismatchError, WeightAwayError
from memtrain.offload.parameters import ParameterStreamer
from memtrain.offload.weight_units import window_bytes
from memtrain.optim import FRUGAL, AdamW8bit, Fira, GaLore
from memtrain.planner import resident
from memtrain.planner.actions import Tier, UpdateSchedule
from tests.offload.optimizer_runs import AHEAD, SEQUENTIAL
from tests.offload.streamed import (
    DEPTH,
    STREAMED,
    VOCABULARY,
    WIDTH,
    assert_same,
    assert_same_weights,
    batches,
    llama,
    open_engine,
    plain_steps,
    stream,
    streamed_optimizer,
    streamed_steps,
    units_of,
)

BLOCK_BYTES = 4 * (4 * WIDTH * WIDTH + 3 * WIDTH * 384)
TABLE_BYTES = 4 * VOCABULARY * WIDTH


GRID: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "galore": lambda p: GaLore(p, lr=1e-2, rank=8, update_proj_gap=2),
    "frugal": lambda p: FRUGAL(p, lr=1e-2, density=0.25, update_gap=2),
    "adamw 8-bit": lambda p: AdamW8bit(p, lr=1e-2),
    "fira": lambda p: Fira(p, lr=1e-2, rank=8, update_proj_gap=2),
}


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, foreach=False)


def passes(model: nn.Module, count: int = 2) -> list[torch.Tensor]:
    """Losses of several passes, and the accumulated gradients."""
    found = []
    for tokens in batches(count):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        found.append(loss.detach())
    return found + [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("tier", [Tier.HOST, Tier.NVME])
@pytest.mark.parametrize("slots", [2, 3, 5, 20])
@pytest.mark.parametrize("tied", [False, True])
def test_passes_are_bit_equal(tied: bool, slots: int, tier: Tier, tmp_path: Path) -> None:
    plain, model = llama(tied=tied), llama(tied=tied)
    expected = passes(plain)
    with open_engine(tmp_path) as engine:
        streamer = stream(model, engine, slots=slots, tier=tier)
        assert_same(expected, passes(model))
        statistics = streamer.statistics()
        assert statistics.peak_in_use == min(slots, DEPTH + 2 - tied)
        assert statistics.bytes_written == DEPTH * BLOCK_BYTES + (2 - tied) * TABLE_BYTES
        assert engine.store(tier).statistics().bytes_written == statistics.bytes_written
        assert_same_weights(plain, streamer, model)
        streamer.remove()
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            assert type(q) is nn.Parameter
            assert torch.equal(p, q)
            assert torch.equal(p.grad, q.grad)
        assert engine.store(tier).used_bytes == 0
        assert not any("forward" in module.__dict__ for module in model.modules())
    assert_same([tensor.detach() for tensor in passes(plain)], passes(model))


@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD])
@pytest.mark.parametrize("slots", [2, 3, 20])
@pytest.mark.parametrize("tied", [False, True])
def test_training_is_bit_equal(tied: bool, slots: int, schedule: UpdateSchedule) -> None:
    plain, model = llama(tied=tied), llama(tied=tied)
    expected = plain_steps(plain, adamw, accumulate=2, max_norm=0.5)
    with open_engine() as engine:
        streamer = stream(model, engine, slots=slots)
        with streamed_optimizer(model, streamer, engine, adamw, schedule=schedule) as optimizer:
            assert_same(expected, streamed_steps(model, optimizer, accumulate=2, max_norm=0.5))
            assert_same_weights(plain, streamer, model)
            assert streamer.statistics().peak_in_use <= slots


@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD])
@pytest.mark.parametrize("slots", [2, 3, 20])
def test_masters_are_bit_equal(slots: int, schedule: UpdateSchedule, tmp_path: Path) -> None:
    plain, model = llama(tied=True, dtype=torch.bfloat16), llama(tied=True, dtype=torch.bfloat16)
    expected = plain_steps(plain, adamw, max_norm=0.5, master=True)
    with open_engine(tmp_path) as engine:
        streamer = stream(model, engine, slots=slots, tier=Tier.NVME)
        with streamed_optimizer(
            model, streamer, engine, adamw, schedule=schedule, state_tier=Tier.NVME, master_weights=True
        ) as optimizer:
            assert_same(expected, streamed_steps(model, optimizer, max_norm=0.5))
            assert_same_weights(plain, streamer, model)


@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD])
@pytest.mark.parametrize("kind", ["galore", "frugal", "adamw 8-bit", "fira"])
def test_optimizers_of_the_grid(kind: str, schedule: UpdateSchedule) -> None:
    make = GRID[kind]
    plain, model = llama(tied=True), llama(tied=True)
    expected = plain_steps(plain, make, max_norm=0.5)
    with open_engine() as engine:
        streamer = stream(model, engine, slots=2)
        with streamed_optimizer(model, streamer, engine, make, schedule=schedule) as optimizer:
            assert_same(expected, streamed_steps(model, optimizer, max_norm=0.5))
            assert_same_weights(plain, streamer, model)


def freeze(model: nn.Module, *patterns: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(pattern in name for pattern in patterns))
    return model


@pytest.mark.parametrize("schedule", [SEQUENTIAL, AHEAD])
@pytest.mark.parametrize("master", [False, True])
def test_what_is_frozen_is_never_written(schedule: UpdateSchedule, master: bool) -> None:
    """Blocks 0 and 2 whole, of the others all but one matrix, and the table: a prologue without gradient."""
    frozen = ("layers.0.", "layers.2.", "mlp", "k_proj", "v_proj", "o_proj", "embed_tokens", "lm_head")
    dtype = torch.bfloat16 if master else torch.float32
    plain, model = (freeze(llama(dtype=dtype), *frozen) for _ in range(2))
    expected = plain_steps(plain, adamw, steps=3, master=master)
    with open_engine() as engine:
        streamer = stream(model, engine, slots=2)
        first = streamer.statistics().bytes_written
        with streamed_optimizer(
            model, streamer, engine, adamw, schedule=schedule, master_weights=master
        ) as optimizer:
            assert_same(expected, streamed_steps(model, optimizer, steps=3))
            assert_same_weights(plain, streamer, model)
            streamer.flush()
        matrix = WIDTH * WIDTH * dtype.itemsize
        assert streamer.statistics().bytes_written - first == 3 * 2 * matrix  # q_proj of blocks 1 and 3


def test_with_masters_an_update_reads_no_weights() -> None:
    model = llama(dtype=torch.bfloat16)
    with open_engine() as engine:
        streamer = stream(model, engine, slots=2)
        with streamed_optimizer(model, streamer, engine, adamw, master_weights=True) as optimizer:
            tokens = batches(1)[0]

            def step() -> tuple[int, int]:
                model(input_ids=tokens, labels=tokens).loss.backward()
                before = streamer.statistics()
                optimizer.step()
                streamer.flush()
                optimizer.zero_grad()
                after = streamer.statistics()
                return after.reads - before.reads, after.bytes_written - before.bytes_written

            every = (DEPTH * BLOCK_BYTES + 2 * TABLE_BYTES) // 2
            first, written = step()  # masters are made of the weights
            assert first >= DEPTH
            assert written == every
            assert step() == (0, every)


def test_passes_read_each_unit_no_more_than_they_must() -> None:
    model = llama()
    with open_engine() as engine:
        streamer = stream(model, engine, slots=3)
        tokens = batches(1)[0]

        def reads() -> int:
            before = streamer.statistics().reads
            model(input_ids=tokens, labels=tokens).loss.backward()
            return streamer.statistics().reads - before

        reads()
        # Six forward; backward finds the head and two blocks where forward left them, and wants no table. It
        # leaves block 0 and 1 and, read ahead for what comes next, the table: forward reads four.
        assert reads() == 3 + 3


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_masters_make_anew_ahead_of_a_forward_is_not_read_ahead(accumulate: int) -> None:
    plain, model = (llama(dtype=torch.bfloat16) for _ in range(2))
    expected = plain_steps(plain, adamw, steps=4, accumulate=accumulate, master=True)
    found, reads = [], []
    data = iter(batches(4 * accumulate))
    with open_engine() as engine:
        streamer = stream(model, engine, slots=3)
        with streamed_optimizer(
            model, streamer, engine, adamw, schedule=AHEAD, master_weights=True
        ) as optimizer:
            for _ in range(4):
                before = streamer.statistics().reads
                for _ in range(accumulate):
                    tokens = next(data)
                    loss = model(input_ids=tokens, labels=tokens).loss
                    (loss / accumulate).backward()
                    found.append(loss.detach())
                optimizer.step()
                optimizer.zero_grad()
                reads.append(streamer.statistics().reads - before)
            optimizer.flush()
            assert_same(expected, found)
            assert_same_weights(plain, streamer, model)
    # The update of the second step is the first that makes weights anew: of the first it made masters. A pass
    # reads three forward, which the first of a step need not, and three behind it.
    assert reads[2:] == [6 * accumulate - 3] * 2


def resident_bytes(start: int, nbytes: int) -> int:
    """Of an address range, in memory now."""
    libc = ctypes.CDLL(None, use_errno=True)
    pages = (ctypes.c_ubyte * (nbytes // 4096))()
    if libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(nbytes), pages):
        raise OSError(ctypes.get_errno(), "mincore")
    return 4096 * sum(page & 1 for page in pages)


def test_memory_is_that_of_the_windows(tmp_path: Path) -> None:
    """Twelve blocks through two windows: the process shrinks by what is on the tier."""
    model = llama(depth=12)
    weights = 12 * BLOCK_BYTES + 2 * TABLE_BYTES
    with open_engine(tmp_path) as engine:
        before = anonymous_bytes()
        streamer = stream(model, engine, slots=2, tier=Tier.NVME)
        assert streamer.windows[-1].slot_bytes == BLOCK_BYTES == window_bytes(units_of(model)[1][1])
        freed = before - anonymous_bytes()
        assert freed >= weights - 2 * BLOCK_BYTES - (2 << 20)
        with torch.no_grad():
            model(batches(1)[0])
        assert before - anonymous_bytes() >= weights - 2 * BLOCK_BYTES - (4 << 20)
        slab = streamer._pool._slab
        assert slab.nbytes == 2 * BLOCK_BYTES
        assert resident_bytes(slab.address, slab.nbytes) <= 2 * BLOCK_BYTES
        for parameter in model.parameters():
            if type(parameter) is not nn.Parameter:
                assert parameter.untyped_storage().nbytes() in (0, parameter.nbytes)
        away = [p for p in model.parameters() if p.untyped_storage().nbytes() == 0]
        assert sum(p.nbytes for p in away) == weights - sum(
            p.nbytes
            for unit in streamer._units.values()
            if unit.ready
            for _, p in [(w.name, w.parameter) for w in unit.weights]
        )
        streamer.close()


def anonymous_bytes() -> int:
    resident.trim()  # matrices of these sizes come from the heap, which keeps what is freed
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise AssertionError


@pytest.mark.parametrize(
    "use",
    [
        lambda p: p + 1,
        lambda p: torch.nn.functional.linear(torch.ones(1, p.shape[1]), p),
        lambda p: p.detach(),
        lambda p: p.data,
        lambda p: p.data_ptr(),
        lambda p: p.clone(),
        lambda p: p[0],
        lambda p: p.sum().item(),
        lambda p: p.numpy(),
        lambda p: p.to(torch.float64),
        lambda p: torch._foreach_mul([p], 2.0),
        lambda p: torch.ops.aten.add(p, p),
        lambda p: copy.deepcopy(p),
        lambda p: pickle.dumps(p),
        lambda p: p.add_(1.0),
        lambda p: list(p),
        lambda p: p.tolist(),
        lambda p: torch.stack([p, p]),
        lambda p: torch.empty(p.shape).copy_(p),
    ],
)
@pytest.mark.parametrize("present", [False, True])
def test_a_weight_that_is_away_is_named(present: bool, use: Callable[[nn.Parameter], Any]) -> None:
    model = llama(depth=2)
    with open_engine() as engine:
        streamer = stream(model, engine, slots=2)
        with streamer.hold("model.layers.0"):
            pass
        if present:
            streamer.fetch("model.layers.0")
        else:
            streamer.fetch("model.layers.1")
            streamer.fetch("epilogue")
        weight = model.model.layers[0].mlp.up_proj.weight
        with pytest.raises(
            WeightAwayError,
            match=r"layers\.0\.mlp\.up_proj\.weight.*on host.*streamer\.hold\('model\.layers\.0'\)",
        ):
            use(weight)
        with streamer.hold("model.layers.0"):
            assert type(weight) is nn.Parameter


def test_what_needs_no_bytes_is_answered() -> None:
    plain, model = llama(depth=2), llama(depth=2)
    with open_engine() as engine:
        stream(model, engine, slots=2)
        for (name, p), (other, q) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
            assert name == other
            assert (p.shape, p.dtype, p.device, p.stride()) == (q.shape, q.dtype, q.device, q.stride())
            assert q.is_leaf
            assert q.requires_grad
            assert isinstance(q, nn.Parameter)
            assert hash(q) == id(q)
            assert torch.zeros_like(q).shape == p.shape
        assert "on host" in repr(model.lm_head.weight)
        with pytest.raises(WeightAwayError, match=r"streamer\.hold"):
            model.state_dict()
        with pytest.raises(WeightAwayError):
            copy.deepcopy(model)
        with pytest.raises(WeightAwayError):
            model.double()
        assert model.to("cpu") is model.to("cpu", torch.float32) is model  # where it is already
        for other in ("meta", torch.float64):
            with pytest.raises(WeightAwayError, match="to needs the bytes"):
                model.lm_head.weight.to(other)
        with pytest.raises(WeightAwayError):
            model.lm_head.weight.to("cpu", copy=True)
        assert isinstance(model.lm_head.weight, away.AwayParameter)


def test_some_units_stay() -> None:
    plain, model = llama(), llama()
    expected = plain_steps(plain, adamw)
    with open_engine() as engine:
        streamer = stream(model, engine, slots=2, units=["model.layers.1", "model.layers.3"])
        assert type(model.model.layers[0].mlp.up_proj.weight) is nn.Parameter
        with streamed_optimizer(model, streamer, engine, adamw, schedule=AHEAD) as optimizer:
            assert_same(expected, streamed_steps(model, optimizer))
            assert_same_weights(plain, streamer, model)


def test_several_tiers(tmp_path: Path) -> None:
    plain, model = llama(), llama()
    expected = passes(plain)
    tiers = dict(zip(STREAMED, itertools.cycle([Tier.NVME, Tier.HOST, Tier.DEVICE]), strict=False))
    with open_engine(tmp_path) as engine:
        streamer = stream(model, engine, slots=2, tiers=tiers)
        assert_same(expected, passes(model))
        assert all(engine.store(tier).used_bytes for tier in engine.tiers)
        streamer.remove()


def test_changes_by_the_user_are_kept() -> None:
    """In place under ``hold``: by version where autograd counts, by mark where it does not."""
    plain, model = llama(), llama()
    with open_engine() as engine:
        streamer = stream(model, engine, slots=2)
        written = streamer.statistics().bytes_written
        for one in (plain, model):
            weights = one.model.layers[0].mlp
            with streamer.hold("model.layers.0"), torch.no_grad():
                weights.up_proj.weight.mul_(2.0)
            with streamer.hold("model.layers.1"):
                one.model.layers[1].mlp.up_proj.weight.data.fill_(0.25)
                if one is model:
                    streamer.mark_dirty("model.layers.1")
        with torch.no_grad():
            assert torch.equal(plain(batches(1)[0]).logits, model(batches(1)[0]).logits)
        streamer.flush()
        matrix = 4 * WIDTH * 384
        assert streamer.statistics().bytes_written - written == matrix + BLOCK_BYTES
        assert_same_weights(plain, streamer, model)


def test_masters_follow_what_is_marked() -> None:
    """Otherwise the next update would be of the masters alone, and never look at the weights."""
    model, found = llama(dtype=torch.bfloat16), []
    with open_engine() as engine:
        streamer = stream(model, engine, slots=2)
        weight = model.model.layers[1].mlp.up_proj.weight
        with streamed_optimizer(
            model, streamer, engine, lambda p: torch.optim.SGD(p, lr=0.0), master_weights=True
        ) as optimizer:
            found += streamed_steps(model, optimizer, steps=1)
            with streamer.hold("model.layers.1"):
                weight.data.fill_(0.25)
                streamer.mark_dirty("model.layers.1")
            optimizer.param_groups[0]["lr"] = 1e-6
            found += streamed_steps(model, optimizer, steps=1)
            with streamer.hold("model.layers.1"):
                assert (weight.detach() - 0.25).abs().max() < 1e-3
        streamer.remove()


def test_an_ordinary_optimizer_may_step_what_is_held() -> None:
    plain, model = llama(), llama()
    expected = plain_steps(plain, lambda p: torch.optim.SGD(p, lr=0.1), steps=2)
    data, found = iter(batches(2)), []
    with open_engine() as engine:
        streamer = stream(model, engine, slots=2)
        for _ in range(2):
            tokens = next(data)
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            found.append(loss.detach())
            for unit, members in units_of(model):
                with streamer.hold(unit):
                    torch.optim.SGD([p for _, p in members], lr=0.1).step()
            model.zero_grad()
        assert_same(expected, found)
        assert_same_weights(plain, streamer, model)


def test_what_cannot_be_streamed_is_refused_by_name() -> None:
    with open_engine() as engine:
        model = llama()
        with pytest.raises(PlanMismatchError, match="at least 2 for this model, got 1"):
            stream(model, engine, slots=1)
        with pytest.raises(PlanMismatchError, match="'layers', which is no unit"):
            stream(model, engine, units=["layers"])
        weight = model.model.layers[1].mlp.up_proj.weight
        with torch.no_grad():
            weight.data = weight.data.t().contiguous().t()
        with pytest.raises(PlanMismatchError, match=r"layers\.1\.mlp\.up_proj\.weight is not contiguous"):
            stream(model, engine)
        weight.data = weight.data.contiguous()
        streamer = stream(model, engine)
        with pytest.raises(PlanMismatchError, match="streamed already"):
            stream(model, engine)
        with pytest.raises(PlanMismatchError, match=r"no unit 'layers\.1'"):
            streamer.fetch("layers.1")
        streamer.remove()
        assert engine.store(Tier.HOST).used_bytes == 0
        small = nn.Linear(8, 8)
        units = [("block", list(small.named_parameters()))]
        with pytest.raises(PlanMismatchError, match="no parameter of at least 65536"):
            ParameterStreamer(
                small, [("block", small)], units, tiers={"block": Tier.HOST}, engine=engine, slots=2
            )


def test_close_leaves_the_weights() -> None:
    model = llama()
    with open_engine() as engine:
        streamer = stream(model, engine)
        streamer.close()
        streamer.close()
        assert engine.store(Tier.HOST).used_bytes == 0
        with pytest.raises(WeightAwayError, match=r"embed_tokens\.weight, which are gone.*closed"):
            model(batches(1)[0])
