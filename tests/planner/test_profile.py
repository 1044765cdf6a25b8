from __future__ import annotations

import dataclasses

import pytest

from memtrain.planner.profile import ModelProfile, NearlyFree, Prefixes
from tests.planner.toys import make_block, make_profile


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


def test_another_version_is_refused() -> None:
    old = make_profile(1).to_json().replace('"version":4', '"version":3')
    with pytest.raises(ValueError, match="profile version 3, this memtrain reads 4"):
        ModelProfile.from_json(old)


def test_negative_and_impossible_numbers_are_named() -> None:
    with pytest.raises(ValueError, match=r"BlockProfile.saved_bytes must be >= 0, got -1"):
        make_block(saved_bytes=-1, attention_bytes=-2)
    with pytest.raises(ValueError, match="attention_bytes 3 exceeds saved_bytes 2"):
        make_block(saved_bytes=2, attention_bytes=3)
    with pytest.raises(ValueError, match="micro_batches must be >= 1, got 0"):
        make_profile(1, micro_batches=0)


@pytest.mark.parametrize(
    "text", ['{"version": 99}', '{"version": 4}', '{"version": 4, "blocks": [], "units": [], "x": 1}']
)
def test_what_is_no_profile_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="profile"):
        ModelProfile.from_json(text)


def test_a_slower_step_slows_what_is_computed_again_too() -> None:
    nearly_free = NearlyFree(stored_bytes=1, stored_tensors=1, seconds=0.25, backward_bytes=1)
    prefixes = Prefixes(
        tokens=4,
        lengths=(2,),
        differences=(0.0,),
        overhead_seconds=0.5,
        cut_bytes=4,
        whole_bytes=0,
        largest_bytes=1,
    )
    one = make_profile(1, trainable=True)
    block = dataclasses.replace(one.blocks[0], nearly_free=nearly_free, prefixes=prefixes)
    profile = dataclasses.replace(one, blocks=(block,))
    slow = profile.in_a_step(2.0).blocks[0]
    assert slow.nearly_free == dataclasses.replace(nearly_free, seconds=0.5)
    assert slow.prefixes == dataclasses.replace(prefixes, overhead_seconds=1.0)
