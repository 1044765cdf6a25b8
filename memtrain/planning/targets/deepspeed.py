"""A DeepSpeed JSON: ZeRO stage, where optimizer state and parameters go, batch sizes, degrees it knows.

Keys are those of DeepSpeed 0.19: ``runtime/zero/config.py``, ``runtime/zero/offload_config.py``,
``runtime/tensor_parallel/config.py``.
"""

from __future__ import annotations

import json
from typing import Any

from memtrain.planner.compose import SWAP_PLACE
from memtrain.planner.optimizer_bytes import OptimizerRule
from memtrain.planner.ranges.model import Role
from memtrain.planning.request import OwnOptimizer
from memtrain.planning.targets.common import (
    CHUNKED_LOSS_NOTE,
    MOST,
    PLACEHOLDER_LR,
    SOME,
    Context,
    Target,
    torchrun,
)

FILENAME = "deepspeed.json"
_OPTIMIZERS = {OptimizerRule.ADAMW: "AdamW"}
"""DeepSpeed's name of a planned optimizer; others have to be handed to ``deepspeed.initialize``."""


def refusal(context: Context) -> str | None:
    """Why DeepSpeed cannot be configured for this job, or None."""
    degrees = context.degrees
    if degrees.pipeline > 1:
        return "DeepSpeed's pipeline is a model class (PipelineModule), no configuration: no JSON is written"
    if degrees.context > 1 and degrees.context_method == "ring":
        return "DeepSpeed has no ring attention, only Ulysses (--cp-method ulysses): no JSON is written"
    optimizer = context.request.work.optimizer
    if isinstance(optimizer, OwnOptimizer):
        return (
            f"DeepSpeed hands its optimizers flat pieces, which {optimizer.name} cannot take as matrices: no "
            "JSON is written"
        )
    if degrees.expert > 1:
        return "DeepSpeed's experts are a layer class (deepspeed.moe), no configuration: no JSON is written"
    return None


def deepspeed(context: Context) -> Target:
    """The configuration, and what it leaves out."""
    work = context.request.work
    config = _config(context)
    notes = [
        *_notes(context, config),
        *context.unrepresented("DeepSpeed"),
    ]
    if work.chunked_loss:
        notes.append(CHUNKED_LOSS_NOTE)
    return Target(
        tool="DeepSpeed",
        filename=FILENAME,
        text=json.dumps(config, indent=2) + "\n",
        command=torchrun(context, f"train.py --deepspeed {FILENAME}"),
        notes=tuple(notes),
    )


def _config(context: Context) -> dict[str, Any]:
    work, degrees = context.request.work, context.degrees
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": work.micro_batch,
        "gradient_accumulation_steps": work.accumulate,
        "bf16": {"enabled": work.dtype == "bfloat16"},
        "zero_optimization": _zero(context),
    }
    if work.clipping:
        config["gradient_clipping"] = 1.0
    if isinstance(work.optimizer, OptimizerRule) and work.optimizer in _OPTIMIZERS:
        config["optimizer"] = {"type": _OPTIMIZERS[work.optimizer], "params": {"lr": PLACEHOLDER_LR}}
    if degrees.tensor > 1:
        config["tensor_parallel"] = {"autotp_size": degrees.tensor}
    if degrees.context > 1:
        config["sequence_parallel_size"] = degrees.context
    if context.recomputes and context.usage.swapped_to.get("host", 0.0) > 0:
        config["activation_checkpointing"] = {"cpu_checkpointing": True}
    return config


def _zero(context: Context) -> dict[str, Any]:
    off_device = context.share(Role.OPTIMIZER)
    # Offload needs a stage; over one rank stage 1 divides nothing and offloads all the same.
    stage = max(context.degrees.zero_stage, 1 if off_device > 0 else 0)
    zero: dict[str, Any] = {"stage": stage}
    optimizer = _device(context, Role.OPTIMIZER)
    if optimizer != "none":
        zero["offload_optimizer"] = _offload(context, optimizer)
        if stage == 3 and optimizer == "cpu" and off_device < 1:
            zero["offload_optimizer"]["ratio"] = round(off_device, 3)
    weights = _device(context, Role.PARAMETER)
    if stage == 3 and weights != "none":
        zero["offload_param"] = _offload(context, weights)
    return zero


def _device(context: Context, role: Role) -> str:
    """``none``, ``cpu`` or ``nvme``: where most of what leaves the device goes."""
    off = context.share(role)
    if off < SOME or (role is Role.PARAMETER and off <= MOST):
        return "none"
    return "nvme" if context.share(role, "nvme") > off / 2 else "cpu"


def _offload(context: Context, device: str) -> dict[str, Any]:
    found: dict[str, Any] = {"device": device, "pin_memory": True}
    if device == "nvme":
        found["nvme_path"] = context.swap_directory
    return found


def _notes(context: Context, config: dict[str, Any]) -> list[str]:
    found = []
    zero, usage = config["zero_optimization"], context.usage
    optimizer = zero.get("offload_optimizer")
    if "optimizer" in config:
        found.append("optimizer.params.lr is a placeholder")
    else:
        found.append(
            f"hand {context.request.work.optimizer.value} to deepspeed.initialize: the JSON names none"
        )
    if optimizer and usage.cpu_updates < 1:
        found.append(
            f"DeepSpeed updates on the CPU whatever is offloaded; the plan does so with "
            f"{usage.cpu_updates:.0%} of the state"
        )
    if optimizer and context.share(Role.OPTIMIZER) < 1 - SOME and "ratio" not in optimizer:
        found.append(
            f"the plan keeps {1 - context.share(Role.OPTIMIZER):.0%} of the optimizer's state on the device; "
            "DeepSpeed offloads all of it (a part only at stage 3, to host memory)"
        )
    paths = {part.get("nvme_path") for part in (optimizer or {}, zero.get("offload_param", {}))}
    if SWAP_PLACE in paths:
        found.append(f"nvme_path {SWAP_PLACE} is a placeholder")
    weights = context.share(Role.PARAMETER)
    if weights >= SOME and "offload_param" not in zero:
        found.append(
            f"the plan keeps {weights:.0%} of the weights off the device; DeepSpeed offloads all or none, "
            "and at stage 3 only"
        )
    if context.recomputes:
        found.append(
            "switch on checkpointing of whole blocks in the model (Hugging Face: "
            "gradient_checkpointing_enable())"
        )
    if "sequence_parallel_size" in config:
        found.append(
            "register Ulysses attention before the model is made "
            "(deepspeed.runtime.sequence_parallel.ulysses_sp)"
        )
    return found
