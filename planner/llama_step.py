"""The lifetimes of a Llama-like training step by formula, to test and measure addresses without torch.

Plain eager PyTorch in bf16 with fp32 norms, flash attention, and a loss over slices of the tokens; one
operation a kernel. What the fake trace of a real model finds has the same shape: few sizes, short transients,
kept tensors nested from block to block.
"""

from __future__ import annotations

from dataclasses import dataclass

from memtrain.planner.buffers import Buffer
from memtrain.planner.step_buffers import BlockClass, Kept, Step

BF16_BYTES = 2
FP32_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class LlamaShape:
    """Sizes of the model and of the batch on one device; the defaults are Llama 3 70B's, 4,096 tokens."""

    blocks: int = 80
    hidden: int = 8192
    intermediate: int = 28672
    heads: int = 64
    kv_heads: int = 8
    vocabulary: int = 128256
    tokens: int = 4096
    loss_slices: int = 8


def llama_step(shape: LlamaShape, *, staging_slots: int = 2) -> Step:
    """Every block alike, then the head with its loss; ``staging_slots`` of one block's input each."""
    block = _block(shape)
    hidden = shape.tokens * shape.hidden * BF16_BYTES
    return Step(
        blocks=(*(block for _ in range(shape.blocks)), _head(shape)),
        staging_slots=staging_slots,
        staging_slot_bytes=hidden,
    )


def _block(shape: LlamaShape) -> BlockClass:
    """One layer.

    Forward: 0 norm in fp32, 1 its output, 2-4 q k v, 5-6 rotate q and k, 7 attention, 8 its projection,
    9 sum, 10-11 norm, 12 gate, 13 up, 14 silu, 15 product, 16 down, 17 sum. Backward: the same from the end.
    """
    row = shape.tokens * BF16_BYTES
    hidden, inner = row * shape.hidden, row * shape.intermediate
    kv = hidden * shape.kv_heads // shape.heads
    wide = shape.tokens * shape.hidden * FP32_BYTES
    scale, sums = shape.tokens * FP32_BYTES, shape.tokens * shape.heads * FP32_BYTES
    kept = [
        # Name, born in the forward, end in the backward, bytes.
        ("norm1_scale", 0, 24, scale),
        ("norm1", 1, 22, hidden),
        ("v", 4, 16, kv),
        ("q", 5, 16, hidden),
        ("k", 6, 16, kv),
        ("attention", 7, 16, hidden),
        ("attention_sums", 7, 16, sums),
        ("middle", 9, 12, hidden),
        ("norm2_scale", 10, 12, scale),
        ("norm2", 11, 9, hidden),
        ("gate", 12, 6, inner),
        ("up", 13, 4, inner),
        ("silu", 14, 4, inner),
        ("product", 15, 2, inner),
        # The next block's input: read by its backward, dead before this one's.
        ("output", 17, 0, hidden),
    ]
    forward = [
        ("norm1_wide", 0, 2, wide),
        ("norm1_square", 0, 1, wide),
        ("q_plain", 2, 6, hidden),
        ("q_half", 5, 6, hidden),
        ("k_plain", 3, 7, kv),
        ("k_half", 6, 7, kv),
        ("projected", 8, 10, hidden),
        ("norm2_wide", 10, 12, wide),
        ("norm2_square", 10, 11, wide),
        ("down", 16, 18, hidden),
    ]
    backward = [
        ("d_product", 0, 5, inner),
        ("d_up", 3, 9, inner),
        ("d_silu", 3, 6, inner),
        ("d_gate", 5, 8, inner),
        ("d_norm2_gate", 7, 10, hidden),
        ("d_norm2_up", 8, 10, hidden),
        ("d_norm2", 9, 12, hidden),
        ("d_wide2", 10, 12, wide),
        ("d_middle", 11, 24, hidden),
        ("d_attention", 12, 16, hidden),
        ("d_q", 15, 18, hidden),
        ("d_k", 15, 19, kv),
        ("d_v", 15, 21, kv),
        ("d_q_plain", 17, 20, hidden),
        ("d_k_plain", 18, 21, kv),
        ("d_norm1_q", 19, 22, hidden),
        ("d_norm1_kv", 20, 22, hidden),
        ("d_norm1", 21, 24, hidden),
        ("d_wide1", 22, 24, wide),
    ]
    return BlockClass(
        name="llama",
        forward_ops=18,
        backward_ops=24,
        kept=tuple(Kept(name=n, start=s, end=e, size=b) for n, s, e, b in kept),
        forward=tuple(Buffer(*row) for row in forward),
        backward=tuple(Buffer(*row) for row in backward),
        input_gradient_bytes=hidden,
        input_gradient_start=23,
        output_gradient_end=12,
    )


def _head(shape: LlamaShape) -> BlockClass:
    """Final norm, then logits and loss of one slice of tokens after the other, their gradient at once."""
    hidden = shape.tokens * shape.hidden * BF16_BYTES
    wide = shape.tokens * shape.hidden * FP32_BYTES
    logits = shape.tokens // shape.loss_slices * shape.vocabulary
    slices = []
    for number in range(shape.loss_slices):
        at = 2 + 3 * number
        slices += [
            Buffer(f"logits{number}", at, at + 2, logits * BF16_BYTES),
            Buffer(f"logits_wide{number}", at + 1, at + 3, logits * FP32_BYTES),
            Buffer(f"d_logits{number}", at + 2, at + 3, logits * BF16_BYTES),
        ]
    ops = 2 + 3 * shape.loss_slices
    return BlockClass(
        name="head",
        forward_ops=ops,
        backward_ops=2,
        kept=(
            Kept(name="norm", start=1, end=1, size=hidden),
            Kept(name="d_norm", start=4, end=2, size=hidden),
        ),
        forward=(Buffer("norm_wide", 0, 2, wide), *slices),
        backward=(Buffer("d_wide", 0, 2, wide),),
        input_gradient_bytes=hidden,
        input_gradient_start=1,
    )
