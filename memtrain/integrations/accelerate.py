"""memtrain under Hugging Face Accelerate.

    plugin = MemtrainPlugin(budget=memtrain.Budget(device="1.2GiB", nvme="/mnt/fast:40GiB"))
    accelerator = Accelerator(memtrain_plugin=plugin, gradient_accumulation_steps=2)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

The loop stays as it is: ``accumulate``, ``backward``, ``clip_grad_norm_``, ``save_state`` and ``load_state``
give what Accelerate gives without memtrain, bit for bit. With an Accelerator of another class, call
``memtrain.prepare`` first, hand ``session.model`` and ``session.optimizer`` to its ``prepare``, and
``stream_state(accelerator, session)`` after it.

Checkpoints: Accelerate would pickle all optimizer state from memory. Here ``save_state`` leaves model and
optimizer to ``memtrain.offload.snapshot``, which streams them into the folder ``memtrain`` of the checkpoint;
schedulers, samplers and registered objects stay Accelerate's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from memtrain.integrations.accelerate_setup import (
    UnsupportedSetupError,
    accelerate,
    check_setup,
    peek,
    untouched_random_state,
)
from memtrain.offload.atomic import CheckpointError
from memtrain.offload.optimizer import OffloadedOptimizer
from memtrain.offload.snapshot import load_checkpoint, save_checkpoint
from memtrain.planner.machine import Budget
from memtrain.planner.solve import PlannerOptions
from memtrain.preparing import prepare
from memtrain.session import Session

STATE_FOLDER = "memtrain"
"""In a checkpoint of Accelerate's, where model and optimizer are."""


@dataclass(frozen=True, kw_only=True)
class MemtrainPlugin:
    """What ``Accelerator.prepare`` hands to ``memtrain.prepare``, whose arguments have the same names."""

    budget: Budget
    micro_batches: int | None = None
    """None: the Accelerator's ``gradient_accumulation_steps``."""
    master_weights: bool = False
    split_masters: bool = True
    nonfinite: str = "ignore"
    options: PlannerOptions | None = None
    sample_batch: Any = None
    """The largest batch to come. None: one of the DataLoader that is prepared, which is not consumed."""
    block_names: Sequence[str] | None = None
    loss_fn: Callable[[Any, Any], Tensor] | None = None
    chunked_loss: bool = True
    directory: Path | str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.budget, Budget):
            raise TypeError(f"budget must be a memtrain.Budget, got {self.budget!r}")
        if self.micro_batches is not None and self.micro_batches < 1:
            raise ValueError(f"micro_batches must be at least 1, got {self.micro_batches}")


