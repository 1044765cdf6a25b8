from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from memtrain.forms import LOSSY
from memtrain.recipe import Lossy, Recipe, RecipeError, load_recipe, parse_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
TINY = next(path for path in RECIPES if path.stem == "tiny_llama_cpu")


def minimal() -> dict[str, Any]:
    return {
        "name": "x",
        "model": {"path": "somewhere"},
        "data": {"train": "a.txt", "heldout": "b.txt", "sequence_length": 8},
        "budget": {"device": "1GiB"},
        "training": {"steps": 3},
        "optimizer": {"name": "AdamW", "lr": "1e-5"},
    }


def with_value(path: str, value: Any) -> dict[str, Any]:
    data = minimal()
    *parents, last = path.split(".")
    section = data
    for parent in parents:
        section = section.setdefault(parent, {})
    section[last] = value
    return data


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_is_valid_and_named_after_its_file(path: Path) -> None:
    assert load_recipe(path).name == path.stem


def test_the_main_recipe_says_what_the_readme_says() -> None:
    recipe = load_recipe(TINY.with_name("smollm2_135m_full_cpu.yaml"))
    assert recipe.memory_budget().device_bytes == 1_288_490_189  # 1.2 * 2**30, rounded
    assert recipe.memory_budget().nvme_directory == "runs/smollm2_135m_full_cpu/swap"
    assert (recipe.data.sequence_length, recipe.training.accumulation) == (1024, 2)
    assert recipe.training.max_grad_norm == 1.0
    assert recipe.optimizer.master_weights is True
    assert recipe.schedule.name == "cosine"


