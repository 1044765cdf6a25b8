from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from memtrain import page
from memtrain.charts import Chart, Series, round_ticks
from memtrain.planner.actions import Action, BlockDecision
from memtrain.planner.units import MiB
from memtrain.report import (
    Summary,
    bill_rows,
    comparison_rows,
    error_fraction,
    form_facts,
    infeasible_text,
    own_step_lines,
    plan_text,
    recompute_facts,
    summary_text,
    table,
)
from tests.memtrain.plans import GIB, feasible_plan, infeasible_plan, summary
from tests.planner.toys import make_block, make_form, make_nearly_free, make_prefixes, make_profile


def test_columns_line_up() -> None:
    text = table(["", "device", "nvme"], [["weights", "0.250", "-"], ["a", "1.000", "13.000"]])
    assert text.splitlines() == [
        "         device    nvme",
        "-------  ------  ------",
        "weights   0.250       -",
        "a         1.000  13.000",
    ]


def test_the_bill_adds_up_lines_of_one_category() -> None:
    header, rows = bill_rows(feasible_plan())
    assert header == ["GiB", "device", "nvme"]
    assert rows == [
        ["weights", "0.500", "-"],
        ["optimizer state", "-", "3.000"],
        ["predicted peak", "1.000", "3.000"],
        ["budget", "1.250", "8.000"],
    ]


def test_a_plan_in_words() -> None:
    text = plan_text(feasible_plan())
    assert "within 5.0% of the best (highs)" in text
    assert "blocks: 1 x keep, 2 x swap to nvme" in text
    assert "1 units with gradients on nvme, state on nvme; 1 units with gradients on device" in text
    assert "update ahead" in text
    assert "4.00 s a step (lower bound 3.80 s), 6.000 GiB moved a step" in text


def test_why_updates_are_not_done_in_one_pass() -> None:
    assert own_step_lines({}) == []
    begins = "by the optimizer's own code instead of in one pass"
    assert own_step_lines({"amsgrad=True": 1, "fused=True was not asked for": 7}) == [
        f"update of 1 parameter {begins}: amsgrad=True",
        f"update of 7 parameters {begins}: fused=True was not asked for",
    ]


def test_what_is_computed_again_in_part_and_how_exactly() -> None:
    block = make_block(nearly_free=make_nearly_free(), prefixes=make_prefixes())
    profile = make_profile(block_profiles=(block,) * 6)
    decisions = [
        BlockDecision(block=0, action=Action.RECOMPUTE_NEARLY_FREE),
        BlockDecision(block=1, action=Action.RECOMPUTE, recomputed_tokens=4),
        BlockDecision(block=2, action=Action.RECOMPUTE, recomputed_tokens=6),
        BlockDecision(block=3, action=Action.RECOMPUTE, recomputed_tokens=4),
        BlockDecision(
            block=4, action=Action.RECOMPUTE_EXCEPT_ATTENTION, recomputed_tokens=6, attention_tokens=2
        ),
        BlockDecision(block=5, action=Action.RECOMPUTE),
    ]
    plan = replace(feasible_plan(), blocks=tuple(decisions))
    assert recompute_facts(plan, profile) == [
        "1 block computed again from 4.0 MiB of outputs of products and attention (10.0 MiB saved); "
        "bit-equal",
        "first 4 of 8 tokens of 2 blocks computed again; bit-equal on this machine: yes",
        "first 6 of 8 tokens of 1 block computed again; bit-equal on this machine: no, "
        "largest difference 1e-06 of a tensor's largest entry",
        "first 6 of 8 tokens and attention of the first 2 of 8 tokens of 1 block computed again; bit-equal "
        "on this machine: no, largest difference 1e-06 of a tensor's largest entry",
    ]
    assert recompute_facts(feasible_plan(), make_profile(3)) == []


