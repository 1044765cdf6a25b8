"""The commands, as typer declares them.

Exit codes: 0 done, 1 a mistake or a failure, 2 no plan fits, 3 (``plan`` alone) a plan of which nothing is
proved.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from memtrain.cli.launch import launch, split_arguments
from memtrain.cli.plan import plan
from memtrain.cli.validate import validate_file
from memtrain.planning.request import PlanError
from memtrain.recipe import RecipeError, load_recipe

app = typer.Typer(
    name="memtrain",
    help="Train models that do not fit: a plan for your memory, ordinary PyTorch inside it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file; `memtrain ls` lists them.")]


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="memtrain run RECIPE [torchrun options] -- section.key=value ...",
)
def run(context: typer.Context, recipe: RecipePath) -> None:
    """Train RECIPE with torchrun, one process unless its options say otherwise."""
    options, overrides = split_arguments(context.args)
    overrides += context.obj or []
    load_recipe(recipe, overrides)  # a mistake is told before torch is loaded
    raise typer.Exit(launch(recipe, options, overrides))


@app.command("ls")
def list_recipes(
    folder: Annotated[Path, typer.Argument(help="Where the recipes are.")] = Path("recipes"),
) -> None:
    """List the recipes of a folder."""
    paths = sorted(folder.glob("*.yaml"))
    if not paths:
        raise RecipeError(f"no recipe (*.yaml) in {folder.resolve()}; they come with memtrain's repository")
    name = Column("recipe", no_wrap=True)
    table = Table(name, "device", "nvme", "what", box=None, pad_edge=False)
    for path in paths:
        recipe = load_recipe(path)
        budget = recipe.budget
        table.add_row(str(path), str(budget.device), str(budget.nvme or "-"), recipe.description)
    Console().print(table)


@app.command()
def show(
    recipe: RecipePath,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...")] = None,
) -> None:
    """Print RECIPE with every default written out."""
    print(load_recipe(recipe, overrides or []).to_yaml(), end="")


@app.command()
def validate(
    file: Annotated[Path, typer.Argument(help="A recipe (.yaml), or a run's plan.json.")],
) -> None:
    """Check a recipe's keys and values, or a plan against the profile and machine beside it."""
    print(validate_file(file))


@app.command()
def doctor(
    swap: Annotated[Path, typer.Option(help="The swap directory to try.")] = Path("."),
    measure: Annotated[bool, typer.Option(help="Measure the disk and the memory: a few seconds.")] = True,
) -> None:
    """Look at torch, devices, memory limits and the swap directory, and say what will be used."""
    from memtrain.cli.doctor import examine

    raise typer.Exit(examine(swap, measure=measure))


@app.command()
def profile(
    swap: Annotated[Path | None, typer.Option(help="Measure the disk of this swap directory.")] = None,
    device: Annotated[str, typer.Option(help="What computes: cpu, cuda or cuda:N.")] = "cpu",
    cxl: Annotated[
        str | None, typer.Option(help="Measure this CXL memory: 1, weighted_interleave:1,2 or /dev/dax0.0.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the machine here, as JSON.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the JSON instead of the table.")] = False,
) -> None:
    """Measure how fast this machine moves bytes: a few seconds. Planning can read the result later."""
    from memtrain.cli.profile import profile as measure

    raise typer.Exit(measure(swap, device=device, cxl=cxl, output=output, json=json))


app.command(
    epilog="memtrain plan llama-3-70b --seq 8k --gpu a800-80g --gpus 8 --cp 8 --dram 1TiB --nvme 4TB@6GB/s"
)(plan)


def main(arguments: list[str] | None = None) -> None:
    """The entry point of ``memtrain``; always ends with SystemExit."""
    given = sys.argv[1:] if arguments is None else arguments
    own, overrides = given, []
    if "--" in given:  # click would forget where it stood
        own, overrides = given[: given.index("--")], given[given.index("--") + 1 :]
    if overrides and own[:1] != ["run"]:
        own, overrides = [*own, *overrides], []
    try:
        # Usage errors of the command line exit with 1: 2 is for a budget that cannot work.
        code = app(args=own, obj=overrides, prog_name="memtrain", standalone_mode=False)
    except (RecipeError, PlanError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except typer.Abort:
        code = 1
    except Exception as error:
        show_usage = getattr(error, "show", None)  # click's errors know how to print themselves
        if show_usage is None:
            raise
        show_usage()
        code = 1
    sys.exit(code or 0)
