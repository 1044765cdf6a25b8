from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from memtrain.planner.lowering import problem_of
from memtrain.planner.optimizer_bytes import OptimizerRule
from memtrain.planner.parallel import Degrees
from memtrain.planning.jobs import Jobs
from memtrain.planning.parsing import (
    parse_attention,
    parse_axis,
    parse_budget,
    parse_codecs,
    parse_count,
    parse_degrees,
    parse_dtype,
    parse_optimizer,
    parse_overrides,
    parse_sweep,
    parse_work_size,
)
from memtrain.planning.request import Hardware, Outputs, PlanError, Questions, Search, Sweep, Work
from tests.memtrain.planning.conftest import request_of

NOTHING = {
    "data": None,
    "zero_stage": None,
    "tensor": 1,
    "context": 1,
    "pipeline": 1,
    "expert": 1,
    "context_method": None,
    "sequence_parallel": None,
}


@pytest.mark.parametrize(
    ("text", "value"), [("8192", 8192), ("8k", 8192), ("1.5K", 1536), ("1M", 1 << 20), (" 512 ", 512)]
)
def test_counts(text: str, value: int) -> None:
    assert parse_count("--seq", text) == value


@pytest.mark.parametrize("text", ["", "0", "8x", "1.3", "-4", "1.0001k"])
def test_no_counts(text: str) -> None:
    with pytest.raises(PlanError, match=r"--seq: cannot read .* as a whole number above 0; write 8192"):
        parse_count("--seq", text)


