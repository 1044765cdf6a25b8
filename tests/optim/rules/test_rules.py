"""Inner rules against torch's own optimizers or by hand, and their rotation."""

import pytest
import torch

from memtrain.optim.projection.base import MatrixOverlap
from memtrain.optim.rules import Adafactor, Adam, AdamMini, Lion, Momentum, Natural
from memtrain.optim.rules.base import Rule

RULES: dict[str, Rule] = {
    "adam": Adam(),
    "adam_mini": AdamMini(),
    "adafactor": Adafactor(),
    "lion": Lion(),
    "momentum": Momentum(),
    "natural": Natural(inner=Adam(), history=3),
}


def zeros(rule, shape):
    return {name: torch.zeros(spec.shape) for name, spec in rule.moments(torch.Size(shape)).items()}


def directions(rule, gradients):
    moments = zeros(rule, gradients[0].shape)
    return [rule.direction(moments, g, step) for step, g in enumerate(gradients, 1)]


def gradients_of(shape, count=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def moved_by(optimizer_class, gradients, **settings):
    """How far each step of a torch optimizer with learning rate one moves a weight."""
    weight = torch.nn.Parameter(torch.zeros(gradients[0].shape, dtype=torch.float64))
    optimizer = optimizer_class([weight], lr=1.0, **settings)
    moves = []
    for gradient in gradients:
        before = weight.detach().clone()
        weight.grad = gradient.double()
        optimizer.step()
        moves.append((before - weight.detach()).float())
    return moves


@pytest.mark.parametrize(
    ("rule", "torch_class", "settings"),
    [
        (Adam(betas=(0.8, 0.95), eps=1e-3), torch.optim.Adam, dict(betas=(0.8, 0.95), eps=1e-3)),
        (Momentum(momentum=0.7), torch.optim.SGD, dict(momentum=0.7)),
        (Momentum(momentum=0.7, nesterov=True), torch.optim.SGD, dict(momentum=0.7, nesterov=True)),
    ],
)
def test_directions_equal_torch(rule, torch_class, settings):
    gradients = gradients_of((4, 3))
    for ours, theirs in zip(
        directions(rule, gradients), moved_by(torch_class, gradients, **settings), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-6)


def test_eps_on_the_uncorrected_root():
    """galore-torch: m = .1, v = .001, corrections .1 and .001: sqrt(.001)/.1 * .1 / (sqrt(.001) + eps)."""
    (direction,) = directions(Adam(eps=0.1, eps_on="uncorrected"), [torch.ones(1)])
    assert float(direction) == pytest.approx(0.001**0.5 / (0.001**0.5 + 0.1), rel=1e-5)


def test_lion_by_hand():
    first, second, third = directions(Lion(betas=(0.9, 0.5)), [torch.tensor([g]) for g in (1.0, -0.1, -9.0)])
    # Momentum after the steps: .5, .2; 0.9 * .5 - .1 * .1 > 0; .9 * .2 - .1 * 9 < 0.
    assert [float(first), float(second), float(third)] == [1, 1, -1]


def test_adam_mini_divides_each_row_by_its_mean_square():
    gradient = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    (direction,) = directions(AdamMini(eps=0), [gradient])
    root = 12.5**0.5  # of the mean of 9 and 16
    torch.testing.assert_close(direction, torch.tensor([[3.0, 4.0], [3.0, 4.0]]) / root)
    assert AdamMini().moments(torch.Size((5, 7)))["exp_avg_sq"].shape == (5, 1)
    assert AdamMini().moments(torch.Size((7,)))["exp_avg_sq"].shape == (1,)
    assert AdamMini().moments(torch.Size(()))["exp_avg_sq"].shape == ()


def test_adafactor_by_hand():
    """The first step has b2 = 0: rows (5, 20), columns (4, 21) are the means of the squares."""
    gradient = torch.tensor([[1.0, 3.0], [7**0.5, 33**0.5]])
    (direction,) = directions(Adafactor(clip_threshold=1e9), [gradient])
    second = torch.outer(torch.tensor([5.0, 20.0]), torch.tensor([4.0, 21.0])) / 12.5
    torch.testing.assert_close(direction, gradient / second.sqrt())
    (clipped,) = directions(Adafactor(clip_threshold=0.5), [gradient])
    assert float(clipped.square().mean().sqrt()) == pytest.approx(0.5, rel=1e-5)


def test_adafactor_decay_of_the_second_step():
    """b2 = 1 - 2^-.8 = .4257 at step 2; a vector keeps its second moment whole."""
    gradients = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])]
    weight = 2**-0.8
    second = (1 - weight) * gradients[0] ** 2 + weight * gradients[1] ** 2
    result = directions(Adafactor(clip_threshold=1e9), gradients)[1]
    torch.testing.assert_close(result, gradients[1] / second.sqrt())


