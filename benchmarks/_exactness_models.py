"""The models that exactness.py trains: tiny, but with what makes offloading go wrong.

Each has repeated blocks, dropout, matrices above the size below which state stays in memory, and blocks of
more than 2**20 parameters, so that one block's state takes several shards. The attention of the Hugging Face
models is torch's fused kernel except where ``attention dropout`` is on (the kernel has none on a CPU).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

VOCABULARY = 512
SEQUENCE = 32
DROPOUT = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """One model to be trained with and without memtrain."""

    name: str
    build: Callable[[], nn.Module]
    """Makes the model in fp32 from torch's generator."""
    attention_kernel: bool
    """Whether the blocks have a fused attention kernel whose output can be kept by itself."""
    chunked_loss: bool


def _drop_after_mlp(model: Any) -> Any:
    """Llama and Qwen2 have dropout in the attention only: put one behind every MLP."""
    for layer in model.model.layers:
        layer.mlp = nn.Sequential(layer.mlp, nn.Dropout(DROPOUT))
    return model


def _llama(attention_dropout: float) -> Any:
    """SmolLM2's architecture: grouped queries (three to one), SwiGLU, RMS norm, tied embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=288,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        attention_dropout=attention_dropout,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def _gpt2() -> Any:
    """Learned positions, LayerNorm, biases, Conv1D's transposed weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=SEQUENCE,
        n_embd=320,
        n_layer=4,
        n_head=5,
        resid_pdrop=DROPOUT,
        embd_pdrop=DROPOUT,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def _qwen2() -> Any:
    """Biases on queries, keys and values; output projection of its own."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1152,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return _drop_after_mlp(Qwen2ForCausalLM(config))


class ViewBlock(nn.Module):
    """Attention by hand: one projection cut into views, transposes, an expanded mask, an in-place add."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 3 * width)
        self.down = nn.Linear(3 * width, width)
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [batch, tokens, width]
        batch, tokens, width = x.shape
        parts = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        scores = q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5
        future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1).expand(batch, self.heads, -1, -1)
        mixed = F.dropout(scores.masked_fill(future, float("-inf")).softmax(-1), DROPOUT, self.training) @ v
        x = x + F.dropout(self.out(mixed.transpose(1, 2).flatten(2)), DROPOUT, self.training)
        hidden = self.up(x)
        gate, value = hidden[..., :width], hidden[..., width:]  # overlapping storages, different views
        hidden = torch.cat([torch.tanh(gate), F.gelu(value)], -1)
        return self.down(hidden).add_(x)


class ViewModel(nn.Module):
    """A plain module: tied embedding, and one matrix shared by all blocks."""

    def __init__(self, width: int = 320, blocks: int = 4, heads: int = 5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(ViewBlock(width, heads) for _ in range(blocks))
        for block in self.blocks:
            block.out.weight = self.blocks[0].out.weight
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=0.05)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        """Ids [batch, tokens] and labels of the same shape; the loss is that of the next token."""
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)[:, :-1].float()
        return SimpleNamespace(loss=F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()))


SUBJECTS = (
    Subject(
        name="llama", build=lambda: _drop_after_mlp(_llama(0.0)), attention_kernel=True, chunked_loss=True
    ),
    Subject(
        name="llama, attention dropout",
        build=lambda: _llama(DROPOUT),
        attention_kernel=False,
        chunked_loss=False,
    ),
    Subject(name="gpt2", build=_gpt2, attention_kernel=True, chunked_loss=True),
    Subject(name="qwen2", build=_qwen2, attention_kernel=True, chunked_loss=True),
    Subject(name="plain module", build=ViewModel, attention_kernel=False, chunked_loss=False),
)
