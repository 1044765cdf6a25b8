"""What ``memtrain.integrations.accelerate`` refuses, and how it looks at a batch without consuming it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset
from torch.utils.data import sampler as samplers

try:
    import accelerate as accelerate
    from accelerate.utils import DistributedType, DynamoBackend
except ImportError as error:
    raise ImportError(
        f"memtrain.integrations.accelerate needs accelerate: pip install 'memtrain[hf]' ({error})"
    ) from error

_KNOWN_SAMPLERS = (
    samplers.SequentialSampler,
    samplers.RandomSampler,
    samplers.SubsetRandomSampler,
    samplers.WeightedRandomSampler,
)


class UnsupportedSetupError(ValueError):
    """Accelerate was set up for something that memtrain cannot do right."""


def check_setup(accelerator: Any) -> None:
    """Raise UnsupportedSetupError where the Accelerator is set up for what memtrain cannot do right."""
    state = accelerator.state
    if accelerator.distributed_type != DistributedType.NO or accelerator.num_processes > 1:
        raise UnsupportedSetupError(
            f"memtrain trains in one process, this Accelerator is {accelerator.distributed_type.value} with "
            f"{accelerator.num_processes}: launch with --num_processes 1 and without --use_fsdp or "
            f"--use_deepspeed"
        )
    if state.mixed_precision != "no":
        raise UnsupportedSetupError(
            f"mixed_precision={state.mixed_precision!r} keeps a second, cast copy of weights that no plan "
            f"knows: load "
            f"the model in bfloat16, set mixed_precision='no', and MemtrainPlugin(master_weights=True)"
        )
    if state.dynamo_plugin.backend != DynamoBackend.NO:
        raise UnsupportedSetupError(
            f"dynamo_backend={state.dynamo_plugin.backend.value} would compile away what the plan acts on: "
            f"set it to 'no'"
        )


def peek(loader: DataLoader[Any]) -> Any:
    """A batch as the loader gives them, collated here: no worker is started, no iterator is advanced.

    Raises:
        UnsupportedSetupError: the loader cannot be looked into without consuming it.
    """
    sampler = loader.batch_sampler if loader.batch_sampler is not None else loader.sampler
    inner = sampler.sampler if type(sampler) is BatchSampler else sampler
    if isinstance(loader.dataset, IterableDataset) or not isinstance(inner, _KNOWN_SAMPLERS):
        what = "an iterable dataset" if isinstance(loader.dataset, IterableDataset) else type(inner).__name__
        raise UnsupportedSetupError(
            f"a batch cannot be taken from {what} without consuming it: give MemtrainPlugin(sample_batch=...)"
        )
    generators = [one for one in (loader.generator, getattr(inner, "generator", None)) if one is not None]
    before = [generator.get_state() for generator in generators]
    try:
        index = next(iter(sampler))
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)
    items = [loader.dataset[i] for i in index] if isinstance(index, list) else loader.dataset[index]
    return loader.collate_fn(items)


@contextmanager
def untouched_random_state() -> Iterator[None]:
    """Whatever is drawn inside has not been drawn."""
    import numpy

    python, legacy = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(legacy)
