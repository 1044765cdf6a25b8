from __future__ import annotations

import math

import pytest

from memtrain.planner.ranges.plan import Range
from memtrain.planpage.words import (
    action_text,
    brief_texts,
    gap_text,
    gib_cell,
    names_text,
    quantity_text,
    range_text,
    seconds_text,
    share_text,
)
from tests.memtrain.planpage.samples import GIB


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.000 s"),
        (12.3456, "12.346 s"),
        (123.456, "123.5 s"),
        (0.0123456, "12.3 ms"),
        (45.6e-6, "45.6 µs"),
    ],
)
def test_seconds_have_a_unit_that_fits(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_shares_and_sizes() -> None:
    assert share_text(0.4321) == "43.2 %"
    assert gap_text(0.00084) == "0.084 %"
    assert gib_cell(GIB * 3 // 2) == "1.500"
    assert gib_cell(0) == "-"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (25e9, "bytes/s", "25 GB/s"),
        (80.0 * GIB, "bytes", "80 GiB"),
        (312e12, "FLOP/s", "312 TFLOP/s"),
        (0.73, "of the peak", "0.73 of the peak"),
        (math.nan, "", ""),
    ],
)
def test_quantities_in_the_size_people_read(value: float, unit: str, text: str) -> None:
    assert quantity_text(value, unit) == text


@pytest.mark.parametrize(
    ("label", "text"),
    [
        ("keep", "keep"),
        ("slot", "stay in slot"),
        ("recompute", "recompute"),
        ("swap:nvme", "swap to nvme"),
        ("compress:int8", "compress (int8)"),
        ("compress-swap:int8:host", "compress (int8), swap to host"),
    ],
)
def test_every_kind_of_action_has_words(label: str, text: str) -> None:
    assert action_text(label) == text


def test_a_range_in_ever_fewer_words() -> None:
    part = Range(tensor="X", start=4, stop=11, action="swap:host")
    assert range_text(part, 16) == "swap to host 7/16"
    assert brief_texts(part, 16) == ("swap to host 7/16", "host 7/16", "7/16")
    whole = Range(tensor="X", start=0, stop=16, action="compress-swap:int8:host")
    assert brief_texts(whole, 16) == ("compress (int8), swap to host", "int8, host", "16/16")


def test_names_of_a_stretch() -> None:
    assert names_text(["layers.2"]) == "layers.2"
    assert names_text([f"layers.{i}" for i in range(2, 78)]) == "layers.2 to layers.77 (76)"
