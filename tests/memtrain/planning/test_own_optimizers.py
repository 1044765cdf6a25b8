"""``memtrain plan --optimizer 'galore(rank=128)'``: read, planned with the bytes it really keeps, and run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from memtrain.cli import main
from memtrain.optimizers import make_optimizer, measured_state_bytes
from memtrain.planner.grid_rule import NAMED, GridRule
from memtrain.planner.lowering.problem import problem_of
from memtrain.planner.lowering.states import refresh_bytes, share_of, update_seconds
from memtrain.planner.optimizer_bytes import OptimizerRule
from memtrain.planner.parallel import Degrees
from memtrain.planner.roofline import matmul_seconds
from memtrain.planning.answer import answer
from memtrain.planning.jobs import Jobs
from memtrain.planning.parsing import parse_optimizer
from memtrain.planning.request import Hardware, OwnOptimizer, PlanError, PlanRequest, Work
from memtrain.planning.targets import Context, targets
from memtrain.planning.targets.common import PLACEHOLDER_LR
from memtrain.weights import load_model
from tests.memtrain.planning.conftest import TINY, request_of

ROOT = Path(__file__).parents[3]


def test_what_is_written_is_read() -> None:
    assert parse_optimizer("galore(rank=128)") == OwnOptimizer(name="galore", arguments=(("rank", 128),))
    frugal = parse_optimizer(" frugal( density=0.5 , state_dtype=int8, spread=true ) ")
    assert isinstance(frugal, OwnOptimizer)
    assert frugal.arguments == (("density", 0.5), ("state_dtype", "int8"), ("spread", True))
    assert frugal.value == "frugal(density=0.5, state_dtype=int8, spread=True)"
    assert parse_optimizer("apollo-mini") == OwnOptimizer(name="apollo-mini")
    assert parse_optimizer("frugal()") == parse_optimizer("frugal")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("galore", r"galore: give either rank, such as 128, or density"),
        ("galore(rank=128", r"write it as 'galore\(rank=128\)'"),
        ("galore(rank)", r"write it as galore\(rank=128, update_proj_gap=200\)"),
        ("galore(rank=8, rank=9)", "rank is given twice, 8 and 9"),
        ("galore(rank=a)", "rank: .*valid integer.*got 'a'"),
        ("galore(rnk=8)", "rnk: Extra inputs are not permitted"),
        ("galore(rank=8, lr=1e-3)", "lr changes neither bytes nor seconds"),
        ("adamw(rank=8)", "adamw takes no arguments"),
    ],
)
def test_what_cannot_be_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse_optimizer(text)


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        (Degrees(data=2, zero_stage=3), r"--zero 3 divides them: give --zero 0"),
        (Degrees(tensor=2), r"--tp 2 divides them: give --tp 1"),
        (Degrees(data=2, expert=2), r"--ep 2 divides them: give --ep 1"),
    ],
)
def test_what_would_divide_matrices_is_refused(degrees: Degrees, message: str) -> None:
    work = Work(model="x", sequence=8, optimizer=OwnOptimizer(name="galore", arguments=(("rank", 8),)))
    with pytest.raises(PlanError, match=message):
        PlanRequest(work=work, hardware=Hardware(gpu="h100", gpus=2), degrees=degrees)


def test_masters_are_the_optimizers_own(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", str(tiny), "--gpu", "h100", "--optimizer", "galore(rank=8)", "--master-weights"])
    assert "write master=fp32 or master=split24 into --optimizer" in capsys.readouterr().err


def request_with(model: Path, text: str) -> PlanRequest:
    optimizer = parse_optimizer(text)
    work = Work(model=str(model), sequence=256, micro_batch=4, optimizer=optimizer, master_weights=False)
    return request_of(model, work=work, device="64MiB")


@pytest.mark.parametrize(
    "text",
    [
        "galore(rank=16)",
        "natural-galore(rank=8, history=3)",
        "frugal(state_dtype=int8)",
        "fira(rank=16, master=fp32)",
        "apollo(rank=8, master=split24)",
        "apollo-mini",
        "adamw-8bit",
    ],
)
def test_the_plan_counts_what_the_optimizer_keeps(tiny: Path, text: str) -> None:
    """The plan's bytes against the tensors of a step, difference 0."""
    assert text.partition("(")[0] in NAMED
    request = request_with(tiny, text)
    job = Jobs(request).job(256, 4)
    parameters = [parameter for unit in job.estimate.units for parameter in unit.parameters]
    share = share_of(job, parameters)

    from memtrain.recipe import ModelSection

    model = load_model(ModelSection(config=TINY, dtype="bfloat16"), torch.device("cpu"))
    assert isinstance(request.work.optimizer, OwnOptimizer)
    section = request.work.optimizer.section(lr=1e-2)
    optimizer, _ = make_optimizer(section.name, model, **section.arguments())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert share.moments + share.masters == measured_state_bytes(optimizer)


