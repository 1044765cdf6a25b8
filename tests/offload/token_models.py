"""Causal models for the tests of token ranges: one bit-equal by prefix on any machine, and real ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 50
WIDTH = 64
DEPTH = 3


class RowwiseLinear(nn.Module):
    """A product that is a sum of its own for every row and column: it cannot depend on the number of rows."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, width) / width**0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        return (hidden.unsqueeze(-2) * self.weight).sum(-1)


class CausalBlock(nn.Module):
    """Views of one storage, heads before tokens in memory, sums over tokens, an in-place activation."""

    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = RowwiseLinear(WIDTH, 3 * WIDTH)
        self.out = RowwiseLinear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, table: Tensor | None = None) -> Tensor:
        batch, tokens, _ = hidden.shape
        qkv = self.qkv(self.norm(hidden))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        if table is not None:
            q = (q * table).contiguous()  # heads before tokens: [B, H, T, D]
        seen = torch.cumsum(k * v, dim=2)
        mixed = (q * torch.tanh(seen)).transpose(1, 2).reshape(batch * tokens, WIDTH)
        grown = F.silu(self.out(mixed).view(batch, tokens, WIDTH))
        return hidden + F.relu(grown * 2.0, inplace=True) * grown


class CausalNet(nn.Module):
    """Blocks over a tied embedding; the blocks share a table of the tokens' positions."""

    def __init__(self, block: Any = CausalBlock) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(DEPTH))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        table = torch.linspace(0.5, 1.5, tokens.shape[1])[:, None] * torch.ones(1, 16)
        for block in self.blocks:
            hidden = block(hidden, table=table)
        return F.linear(hidden, self.embed.weight).logsumexp(-1).mean()


class LossOf(nn.Module):
    """A language model that gives its loss for a batch of tokens."""

    def __init__(self, model: Any, blocks: Any) -> None:
        super().__init__()
        self.model = model
        self.blocks = blocks

    def forward(self, tokens: Tensor) -> Any:
        return self.model(input_ids=tokens, labels=tokens).loss


def llama(**settings: Any) -> LossOf:
    """SmolLM2's architecture, tiny: grouped queries, SwiGLU, RMS norm, tied embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=160,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=1,
        **settings,
    )
    model = LlamaForCausalLM(config)
    return LossOf(model, model.model.layers)


def gpt2(dropout: float = 0.0) -> LossOf:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=DEPTH,
        n_head=4,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=1,
        loss_type="ForCausalLM",
    )
    model = GPT2LMHeadModel(config)
    return LossOf(model, model.transformer.h)


def batches(rows: int, tokens: int, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCABULARY, (rows, tokens), generator=generator) for _ in range(count)]


def train(model: nn.Module, data: list[Tensor], *, autocast: bool = False) -> list[Tensor]:
    """Losses, gradients and the final weights of a few steps of SGD, and a random number drawn after them."""
    torch.manual_seed(11)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    found = []
    for tokens in data:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(tokens)
        loss.backward()
        found += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
    return [*found, torch.rand(1), *(p.detach().clone() for p in model.parameters())]
