"""Head and cross-entropy by chunks of tokens, as memtrain trains them, by formula.

The loss that runs (``optim.autograd.chunked_loss``) looks at labels, which fake tensors have none of. In its
place stands one operator with the same buffers: the gradients of the hidden states and of the head, ready
when forward ends and held until backward, and while it runs one chunk of logits in the head's dtype and a
strip of them in fp32. The library's own scratch inside operators is not counted, here as elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

_STRIP_BYTES = 8 << 20
"""``_SCRATCH_BYTES`` of the loss that runs."""

torch.library.define(
    "memtrain::chunked_loss",
    "(Tensor hidden, Tensor weight, int chunk_tokens) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "memtrain::chunked_loss_backward", "(Tensor(a!) hidden, Tensor(b!) weight, Tensor g) -> ()"
)


@torch.library.register_fake("memtrain::chunked_loss")  # type: ignore[untyped-decorator]
def _forward(hidden: Tensor, weight: Tensor, chunk_tokens: int) -> tuple[Tensor, ...]:
    classes = weight.shape[0]
    strip = max(1, _STRIP_BYTES // (classes * torch.float32.itemsize))
    tokens = min(chunk_tokens, hidden.shape[0])
    return (
        hidden.new_empty((), dtype=torch.float32),
        torch.empty_like(hidden),
        torch.empty_like(weight),
        hidden.new_empty(tokens, classes),
        hidden.new_empty(min(strip, tokens), classes, dtype=torch.float32),
    )


@torch.library.register_fake("memtrain::chunked_loss_backward")  # type: ignore[untyped-decorator]
def _backward(hidden: Tensor, weight: Tensor, g: Tensor) -> None:
    return None


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.gradients = output[1], output[2]
    ctx.save_for_backward(output[1], output[2])


def _differentiate(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    gradients, ctx.gradients = ctx.gradients, None
    torch.ops.memtrain.chunked_loss_backward(*gradients, g)  # scaled where they are
    return *gradients, None


torch.library.register_autograd("memtrain::chunked_loss", _differentiate, setup_context=_save)


@register_flop_formula(torch.ops.memtrain.chunked_loss)
def _flops(hidden: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Logits and both gradients: three products of one size."""
    tokens, features = hidden
    return int(3 * 2 * tokens * features * weight[0])


def chunked(chunk_tokens: int) -> Callable[[nn.Module, Mapping[str, Tensor]], Tensor]:
    """``forward`` of ``estimate_config``: a causal language model whose logits exist by chunks.

    Raises ValueError: ``chunk_tokens`` below 1.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be >= 1, got {chunk_tokens}")

    def forward(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        hidden = model.base_model(batch["input_ids"]).last_hidden_state
        head = model.get_output_embeddings().weight
        flat = hidden.reshape(-1, hidden.shape[-1])
        loss: Tensor = torch.ops.memtrain.chunked_loss(flat, head, chunk_tokens)[0]
        return loss

    return forward
