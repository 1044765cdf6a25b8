"""An Accelerate YAML: FSDP2 with its parallelism, plain data parallelism, or one process.

Keys are those of Accelerate 1.15: ``commands/config/config_args.py``, the ``--fsdp_*`` and
``--parallelism_config_*`` options of ``commands/launch.py``.
"""

from __future__ import annotations

from typing import Any

import yaml

from memtrain.planner.ranges.model import Role
from memtrain.planner.units import format_gib
from memtrain.planning.request import ELEMENT_BYTES
from memtrain.planning.targets.common import CHUNKED_LOSS_NOTE, MOST, SOME, Context, Target

FILENAME = "accelerate.yaml"


def refusal(context: Context) -> str | None:
    """Why Accelerate cannot be configured for this job, or None."""
    degrees = context.degrees
    if degrees.pipeline > 1:
        return "Accelerate has no pipeline for training outside Megatron-LM: no YAML is written"
    if degrees.expert > 1:
        return "Accelerate has no expert parallelism: no YAML is written"
    if degrees.context > 1 and degrees.context_method == "ulysses":
        return "Accelerate runs Ulysses through DeepSpeed only: take deepspeed.json; no YAML is written"
    needs_mesh = degrees.tensor > 1 or degrees.context > 1
    if degrees.zero_stage == 1 or (degrees.zero_stage == 0 and needs_mesh):
        return (
            "Accelerate shards with FSDP2, which is stage 2 or 3, and tensor or context ranks need it; this "
            f"plan has stage {degrees.zero_stage}: no YAML is written"
        )
    return None


def accelerate(context: Context) -> Target:
    """The configuration, and what it leaves out."""
    hardware, work, degrees = context.request.hardware, context.request.work, context.degrees
    config: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": _distributed_type(context),
        "mixed_precision": "bf16" if work.dtype == "bfloat16" else "no",
        "num_machines": hardware.nodes,
        "num_processes": context.request.gpus,
        "machine_rank": 0,
        "main_training_function": "main",
        "use_cpu": False,
        "debug": False,
    }
    if _sharded(context):
        config["fsdp_config"] = _fsdp(context)
        if degrees.tensor > 1 or degrees.context > 1:
            config["parallelism_config"] = {
                "parallelism_config_dp_replicate_size": 1,
                "parallelism_config_dp_shard_size": degrees.data,
                "parallelism_config_tp_size": degrees.tensor,
                "parallelism_config_cp_size": degrees.context,
            }
    return Target(
        tool="Accelerate",
        filename=FILENAME,
        text=yaml.safe_dump(config, sort_keys=False),
        command=f"accelerate launch --config_file {FILENAME} train.py",
        notes=tuple(_notes(context)),
    )


def _sharded(context: Context) -> bool:
    return context.degrees.zero_stage >= 2 and context.degrees.replicas > 1


def _distributed_type(context: Context) -> str:
    if _sharded(context):
        return "FSDP"
    return "MULTI_GPU" if context.request.gpus > 1 else "NO"


def _fsdp(context: Context) -> dict[str, Any]:
    return {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": context.degrees.zero_stage == 3,
        "fsdp_offload_params": offloads(context),
        "fsdp_activation_checkpointing": context.recomputes,
        "fsdp_activation_checkpointing_offload": context.recomputes and context.swaps,
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    }


def offloads(context: Context) -> bool:
    """FSDP2 offloads weights, gradients and optimizer together: where most of the optimizer's bytes leave."""
    return context.share(Role.OPTIMIZER) > MOST


def offload_notes(context: Context) -> list[str]:
    """What FSDP2's one switch makes of the places of three kinds of state."""
    optimizer, weights = context.share(Role.OPTIMIZER), context.share(Role.PARAMETER)
    planned = f"the plan has {optimizer:.0%} of the optimizer's state and {weights:.0%} of the weights"
    if max(optimizer, weights) < SOME:
        return []
    choice = (
        "offloads all of both to host memory and updates on the CPU" if offloads(context) else "keeps all"
    )
    found = [f"{planned} off the device; FSDP2 knows all or nothing, and this file {choice}"]
    if context.share(Role.OPTIMIZER, "nvme") + context.share(Role.PARAMETER, "nvme") > 0:
        found.append("FSDP2 has no NVMe tier: what the plan sends there has to fit in host memory")
    return found


def root_note(context: Context) -> str:
    """What FSDP2 holds beside the plan: its root module's weights are gathered before the first block's
    forward and freed after the last, again in backward, and their gradients are reduced when that is over."""
    job = context.forecast.job
    elements = sum(p.elements for u in job.estimate.units if u.block is None for p in u.parameters)
    kinds = "weights and gradients" if context.degrees.zero_stage == 3 else "gradients"
    copies = 2 if context.degrees.zero_stage == 3 else 1
    size = copies * elements * ELEMENT_BYTES[context.request.work.dtype] // context.degrees.tensor
    return (
        f"FSDP2 keeps {kinds} of embedding and head whole while blocks run, up to {format_gib(size)} that "
        "the plan counts in their own passes alone: plan with that much less (--budget device=...)"
    )


def _notes(context: Context) -> list[str]:
    work, found = context.request.work, []
    if context.request.hardware.nodes > 1:
        found.append("set main_process_ip, main_process_port and machine_rank on every host")
    if work.accumulate > 1:
        found.append(f"give Accelerator gradient_accumulation_steps={work.accumulate}")
    if context.degrees.tensor > 1:
        found.append("load the model with its tensor-parallel plan: from_pretrained(..., tp_plan='auto')")
    if _sharded(context):
        found += [*offload_notes(context), root_note(context)]
    elif context.share(Role.OPTIMIZER) > 0 or context.recomputes:
        found.append(
            "without sharding Accelerate offloads and checkpoints nothing; on one GPU memtrain.prepare() in "
            "the same script follows a plan (recipes/smollm2_135m_accelerate.py)"
        )
    if work.chunked_loss:
        found.append(CHUNKED_LOSS_NOTE)
    return [*found, *context.unrepresented("Accelerate")]