def test_products_and_workspace_are_in_the_plan(tiny: Path) -> None:
    """GaLore's seconds are its bytes' and its products'; a refresh's workspace is reserved."""
    job = Jobs(request_with(tiny, "galore(rank=16, update_proj_gap=100)")).job(256, 4)
    rule = job.optimizer
    assert isinstance(rule, GridRule)
    parameters = job.estimate.units[1].parameters
    share = share_of(job, parameters)
    # A block of the tiny model: q, o 64 x 64; k, v 32 x 64; gate, up, down 176 x 64, all of rank 16.
    elements = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 176 * 64
    flops = 2 * elements * 16 * (2 + 2 / 100)
    assert sum(map(rule.flops_of, parameters)) == pytest.approx(flops)
    bytes_alone = update_seconds(job, share, [])
    seconds = matmul_seconds(job.setup.accelerator, flops, single=True)
    assert update_seconds(job, share, parameters) == pytest.approx(bytes_alone + seconds)
    # The first basis of 64 x 176 in bf16: the gradient in fp32 beside the drawing of the sketch, 20 bytes a
    # number, or the iteration; and a third of the basis inside QR.
    drawing = 4 * 64 * 176 + 20 * 176 * 16
    iteration = 4 * (64 * 176 + 64 * 16 + 2 * 176 * 16 + 2)
    assert refresh_bytes(job) == max(drawing, iteration) + 64 * 16 // 3 * 4
    for rule_of_rest, products in (("sign_sgd", 3), ("no", 2)):
        text = f"frugal(density=0.25, projection=svd, inactive_update_rule={rule_of_rest})"
        frugal = Jobs(request_with(tiny, text)).job(256, 4).optimizer
        assert isinstance(frugal, GridRule)
        gate = next(p for p in parameters if p.name.endswith("gate_proj.weight"))
        assert frugal.flops_of(gate) == pytest.approx(2 * 176 * 64 * 16 * (products + 2 / 200))
    adamw = Jobs(request_with(tiny, "adamw")).job(256, 4)
    assert adamw.optimizer is OptimizerRule.ADAMW
    assert refresh_bytes(adamw) == 0
    assert problem_of(job).reserved_bytes == problem_of(adamw).reserved_bytes + refresh_bytes(job)
    assert not any(update.on_cpu for update in problem_of(job).updates)


def test_the_recipe_runs(tiny: Path, tmp_path: Path) -> None:
    """What ``memtrain plan`` writes is trained, with the files, steps and device of this machine put in."""
    request = request_with(tiny, "galore(rank=16, update_proj_gap=2, state_dtype=int8)")
    found = answer(Jobs(request))
    usage = found.usage
    assert usage is not None
    made, refused = targets(
        Context(request=request, forecast=found.forecast, usage=usage, fields=found.fields)
    )
    assert any("flat pieces, which galore cannot take" in why for why in refused)
    text = next(target.text for target in made if target.tool == "memtrain")
    assert yaml.safe_load(text)["optimizer"] == {
        "name": "galore", "lr": PLACEHOLDER_LR, "rank": 16, "update_proj_gap": 2, "state_dtype": "int8",
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(text)
    data = ROOT / "tests" / "data"
    overrides = [
        f"data.train={data / 'corpus_train.txt'}", f"data.heldout={data / 'corpus_heldout.txt'}",
        "data.sequence_length=32", "training.device=cpu", "training.steps=3", "evaluation.batches=1",
        "training.micro_batch_size=1", f"output.directory={tmp_path / 'run'}", "budget.device=2GiB",
        "budget.host=0",
    ]  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-m", "memtrain.train", tmp_path / "recipe.yaml", *overrides],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "step 3/3" in run.stdout
