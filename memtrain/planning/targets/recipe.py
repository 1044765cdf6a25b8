"""A recipe for ``memtrain run``: one process, which measures the model and plans again inside the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from memtrain.planner.compose import SWAP_PLACE
from memtrain.planner.machine import Budget
from memtrain.planner.optimizer_bytes import OptimizerRule
from memtrain.planner.ranges.model import Role
from memtrain.planner.units import GiB, MiB
from memtrain.planning.request import OwnOptimizer
from memtrain.planning.targets.common import PLACEHOLDER_LR, SOME, Context, Target
from memtrain.recipe import parse_recipe

FILENAME = "recipe.yaml"
_CLIP_NORM = 1.0


def refusal(context: Context) -> str | None:
    """Why memtrain's own trainer cannot run this job, or None."""
    gpus, rule = context.request.gpus, context.request.work.optimizer
    if gpus > 1:
        return f"memtrain's trainer runs in one process so far, and this job has {gpus}: no recipe is written"
    own = isinstance(rule, OwnOptimizer)
    if not own and rule not in (OptimizerRule.ADAMW, OptimizerRule.SGD_MOMENTUM):
        return f"recipes know AdamW, SGD and memtrain's own, not {rule.value}: no recipe is written"
    return None


def recipe(context: Context) -> Target:
    """The recipe. Raises RecipeError: the trainer's own schema refuses it."""
    work = context.request.work
    data: dict[str, Any] = {
        "name": f"{_plain(Path(work.model).stem)}_seq{work.sequence}_{context.request.hardware.gpu}",
        "description": f"from memtrain plan: {work.model}, {work.sequence} tokens",
        "model": _model(context),
        "data": {
            "train": "path/to/train.bin",
            "heldout": "path/to/heldout.bin",
            "sequence_length": work.sequence,
        },
        "budget": _budget(context.forecast.job.setup.budget),
        "training": {
            "steps": 100,
            "micro_batch_size": work.micro_batch,
            "accumulation": work.accumulate,
            "max_grad_norm": _CLIP_NORM if work.clipping else None,
            "chunked_loss": work.chunked_loss,
            "device": "cuda",
        },
        "optimizer": _optimizer(context),
    }
    if planner := _planner(context):
        data["planner"] = planner
    if in_backward(context):
        data["training"]["nonfinite"] = "ignore"  # or no update could begin before all gradients are there
    parse_recipe(data, source="the recipe of this plan")
    return Target(
        tool="memtrain",
        filename=FILENAME,
        text=yaml.safe_dump(data, sort_keys=False, allow_unicode=True),
        command=f"torchrun --standalone --nproc-per-node 1 -m memtrain.train {FILENAME}",
        notes=_notes(context),
    )


def _planner(context: Context) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if context.usage.codecs:
        found |= {"exact_only": False, "allow_lossy": list(context.usage.codecs)}
    work = context.request.work
    if work.update_schedule != "auto":
        found["update_schedule"] = work.update_schedule
    if work.micro_batch_order != "auto":
        found["micro_batch_order"] = work.micro_batch_order
    return found


def in_backward(context: Context) -> bool:
    """Whether the plan updates anything before backward is over."""
    blocks = context.forecast.plan.blocks
    return any(count and label.endswith("in-backward") for block in blocks for label, count in block.updates)


def _notes(context: Context) -> tuple[str, ...]:
    found = [
        "data.train, data.heldout, training.steps and optimizer.lr are placeholders",
        f"`memtrain run {FILENAME}` is the same",
        "the run measures the model on the real device and makes its own plan inside this budget: blocks, "
        "tiers and schedule are decided again",
    ]
    if "path" not in _model(context):
        found.append("no weights were found where the configuration is: the recipe trains from random ones")
    weights = context.share(Role.PARAMETER)
    if weights >= SOME:
        found.append(
            f"the plan has {weights:.0%} of the weights off the device; the run streams them too, but loads "
            "the model whole first: where that does not fit, set model.streamed: true"
        )
    if in_backward(context):
        found.append(
            "the plan updates weights in backward, before all gradients are there, and the recipe does not "
            "look for NaN among them: training.nonfinite is ignore"
        )
    if context.usage.codecs:
        found.append(
            f"the plan compresses kinds of tensors with {', '.join(context.usage.codecs)}; a run does so "
            "with whole blocks and measures the error of their gradients: planner.error_budget limits that"
        )
    return tuple(found)


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in name).lstrip("._-") or "model"


def _model(context: Context) -> dict[str, Any]:
    """A folder with weights is named; without weights the configuration is written out."""
    work = context.request.work
    folder = Path(work.model)
    if folder.is_dir() and any(folder.glob("*.safetensors")):
        return {"path": work.model, "dtype": work.dtype}
    shapes = {key: value for key, value in context.fields.items() if key not in _NOT_OF_THE_MODEL}
    return {"config": shapes, "dtype": work.dtype}


_NOT_OF_THE_MODEL = ("architectures", "torch_dtype", "dtype", "transformers_version", "_name_or_path")


def _budget(budget: Budget) -> dict[str, str]:
    found = {"device": _size(budget.device_bytes)}
    if budget.host_bytes:
        found["host"] = _size(budget.host_bytes)
    if budget.cxl_bytes:
        found["cxl"] = f"{budget.cxl_place}:{_size(budget.cxl_bytes)}"
    if budget.nvme_bytes:
        place = "" if budget.nvme_directory == SWAP_PLACE else f"{budget.nvme_directory}:"
        found["nvme"] = f"{place}{_size(budget.nvme_bytes)}"
    return found


def _size(size_bytes: int) -> str:
    """Rounded down to MiB: a budget is a promise."""
    if size_bytes % GiB == 0:
        return f"{size_bytes // GiB}GiB"
    return f"{size_bytes // MiB}MiB"


def _optimizer(context: Context) -> dict[str, Any]:
    work = context.request.work
    if isinstance(work.optimizer, OwnOptimizer):
        return {"name": work.optimizer.name, "lr": PLACEHOLDER_LR, **dict(work.optimizer.arguments)}
    found: dict[str, Any] = {"lr": PLACEHOLDER_LR, "master_weights": work.master_weights}
    if work.optimizer is OptimizerRule.SGD_MOMENTUM:
        return {"name": "SGD", **found, "momentum": 0.9}
    return {"name": "AdamW", **found}
