"""``memtrain plan`` as it is typed: exit codes, one line of error, files whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memtrain.cli import main
from memtrain.planner.actions import Tier
from memtrain.planner.machine import Link, Machine
from memtrain.planner.ranges.plan import RangePlan
from memtrain.recipe import load_recipe

ANY = ("--gpu", "rtx-4060-laptop", "--chunks", "4", "--gap", "0.05", "--seconds", "4")
GPU = (*ANY, "--seq", "256")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["plan", *arguments])
    return int(end.value.code or 0)


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of an error."""
    assert run(*arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def test_a_job_that_fits(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tiny), *GPU) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert captured.out.splitlines()[1].startswith("FITS")


def test_a_job_that_does_not(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tiny), *GPU, "--budget", "device=2MiB", "--json") == 2
    assert json.loads(capsys.readouterr().out)["fits"] is False


def test_files_are_written_and_standard_output_stays_clean(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ("-o", str(tmp_path / "plan.json"), "--html", str(tmp_path / "page.html"))
    assert run(str(tiny), *GPU, *files, "--emit", str(tmp_path / "run"), "--json") == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    plan = RangePlan.from_json((tmp_path / "plan.json").read_text())
    assert plan.digest == document["certificate"]["plan_hash"]
    with pytest.raises(SystemExit) as end:
        main(["validate", str(tmp_path / "plan.json")])
    assert not end.value.code
    assert f"unchanged: optimal, {plan.step_seconds:.3g} s" in capsys.readouterr().out
    assert load_recipe(tmp_path / "run" / "recipe.yaml").data.sequence_length == 256
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "accelerate.yaml",
        "deepspeed.json",
        "recipe.yaml",
    ]
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert all(line.startswith("written: ") for line in captured.err.splitlines())
    assert not list(tmp_path.glob("*.tmp"))
    before = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "recipe.yaml is there already" in fails_with_output(capsys, tiny, tmp_path)
    assert (tmp_path / "run" / "recipe.yaml").read_text() == before


def fails_with_output(capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path) -> str:
    new = tmp_path / "second.json"
    message = fails(capsys, str(tiny), *GPU, "--emit", str(tmp_path / "run"), "-o", str(new))
    assert not new.exists()
    return message


def test_a_sweep_and_its_page(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "sweep.html"
    assert run(str(tiny), *GPU, "--sweep", "batch=1..4", "--csv", "--html", str(page)) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].startswith("sequence_tokens,micro_batch_sequences,fits,step_seconds")
    assert [row.split(",")[1] for row in rows[1:]] == ["1", "2", "4"]
    assert "<svg" in page.read_text()


def test_a_sweep_in_which_nothing_fits(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tiny), *ANY, "--budget", "device=2MiB", "--sweep", "seq=256,512") == 2
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()[1:]] == ["no", "no"]


def test_the_largest_batch(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tiny), *GPU, "--budget", "device=12MiB", "--what-fits", "batch", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["what_fits"]["largest_sequences"] == document["request"]["work"]["micro_batch"]
    assert document["what_fits"]["smallest_too_large_sequences"] > document["what_fits"]["largest_sequences"]


def measured_machine(folder: Path) -> Path:
    link = Link(
        tier=Tier.HOST,
        read_bytes_per_second=7e9,
        write_bytes_per_second=6e9,
        mixed_bytes_per_second=9e9,
        source="measured 2026-11-22",
    )
    machine = Machine(
        name="here",
        device="cuda:0",
        cores=4,
        dram_copy_bytes_per_second=1e10,
        links=(link,),
        source="measured",
    )
    path = folder / "machine.json"
    path.write_text(machine.to_json())
    return path


