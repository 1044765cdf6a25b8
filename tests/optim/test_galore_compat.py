"""``compat="galore-1.0"`` beside the package galore-torch 1.0 itself, on a CPU, with its SVD."""

import pytest
import torch
from torch import nn

from memtrain.optim.named import GaLore

STEPS, GAP = 25, 6


def run(optimizer, weights, scale=1.0):
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for weight in weights:
            weight.grad = scale * torch.randn(weight.shape, generator=generator)
        optimizer.step()
        yield [weight.detach().clone() for weight in weights]


def both(shapes, vectors=((7,),), *, scale=1.0, **settings):
    """Pairs of all weights after every step, theirs and ours."""
    from galore_torch import GaLoreAdamW

    sides = []
    low = dict(rank=4, update_proj_gap=GAP, scale=0.25, proj_type=settings.pop("proj_type", "std"))
    for make in (
        lambda groups: GaLoreAdamW(groups, no_deprecation_warning=True, **settings),
        lambda groups: GaLore(groups, compat="galore-1.0", **settings),
    ):
        generator = torch.Generator().manual_seed(9)
        matrices, others = (
            [nn.Parameter(torch.randn(shape, generator=generator)) for shape in each]
            for each in (shapes, vectors)
        )
        optimizer = make([{"params": others}, {"params": matrices, **low}])
        sides.append(run(optimizer, [*others, *matrices], scale))
    for theirs, ours in zip(*sides, strict=True):
        yield from zip(theirs, ours, strict=True)


@pytest.mark.venv_optim
@pytest.mark.filterwarnings("ignore")  # of what galore-torch imports
@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
def test_every_step_is_theirs(proj_type):
    """Tall, wide and square; refreshes at steps 0, 6, 12, 18 and 24. The two differ by rounding, which SVD
    and Adam amplify: 1e-5 of weights that move by .2; a wrong order of operations is above 1e-3."""
    for theirs, ours in both([(12, 9), (9, 12), (10, 10)], lr=0.01, weight_decay=0.1, proj_type=proj_type):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.venv_optim
@pytest.mark.filterwarnings("ignore")
def test_eps_and_decay_stand_where_theirs_do():
    """Gradients of 1e-5 with eps 1e-6: eps on the corrected root would be an error of 30% at the first steps;
    weight decay before the update, of lr^2."""
    pairs = list(both([(12, 9)], lr=0.05, weight_decay=0.5, eps=1e-6, scale=1e-5))
    for theirs, ours in pairs:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.venv_optim
@pytest.mark.filterwarnings("ignore")
def test_the_grid_s_own_order_is_another():
    """The comparison can fail."""
    from galore_torch import GaLoreAdamW

    theirs, ours = ([nn.Parameter(torch.ones(12, 9))] for _ in range(2))
    settings = dict(rank=4, update_proj_gap=GAP, scale=0.25, proj_type="std")
    first = GaLoreAdamW([{"params": theirs, **settings}], lr=0.05, no_deprecation_warning=True)
    second = GaLore(ours, lr=0.05, **settings)
    *_, last = zip(run(first, theirs, 1e-5), run(second, ours, 1e-5), strict=True)
    assert float((last[0][0] - last[1][0]).abs().max()) > 1e-3


def test_what_compat_fixes_and_refuses():
    weight = nn.Parameter(torch.zeros(6, 5))
    optimizer = GaLore([weight], compat="galore-1.0", rank=2)
    group = optimizer.param_groups[0]
    fixed = ("projection", "refresh", "eps_on", "decay_order", "eps")
    assert [group[name] for name in fixed] == ["svd", "keep", "uncorrected", "after", 1e-6]
    with pytest.raises(ValueError, match=r"compat='galore-1.0' fixes \['refresh'\]"):
        GaLore([weight], compat="galore-1.0", rank=2, refresh="rotate")
    with pytest.raises(ValueError, match=r"compat must be 'galore-1.0' or None, got 'galore-2'"):
        GaLore([weight], compat="galore-2", rank=2)
    with pytest.raises(ValueError, match=r"is for fp32 parameters, got torch.bfloat16"):
        GaLore([nn.Parameter(torch.zeros(6, 5, dtype=torch.bfloat16))], compat="galore-1.0", rank=2)
