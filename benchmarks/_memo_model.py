"""The models of MEMO's evaluation: GPT as its figure 4 draws it, 16 b s h saved elements a layer and no more.

Hugging Face's decoders of this shape save a fifth more: copies that rotary embeddings and reshapes leave. The
loss goes by chunks of tokens: whole logits of a million tokens, in fp32 as Megatron-LM makes them, would take
25 GiB of each of eight GPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from memtrain.planner.estimate import ModelEstimate
from memtrain.planner.parallel import ModelShape
from memtrain.planner.tracing import chunked_loss as _registers_the_operator
from memtrain.planner.tracing.estimator import estimate_module

assert _registers_the_operator
LOSS_CHUNK_TOKENS = 8192


class Layer(nn.Module):
    """One transformer layer."""

    def __init__(self, hidden: int, intermediate: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.input_norm, self.post_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.dense = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.up, self.down = nn.Linear(hidden, intermediate), nn.Linear(intermediate, hidden)
        self.act = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, hidden) to the same."""
        batch, tokens, hidden = x.shape
        heads = self.qkv(self.input_norm(x)).view(batch, tokens, 3, self.heads, hidden // self.heads)
        mixed = F.scaled_dot_product_attention(*heads.permute(2, 0, 3, 1, 4), is_causal=True)
        x = x + self.dense(mixed.transpose(1, 2).reshape(batch, tokens, hidden))
        return x + self.down(self.act(self.up(self.post_norm(x))))


class GPT(nn.Module):
    """Decoder with an untied head; positions need no parameters worth counting."""

    def __init__(self, *, layers: int, hidden: int, intermediate: int, heads: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(Layer(hidden, intermediate, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(hidden), nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, tokens) to the hidden states that the head is given."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def estimate(sizes: Mapping[str, int], sequence: int) -> ModelEstimate:
    """One sequence of the model of ``sizes`` in bf16, attention by FlashAttention's formula."""
    # One token, repeated without memory: fake tensors look at shapes alone.
    tokens = torch.zeros(1, 1, dtype=torch.int64).expand(1, sequence)
    return estimate_module(_in_bfloat16(sizes), tokens, attention="flash", forward=_loss)


def _in_bfloat16(sizes: Mapping[str, int]) -> Callable[[], GPT]:
    def build() -> GPT:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            return GPT(**sizes)
        finally:
            torch.set_default_dtype(before)

    return build


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    assert isinstance(model, GPT)
    hidden = model(tokens).flatten(0, 1)
    loss: Tensor = torch.ops.memtrain.chunked_loss(hidden, model.head.weight, LOSS_CHUNK_TOKENS)[0]
    return loss


def shape(sizes: Mapping[str, int]) -> ModelShape:
    """What parallel degrees have to divide."""
    return ModelShape(
        layers=sizes["layers"],
        hidden=sizes["hidden"],
        heads=sizes["heads"],
        key_value_heads=sizes["heads"],
        head_size=sizes["hidden"] // sizes["heads"],
        intermediate=sizes["intermediate"],
    )
