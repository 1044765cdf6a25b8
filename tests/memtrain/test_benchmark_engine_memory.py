"""Staging of two engines by arithmetic: each number worked out by hand for one small model."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
Mi = 1 << 20


@pytest.fixture
def engine_memory(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("engine_memory")


def test_a_sub_group_is_closed_by_the_parameter_that_reaches_its_size(engine_memory: ModuleType) -> None:
    assert engine_memory.largest_sub_group([3, 3, 5, 1], 5) == 6  # 3 + 3; 5; 1
    assert engine_memory.largest_sub_group([3, 3, 5, 1], 1) == 5
    assert engine_memory.largest_sub_group([3, 3, 5, 1], 100) == 12


def test_two_blocks_and_an_embedding_by_hand(engine_memory: ModuleType) -> None:
    # An embedding of 8 Mi, two blocks of 2 Mi, 2 Mi, 1 Mi and a norm of 1024 elements that never moves.
    block = (2 * Mi, 2 * Mi, Mi, 1024)
    shapes = engine_memory.Shapes(parameters=(8 * Mi, *block, *block), block=block)
    elements = 8 * Mi + 2 * (5 * Mi + 1024)
    assert shapes.moving == (2 * Mi, 2 * Mi, Mi)

    least = engine_memory.deepspeed(shapes, least=True)
    assert least.optimizer == 4 * 8 * Mi * 4  # a group is a parameter, the embedding the largest
    assert least.parameters == 7 * 8 * Mi * 2  # 2 x 3 + 1 slots, each of the embedding's size
    assert least.gradients == 64 * Mi  # 36 MiB and a bit, rounded up to a power of two

    default = engine_memory.deepspeed(shapes, least=False)
    assert default.optimizer == 4 * elements * 4  # one group of everything
    assert default.parameters == 5 * 200_000_512  # 1e8 elements of two bytes, to 1024
    assert default.gradients == 64 * Mi

    assert engine_memory.by_parameter(shapes) == 4 * 2 * Mi * 2 + 2 * Mi * 2 + 8 * Mi * 2
    ours = engine_memory.memtrain(shapes, 36 * Mi)
    assert ours.optimizer == 6 * Mi * 16
    assert ours.gradients == 4 * 4 * Mi
    assert ours.total == (96 + 36 + 16) * Mi


def test_windows_by_hand(engine_memory: ModuleType) -> None:
    # Embedding and head of 8 Mi, blocks of 5 Mi and a norm that stays: three windows.
    block = (2 * Mi, 2 * Mi, Mi, 1024)
    parameters = (8 * Mi, *block, *block, 1024, 8 * Mi)
    shapes = engine_memory.Shapes(parameters=parameters, block=block, outside=((8 * Mi,), (1024, 8 * Mi)))
    assert engine_memory.windows(shapes, classes=False) == 3 * 16 * Mi
    assert engine_memory.windows(shapes, classes=True) == 16 * Mi + 2 * 10 * Mi
