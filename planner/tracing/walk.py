"""One part of a model by itself, forward and backward, under a recorder.

A part is a block, what stands before the first one, or what stands behind the last one up to the loss. The
run that reaches for the part before or behind has its blocks replaced and costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from memtrain.planner.estimate import LifetimeKind
from memtrain.planner.tracing.capture import Given, Run, block_call, blocks_replaced, first_tensor
from memtrain.planner.tracing.recorder import Recorder, Storage, storage_key, tensors_in


@dataclass
class Walk:
    """One part's recording."""

    recorder: Recorder
    forward_operations: int = 0
    input_bytes: int = 0
    output_bytes: int = 0
    output_serial: int = -1
    norm_outputs: set[int] = field(default_factory=set)
    classes: dict[str, str] = field(default_factory=dict)
    """Of the part's modules, in lower case, by path."""

    def enter(self, hidden: Tensor) -> None:
        """Note the part's input."""
        self.input_bytes = self.recorder.adopt(hidden, LifetimeKind.INPUT).size_bytes

    def leave(self, output: Tensor) -> None:
        """Note the part's output."""
        storage = self.recorder.adopt(output, LifetimeKind.OUTPUT)
        self.output_serial, self.output_bytes = storage.serial, storage.size_bytes
        if storage.kind is not LifetimeKind.INPUT:
            storage.kind = LifetimeKind.OUTPUT

    @property
    def input_is_saved(self) -> bool:
        """Whether autograd keeps the input, which the part before may keep as well."""
        return any(self.recorder.storages[s].kind is LifetimeKind.INPUT for s in self.recorder.saved)

    @property
    def output_is_saved(self) -> bool:
        """Whether autograd keeps the output, which the next part may keep as well."""
        return self.output_serial in self.recorder.saved


@dataclass
class Prologue:
    """What stands before the blocks."""

    walk: Walk
    tied: set[int]
    """Keys of trained parameters that the epilogue reads as well."""
    given: list[list[Storage | None]]
    """For every block, what the prologue made of ``Given.shared``, in that order; None: it did not."""
    needs_gradient: bool
    """Of the first block's input."""


def walk_block(given: Given, excluded: set[int], needs_gradient: bool) -> Walk:
    """One block's forward and backward, as in training: its input is no leaf."""
    walk = Walk(Recorder(excluded))
    leaf = given.hidden().detach().clone().requires_grad_(needs_gradient)
    entered = [leaf.clone()]
    walk.enter(entered[0])
    with _taking_gradients(walk.recorder, given.block, leaf), _following(walk, given.block):
        with walk.recorder, walk.recorder.saving():
            output = [first_tensor(given.call(entered.pop()))]
        _backward(walk, _turn(walk, output))
    return walk