def test_links_that_were_measured(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = measured_machine(tmp_path)
    assert run(str(tiny), *GPU, "--dram", "2GiB", "--machine", str(path), "--sources") == 0
    text = capsys.readouterr().out
    assert "host: read: 7 GB/s: measured 2026-11-22 on here" in text
    assert f"links measured in {path}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "h900"), "no GPU is called 'h900'"),
        (("--gpu", "a100", "--seq", "8kk"), "--seq: cannot read '8kk'"),
        (("--gpu", "a100-80g", "--dram", "lots"), "--dram 'lots'"),
        (("--gpu", "a100-80g", "--dram", "12"), "--dram '12': 12 has no unit; say 12GiB"),
        (("--gpu", "a100-80g", "--dram", "1TiB", "--nvme", "2x4@6GB/s"), "4 has no unit; say 4GiB"),
        (("--gpu", "a100-80g", "--dram", "1TiB@200/s"), "--dram: cannot read '200/s' as a rate"),
        (("--gpu", "a100-80g", "--dram", "9999999999TiB"), "more than can be addressed"),
        (("--gpu", "a100-80g", "--override", "memory_bytes=1e30"), "more than can be addressed"),
        (("--gpu", "a100-80g", "--seq", "256", "--sweep", "seq=256,512"), "--seq 256 is one size"),
        (("--gpu", "a100-80g", "--micro-batch", "2", "--sweep", "batch=1..4"), "--micro-batch 2 is one size"),
        (("--gpu", "a100-80g", "--zero", "3"), "--zero 3 divides state over the ranks"),
        (("--gpu", "a100-80g", "--gpus", "2", "--ep", "2"), "--ep 2 for a model without experts"),
        (("--gpu", "a100-80g", "--gpus", "3", "--pp", "3"), "--pp 3 does not divide the model's layers 8"),
        (
            ("--gpu", "a100-80g", "--gpus", "8", "--cp", "8", "--cp-method", "ulysses"),
            "--tp x --cp (ulysses) 8 does not divide the model's heads 4",
        ),
        (("--gpu", "a100-80g", "--nvme", "4TB"), "passes through slots in DRAM"),
        (("--gpu", "a100-80g", "--budget", "device=90GiB"), "is above the"),
        (("--gpu", "a100-80g", "--budget", "cxl=9GiB"), "there is no tier 'cxl' to budget"),
        (("--gpu", "a100-80g", "--override", "speed=1"), "has no number 'speed'"),
        (("--gpu", "a100-80g", "--gpus", "3", "--tp", "2"), "= 2 does not divide --gpus x --nodes = 3"),
        (
            ("--gpu", "a100-80g", "--gpus", "2", "--cp", "2", "--seq", "255"),
            "cannot be cut 4 ways (--cp 2, ring)",
        ),
        (("--gpu", "a100-80g", "--nodes", "2"), "--nodes 2 need --network"),
        (("--gpu", "a100-80g", "--network", "20GB/s"), "ties hosts together, and there is one"),
        (("--gpu", "a100-80g", "--allow-lossy", "int3"), "no codec is called 'int3'"),
        (("--gpu", "a100-80g", "--machine", "nowhere.json"), "No such file or directory"),
        (("--gpu", "a100-80g", "--explain", "layers.99"), "--explain: 'layers.99' is no block"),
        (("--gpu", "a100-80g", "--dtype", "float32", "--master-weights"), "--dtype is float32: drop one"),
        (("--gpu", "a100-80g", "--sweep", "seq=8k", "-o", "x.json"), "--sweep makes several"),
        (("--gpu", "a100-80g", "--html", "no/such/folder/x.html"), "does not exist; create it first"),
        (
            ("--gpu", "a100-80g", "--ep", "1", "--tp", "8", "--gpus", "8"),
            "--tp 8 does not divide the model's heads 4",
        ),
    ],
)
def test_mistakes_are_one_line(
    tiny: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert message in fails(capsys, str(tiny), *arguments)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("", "MODEL is empty: name a preset, a folder with a config.json, or such a file"),
        ("llama-9", "llama-9 is neither a preset (smollm2-135m, "),
        ("nobody/no-such-model", "run `hf download nobody/no-such-model config.json`"),
    ],
)
def test_models_that_are_not_there(capsys: pytest.CaptureFixture[str], model: str, message: str) -> None:
    assert message in fails(capsys, model, "--gpu", "a100-80g")


def test_a_file_that_is_no_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}")
    assert "names no model_type" in fails(capsys, str(path), "--gpu", "a100-80g")
    path.write_text("not json")
    assert "is not JSON" in fails(capsys, str(tmp_path), "--gpu", "a100-80g")


def test_usage_errors_exit_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("llama-7b") == 1
    assert "Missing option" in capsys.readouterr().err


def test_a_folder_without_files_is_told(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run(str(tiny), *GPU, "--budget", "device=2MiB", "--emit", str(folder)) == 2
    assert capsys.readouterr().err == f"not written: {folder}, for nothing fits\n"
    assert not folder.exists()


def test_links_measured_and_not_used_are_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = measured_machine(tmp_path)
    message = fails(capsys, str(tiny), *GPU, "--dram", "2GiB", "--host-link", "9GB/s", "--machine", str(path))
    assert "has measured links to host, and none of them is used" in message


def test_every_number_of_a_table_has_as_many_digits(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tight = ("--micro-batch", "4", "--dram", "1GiB", "--budget", "device=12MiB")
    assert run(str(tiny), *GPU, *tight, "--ablation", "--csv") == 0
    head, *rows = capsys.readouterr().out.splitlines()
    seconds = [row.rsplit(",", 1)[1] for row in rows]
    assert head == "rule,step_seconds"
    assert {len(value.partition(".")[2]) for value in seconds if value} == {9}
    assert sum(map(bool, seconds)) >= 3