def test_adafactor_clips_the_matrices_of_a_stack_one_by_one():
    rule = Adafactor()
    a, b = gradients_of((2, 4, 3), count=2)
    (stacked,) = directions(rule, [torch.stack((a[0], 100 * b[0]))])
    torch.testing.assert_close(stacked[0], directions(rule, [a[0]])[0])
    torch.testing.assert_close(stacked[1], directions(rule, [100 * b[0]])[0])


def test_natural_direction_solves_with_the_fisher_matrix():
    gradients = gradients_of((3, 4), count=6)
    rule = Natural(inner=Momentum(momentum=0), history=4, damping=0.05)
    found = directions(rule, gradients)
    for step in range(6):
        last = torch.stack([g.reshape(-1) for g in gradients[max(0, step - 3) : step + 1]]).double()
        size = last.square().sum(1).mean()
        fisher = 0.05 * size * torch.eye(12, dtype=torch.float64) + last.T @ last
        expected = size * torch.linalg.solve(fisher, gradients[step].reshape(-1).double()).reshape(3, 4)
        torch.testing.assert_close(found[step].double(), expected, rtol=1e-3, atol=1e-4)


def test_natural_direction_of_a_stack_is_that_of_its_matrices():
    gradients = gradients_of((2, 3, 4), count=4)
    rule = Natural(inner=Momentum(momentum=0), history=3)
    together = directions(rule, gradients)[-1]
    for expert in range(2):
        alone = directions(rule, [g[expert] for g in gradients])[-1]
        torch.testing.assert_close(together[expert], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shape", [(4, 6), (2, 4, 6)])
def test_rotation_by_a_permutation_only_renames(name, shape):
    """Rules are the same for all coordinates, or for all rows: after a permutation of rows, and of the
    gradients to come, the directions are the permuted ones."""
    rule = RULES[name]
    gradients = gradients_of(shape, count=6)
    permutation = torch.tensor([2, 0, 3, 1])
    overlap = MatrixOverlap(left=torch.eye(4)[permutation].expand(*shape[:-2], 4, 4))
    straight, turned = zeros(rule, shape), zeros(rule, shape)
    for step, gradient in enumerate(gradients, 1):
        expected = rule.direction(straight, gradient, step)
        if step <= 3:
            rule.direction(turned, gradient, step)
            if step == 3:
                rule.rotate_(turned, overlap, torch.Size(shape), 3)
        else:
            found = rule.direction(turned, gradient[..., permutation, :], step)
            torch.testing.assert_close(found, expected[..., permutation, :], rtol=1e-4, atol=1e-4)


def test_adam_rotation_by_hand():
    """One coordinate pair, turned by 45 degrees, after two steps with betas of a half.

    m = 3/4 mhat and v = 3/4 vhat. mhat = (2, 0), vhat = (6, 2): variances (2, 2), and squared means (4, 0).
    C = (1, 1; -1, 1)/sqrt 2: means (sqrt 2, -sqrt 2), variances (2, 2): second moments (4, 4).
    """
    moments = {
        "exp_avg": torch.tensor([[2.0], [0.0]]) * 0.75,
        "exp_avg_sq": torch.tensor([[6.0], [2.0]]) * 0.75,
    }
    turn = torch.tensor([[1.0, 1.0], [-1.0, 1.0]]) / 2**0.5
    Adam(betas=(0.5, 0.5)).rotate_(moments, MatrixOverlap(left=turn), torch.Size((2, 1)), 2)
    torch.testing.assert_close(moments["exp_avg"], torch.tensor([[2**0.5], [-(2**0.5)]]) * 0.75)
    torch.testing.assert_close(moments["exp_avg_sq"], torch.tensor([[4.0], [4.0]]) * 0.75)


@pytest.mark.parametrize("name", RULES)
def test_second_moments_stay_positive_through_any_rotation(name):
    rule = RULES[name]
    shape = (5, 4)
    moments = zeros(rule, shape)
    for step, gradient in enumerate(gradients_of(shape, count=4), 1):
        rule.direction(moments, gradient, step)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(4))).Q
    rule.rotate_(moments, MatrixOverlap(left=turn), torch.Size(shape), 4)
    for moment, spec in rule.moments(torch.Size(shape)).items():
        assert bool(torch.isfinite(moments[moment]).all())
        if not spec.signed:
            assert bool((moments[moment] >= 0).all())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Adam(betas=(0.9, 1.0)), r"Adam: betas\[1\] must be in \[0, 1\), got 1.0"),
        (lambda: Adam(eps=-1e-8), "eps must be >= 0"),
        (lambda: Momentum(momentum=1.5), "momentum must be in"),
        (lambda: Lion(betas=(-0.1, 0.9)), r"Lion: betas\[0\]"),
        (lambda: Adafactor(beta2_decay=0.8), "beta2_decay must be < 0, got 0.8"),
        (lambda: Adafactor(clip_threshold=0), "clip_threshold must be > 0"),
        (lambda: Natural(inner=Adam(), history=0), "history must be at least 1"),
        (lambda: Natural(inner=Adam(), damping=0), "damping must be > 0"),
    ],
)
def test_numbers_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
