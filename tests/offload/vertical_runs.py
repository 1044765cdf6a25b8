"""Micro-batches in vertical order, and the horizontal loop over a plain model that they are compared with."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from memtrain.offload.random_advance import Advance
from memtrain.offload.vertical import VerticalPass
from tests.offload.streamed import VOCABULARY, blocks_of

Loss = Callable[[nn.Module, Tensor], Tensor]


def hugging_face(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens).loss


def micro_batches(count: int, *, same_length: bool = False) -> list[Tensor]:
    """Of two rows, each longer than the one before it."""
    generator = torch.Generator().manual_seed(5)
    lengths = [11 if same_length else 7 + 4 * number for number in range(count)]
    return [torch.randint(0, VOCABULARY, (2, length), generator=generator) for length in lengths]


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def forward_and_backward(model: nn.Module, tokens: Tensor, count: int, loss_of: Loss) -> Tensor:
    loss = loss_of(model, tokens)
    (loss / count).backward()
    return loss.detach()


def horizontal(model: nn.Module, data: Sequence[Tensor], loss_of: Loss = hugging_face) -> list[Tensor]:
    """Losses and accumulated gradients of the loop that everybody writes."""
    return [forward_and_backward(model, tokens, len(data), loss_of) for tokens in data] + gradients(model)


def vertical(
    model: nn.Module,
    data: Sequence[Tensor],
    loss_of: Loss = hugging_face,
    blocks: Sequence[tuple[str, nn.Module]] | None = None,
    draws: Sequence[Advance] | None = None,
) -> list[Tensor]:
    """The same by ``VerticalPass``."""

    def one(tokens: Tensor) -> Callable[[], Tensor]:
        return lambda: forward_and_backward(model, tokens, len(data), loss_of)

    order = VerticalPass[Tensor](blocks or blocks_of(model), torch.device("cpu"))
    with no_thread_left():
        losses = order.run([one(tokens) for tokens in data], draws)
    return losses + gradients(model)


@contextmanager
def no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    try:
        yield
    finally:
        left = [thread for thread in threading.enumerate() if thread not in before]
        assert not [thread for thread in left if thread.name.startswith("micro-batch")]


@contextmanager
def noting(blocks: Sequence[tuple[str, nn.Module]], seen: list[tuple[str, Any]]) -> Iterator[None]:
    """Notes which thread passes which block, forward and backward."""

    def before(name: str) -> Callable[..., None]:
        return lambda *_: seen.append((f"forward {name}", threading.current_thread().name))

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            tensor = output if isinstance(output, Tensor) else output[0]
            who = threading.current_thread().name
            tensor.register_hook(lambda _: seen.append((f"backward {name}", who)))

        return hook

    handles = []
    for name, block in blocks:
        handles += [block.register_forward_pre_hook(before(name)), block.register_forward_hook(after(name))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