def test_which_form_blocks_have_and_which_none_can_have() -> None:
    lossy = make_form(name="int8", saved_bytes=2 * MiB, error=0.01, forward_seconds=0.013)
    block = make_block(forms=(make_form(), lossy), missing_forms=(("int4", "zero gradients"),))
    profile = make_profile(block_profiles=(block,) * 3)
    decisions = (
        BlockDecision(block=0, action=Action.KEEP, form="exact"),
        BlockDecision(block=1, action=Action.KEEP, form="int8"),
        BlockDecision(block=2, action=Action.RECOMPUTE),
    )
    plan = replace(feasible_plan(), blocks=decisions, error=0.0033333, error_budget=0.004)
    assert form_facts(plan, profile) == [
        "1 block in exact form: 5.0 MiB saved instead of 10.0 MiB, +2.0 ms each; "
        "bit-equal at the sample batch",
        "1 block in int8 form: 2.0 MiB saved instead of 10.0 MiB, +5.0 ms each; gradients off by 1.0e-02",
        "3 blocks cannot have form int4: zero gradients",
        "lossy forms: mean error of gradients 0.0033 over all saved bytes (budget 0.004)",
    ]
    assert form_facts(feasible_plan(), make_profile(3)) == []


def test_a_run_that_is_less_exact_than_its_profile_says_so() -> None:
    block = make_block(prefixes=make_prefixes())
    profile = make_profile(block_profiles=(block,))
    decision = BlockDecision(block=0, action=Action.RECOMPUTE, recomputed_tokens=4)
    plan = replace(feasible_plan(), blocks=(decision,))
    (exact,) = recompute_facts(plan, profile, {block.name: 0.0})
    assert exact.endswith("yes")
    (line,) = recompute_facts(plan, profile, {profile.blocks[0].name: 2e-7})
    assert line.endswith("no, largest difference 2e-07 of a tensor's largest entry")


def test_infeasible_says_what_is_short_and_what_helps() -> None:
    assert infeasible_text(infeasible_plan()).splitlines() == [
        "the budget cannot work:",
        "  device: short by 123,456,789 bytes (0.115 GiB) of 1.000 GiB",
        "what would help, the cheapest first:",
        "  1. device=1.12GiB",
        "  2. nvme of 2 GiB",
    ]


def test_prediction_beside_measurement() -> None:
    header, rows = comparison_rows(summary())
    assert header == ["", "predicted", "measured", "error"]
    assert rows == [
        ["peak of cpu (GiB)", "1.000", "1.143", "-12.5%"],  # 1 against 8/7
        ["step time (s)", "4.00", "5.00", "-20.0%"],
        ["optimizer state (bytes)", "1,200", "1,000", "+20.0%"],
    ]
    text = summary_text(summary())
    assert "whole process: 1.200 GiB of 1.250 GiB, 0.050 GiB to spare" in text
    assert "2.5000 before, 2.2500 after (-0.2500); 410 tokens/s" in text


def test_a_broken_promise_is_said_loudly() -> None:
    text = summary_text(
        Summary(**{**{f: getattr(summary(), f) for f in Summary.__slots__}, "process_peak_bytes": 2 * GIB})
    )
    assert "OVER by 805,306,368 bytes" in text  # 0.75 GiB


def test_no_error_without_a_measurement() -> None:
    assert math.isnan(error_fraction(1.0, 0.0))
    assert error_fraction(11.0, 10.0) == pytest.approx(0.1)


def test_a_summary_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text(summary().to_json())
    assert Summary.read(path) == summary()
    path.write_text(json.dumps({"name": "x"}))
    with pytest.raises(ValueError, match="is not a summary of a run"):
        Summary.read(path)


# Written before there were versions, and before a run looked at the optimizer's bytes.
OLD_SUMMARY = """{
 "name": "old", "device": "cpu", "steps": 4, "budget_bytes": 2000, "predicted_peak_bytes": 900,
 "measured_peak_bytes": 1000, "process_peak_bytes": 1500, "predicted_step_seconds": 1.0,
 "measured_step_seconds": 2.0, "tokens_per_second": 3.0, "heldout_loss_before": 4.0,
 "heldout_loss_after": 3.5, "checkpoint": "runs/old/checkpoint/step-4",
 "phases": [{"name": "train", "start_seconds": 0.5, "end_seconds": 2.5}]
}"""


