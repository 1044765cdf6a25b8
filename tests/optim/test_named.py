"""Names and groups of the well-known optimizers; that they work is for test_common.py."""

import copy

import pytest
import torch
from torch import nn

from memtrain.optim.named import FRUGAL, AdamW8bit, Apollo, ApolloMini, Fira, GaLore, NaturalGaLore


def matrix():
    return nn.Parameter(torch.ones(80, 64))


def group_of(optimizer, *names, index=0):
    return tuple(optimizer.param_groups[index][name] for name in names)


def test_authors_names_become_settings():
    galore = GaLore([matrix()], rank=4, update_proj_gap=50, scale=0.5, proj_type="left")
    assert group_of(galore, "projection", "rank", "update_gap", "scale", "side") == (
        "power",
        4,
        50,
        0.5,
        "left",
    )
    frugal = FRUGAL(
        [matrix()],
        density=0.5,
        update_gap=10,
        inactive_update_rule="sgd",
        proj_params_lr_scale=2.0,
        inactive_lr_scale=0.1,
        reset_statistics=True,
        proj_side="right",
    )
    names = ("density", "update_gap", "residual", "scale", "residual_scale", "refresh", "side")
    assert group_of(frugal, *names) == (0.5, 10, "sgd", 2.0, 0.1, "reset", "right")
    assert group_of(FRUGAL([matrix()], reset_statistics=False), "refresh") == ("keep",)
    assert group_of(FRUGAL([matrix()], inactive_update_rule="no"), "residual") == ("none",)
    assert group_of(FRUGAL([matrix()], rank=7), "rank", "density") == (7, None)
    fira = Fira([matrix()], rank=4)
    assert group_of(fira, "residual", "scale", "update_gap") == ("scaled", 0.25, 200)
    apollo = Apollo([matrix()], rank=4, scale_type="tensor", proj="svd")
    assert group_of(apollo, "residual", "granularity", "projection", "refresh") == (
        "scale_only",
        "tensor",
        "svd",
        "keep",
    )
    mini = ApolloMini([matrix()])
    assert group_of(mini, "rank", "scale", "granularity", "projection") == (1, 128.0, "tensor", "gaussian")
    natural = NaturalGaLore([matrix()], rank=4, history=5, damping=0.1, update_proj_gap=9)
    assert group_of(natural, "history", "damping", "update_gap") == (5, 0.1, 9)
    assert group_of(AdamW8bit([matrix()]), "state_dtype", "weight_decay") == ("int8", 1e-2)


def test_groups_with_and_without_a_rank_as_in_galore_torch():
    first, second, third = matrix(), matrix(), matrix()
    optimizer = GaLore(
        [
            {"params": [first]},
            {"params": [second], "rank": 4, "update_proj_gap": 7, "scale": 1.0, "proj_type": "right"},
            {"params": [third], "rank": 8},
        ]
    )
    names = ("projection", "rank", "update_gap", "scale", "side")
    assert group_of(optimizer, *names, index=0) == (None,) * 5
    assert group_of(optimizer, *names, index=1) == ("power", 4, 7, 1.0, "right")
    assert group_of(optimizer, *names, index=2) == ("power", 8, 200, 0.25, "std")
    for weight in (first, second, third):
        weight.grad = torch.rand_like(weight)
    optimizer.step()
    shapes = [tuple(optimizer.state[weight]["exp_avg.value"].shape) for weight in (first, second, third)]
    assert shapes == [(80, 64), (80, 4), (80, 8)]


def test_a_group_may_leave_the_projection():
    optimizer = FRUGAL([{"params": [matrix()]}, {"params": [matrix()], "projection": None}])
    assert group_of(optimizer, "projection", "density", index=0) == ("power", 0.25)
    assert group_of(optimizer, "projection", "density", index=1) == (None, None)


def test_two_names_for_one_setting_are_refused():
    with pytest.raises(ValueError, match="update_proj_gap and update_gap are two names"):
        GaLore([matrix()], rank=4, update_gap=3)
    with pytest.raises(ValueError, match="inactive_update_rule must be one of sign_sgd, sgd, no"):
        FRUGAL([matrix()], inactive_update_rule="adam")
    with pytest.raises(ValueError, match=r"inactive_lr_scale=0.5: with inactive_update_rule='no'"):
        FRUGAL([matrix()], inactive_update_rule="no", inactive_lr_scale=0.5)


@pytest.mark.parametrize(
    ("make", "key", "instead"),
    [
        (GaLore, "compat", "leave it out"),
        (FRUGAL, "inactive_update_rule", "say residual="),
        (FRUGAL, "reset_statistics", "say refresh="),
        (FRUGAL, "is_proj_params", "say density=None"),
    ],
)
def test_arguments_of_the_constructor_are_not_ignored_in_a_group(make, key, instead):
    with pytest.raises(TypeError, match=f"'{key}' is an argument of {make.__name__}: in a group {instead}"):
        make([{"params": [matrix()], "rank": 4, key: True}])


def test_compat_outlives_a_copy():
    optimizer = copy.deepcopy(GaLore([matrix()], rank=4, compat="galore-1.0"))
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="is for fp32 parameters"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(8, 8).bfloat16())], "rank": 2})


def test_bytes_of_a_matrix_by_hand():
    """80 x 64: with rank 4 the right basis has 64 x 4 entries, each moment 80 x 4; counters are 4 + 8."""

    def parts(optimizer):
        return optimizer.state_bytes()

    galore = dict(moments=2 * 80 * 4 * 4, master=0, projector=64 * 4 * 4, counters=12)
    assert parts(GaLore([matrix()], rank=4)) == galore
    # A key instead of a basis, and the limiter's norm.
    assert parts(Apollo([matrix()], rank=4)) == {**galore, "projector": 24, "counters": 16}
    # 16 of 64 columns and a key.
    columns = FRUGAL([matrix()], projection="columns")
    assert parts(columns) == dict(moments=2 * 80 * 16 * 4, master=0, projector=24, counters=12)
    # One byte an element and an fp32 scale for 128 of them, twice.
    eight = dict(moments=2 * (80 * 64 + 40 * 4), master=0, projector=0, counters=4)
    assert parts(AdamW8bit([matrix()])) == eight
