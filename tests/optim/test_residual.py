"""What becomes of the rest of the gradient, by the formulas of the five kinds."""

import pytest
import torch

from memtrain.optim.projection import Projection, ProjectionError
from memtrain.optim.residual import Residual
from memtrain.optim.storage import RandomKey

KEY = RandomKey(seed=1, parameter=0, step=0)
SHAPE = torch.Size((6, 9))


def opened_of(projector, gradient=None):
    stored = projector.empty("cpu")
    projector.refresh_(stored, gradient, key=KEY)
    return projector.open(stored, torch.device("cpu"))


@pytest.fixture
def parts():
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(SHAPE, generator=generator)
    projector = Projection(kind="svd", rank=2).bind(SHAPE)
    opened = opened_of(projector, gradient)
    low = projector.down(opened, gradient)
    direction = torch.randn(low.shape, generator=generator)
    return gradient, low, direction, projector, opened


def combine(residual, parts, memory=None):
    gradient, low, direction, projector, opened = parts
    residual.check(projector)
    memory = residual.empty(projector, "cpu") if memory is None else memory
    return residual.combine(gradient, low, direction.clone(), projector, opened, memory)


def test_none_leaves_the_rest_out(parts):
    _, _, direction, projector, opened = parts
    expected = 0.25 * projector.up(opened, direction)
    torch.testing.assert_close(combine(Residual(scale=0.25), parts), expected)


@pytest.mark.parametrize("kind", ["sign", "sgd"])
def test_sign_and_sgd_add_their_rule_of_the_rest(kind, parts):
    gradient, low, direction, projector, opened = parts
    rest = gradient - projector.up(opened, low)
    rule = rest.sign() if kind == "sign" else rest
    expected = 0.5 * projector.up(opened, direction) + 0.1 * rule
    found = combine(Residual(kind=kind, scale=0.5, residual_scale=0.1), parts)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [SHAPE, (1, 5)])
def test_the_sign_of_rounding_is_no_residual(shape):
    """A projection on everything leaves nothing out, and what is left of the difference is rounding."""
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    projector = Projection(kind="svd", rank=min(shape)).bind(torch.Size(shape))
    opened = opened_of(projector, gradient)
    low = projector.down(opened, gradient)
    found = combine(Residual(kind="sign"), (gradient, low, low, projector, opened))
    torch.testing.assert_close(found, gradient)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_scaled_and_scale_only_use_the_ratio_of_norms(granularity, parts):
    gradient, low, direction, projector, opened = parts
    dim = 0 if granularity == "channel" else (0, 1)  # 6 < 9: the left basis shortens rows
    ratio = direction.norm(dim=dim, keepdim=True) / low.norm(dim=dim, keepdim=True)
    rest = gradient - projector.up(opened, low)
    scaled = Residual(kind="scaled", scale=0.25, granularity=granularity)
    expected = 0.25 * projector.up(opened, direction) + ratio * rest
    torch.testing.assert_close(combine(scaled, parts), expected)
    only = Residual(kind="scale_only", scale=16, granularity=granularity)
    torch.testing.assert_close(combine(only, parts), 4 * ratio * gradient)


def test_channels_are_rows_where_columns_are_shortened(parts):
    gradient, _, _, _, _ = parts
    projector = Projection(kind="rademacher", rank=4, side="right").bind(SHAPE)
    opened = opened_of(projector)
    low = projector.down(opened, gradient)
    direction = low * torch.arange(1.0, 7.0)[:, None]
    found = combine(Residual(kind="scale_only"), (gradient, low, direction, projector, opened))
    torch.testing.assert_close(found, gradient * torch.arange(1.0, 7.0)[:, None])


def test_limiter_lets_norms_grow_by_one_percent(parts):
    gradient, low, _, projector, opened = parts
    residual = Residual(kind="scale_only", granularity="tensor")
    memory = residual.empty(projector, "cpu")
    norms = []
    for factor in (1.0, 10.0, 10.0, 0.1, 10.0):
        update = combine(residual, (gradient, low, factor * low, projector, opened), memory)
        norms.append(float(update.norm() / gradient.norm()))
        assert float(memory["norm"]) == pytest.approx(float(update.norm()), rel=1e-5)
    assert norms == pytest.approx([1, 1.01, 1.01**2, 0.1, 0.101], rel=1e-5)


def test_without_limiter_nothing_is_kept(parts):
    residual = Residual(kind="scale_only", limiter=None)
    assert residual.empty(parts[3], "cpu") == {}
    assert residual.size_bytes(parts[3]) == 0
    assert Residual(kind="scale_only").size_bytes(parts[3]) == 4


def test_experts_are_limited_and_scaled_one_by_one():
    shape = torch.Size((2, 6, 9))
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    projector = Projection(kind="gaussian", rank=2).bind(shape)
    opened = opened_of(projector)
    low = projector.down(opened, gradient)
    residual = Residual(kind="scale_only", granularity="tensor")
    memory = residual.empty(projector, "cpu")
    assert memory["norm"].shape == (2,)
    direction = low * torch.tensor([2.0, 3.0])[:, None, None]
    update = combine(residual, (gradient, low, direction, projector, opened), memory)
    torch.testing.assert_close(update, gradient * torch.tensor([2.0, 3.0])[:, None, None])
    direction = low * torch.tensor([200.0, 1.5])[:, None, None]
    update = combine(residual, (gradient, low, direction, projector, opened), memory)
    torch.testing.assert_close(update, gradient * torch.tensor([2.02, 1.5])[:, None, None])


@pytest.mark.parametrize("kind", ["scaled", "scale_only"])
@pytest.mark.parametrize("scale", [0.0, 1e-15])
def test_ratios_of_tiny_and_zero_channels(kind, scale, parts):
    """A column of zeros stays zero, and a column of 1e-15 is scaled as any other."""
    gradient, _, _, projector, opened = parts
    gradient = gradient.clone()
    gradient[:, 3] *= scale
    low = projector.down(opened, gradient)
    direction = torch.ones_like(low)
    update = combine(Residual(kind=kind, scale=1.0), (gradient, low, direction, projector, opened))
    assert bool(torch.isfinite(update).all())
    if kind == "scale_only":
        expected = 2**0.5 / float(low[:, 3].norm()) * gradient[:, 3] if scale else torch.zeros(6)
        torch.testing.assert_close(update[:, 3], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["sign", "sgd", "scaled"])
@pytest.mark.parametrize("projection", ["gaussian", "rademacher"])
def test_projections_that_are_none_are_refused_by_name(kind, projection):
    projector = Projection(kind=projection, rank=2).bind(SHAPE)
    with pytest.raises(ProjectionError, match=rf"residual '{kind}' needs an orthonormal.*'{projection}'"):
        Residual(kind=kind).check(projector)


@pytest.mark.parametrize("fields", [dict(kind="svd", rank=2, side="full"), dict(kind="randk", density=0.5)])
def test_channels_need_a_projection_of_one_side(fields):
    projector = Projection(**fields).bind(SHAPE)
    with pytest.raises(ProjectionError, match="by channel needs a projection of one side"):
        Residual(kind="scaled").check(projector)
    Residual(kind="scaled", granularity="tensor").check(projector)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(kind="all"), "residual must be one of"),
        (dict(granularity="row"), "granularity must be channel or tensor"),
        (dict(limiter=1.0), "limiter must be > 1 or None, got 1.0"),
        (dict(scale=-1.0), "scale must be >= 0, got -1.0"),
        (dict(residual_scale=-0.5), "residual_scale must be >= 0"),
    ],
)
def test_fields_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        Residual(**fields)
