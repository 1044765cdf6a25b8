"""See what each block of a model is given, at the cost of one block of each class.

The model runs once on fake tensors with its blocks replaced: of every class of blocks the first really runs,
for the others tensors of its output's shapes stand in. So eighty equal blocks cost as much as one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

from memtrain.planner.tracing.blocks import BlocksNotFoundError
from memtrain.planner.tracing.recorder import storage_key, tensors_in

Run = Callable[[], Tensor]
Replacement = Callable[[int, Callable[..., Any]], Callable[..., Any]]
_NUMBERING = {"layer_idx", "layer_id", "layer_number", "layer_index", "idx", "index", "forward"}
"""Attributes that number equal blocks, and the one replaced here. Another one that numbers blocks costs time
(each is a class of its own), not correctness."""
_BARE = vars(nn.Module()).keys() - {"training"}
"""What every module has; parameters, buffers and modules inside are looked at by name."""


@dataclass
class Given:
    """What one block is called with, and where its hidden state stands."""

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | str

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that decides what the block does: code, shapes, settings, and what it is given."""
        settings = [
            (path, key, _setting(value))
            for path, module in self.block.named_modules()
            for key, value in sorted(vars(module).items())
            if key not in _BARE and key.removeprefix("_") not in _NUMBERING
        ]
        named = (*self.block.named_parameters(), *self.block.named_buffers())
        tensors = [(name, _setting(tensor)) for name, tensor in named]
        call = tree_map(_setting, (self.args, self.kwargs))
        text = repr((type(self.block).__qualname__, repr(self.block), settings, tensors, call))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def hidden(self) -> Tensor:
        """The block's input: the first tensor it is given."""
        found: Tensor = self.args[self.place] if isinstance(self.place, int) else self.kwargs[self.place]
        return found

    def call(self, hidden: Tensor) -> Any:
        """Run the block on another hidden state."""
        if isinstance(self.place, int):
            args = (*self.args[: self.place], hidden, *self.args[self.place + 1 :])
            return self.block(*args, **self.kwargs)
        return self.block(*self.args, **{**self.kwargs, self.place: hidden})

    def shared(self) -> list[Tensor]:
        """All other tensors that it is given."""
        key = storage_key(self.hidden())
        return [tensor for tensor in tensors_in((self.args, self.kwargs)) if storage_key(tensor) != key]


def first_tensor(output: Any) -> Tensor:
    """A block's hidden state: its output, or the first of a tuple. Raises BlocksNotFoundError."""
    hidden = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(hidden, Tensor):
        raise BlocksNotFoundError(
            f"a block must return a tensor, or a tuple starting with one, not {type(output)}"
        )
    return hidden


def capture(blocks: Sequence[tuple[str, nn.Module]], run: Run) -> tuple[list[Given], Any]:
    """What each block is given, in order, and the last one's output.

    Raises:
        BlocksNotFoundError: blocks do not each run once, in order, on the output of the one before.
    """
    given: list[Given] = []
    outputs: dict[str, Any] = {}
    last: list[Any] = []

    def replacement(index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        name, block = blocks[index]

        def forward(*args: Any, **kwargs: Any) -> Any:
            if index != len(given):
                raise BlocksNotFoundError(
                    f"{name} does not run once, and after the blocks before it in the list"
                )
            entry = block_call(name, block, args, kwargs)
            if last and storage_key(first_tensor(last[-1])) != storage_key(entry.hidden()):
                raise BlocksNotFoundError(
                    f"the model changes the hidden state between {blocks[index - 1][0]} and {name}: name "
                    "blocks that include what stands between them"
                )
            given.append(entry)
            if entry.fingerprint not in outputs:
                outputs[entry.fingerprint] = original(*args, **kwargs)
            last[:] = [tree_map_only(Tensor, _same_shape, outputs[entry.fingerprint])]
            return last[0]

        return forward

    with blocks_replaced(blocks, replacement), torch.no_grad():
        run()
    if len(given) != len(blocks):
        raise BlocksNotFoundError(f"{blocks[len(given)][0]} did not run: the model skips it")
    return given, last[0]


def block_call(name: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    """A call of ``block``. Raises BlocksNotFoundError: it is given no tensor."""
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in places:
        if isinstance(value, Tensor):
            return Given(block, args, kwargs, place)
    raise BlocksNotFoundError(f"{name} is given no tensor")


def _setting(value: Any, depth: int = 2) -> Any:
    """What can be compared of an attribute or argument: of objects their class and their plain attributes."""
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return value
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), str(value.dtype), value.requires_grad
    if isinstance(value, nn.Module) or depth == 0:
        return type(value).__qualname__
    if isinstance(value, (list, tuple)):
        return [_setting(item, depth - 1) for item in value]
    if callable(value):
        return getattr(value, "__qualname__", repr(value))
    if not isinstance(value, Mapping):
        value = {"class": type(value).__qualname__, **getattr(value, "__dict__", {})}
    public = ((str(key), item) for key, item in value.items() if not str(key).startswith("_"))
    return sorted((key, repr(_setting(item, depth - 1))) for key, item in public)


def _same_shape(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


@contextmanager
def blocks_replaced(
    blocks: Sequence[tuple[str, nn.Module]],
    replacement: Callable[[int, Callable[..., Any]], Callable[..., Any]],
) -> Iterator[None]:
    """``replacement(index, forward)`` is each block's forward for a while."""
    before = [block.__dict__.get("forward") for _, block in blocks]
    for index, (_, block) in enumerate(blocks):
        block.__dict__["forward"] = replacement(index, block.forward)
    try:
        yield
    finally:
        for (_, block), forward in zip(blocks, before, strict=True):
            del block.__dict__["forward"]
            if forward is not None:
                block.__dict__["forward"] = forward
