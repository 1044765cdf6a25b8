"""RMSNorm and LayerNorm with the linear layers behind them: to the bit, to the byte, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memtrain.optim.autograd import norms
from memtrain.optim.autograd.norms import NormLinear, RMSNormForm, layer_norm, rms_norm
from memtrain.optim.autograd.recomputed import linear
from memtrain.optim.autograd.saved_bytes import SavedBytes

EPS = 1e-5
SHAPES = [(3, 5, 16), (1, 7), (2, 1, 33), (0, 8), (9,)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def plain_rms_norm(x: Tensor, weight: Tensor, form: RMSNormForm) -> Tensor:
    """As the models write it, but in fp64 for fp64."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    if form is RMSNormForm.ROUND_THEN_SCALE:
        return weight * normalised.to(x.dtype)
    if form is RMSNormForm.ONE_PLUS_WEIGHT:
        return (normalised * (1.0 + weight.to(wide.dtype))).type_as(x)
    return (normalised * weight.to(wide.dtype)).type_as(x)


def leaves(shape: tuple[int, ...], dtype: torch.dtype, *outs: int) -> list[Tensor]:
    """x, weight of the norm, weights of linear layers."""
    generator = torch.Generator().manual_seed(1)
    sizes = [shape, shape[-1:], *((out, shape[-1]) for out in outs)]
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in sizes
    ]


