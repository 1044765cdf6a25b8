"""What a treatment takes a module for, and what happens when the module is changed behind its back."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from memtrain.optim.autograd.apply import EXACT, Policy, Rule, apply_to
from memtrain.optim.autograd.compact import apply_compact
from memtrain.optim.autograd.linears import UnsupportedLinearError
from memtrain.optim.autograd.norms import NormLinear, RMSNormForm
from memtrain.optim.autograd.treatments import ChangedModuleError
from memtrain.optim.autograd.wtacrs import apply_wta

FEATURES = 16


class GatedMLP(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.gate = nn.Linear(FEATURES, 24, bias=False)
        self.up = nn.Linear(FEATURES, 24, bias=False)
        self.down = nn.Linear(24, FEATURES, bias=False)
        self.act = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(FEATURES, eps=1e-6)
        self.mlp = GatedMLP(nn.SiLU() if activation is None else activation)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Adapted(nn.Module):
    """A linear layer with an adapter, which shows its base's weight as its own, as those of PEFT do."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.low = nn.Linear(base.in_features, base.out_features)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.low(x)


def treated(block: nn.Module, policy: Policy = EXACT, dtype: torch.dtype = torch.float32) -> nn.Module:
    x = torch.randn(1, 8, FEATURES, dtype=dtype)
    apply_to(block, policy, example=lambda: block(x))
    return block


def _adapt(block: Block) -> None:
    block.mlp.down = Adapted(block.mlp.down)


@pytest.mark.parametrize(
    "change",
    [
        _adapt,
        lambda block: setattr(block.mlp, "act", nn.ReLU()),
        lambda block: block.mlp.down.register_forward_hook(lambda *_: None),
        lambda block: block.mlp.act.register_forward_pre_hook(lambda *_: None),
        lambda block: block.mlp.down.register_full_backward_hook(lambda *_: None),
    ],
)
def test_what_a_treated_mlp_would_pass_by_is_refused(change: Callable[[Block], object]) -> None:
    block = treated(Block())
    change(block)
    with pytest.raises(ChangedModuleError, match=r"revert\(model\), make the change, then apply_to"):
        block(torch.randn(3, FEATURES))


def test_what_a_treated_mlp_calls_may_change() -> None:
    block = treated(Block())
    block.mlp.gate = Adapted(block.mlp.gate)
    block.mlp.up.register_forward_hook(lambda *args: 2 * args[2])
    x = torch.randn(3, FEATURES)
    mine = block(x)
    del block.mlp.forward
    torch.testing.assert_close(mine, block(x), rtol=0, atol=0)


@pytest.mark.parametrize("apply", [apply_compact, apply_wta])
def test_layers_with_a_forward_of_their_own_are_refused_another_backward(
    apply: Callable[[nn.Module], object],
) -> None:
    block = treated(Block())
    with pytest.raises(UnsupportedLinearError, match=r"mlp\.gate has a forward of its own"):
        apply(block)


@pytest.mark.parametrize(
    ("own", "found"), [("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu_new", "gelu_tanh")]
)
def test_activations_that_bf16_hardly_tells_apart(own: str, found: str) -> None:
    block = Block(ACT2FN[own]).bfloat16()
    with torch.no_grad():
        for parameter in block.mlp.parameters():
            parameter.mul_(0.01)  # so near to zero both forms of GELU are x / 2
    assert treated(block, dtype=torch.bfloat16).mlp.forward.forward.activation == found


@pytest.mark.parametrize("eps", [1e-6, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_norm_whose_weights_are_ones_and_that_is_cast_later(dtype: torch.dtype, eps: float | None) -> None:
    block = Block().to(dtype)
    block.norm.eps = eps
    treated(block, dtype=dtype).bfloat16()
    assert block.norm.forward.forward.form is RMSNormForm.SCALE_THEN_ROUND
    nn.init.normal_(block.norm.weight)
    x = 1e-3 * torch.randn(50, FEATURES, dtype=torch.bfloat16)
    mine = block.norm(x)
    together = NormLinear(block.norm, [])
    del block.norm.forward
    torch.testing.assert_close(mine, block.norm(x), rtol=0, atol=0)
    together.linears.append(eye := nn.Linear(FEATURES, FEATURES, bias=False, dtype=torch.bfloat16))
    nn.init.eye_(eye.weight)
    torch.testing.assert_close(together(x)[0], mine, rtol=0, atol=0)


class Conv1D(nn.Module):
    """Not GPT-2's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(FEATURES, 4))
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight)


def test_a_class_of_the_same_name_is_not_taken_for_gpt2s() -> None:
    model = nn.Sequential(nn.RMSNorm(FEATURES, eps=1e-6), Conv1D())
    x = torch.randn(3, FEATURES)
    plain = model(x)
    treated(model)
    torch.testing.assert_close(model(x), plain, rtol=0, atol=0)


class Centred(nn.Module):
    """An MLP whose rows depend on each other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, 32), nn.Linear(32, FEATURES)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.first(x - x.mean(-2, keepdim=True))))


def test_rows_that_depend_on_each_other_are_not_tiled() -> None:
    tiles = Policy(rules=(Rule(kind="mlp", treatment="tiled"),))
    with pytest.raises(ValueError, match="its rows depend on each other"):
        treated(nn.Sequential(Centred()), tiles)


def test_few_bits_are_refused_where_dropout_lies_between() -> None:
    mlp = nn.Sequential(nn.Linear(FEATURES, 32), nn.GELU(), nn.Dropout(0.5), nn.Linear(32, FEATURES))
    import memtrain.optim.autograd.lossy_treatments  # noqa: F401

    policy = Policy(rules=(Rule(kind="mlp", treatment="fewbit2"),))
    with pytest.raises(ValueError, match="not linear, activation, linear, dropout"):
        treated(nn.Sequential(mlp), policy)
    model = nn.Sequential(nn.Sequential(mlp[0], mlp[1], mlp[3], mlp[2]))
    treated(model, policy)
    assert pickle.loads(pickle.dumps(model))(torch.randn(2, FEATURES)).shape == (2, FEATURES)
