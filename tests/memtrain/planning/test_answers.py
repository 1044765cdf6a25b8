"""What is said of an answer: as text, as JSON, as CSV, as a page."""

from __future__ import annotations

import csv
import io
import json
from html.parser import HTMLParser

import pytest
from rich.console import Console

from memtrain.planner.ranges.check import check
from memtrain.planner.ranges.plan import Relaxation
from memtrain.planning import machine_readable, terminal
from memtrain.planning.answer import Answer, Point, reach_of, sweep_of
from memtrain.planning.explained import show_explanation
from memtrain.planning.frontier import sweep_html
from memtrain.planning.jobs import Jobs
from memtrain.planning.page import answer_html
from memtrain.planning.request import Sweep, Work


def text_of(answer: Answer, *, sources: bool = False) -> str:
    stream = io.StringIO()
    out = Console(file=stream, width=4096, color_system=None, highlight=False, markup=False, emoji=False)
    terminal.show(answer, out, sources=sources)
    return stream.getvalue()


def test_answers_stand_first(tight: Answer) -> None:
    lines = text_of(tight).splitlines()
    forecast = tight.forecast
    assert lines[0].endswith(", 256 tokens x 4, adamw, bfloat16, on rtx-4060-laptop")
    assert lines[1].startswith("FITS: ")
    assert lines[1].endswith("of 0.01 GiB left on each GPU")
    found = {line.split("  ")[1].strip(): line.split("  ", 2)[2].strip() for line in lines[2:6]}
    assert list(found) == ["slowdown", "step time", "tokens/s", "MFU"]
    assert found["tokens/s"] == f"{forecast.tokens_per_second:,.0f} on all GPUs, 1,024 tokens a step"
    assert found["MFU"] == f"{forecast.mfu * 100:.1f} %"


def test_sections_follow(tight: Answer) -> None:
    text = text_of(tight, sources=True)
    headings = [
        "bytes, in GiB, of each place at its fullest",
        "what all blocks save for backward",
        "block by block",
        "weights, gradients, optimizer state",
        "certificate",
        "the same job under other rules",
        "why model.layers.3 is planned as it is",
        "to run it (--emit DIRECTORY writes the files)",
        "notes",
        "sources",
    ]
    places = [text.index(f"\n{heading}\n") for heading in headings]
    assert places == sorted(places)
    assert "proved: no plan of this job is more than" in text
    assert "assumption:" in text[places[-1] :]
    assert "assumption:" not in text[: places[-1]]


def test_the_bill_adds_up(tight: Answer) -> None:
    for place in tight.forecast.places:
        lines = [line.size_bytes for line in tight.forecast.bill if line.place == place.name]
        assert sum(lines) == place.peak_bytes <= place.capacity_bytes


def test_no_rule_is_faster_than_the_plan(tight: Answer) -> None:
    first, *others = tight.ablation
    assert (first.name, first.step_seconds) == ("this plan", tight.forecast.step_seconds)
    assert len(others) == 7
    for row in others:
        assert row.step_seconds is None or row.step_seconds >= tight.forecast.step_seconds * (1 - 1e-9)


def test_the_plan_stands_up_to_the_checker(tight: Answer) -> None:
    assert check(tight.forecast.plan, tight.forecast.problem) == []
    assert tight.exit_code == 0


def test_what_is_not_there_is_told_in_bytes(impossible: Answer) -> None:
    text = text_of(impossible)
    assert impossible.exit_code == 2
    assert "DOES NOT FIT" in text.splitlines()[1]
    short = -impossible.forecast.places[0].margin_bytes
    assert f"({short:,} bytes) short" in text
    assert f"device: {short / 2**30:.2f} GiB ({short:,} bytes) more" in text
    assert "what binds: device, " in text
    assert "describe memory beside it with --dram, --nvme or --cxl" in text
    assert "to run it" not in text
    assert "proved: no plan of this job fits" in text


def test_relaxations_in_words() -> None:
    work = Work(model="llama-7b", sequence=8192, micro_batch=8)
    assert [
        terminal.relaxation_text(one, work)
        for one in (
            Relaxation(what="host", missing_bytes=3 << 29),
            Relaxation(what="sequence", share=0.875),
            Relaxation(what="batch", share=0.75),
            Relaxation(what="codec int8"),
        )
    ] == [
        "host: 1.50 GiB (1,610,612,736 bytes) more",
        "a sequence of 7168 tokens",
        "a micro-batch of 6",
        "codec int8, which is lossy: --allow-lossy int8",
    ]


