"""The 7 B benchmark's own arithmetic: sizes, mixes, and what it takes for a run that failed."""

from __future__ import annotations

import importlib
from collections import namedtuple
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
Extent = namedtuple("Extent", "name")
Buffer = namedtuple("Buffer", "numel")


@pytest.fixture
def seven_billion(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("seven_billion")


def test_the_model_has_the_parameters_of_llama_2_7b(seven_billion: ModuleType) -> None:
    assert seven_billion.parameter_count(32) == 6_738_415_616


def test_what_passes_the_store_is_counted_by_class_and_direction(seven_billion: ModuleType) -> None:
    seen = []

    class Store:
        def read(self, extent: Extent, buffer: Buffer, offset: int = 0) -> str:
            seen.append(("read", extent.name, offset))
            return "ticket"

        def write(self, extent: Extent, buffer: Buffer, offset: int = 0) -> str:
            seen.append(("write", extent.name, offset))
            return "ticket"

    store = Store()
    door = seven_billion.Door(store)
    for name, size in (("weight a", 3), ("gradient of a", 5), ("layers.0 shard 1", 7), ("weight b", 11)):
        assert store.read(Extent(name), Buffer(lambda size=size: size)) == "ticket"
    store.write(Extent("activations of layers.0"), Buffer(lambda: 2), 4096)
    assert door.moved == {"weights read": 14, "gradients read": 5, "moments read": 7, "activations write": 2}
    assert seen[-1] == ("write", "activations of layers.0", 4096)
    assert seven_billion.read_percent(dict(door.moved)) == 93  # 26 of 28


@pytest.mark.parametrize("losses", [[1.0, float("nan")], [2.0, 2.0], [3.0, 200.0]])
def test_losses_that_say_nothing_are_no_result(seven_billion: ModuleType, losses: list[float]) -> None:
    report = {
        "parameters": seven_billion.parameter_count(2),
        "steps": [{"loss": loss} for loss in losses],
    }
    with pytest.raises(seven_billion.BenchmarkError, match="not finite, or do not change"):
        seven_billion.check(report, 2)
    seven_billion.check({**report, "steps": [{"loss": 3.0}, {"loss": 2.0}]}, 2)
    with pytest.raises(seven_billion.BenchmarkError, match="expected"):
        seven_billion.check({**report, "parameters": 1}, 2)
