from __future__ import annotations

import numpy as np
import pytest

from memtrain.planner.codecs import GROUP, QUANTISERS, codec_rate, codecs
from memtrain.planner.gpus import accelerator

A100 = accelerator("a100-80g")


def test_bytes_count_the_scales() -> None:
    int8, int4 = QUANTISERS
    # 128 values of two bytes: 128 codes and a scale of two bytes, or 64 and two.
    assert int8.ratio(2) == (128 + 2) / 256
    assert int4.ratio(2) == (64 + 2) / 256
    assert int4.ratio(4) == (64 + 2) / 512


@pytest.mark.parametrize("quantiser", QUANTISERS, ids=lambda q: q.name)
def test_the_error_is_that_of_normally_distributed_values(quantiser: object) -> None:
    assert quantiser in QUANTISERS
    found = QUANTISERS[QUANTISERS.index(quantiser)]  # type: ignore[arg-type]
    values = np.random.default_rng(0).standard_normal((20_000, GROUP))
    most = 2 ** (found.bits - 1) - 1
    step = np.abs(values).max(axis=1, keepdims=True) / most
    rounded = np.round(values / step) * step
    measured = np.sqrt(((values - rounded) ** 2).mean())
    assert found.error == pytest.approx(measured, rel=0.02)


def test_rates_are_those_of_the_memory() -> None:
    (codec,) = codecs(["int8"], A100, element_bytes=2, places=("host",))
    copy = A100.memory_bytes_per_second.value * A100.memory_efficiency.value
    assert codec.compress_bytes_per_second == pytest.approx(copy / (1 + 130 / 256))
    assert codec.decompress_bytes_per_second == codec.compress_bytes_per_second
    assert codec.places == ("host",)
    assert codec_rate(A100, 0.5).source.startswith("assumption:")


def test_a_codec_named_twice_counts_once() -> None:
    assert [codec.name for codec in codecs(["int4", "int8", "int4"], A100, element_bytes=2)] == [
        "int4",
        "int8",
    ]


def test_an_unknown_codec_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"no codec is called 'int7'; did you mean int8.*known are int8, int4"
    ):
        codecs(["int7"], A100, element_bytes=2)
