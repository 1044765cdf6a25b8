from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from memtrain.planner.profile import PROFILE_VERSION, ModelProfile, ParameterUpdate
from tests.planner.toys import make_block, make_nearly_free, make_prefixes, make_profile


def test_round_trip_and_digest() -> None:
    profile = make_profile(2, trainable=True)
    again = ModelProfile.from_json(profile.to_json())
    assert again == profile
    assert again.digest == profile.digest
    assert dataclasses.replace(profile, micro_batches=2).digest != profile.digest


def test_in_a_step_every_part_takes_longer_and_nothing_else_changes() -> None:
    profile = make_profile(1, trainable=True)
    slow = profile.in_a_step(2.0)
    assert slow.blocks == (
        make_block(0, forward_seconds=0.020, backward_seconds=0.040, attention_seconds=0.008),
    )
    assert slow.units == (dataclasses.replace(profile.units[0], update_seconds=0.002),)
    around = {
        "prologue_forward_seconds": 0.002,
        "prologue_backward_seconds": 0.004,
        "epilogue_forward_seconds": 0.006,
        "epilogue_backward_seconds": 0.008,
    }
    assert slow == dataclasses.replace(profile, blocks=slow.blocks, units=slow.units, **around)
    assert profile.in_a_step(1.0) is profile


def test_parts_that_are_computed_again_read_back_and_take_longer_in_a_step() -> None:
    block = make_block(nearly_free=make_nearly_free(), prefixes=make_prefixes())
    profile = make_profile(block_profiles=(block,))
    assert ModelProfile.from_json(profile.to_json()) == profile
    slow = profile.in_a_step(2.0).blocks[0]
    assert slow.nearly_free == make_nearly_free(forward_seconds=0.004)
    assert slow.prefixes == make_prefixes(overhead_seconds=0.002)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": (4, 2, 6)}, r"lengths must ascend between 1 and 7 tokens, got \(4, 2, 6\)"),
        ({"lengths": (2, 4, 8)}, "between 1 and 7 tokens"),
        ({"differences": (0.0,)}, "3 prefixes have 1 differences"),
        ({"overhead_seconds": -1.0}, "Prefixes.overhead_seconds must be >= 0"),
        ({"cut_bytes": 9}, "cut_bytes 9 has no 8 equal rows"),
        ({"whole_bytes": 8}, "cut_bytes 10485760 and whole_bytes 8 exceed saved_bytes 10485760"),
        ({"tokens": 7, "lengths": (2,), "differences": (0.0,)}, "input_bytes 1048576 has no 7 equal rows"),
    ],
)
def test_prefixes_that_cannot_be_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_block(prefixes=make_prefixes(**changes))


def test_another_version_is_refused() -> None:
    old = make_profile(1).to_json().replace(f'"version":{PROFILE_VERSION}', '"version":4')
    with pytest.raises(ValueError, match=f"profile version 4, this memtrain reads {PROFILE_VERSION}"):
        ModelProfile.from_json(old)


def test_negative_and_impossible_numbers_are_named() -> None:
    with pytest.raises(ValueError, match=r"BlockProfile.saved_bytes must be >= 0, got -1"):
        make_block(saved_bytes=-1, attention_bytes=-2)
    with pytest.raises(ValueError, match="attention_bytes 3 exceeds saved_bytes 2"):
        make_block(saved_bytes=2, attention_bytes=3)
    with pytest.raises(ValueError, match="micro_batches must be >= 1, got 0"):
        make_profile(1, micro_batches=0)


@pytest.mark.parametrize(
    "text", ['{"version": 99}', '{"version": 5}', '{"version": 5, "blocks": [], "units": [], "x": 1}']
)
def test_what_is_no_profile_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="profile"):
        ModelProfile.from_json(text)


def test_parameters_that_are_updated_whole_read_back() -> None:
    update = ParameterUpdate(elements=5, record_bytes=4096, gradient_bytes=8192, workspace_bytes=7)
    profile = make_profile(1)
    unit = dataclasses.replace(profile.units[0], updates=(update,))
    profile = dataclasses.replace(profile, units=(unit,))
    assert ModelProfile.from_json(profile.to_json()) == profile
    with pytest.raises(ValueError, match=r"ParameterUpdate.record_bytes must be >= 0, got -1"):
        dataclasses.replace(update, record_bytes=-1)
