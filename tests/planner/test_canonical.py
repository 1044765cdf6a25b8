"""Canonical JSON and its hash, worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import pytest

from memtrain.planner.canonical import canonical_json, check_version, digest, plain, reading, short_digest
from memtrain.planner.machine import Machine
from memtrain.planner.plan import Plan
from memtrain.planner.profile import ModelProfile
from memtrain.planner.ranges.plan import RangePlan


class Colour(str, Enum):
    RED = "red"


@dataclass(frozen=True)
class Inner:
    share: float


@dataclass(frozen=True)
class Outer:
    name: str
    colour: Colour
    parts: tuple[Inner, ...]


ONE = Outer("a", Colour.RED, (Inner(0.12345678912), Inner(2.0)))


def test_plain_and_canonical() -> None:
    assert plain(ONE) == {
        "name": "a",
        "colour": "red",
        "parts": [{"share": 0.12345678912}, {"share": 2.0}],
    }
    text = '{"colour":"red","name":"a","parts":[{"share":0.123456789},{"share":2.0}]}'
    assert canonical_json(plain(ONE, digits=9)) == text
    assert type(plain(ONE)["colour"]) is str


def test_digest_is_that_of_sha256sum() -> None:
    """``printf '{"a":1}' | sha256sum``."""
    expected = "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"
    assert digest({"a": 1}) == expected
    assert short_digest({"a": 1}) == expected[:16]
    assert digest({"b": 1, "a": [2]}) == digest({"a": [2], "b": 1})


def test_what_is_no_number_has_no_canonical_form() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(math.nan)


def test_errors_of_documents_are_named() -> None:
    with pytest.raises(ValueError, match=r"not a thing: KeyError\('x'\)"), reading("a thing"):
        raise KeyError("x")
    check_version({"version": 2}, 2, "thing")
    with pytest.raises(ValueError, match="thing version None, this memtrain reads 2"):
        check_version({}, 2, "thing")


@pytest.mark.parametrize(
    "read", [Plan.from_json, RangePlan.from_json, ModelProfile.from_json, Machine.from_json]
)
@pytest.mark.parametrize("text", ["", "null", "[]", "1", '{"plan": null}', '{"plan": []}', "[" * 100_000])
def test_a_file_of_something_else_is_no_document(read: Callable[[str], Any], text: str) -> None:
    with pytest.raises(ValueError, match=r"^not a |, this memtrain reads \d"):
        read(text)
