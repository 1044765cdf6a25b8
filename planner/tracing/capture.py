"""See what each block of a model is given, at the cost of one block of each class.

The model runs once on fake tensors with its blocks replaced: of every class of blocks the first really runs,
for the others tensors of its output's shapes stand in. So eighty equal blocks cost as much as one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

from memtrain.planner.trace import BlocksNotFoundError
from memtrain.planner.tracing.recorder import storage_key, tensors_in

Run = Callable[[], Tensor]
Replacement = Callable[[int, Callable[..., Any]], Callable[..., Any]]
_NUMBERING = {"layer_idx", "layer_id", "layer_number", "layer_index", "idx", "index"}
"""Attributes that number equal blocks. An unknown one costs time (a class of its own), not correctness."""


@dataclass
class Given:
    """What one block is called with, and where its hidden state stands."""

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | str
    fingerprint: str

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
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, value in places:
        if isinstance(value, Tensor):
            return Given(block, args, kwargs, place, _fingerprint(block, args, kwargs))
    raise BlocksNotFoundError(f"{name} is given no tensor")


def _fingerprint(block: nn.Module, args: Any, kwargs: Any) -> str:
    """Of all that decides what a block does: code, shapes, settings, and the shapes it is given."""
    settings = [
        (path, key, value)
        for path, module in block.named_modules()
        for key, value in sorted(vars(module).items())
        if not key.startswith("_") and key not in _NUMBERING and _plain(value)
    ]
    tensors = [(n, _layout(t)) for n, t in (*block.named_parameters(), *block.named_buffers())]
    call = tree_map(lambda leaf: _layout(leaf) if isinstance(leaf, Tensor) else _scalar(leaf), (args, kwargs))
    text = repr((type(block).__qualname__, repr(block), settings, tensors, call))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), str(tensor.dtype), tensor.requires_grad


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _scalar(value: Any) -> Any:
    return value if _plain(value) else type(value).__qualname__


def _same_shape(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


@contextmanager
def blocks_replaced(
    blocks: Sequence[tuple[str, nn.Module]],
    replacement: Callable[[int, Callable[..., Any]], Callable[..., Any]],
) -> Iterator[None]:
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
