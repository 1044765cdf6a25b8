from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from memtrain.cli import app, launch, main
from tests.memtrain.plans import feasible_plan

TINY = "recipes/tiny_llama_cpu.yaml"


def run_cli(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    return int(end.value.code or 0)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, list[str], list[str]]]:
    calls = []

    def fake(recipe: Path, options: list[str], overrides: list[str]) -> int:
        calls.append((recipe, options, overrides))
        return 2

    monkeypatch.setattr(app, "launch", fake)
    return calls


def test_run_tells_torchruns_options_from_overrides(launched: list[Any]) -> None:
    code = run_cli(
        "run", TINY, "--nproc-per-node", "1", "--rdzv-conf=a=b", "--", "training.steps=3", "name=y"
    )
    assert code == 2
    assert launched == [
        (Path(TINY), ["--nproc-per-node", "1", "--rdzv-conf=a=b"], ["training.steps=3", "name=y"])
    ]


def test_run_takes_overrides_without_the_dashes_too(launched: list[Any]) -> None:
    run_cli("run", TINY, "training.steps=3", "--log-dir", "d")
    assert launched == [(Path(TINY), ["--log-dir", "d"], ["training.steps=3"])]


def test_a_mistake_is_told_before_anything_is_launched(
    launched: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("run", TINY, "--", "training.stpes=3") == 1
    assert "did you mean steps?" in capsys.readouterr().err
    assert launched == []


@pytest.mark.parametrize("argument", ["trainin.steps=3", "trainin=3"])
def test_a_misspelt_override_is_none_of_torchruns_business(
    launched: list[Any], capsys: pytest.CaptureFixture[str], argument: str
) -> None:
    assert run_cli("run", TINY, argument) == 1
    assert "trainin: unknown key; did you mean training?" in capsys.readouterr().err
    assert launched == []


def test_pairs_that_torchrun_takes_are_left_to_it(launched: list[Any]) -> None:
    run_cli("run", TINY, "--rdzv-conf", "timeout=60", "training.steps=3", "--log-dir=a=b")
    assert launched == [
        (Path(TINY), ["--rdzv-conf", "timeout=60", "--log-dir=a=b"], ["training.steps=3"]),
    ]


def test_what_torchrun_would_run_as_a_script_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["stray"], ["-m", "other"], ["--no-python", "ls"]):
        assert run_cli("run", TINY, *arguments) == 1
        assert f"{arguments[-1]!r} is neither an option of torchrun" in capsys.readouterr().err


def test_torchruns_own_usage_errors_exit_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("run", TINY, "--nproc-per-node") == 1
    assert run_cli("run", TINY, "--node-rank=first") == 1
    assert "invalid int value: 'first'" in capsys.readouterr().err


def test_torchrun_gets_one_process_here_unless_told_otherwise() -> None:
    recipe = Path("r.yaml")
    tail = ["-m", "memtrain.train", "r.yaml", "a.b=1"]
    assert launch.torchrun_arguments(recipe, [], ["a.b=1"]) == [
        "--standalone",
        "--nproc-per-node",
        "1",
        *tail,
    ]
    given = ["--nnodes=2", "--nproc_per_node=4"]
    assert launch.torchrun_arguments(recipe, given, ["a.b=1"]) == [*given, *tail]


def test_usage_errors_exit_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("shwo") == 1
    assert "No such command 'shwo'" in capsys.readouterr().err
    assert run_cli("run") == 1
    assert run_cli("show", TINY, "training.steps=none") == 1
    assert "training.steps" in capsys.readouterr().err


def test_ls_lists_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("ls") == 0
    listed = capsys.readouterr().out
    assert TINY in listed
    assert "1.2GiB" in listed
    assert run_cli("ls", str(tmp_path)) == 1
    assert "no recipe" in capsys.readouterr().err


def test_show_applies_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("show", TINY, "training.steps=7") == 0
    assert "  steps: 7\n" in capsys.readouterr().out


def test_validate_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("validate", TINY) == 0
    assert "is a valid recipe: tiny_llama_cpu, 20 steps" in capsys.readouterr().out
    (tmp_path / "r.yaml").write_text("name: x\n")
    assert run_cli("validate", str(tmp_path / "r.yaml")) == 1
    assert "model: Field required" in capsys.readouterr().err


def test_validate_a_plan_needs_what_it_was_made_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    path.write_text(feasible_plan().to_json())
    assert run_cli("validate", str(path)) == 1
    assert "profile.json is not there" in capsys.readouterr().err
    path.write_text(path.read_text().replace('"gap":0.05', '"gap":0.01'))
    assert run_cli("validate", str(path)) == 1
    assert "it was edited or damaged" in capsys.readouterr().err
