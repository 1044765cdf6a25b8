"""memtrain's optimizers in Hugging Face's ``Trainer``, under the argument names that people know.

    from memtrain.integrations.huggingface import trainer_optimizer

    arguments = TrainingArguments(..., learning_rate=1e-2, weight_decay=0.1)
    trainer = Trainer(
        model, arguments, train_dataset=data,
        optimizer_cls_and_kwargs=trainer_optimizer("galore", arguments, rank=128, update_proj_gap=200),
    )

Learning rate, weight decay, betas and eps are those of the ``TrainingArguments`` (transformers 5.23's own
``galore_adamw`` leaves out all but the first), norms and biases are not decayed, as the Trainer has it, and
which matrices are projected is decided by their roles. Scheduler, accumulation, clipping and checkpoints are
the Trainer's; its checkpoints hold plain tensors, which load with ``weights_only=True``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from memtrain.optim import GridOptimizer, role_table
from memtrain.optimizer_sections import GridSection, grid_section
from memtrain.optimizers import make_optimizer

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OptimizerFactory:
    """What the Trainer calls without arguments; it then calls what it was given with the model."""

    section: GridSection

    def __call__(self) -> Callable[..., GridOptimizer]:
        """The function that makes the optimizer."""
        return self._make

    def _make(self, model: nn.Module) -> GridOptimizer:
        optimizer, roles = make_optimizer(
            self.section.name,
            model,
            overrides=getattr(self.section, "overrides", None),
            decay_vectors=False,
            **self.section.arguments(),
        )
        _log.info("%s\n%s", self.section.name, role_table(roles))
        return optimizer


def trainer_optimizer(name: str, arguments: Any, **settings: Any) -> tuple[OptimizerFactory, dict[str, Any]]:
    """For ``Trainer(optimizer_cls_and_kwargs=...)``.

    Args:
        name: ``galore``, ``natural-galore``, ``frugal``, ``fira``, ``apollo``, ``apollo-mini`` or
            ``adamw-8bit``.
        arguments: the ``TrainingArguments``.
        settings: of the optimizer, as in a recipe (``memtrain.optimizer_sections``): rank, update_proj_gap,
            scale, proj_type; density, update_gap; state_dtype, master; overrides of roles by name.

    Raises:
        ValueError: an unknown name or setting, one that the arguments decide, or arguments that would be
            ignored or under which the optimizer would not compute what it says.
    """
    _refuse(arguments)
    decided = {
        "lr": "learning_rate", "weight_decay": "weight_decay", "eps": "adam_epsilon",
        "betas": "adam_beta1 and adam_beta2",
    }  # fmt: skip
    for setting, field in decided.items():
        if setting in settings:
            raise ValueError(f"{setting}={settings[setting]!r}: set {field} of TrainingArguments instead")
    section = grid_section(
        name,
        {
            "weight_decay": arguments.weight_decay,
            "betas": (arguments.adam_beta1, arguments.adam_beta2),
            "eps": arguments.adam_epsilon,
            **settings,
        },
        lr=arguments.learning_rate,
    )
    return OptimizerFactory(section), {}


def _refuse(arguments: Any) -> None:
    for field, remedy in (
        ("optim_target_modules", "roles decide what is projected: give overrides={pattern: role}"),
        ("optim_args", "give settings to trainer_optimizer by name"),
        ("deepspeed", "DeepSpeed hands its optimizers flat partitions, which have no rows to project"),
        # On CPUs accelerate 1.15 runs DistributedDataParallel in its place: the combination cannot be tried.
        ("fsdp", "this is not tested; use fully_shard and memtrain.optim in a loop, which is"),
    ):
        if getattr(arguments, field, None):
            raise ValueError(f"TrainingArguments.{field}={getattr(arguments, field)!r}: {remedy}")
