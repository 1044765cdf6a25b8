"""What steps write against what had changed, and how long a disk lasts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from memtrain.endurance import Written, endurance_facts, parse_endurance, process_written_bytes, written_rows
from memtrain.offload.contents import Content
from memtrain.page import RunFiles, render
from memtrain.planner.actions import Tier
from memtrain.recipe import RecipeError
from memtrain.report import Summary, summary_text
from tests.memtrain.plans import summary
from tests.memtrain.sessions import WIDTH, build, loop, prepare
from tests.memtrain.test_report import write_run
from tests.memtrain.tiny_runs import recipe_for

STATE = Written(tier="nvme", content="optimizer state", written_bytes=300e6, changed_bytes=240e6)
WEIGHTS = Written(tier="nvme", content="weights", written_bytes=100e6, changed_bytes=100e6)
HOST = Written(tier="host", content="gradients", written_bytes=7e6, changed_bytes=0.0)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("600 TBW", 600 * 10**12),
        ("1.2PBW", 1_200 * 10**12),
        (" 75 tb ", 75 * 10**12),
        ("0.5 tbw", 5 * 10**11),
    ],
)
def test_endurance_as_data_sheets_have_it(text: str, size: int) -> None:
    assert parse_endurance(text) == size


@pytest.mark.parametrize("text", ["600", "600 GB", "many TBW", "0 TBW", "-1 TBW", "600 TiB"])
def test_what_is_no_endurance(text: str) -> None:
    with pytest.raises(ValueError, match=r"endurance is .*data sheet .*'600 TBW'"):
        parse_endurance(text)


def test_the_table() -> None:
    header, rows = written_rows([STATE, HOST])
    assert header == ["written per step (MB)", "written", "changed", "ratio"]
    assert rows == [
        ["nvme optimizer state", "300.00", "240.00", "1.250"],
        ["host gradients", "7.00", "0.00", "-"],
    ]


def test_a_disk_lasts_by_the_larger_count() -> None:
    """400 MB a step of 2 s is 17.28 TB a day; with checkpoints, as the kernel counts, 500 MB are 21.6 TB."""
    none = endurance_facts([STATE, WEIGHTS, HOST], 2.0, None, None)
    assert none == [
        "at 2.00 s a step 17.28 TB a day; tiers.nvme.endurance (TBW, from the data sheet) says how long the "
        "disk lasts"
    ]
    both = endurance_facts([STATE, WEIGHTS, HOST], 2.0, 600 * 10**12, 500e6)
    assert both == [
        "the kernel counts 500.00 MB written a step by this process, checkpoints and logs too; 400.00 MB of "
        "it to the nvme tier",
        "at 2.00 s a step 21.60 TB a day: 600 TBW are 28 days of training",
    ]
    (slow,) = endurance_facts([STATE], 100.0, 600 * 10**12, None)  # 0.2592 TB a day
    assert slow == "at 100.00 s a step 0.26 TB a day: 600 TBW are 6.3 years of training"
    assert endurance_facts([HOST], 2.0, 600 * 10**12, 500e6) == []  # memory does not wear
    assert endurance_facts([STATE], 0.0, None, None) == []


def test_it_is_in_the_summary_the_text_and_the_page(tmp_path: Path) -> None:
    write_run(tmp_path)
    found = dataclasses.replace(
        summary(),
        written=(STATE, WEIGHTS),
        process_written_bytes_per_step=500e6,
        endurance_bytes=600 * 10**12,
    )
    path = tmp_path / "summary.json"
    path.write_text(found.to_json())
    assert Summary.read(path) == found
    for text in (summary_text(found), render(RunFiles.read(tmp_path))):
        assert "nvme optimizer state" in text
        assert "1.250" in text
        assert "600 TBW are 69 days of training" in text  # at 5 s a step
    path.write_text(summary().to_json())
    assert "Written to the tiers" not in render(RunFiles.read(tmp_path))
    assert "TB a day" not in summary_text(summary())


def test_a_session_counts_what_its_steps_write(tmp_path: Path) -> None:
    model, inner = build()
    with prepare(model, inner, tmp_path) as session:
        assert session.writes.per_step() == ()
        assert session.writes.process_bytes_per_step() is None
        loop(session.model, session.optimizer)
        by_content = {(one.tier, one.content): one for one in session.writes.per_step()}
        assert {content for _, content in by_content} == {"optimizer state", "gradients", "activations"}
        # One layer of a block leaves, and a table and a head of 300 rows; biases and norms are small.
        leaving = 4 * (3 * 2 * WIDTH * WIDTH + 2 * 300 * WIDTH)
        state = by_content["nvme", "optimizer state"]
        assert state.changed_bytes == 2 * leaving
        assert 1.0 <= state.written_bytes / state.changed_bytes < 1.01  # whole pages
        gradients = by_content["nvme", "gradients"]
        assert gradients.changed_bytes == 2 * leaving  # two micro-batches, each written
        assert 1.0 <= gradients.written_bytes / gradients.changed_bytes < 1.01
        activations = by_content["nvme", "activations"]
        assert 1.0 <= activations.written_bytes / activations.changed_bytes < 1.01
        assert "written per step (MB)" in session.report()
        counted = session.writes.process_bytes_per_step()
        if counted is not None:  # the kernel may not tell, and a memory file system is no storage
            assert counted == 0 or counted >= state.written_bytes
        total = session.engine.store(Tier.NVME).written_bytes()
        assert total[Content.WEIGHTS] == total[Content.OTHER] == 0


def test_the_kernels_count_grows() -> None:
    counted = process_written_bytes()
    assert counted is None or counted >= 0


@pytest.mark.parametrize(
    ("tiers", "nvme", "said"),
    [
        ({"nvme": {"endurance": "600 GB"}}, "1GiB", r"tiers\.nvme\.endurance: endurance is '600 GB'"),
        (
            {"nvme": {"endurance": "600 TBW"}},
            None,
            "is of a disk that is not used: give budget.nvme, or leave it out",
        ),
        ({"host": {"endurance": "600 TBW"}}, "1GiB", r"tiers\.host\.endurance: unknown key"),
    ],
)
def test_recipes_that_cannot_be_used(
    tiers: dict[str, dict[str, str]], nvme: str | None, said: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe_for(tmp_path, tiers=tiers, budget={"nvme": nvme})
