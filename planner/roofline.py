"""Seconds of an operation on a GPU that is not here: FLOPs against the peak, bytes against the memory.

The roofline model (Williams et al., CACM 2009): an operation takes the longer of its arithmetic and its
memory traffic. Departures: both peaks are first multiplied by the fraction that somebody measured or that
is assumed (``Accelerator.*_efficiency``, each with its source), and attention kernels have fractions of
their own, forward and backward, because they reach less than plain matrix products and take most of a long
sequence's step. Launch overheads are left out: the result is for operations that are large.

Pure functions of plain numbers. ``Accelerator.given`` overrides a peak or an efficiency.
"""

from __future__ import annotations

from memtrain.planner.hardware import Accelerator

ATTENTION_BACKWARD_PER_FORWARD = 2.5
"""FLOPs of attention's backward per FLOP of its forward: five matrix products instead of two, because
the probabilities are computed again (FlashAttention-2, arXiv 2307.08691, section 4.1)."""


def matmul_seconds(
    device: Accelerator, flops: float, moved_bytes: float = 0.0, *, single: bool = False
) -> float:
    """A matrix product, or anything whose arithmetic is matrix products.

    Args:
        flops: two per multiply-add.
        moved_bytes: read and written in the device's memory.
        single: fp32 operands (TF32 where the device has it) instead of bf16 or fp16.
    """
    peak = device.single_flops_per_second if single else device.half_flops_per_second
    compute = flops / (peak.value * device.matmul_efficiency.value)
    return max(compute, memory_seconds(device, moved_bytes))


def memory_seconds(device: Accelerator, moved_bytes: float) -> float:
    """An operation that only moves bytes: a norm, an activation, an optimizer step over state on the GPU."""
    return moved_bytes / (device.memory_bytes_per_second.value * device.memory_efficiency.value)


def attention_flops(
    *,
    batch: int,
    heads: int,
    head_size: int,
    queries: int,
    keys: int,
    causal: bool,
    window: int | None = None,
) -> float:
    """FLOPs of one forward pass of attention: QK^T and PV, two FLOPs per multiply-add.

    4 * batch * heads * head_size * pairs, where pairs counts what kernels compute of queries x keys: all
    without a mask, half under a causal one (the convention of FlashAttention's benchmarks), and under a
    sliding ``window`` at most that many keys a query.

    Raises:
        ValueError: causal attention whose queries are not the last of the keys' positions.
    """
    if causal and queries > keys:
        raise ValueError(
            f"causal attention of {queries} queries over {keys} keys: give at least as many keys"
        )
    pairs = float(queries) * keys
    if causal:
        pairs -= queries * queries / 2  # the queries are the last of the keys' positions
    if window is not None and window < keys:
        # Under a causal mask the sequence's first queries see fewer keys than the window is wide.
        short = max(0, window - (keys - queries)) if causal else 0
        pairs = float(queries) * window - short * short / 2
    return 4 * batch * heads * head_size * pairs


def attention_seconds(device: Accelerator, forward_flops: float, *, backward: bool = False) -> float:
    """An attention kernel's pass; ``forward_flops`` are those of ``attention_flops`` for either pass."""
    peak = device.half_flops_per_second.value
    if backward:
        flops = ATTENTION_BACKWARD_PER_FORWARD * forward_flops
        return flops / (peak * device.attention_backward_efficiency.value)
    return forward_flops / (peak * device.attention_forward_efficiency.value)


def update_bytes(
    *, gradient_bytes: float, weight_bytes: float, master_bytes: float, moment_bytes: float
) -> float:
    """Memory traffic of one optimizer step: gradient, masters or weights, and moments in; all else out.

    Per element or for all of them, as the arguments are. ``master_bytes`` is 0 where the weights
    themselves are updated. AdamW with bf16 weights and gradients over fp32 masters and moments: 2 + 4 + 8
    read, 4 + 2 + 8 written, 28 bytes an element; AdamW in fp32 throughout: 4 + 4 + 8 + 4 + 8, also 28.
    """
    read = gradient_bytes + (master_bytes or weight_bytes) + moment_bytes
    return read + master_bytes + weight_bytes + moment_bytes


def cpu_update_seconds(moved_bytes: float, bytes_per_second: float) -> float:
    """An optimizer step on the processor over state in DRAM (or in CXL memory): bytes over its bandwidth.

    Assumption: a vectorised Adam on all cores is bound by memory, which is what ZeRO-Offload's is tuned for
    (arXiv 2101.06840, section 5.1: vector instructions, unrolling, threads). Give
    ``Setup.dram_bytes_per_second.value``, or the ``mixed`` rate of ``Setup.stores`` for state in CXL memory.

    Raises:
        ValueError: the bandwidth is not above 0.
    """
    if not bytes_per_second > 0:
        raise ValueError(f"bytes_per_second must be above 0, got {bytes_per_second}")
    return moved_bytes / bytes_per_second
