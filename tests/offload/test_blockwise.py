"""State in quantised blocks, streamed piece by piece: bit for bit as whole parameters, whatever the cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from memtrain.offload.async_snapshot import AsyncCheckpointer
from memtrain.offload.optimizer_probe import is_elementwise, state_cuts
from memtrain.offload.shards import StateTensor
from memtrain.offload.snapshot import load_checkpoint, save_checkpoint
from memtrain.offload.state_cuts import SHARED, find_cuts
from memtrain.optim import AdamW, AdamW8bit, GridOptimizer
from memtrain.optim.kernels import native
from memtrain.optim.piece_cell import PieceCell
from memtrain.planner.actions import Tier, UpdateSchedule
from tests.offload.async_runs import assert_same_folders, nvme_run
from tests.offload.optimizer_runs import AHEAD, SEQUENTIAL, assert_equal_models, assert_equal_state, train
from tests.offload.snapshot_runs import assert_same, open_run
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

MOMENTS = ("exp_avg", "exp_avg_sq")
EIGHT = {f"{name}.{part}": per for name in MOMENTS for part, per in (("codes", 1), ("scales", 128))}
FOUR = {f"{name}.{part}": per for name in MOMENTS for part, per in (("codes", 2), ("scales", 128))}
PLAIN = {f"{name}.value": 1 for name in MOMENTS}

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, tuple[Make, dict[str, int]]] = {
    "8 bits": (lambda p: AdamW8bit(p, lr=1e-2), EIGHT),
    "4 bits": (lambda p: AdamW(p, lr=1e-2, state_dtype="int4"), FOUR),
    "bf16": (lambda p: AdamW(p, lr=1e-2, state_dtype="bf16"), PLAIN),
    "8 bits of Lion": (
        lambda p: GridOptimizer(p, lr=1e-3, rule="lion", state_dtype="int8"),
        {"momentum.codes": 1, "momentum.scales": 128},
    ),
    "24-bit masters": (
        lambda p: AdamW8bit(p, lr=1e-2, master="split24"),
        {**EIGHT, "master.correction": 1},
    ),
}
KINDS = [
    (kind, dtype)
    for kind, dtype in product(OPTIMIZERS, [torch.float32, torch.bfloat16])
    if kind != "24-bit masters" or dtype == torch.bfloat16
]
FINE = dataclasses.replace(STAGING, update_shard_elements=6144)
"""Pieces of 2048 to 6144 elements, and tails of fewer than a parameter must have for quantised state."""


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_a_trial_finds_how_state_is_cut(kind: str, dtype: torch.dtype) -> None:
    make, cuts = OPTIMIZERS[kind]
    optimizer = make([nn.Parameter(torch.ones(64, 32, dtype=dtype))])
    assert state_cuts(optimizer, optimizer.param_groups[0], dtype) == cuts


@pytest.mark.parametrize(
    ("kind", "dtype", "schedule"),
    [(*found, SEQUENTIAL) for found in KINDS] + [("8 bits", torch.bfloat16, AHEAD)],
)
def test_fine_cuts_equal_plain_pytorch(kind: str, dtype: torch.dtype, schedule: UpdateSchedule) -> None:
    make = OPTIMIZERS[kind][0]
    expected, plain, _ = plain_run(make, steps=2, dtype=dtype)
    model = make_model(dtype)
    with open_engine() as engine:
        optimizer = wrap(model, make(trainable(model)), engine, make_plan(schedule, staging=FINE))
        sizes = {
            piece.elements
            for shard in optimizer.index.all_shards()
            if not shard.small
            for piece in shard.pieces
        }
        assert {2048, 6144} <= sizes
        assert any(2048 < size < 4096 for size in sizes)
        train(model, optimizer, steps=2)
        assert_equal_models(model, expected)
        assert_equal_state(optimizer, model, plain)
        optimizer.close()


def test_under_masters_of_the_executor() -> None:
    make = OPTIMIZERS["8 bits"][0]
    expected, plain, _ = plain_run(make, steps=3, dtype=torch.bfloat16, master=True)
    model = make_model(torch.bfloat16)
    with open_engine() as engine:
        optimizer = wrap(model, make(trainable(model)), engine, make_plan(staging=FINE), master_weights=True)
        assert optimizer.layout.elementwise
        train(model, optimizer, steps=3)
        assert_equal_models(model, expected)
        assert_equal_state(optimizer, model, plain)
        optimizer.close()


def test_groups_of_several_formats() -> None:
    """Each parameter is cut as its own group's state is."""

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return AdamW8bit(
            [{"params": parameters[:2], "state_dtype": "fp32"}, {"params": parameters[2:]}], lr=1e-2
        )

    expected, plain, _ = plain_run(make, steps=3)
    model = make_model()
    with open_engine() as engine:
        optimizer = wrap(model, make(trainable(model)), engine, make_plan(staging=FINE))
        train(model, optimizer, steps=3)
        assert_equal_models(model, expected)
        assert_equal_state(optimizer, model, plain)
        optimizer.close()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: AdamW8bit(p, lr=1e-2, master="fp32"),
        lambda p: AdamW8bit(p, lr=1e-2, path="reference"),
        lambda p: AdamW8bit(p, lr=1e-2, eps_on="uncorrected"),
    ],
)
def test_what_rounds_by_the_length_of_a_tensor_is_not_cut(make: Make) -> None:
    """Threads share a tensor by its length, and roots differ behind the last whole vector of one."""
    expected, plain, _ = plain_run(make, steps=3)
    model = make_model()
    with open_engine() as engine:
        optimizer = wrap(model, make(trainable(model)), engine)
        assert not optimizer.layout.elementwise
        train(model, optimizer, steps=3)
        assert_equal_models(model, expected)
        assert_equal_state(optimizer, model, plain)
        optimizer.close()