@pytest.mark.parametrize(
    ("text", "sweep"),
    [
        ("seq=8k..64k", Sweep(axis="seq", values=(8192, 16384, 32768, 65536))),
        ("seq=8k..20k", Sweep(axis="seq", values=(8192, 16384, 20480))),
        ("seq=8k..8k", Sweep(axis="seq", values=(8192,))),
        ("seq=4k,1k,4k", Sweep(axis="seq", values=(1024, 4096))),
        ("batch=1..5", Sweep(axis="batch", values=(1, 2, 4, 5))),
    ],
)
def test_sweeps(text: str, sweep: Sweep) -> None:
    assert parse_sweep(text) == sweep


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokens=8k", "write seq=8k..1M"),
        ("seq", "names no values"),
        ("seq=64k..8k", "ends at 8192 below its start 65536: swap them"),
        ("seq=" + ",".join(map(str, range(1, 30))), "has 29 values, at most 24 are planned"),
        ("seq=8k..x", "cannot read 'x'"),
    ],
)
def test_no_sweeps(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse_sweep(text)


def test_budgets_and_overrides() -> None:
    assert parse_budget(["device=70GiB", "host = 100GiB"]) == (("device", "70GiB"), ("host", "100GiB"))
    assert parse_overrides(["matmul_efficiency=0.6"]) == (("matmul_efficiency", 0.6),)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["device"], "--budget 'device': write it as device=70GiB"),
        (["device=1GiB", "device=2GiB"], "--budget device is given twice, 1GiB and 2GiB: drop one"),
        (["device=much"], "--budget device=much: cannot read 'much' as a size"),
        (["device=0"], "leaves no bytes"),
        (["device=12"], "--budget device=12: 12 has no unit; say 12GiB"),
    ],
)
def test_budgets_that_are_none(texts: list[str], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse_budget(texts)


def test_an_override_is_a_number() -> None:
    with pytest.raises(PlanError, match="'fast' is not a number"):
        parse_overrides(["matmul_efficiency=fast"])


def test_names() -> None:
    assert parse_optimizer("adam-8bit") is OptimizerRule.ADAM_8BIT
    assert parse_dtype("float32") == "float32"
    assert parse_attention("eager", "bfloat16") == "eager"
    assert parse_attention(None, "bfloat16") == "flash"
    assert parse_attention(None, "float32") == "efficient"
    assert parse_axis("batch") == "batch"
    with pytest.raises(PlanError, match="--optimizer 'adam' is not known; did you mean adamw"):
        parse_optimizer("adam")
    with pytest.raises(PlanError, match="--optimizer 'gallore' is not known; did you mean galore"):
        parse_optimizer("gallore")
    with pytest.raises(PlanError, match="--dtype 'bf16' is not known"):
        parse_dtype("bf16")
    with pytest.raises(PlanError, match="--attention 'flash2' is not known; did you mean flash"):
        parse_attention("flash2", "bfloat16")
    with pytest.raises(PlanError, match="--what-fits 'tokens' is not known: write seq or batch"):
        parse_axis("tokens")


def test_data_ranks_take_what_is_left_and_share_all_state() -> None:
    assert parse_degrees(8, **NOTHING) == Degrees(data=8, zero_stage=3)
    assert parse_degrees(8, **{**NOTHING, "context": 8}) == Degrees(context=8, zero_stage=3)
    assert parse_degrees(8, **{**NOTHING, "tensor": 8}) == Degrees(tensor=8, zero_stage=0)
    assert parse_degrees(8, **{**NOTHING, "tensor": 2, "zero_stage": 1}) == Degrees(
        data=4, tensor=2, zero_stage=1
    )
    ulysses = parse_degrees(4, **{**NOTHING, "context": 4, "context_method": "ulysses"})
    assert ulysses.context_method == "ulysses"
    assert parse_degrees(4, **{**NOTHING, "tensor": 4, "sequence_parallel": False}).sequence_cut == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor": 3}, "--tp 3 x --cp 1 x --pp 1 = 3 does not divide --gpus x --nodes = 8: change one"),
        ({"data": 4}, "--dp 4 x --tp 1 x --cp 1 x --pp 1 = 4, but --gpus x --nodes = 8"),
        ({"zero_stage": 4}, "--zero must be 0, 1, 2 or 3, got 4"),
        ({"context_method": "ring"}, "--cp-method ring says how --cp ranks exchange, and --cp is 1"),
        ({"sequence_parallel": True}, "--sequence-parallel cuts what --tp leaves whole, and --tp is 1"),
        ({"context": 2, "context_method": "star"}, "--cp-method must be ring or ulysses, got 'star'"),
        ({"expert": 3}, "--ep 3 does not divide --dp 8 x --cp 1 = 8, out of which expert ranks are taken"),
        ({"data": 0}, "--dp must be at least 1, got 0"),
        ({"tensor": 8, "zero_stage": 3}, "--zero 3 divides state .* --dp 1 x --cp 1 leaves one"),
        ({"pipeline": 0}, "--pp must be at least 1, got 0"),
    ],
)
def test_degrees_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse_degrees(8, **{**NOTHING, **changes})  # type: ignore[arg-type]


def test_the_search_checks_itself() -> None:
    for fields, message in (
        ({"chunks": 65}, "--chunks must lie between 1 and 64, got 65"),
        ({"seconds": 0.0}, "--seconds must lie above 0"),
        ({"gap": 1.0}, "--gap must be at least 0 and below 1, got 1.0"),
        ({"error_budget": 0.1}, "name them with --allow-lossy"),
        ({"error_budget": -0.1, "allow_lossy": ("int8",)}, "--error-budget must be finite and at least 0"),
        ({"error_budget": math.inf, "allow_lossy": ("int8",)}, "--error-budget must be finite"),
    ):
        with pytest.raises(PlanError, match=message):
            Search(**fields)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="--micro-batch must be at least 1, got 0"):
        Work(model="llama-7b", sequence=8, micro_batch=0)


@pytest.mark.parametrize("kernel", ["flash", "cudnn"])
def test_kernels_of_two_bytes_an_element_have_no_other(kernel: Any) -> None:
    with pytest.raises(PlanError, match=f"--attention {kernel} has no kernel for --dtype float32"):
        Work(model="llama-7b", sequence=8, dtype="float32", attention=kernel)


