"""``memtrain validate``: a recipe against its schema, a plan against the independent checker."""

from __future__ import annotations

from pathlib import Path

from memtrain.planner.machine import Machine
from memtrain.planner.plan import Plan
from memtrain.planner.profile import ModelProfile
from memtrain.planner.ranges.plan import RangePlan
from memtrain.recipe import RecipeError, load_recipe


def validate_file(path: Path) -> str:
    """What is to be said of a valid file. Raises RecipeError with what is wrong of another."""
    if path.suffix == ".json":
        return _validate_plan(path)
    recipe = load_recipe(path)
    return f"{path} is a valid recipe: {recipe.name}, {recipe.training.steps} steps, {recipe.memory_budget()}"


def _validate_plan(path: Path) -> str:
    try:
        text = path.read_text()
        if '"problem_digest"' in text:
            return _range_plan(path, text)
        plan = Plan.from_json(text)
        profile = ModelProfile.from_json((path.parent / "profile.json").read_text())
        machine = Machine.from_json((path.parent / "machine.json").read_text())
    except FileNotFoundError as error:
        raise RecipeError(
            f"{error.filename} is not there; "
            "a plan is checked against the profile.json, machine.json and recipe.yaml beside it"
        ) from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: {error}") from error
    from memtrain.planner.check import check

    budget = load_recipe(path.parent / "recipe.yaml").memory_budget()
    violations = check(plan, profile, machine, budget)
    if violations:
        raise RecipeError("\n  ".join([f"{path} breaks its own constraints:", *map(str, violations)]))
    return f"{path} is a valid plan: {plan.status}, {plan.step_seconds:.2f} s a step, hash {plan.digest}"


def _range_plan(path: Path, text: str) -> str:
    """Of ``memtrain plan -o``: whole and unchanged; its bytes and times were checked when it was written."""
    plan = RangePlan.from_json(text)
    proved = "" if plan.status == "infeasible" else f", {plan.step_seconds:.3g} s"
    return f"{path} is a plan of `memtrain plan`, unchanged: {plan.status}{proved}, hash {plan.digest}"