def _from_the_front(self: PieceCell, moment: str | None) -> int:
    return 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_piece_that_does_not_know_its_place_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Only where something is rounded at random does it matter."""
    monkeypatch.setattr(PieceCell, "first_entry", _from_the_front)
    optimizer = AdamW8bit([nn.Parameter(torch.ones(64, 32, dtype=dtype))], lr=1e-2)
    assert is_elementwise(optimizer, optimizer.param_groups[0], dtype) is (dtype == torch.float32)


def test_pieces_begin_with_blocks_and_are_not_projected() -> None:
    settings = AdamW8bit([nn.Parameter(torch.ones(8))], lr=1e-2)._plans[0].settings
    shape = torch.Size((64, 128))
    with pytest.raises(ValueError, match="multiple of 128 elements, got 100"):
        PieceCell(settings, shape, 100, 64, torch.float32)
    projected = dataclasses.replace(settings, projection="power", rank=4)
    with pytest.raises(ValueError, match=r"spans the parameter of shape \(64, 128\)"):
        PieceCell(projected, shape, 128, 64, torch.float32)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's plain form goes by pieces of its own, which begin with blocks too."""
    monkeypatch.setattr(native, "function", lambda *_: None)
    make = OPTIMIZERS["8 bits"][0]
    expected, plain, _ = plain_run(make, steps=2, dtype=torch.bfloat16)
    model = make_model(torch.bfloat16)
    with open_engine() as engine:
        optimizer = wrap(model, make(trainable(model)), engine, make_plan(staging=FINE))
        assert optimizer.layout.elementwise
        train(model, optimizer, steps=2)
        assert_equal_models(model, expected)
        assert_equal_state(optimizer, model, plain)
        optimizer.close()


@pytest.mark.parametrize("kind", ["8 bits", "4 bits"])
def test_a_checkpoint_of_one_cut_goes_on_under_another(kind: str, tmp_path: Path) -> None:
    """Whole tensors by name: written in fine pieces, read in coarse ones and by whole parameters."""
    make, data = OPTIMIZERS[kind][0], batches(4)
    with open_run(make_plan(staging=FINE), torch.bfloat16, make) as run:
        run.train(data[:2])
        save_checkpoint(tmp_path / "saved", run, progress={})
        run.train(data[2:])
        run.flush()
        for other in ({}, {"elementwise": False}):
            with open_run(None, torch.bfloat16, make, seed_weights=False, **other) as again:
                load_checkpoint(tmp_path / "saved", again)
                save_checkpoint(tmp_path / "again", again, progress={})
                assert_same_folders(tmp_path / "saved", tmp_path / "again")
                again.train(data[2:])
                assert_same(again, run)


