"""When bases are renewed, and what becomes of the moments."""

import pytest
import torch

from memtrain.optim.grid import GridOptimizer
from memtrain.optim.refresh import RefreshPolicy, leading_cosine


def schedule(policy, steps, *, offset=0, cosine=None, missing=(), stored=None, start=0):
    """The steps at which a parameter refreshes that has no gradient at ``missing``."""
    stored, done = policy.empty() if stored is None else stored, []
    for step in range(start, steps):
        if step not in missing and policy.is_due(stored, step):
            policy.done_(stored, step, offset=offset, cosine=cosine if step else None)
            done.append(step)
    return done


def test_every_gap_from_the_first_step():
    assert schedule(RefreshPolicy(gap=4), 13) == [0, 4, 8, 12]


def test_an_offset_shortens_the_first_period():
    assert schedule(RefreshPolicy(gap=4), 13, offset=3) == [0, 3, 7, 11]


def test_who_has_no_gradient_catches_up_and_keeps_to_the_schedule():
    assert schedule(RefreshPolicy(gap=4), 16, missing={4, 5}) == [0, 6, 8, 12]
    assert schedule(RefreshPolicy(gap=4), 16, missing={0, 1, 2, 3, 4, 5, 6, 7}) == [8, 12]


def test_lazy_doubles_the_gap_after_five_small_changes():
    # Five cosines are there at the sixth refresh, step 10: the gap becomes 4, then 8, 16 and 32, and each
    # refresh falls on the next multiple of its gap.
    policy = RefreshPolicy(gap=2, lazy=True)
    assert schedule(policy, 70, cosine=0.9) == [0, 2, 4, 6, 8, 10, 12, 16, 32, 64]
    assert schedule(policy, 60, cosine=0.1) == list(range(0, 60, 2))


def test_the_schedule_may_lie_on_any_device():
    """Machinery that moves states moves it, and tensors of its own making must follow."""
    policy = RefreshPolicy(gap=2, lazy=True)
    stored = policy.empty()
    with torch.device("meta"):
        for step in range(7):
            policy.done_(stored, step, offset=0, cosine=step / 10)
    torch.testing.assert_close(stored["cosines"], torch.tensor([0.2, 0.3, 0.4, 0.5, 0.6]))
    assert int(stored["growth"]) == 2


def test_a_gap_that_is_changed_counts_from_the_next_refresh_on():
    """Also where a lazy schedule has doubled the old one."""
    stored = RefreshPolicy(gap=2, lazy=True).empty()
    schedule(RefreshPolicy(gap=2, lazy=True), 12, cosine=0.9, stored=stored)
    # Twice as long by now; four and then three of the last five changes are small, which doubles it twice.
    later = schedule(RefreshPolicy(gap=5, lazy=True), 81, cosine=0.1, stored=stored, start=12)
    assert later == [12, 20, 40, 80]


def test_cosine_ignores_the_sign_of_a_singular_vector():
    basis = torch.linalg.qr(torch.randn(8, 3, generator=torch.Generator().manual_seed(0))).Q
    assert leading_cosine(basis, -basis) == pytest.approx(1, abs=1e-6)
    assert leading_cosine(basis, basis[:, [1, 0, 2]]) == pytest.approx(0, abs=1e-6)
    assert leading_cosine(torch.stack((basis, basis)), torch.stack((basis, basis[:, [1, 0, 2]]))) == (
        pytest.approx(0.5, abs=1e-6)
    )


def test_bytes():
    for lazy in (False, True):
        policy = RefreshPolicy(lazy=lazy)
        live = sum(t.numel() * t.element_size() for t in policy.empty().values())
        assert live == policy.size_bytes() == (36 if lazy else 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [(dict(gap=0), "update_gap must be at least 1, got 0"), (dict(moments="drop"), "keep, reset or rotate")],
)
def test_fields_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        RefreshPolicy(**fields)


def bases_changed(optimizer, weights, gradients):
    """Per step, which weights got a new basis."""
    changed = []
    for gradient in gradients:
        before = [optimizer.state[w].get("projector.right", torch.zeros(1)).clone() for w in weights]
        for weight in weights:
            weight.grad = gradient.clone()
        optimizer.step()
        after = [optimizer.state[w]["projector.right"] for w in weights]
        changed.append([not torch.equal(a, b) for a, b in zip(before, after, strict=True)])
    return changed


def gradients_of(count):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 6, generator=generator) for _ in range(count)]


def test_spread_refreshes_a_quarter_of_four_weights_a_step():
    weights = [torch.nn.Parameter(torch.zeros(8, 6)) for _ in range(4)]
    optimizer = GridOptimizer(weights, projection="svd", rank=2, update_gap=4, spread=True)
    changed = bases_changed(optimizer, weights, gradients_of(9))
    assert changed[0] == [True] * 4
    for step in range(1, 9):
        assert [i for i, c in enumerate(changed[step]) if c] == [step % 4]


def test_without_spread_all_refresh_together():
    weights = [torch.nn.Parameter(torch.zeros(8, 6)) for _ in range(2)]
    optimizer = GridOptimizer(weights, projection="svd", rank=2, update_gap=3)
    changed = bases_changed(optimizer, weights, gradients_of(7))
    assert [all(c) for c in changed] == [True, False, False, True, False, False, True]
    assert [any(c) for c in changed] == [all(c) for c in changed]


@pytest.mark.parametrize("policy", ["keep", "reset", "rotate"])
def test_what_becomes_of_the_moments(policy):
    weight = torch.nn.Parameter(torch.zeros(8, 6))
    optimizer = GridOptimizer([weight], projection="svd", rank=2, update_gap=3, refresh=policy)
    gradients = gradients_of(4)
    for gradient in gradients[:3]:
        weight.grad = gradient
        optimizer.step()
    state = {name: tensor.clone() for name, tensor in optimizer.state[weight].items()}
    weight.grad = gradients[3]
    optimizer.step()
    after = optimizer.state[weight]
    low = gradients[3] @ after["projector.right"]
    mean = {
        "keep": state["exp_avg.value"],
        "reset": torch.zeros(8, 2),
        "rotate": state["exp_avg.value"] @ state["projector.right"].T @ after["projector.right"],
    }[policy]
    torch.testing.assert_close(after["exp_avg.value"], 0.9 * mean + 0.1 * low, atol=1e-5, rtol=1e-5)
    assert float(after["step"]) == (1 if policy == "reset" else 4)