def test_a_chunk_has_a_token_of_a_gpu(tiny: Path) -> None:
    two: dict[str, Any] = {
        "degrees": Degrees(context=2),
        "hardware": Hardware(gpu="rtx-4060-laptop", gpus=2, dram="2GiB"),
    }
    asked = Jobs(request_of(tiny, **two, search=Search(chunks=8)))
    with pytest.raises(PlanError, match=r"^--chunks 8 are more than the 4 tokens .* lower it to 4, or"):
        asked.job(8, 1)
    assert asked.job(16, 1).chunks == 8
    left = Jobs(request_of(tiny, **two, search=Search()))
    assert [left.job(sequence, 1).chunks for sequence in (8, 64)] == [4, 16]


def test_outputs_that_contradict_questions(tmp_path: Path) -> None:
    sweep = Questions(sweep=Sweep(axis="seq", values=(8,)))
    with pytest.raises(PlanError, match="--json and --csv both want standard output"):
        Outputs(json=True, csv=True).check(Questions())
    with pytest.raises(PlanError, match=r"--csv is one table without room for --explain"):
        Outputs(csv=True).check(Questions(explain="3"))
    with pytest.raises(PlanError, match="-o is about one plan and --sweep makes several"):
        Outputs(plan=tmp_path / "plan.json").check(sweep)
    with pytest.raises(PlanError, match=r"folder .*missing does not exist; create it first"):
        Outputs(html=tmp_path / "missing" / "page.html").check(Questions())
    (tmp_path / "file").write_text("")
    with pytest.raises(PlanError, match="is a file; name a folder"):
        Outputs(emit=tmp_path / "file").check(Questions())
    Outputs(html=tmp_path / "page.html", csv=True).check(sweep)


def test_a_limit_on_writes_needs_a_disk_and_is_shared_by_the_gpus_of_the_host(tiny: Path) -> None:
    with pytest.raises(PlanError, match="--nvme-writes 1GB limits a disk that is not there: give --nvme"):
        Hardware(gpu="a800-80g", nvme_writes="1GB")
    limited = Hardware(gpu="a800-80g", gpus=2, dram="64GiB", nvme="1TB", nvme_writes="1GB")
    request = request_of(tiny, hardware=limited, degrees=Degrees(data=2))
    one = Jobs(request).job(256, 4)
    assert one.nvme_write_limit_bytes == 500_000_000
    assert problem_of(one).machine.place("nvme").write_limit_bytes == 500_000_000
    for text, message in (
        ("many", r"^--nvme-writes: .*many"),
        ("5", "^--nvme-writes: 5 has no unit; say 5GiB"),
    ):
        wrong = request_of(tiny, hardware=dataclasses.replace(limited, nvme_writes=text))
        with pytest.raises(PlanError, match=message):
            Jobs(dataclasses.replace(wrong, degrees=Degrees(data=2)))


@pytest.mark.parametrize("text", ["9" * 400, "65M", "67108865"])
def test_counts_beyond_what_can_be_sized_are_refused(text: str) -> None:
    with pytest.raises(PlanError, match="--seq must be at most 67108864, got"):
        parse_count("--seq", text)


def test_a_job_names_a_model_and_has_sizes_that_can_be_planned() -> None:
    for fields, message in (
        ({"model": " "}, "MODEL is empty: name a preset"),
        ({"sequence": 1}, "--seq must be at least 2, got 1"),
        ({"accumulate": 0}, "--accumulate must be at least 1, got 0"),
        ({"accumulate": 1 << 20 | 1}, "--accumulate must be at most 1048576, got 1048577"),
    ):
        with pytest.raises(PlanError, match=message):
            Work(**({"model": "llama-7b", "sequence": 8} | fields))  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="--sweep seq must be at least 2, got 1"):
        parse_sweep("seq=1,8")


