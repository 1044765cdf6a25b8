from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtrain.planner.flags import TierSpec, parse_channels, parse_duplex, parse_rate, parse_tier
from memtrain.planner.hardware import GIVEN, Quoted
from memtrain.planner.links import DISKS, HOST_LINKS, bus_mixed
from memtrain.planner.units import GiB, TiB


@pytest.mark.parametrize(
    ("flag", "text", "expected"),
    [
        ("dram", "1TiB", (None, 1, TiB, None)),
        ("dram", "1.5 TiB@8xddr5-4800", (None, 1, 3 * TiB // 2, "8xddr5-4800")),
        ("nvme", "4TB@6GB/s", (None, 1, 4 * 10**12, "6GB/s")),
        ("nvme", "2x4TB@6GB/s,5GB/s", (None, 2, 8 * 10**12, "6GB/s,5GB/s")),
        ("nvme", "/mnt/fast:4TB", ("/mnt/fast", 1, 4 * 10**12, None)),
        ("nvme", "/mnt/a:b:2x1TB@nvme-gen5", ("/mnt/a:b", 2, 2 * 10**12, "nvme-gen5")),
        ("cxl", "1:2x128GiB@20GB/s", ("1", 2, 256 * GiB, "20GB/s")),
    ],
)
def test_tiers_are_read(flag: str, text: str, expected: tuple[str | None, int, int, str | None]) -> None:
    place, count, size, rates = expected
    assert parse_tier(flag, text) == TierSpec(place=place, count=count, size_bytes=size, rates=rates)


@pytest.mark.parametrize(
    ("flag", "text", "message"),
    [
        (
            "nvme",
            "4TB@6GB/s@5GB/s",
            r"cannot read --nvme '4TB@6GB/s@5GB/s': write it as '4TB', '4TB@6GB/s,5GB/s'",
        ),
        ("nvme", "fast", r"^--nvme 'fast': cannot read 'fast' as a size"),
        ("dram", "12", r"^--dram '12': 12 has no unit; say 12GiB, as in '1TiB'"),
        ("nvme", "", r"cannot read --nvme ''"),
        ("nvme", "0x4TB", r"nvme '0x4TB' has no bytes: give a size above 0, or leave --nvme out"),
        ("cxl", "4XB", r"cxl '4XB': cannot read '4XB' as a size: write a number and one of B, KB"),
        ("dram", "0:1TiB", r"dram '0:1TiB': memory has no place '0'"),
    ],
)
def test_tiers_that_cannot_be_read_name_value_and_remedy(flag: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_tier(flag, text)


def test_one_two_and_three_rates() -> None:
    def rates(text: str) -> tuple[float, float, float]:
        link = parse_duplex("nvme", text, DISKS)
        return link.read.value, link.write.value, link.mixed.value

    assert rates("6GB/s") == pytest.approx((6e9, 6e9, 6e9))
    assert rates("6GB/s,3GB/s") == pytest.approx((6e9, 3e9, 4e9))  # 2 / (1/6 + 1/3)
    assert rates("6GB/s, 3GB/s, 5GB/s") == pytest.approx((6e9, 3e9, 5e9))
    assert rates("1GiB/s") == pytest.approx((2**30, 2**30, 2**30))


def test_given_rates_say_so_and_a_bus_works_both_ways_at_once() -> None:
    link = parse_duplex("host link", "25GB/s", HOST_LINKS, bus_mixed)
    assert link.read == Quoted(value=25e9, source=GIVEN)
    assert link.mixed.value == pytest.approx(50e9 * 37.12 / 51)
    assert link.mixed.source.startswith("assumption: ")
    assert parse_duplex("nvme", "gen5", DISKS).name == "nvme-gen5"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("6GB/s,5GB/s,4GB/s,3GB/s", r"nvme '6GB/s,5GB/s,4GB/s,3GB/s' has 4 rates; at most 3"),
        ("6GB/min", r"nvme: cannot read '6GB/min' as a rate: write a size and '/s', such as '6GB/s'"),
        ("6/s", r"nvme: cannot read '6/s' as a rate: 6 has no unit; say 6GB/s"),
        ("0GB/s", r"nvme: a rate must be above 0, got '0GB/s'"),
        ("fast/s", r"nvme: cannot read 'fast/s' as a rate: cannot read 'fast' as a size"),
        ("6GB/s,5GB/s,12GB/s", r"both directions at once cannot move 1\.2e\+10 bytes/s"),
        ("nvme-gen6", r"no nvme preset is called 'nvme-gen6'; did you mean nvme-gen\d"),
        ("6GB", r"no nvme preset is called '6GB'"),
    ],
)
def test_rates_that_cannot_be_read_name_value_and_remedy(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_duplex("nvme", text, DISKS)


def test_channels() -> None:
    assert parse_channels("8xddr5-4800").value == pytest.approx(8 * 0.8 * 38.4e9)
    assert parse_channels("8xDDR5-4800").source.startswith("derived: 8 channels of [assumption: 0.8")
    assert parse_channels("200GB/s") == Quoted(value=200e9, source=GIVEN)
    for text in ("ddr5-4800", "0xddr5-4800", "8xddr5-4900", "8"):
        with pytest.raises(ValueError, match=rf"dram: cannot read '{text}' as bandwidth.*8xddr5-4800"):
            parse_channels(text)
    with pytest.raises(ValueError, match=r"did you mean .*ddr5-4800 or"):
        parse_channels("8xddr5-4900")


@given(st.integers(1, 10**15), st.integers(1, 64), st.integers(1, 10**12))
def test_what_is_written_is_what_is_read(size: int, count: int, rate: int) -> None:
    spec = parse_tier("nvme", f"/swap:{count}x{size}B@{rate}B/s")
    assert (spec.place, spec.count, spec.size_bytes) == ("/swap", count, count * size)
    assert parse_rate("nvme", str(spec.rates)).value == rate
