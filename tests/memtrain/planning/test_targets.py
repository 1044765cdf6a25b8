"""Every file that is written for a tool is read here by the tool itself."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from memtrain.planner.compose import machine_for
from memtrain.planner.forecast import Forecast
from memtrain.planner.optimizer_bytes import OptimizerRule, ParameterSpec
from memtrain.planner.parallel import Degrees
from memtrain.planner.ranges.model import DEVICE, Role
from memtrain.planning.answer import Answer
from memtrain.planning.request import Hardware, PlanRequest
from memtrain.planning.targets import Context, Target, targets
from memtrain.planning.usage import Usage
from memtrain.recipe import load_recipe

DEEPSPEED_PYTHON = Path(__file__).parents[3] / ".venv-deepspeed" / "bin" / "python"

NOTHING = Usage(
    actions={"keep": 1.0},
    swapped_to={},
    state={role: {DEVICE: 1.0} for role in Role},
    cpu_updates=0.0,
    splits_tokens=False,
    codecs=(),
)
OFFLOADED = Usage(
    actions={"recompute": 0.6, "swap": 0.2, "keep": 0.2},
    swapped_to={"host": 0.2},
    state={
        Role.PARAMETER: {DEVICE: 1.0},
        Role.GRADIENT: {"host": 1.0},
        Role.OPTIMIZER: {"host": 0.75, DEVICE: 0.25},
    },
    cpu_updates=0.5,
    splits_tokens=True,
    codecs=("int8",),
)


def context(answer: Answer, usage: Usage = NOTHING, degrees: Degrees | None = None, **work: Any) -> Context:
    """The tiny model's plan, as if it used ``usage``, on as many GPUs of a host as ``degrees`` have."""
    split = degrees or Degrees()
    setup = machine_for("a100-80g", gpus=split.gpus, dram="1TiB", nvme="/mnt/fast:4TB")
    job = dataclasses.replace(answer.forecast.job, setup=setup)
    forecast: Forecast = dataclasses.replace(answer.forecast, job=job)
    request = PlanRequest(
        work=dataclasses.replace(answer.request.work, **work),
        hardware=Hardware(gpu="a100-80g", gpus=split.gpus, dram="1TiB", nvme="/mnt/fast:4TB"),
        degrees=split,
    )
    return Context(request=request, forecast=forecast, usage=usage, fields=answer.fields)


def by_tool(one: Context) -> dict[str, Target]:
    return {target.tool: target for target in targets(one)[0]}


def deepspeed_of(one: Context) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(by_tool(one)["DeepSpeed"].text)
    return found


def accelerate_of(one: Context) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(by_tool(one)["Accelerate"].text)
    return found


def test_one_gpu_gets_a_recipe_that_the_trainer_reads(tight: Answer, tmp_path: Path) -> None:
    target = by_tool(context(tight, OFFLOADED))["memtrain"]
    (tmp_path / target.filename).write_text(target.text)
    recipe = load_recipe(tmp_path / target.filename)
    budget = tight.forecast.job.setup.budget
    assert recipe.training.micro_batch_size == 4
    assert recipe.data.sequence_length == 256
    assert recipe.training.device == "cuda"
    assert recipe.model.config is not None
    assert recipe.model.config["hidden_size"] == 64
    assert recipe.optimizer.name == "AdamW"
    assert "-m memtrain.train recipe.yaml" in target.command
    notes = " ".join(target.notes)
    assert "random ones" in notes
    assert (recipe.planner.exact_only, recipe.planner.allow_lossy) == (False, ("int8",))
    assert "with int8; a run does so with whole blocks and measures the error of their gradients" in notes
    # Budgets are rounded down to MiB, never up.
    setup = machine_for("a100-80g", dram="1TiB", nvme="/mnt/fast:4TB")
    assert recipe.budget.budget(Path("x")).device_bytes <= setup.budget.device_bytes
    assert recipe.budget.nvme == f"/mnt/fast:{4 * 10**12 // 2**20}MiB"
    assert budget.device_bytes == 12 << 20


