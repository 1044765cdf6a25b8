"""Presets against the published sizes of their models."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("transformers")

from memtrain.planner.model_presets import PARAMETERS, PRESETS
from memtrain.planner.tracing.fake_model import build, read_config


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_have_their_published_size(name: str) -> None:
    with FakeTensorMode():
        model = build(read_config(name), torch.bfloat16, "default")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_every_preset_has_a_size() -> None:
    assert PRESETS.keys() == PARAMETERS.keys()
