from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtrain.planner.units import MOST_BYTES, GiB, format_gib, parse_bytes, parse_size, round_up


@pytest.mark.parametrize(
    ("text", "size"),
    [("1.2GiB", 1288490189), ("40 GB", 40 * 10**9), ("1024", 1024), (" 3 mib ", 3 << 20), ("0B", 0), (7, 7)],
)
def test_sizes_are_read_in_both_bases(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1.2.3GB", "5 parsecs", "1e9", -1, True, 1.5, None])
def test_what_is_no_size_is_refused_by_value(text: object) -> None:
    with pytest.raises(ValueError, match=r"size|negative"):
        parse_bytes(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["8388608TiB", "9" * 400 + "GB"])
def test_sizes_beyond_64_bits_are_refused(text: str) -> None:
    assert parse_bytes("8388607TiB") <= MOST_BYTES
    with pytest.raises(ValueError, match="is more than can be addressed, 8388607 TiB: lower it"):
        parse_bytes(text)


def test_a_size_without_a_unit_is_refused_where_nobody_means_bytes() -> None:
    assert parse_size("12GiB") == 12 << 30
    assert parse_size(" 0 ") == 0
    for text in ("12", " 12.5 "):
        with pytest.raises(ValueError, match=f"^{text.strip()} has no unit; say {text.strip()}GiB$"):
            parse_size(text)
    with pytest.raises(ValueError, match=r"^6 has no unit; say 6GB/s$"):
        parse_size("6", unit="GB/s")


def test_printed_as_gib() -> None:
    assert format_gib(GiB + GiB // 2) == "1.500 GiB"


@given(st.integers(0, 10**15), st.integers(1, 10**7))
def test_round_up_is_the_least_multiple(value: int, multiple: int) -> None:
    rounded = round_up(value, multiple)
    assert rounded % multiple == 0
    assert value <= rounded < value + multiple