def test_a_folder_with_weights_is_named(tight: Answer, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    text = by_tool(context(tight, model=str(tmp_path)))["memtrain"].text
    assert yaml.safe_load(text)["model"] == {"path": str(tmp_path), "dtype": "bfloat16"}


def test_sgd_is_a_recipe_and_adafactor_is_none(tight: Answer) -> None:
    sgd = by_tool(context(tight, optimizer=OptimizerRule.SGD_MOMENTUM))["memtrain"]
    assert yaml.safe_load(sgd.text)["optimizer"]["name"] == "SGD"
    one = context(tight, optimizer=OptimizerRule.ADAFACTOR)
    found, refused = targets(one)
    assert "memtrain" not in {target.tool for target in found}
    assert "recipes know AdamW, SGD and memtrain's own, not adafactor: no recipe is written" in refused
    assert "optimizer" not in deepspeed_of(one)


def test_several_gpus_get_no_recipe(tight: Answer) -> None:
    found, refused = targets(context(tight, degrees=Degrees(data=8, zero_stage=3)))
    assert [target.tool for target in found] == ["DeepSpeed", "Accelerate", "FSDP2"]
    assert "memtrain's trainer runs in one process so far, and this job has 8" in refused[0]


def test_deepspeed_says_where_state_goes(tight: Answer) -> None:
    one = context(tight, OFFLOADED, Degrees(data=8, zero_stage=3), accumulate=4)
    config = deepspeed_of(one)
    assert config["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True, "ratio": 0.75},
    }
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 4
    assert config["activation_checkpointing"] == {"cpu_checkpointing": True}
    notes = " ".join(by_tool(one)["DeepSpeed"].notes)
    assert "DeepSpeed cannot split token ranges" in notes
    assert "the plan does so with 50% of the state" in notes
    assert "DeepSpeed has no int8 codec" in notes


def test_deepspeed_offloads_all_below_stage_3(tight: Answer) -> None:
    one = context(tight, OFFLOADED, Degrees(data=2, zero_stage=1))
    assert deepspeed_of(one)["zero_optimization"]["offload_optimizer"] == {
        "device": "cpu",
        "pin_memory": True,
    }
    assert "DeepSpeed offloads all of it" in " ".join(by_tool(one)["DeepSpeed"].notes)


def test_deepspeed_on_one_gpu_needs_a_stage_to_offload(tight: Answer) -> None:
    assert deepspeed_of(context(tight, OFFLOADED))["zero_optimization"]["stage"] == 1
    assert deepspeed_of(context(tight))["zero_optimization"] == {"stage": 0}


def test_deepspeed_uses_the_disk_that_was_named(tight: Answer) -> None:
    state = {role: {"nvme": 1.0} for role in Role}
    disk = dataclasses.replace(OFFLOADED, state=state, cpu_updates=1.0)
    config = deepspeed_of(context(tight, disk, Degrees(data=8, zero_stage=3)))
    place = {"device": "nvme", "pin_memory": True, "nvme_path": "/mnt/fast"}
    assert config["zero_optimization"] == {"stage": 3, "offload_optimizer": place, "offload_param": place}


def test_degrees_that_a_tool_has(tight: Answer) -> None:
    ulysses = Degrees(data=2, context=2, context_method="ulysses", tensor=2, zero_stage=3)
    config = deepspeed_of(context(tight, degrees=ulysses))
    assert config["sequence_parallel_size"] == 2
    assert config["tensor_parallel"] == {"autotp_size": 2}
    ring = context(tight, degrees=Degrees(data=2, context=2, tensor=2, zero_stage=3))
    sizes = accelerate_of(ring)["parallelism_config"]
    assert {name.removeprefix("parallelism_config_"): size for name, size in sizes.items()} == {
        "dp_replicate_size": 1,
        "dp_shard_size": 2,
        "tp_size": 2,
        "cp_size": 2,
    }
    assert any("no ring attention" in why for why in targets(ring)[1])


@pytest.mark.parametrize(
    ("degrees", "said"),
    [
        (Degrees(pipeline=2), ("PipelineModule", "Megatron-LM", "nothing to shard")),
        (Degrees(data=4, expert=2, zero_stage=3), ("deepspeed.moe", "no expert parallelism", "expert ranks")),
        (Degrees(data=2, zero_stage=1), ("this plan has stage 1", "the plan has stage 1")),
        (
            Degrees(context=2, context_method="ulysses", zero_stage=3),
            ("take deepspeed.json", "context ranks"),
        ),
    ],
)
def test_what_no_tool_has_is_refused_by_name(tight: Answer, degrees: Degrees, said: tuple[str, ...]) -> None:
    refused = " ".join(targets(context(tight, degrees=degrees))[1])
    for words in said:
        assert words in refused


@pytest.mark.parametrize(
    ("degrees", "kind"),
    [(Degrees(), "NO"), (Degrees(data=2), "MULTI_GPU"), (Degrees(data=2, zero_stage=2), "FSDP")],
)
def test_accelerate_reads_its_file(tight: Answer, tmp_path: Path, degrees: Degrees, kind: str) -> None:
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    target = by_tool(context(tight, OFFLOADED, degrees))["Accelerate"]
    path = tmp_path / target.filename
    path.write_text(target.text)
    config = config_args.ClusterConfig.from_yaml_file(str(path))
    assert config.distributed_type.value == kind
    assert config.num_processes == degrees.gpus


@pytest.mark.parametrize("stage", [2, 3])
def test_accelerate_launch_knows_every_key_of_fsdp(tight: Answer, stage: Any) -> None:
    launch = pytest.importorskip("accelerate.commands.launch")
    config = accelerate_of(context(tight, OFFLOADED, Degrees(data=2, tensor=2, zero_stage=stage)))
    known = {action.dest for action in launch.launch_command_parser()._actions}
    assert set(config["fsdp_config"]) <= known
    assert set(config["parallelism_config"]) <= known
    assert config["fsdp_config"]["fsdp_reshard_after_forward"] is (stage == 3)
    assert config["fsdp_config"]["fsdp_offload_params"] is True
    assert config["fsdp_config"]["fsdp_activation_checkpointing_offload"] is True


def test_accelerate_keeps_what_the_plan_keeps(tight: Answer) -> None:
    one = context(tight, degrees=Degrees(data=2, zero_stage=3))
    fsdp = accelerate_of(one)["fsdp_config"]
    assert fsdp["fsdp_offload_params"] is False
    assert fsdp["fsdp_activation_checkpointing"] is False
    assert not any("off the device" in note for note in by_tool(one)["Accelerate"].notes)


def test_fsdp2_shards_a_model(tight: Answer, tmp_path: Path) -> None:
    """The file is run over the fake backend of torch, in a process of its own."""
    target = by_tool(context(tight, OFFLOADED, Degrees(data=4, zero_stage=3)))["FSDP2"]
    (tmp_path / "fsdp2.py").write_text(target.text)
    (tmp_path / "use.py").write_text(
        "import torch, torch.distributed as dist\n"
        "from torch.distributed.tensor import DTensor\n"
        "from torch.testing._internal.distributed.fake_pg import FakeStore\n"
        "from fsdp2 import shard\n"
        "dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=4)\n"
        "model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))\n"
        "shard(model, list(model), device='cpu')\n"
        "assert all(isinstance(p, DTensor) and p.to_local().shape[0] == 2 for p in model.parameters())\n"
        "print('sharded')\n"
    )
    done = subprocess.run(
        [sys.executable, "use.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "sharded", done.stderr
    assert "checkpoint(block)" in target.text
    assert '"reshard_after_forward": True' in target.text
    plain = by_tool(context(tight, degrees=Degrees(data=4, zero_stage=2)))["FSDP2"].text
    assert "checkpoint" not in plain
    assert "Offload" not in plain
    compile(plain, "fsdp2.py", "exec")


@pytest.mark.parametrize(("stage", "kinds", "copies"), [(2, "gradients", 1), (3, "weights and gradients", 2)])
def test_what_fsdp2_holds_beside_the_plan_is_told(tight: Answer, stage: Any, kinds: str, copies: int) -> None:
    one = context(tight, degrees=Degrees(data=2, zero_stage=stage))
    estimate = one.forecast.job.estimate
    large = ParameterSpec(name="table", shape=(1 << 15, 1 << 14), dtype="bfloat16", element_bytes=2)
    units = tuple(
        unit if unit.block is not None else dataclasses.replace(unit, parameters=(large,))
        for unit in estimate.units
    )
    job = dataclasses.replace(one.forecast.job, estimate=dataclasses.replace(estimate, units=units))
    found = by_tool(dataclasses.replace(one, forecast=dataclasses.replace(one.forecast, job=job)))
    size = f"{copies * 2}.000 GiB"  # an embedding and a head of 2^29 numbers of two bytes each
    for tool in ("FSDP2", "Accelerate"):
        (note,) = [note for note in found[tool].notes if "embedding and head" in note]
        assert note.startswith(f"FSDP2 keeps {kinds} of embedding and head whole")
        assert f"up to {size} that" in note
    assert "embedding and head" not in " ".join(found["DeepSpeed"].notes)


@pytest.mark.skipif(not DEEPSPEED_PYTHON.exists(), reason="scripts/setup_deepspeed.sh was not run")
def test_deepspeed_reads_its_files(tight: Answer, tmp_path: Path) -> None:
    """DeepSpeedConfig refuses what it does not know in the sections that it validates."""
    ulysses = Degrees(data=2, context=2, context_method="ulysses", tensor=2, zero_stage=2)
    for number, degrees in enumerate((Degrees(), Degrees(data=2, zero_stage=3), ulysses)):
        text = by_tool(context(tight, OFFLOADED, degrees))["DeepSpeed"].text
        (tmp_path / f"{number}.json").write_text(text)
    script = (
        "from deepspeed.runtime.config import DeepSpeedConfig\n"
        "for number in range(3):\n"
        f"    config = DeepSpeedConfig({str(tmp_path)!r} + f'/{{number}}.json')\n"
        "    offload = config.zero_config.offload_optimizer\n"
        "    print('READ', int(config.zero_optimization_stage), str(offload.device), offload.ratio)\n"
    )
    done = subprocess.run(
        [str(DEEPSPEED_PYTHON), "-W", "ignore", "-c", script], capture_output=True, text=True, check=False
    )
    read = [line for line in done.stdout.splitlines() if line.startswith("READ")]
    assert read == ["READ 1 cpu 1.0", "READ 3 cpu 0.75", "READ 2 cpu 1.0"], done.stderr


def test_several_hosts_are_launched_with_a_rendezvous(tight: Answer) -> None:
    one = context(tight, degrees=Degrees(data=2, zero_stage=3))
    hardware = dataclasses.replace(one.request.hardware, nodes=2, gpus=1, network="infiniband-ndr")
    request = dataclasses.replace(one.request, hardware=hardware)
    many = dataclasses.replace(one, request=request)
    command = by_tool(many)["DeepSpeed"].command
    assert command.startswith("torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d")
    assert any("machine_rank on every host" in note for note in by_tool(many)["Accelerate"].notes)