def gradients(outputs: list[Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    upstream = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    return torch.autograd.grad(outputs, inputs, upstream)


@pytest.mark.parametrize("form", RMSNormForm)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm_is_bit_equal_forward_and_backward(
    shape: tuple[int, ...], dtype: torch.dtype, form: RMSNormForm
) -> None:
    inputs = leaves(shape, dtype)
    mine, theirs = rms_norm(*inputs, EPS, form=form), plain_rms_norm(*inputs, form)
    assert torch.equal(mine, theirs)
    assert mine.dtype == theirs.dtype
    for a, b in zip(gradients([mine], inputs), gradients([theirs], inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 16), (1, 7, 33)])
def test_norm_residual_and_three_linears_are_bit_equal(
    shape: tuple[int, ...], dtype: torch.dtype, norm: str
) -> None:
    """The residual path reads x as well: three or four gradients are added up in the order of the engine."""

    def run(exact: bool) -> list[Tensor]:
        if norm == "rms":
            form = RMSNormForm.ROUND_THEN_SCALE
            y = rms_norm(x, scale, EPS) if exact else plain_rms_norm(x, scale, form)
        else:
            y = (layer_norm if exact else lambda v, w, b: F.layer_norm(v, v.shape[-1:], w, b))(
                x, scale, scale
            )
        return [(linear if exact else F.linear)(y, w) for w in weights] + [x * 3]

    inputs = x, scale, *weights = leaves(shape, dtype, 8, 8, 5)
    mine, theirs = run(True), run(False)
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(gradients(mine, inputs), gradients(theirs, inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_autocast_is_bit_equal_and_saves_no_copies_of_weights(parameters: torch.dtype) -> None:
    inputs = x, scale, *weights = leaves((4, 6, 16), parameters, 8, 3)
    results = []
    for norm, project in ((rms_norm, linear), (plain_rms_norm, F.linear)):
        extra = EPS if norm is rms_norm else RMSNormForm.ROUND_THEN_SCALE
        with torch.autocast("cpu", torch.bfloat16), SavedBytes(inputs) as saved:
            y = norm(x, scale, extra)
            outputs = [project(y, w) for w in weights]
        if norm is rms_norm:
            assert saved.total_bytes == 24 * 4  # rstd; x itself is one of the inputs
        results.append((outputs, gradients(outputs, inputs)))
    for mine, theirs in zip(*results, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a, b)
            assert a.dtype == b.dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_bytes_of_a_norm_and_three_linears(dtype: torch.dtype) -> None:
    x, scale, *weights = leaves((2, 32, 48), dtype, 48, 16, 16)
    with SavedBytes([scale, *weights]) as saved:
        y = rms_norm(x, scale, EPS)
        outputs = [linear(y, w) for w in weights]
    rstd_bytes = 8 if dtype == torch.float64 else 4
    assert saved.total_bytes == 64 * (48 * x.element_size() + rstd_bytes)
    assert len(outputs) == 3


def test_gradcheck_and_the_refusal_of_a_second_derivative() -> None:
    inputs = leaves((3, 4, 6), torch.float64, 5, 2)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)

    def rms(x: Tensor, scale: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        y = rms_norm(x, scale, EPS)
        return tuple(linear(y, w) for w in weights)

    def layer(x: Tensor, scale: Tensor, shift: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        y = layer_norm(x, scale, shift)
        return (*(linear(y, w) for w in weights), y)

    for form in RMSNormForm:
        assert torch.autograd.gradcheck(lambda x, w, f=form: rms_norm(x, w, EPS, form=f), inputs[:2])
    assert torch.autograd.gradcheck(rms, inputs)
    assert torch.autograd.gradcheck(layer, [*inputs[:2], bias, *inputs[2:]])
    for out in (rms(*inputs)[0], rms_norm(*inputs[:2], EPS)):
        with pytest.raises(RuntimeError, match="rms_norm has no second"):
            torch.autograd.grad(out.sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="layer_norm has no second"):
        torch.autograd.grad(layer_norm(inputs[0], None, None).sum(), inputs[0], create_graph=True)


def test_what_is_frozen_costs_nothing() -> None:
    x, scale, *weights = leaves((4, 8), torch.float32, 3, 5)
    weights[0].requires_grad_(False)
    scale.requires_grad_(False)
    y = rms_norm(x, scale, EPS)
    outputs = [linear(y, w) for w in weights]
    theirs = plain_rms_norm(x, scale, RMSNormForm.ROUND_THEN_SCALE)
    for a, b in zip(
        gradients(outputs, [x, weights[1]]),
        gradients([F.linear(theirs, w) for w in weights], [x, weights[1]]),
        strict=True,
    ):
        assert torch.equal(a, b)
    # A norm of what needs no gradient has no node to ask; its output is saved as plain linear layers save it.
    with SavedBytes([scale, *weights]) as saved:
        out = linear(rms_norm(x.detach(), scale, EPS), weights[1])
    assert saved.total_bytes == 4 * 8 * 4
    out.sum().backward()
    with SavedBytes([x, scale, *weights]) as saved:  # nothing needs a gradient
        linear(rms_norm(x.detach(), scale, EPS), weights[0])
    assert saved.total_bytes == 0


def test_one_weight_in_two_layers_collects_both_gradients() -> None:
    inputs = x, scale, weight = leaves((4, 8), torch.float32, 8)

    def run(norm: object, project: object) -> Tensor:
        y = norm(x, scale)  # type: ignore[operator]
        return project(norm(project(y, weight), scale), weight)  # type: ignore[operator]

    mine = run(lambda v, w: rms_norm(v, w, EPS), linear)
    theirs = run(lambda v, w: plain_rms_norm(v, w, RMSNormForm.ROUND_THEN_SCALE), F.linear)
    for a, b in zip(gradients([mine], inputs), gradients([theirs], inputs), strict=True):
        assert torch.equal(a, b)


def test_views_and_changed_outputs_are_saved_as_usual() -> None:
    """Only the very tensor that the norm returned can be computed again."""
    inputs = x, scale, weight = leaves((4, 8), torch.float32, 5)
    for change in (lambda y: y.view(2, 2, 8), lambda y: y.mul_(2), lambda y: y[1:]):
        mine = linear(change(rms_norm(x, scale, EPS)), weight)
        theirs = F.linear(change(plain_rms_norm(x, scale, RMSNormForm.ROUND_THEN_SCALE)), weight)
        for a, b in zip(gradients([mine], inputs), gradients([theirs], inputs), strict=True):
            torch.testing.assert_close(a, b)


def test_an_output_changed_without_gradients_is_saved_as_it_is() -> None:
    x, scale, weight = leaves((3, 16), torch.float32, 4)
    y = rms_norm(x, scale, EPS)
    with torch.no_grad():
        y.mul_(3.0)  # leaves grad_fn alone
    out = linear(y, weight)
    (mine,) = gradients([out], [weight])
    (theirs,) = gradients([F.linear(y.detach(), weight)], [weight])
    assert torch.equal(mine, theirs)


def test_a_changed_norm_weight_is_noticed() -> None:
    x, scale, weight = leaves((4, 8), torch.float32, 5)
    out = linear(rms_norm(x, scale, EPS), weight)
    with torch.no_grad():
        scale.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("autocast", [False, True])
def test_a_changed_weight_of_a_linear_layer_is_noticed(autocast: bool) -> None:
    x, scale, weight = leaves((4, 8), torch.float32, 5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = linear(rms_norm(x, scale, EPS), weight)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"weight of shape \(5, 8\) .*modified by an inplace operation"):
        out.sum().backward()


def test_a_look_at_the_graph_from_outside_holds_nothing() -> None:
    x, scale, weight = leaves((4, 8), torch.float32, 5)
    y = rms_norm(x, scale, EPS)
    node = linear(y, weight).grad_fn
    assert torch.equal(node._saved_self, y)
    assert torch.equal(node._saved_mat2, weight.t())
    assert y.grad_fn.held.output is None


def test_a_weights_gradient_may_be_differentiated() -> None:
    """It is torch's own, and depends on the norm's input through one backward pass of the norm."""
    inputs = x, scale, weight = leaves((4, 8), torch.float32, 5)
    results = []
    for y in (rms_norm(x, scale, EPS), plain_rms_norm(x, scale, RMSNormForm.ROUND_THEN_SCALE)):
        out = (linear if y.grad_fn.name() == "_RMSNormBackward" else F.linear)(y, weight)
        (gradient,) = torch.autograd.grad(out.square().sum(), [weight], create_graph=True)
        results.append(torch.autograd.grad(gradient.square().sum(), inputs))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_two_backwards_and_partial_backwards() -> None:
    inputs = x, scale, *weights = leaves((4, 8), torch.float32, 5, 3)
    y = rms_norm(x, scale, EPS)
    first, second = (linear(y, w) for w in weights)
    theirs = plain_rms_norm(x, scale, RMSNormForm.ROUND_THEN_SCALE)
    expected = gradients([F.linear(theirs, w) for w in weights], inputs)
    held = y.grad_fn.held
    (alone,) = torch.autograd.grad(first.sum(), weights[0], retain_graph=True)
    torch.testing.assert_close(alone, theirs.sum(0).expand(5, 8))
    assert held.saved is None, "what a pass held is dropped at its end, though the norm itself did not run"
    for _ in range(2):
        generator = torch.Generator().manual_seed(2)
        upstream = [torch.randn(o.shape, generator=generator) for o in (first, second)]
        got = torch.autograd.grad([first, second], inputs, upstream, retain_graph=True)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)
        assert held.output is None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_activation_checkpointing(use_reentrant: bool) -> None:
    inputs = x, scale, *weights = leaves((4, 8), torch.float32, 8, 8)

    def block(v: Tensor) -> Tensor:
        y = rms_norm(v, scale, EPS)
        return v + linear(y, weights[0]) * linear(y, weights[1])

    expected = gradients([block(x)], inputs)
    out = checkpoint(block, x, use_reentrant=use_reentrant)
    if use_reentrant:
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)))
        got = tuple(t.grad for t in inputs)
    else:
        got = gradients([out], inputs)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_each_saved_tensor_is_packed_and_unpacked_once() -> None:
    x, scale, *weights = leaves((4, 8), torch.float32, 5, 3, 2)
    packed: list[Tensor] = []
    unpacked: list[int] = []

    def pack(tensor: Tensor) -> int:
        packed.append(tensor)
        return len(packed) - 1

    def unpack(number: int) -> Tensor:
        unpacked.append(number)
        return packed[number]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = rms_norm(x, scale, EPS)
        total = torch.cat([linear(y, w) for w in weights], -1).sum()
    assert sum(t.shape == (4, 8) for t in packed) == 1
    total.backward()
    assert sorted(unpacked) == list(range(len(packed)))


