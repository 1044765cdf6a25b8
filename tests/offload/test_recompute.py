"""A block with a compiled part is recomputed like any other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memtrain.offload.recompute import RecomputeFrame
from memtrain.offload.results import ATTENTION, ResultTape
from memtrain.offload.saved_group import unpack
from memtrain.offload.unmoved import Unmoved


class Block(nn.Module):
    """Attention, and a part that the compiler must take as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)
        self.mlp = torch.compile(self.eager_mlp, backend="eager", fullgraph=True)

    def eager_mlp(self, hidden: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(hidden)))

    def forward(self, hidden: Tensor) -> Tensor:
        heads = hidden.unflatten(-1, (2, 8)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
        return self.mlp(hidden + mixed.transpose(1, 2).flatten(2))


# The compiler asks every tensor for its gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_part_beside_attention_that_is_kept() -> None:
    torch.manual_seed(0)
    block = Block()
    fixed = {parameter.data_ptr() for parameter in block.parameters()}
    hidden = torch.randn(2, 8, 16)
    found: list[list[Tensor]] = []
    for planned in (True, False):  # ours first: the compiler must see it, and keep nothing of another
        block.zero_grad()
        entry = hidden.clone().requires_grad_()
        if planned:
            tape = ResultTape("block", ATTENTION, Unmoved.of, unpack)
            frame = RecomputeFrame(
                "block",
                block.forward,
                (entry,),
                {},
                is_fixed=lambda tensor: tensor.data_ptr() in fixed,
                tape=tape,
                pack_input=None,
                unpack=unpack,
            )
            output = frame.forward()
            assert len(tape) == 1
        else:
            output = block(entry)
        output.pow(2).sum().backward()
        found.append([output.detach(), entry.grad, *(p.grad.clone() for p in block.parameters())])
    assert all(torch.equal(ours, plain) for ours, plain in zip(*found, strict=True))