def test_one_size_beside_a_question_that_tries_its_own_is_refused() -> None:
    nothing, sweep = Questions(), Questions(sweep=parse_sweep("seq=8k..1M"))
    assert parse_work_size(None, None, nothing) == (8192, 1)
    assert parse_work_size("4k", 3, nothing) == (4096, 3)
    assert parse_work_size(None, 3, sweep) == (8192, 3)
    for seq, batch, questions, message in (
        (
            "4k",
            None,
            sweep,
            "--seq 4k is one size, and --sweep seq tries its own: drop --seq, or drop --sweep",
        ),
        (
            None,
            3,
            Questions(sweep=parse_sweep("batch=1..4")),
            "--micro-batch 3 .* --sweep batch tries its own",
        ),
        ("4k", None, Questions(what_fits="seq"), "--seq 4k is one size, and --what-fits seq tries its own"),
        ("4k", 1, Questions(what_fits="batch"), "--micro-batch 1 is one size, and --what-fits batch"),
    ):
        with pytest.raises(PlanError, match=message):
            parse_work_size(seq, batch, questions)


def test_codecs_are_named_once() -> None:
    with pytest.raises(PlanError, match="'int8,int4,int8' names a codec twice: drop one"):
        parse_codecs("int8,int4,int8")


def test_links_that_nothing_would_use_are_refused(tiny: Path) -> None:
    for hardware, degrees, message in (
        (Hardware(gpu="h100", host_link="25GB/s"), Degrees(), "--host-link 25GB/s leads to memory beside"),
        (
            Hardware(gpu="h100", gpus=2, host_link="25GB/s"),
            Degrees(data=2),
            "--host-link 25GB/s leads to memory beside",
        ),
        (
            Hardware(gpu="h100", gpus=2, nodes=2, interconnect="nvlink-4", network="20GB/s"),
            Degrees(data=4),
            "--interconnect nvlink-4 ties the 2 GPUs .* reach over several hosts",
        ),
    ):
        with pytest.raises(PlanError, match=message):
            Jobs(request_of(tiny, hardware=hardware, degrees=degrees))
    # A laptop's GPUs talk over the bus; tensor ranks stay inside their host.
    Jobs(request_of(tiny, hardware=Hardware(gpu="rtx-4060-laptop", gpus=2, host_link="25GB/s")))
    inside = Hardware(gpu="h100", gpus=2, nodes=2, interconnect="nvlink-4", network="20GB/s")
    Jobs(request_of(tiny, hardware=inside, degrees=Degrees(data=2, tensor=2)))


def test_micro_batches_beyond_what_can_be_sized_are_refused() -> None:
    with pytest.raises(PlanError, match="--micro-batch must be at most 16384, got 16385"):
        Work(model="x", sequence=8, micro_batch=16385)
    with pytest.raises(PlanError, match="--sweep batch must be at most 16384, got 16385"):
        parse_sweep("batch=1,16385")


def test_codecs_have_names() -> None:
    assert parse_codecs(None) == ()
    assert parse_codecs("int8, int4") == ("int8", "int4")
    for text in ("", ",", "int8,"):
        with pytest.raises(PlanError, match=r"--allow-lossy .* has an empty name"):
            parse_codecs(text)


def test_an_error_budget_that_is_no_number_is_refused() -> None:
    with pytest.raises(PlanError, match="--error-budget must be finite and at least 0, got nan"):
        Search(allow_lossy=("int8",), error_budget=float("nan"))


def test_interconnect_needs_several_gpus() -> None:
    with pytest.raises(PlanError, match="--interconnect nvlink-4 ties GPUs of a host together"):
        Hardware(gpu="h100", nodes=2, interconnect="nvlink-4")


def test_outputs_that_would_destroy_each_other_or_a_device_are_refused(tmp_path: Path) -> None:
    same = tmp_path / "plan"
    with pytest.raises(PlanError, match="-o and --html both name"):
        Outputs(plan=same, html=tmp_path / "." / "plan").check(Questions())
    for path in (Path("/dev/null"), tmp_path):
        with pytest.raises(PlanError, match="no regular file; name another"):
            Outputs(plan=path).check(Questions())
    with pytest.raises(PlanError, match=r"--emit .* does not exist; create it first"):
        Outputs(emit=tmp_path / "absent" / "run").check(Questions())
