"""Memory, queues and map: that what is drawn is what the plan says, in numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import re

import pytest

from memtrain.planner.ranges.formulate import formulate
from memtrain.planner.ranges.plan import RangePlan, make_plan
from memtrain.planner.ranges.profile_bytes import device_moments
from memtrain.planner.ranges.simulate import Event, PartTime
from memtrain.planpage import PageInput
from memtrain.planpage.actions import action_map, labels_of
from memtrain.planpage.colours import CATEGORIES, action_inks
from memtrain.planpage.memory import memory_over_the_step
from memtrain.planpage.queues import KINDS, Bar, _bars, _merged, queues_of_the_step
from tests.memtrain.planpage.samples import GIB, chain, changed, decided, page_of, sample
from tests.planner.ranges.small import some_state, with_state_anywhere

SVG = re.compile(r"<svg [^>]*role=\"img\".*?</svg>", re.DOTALL)


def test_the_top_of_the_stack_is_the_total_of_every_moment() -> None:
    one = sample()
    picture = SVG.findall(memory_over_the_step(one))[0]
    moments = device_moments(one.plan, one.problem)
    peak = max(moment.total_bytes for moment in moments)
    # 340 units high, margins of 24 and 40; the limit of 400 GiB is more than three times what is used.
    assert 3 * peak < 400 * GIB
    heights = {f"{300 - 276 * m.total_bytes / (peak * 1.06):.1f}" for m in moments}
    last = re.findall(r'<path class="area" [^>]*d="([^"]*)"', picture)[-1]
    outwards = last.split("H848.0")[0]
    assert heights == set(re.findall(r"V([\d.]+)", outwards + "V"))
    assert 'height="276"' in picture


def test_a_moment_says_its_bytes_when_pointed_at() -> None:
    one = sample()
    text = memory_over_the_step(one)
    first = device_moments(one.plan, one.problem)[0]
    assert (
        f"forward layers.0, 0.000 s to {first.end_seconds:.3f} s: {first.total_bytes / GIB:.3f} GiB" in text
    )
    assert "\nsaved tensors " in text


def test_a_place_fills_and_empties() -> None:
    one = sample()
    host = SVG.findall(memory_over_the_step(one))[1]
    totals = [float(t) for t in re.findall(r"<title>host, [^:]*: ([\d.]+) GiB", host)]
    # Seven blocks send 4 GiB of X each; 48 GiB of state, 8 of new weights and the slots stay all step long.
    assert max(totals) - min(totals) == pytest.approx(28.0)
    assert totals[0] == min(totals) == totals[-1]
    assert max(totals) == pytest.approx(next(p.size_bytes for p in one.plan.peaks if p.place == "host") / GIB)


def test_a_place_that_is_not_used_is_said() -> None:
    one = chain()
    bare = dataclasses.replace(
        one, blocks=tuple(dataclasses.replace(block, states=()) for block in one.blocks), codecs=()
    )
    everything = tuple(
        changed(
            block,
            updates=(),
            held=(),
            ranges=tuple(
                changed(part, start=0, stop=4, action="keep") for part in block.ranges if part.start == 0
            ),
        )
        for block in decided(one).blocks
    )
    plan = changed(decided(one), blocks=everything)
    text = memory_over_the_step(page_of(bare, plan))
    assert "nvme: not used (4000.000 GiB allowed)" in text
    assert len(SVG.findall(text)) == 1


def test_limits_are_drawn_where_they_are_near() -> None:
    one = chain(capacity=200)
    text = memory_over_the_step(page_of(one, decided(one)))
    assert "</tspan> limit 200.000 GiB" in SVG.findall(text)[0]
    assert "limit 4000.000 GiB" not in "".join(re.findall(r"<tspan.*?</text>", text))


def events(*jobs: tuple[str, str, float, float]) -> tuple[Event, ...]:
    return tuple(
        Event(name=name, resource=resource, start_seconds=start, end_seconds=end)
        for name, resource, start, end in jobs
    )


def timed(*jobs: tuple[str, str, float, float], step: float) -> PageInput:
    one = chain()
    part = PartTime(name="step", times=1, start_seconds=0.0, end_seconds=step)
    plan: RangePlan = changed(decided(one), events=events(*jobs), step_seconds=step, parts=(part,))
    return page_of(one, plan)


def test_bars_stand_where_their_jobs_are() -> None:
    page = timed(
        ("forward layers.0", "compute", 0.0, 5.0),
        ("write layers.0", "write:pcie", 5.0, 6.0),
        ("read layers.0", "read:pcie", 8.0, 8.0),
        ("backward layers.0", "compute", 8.0, 10.0),
        step=10.0,
    )
    text = queues_of_the_step(page)
    # 756 units for 10 s from 92 on; rows of 30 from 6 on, bars 4 below.
    assert 'x="92.00" y="10" width="378.00"' in text  # forward: 0 to 5 s
    assert 'x="470.00" y="40" width="75.60"' in text  # write: 5 to 6 s
    assert 'x="696.80" y="10" width="151.20"' in text  # backward: 8 to 10 s
    assert "forward layers.0: 0.000 s to 5.000 s, busy 5.000 s" in text
    # A job without length is not drawn, and its queue has no row.
    assert ">read pcie<" not in text
    assert "<td>compute</td><td>7.000 s</td><td>70.0 %</td>" in text


@pytest.mark.parametrize(("count", "in_flight"), [(1, 1), (4, 1), (4, 2)])
@pytest.mark.parametrize("number", [0, 1234, 98765, 424242])
def test_every_job_of_a_step_has_a_kind(count: int, in_flight: int, number: int) -> None:
    one = dataclasses.replace(with_state_anywhere(), micro_batches=count, in_flight=in_flight)
    formulated = formulate(one)
    plan = make_plan(
        formulated,
        some_state(formulated, number),
        status="heuristic",
        lower_bound_seconds=0.0,
        gap=0.0,
        solver="by hand",
    )
    assert plan.events
    assert {bar.kind for bar in _bars(page_of(one, plan))} <= set(KINDS) - {"other"}


def test_micro_batches_that_are_alike_are_drawn_once() -> None:
    one = dataclasses.replace(chain(), micro_batches=5)
    page = page_of(one, decided(one))
    first, further = page.plan.parts
    assert (first.times, further.times) == (1, 4)
    text = queues_of_the_step(page)
    said = "drawn once: first micro-batch (0.000 s to"
    assert said in text
    assert said in memory_over_the_step(page)
    assert "takes place 4 times)." in text
    once = [
        sum(
            e.end_seconds - e.start_seconds
            for e in page.plan.events
            if e.part == n and e.resource == "compute"
        )
        for n in (0, 1)
    ]
    share = (once[0] + 4 * once[1]) / page.plan.step_seconds
    assert f"<td>{share * 100:.1f} %</td>" in text
    # A line where the further micro-batches begin: 756 units for both parts, from 92 on.
    place = 92 + 756 * first.end_seconds / further.end_seconds
    assert f'<line x1="{place:.1f}"' in text


def test_the_colours_of_jobs_follow_what_they_move() -> None:
    page = sample()
    text = queues_of_the_step(page)
    # Gradients go to the host, where the CPU works on its state in place; new weights come back.
    for kind in ("forward", "backward", "update", "saved tensors", "weights", "gradients"):
        assert f"</svg>{kind}</li>" in text, kind
    assert "optimizer's traffic" not in text


def test_the_longest_waits_name_what_was_waited_for() -> None:
    page = timed(
        ("forward layers.0", "compute", 0.0, 2.0),
        ("write layers.0", "write:pcie", 2.0, 5.0),
        ("forward layers.1", "compute", 5.0, 6.0),
        ("forward layers.2", "compute", 6.5, 7.0),
        ("write layers.1", "write:pcie", 6.0, 8.0),
        step=8.0,
    )
    text = queues_of_the_step(page)
    assert "waits 4.500 s in all, 56.2 % of the step: the longest of 3 stretches" in text
    waits = re.findall(r"<li>(\d.*?)</li>", text)
    assert waits == [
        "3.000 s before forward layers.1, until write layers.0 (write pcie) is over",
        "1.000 s at the end, for write layers.1 (write pcie)",
        "500 ms before forward layers.2",
    ]


def test_rounding_is_no_wait() -> None:
    page = timed(
        ("forward layers.0", "compute", 0.0, 2.0),
        ("forward layers.1", "compute", 2.000000001, 3.0),
        step=3.0,
    )
    assert "The arithmetic never waits." in queues_of_the_step(page)


def bar(start: float, end: float, kind: str = "forward", resource: str = "compute") -> Bar:
    return Bar(
        resource=resource,
        kind=kind,
        start_seconds=start,
        end_seconds=end,
        first=f"{start:g}",
        last=f"{start:g}",
        block="b",
        busy_seconds=end - start,
    )


def test_short_jobs_of_a_kind_are_drawn_as_one() -> None:
    found = _merged([bar(0.0, 0.2), bar(0.25, 0.4), bar(0.4, 3.0), bar(4.5, 5.0)], 1.0)
    # The first three touch within a pixel of 1 s, the fourth is 1.5 s away.
    assert [(one.start_seconds, one.end_seconds) for one in found] == [(0.0, 3.0), (4.5, 5.0)]
    assert found[0].busy_seconds == pytest.approx(2.95)
    assert (found[0].first, found[0].last) == ("0", "0.4")


def test_long_jobs_and_other_kinds_stay_apart() -> None:
    long = [bar(0.0, 2.0), bar(2.0, 4.0)]
    assert _merged(long, 1.0) == long
    mixed = [bar(0.0, 0.1), bar(0.1, 0.2, kind="update"), bar(0.1, 0.2, resource="cpu")]
    assert len(_merged(mixed, 1.0)) == 3


def test_ranges_stand_where_their_tokens_are() -> None:
    one = sample()
    text = action_map(one, action_inks(one.problem, labels_of(one)))
    picture = SVG.findall(text)[0]
    # Names of 8 letters end at 56.8 - 6; three panels of (860 - 56.8 - 30) / 3 = 257.7, 10 apart; 14 a row.
    title = "layers.0, A, chunks 1 to 2 of 4: recompute 2/4"
    assert re.search(rf'x="324.5" y="22.0" width="128.9" height="13.0"><title>{title}', picture)
    title = "layers.0, A, chunks 3 to 4 of 4: keep 2/4"
    assert re.search(rf'x="453.4" y="22.0" width="128.9" height="13.0"><title>{title}', picture)
    assert picture.count("<rect") == 8 * 5  # X is whole, A and O are in two ranges


def test_bytes_by_class_and_action() -> None:
    one = sample()
    text = action_map(one, action_inks(one.problem, labels_of(one)))
    # Eight blocks; X 4 GiB each (the last keeps it), A 2 recomputed and 2 kept, O 8 compressed and 8 to NVMe.
    header = ["recompute", "compress (int8)", "swap to nvme", "swap to host", "keep", "sum"]
    assert "".join(f"<th>{name}</th>" for name in header) in text

    def row(*cells: str) -> str:
        return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"

    assert row("X", "-", "-", "-", "28.000", "4.000", "32.000") in text
    assert row("A", "16.000", "-", "-", "-", "16.000", "32.000") in text
    assert row("O", "-", "64.000", "56.000", "-", "8.000", "128.000") in text
    assert row("sum", "16.000", "64.000", "56.000", "28.000", "28.000", "192.000") in text
    assert row("as stored", "-", "32.000", "56.000", "28.000", "28.000", "144.000") in text


def test_decisions_are_told_as_the_terminal_tells_them() -> None:
    one = sample()
    text = action_map(one, action_inks(one.problem, labels_of(one)))
    tables = text[text.index("Decisions block by block: saved tensors (2 different ways)") :]
    activations, states = tables.split("Decisions block by block: weights, gradients, optimizer")

    def row(*cells: str) -> str:
        return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"

    # The last block sends nothing.
    split, lossy = "recompute 2 of 4, keep 2", "compress (int8) 2 of 4, swap to nvme 2"
    assert row("layers 0-6", "swap to host", split, lossy) in activations
    assert activations.count("<tr><td>") == 2
    assert row("layers 0-7", "device", "host", "host", "by the CPU before the next forward") in states


def test_many_blocks_are_enlarged_range_by_range() -> None:
    one = chain(40)
    page = page_of(one, decided(one))
    text = action_map(page, action_inks(one, labels_of(page)))
    assert re.findall(r"<summary>Enlarged: (.*?)</summary>", text) == [
        "layers.0 to layers.12 (13)",
        "layers.13 to layers.25 (13)",
        "layers.26 to layers.39 (14)",
    ]
    assert text.count(">recompute 2/4</text>") == 40


def test_every_category_of_the_legend_is_drawn() -> None:
    text = memory_over_the_step(sample())
    for name in re.findall(r"</svg>([a-z ]+)</li>", text):
        assert f'class="area" fill="{CATEGORIES[name]}"' in text, name
