"""The checker: sound addresses pass, every planted fault is found and named."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtrain.planner.buffers import Buffer
from memtrain.planner.check_addresses import AddressRule, check_addresses
from tests.planner.packings import Span, named, spans

BUFFERS = (
    Buffer("a", 0, 4, 512),
    Buffer("b", 2, 6, 1024),
    Buffer("c", 4, 8, 512),
    Buffer("d", 6, 8, 512),
)
SOUND = {"a": 0, "b": 512, "c": 0, "d": 1024}


def test_sound_addresses_pass() -> None:
    assert check_addresses(BUFFERS, SOUND, capacity=1536, alignment=512) == ()
    assert check_addresses((), {}) == ()


@pytest.mark.parametrize(
    ("change", "rule", "names", "detail"),
    [
        ({"b": 256}, AddressRule.OVERLAP, ("a", "b"), "share bytes in moments 2 to 3"),
        ({"b": 1}, AddressRule.OVERLAP, ("a", "b"), r"a and b: \[0, 512\) and \[1, 1025\)"),
        ({"d": 511}, AddressRule.OVERLAP, ("c", "d"), "moments 6 to 7"),
        ({"d": 0}, AddressRule.OVERLAP, ("c", "d"), "moments 6 to 7"),
        ({"d": 1536}, AddressRule.CAPACITY, ("d",), "ends at 2048, 512 bytes above 1536"),
        ({"d": 1000}, AddressRule.ALIGNMENT, ("d",), "lies at 1000, no multiple of 512"),
        ({"a": -512}, AddressRule.NEGATIVE, ("a",), "lies at -512"),
        ({"e": 0}, AddressRule.UNKNOWN, ("e",), "address 0 belongs to no buffer"),
        ({"c": None}, AddressRule.MISSING, ("c",), "512 bytes have no address"),
    ],
)
def test_a_planted_fault_is_found_and_named(
    change: Mapping[str, int | None], rule: AddressRule, names: tuple[str, ...], detail: str
) -> None:
    offsets = {name: at for name, at in {**SOUND, **change}.items() if at is not None}
    faults = check_addresses(BUFFERS, offsets, capacity=1536, alignment=512)
    found = [fault for fault in faults if fault.rule is rule]
    assert [fault.buffers for fault in found] == [names]
    with pytest.raises(ValueError, match=detail):
        raise ValueError(found[0].detail)


def test_a_name_for_two_buffers_is_a_fault_of_its_own() -> None:
    (fault,) = check_addresses([*BUFFERS, Buffer("a", 9, 10, 1)], SOUND)
    assert (fault.rule, fault.buffers) == (AddressRule.UNIQUE, ("a",))


def test_one_that_collides_does_not_hide_another() -> None:
    # b collides with a; d, which dies last, collides with c although b lay between them.
    buffers = [*(Buffer(name, 0, 9, 100) for name in "abc"), Buffer("d", 5, 9, 100)]
    faults = check_addresses(buffers, {"a": 0, "b": 50, "c": 100, "d": 150})
    assert [fault.buffers for fault in faults] == [("a", "b"), ("c", "d")]


@given(spans(7), st.lists(st.integers(0, 12), min_size=7, max_size=7))
def test_collisions_are_those_of_all_pairs(items: list[Span], places: list[int]) -> None:
    buffers = named(items)
    offsets = {b.name: places[i] for i, b in enumerate(buffers)}

    def collide(a: Buffer, b: Buffer) -> bool:
        low, other = offsets[a.name], offsets[b.name]
        at_once = any(b.start <= moment < b.end for moment in range(a.start, a.end))
        return at_once and any(other <= byte < other + b.size for byte in range(low, low + a.size))

    pairs = {(a.name, b.name) for a in buffers for b in buffers if a is not b and collide(a, b)}
    faults = check_addresses(buffers, offsets)
    assert {fault.rule for fault in faults} == ({AddressRule.OVERLAP} if pairs else set())
    assert {fault.buffers for fault in faults} <= pairs
