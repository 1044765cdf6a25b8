from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtrain.planner.gpus import accelerator
from memtrain.planner.roofline import (
    attention_flops,
    attention_seconds,
    cpu_update_seconds,
    matmul_seconds,
    memory_seconds,
    update_bytes,
)

# 100 and 50 TFLOP/s of which half is reached, 1 TB/s of which 0.8 is reached.
TOY = accelerator("a100-40gb-sxm").given(
    {
        "half_flops_per_second": 100e12,
        "single_flops_per_second": 50e12,
        "memory_bytes_per_second": 1e12,
        "matmul_efficiency": 0.5,
        "attention_forward_efficiency": 0.4,
        "attention_backward_efficiency": 0.25,
        "memory_efficiency": 0.8,
    }
)


def test_the_longer_of_arithmetic_and_memory_counts() -> None:
    assert matmul_seconds(TOY, 100e12) == pytest.approx(2.0)
    assert matmul_seconds(TOY, 100e12, single=True) == pytest.approx(4.0)
    assert matmul_seconds(TOY, 100e12, 1.6e12) == pytest.approx(2.0)  # tie
    assert matmul_seconds(TOY, 100e12, 2.4e12) == pytest.approx(3.0)
    assert memory_seconds(TOY, 0.4e12) == pytest.approx(0.5)


def test_a_real_gpu_by_hand() -> None:
    # A 4096 x 4096 x 4096 product, 2 * 4096^3 FLOPs, on an A100 that reaches 0.869 of 312 TFLOP/s.
    seconds = matmul_seconds(accelerator("a100-80gb-sxm"), 2 * 4096**3, 3 * 2 * 4096**2)
    assert seconds == pytest.approx(137438953472 / 271.128e12)


def test_attention_flops_by_hand() -> None:
    common = {"batch": 2, "heads": 3, "head_size": 8}
    assert attention_flops(**common, queries=10, keys=10, causal=False) == 4 * 2 * 3 * 8 * 100
    assert attention_flops(**common, queries=10, keys=10, causal=True) == 4 * 2 * 3 * 8 * 50
    # The last 4 of 10 positions see 6 to 10 keys, 8 on average.
    assert attention_flops(**common, queries=4, keys=10, causal=True) == 4 * 2 * 3 * 8 * 32
    with pytest.raises(ValueError, match="causal attention of 5 queries over 4 keys"):
        attention_flops(**common, queries=5, keys=4, causal=True)


def test_windows_by_hand() -> None:
    common = {"batch": 1, "heads": 1, "head_size": 1}
    # Ten positions, three keys each; the first three see 1.5 on average instead: 30 - 4.5.
    assert attention_flops(**common, queries=10, keys=10, causal=True, window=3) == 4 * 25.5
    # The last four see a whole window each.
    assert attention_flops(**common, queries=4, keys=10, causal=True, window=3) == 4 * 12
    # Positions 6 to 10 under a window of 8: 6.5 and 7.5, then 8 and 8.
    assert attention_flops(**common, queries=4, keys=10, causal=True, window=8) == 4 * 30
    assert attention_flops(**common, queries=10, keys=10, causal=False, window=3) == 4 * 30
    assert attention_flops(**common, queries=10, keys=10, causal=True, window=10) == 4 * 50


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 300))
def test_cutting_queries_cuts_the_same_work(first: int, second: int, window: int) -> None:
    def pairs(queries: int, keys: int) -> float:
        return attention_flops(
            batch=1, heads=1, head_size=1, queries=queries, keys=keys, causal=True, window=window
        )

    whole = pairs(first + second, first + second)
    assert whole == pytest.approx(pairs(first, first) + pairs(second, first + second))


def test_attention_passes() -> None:
    assert attention_seconds(TOY, 40e12) == pytest.approx(1.0)
    assert attention_seconds(TOY, 40e12, backward=True) == pytest.approx(2.5 * 40e12 / 25e12)


def test_updates_by_hand() -> None:
    mixed = update_bytes(gradient_bytes=2, weight_bytes=2, master_bytes=4, moment_bytes=8)
    assert mixed == (2 + 4 + 8) + (4 + 2 + 8) == 28
    plain = update_bytes(gradient_bytes=4, weight_bytes=4, master_bytes=0, moment_bytes=8)
    assert plain == (4 + 4 + 8) + (4 + 8) == 28
    # A billion parameters: 28 GB at 0.8 TB/s on the GPU, at 140 GB/s on the processor.
    assert memory_seconds(TOY, 1e9 * mixed) == pytest.approx(0.035)
    assert cpu_update_seconds(1e9 * mixed, 140e9) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="bytes_per_second must be above 0, got 0"):
        cpu_update_seconds(1, 0)


def test_a_published_step_is_near_the_roofline_and_below_it() -> None:
    """MEMO (arXiv 2407.12117): Llama 7B, 1 Mi tokens on 8 A800, MFU 52.30 %; here without any message."""
    gpu, tokens, layers, hidden = accelerator("a800-80g"), 2**20, 32, 4096
    attention = layers * attention_flops(
        batch=1, heads=32, head_size=128, queries=tokens, keys=tokens, causal=True
    )
    products = 2 * tokens * layers * (4 * hidden**2 + 3 * hidden * 11008)
    seconds = (
        attention_seconds(gpu, attention)
        + attention_seconds(gpu, attention, backward=True)
        + matmul_seconds(gpu, 3 * products)
    )
    utilization = 3 * (attention + products) / seconds / gpu.half_flops_per_second.value
    assert 0.523 < utilization < 0.58