def test_an_older_summary_says_what_its_run_did_not_measure(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text(OLD_SUMMARY)
    old = Summary.read(path)
    assert (old.predicted_optimizer_bytes, old.measured_optimizer_bytes) == (None, None)
    assert [row[0] for row in comparison_rows(old)[1]] == ["peak of cpu (GiB)", "step time (s)"]
    path.write_text(old.to_json())
    assert Summary.read(path) == old


def test_a_summary_of_the_first_version_may_have_them(tmp_path: Path) -> None:
    data = json.loads(summary().to_json())
    del data["version"]
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(data))
    assert Summary.read(path) == summary()


def test_a_later_summary_is_refused_by_its_version(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({**json.loads(summary().to_json()), "version": 4}))
    with pytest.raises(ValueError, match="version 4, this memtrain reads 1 to 3"):
        Summary.read(path)


@pytest.mark.parametrize("field", ["predicted_optimizer_bytes", "checkpoint"])
def test_a_summary_of_this_version_is_whole(tmp_path: Path, field: str) -> None:
    data = json.loads(summary().to_json())
    del data[field]
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="is not a summary of a run"):
        Summary.read(path)


def write_run(folder: Path) -> None:
    (folder / "summary.json").write_text(summary().to_json())
    (folder / "plan.json").write_text(feasible_plan().to_json())
    (folder / "recipe.yaml").write_text("name: <run>\n")
    lines = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": "nan"}, {"step": 3, "loss": 2.25}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "memory.csv").write_text(f"seconds,resident_bytes\n0.0,{GIB // 2}\n1.5,{GIB}\n")


def test_the_page_stands_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path)
    assert page.main([str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    assert text.count("<svg") == 2
    assert "&lt;run&gt; &amp; co" in text
    assert "<run>" not in text
    assert "budget 1.250 GiB" in text
    outside = text.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert all(word not in outside for word in ("http:", "https:", "src=", "href=", "<script", "@import"))
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert "report.html" in capsys.readouterr().out


def test_the_page_without_matplotlib_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path)
    monkeypatch.setattr(page.importlib.util, "find_spec", lambda name: None)
    assert page.main([str(tmp_path)]) == 0
    assert "memtrain[plots]" in capsys.readouterr().out
    assert not (tmp_path / "memory.png").exists()


def test_an_unfinished_run_has_no_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert page.main([str(tmp_path)]) == 1
    assert "is not the folder of a finished run" in capsys.readouterr().err


def test_a_chart_places_its_points() -> None:
    chart = Chart(
        x_label="x", y_label="y", series=(Series(name="s", x=[0, 10], y=[0, 100 / 1.04]),), from_zero=True
    )
    # x: 62 at the left edge, 848 at the right; y: 240 at zero, and 24 at 1.04 times the largest.
    assert 'points="62.0,240.0 848.0,32.3"' in chart.svg()


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.248, [0.0, 0.5, 1.0]),
        (0.0, 312.9, [0, 100, 200, 300]),
        (1.0, 30.0, [10, 20, 30]),
        (1.278, 2.505, [1.5, 2.0, 2.5]),
        (3.0, 3.0, [3.0]),
        (-2.0, 3.0, [-2, -1, 0, 1, 2, 3]),
    ],
)
def test_ticks_are_round(low: float, high: float, ticks: list[float]) -> None:
    assert round_ticks(low, high, 5) == pytest.approx(ticks)


def test_a_chart_keeps_peaks_when_it_thins() -> None:
    y = [0.0] * 10_000
    y[4321] = 7.0
    svg = Chart(x_label="", y_label="", series=(Series(name="s", x=range(10_000), y=y),)).svg()
    assert len(svg) < 60_000
    heights = [float(p.split(",")[1]) for p in svg.split('points="')[1].split('"')[0].split()]
    assert min(heights) == pytest.approx(240 - 216 / 1.04, abs=0.05)


def test_a_chart_of_nothing_is_nothing() -> None:
    assert Chart(x_label="", y_label="", series=(Series(name="s", x=[1], y=[math.nan]),)).svg() == ""
