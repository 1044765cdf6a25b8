from __future__ import annotations

import pytest

from memtrain import htmlpage
from memtrain.planner.ranges import profile_bytes
from memtrain.planpage import colours
from memtrain.planpage.colours import (
    CATEGORIES,
    action_inks,
    hatches,
    ink_style,
    legend,
    luminance,
    place_colour,
)
from memtrain.planpage.queues import KINDS
from tests.memtrain.planpage.samples import chain


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_luminance_of_the_ends_and_of_grey() -> None:
    assert luminance("#000000") == 0.0
    assert luminance("#ffffff") == pytest.approx(1.0)
    assert luminance("#808080") == pytest.approx(0.2159, abs=1e-4)  # ((128/255 + 0.055) / 1.055) ** 2.4


@pytest.mark.parametrize(
    "colour",
    sorted(
        {
            *CATEGORIES.values(),
            *KINDS.values(),
            *(place_colour(i, n) for n in range(1, 10) for i in range(n)),
        }
    ),
)
def test_colours_are_seen_on_light_and_dark_and_carry_white_text(colour: str) -> None:
    assert contrast(colour, htmlpage.LIGHT) >= 4.5
    assert contrast(colour, htmlpage.DARK) >= 3.0


def test_every_category_has_a_colour_of_its_own_in_the_order_of_the_stack() -> None:
    assert tuple(CATEGORIES) == profile_bytes.CATEGORIES
    assert len(set(CATEGORIES.values())) == len(CATEGORIES)


def test_actions_in_the_order_of_the_tokens() -> None:
    labels = [
        "keep",
        "swap:host",
        "swap:nvme",
        "recompute",
        "compress-swap:int8:host",
        "compress:int8",
        "slot",
    ]
    inks = action_inks(chain(), labels)
    assert list(inks) == [
        "recompute",
        "compress:int8",
        "compress-swap:int8:host",
        "swap:nvme",
        "swap:host",
        "slot",
        "keep",
    ]
    # A place has one colour; hatching tells what is compressed.
    assert inks["swap:host"].colour == inks["compress-swap:int8:host"].colour
    assert inks["keep"].colour == inks["compress:int8"].colour
    assert [label for label, ink in inks.items() if ink.hatched] == [
        "compress:int8",
        "compress-swap:int8:host",
    ]
    looks = [(ink.colour, ink.hatched) for ink in inks.values()]
    assert len(set(looks)) == len(looks)


def test_hatched_inks_have_a_pattern_and_others_a_colour() -> None:
    inks = action_inks(chain(), ["keep", "compress:int8"])
    assert ink_style(inks.values()) == f".a0{{fill:url(#a0h)}}\n.a1{{fill:{colours.GREEN}}}\n"
    assert hatches(inks.values()).count('<pattern id="a0h"') == 1
    assert hatches([inks["keep"]]) == ""


def test_a_legend_escapes() -> None:
    assert "swap to a&lt;b" in legend([("swap to a<b", 'class="a0"')])