def test_plain_output_has_no_colour_and_no_blanks_at_ends(
    tight: Answer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = []
    for columns in ("40", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        terminal.show(tight, terminal.console(), sources=True)
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    assert "\x1b" not in outputs[0]
    assert all(line == line.rstrip() for line in outputs[0].splitlines())


def test_json_has_units_in_its_keys(tight: Answer) -> None:
    text = machine_readable.answer_json(tight)
    document = json.loads(text)
    assert document["fits"] is True
    assert document["step_seconds"] == tight.forecast.step_seconds
    assert document["mfu_ratio"] == pytest.approx(tight.forecast.mfu)
    assert {place["place"] for place in document["places"]} == {"device", "host"}
    assert document["certificate"]["plan_hash"] == tight.forecast.plan.digest
    assert len(document["blocks"]) == 10
    assert document["run"][0]["filename"] == "recipe.yaml"
    assert document["explanation"]["block"] == "model.layers.3"
    assert "NaN" not in text
    numbers = [key for key, value in document.items() if isinstance(value, float)]
    assert all(key.endswith(("_seconds", "_ratio", "_per_second")) for key in numbers)


def test_json_of_what_does_not_fit(impossible: Answer) -> None:
    document = json.loads(machine_readable.answer_json(impossible))
    assert document["fits"] is False
    assert document["exit_code"] == 2
    assert document["step_seconds"] is None
    assert document["run"] == []
    assert document["places"][0]["margin_bytes"] < 0
    assert document["relaxations"][0]["missing_bytes"] == -document["places"][0]["margin_bytes"]


def test_csv_of_one_plan_and_of_an_ablation(tight: Answer, impossible: Answer) -> None:
    (row,) = csv.DictReader(io.StringIO(machine_readable.answer_csv(impossible)))
    assert (row["sequence_tokens"], row["fits"], row["step_seconds"]) == ("256", "False", "")
    rows = list(csv.DictReader(io.StringIO(machine_readable.answer_csv(tight))))
    assert [one["rule"] for one in rows] == [one.name for one in tight.ablation]


@pytest.fixture(scope="module")
def points(tight: Answer) -> tuple[Point, ...]:
    """256 tokens fit; 300 cannot be cut; 65536 do not fit."""
    from dataclasses import replace

    from memtrain.planner.parallel import Degrees

    hardware = replace(tight.request.hardware, gpus=2, dram="64MiB")
    request = replace(tight.request, hardware=hardware, degrees=Degrees(context=2, zero_stage=3))
    told: list[Point] = []
    found = sweep_of(Jobs(request), Sweep(axis="seq", values=(256, 301, 16384)), told.append)
    assert tuple(told) == found
    return found


def test_a_sweep_says_yes_no_and_why(points: tuple[Point, ...]) -> None:
    stream = io.StringIO()
    terminal.show_sweep(points, Console(file=stream, width=400, color_system=None))
    head, *rows = stream.getvalue().splitlines()
    assert head.split()[:3] == ["tokens", "micro-batch", "fits"]
    assert rows[0].split()[:3] == ["256", "4", "yes"]
    assert "cannot be cut 4 ways" in rows[1]
    assert rows[2].split()[:3] == ["16384", "4", "no"]


def test_a_sweep_for_programs(points: tuple[Point, ...]) -> None:
    document = json.loads(machine_readable.sweep_json(points))
    assert [point["fits"] for point in document["points"]] == [True, None, False]
    rows = list(csv.DictReader(io.StringIO(machine_readable.sweep_csv(points))))
    assert [row["sequence_tokens"] for row in rows] == ["256", "301", "16384"]
    assert rows[0]["tokens_per_second"]
    assert "cannot be cut" in rows[1]["problem"]


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)


def test_pages_are_whole_documents(tight: Answer, points: tuple[Point, ...]) -> None:
    for page in (answer_html(tight), sweep_html(tight.request, points)):
        parser = _Tags()
        parser.feed(page)
        assert parser.tags[0] == "html"
        assert "svg" in parser.tags
        assert "https://" not in page.replace("https://www.nvidia", "").split("Sources")[0]


def test_an_explanation_names_every_class(tight: Answer) -> None:
    stream = io.StringIO()
    assert tight.explanation is not None
    show_explanation(tight.explanation, Console(file=stream, width=400, color_system=None))
    text = stream.getvalue()
    for report in tight.explanation.classes:
        assert f"  {report.tensor}, " in text
    assert "full: device" in text or "no place" in text


def test_the_longest_sequence_fits_and_more_does_not(tight: Answer) -> None:
    found = reach_of(Jobs(tight.request), "seq")
    assert found.largest % 128 == 0
    assert found.largest >= 256
    assert found.smallest_too_large is not None
    assert dict(found.tried)[found.largest]
    assert not dict(found.tried)[found.smallest_too_large]
