"""The optimizer's state in a checkpoint's files, as an optimizer sees it: masters are whole there."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memtrain.offload.atomic import CheckpointError
from memtrain.offload.lower_halves import LOWER_KEY, SECOND_KEY, slices
from memtrain.offload.shards import MASTER_KEY
from memtrain.offload.tensorfile import Entry, TensorFile
from memtrain.optim.storage import lower_half

WEIGHT_FILE = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_STATE_FILE = re.compile(r"optimizer-\d{5}-of-\d{5}\.safetensors")


class StateFiles:
    """The state's tensors by parameter and key. A context manager.

    Args:
        files: names of all files of ``folder``.
        saved: ``optimizer.json``; ``upper_halves`` are the weights that belong to lower halves of masters.
        cut: names a file's tensors as the model has them, where layers are in tiles.

    Raises:
        CheckpointError: a lower half without its weight.
    """

    def __init__(
        self, folder: Path, files: Collection[str], saved: dict[str, Any], cut: Callable[[TensorFile], None]
    ) -> None:
        self._stack = ExitStack()
        self._stored: dict[tuple[str, str], TensorFile] = {}
        self._upper: dict[str, tuple[TensorFile, str]] = {}
        """By parameter, where the weight is."""
        try:
            self._open(folder, sorted(files), saved.get("upper_halves", {}), cut)
        except BaseException:
            self._stack.close()
            raise
        self.homes = {
            (name, MASTER_KEY if key == LOWER_KEY else key): file
            for (name, key), file in self._stored.items()
        }

    def _open(
        self, folder: Path, files: list[str], upper: dict[str, str], cut: Callable[[TensorFile], None]
    ) -> None:
        for file in self._opened(folder, [name for name in files if _STATE_FILE.fullmatch(name)]):
            cut(file)
            for entry in file.entries:
                parameter, _, key = entry.rpartition("/")
                self._stored[parameter, key] = file
        if upper:
            weights = self._opened(folder, [name for name in files if WEIGHT_FILE.fullmatch(name)])
            for file in weights:
                cut(file)
            homes = {entry: file for file in weights for entry in file.entries}
            self._upper = {name: (homes[entry], entry) for name, entry in upper.items() if entry in homes}
        for name, key in self._stored:
            if key == LOWER_KEY and not self._belongs(name):
                raise CheckpointError(
                    f"{folder} holds the lower half of the master of {name}, and no bf16 weight of its shape "
                    f"that would be the upper one: take another checkpoint"
                )

    def _opened(self, folder: Path, names: list[str]) -> list[TensorFile]:
        return [self._stack.enter_context(TensorFile(folder / name)) for name in names]

    def _belongs(self, name: str) -> bool:
        if name not in self._upper or (name, SECOND_KEY) not in self._stored:
            return False
        file, entry = self._upper[name]
        lower = self._stored[name, LOWER_KEY].entries[f"{name}/{LOWER_KEY}"]
        return (file.entries[entry].dtype, file.entries[entry].shape) == (torch.bfloat16, lower.shape)

    def entry(self, name: str, key: str) -> Entry:
        """What ``read`` gives."""
        if self._is_joined(name, key):
            lower = self._stored[name, LOWER_KEY].entries[f"{name}/{LOWER_KEY}"]
            return Entry(name=f"{name}/{key}", dtype=torch.float32, shape=lower.shape)
        return self.homes[name, key].entries[f"{name}/{key}"]

    def read(self, name: str, key: str) -> Tensor:
        """A tensor, in memory."""
        entry = self.entry(name, key)
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        self.read_into(name, key, tensor)
        return tensor

    @torch.no_grad()
    def read_into(self, name: str, key: str, target: Tensor) -> None:
        """Copy a tensor into one of its dtype and shape."""
        if self._is_joined(name, key):
            self._join_into(name, target)
            return
        self.homes[name, key].read_into(f"{name}/{key}", target)
        if key == SECOND_KEY and (name, LOWER_KEY) in self._stored:
            target.abs_()  # signs are the masters'

    def _is_joined(self, name: str, key: str) -> bool:
        return key == MASTER_KEY and (name, LOWER_KEY) in self._stored

    def _join_into(self, name: str, target: Tensor) -> None:
        if not target.is_contiguous():
            target.copy_(self.read(name, MASTER_KEY))
            return
        flat, (weights, entry) = target.detach().view(-1), self._upper[name]
        for part in slices(flat.numel()):
            lower, second = (
                self._stored[name, key].read_elements(f"{name}/{key}", part)
                for key in (LOWER_KEY, SECOND_KEY)
            )
            flat[part].copy_(lower_half.unpack(weights.read_elements(entry, part), lower, second))

    def __enter__(self) -> StateFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
