"""Estimates against the real runs they stand for, to the byte, in every attention that a CPU can run."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("transformers")

from memtrain.planner.estimate import ModelEstimate
from memtrain.planner.trace import profile_model
from memtrain.planner.tracing import live_bytes
from memtrain.planner.tracing.estimator import estimate_config
from tests.planner.tracing_models import CONFIGS, ROWS, TOKENS, kernel, real_model, really_saved

BF16, F32 = torch.bfloat16, torch.float32


@functools.cache
def small(name: str, dtype: torch.dtype = BF16, attention: str = "default") -> ModelEstimate:
    return estimate_config(CONFIGS[name], batch=ROWS, sequence=TOKENS, dtype=dtype, attention=attention)


def combinations() -> Iterator[tuple[str, torch.dtype, str]]:
    """Every model in every attention that this machine can run."""
    for name in CONFIGS:
        for attention in ("default", "math", "eager"):
            if name != "mixed-windows" or attention != "math":  # Gemma 2's soft cap is beyond SDPA
                yield name, BF16, attention
    yield from ((name, F32, "default") for name in ("grouped", "window", "experts", "gpt2"))


@pytest.mark.parametrize(("name", "dtype", "attention"), list(combinations()))
def test_saved_bytes_are_those_of_the_real_run(name: str, dtype: torch.dtype, attention: str) -> None:
    found = small(name, dtype, attention)
    model, batch = real_model(CONFIGS[name], dtype, attention)
    with kernel(attention):
        assert found.saved_bytes == really_saved(model, lambda: model(**batch).loss, list(batch.values()))
    weights = sum(p.size_bytes for unit in found.units for p in unit.parameters)
    assert weights == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("name", ["grouped", "window", "mixed-windows", "experts", "gpt2"])
def test_blocks_are_what_the_profiler_measures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what this processor's kernels take for themselves."""
    monkeypatch.setattr(live_bytes, "with_peak", lambda call: (call(), 0))
    found = small(name)
    model, batch = real_model(CONFIGS[name], BF16, "default")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    profile = profile_model(model, batch, optimizer=optimizer, elementwise=True)
    for block, real in zip(found.blocks, profile.blocks, strict=True):
        part = found.classes[block.part]
        assert block.name == real.name
        assert part.saved_bytes == real.saved_bytes
        assert len(part.saved) == real.saved_tensors
        assert part.forward_peak_bytes == real.saved_bytes + real.forward_transient_bytes
        # The profiler holds the output's gradient to the end; between two blocks it dies with its last use.
        slack = real.saved_bytes + real.backward_transient_bytes - part.backward_peak_bytes
        assert 0 <= slack <= part.output_bytes


@pytest.mark.parametrize("name", ["dense", "grouped", "window"])
def test_the_formula_of_the_cpu_kernel_is_what_it_saves(name: str) -> None:
    for dtype in (F32, BF16):
        traced, formula = small(name, dtype, "sdpa"), small(name, dtype, "cpu")
        assert formula.saved_bytes == traced.saved_bytes
        for mine, real in zip(formula.classes, traced.classes, strict=True):
            assert mine.class_bytes() == real.class_bytes()
            assert [t.shape for t in mine.saved] == [t.shape for t in real.saved]
            assert mine.load() == real.load()
            assert mine.flops(backward=True) == real.flops(backward=True)
        sources = {t.source for t in formula.classes[0].saved}
        assert sources == {"fake trace", "formula: cpu"}
