"""The front door is light: measured by the names of the modules that are loaded, not by time."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "tokenizers", "matplotlib", "accelerate", "deepspeed", "datasets"}


def loaded_by(code: str) -> set[str]:
    """Heavy packages in memory after ``code`` ran in a fresh process."""
    report = f"\nimport sys; print('LOADED', *({HEAVY!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, check=True)
    return set(result.stdout.splitlines()[-1].split()[1:])


def test_import_memtrain_loads_nothing_heavy() -> None:
    assert loaded_by("import memtrain") == set()


def test_the_budget_and_the_plan_need_no_torch() -> None:
    code = "import memtrain; memtrain.Budget(device='1GiB'); memtrain.Plan; memtrain.Machine"
    assert loaded_by(code) == set()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["profile", "--help"],
        ["plan", "--help"],
        ["ls"],
        ["show", "recipes/tiny_llama_cpu.yaml"],
        ["validate", "recipes/tiny_llama_cpu.yaml"],
    ],
)
def test_commands_that_do_not_train_load_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
from memtrain.cli import main
try:
    main({arguments!r})
except SystemExit as end:
    assert end.code == 0, end.code
"""
    assert loaded_by(code) == set()


def test_training_loads_neither_tokenizers_nor_a_plotting_library() -> None:
    assert loaded_by("import memtrain.train") == {"torch"}


@pytest.mark.parametrize("module", ["memtrain.page", "memtrain.planpage"])
def test_drawing_a_report_does_without_torch(module: str) -> None:
    assert loaded_by(f"import {module}") == set()


def test_no_import_initialises_cuda() -> None:
    code = "import memtrain.train, torch; assert not torch.cuda.is_initialized()"
    assert loaded_by(code) == {"torch"}


def test_no_file_hides_a_name_of_the_front_door() -> None:
    code = """
import importlib, pkgutil, types
import memtrain
for module in pkgutil.iter_modules(memtrain.__path__):
    if module.name not in ("__main__", "offload", "optim", "planner"):
        importlib.import_module(f"memtrain.{module.name}")
hidden = [name for name in memtrain.__all__ if isinstance(getattr(memtrain, name), types.ModuleType)]
assert not hidden, hidden
"""
    subprocess.run([sys.executable, "-c", code], check=True)
