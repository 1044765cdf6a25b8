from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from memtrain.planner.ranges.formulate import formulate
from memtrain.planner.ranges.plan import BlockPlan, RangePlan, Relaxation, make_plan
from memtrain.planpage import Alternative, PageInput, render
from tests.memtrain.planpage.samples import GIB, chain, changed, decided, page_of, sample
from tests.planner.ranges.small import block, problem

VOID = {"meta"}
SVG = re.compile(r"<svg .*?</svg>", re.DOTALL)


class Balanced(HTMLParser):
    """Every tag that is opened is closed, in order; what it says is collected."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def parsed(text: str) -> Balanced:
    parser = Balanced()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


def words(page: PageInput) -> str:
    return " ".join(" ".join(parsed(render(page)).texts).split())


def test_the_page_is_well_formed_and_so_is_every_picture() -> None:
    text = render(sample())
    parsed(text)
    pictures = SVG.findall(text)
    for picture in pictures:
        ET.fromstring(picture)
    # Device, host, NVMe; the whole step and two enlargements; the map of eight blocks is not enlarged.
    assert sum('role="img"' in picture for picture in pictures) == 7


def test_nothing_is_loaded_and_nothing_runs() -> None:
    page = parsed(render(sample()))
    names = {name for name, _ in page.attributes}
    assert not names & {"src", "href", "onclick", "onload", "srcset", "action", "xlink:href"}
    outside = [value for name, value in page.attributes if "//" in value and name != "xmlns"]
    assert outside == []
    text = render(sample())
    assert all(word not in text for word in ("<script", "<link", "<img", "<iframe", "@import", "url(http"))
    # An address of a source is text.
    assert "https://example.org/bus (peak)" in words(sample())


def test_the_same_input_gives_the_same_bytes() -> None:
    first, second = sample(), sample()
    assert first.plan.provenance == {}
    slower = changed(second.plan, provenance={"seconds": 7.5})
    assert render(first) == render(page_of(second.problem, slower))


def test_answers_come_first() -> None:
    said = words(sample())
    one = sample()
    peak = one.plan.peaks[0]
    left = peak.capacity_bytes - peak.size_bytes
    verdict = f"Fits. {left / GIB:.3f} GiB ({left:,} bytes) of device memory to spare."
    assert said.index(verdict) < said.index("What lies where")
    for answer in (
        "25.0 % slower than",
        "12,346 tokens/s",
        "43.2 % MFU",
        f"{one.plan.step_seconds:.1f} s step",
    ):
        assert said.index(answer) < said.index("What lies where"), answer


def test_the_certificate_says_what_is_proved() -> None:
    said = words(sample())
    assert "no plan of this problem takes less than 50.000 s; the best may be up to 5.000 % faster" in said
    assert "solver by hand" in said
    assert sample().plan.digest in said
    one = chain()
    nothing = changed(decided(one), status="heuristic", lower_bound_seconds=0.0)
    assert "Nothing is proved" in words(page_of(one, nothing))
    best = changed(decided(one), status="optimal", gap=0.0008)
    assert "within 0.080 % of the best" in words(page_of(one, best))


def test_the_bill_is_ordered_and_ends_with_margins() -> None:
    said = words(sample())
    lines = ("weights 2.000 - -", "optimizer state - 48.000 -", "saved tensors 3.000 - -")
    weights, optimizer, saved = (said.index(line) for line in lines)
    assert weights < optimizer < saved
    assert "limit 400.000 400.000 4000.000" in said


def test_the_ablation_is_sorted_and_names_what_does_not_fit() -> None:
    said = words(sample())
    assert "recompute all" in said
    assert "+10.00 %" in said
    assert said.index("recompute all") < said.index("keep all does not fit device short by 3.000 GiB")
    assert "Against other rules" not in words(sample(ablation=()))


def test_the_part_of_a_step_that_no_plan_decides_is_named() -> None:
    one = sample()
    said = words(sample(step_seconds=one.plan.step_seconds + 2.5))
    assert "the whole step takes 2.500 s more" in said
    assert "more: idle time" not in words(one)


def short_plan() -> tuple[PageInput, RangePlan]:
    one = chain(capacity=10)
    found = (
        Relaxation(what="device", missing_bytes=3 * GIB),
        Relaxation(what="codec int4"),
        Relaxation(what="sequence", share=0.75),
    )
    plan = decided(one, status="infeasible", relaxations=found)
    nothing = (Alternative(name="keep all", step_seconds=math.inf, why_not="device short by 3.000 GiB"),)
    return page_of(one, plan, ablation=nothing), plan


def test_what_does_not_fit_says_by_how_much_and_what_would_help() -> None:
    page, plan = short_plan()
    said = words(page)
    missing = plan.peaks[0].size_bytes - 10 * GIB
    assert missing > 0
    assert f"Does not fit: device is short by {missing / GIB:.3f} GiB ({missing:,} bytes)." in said
    assert "device: 3.000 GiB more (3,221,225,472 bytes)" in said
    assert "allow codec int4 (lossy)" in said
    assert "a shorter sequence: 75.0 % of this one fits" in said
    assert "Proved: no plan of this problem stays within every limit." in said
    # The plan of least memory is not the fastest one: of its speed nothing is said.
    assert all(word not in said for word in ("lower bound", "MFU", "tokens/s", "unlimited"))
    assert "this plan does not fit keep all does not fit device short" in said


def test_a_plan_without_decisions_is_drawn() -> None:
    """What is returned when not even more device memory would help."""
    one = chain(3, capacity=1)
    formulated = formulate(one)
    nothing = make_plan(
        formulated,
        formulated.decisions({}),
        status="infeasible",
        lower_bound_seconds=0.0,
        gap=0.0,
        solver="none: nothing fits",
    )
    said = words(page_of(one, nothing, ablation=()))
    assert "No placement keeps every limit at once." in said
    assert "No single change was found that makes it fit." in said


def test_blocks_that_save_nothing_are_drawn() -> None:
    one = problem(2, 1000, blocks=tuple(block(i, classes=()) for i in range(2)))
    formulated = formulate(one)
    plan = make_plan(
        formulated,
        formulated.decisions({}),
        status="optimal",
        lower_bound_seconds=24.0,
        gap=0.0,
        solver="by hand",
    )
    text = render(page_of(one, plan, bill=()))
    parsed(text)
    assert "No block saves tensors that could be decided on." in text


def test_names_are_escaped_wherever_they_stand() -> None:
    one = chain(prefix="a<b>&\"'.")
    text = render(page_of(one, decided(one), title="<model> & co"))
    page = parsed(text)
    assert "<b>&\"'" not in text
    assert "<model>" not in text
    assert "<recipe>" not in text
    assert "a<b>&\"'.0" in " ".join(page.texts)
    for picture in SVG.findall(text):
        ET.fromstring(picture)


def test_every_block_and_class_is_named_where_blocks_differ() -> None:
    one = chain(40)
    plan = decided(one)
    uneven = tuple(block if number % 2 else kept_inputs(block) for number, block in enumerate(plan.blocks))
    said = words(page_of(one, changed(plan, blocks=uneven)))
    assert all(f" layers.{number} " in said for number in range(40))
    for name in ("X", "A", "O", "parameter", "gradient", "optimizer"):
        assert f" {name} " in said


def kept_inputs(block: BlockPlan) -> BlockPlan:
    ranges = tuple(changed(part, action="keep") if part.tensor == "X" else part for part in block.ranges)
    return changed(block, ranges=ranges)


def test_a_large_plan_stays_light() -> None:
    """80 blocks of 16 chunks, every class in several ranges, with state that moves: 1,500 events."""
    one = chain(80, chunks=16, capacity=4000)
    page = page_of(one, decided(one))
    assert len(page.plan.events) > 1000
    assert len(render(page).encode()) < 1_500_000


def test_a_plan_of_another_problem_is_refused() -> None:
    with pytest.raises(ValueError, match="the plan is of 8 blocks, not of the 7"):
        page_of(chain(7), decided(chain(8)))


@pytest.mark.parametrize("name", ["step_seconds", "unlimited_seconds"])
def test_times_must_be_times(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be finite and > 0, got 0"):
        sample(**{name: 0.0})