def test_scaling_the_loss_scales_gradients_exactly() -> None:
    inputs = x, scale, weight = leaves((4, 8), torch.float32, 5)
    once, quarter = (
        torch.autograd.grad(linear(rms_norm(x, scale, EPS), weight).sum() * c, inputs) for c in (1.0, 0.25)
    )
    for a, b in zip(once, quarter, strict=True):
        assert torch.equal(a * 0.25, b)


@pytest.mark.parametrize("norm", [nn.RMSNorm(8), nn.RMSNorm(8, eps=1e-3), nn.LayerNorm(8)])
def test_norm_linear_is_the_modules_in_a_row(norm: nn.Module) -> None:
    layer = NormLinear(norm, [nn.Linear(8, 5), nn.Linear(8, 3, bias=False)])
    x = torch.randn(4, 8, requires_grad=True)
    inputs = [x, *layer.parameters()]
    theirs = [project(layer.norm(x)) for project in layer.linears]
    mine = list(layer(x))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    for a, b in zip(gradients(mine, inputs), gradients(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_torch_compile_traces_it() -> None:
    inputs = x, scale, weight = leaves((4, 8), torch.float32, 5)

    def function(v: Tensor) -> Tensor:
        return linear(rms_norm(v, scale, EPS), weight) + linear(layer_norm(v, scale, scale), weight)

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    mine, theirs = compiled(x), function(x)
    for a, b in zip(gradients([mine], inputs), gradients([theirs], inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_calls_mean_the_same(dtype: torch.dtype) -> None:
    """They take over on CUDA; here their CPU path answers."""
    x, weight = (t.detach() for t in leaves((3, 5, 64), dtype))
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    y, rstd = norms.rms_norm_forward(x, weight, EPS)
    for mine, theirs in zip((y, rstd), norms.kernels.rms_norm_forward(x, weight, EPS), strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    dx, through_rstd, dweight = norms.rms_norm_backward(dy, x, weight, rstd)
    dx = dx if through_rstd is None else dx + through_rstd
    for mine, theirs in zip((dx, dweight), norms.kernels.rms_norm_backward(dy, x, weight, rstd), strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * float(mine.abs().max()))


def test_nan_reaches_the_gradients() -> None:
    x, scale, weight = leaves((4, 8), torch.float32, 5)
    with torch.no_grad():
        x[1, 1] = float("nan")
    linear(rms_norm(x, scale, EPS), weight).sum().backward()
    assert x.grad is not None
    assert x.grad[1].isnan().all()
    assert not x.grad[0].isnan().any()


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"weight must be \[8\].*got \(7,\)"):
        rms_norm(torch.zeros(2, 8), torch.zeros(7), EPS)
    with pytest.raises(ValueError, match="bias must be"):
        layer_norm(torch.zeros(2, 8), None, torch.zeros(7))
    with pytest.raises(ValueError, match="norm must have a weight"):
        NormLinear(nn.LayerNorm(8, elementwise_affine=False), [])
