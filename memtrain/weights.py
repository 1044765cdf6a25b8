"""The model of a recipe, in memory of its own.

``from_pretrained`` leaves the weights where safetensors mapped them: pages of the file, which count as
resident as soon as they are read and stay so until the last tensor of the file is gone. Copying all of
them would hold the model twice, so each is copied and its pages are given back at once.
"""

from __future__ import annotations

import ctypes
import difflib
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from memtrain.offload.errors import OffloadError
from memtrain.planner.machine import Budget
from memtrain.recipe import ModelSection, RecipeError
from memtrain.sparse_tables import sparse_inputs
from memtrain.streamed_models import StreamedModel, streamed_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MADV_DONTNEED = 4


def load_model(section: ModelSection, device: torch.device) -> PreTrainedModel:
    """The model in training mode, its cache of keys and values off.

    Random weights (``model.config``) are drawn from torch's generator as it stands.

    Raises:
        RecipeError: no such folder, a field that the configuration does not have, or values of which no model
            can be made.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    dtype = getattr(torch, section.dtype)
    if section.config is not None:
        configuration = _configuration(section.config)
        with _refusals_of_the_configuration():
            model = AutoModelForCausalLM.from_config(configuration, dtype=dtype)
    else:
        assert section.path is not None
        path = Path(section.path)
        if not path.exists() and (section.path.startswith((".", "/")) or section.path.count("/") != 1):
            raise RecipeError(
                f"no model at {path.resolve()}; `make data` fetches the model of the main recipe"
            )
        try:
            model = AutoModelForCausalLM.from_pretrained(section.path, dtype=dtype)
        except (OSError, ValueError) as error:
            raise RecipeError(f"model.path {section.path!r} cannot be loaded: {error}") from error
        own_weights(model)
    if section.sparse_tables:
        sparse_inputs(model)
    _ready_to_train(model)
    moved: PreTrainedModel = model.to(device)
    return moved


def load_streamed(
    section: ModelSection,
    device: torch.device,
    budget: Budget,
    weight_codecs: Mapping[str, str] | None = None,
) -> StreamedModel:
    """As ``load_model``, with the weights on a tier and never whole in memory.

    Raises:
        RecipeError: as ``load_model``; the device is no CPU.
        OffloadError: the weights cannot be streamed, or no tier can serve.
    """
    if device.type != "cpu":
        raise RecipeError(
            f"model.streamed trains on the CPU, training.device is {device}: set training.device=cpu, or "
            "load the model whole with model.streamed=false"
        )
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    dtype = getattr(torch, section.dtype)
    if section.config is not None:
        configuration = _configuration(section.config)

        def make() -> nn.Module:
            with _refusals_of_the_configuration():
                made: nn.Module = AutoModelForCausalLM.from_config(configuration, dtype=dtype)
            return made

        streamed = streamed_model(
            make,
            budget=budget,
            weight_codecs=weight_codecs,
            tile_bytes=section.tile_bytes,
            sparse_tables=section.sparse_tables,
        )
    else:
        assert section.path is not None
        if not Path(section.path).is_dir():
            raise RecipeError(
                f"there is no folder {Path(section.path).resolve()}: model.streamed reads one with "
                "safetensors files; `make data` fetches the model of the main recipe"
            )
        streamed = streamed_model(
            section.path,
            dtype=dtype,
            budget=budget,
            weight_codecs=weight_codecs,
            tile_bytes=section.tile_bytes,
            sparse_tables=section.sparse_tables,
        )
    _ready_to_train(streamed.model)
    return streamed


def _ready_to_train(model: Any) -> None:
    model.config.use_cache = False
    model.train()


def _configuration(fields: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    values = dict(fields)
    model_type = values.pop("model_type")
    try:
        known = AutoConfig.for_model(model_type).to_dict()
    except (KeyError, ValueError) as error:
        raise RecipeError(
            f"model.config.model_type {model_type!r} is unknown to transformers: {error}"
        ) from error
    for name in values:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise RecipeError(f"model.config.{name}: {model_type} has no such field{hint}")
    with _refusals_of_the_configuration():
        return AutoConfig.for_model(model_type, **values)


@contextmanager
def _refusals_of_the_configuration() -> Iterator[None]:
    """Configurations and constructors refuse what the recipe's fields say with errors of every type."""
    try:
        yield
    except OffloadError:
        raise  # of a tier, while weights are drawn
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # theirs go over several lines
        raise RecipeError(f"model.config: no model can be made of these values: {reason}") from error


def own_weights(model: torch.nn.Module) -> int:
    """Copy every parameter and buffer that lies in a mapped file; the bytes that were copied."""
    mapped = _mapped_files()
    copied_bytes = 0
    for tensor in [*model.parameters(), *model.buffers()]:
        address = tensor.data_ptr()
        if any(start <= address < end for start, end in mapped):
            old = tensor.data
            tensor.data = old.clone()
            _give_back(address, old.nbytes)
            copied_bytes += old.nbytes
    return copied_bytes


def _mapped_files() -> list[tuple[int, int]]:
    """Address ranges of the files that this process has mapped.

    Not by suffix: in a hub's cache the file behind ``model.safetensors`` is called by its hash.
    """
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith("/"):
            start, _, end = fields[0].partition("-")
            ranges.append((int(start, 16), int(end, 16)))
    return ranges


def _give_back(address: int, size_bytes: int) -> None:
    """Drop the whole pages of a mapped file in a range: they are clean, and read again if needed."""
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + size_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end <= start:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED):
        number = ctypes.get_errno()
        raise OSError(number, f"madvise of a mapped weight file: {os.strerror(number)}")
