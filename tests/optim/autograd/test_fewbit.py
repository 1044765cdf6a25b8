"""Few-bit activations: forward exact, backward by the table, bytes, calibration, refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memtrain.optim.autograd.bitpack import packed_bytes
from memtrain.optim.autograd.fewbit import (
    ACTIVATIONS,
    Activation,
    FewBitActivation,
    collect_histograms,
    derivative_of,
)
from memtrain.optim.autograd.fewbit_tables import Histogram
from memtrain.optim.autograd.lossy import (
    UnsupportedActivationError,
    activation_modules,
    apply_fewbit,
    is_gated,
)
from memtrain.optim.autograd.lossy_backward import LossyBackwardError

transformers = pytest.importorskip("transformers")


def values(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()


def module_for(name: str, bits: int) -> FewBitActivation:
    activation = ACTIVATIONS[name]
    if not activation.unbounded:
        return FewBitActivation(name, bits)
    normal = Histogram.of(values(10_000))
    return FewBitActivation(name, table=activation.table(bits, inputs=normal))


def gradient(module: Any, x: Tensor, weights: Tensor) -> Tensor:
    return torch.autograd.grad(module(x), x, weights)[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_forward_is_exact_and_backward_multiplies_by_the_level(name: str, dtype: torch.dtype) -> None:
    module, x = module_for(name, 3), values(7, 13, dtype=dtype)
    assert torch.equal(module(x), ACTIVATIONS[name].function(x))
    weights = torch.rand(7, 13, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = gradient(module, x, weights)
    assert got.dtype == dtype
    table = module.table
    position = x.detach().float().abs() if table.parity else x.detach().float()
    bins = (position.unsqueeze(-1) >= torch.tensor(table.borders)).sum(-1)
    assert torch.equal(got, (torch.tensor(table.levels)[bins] * weights).to(dtype))


@pytest.mark.parametrize(("bits", "limit"), [(1, 0.35), (2, 0.16), (3, 0.095), (4, 0.045), (5, 0.025)])
def test_error_falls_with_bits(bits: int, limit: float) -> None:
    x, weights = values(20_000), torch.ones(20_000)
    exact = gradient(F.gelu, x, weights)
    error = gradient(FewBitActivation("gelu", bits), x, weights) - exact
    assert float(error.norm() / exact.norm()) < limit


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (8, 16), (2, 3, 11)])
@pytest.mark.parametrize("bits", [1, 3, 4])
def test_saved_bytes_are_the_packed_bytes(shape: tuple[int, ...], bits: int) -> None:
    module, x = FewBitActivation("silu", bits), values(*shape)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = module(x)
    codes = [t for t in saved if t.data_ptr() != module.levels.data_ptr() or t.numel() == 0]
    assert sum(t.untyped_storage().nbytes() for t in codes) == packed_bytes(x.numel(), bits)
    assert gradient(module, x, torch.ones_like(y)).shape == x.shape


def test_what_is_not_contiguous() -> None:
    module, x = FewBitActivation("gelu", 4), values(6, 10)
    weights = torch.rand(10, 6)
    got = torch.autograd.grad(module(x.t()), x, weights)[0]
    assert torch.equal(got, gradient(module, x, weights.t()))


def test_your_own_function_and_derivative() -> None:
    def softsign(x: Tensor) -> Tensor:
        return x / (1 + x.abs())

    own = Activation(
        name="softsign", function=softsign, derivative=lambda x: 1 / (1 + x.abs()) ** 2, even=True
    )
    module, x = FewBitActivation(own, 4), values(5000)
    exact = gradient(softsign, x, torch.ones(5000))
    assert float((gradient(module, x, torch.ones(5000)) - exact).norm() / exact.norm()) < 0.05
    points = torch.linspace(-3, 3, 7, dtype=torch.float64)
    assert torch.allclose(derivative_of(softsign)(points), own.derivative(points))
    with pytest.raises(ValueError, match="there are gelu"):
        FewBitActivation("gellu")


def test_checkpoint_accumulation_autocast_and_scaling() -> None:
    module, x = FewBitActivation("gelu", 3), values(40)
    weights = torch.rand(40)
    expected = gradient(module, x, weights)
    assert torch.equal(gradient(lambda t: checkpoint(module, t, use_reentrant=False), x, weights), expected)
    assert torch.equal(gradient(module, x, 4 * weights), 4 * expected)  # T8
    module(x).backward(weights)
    module(x).backward(weights)
    assert torch.equal(x.grad, 2 * expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear = nn.Linear(40, 40)
        y = module(linear(x))
        assert y.dtype == torch.bfloat16
        y.sum().backward()
    assert linear.weight.grad.dtype == torch.float32


def test_second_derivatives_are_refused() -> None:
    x = values(10)
    with pytest.raises(LossyBackwardError, match="few-bit activation"):
        torch.autograd.grad(FewBitActivation("gelu", 2)(x).sum(), x, create_graph=True)


def test_nothing_is_saved_without_gradients_and_levels_keep_their_precision() -> None:
    module = FewBitActivation("gelu", 3)
    assert not module(values(4).detach()).requires_grad
    assert not module.state_dict()
    x = values(1000, dtype=torch.bfloat16)
    expected = gradient(module, x, torch.ones_like(x))
    assert torch.equal(gradient(copy.deepcopy(module).bfloat16(), x, torch.ones_like(x)), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_equals_eager() -> None:
    module, x = FewBitActivation("gelu", 3), values(7, 11)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    weights = torch.rand(7, 11)
    assert torch.equal(gradient(compiled, x, weights), gradient(module, x, weights))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).eval()


def test_apply_to_a_model_and_undo() -> None:
    model, ids = gpt2(), torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids).logits
    before = {name: type(module) for name, module in model.named_modules()}
    handle = apply_fewbit(model, 4)
    assert handle.names == ["transformer.h.0.mlp.act", "transformer.h.1.mlp.act"]
    assert torch.equal(model(ids).logits, expected)
    assert isinstance(model.transformer.h[1].mlp.act, FewBitActivation)
    model(ids, labels=ids).loss.backward()
    got = model.transformer.h[0].mlp.c_fc.weight.grad.clone()
    handle.undo()
    handle.undo()
    assert {name: type(module) for name, module in model.named_modules()} == before
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    exact = model.transformer.h[0].mlp.c_fc.weight.grad
    # Inputs of a freshly initialised model are near 0, where four bits over [-10, 10] leave few bins.
    assert 1e-4 < float((got - exact).norm() / exact.norm()) < 0.15


def test_histograms_of_a_models_own_inputs_lower_the_error() -> None:
    model, ids = gpt2(), torch.randint(50, (4, 30), generator=torch.Generator().manual_seed(0))

    def weight_gradient() -> Tensor:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return model.transformer.h[1].mlp.c_fc.weight.grad.clone()

    exact = weight_gradient()
    with collect_histograms(activation_modules(model)) as histograms:
        model(ids)
    errors = []
    for inputs in (None, histograms()):
        handle = apply_fewbit(model, 3, inputs=inputs)
        errors.append(float((weight_gradient() - exact).norm() / exact.norm()))
        handle.undo()
    assert errors[1] < 0.3 * errors[0]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_gated_mlps_are_refused_by_name() -> None:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    model = transformers.LlamaForCausalLM(config)
    with pytest.raises(UnsupportedActivationError, match=r"layers\.0\.mlp\.act_fn belongs to a gated MLP"):
        apply_fewbit(model)
    assert not any(isinstance(module, FewBitActivation) for module in model.modules())
    assert apply_fewbit(model, gated=True).names == ["model.layers.0.mlp.act_fn"]  # asked for by name


def test_gates_are_known_by_the_shapes_of_their_weights() -> None:
    class Block(nn.Module):
        def __init__(self, *sizes: tuple[int, int]) -> None:
            super().__init__()
            self.layers = nn.ModuleDict()
            for index, (into, out) in enumerate(sizes):
                setattr(self, f"l{index}", nn.Linear(into, out))

    assert is_gated(Block((8, 20), (8, 20), (20, 8)))
    assert is_gated(Block((8, 40), (20, 8)))  # gate and up in one
    assert not is_gated(Block((8, 32), (32, 8)))
    assert not is_gated(Block((8, 16), (16, 8)))
    assert not is_gated(Block((8, 8), (8, 8)))


def test_a_model_without_activations_and_an_unbounded_one() -> None:
    with pytest.raises(UnsupportedActivationError, match="no activation module"):
        apply_fewbit(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    squared = transformers.activations.ReLUSquaredActivation()
    model = nn.Sequential(nn.Linear(8, 32), squared, nn.Linear(32, 8))
    with pytest.raises(ValueError, match="grows without bound"):
        apply_fewbit(model)
    assert model[1] is squared
    with collect_histograms(activation_modules(model)) as histograms:
        model(values(100, 8))
    apply_fewbit(model, 4, inputs=histograms())
    assert isinstance(model[1], FewBitActivation)