@pytest.mark.parametrize("kind", ["8 bits", "4 bits"])
def test_a_snapshot_beside_training_is_the_synchronous_one(kind: str, tmp_path: Path) -> None:
    """Codes and scales of a piece go to two places of their files, at two granularities."""
    data = batches(4)
    with nvme_run(tmp_path / "swap", AHEAD, torch.bfloat16, make=OPTIMIZERS[kind][0]) as run:
        run.train(data[:2])
        run.flush()
        save_checkpoint(tmp_path / "expected", run, progress={})
        with AsyncCheckpointer(run, spare_bytes={Tier.NVME: 1 << 20}) as checkpointer:
            checkpointer.save(tmp_path / "snapshot", progress={})
            run.train(data[2:])
            checkpointer.wait()
        assert_same_folders(tmp_path / "expected", tmp_path / "snapshot")


def test_a_changed_state_is_counted_in_its_own_bytes() -> None:
    """One byte for each of two codes, and four for each of two scales of 128 elements."""
    model = make_model()
    with open_engine() as engine:
        optimizer = wrap(model, OPTIMIZERS["8 bits"][0](trainable(model)), engine, make_plan(staging=FINE))
        train(model, optimizer, steps=1)
        used = [
            p.numel()
            for name, p in model.named_parameters()
            if p.requires_grad and p.numel() >= 65536 and name != "unused"
        ]
        expected = sum(2 * count + 8 * -(-count // 128) for count in used)
        assert optimizer.records.changed_bytes[Tier.HOST] == expected
        optimizer.close()


# -- how cuts are read off states --------------------------------------------------------------------------

SHAPE, SIZES = torch.Size((3, 100)), [256, 44]


def _found(whole: torch.Tensor, parts: list[Any]) -> dict[str, int] | None:
    return find_cuts(SHAPE, {"x": whole}, SIZES, [{"x": part} for part in parts])


def test_lengths_say_how_a_tensor_is_cut() -> None:
    flat = torch.arange(300.0)
    assert _found(flat.view(SHAPE), [flat[:256], flat[256:]]) == {"x": 1}
    assert _found(flat[:150], [flat[:128], flat[128:150]]) == {"x": 2}
    assert _found(flat[:3], [flat[:2], flat[2:3]]) == {"x": 128}
    assert _found(flat[:7], [flat[:7], flat[:7]]) == {"x": SHARED}
    assert find_cuts(SHAPE, {"n": 3}, SIZES, [{"n": 3}, {"n": 3}]) == {}


@pytest.mark.parametrize(
    ("whole", "parts"),
    [
        (torch.arange(3.0), [torch.arange(2.0), torch.ones(1)]),  # other values
        (torch.arange(3.0), [torch.arange(2.0), torch.arange(2.0, 3.0).double()]),  # another type
        (torch.arange(300.0), [torch.arange(256.0), torch.arange(256.0, 300.0)]),  # flat, beside a matrix
        (torch.arange(100.0), [torch.arange(86.0), torch.arange(86.0, 100.0)]),  # blocks of three
        (torch.zeros(4), [torch.zeros(4), torch.ones(4)]),  # shared, and not alike
        (torch.zeros(4), [torch.zeros(4), 0.0]),
    ],
)
def test_other_states_may_not_be_cut(whole: torch.Tensor, parts: list[Any]) -> None:
    assert _found(whole, parts) is None


def test_states_with_other_keys_or_numbers_may_not_be_cut() -> None:
    assert find_cuts(SHAPE, {"n": 3}, SIZES, [{"n": 3}, {}]) is None
    assert find_cuts(SHAPE, {"n": 3}, SIZES, [{"n": 3}, {"n": 4}]) is None


def test_a_tensor_of_blocks_knows_its_shapes_and_places() -> None:
    model = make_model()
    with open_engine() as engine:
        optimizer = wrap(model, torch.optim.SGD(trainable(model), lr=0.1, momentum=0.9), engine)
        pieces = [piece for _, piece in optimizer.index.pieces["embed.weight"]]
        optimizer.close()
    assert len(pieces) > 1
    scales = StateTensor(key="scales", dtype=torch.float32, per=128)
    assert scales.shape_for((701, 101)) == (554,)
    assert [scales.start_of(piece) for piece in pieces] == [piece.start // 128 for piece in pieces]
    assert sum(scales.bytes_for(piece.shape) for piece in pieces) == 4 * 554
    whole = torch.arange(554.0)
    assert torch.equal(torch.cat([scales.part_of(whole, piece) for piece in pieces]), whole)
