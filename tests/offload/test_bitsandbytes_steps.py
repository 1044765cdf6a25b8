"""bitsandbytes' block-wise optimizers, streamed piece by piece: bit for bit as whole parameters."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from memtrain.offload.optimizer_probe import UnsupportedOptimizerError, state_cuts
from memtrain.offload.state_cuts import SHARED
from memtrain.planner.actions import UpdateSchedule
from tests.offload.optimizer_runs import AHEAD, SEQUENTIAL, assert_equal_models, assert_equal_state, train
from tests.offload.training import STAGING, make_model, make_plan, open_engine, plain_run, trainable, wrap

HERE = importlib.util.find_spec("bitsandbytes") is not None
pytestmark = [
    pytest.mark.venv_optim,
    pytest.mark.skipif(
        not HERE and not os.environ.get("MEMTRAIN_REQUIRE_VENV_OPTIM"),
        reason="needs .venv-optim (sh scripts/setup_optim.sh)",
    ),
]
KINDS = {
    "AdamW8bit": {"lr": 1e-2},
    "Lion8bit": {"lr": 1e-3},
    "AdamW": {"lr": 1e-2},
}
CUTS = {"state1": 1, "absmax1": 256, "qmap1": SHARED}
FINE = dataclasses.replace(STAGING, update_shard_elements=6144)
"""The tails of parameters have fewer than 4096 elements: as parameters they would not be quantised."""


def _make(kind: str) -> Any:
    import bitsandbytes

    return lambda parameters: getattr(bitsandbytes.optim, kind)(parameters, **KINDS[kind])


@pytest.fixture
def manager() -> Iterator[Any]:
    from bitsandbytes.optim import GlobalOptimManager

    found = GlobalOptimManager.get_instance()
    yield found
    found.initialize()


@pytest.mark.parametrize(("kind", "count"), [("AdamW8bit", 2), ("Lion8bit", 1)])
def test_a_trial_finds_codes_scales_and_code_books(kind: str, count: int) -> None:
    optimizer = _make(kind)([nn.Parameter(torch.ones(4))])
    expected = {f"{key[:-1]}{number + 1}": cut for number in range(count) for key, cut in CUTS.items()}
    assert state_cuts(optimizer, optimizer.param_groups[0], torch.float32) == expected


@pytest.mark.parametrize(
    ("kind", "dtype", "schedule"),
    [
        ("AdamW8bit", torch.float32, SEQUENTIAL),
        ("AdamW8bit", torch.bfloat16, AHEAD),
        ("Lion8bit", torch.bfloat16, SEQUENTIAL),
        ("AdamW", torch.float32, AHEAD),
    ],
)
def test_fine_cuts_equal_the_optimizer_itself(
    kind: str, dtype: torch.dtype, schedule: UpdateSchedule
) -> None:
    make = _make(kind)
    expected, plain, _ = plain_run(make, steps=2, dtype=dtype)
    model = make_model(dtype)
    with open_engine() as engine:
        optimizer = wrap(model, make(trainable(model)), engine, make_plan(schedule, staging=FINE))
        assert optimizer.layout.elementwise
        train(model, optimizer, steps=2)
        assert_equal_models(model, expected)
        assert_equal_state(optimizer, model, plain)
        optimizer.close()


def test_overrides_of_single_parameters_are_refused(manager: Any) -> None:
    model = make_model()
    optimizer = _make("AdamW8bit")(trainable(model))
    manager.override_config(model.embed.weight, "optim_bits", 32)
    with (
        open_engine() as engine,
        pytest.raises(UnsupportedOptimizerError, match="GlobalOptimManager overrides"),
    ):
        wrap(model, optimizer, engine)
