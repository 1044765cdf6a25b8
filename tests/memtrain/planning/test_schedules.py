"""Update schedule and order of micro-batches: the command plans, refuses and writes what a recipe would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memtrain.planner.actions import MicroBatchOrder
from memtrain.planning.answer import Answer, answer
from memtrain.planning.jobs import Jobs
from memtrain.planning.request import PlanError, Work
from memtrain.recipe import Recipe, RecipeError, load_recipe, parse_recipe
from tests.memtrain.planning.conftest import request_of
from tests.memtrain.planning.test_plan_command import GPU, fails, run

RECIPE: dict[str, Any] = {
    "name": "same",
    "model": {"config": {"model_type": "llama"}},
    "data": {"train": "a.txt", "heldout": "b.txt", "sequence_length": 8},
    "budget": {"device": "1GiB", "host": "1GiB"},
    "optimizer": {"name": "AdamW", "lr": 1e-3},
}


def recipe_of(schedule: str, order: str, *, clipping: bool, accumulate: int) -> Recipe:
    training = {
        "steps": 1,
        "accumulation": accumulate,
        "max_grad_norm": 1.0 if clipping else None,
        "nonfinite": "raise" if clipping else "ignore",
    }
    planner = {"update_schedule": schedule, "micro_batch_order": order}
    return parse_recipe({**RECIPE, "training": training, "planner": planner})


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("clipping", [True, False])
@pytest.mark.parametrize("order", ["auto", "horizontal", "vertical"])
@pytest.mark.parametrize("schedule", ["auto", "ahead", "in_backward"])
def test_the_command_refuses_what_a_recipe_refuses(
    schedule: Any, order: Any, clipping: bool, accumulate: int
) -> None:
    refused = {}
    try:
        recipe_of(schedule, order, clipping=clipping, accumulate=accumulate)
    except RecipeError as error:
        refused["recipe"] = str(error)
    try:
        Work(
            model="m", sequence=8, accumulate=accumulate, clipping=clipping,
            update_schedule=schedule, micro_batch_order=order,
        )  # fmt: skip
    except PlanError as error:
        refused["command"] = str(error)
    # A run updates in the last backward pass of several, which the command says that it does not plan.
    if refused.keys() == {"command"}:
        assert (schedule, clipping, accumulate) == ("in_backward", False, 4)
        assert "A run can update in the last backward pass of several" in refused["command"]
        return
    assert refused.keys() in (set(), {"recipe", "command"})
    for said in refused.values():
        if (schedule, order) == ("in_backward", "vertical"):
            assert "from another micro-batch's graph than its turn" in said
        elif schedule == "in_backward":
            assert "max_grad_norm" in said
        else:
            assert "a step has one micro-batch" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--update-schedule", "never"),
            "--update-schedule 'never': give one of auto, sequential, ahead, in_b",
        ),
        (("--update-schedule", "in_backward"), "give --no-clipping, or --update-schedule auto"),
        (("--micro-batch-order", "up"), "give one of auto, horizontal, vertical"),
        (("--micro-batch-order", "vertical"), "a step has one micro-batch"),
        (("--micro-batch-order", "vertical", "--accumulate", "2"), "no weights may leave the device"),
        (
            ("--micro-batch-order", "vertical", "--accumulate", "2", "--dram", "1GiB", "--gpus", "2"),
            "memtrain's own trainer, in one process, and this job has 2 GPUs",
        ),
    ],
)
def test_mistakes_are_one_line(
    tiny: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert message in fails(capsys, str(tiny), *GPU, *arguments)


def planned(tiny: Path, device: str = "12MiB", **work: Any) -> Answer:
    fields = {"model": str(tiny), "sequence": 256, "micro_batch": 4, **work}
    return answer(Jobs(request_of(tiny, device=device, work=Work(**fields))))


def updates_of(found: Answer) -> set[str]:
    return {label for block in found.forecast.plan.blocks for label, count in block.updates if count}


def emitted(found: Answer, folder: Path) -> Recipe:
    text = next(target.text for target in found.targets if target.tool == "memtrain")
    (folder / "recipe.yaml").write_text(text)
    return load_recipe(folder / "recipe.yaml")


@pytest.mark.parametrize("schedule", ["sequential", "ahead", "in_backward"])
def test_updates_come_when_they_were_asked_for_and_in_the_recipe_too(
    tiny: Path, tmp_path: Path, schedule: Any
) -> None:
    found = planned(tiny, clipping=False, update_schedule=schedule)
    assert found.forecast.fits
    ends = f"-{schedule.replace('_', '-')}"
    assert updates_of(found)
    assert all(label.endswith(ends) for label in updates_of(found))
    recipe = emitted(found, tmp_path)
    options = recipe.planner_options()
    assert options.update_schedule == schedule
    assert recipe.training.max_grad_norm is None
    assert options.gradients_untouched is (schedule == "in_backward")
    either = planned(tiny, clipping=False)
    assert either.forecast.step_seconds <= found.forecast.step_seconds * 1.03  # the gap of the search


def test_a_plan_that_updates_in_backward_is_a_recipe_that_may(tiny: Path, tmp_path: Path) -> None:
    """Unasked: the recipe must not look at all gradients where the plan does not."""
    found = planned(tiny, clipping=False)
    recipe = emitted(found, tmp_path)
    some = any(label.endswith("in-backward") for label in updates_of(found))
    assert recipe.planner_options().gradients_untouched is some
    assert recipe.planner.update_schedule == "auto"


def test_vertical_order_is_planned_and_written(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    size = ("--micro-batch", "4", "--accumulate", "4")
    arguments = (*GPU, *size, "--dram", "2GiB", "--budget", "device=16MiB")
    assert run(str(tiny), *arguments, "--micro-batch-order", "vertical", "--emit", str(folder)) in (0, 3)
    assert "in vertical order: all micro-batches pass a block" in capsys.readouterr().out
    options = load_recipe(folder / "recipe.yaml").planner_options()
    assert options.micro_batch_order == "vertical"
    found = {}
    for order in ("horizontal", "vertical", "auto"):
        assert run(str(tiny), *arguments, "--micro-batch-order", order, "--json") in (0, 3)
        found[order] = json.loads(capsys.readouterr().out)
    assert [found[order]["micro_batch_order"] for order in ("horizontal", "vertical")] == [
        "horizontal", "vertical",
    ]  # fmt: skip
    assert found["auto"]["step_seconds"] <= found["horizontal"]["step_seconds"] * 1.05
    assert found["auto"]["tokens_per_step"] == found["vertical"]["tokens_per_step"] == 16 * 256


def test_other_tools_are_told_of_vertical_order(tiny: Path) -> None:
    found = planned(tiny, "16MiB", accumulate=4, micro_batch_order="vertical")
    assert found.forecast.job.micro_batch_order is MicroBatchOrder.VERTICAL
    assert found.forecast.fits
    notes = {target.tool: " ".join(target.notes) for target in found.targets}
    assert "DeepSpeed runs one after the other" in notes["DeepSpeed"]
    assert "one after the other" not in notes["memtrain"]
