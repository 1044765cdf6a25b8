from __future__ import annotations

import math

import pytest

from memtrain.planner.ranges.plan import BlockPlan, Held, Range
from memtrain.planpage.words import (
    action_text,
    brief_texts,
    class_text,
    folded_rows,
    gap_text,
    gib_cell,
    held_text,
    names_text,
    quantity_text,
    range_text,
    seconds_text,
    share_text,
    updates_text,
)
from tests.memtrain.planpage.samples import GIB, chain, decided
from tests.planner.ranges.small import tensors


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


def test_a_class_of_a_block() -> None:
    x, a, _ = tensors(4, again=(1.0, 1.0, 1.0, 1.0))
    ranges = (
        Range(tensor="X", start=0, stop=4, action="keep"),
        Range(tensor="A", start=0, stop=1, action="recompute"),
        Range(tensor="A", start=1, stop=4, action="swap:host"),
    )
    block = BlockPlan(name="b", ranges=ranges)
    assert class_text(block, x) == "keep"
    assert class_text(block, a) == "recompute 1/4, swap to host 3/4"
    assert class_text(block, None) == "-"


def test_state_of_a_block_adds_up_the_ways_to_update() -> None:
    def held(update: str, place: str, pieces: int) -> Held:
        return Held(state="optimizer", update=update, place=place, pieces=pieces)

    block = BlockPlan(
        name="b",
        ranges=(),
        updates=(("cpu-ahead", 3), ("device-ahead", 1)),
        held=(held("cpu-ahead", "host", 2), held("device-ahead", "host", 1), held("cpu-ahead", "nvme", 1)),
    )
    assert held_text(block, "optimizer", 4) == "host 3/4, nvme 1/4"
    assert held_text(block, "weights", 4) == "-"
    assert updates_text(block, 4) == "cpu-ahead 3/4, device-ahead 1/4"


def test_equal_neighbours_are_one_row() -> None:
    one = chain()
    header, rows = folded_rows(one, decided(one).blocks)
    assert header == ["X", "A", "O", "parameter", "gradient", "optimizer", "update"]
    # The last block sends nothing.
    assert [(row.indices.start, row.indices.stop) for row in rows] == [(0, 7), (7, 8)]
    assert rows[0].cells == (
        "swap to host",
        "recompute 2/4, keep 2/4",
        "compress (int8) 2/4, swap to nvme 2/4",
        "device",
        "host",
        "host",
        "cpu-ahead",
    )
    assert rows[1].cells[0] == "keep"


def test_names_of_a_stretch() -> None:
    assert names_text(["layers.2"]) == "layers.2"
    assert names_text([f"layers.{i}" for i in range(2, 78)]) == "layers.2 to layers.77 (76)"