def test_yaml_scientific_notation_without_a_point_is_a_number() -> None:
    assert yaml.safe_load("1e-5") == "1e-5"  # the trap
    assert parse_recipe(minimal()).optimizer.lr == 1e-5
    assert load_recipe(TINY, ["optimizer.lr=1e-5"]).optimizer.lr == 1e-5


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("bugdet", "budget"),
        ("training.stpes", "steps"),
        ("optimizer.wieght_decay", "weight_decay"),
        ("schedule.warmup_step", "warmup_steps"),
        ("evaluation.evry", "every"),
        ("budget.nmve", "nvme"),
        ("planner.exactonly", "exact_only"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(path: str, nearest: str) -> None:
    with pytest.raises(RecipeError, match=rf"{path}: unknown key; did you mean {nearest}\?"):
        parse_recipe(with_value(path, 1))


@pytest.mark.parametrize(
    ("planner", "message"),
    [
        ({"allow_lossy": ["int8"]}, "allow_lossy names int8, but exact_only is on"),
        ({"exact_only": False, "allow_lossy": ["int2"]}, r"planner\.allow_lossy\.0: .*got 'int2'"),
        ({"error_budget": 0.1}, "name them in allow_lossy"),
        ({"exact_only": False, "allow_lossy": ["int8"], "error_budget": -1}, r"planner\.error_budget: "),
    ],
)
def test_what_a_plan_may_lose_is_checked(planner: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(with_value("planner", planner))


def test_what_a_plan_may_lose_reaches_the_planner() -> None:
    planner = {"exact_only": False, "allow_lossy": ["int8", "int4"], "error_budget": 0.01}
    options = parse_recipe(with_value("planner", planner)).planner.options()
    assert (options.exact_only, options.allow_lossy, options.error_budget) == (False, ("int8", "int4"), 0.01)
    assert typing.get_args(Lossy) == LOSSY
    recipes = [{"exact_only": False}, {**planner, "error_budget": None}, planner]
    digests = [parse_recipe(with_value("planner", wanted)).digest for wanted in recipes]
    assert len(set(digests)) == 3  # a run is not taken up unawares by one that loses otherwise
    assert digests[0] == parse_recipe(minimal()).digest


@pytest.mark.parametrize(
    ("training", "named"),
    [
        ({"max_grad_norm": 1.0, "nonfinite": "ignore"}, "max_grad_norm 1.0"),
        ({"nonfinite": "skip"}, "training.nonfinite skip"),
        ({}, "training.nonfinite raise"),
    ],
)
def test_updates_during_backward_are_refused_where_gradients_are_looked_at(
    training: dict[str, Any], named: str
) -> None:
    data = with_value("planner", {"update_schedule": "in_backward"})
    data["training"] |= training
    with pytest.raises(
        RecipeError, match=f"update_schedule in_backward .*{named}.*set max_grad_norm to null"
    ):
        parse_recipe(data)


def test_updates_during_backward_are_offered_where_nothing_looks_at_gradients() -> None:
    data = minimal()
    assert not parse_recipe(data).planner_options().gradients_untouched
    data["training"] |= {"nonfinite": "ignore"}
    assert parse_recipe(data).planner_options().gradients_untouched
    assert parse_recipe(data).planner_options().update_schedule == "auto"
    data["training"]["max_grad_norm"] = 1.0
    assert not parse_recipe(data).planner_options().gradients_untouched
    asked = minimal() | {"planner": {"update_schedule": "in_backward"}}
    asked["training"] |= {"nonfinite": "ignore"}
    assert parse_recipe(asked).planner_options().update_schedule == "in_backward"


def test_an_unknown_key_that_resembles_none_gets_the_list() -> None:
    with pytest.raises(RecipeError, match=r"output\.zzz: unknown key; known keys: directory"):
        parse_recipe(with_value("output.zzz", 1))


def test_a_key_of_another_optimizer_is_refused() -> None:
    data = minimal()
    data["optimizer"] = {"name": "SGD", "lr": 0.1, "momentun": 0.9}
    with pytest.raises(RecipeError, match=r"optimizer\.momentun: unknown key; did you mean momentum\?"):
        parse_recipe(data)
    data["optimizer"] = {"name": "SGD", "lr": 0.1, "betas": [0.9, 0.99]}
    with pytest.raises(RecipeError, match=r"optimizer\.betas: unknown key"):
        parse_recipe(data)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("training.steps", 0, r"training\.steps: Input should be greater than 0, got 0"),
        ("training.steps", "ten", r"training\.steps: .*got 'ten'"),
        ("training.nonfinite", "warn", r"training\.nonfinite: .*'raise', 'skip' or 'ignore', got 'warn'"),
        ("training.max_grad_norm", True, r"training: max_grad_norm is not a yes-or-no key"),
        ("optimizer.lr", -1, r"optimizer\.AdamW\.lr: .*greater than 0"),
        ("optimizer.name", "Adagrad", r"optimizer: .*Adagrad.*AdamW"),
        ("budget.device", "12 parsecs", r"budget\.device: cannot read '12 parsecs' as a size"),
        ("budget.nvme", "/x:y", r"budget: cannot read 'y' as a size"),
        ("budget.cxl", "one:1GiB", r"budget: budget\.cxl .one:1GiB.: cannot read .one. as a place of memory"),
        ("model.config", {"model_type": "llama"}, "give either model.path"),
        ("name", "../x", r"name: String should match pattern"),
    ],
)
def test_a_bad_value_is_named_with_what_would_do(path: str, value: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(with_value(path, value))


def test_every_fault_is_told_at_once() -> None:
    data = with_value("training.stpes", 1)
    data["schedule"] = {"name": "sine"}
    with pytest.raises(RecipeError) as caught:
        parse_recipe(data)
    assert len(str(caught.value).splitlines()) == 3


def test_overrides_reach_sections_that_the_file_does_not_have(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(minimal()))
    recipe = load_recipe(path, ["schedule.name=linear", "training.steps=7", "output.directory=/o"])
    assert (recipe.schedule.name, recipe.training.steps) == ("linear", 7)
    assert recipe.output_directory == Path("/o")
    assert load_recipe(path).output_directory == Path("runs/x")


@pytest.mark.parametrize("override", ["steps", "=3", "training..steps=3", "name.x=3"])
def test_an_override_that_cannot_be_placed_is_refused(override: str) -> None:
    with pytest.raises(RecipeError, match="override"):
        load_recipe(TINY, [override])


def test_a_swap_directory_of_our_own_or_the_users() -> None:
    ours = parse_recipe(with_value("budget.nvme", "1.5GiB"))
    assert ours.budget.swap_is_ours
    assert ours.memory_budget().nvme_bytes == 1_610_612_736
    assert ours.memory_budget().nvme_directory == "runs/x/swap"
    number = parse_recipe(with_value("budget.nvme", 4096))
    assert (number.budget.swap_is_ours, number.memory_budget().nvme_bytes) == (True, 4096)
    theirs = parse_recipe(with_value("budget.nvme", "/mnt/fast:2GB"))
    assert not theirs.budget.swap_is_ours
    assert theirs.memory_budget().nvme_directory == "/mnt/fast"
    assert theirs.memory_budget().nvme_bytes == 2_000_000_000
    assert parse_recipe(minimal()).memory_budget().nvme_bytes == 0


def test_the_digest_is_of_what_decides_the_numbers() -> None:
    digest = parse_recipe(minimal()).digest
    for path, value in (("budget.device", "2GiB"), ("training.log_every", 5), ("output.directory", "/o")):
        assert parse_recipe(with_value(path, value)).digest == digest
    for path, value in (("optimizer.lr", 1e-4), ("training.seed", 1), ("schedule.name", "cosine")):
        assert parse_recipe(with_value(path, value)).digest != digest


def test_what_is_written_out_reads_back_the_same() -> None:
    for path in RECIPES:
        recipe = load_recipe(path)
        assert Recipe.model_validate(yaml.safe_load(recipe.to_yaml())) == recipe


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"No such file.*memtrain ls"):
        load_recipe(tmp_path / "none.yaml")
    path = tmp_path / "r.yaml"
    path.write_text("[1, 2]")
    with pytest.raises(RecipeError, match="must hold the sections of a recipe, got list"):
        load_recipe(path)
    path.write_text("a: [")
    with pytest.raises(RecipeError, match="is not YAML"):
        load_recipe(path)


def test_tiles_are_a_size_of_streamed_weights() -> None:
    def model(**fields: Any) -> Recipe:
        return parse_recipe(
            {**minimal(), "model": {"path": "x", **fields}, "budget": {"device": "1GiB", "nvme": "1GiB"}}
        )

    assert model(streamed=True).model.tile_bytes == "auto"
    assert model(streamed=True, tile="off").model.tile_bytes is None
    assert model(streamed=True, tile="64MiB").model.tile_bytes == 64 << 20
    assert model(streamed=True).digest == model(streamed=True, tile="off").digest == model().digest
    assert model(streamed=True).digest != model(streamed=True, tile="64MiB").digest
    with pytest.raises(RecipeError, match=r"model\.tile 64MiB is for streamed weights"):
        model(tile="64MiB")
    for wrong in ("some", 0, "0MiB"):
        with pytest.raises(RecipeError, match=r"model\.tile|0 bytes|cannot|size"):
            model(streamed=True, tile=wrong)