class Accelerator(accelerate.Accelerator):  # type: ignore[misc]  # accelerate has no types
    """``accelerate.Accelerator`` with a memory budget; without a plugin, the same as that.

    Attributes:
        memtrain_session: after ``prepare``, the session with plan and report.

    Raises:
        UnsupportedSetupError: several processes, mixed precision, compilation, or two models: says what to
        do.
    """

    def __init__(self, *args: Any, memtrain_plugin: MemtrainPlugin | None = None, **kwargs: Any) -> None:
        if memtrain_plugin is not None and not isinstance(memtrain_plugin, MemtrainPlugin):
            raise TypeError(f"memtrain_plugin must be a MemtrainPlugin, got {memtrain_plugin!r}")
        super().__init__(*args, **kwargs)
        self.memtrain_plugin = memtrain_plugin
        self.memtrain_session: Session | None = None
        if memtrain_plugin is not None:
            check_setup(self)

    def prepare(self, *args: Any, device_placement: list[bool] | None = None) -> Any:
        """As Accelerate's; one model and one optimizer come together, in this call."""
        if self.memtrain_plugin is None or not any(_is_ours(arg) for arg in args):
            return super().prepare(*args, device_placement=device_placement)
        session = self._open_session(self.memtrain_plugin, args)
        changed = [session.optimizer if isinstance(arg, torch.optim.Optimizer) else arg for arg in args]
        self.memtrain_session = session
        return super().prepare(*changed, device_placement=device_placement)

    def prepare_model(
        self, model: torch.nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False
    ) -> Any:
        """As Accelerate's, but the session's model is not moved: it is where it is to be trained, and weights
        that wait on a tier cannot be."""
        if self.memtrain_session is not None and model is self.memtrain_session.model:
            device_placement = False
        return super().prepare_model(
            model, device_placement=device_placement, evaluation_mode=evaluation_mode
        )

    def prepare_optimizer(
        self, optimizer: torch.optim.Optimizer, device_placement: bool | None = None
    ) -> Any:
        """As Accelerate's, but offloaded state is not moved to the device, where it would not fit."""
        if isinstance(optimizer, OffloadedOptimizer):
            device_placement = False
        return super().prepare_optimizer(optimizer, device_placement=device_placement)

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        """As Accelerate's; with master weights, of the fp32 gradients that those are stepped with."""
        session = self.memtrain_session
        if session is None or not session.optimizer.config.master_weights:
            return super().clip_grad_norm_(parameters, max_norm, norm_type=norm_type)
        if norm_type != 2:
            raise UnsupportedSetupError(
                f"with master weights, gradients are clipped by their 2-norm, not {norm_type}"
            )
        return session.optimizer.clip_grad_norm_(max_norm, parameters=parameters)

    def save_state(
        self, output_dir: str | None = None, safe_serialization: bool = True, **kwargs: Any
    ) -> Any:
        """As Accelerate's, with model and optimizer streamed into ``<output_dir>/memtrain``."""
        save = functools.partial(super().save_state, output_dir, safe_serialization, **kwargs)
        return save() if self.memtrain_session is None else _save_state(self, self.memtrain_session, save)

    def load_state(
        self, input_dir: str | None = None, load_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """As Accelerate's, with model and optimizer streamed from ``<input_dir>/memtrain``.

        Raises:
            CheckpointError: the checkpoint was not written under memtrain.
        """
        load = functools.partial(super().load_state, input_dir, load_kwargs, **kwargs)
        if self.memtrain_session is None:
            load()
        else:
            _load_state(self, self.memtrain_session, load)

    def end_training(self) -> None:
        """As Accelerate's; the session is closed."""
        super().end_training()
        self._close_session()

    def free_memory(self, *objects: Any) -> Any:
        """As Accelerate's; the session is closed."""
        self._close_session()
        return super().free_memory(*objects)

    def _close_session(self) -> None:
        if self.memtrain_session is not None:
            self.memtrain_session.close()
            self.memtrain_session = None

    def _open_session(self, plugin: MemtrainPlugin, args: tuple[Any, ...]) -> Session:
        models = [arg for arg in args if isinstance(arg, nn.Module)]
        optimizers = [arg for arg in args if isinstance(arg, torch.optim.Optimizer)]
        loaders = [arg for arg in args if isinstance(arg, DataLoader)]
        if len(models) != 1 or len(optimizers) != 1 or self.memtrain_session is not None:
            raise UnsupportedSetupError(
                f"prepare() got {len(models)} models and {len(optimizers)} optimizers"
                f"{', after others were prepared' if self.memtrain_session else ''}: one plan serves one "
                f"model with one "
                f"optimizer; pass both in one call, and everything else that is to be trained in a process "
                f"of its own"
            )
        steps = self.gradient_accumulation_steps
        if plugin.micro_batches not in (None, steps):
            raise UnsupportedSetupError(
                f"MemtrainPlugin(micro_batches={plugin.micro_batches}) but "
                f"gradient_accumulation_steps={steps}: leave "
                f"micro_batches away"
            )
        model, sample = models[0], plugin.sample_batch
        if self.device_placement:
            model.to(self.device)
        with untouched_random_state():
            if sample is None:
                if not loaders:
                    raise UnsupportedSetupError(
                        "pass a DataLoader to prepare(), or MemtrainPlugin(sample_batch=...)"
                    )
                sample = peek(loaders[0])
            return prepare(
                model,
                optimizers[0],
                accelerate.utils.send_to_device(sample, self.device),
                budget=plugin.budget,
                micro_batches=steps,
                master_weights=plugin.master_weights,
                split_masters=plugin.split_masters,
                nonfinite=plugin.nonfinite,
                options=plugin.options,
                block_names=plugin.block_names,
                loss_fn=plugin.loss_fn,
                chunked_loss=plugin.chunked_loss,
                directory=plugin.directory,
            )


def stream_state(accelerator: accelerate.Accelerator, session: Session) -> None:
    """Let ``save_state`` and ``load_state`` of an ordinary Accelerator stream the session's model and
    optimizer.

    To be called once, after its ``prepare``.

    Raises:
        UnsupportedSetupError: it has not prepared the session's optimizer, or is set up for what memtrain
        cannot do.
    """
    check_setup(accelerator)
    if not any(wrapper.optimizer is session.optimizer for wrapper in accelerator._optimizers):
        raise UnsupportedSetupError(
            "this Accelerator has not prepared the session's optimizer: call "
            "accelerator.prepare(session.model, "
            "session.optimizer, ...) first"
        )
    save, load = accelerator.save_state, accelerator.load_state

    def save_state(*args: Any, **kwargs: Any) -> Any:
        return _save_state(accelerator, session, functools.partial(save, *args, **kwargs))

    def load_state(*args: Any, **kwargs: Any) -> None:
        _load_state(accelerator, session, functools.partial(load, *args, **kwargs))

    accelerator.save_state, accelerator.load_state = save_state, load_state


def _is_ours(arg: Any) -> bool:
    return isinstance(arg, (nn.Module, torch.optim.Optimizer))


def _save_state(accelerator: accelerate.Accelerator, session: Session, save: Callable[[], Any]) -> Any:
    def stream(models: list[Any], weights: list[Any], folder: str) -> None:
        weights.clear()
        save_checkpoint(Path(folder) / STATE_FOLDER, session, progress={})

    hook = accelerator.register_save_state_pre_hook(stream)
    try:
        with _optimizer_set_aside(accelerator, session):
            return save()
    finally:
        hook.remove()


def _load_state(accelerator: accelerate.Accelerator, session: Session, load: Callable[[], None]) -> None:
    def stream(models: list[Any], folder: str) -> None:
        models.clear()
        if not (Path(folder) / STATE_FOLDER).is_dir():
            raise CheckpointError(
                f"{folder} has no folder {STATE_FOLDER}, it was written without memtrain: load it into the "
                f"plain model "
                f"and optimizer, then hand those to memtrain.prepare, which takes their state over"
            )
        load_checkpoint(Path(folder) / STATE_FOLDER, session)

    hook = accelerator.register_load_state_pre_hook(stream)
    try:
        with _optimizer_set_aside(accelerator, session):
            load()
    finally:
        hook.remove()


@contextmanager
def _optimizer_set_aside(accelerator: accelerate.Accelerator, session: Session) -> Iterator[None]:
    """Accelerate pickles what is in its list of optimizers; ours is streamed and must not be there."""
    wrappers = accelerator._optimizers
    accelerator._optimizers = [one for one in wrappers if one.optimizer is not session.optimizer]
    try:
        yield
    finally:
        accelerator._optimizers = wrappers
