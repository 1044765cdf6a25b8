"""Linear layers with an encoded input: exact parts, one code per input, error, composition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memtrain.optim.autograd.group_codec import GroupCodec
from memtrain.optim.autograd.int8_linear import Int8Input, int8_linear
from memtrain.optim.autograd.lossy_backward import LossyBackwardError
from memtrain.optim.autograd.saved_bytes import SavedBytes

TOKENS, FEATURES, OUTPUTS = 40, 256, 24


def operands(dtype: torch.dtype = torch.float32, features: int = FEATURES) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, TOKENS // 2, features, generator=generator).to(dtype)
    weight = torch.randn(OUTPUTS, features, generator=generator).to(dtype)
    return x.requires_grad_(), weight.requires_grad_(), torch.zeros(OUTPUTS, dtype=dtype, requires_grad=True)


def gradients(y: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y.square().sum(), of)


@pytest.mark.parametrize("features", [FEATURES, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_all_but_the_weights_gradient_is_exact(dtype: torch.dtype, features: int) -> None:
    x, weight, bias = operands(dtype, features)
    plain = F.linear(x, weight, bias)
    y = int8_linear(x, weight, bias, Int8Input())
    assert torch.equal(y, plain)
    dx, dw, db = gradients(y, x, weight, bias)
    exact_dx, exact_dw, exact_db = gradients(plain, x, weight, bias)
    assert torch.equal(dx, exact_dx)
    assert torch.equal(db, exact_db)
    assert 1e-4 < float((dw - exact_dw).norm() / exact_dw.norm()) < 0.012
    codec = GroupCodec()
    decoded = codec.decode(codec.encode(x), x.shape, dtype)
    expected = (2 * plain).reshape(-1, OUTPUTS).t() @ decoded.reshape(-1, features)
    torch.testing.assert_close(dw, expected, rtol=0.02 if dtype == torch.bfloat16 else 1e-4, atol=1e-2)


def test_layers_of_one_input_share_its_codes() -> None:
    x, first, bias = operands()
    second = first.detach().clone().requires_grad_()
    shared = Int8Input()
    with SavedBytes([x, first, second, bias]) as saved:
        y = int8_linear(x, first, bias, shared) + int8_linear(x, second, None, shared)
    assert saved.total_bytes == TOKENS * FEATURES * 65 // 64  # a bf16 scale for 128 codes
    y.sum().backward()


def test_under_checkpoint_and_autocast() -> None:
    x, weight, bias = operands()
    shared = Int8Input()
    expected = gradients(int8_linear(x, weight, bias, shared), weight)
    for reentrant in (False, True):
        weight.grad = None
        checkpoint(int8_linear, x, weight, bias, shared, use_reentrant=reentrant).square().sum().backward()
        assert torch.equal(weight.grad, *expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = int8_linear(x, weight, bias, shared)
    assert y.dtype == torch.bfloat16
    (dw,) = gradients(y.float(), weight)
    assert dw.dtype == torch.float32
    assert float((dw - expected[0]).norm() / expected[0].norm()) < 0.02


def test_what_overflows_is_seen() -> None:
    x, weight, bias = operands()
    with torch.no_grad():
        x[0, 0, 0] = torch.inf
    (dw,) = gradients(int8_linear(x, weight, bias, Int8Input()), weight)
    assert not dw.isfinite().all()


def test_no_gradients_frozen_weights_and_nothing_at_all() -> None:
    x, weight, bias = operands()
    with torch.no_grad():
        assert torch.equal(int8_linear(x, weight, bias, Int8Input()), F.linear(x, weight, bias))
    with SavedBytes([x, weight, bias]) as saved:
        int8_linear(x, weight.detach(), bias, Int8Input())
    assert saved.total_bytes == 0
    (dw,) = gradients(int8_linear(torch.zeros(0, FEATURES), weight, bias, Int8Input()), weight)
    assert torch.equal(dw, torch.zeros_like(weight))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_refused() -> None:
    x, weight, bias = operands()
    with pytest.raises(LossyBackwardError, match="no second derivative"):
        torch.autograd.grad(int8_linear(x, weight, bias, Int8Input()).sum(), x, create_graph=True)
    with pytest.raises(ValueError, match="bits is 4: the product unpacks 8"):
        Int8Input(GroupCodec(bits=4))

    class Layer(nn.Linear):
        shared = Int8Input()

        def forward(self, x: Tensor) -> Tensor:
            return int8_linear(x, self.weight, self.bias, self.shared)

    layer = Layer(FEATURES, OUTPUTS)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="recognised by its storage"):
        torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    torch._dynamo.reset()