def walk_prologue(
    model: nn.Module, blocks: Sequence[tuple[str, nn.Module]], run: Run, last: Any, excluded: set[int]
) -> Prologue:
    """From the start to the first block, and back.

    Behind it the run goes on to the loss, ``last`` standing in for what blocks return, so that it is seen
    which of the prologue's tensors are given to blocks, and how long the model refers to them.
    """
    walk, behind = Walk(Recorder(excluded)), Recorder(excluded)
    starts: list[Tensor] = []
    given: list[list[Storage | None]] = []

    def replacement(index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            call = block_call(blocks[index][0], blocks[index][1], args, kwargs)
            if index == 0:
                walk.recorder.active = False
                starts.extend(_turn(walk, [call.hidden()]))
            given.append([walk.recorder.find(tensor) for tensor in call.shared()])
            if index == len(blocks) - 1:
                behind.active = True
                walk.recorder.behind = behind
            return last

        return forward

    behind.active = False
    with _taking_gradients(walk.recorder, model, None), _following(walk, model):
        with behind, walk.recorder, walk.recorder.saving(), blocks_replaced(blocks, replacement):
            run()
        walk.recorder.active, walk.recorder.behind = True, None
        both = walk.recorder.read_excluded & behind.read_excluded
        tied = {storage_key(p): p for p in model.parameters() if p.requires_grad and storage_key(p) in both}
        waiting = [_start(walk, parameter, LifetimeKind.TIED_GRADIENT) for parameter in tied.values()]
        _backward(walk, [*starts, *waiting])
    return Prologue(walk=walk, tied=set(tied), given=given, needs_gradient=bool(starts))


def walk_epilogue(
    model: nn.Module,
    blocks: Sequence[tuple[str, nn.Module]],
    run: Run,
    last: Any,
    excluded: set[int],
    needs_gradient: bool,
    tied: Set[int],
) -> Walk:
    """From ``last``, the last block's output as ``capture`` returned it, to the loss, and back.

    Gradients of parameters in ``tied`` are marked as such.
    """
    walk = Walk(Recorder(excluded))
    leaf = first_tensor(last).detach().clone().requires_grad_(needs_gradient)
    entered = [leaf.clone()]
    walk.enter(entered[0])

    def replacement(index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if index < len(blocks) - 1:
                return last
            walk.recorder.active = True
            begun = entered.pop()
            return begun if isinstance(last, Tensor) else (begun, *last[1:])

        return forward

    walk.recorder.active = False
    with _taking_gradients(walk.recorder, model, leaf, tied), _following(walk, model):
        with walk.recorder, walk.recorder.saving(), blocks_replaced(blocks, replacement):
            loss = [run()]
        _backward(walk, _turn(walk, loss))
    return walk


def _turn(walk: Walk, held: list[Tensor]) -> list[Tensor]:
    """End the forward with what stands in ``held``, which lets go of it: from where to go back, if at all."""
    output = held.pop()
    walk.forward_operations = len(walk.recorder.operations)
    walk.leave(output)
    return [_start(walk, output, LifetimeKind.OUTPUT_GRADIENT)] if output.requires_grad else []


def _start(walk: Walk, tensor: Tensor, kind: LifetimeKind) -> Tensor:
    """A scalar whose backward hands ``tensor`` a gradient.

    The gradient is born inside backward, so that it dies as it does between two parts: with its use.
    """
    start: Tensor = _Start.apply(tensor, walk.recorder, kind)  # type: ignore[no-untyped-call]
    return start


def _backward(walk: Walk, starts: list[Tensor]) -> None:
    walk.recorder.module = ""
    if starts:
        nothing = [torch.zeros_like(start) for start in starts]
        with walk.recorder:
            torch.autograd.backward(starts, nothing)


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, recorder: Recorder, kind: LifetimeKind) -> Tensor:
        ctx.recorder, ctx.kind = recorder, kind
        ctx.layout, ctx.dtype = (tensor.shape, tensor.stride()), tensor.dtype
        return tensor.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        gradient = torch.empty_strided(*ctx.layout, dtype=ctx.dtype)
        ctx.recorder.mark(gradient, ctx.kind)
        return gradient, None, None


@contextmanager
def _taking_gradients(
    recorder: Recorder, module: nn.Module, leaf: Tensor | None, tied: Set[int] = frozenset()
) -> Iterator[None]:
    """Gradients of parameters are taken away as they come; that of the input stays."""

    def take(parameter: Tensor) -> None:
        assert parameter.grad is not None
        is_tied = storage_key(parameter) in tied
        recorder.mark(parameter.grad, LifetimeKind.TIED_GRADIENT if is_tied else LifetimeKind.GRADIENT)
        parameter.grad = None

    def keep(tensor: Tensor) -> None:
        assert tensor.grad is not None
        recorder.mark(tensor.grad, LifetimeKind.INPUT_GRADIENT)

    hooks: list[tuple[Tensor, Callable[[Tensor], None]]] = [(p, take) for p in module.parameters()]
    hooks += [] if leaf is None else [(leaf, keep)]
    handles = [
        tensor.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        for tensor, hook in hooks
        if tensor.requires_grad
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _following(walk: Walk, root: nn.Module) -> Iterator[None]:
    """Tell the recorder which module runs, and note what norms return."""
    recorder, stack, handles = walk.recorder, [""], []

    def entering(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            stack.append(path)
            recorder.module = path

        return hook

    def leaving(is_norm: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            stack.pop()
            recorder.module = stack[-1]
            if is_norm:
                found = (recorder.find(tensor) for tensor in tensors_in(output))
                walk.norm_outputs.update(storage.serial for storage in found if storage is not None)

        return hook

    for path, module in root.named_modules():
        if path:
            walk.classes[path] = type(module).__name__.lower()
            handles.append(module.register_forward_pre_hook(entering(path)))
            handles.append(module.register_forward_hook(leaving("norm" in walk.classes[path])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
