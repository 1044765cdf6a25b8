"""The safetensors files of a folder, and which weight of a model each of their tensors is.

One ``model.safetensors``, or several with an index, as ``save_pretrained`` leaves them. Only headers are read
here; a tensor's bytes are read when its turn comes, in chunks. Names are brought to the model's by what
transformers knows of it: patterns of older names, a prefix that a base model has or lacks, weights that are
tied. What differs all the same is told by name, before a byte is moved.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memtrain.offload.errors import OffloadError
from memtrain.offload.tensorfile import TensorFile

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHOWN = 8  # names that a message lists
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class WeightFilesError(OffloadError):
    """Files that cannot be streamed into a model; the message names files or weights, and the remedy."""


class WeightFolder:
    """The open files. A context manager.

    Raises:
        WeightFilesError: no safetensors files, or some that are missing, damaged, or not what the index says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, TensorFile] = {}
        """By the name of the tensor."""
        with ExitStack() as opened:
            index = self._index()
            for name in [_SINGLE] if index is None else sorted(set(index.values())):
                file = opened.enter_context(self._open(name))
                for tensor in file.entries:
                    if index is not None and index.get(tensor, name) != name:
                        continue  # the index names another file for it
                    self._files[tensor] = file
            if index is not None and (lost := sorted(index.keys() - self._files.keys())):
                raise WeightFilesError(
                    f"{folder / _INDEX} lists tensors that its files do not hold: {_listed(lost)}. Download "
                    "the folder again"
                )
            self._close = opened.pop_all().close

    @property
    def names(self) -> tuple[str, ...]:
        """Of all tensors, in the files' order."""
        return tuple(self._files)

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        return self._files[name].entries[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return self._files[name].entries[name].shape

    def parts(self, name: str) -> Iterator[Tensor]:
        """The elements of a tensor, as ``TensorFile.parts``."""
        return self._files[name].parts(name)

    def are_equal(self, one: str, other: str) -> bool:
        """Whether two tensors have the same bytes."""
        if (self.dtype(one), self.shape(one)) != (self.dtype(other), self.shape(other)):
            return False
        # A file has one chunk of memory: the part of the first is copied before the second is read.
        copies = (part.clone() for part in self.parts(one))
        pairs = zip(copies, self.parts(other), strict=True)
        return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)

    def close(self) -> None:
        """May be called twice."""
        self._close()

    def __enter__(self) -> WeightFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _index(self) -> dict[str, str] | None:
        """The file of each tensor, or None where there is one file."""
        path = self.folder / _INDEX
        if not path.is_file():
            return None
        try:
            files: dict[str, str] = json.loads(path.read_text())["weight_map"]
            names = set(files.values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightFilesError(f"{path} cannot be read ({error!r}): download the folder again") from error
        if strange := [name for name in names if Path(name).name != name]:
            raise WeightFilesError(f"{path} leads out of its folder, to {strange[0]!r}: take another folder")
        return files

    def _open(self, name: str) -> TensorFile:
        path = self.folder / name
        try:
            return TensorFile(path)
        except FileNotFoundError as error:
            found = ", ".join(sorted(p.name for p in self.folder.glob("*.bin"))) or "nothing like it"
            raise WeightFilesError(
                f"there is no {path} (but {found}): weights are streamed from safetensors files. Load the "
                "model once where it fits and save_pretrained() it"
            ) from error
        except (OSError, OffloadError, ValueError, KeyError, TypeError, struct.error) as error:
            raise WeightFilesError(
                f"{path} is no safetensors file that can be read ({error}): download it again"
            ) from error


@dataclass(frozen=True, kw_only=True)
class Match:
    """Where each weight of a model comes from."""

    sources: dict[str, str]
    """Tensors of the files by the model's name; of tied weights, by their first one."""
    unexpected: tuple[str, ...]
    """Tensors of the files that the model has no use for."""


def match(model: nn.Module, folder: WeightFolder) -> Match:
    """Find a tensor for every parameter and every buffer that is saved.

    Raises:
        WeightFilesError: lists weights that are missing, of another shape, no floating-point numbers, tied in
            the model and different in the files, or that transformers puts together from several tensors.
    """
    wanted = _wanted(model)
    known = {name: tensor for names, tensor in wanted for name in names}
    stored, faults = _renamed(model, folder.names, known)
    sources: dict[str, str] = {}
    missing = []
    for names, tensor in wanted:
        found = [stored[name] for name in names if name in stored]
        if not found:
            missing.append(names[0])
            continue
        sources[names[0]] = found[0]
        faults += _differences(names, tensor, found, folder)
    if missing:
        faults.append(f"not in the files: {_listed(missing)}")
    if faults:
        raise WeightFilesError(
            f"{folder.folder} does not hold the weights of {type(model).__name__}: {'; '.join(faults)}. Take "
            "the configuration that belongs to the files; what transformers makes of them beyond names can "
            "be had by loading the model once where it fits and saving it with memtrain"
        )
    used = {name for names, _ in wanted for name in names}
    extra = sorted(source for name, source in stored.items() if name not in used)
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    unexpected = [name for name in extra if not any(re.search(pattern, name) for pattern in ignored)]
    return Match(sources=sources, unexpected=tuple(unexpected))


def _wanted(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """Parameters and saved buffers, each with all names that it has."""
    groups: dict[int, tuple[list[str], Tensor]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), ([], parameter))[0].append(name)
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                full = f"{path}.{name}" if path else name
                groups.setdefault(id(buffer), ([], buffer))[0].append(full)
    return list(groups.values())


def _renamed(
    model: nn.Module, names: Iterable[str], known: dict[str, Tensor]
) -> tuple[dict[str, str], list[str]]:
    """The files' tensors by the model's names, and what cannot be brought to one."""
    if not hasattr(model, "base_model_prefix"):
        return {name: name for name in names}, []
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    prefix: Any = model.base_model_prefix
    stored: dict[str, str] = {}
    composed, twice = [], []
    for name in names:
        if name in known:
            here, pattern = name, None
        else:
            here, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if pattern is not None:
            composed.append(name)
        elif here in stored:
            twice.append(f"{stored[here]} and {name} are both {here}")
        else:
            stored[here] = name
    faults = [f"put together from several tensors by transformers: {_listed(composed)}"] if composed else []
    return stored, faults + twice


def _differences(names: list[str], tensor: Tensor, found: list[str], folder: WeightFolder) -> Iterator[str]:
    """What keeps the tensors ``found`` from being the weight ``names``."""
    for source in found:
        dtype, shape = folder.dtype(source), folder.shape(source)
        if shape != tuple(tensor.shape):
            yield f"{source} has shape {list(shape)}, the model's {names[0]} {list(tensor.shape)}"
        elif dtype != tensor.dtype and not {dtype, tensor.dtype} <= set(_FLOATS):
            yield f"{source} is {dtype}, the model's {names[0]} {tensor.dtype}"
        elif source != found[0] and not folder.are_equal(found[0], source):
            yield f"{found[0]} and {source} are one weight of the model, and differ"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
