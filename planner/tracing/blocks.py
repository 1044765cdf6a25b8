"""The repeated blocks of a model: which they are, and what each is given.

One run of the whole model without gradients shows what they are given, and which parameters are read before
them, or may be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from memtrain.planner.tracing.live_bytes import storage_id, tensors_in
from memtrain.planner.tracing.weights import InMemory, Weights


class BlocksNotFoundError(ValueError):
    """The model's repeated blocks cannot be found, or do not follow one another."""


def find_blocks(model: nn.Module, names: Sequence[str] | None = None) -> list[tuple[str, nn.Module]]:
    """The repeated blocks of ``model`` with their qualified names, in order.

    Args:
        model: any module.
        names: the blocks, or containers of blocks; None: the ``ModuleList`` or ``Sequential`` whose children
            are of one class and which has the most bytes of parameters.

    Raises:
        BlocksNotFoundError: a name does not exist, or nothing repeats.
    """
    modules = dict(model.named_modules())
    if names is not None:
        found: list[tuple[str, nn.Module]] = []
        for name in names:
            if name not in modules:
                raise BlocksNotFoundError(f"{type(model).__name__} has no module {name!r}")
            found += _children(name, modules[name]) or [(name, modules[name])]
        if not found:
            raise BlocksNotFoundError("names is empty: name at least one block")
        return found
    repeated = [_children(name, module) for name, module in modules.items()]
    repeated = [c for c in repeated if len(c) > 1 and len({type(block) for _, block in c}) == 1]
    best = max(repeated, key=lambda c: sum(_parameter_bytes(b) for _, b in c), default=None)
    if best is None or not any(True for _, block in best for _ in block.parameters()):
        raise BlocksNotFoundError(
            f"{type(model).__name__} holds no ModuleList or Sequential of at least two blocks of one class "
            "with parameters: name the blocks (block_names)"
        )
    return best


def _children(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return []
    return [(f"{name}.{key}" if name else key, child) for key, child in module.named_children()]


def _parameter_bytes(block: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in block.parameters())


class _FirstReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """For every weight or storage that an operator is given, the stage of the model at which that first
    happened.

    A stage is the index of the block that runs or ran last: -1 before the first block, and the number of
    blocks once the last one has returned.
    """

    def __init__(self, weights: Weights) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights = weights
        self.stage = -1
        self.first: dict[int, int] = {}
        self.last: dict[int, int] = {}
        """The same, the last time."""

    def note(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            self.first.setdefault(self._weights.key(tensor), self.stage)
            self.last[self._weights.key(tensor)] = self.stage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note(tensors_in((args, kwargs)))
        return func(*args, **(kwargs or {}))


@dataclass
class BlockCall:
    """What a block is given, its hidden state taken out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | str
    rest: tuple[Any, ...] | None = None
    """What follows the hidden state in a tuple that the block returns; None: it returns a tensor."""

    @classmethod
    def of(cls, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[BlockCall, Tensor]:
        """The call and the hidden state, its first tensor. Raises BlocksNotFoundError where there is none."""
        given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        for place, value in given:
            if isinstance(value, Tensor):
                call = cls(tuple(args), dict(kwargs), place)
                call._put(call, None)
                return call, value
        raise BlocksNotFoundError(f"{name} is given no tensor")

    def _put(self, target: BlockCall, hidden: Tensor | None) -> None:
        if isinstance(self.place, int):
            target.args = (*self.args[: self.place], hidden, *self.args[self.place + 1 :])
        else:
            target.kwargs = {**self.kwargs, self.place: hidden}

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden state that ``block`` makes of ``hidden``."""
        call = self.given(hidden)
        return hidden_of(block(*call.args, **call.kwargs))

    def given(self, hidden: Tensor) -> BlockCall:
        """The call with a hidden state in its place."""
        call = BlockCall(self.args, self.kwargs, self.place)
        self._put(call, hidden)
        return call

    def shared(self) -> list[Tensor]:
        """Tensors beside the hidden state, which other blocks may be given, too."""
        return tensors_in((self.args, self.kwargs))


def hidden_of(output: Any) -> Tensor:
    """The hidden state among what a block returns. Raises BlocksNotFoundError where there is none."""
    hidden = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(hidden, Tensor):
        raise BlocksNotFoundError(
            f"a block must return a tensor, or a tuple that starts with one, not {type(output)}"
        )
    return hidden


@dataclass
class FirstPass:
    """Of one model: what its blocks are given, and which parameters may be read before them."""

    calls: list[BlockCall] = field(default_factory=list)
    first_input: Tensor | None = None
    last_output: Tensor | None = None
    early: set[int] = field(default_factory=set)
    late: set[int] = field(default_factory=set)
    """Parameters that are read, or whose module runs, after the blocks."""
    parameters: list[nn.Parameter] = field(default_factory=list)
    """Trainable."""


def first_pass(
    model: nn.Module,
    blocks: list[tuple[str, nn.Module]],
    run: Callable[[], Tensor],
    weights: Weights | None = None,
) -> FirstPass:
    """Run the whole model once without gradients and note what each block is given, and what is early.

    A parameter is early when it is read, or its module runs, before the stage at which its unit is sure to
    be up to date: its first block's, or the end of the last block. A weight need not be read by its module
    (a slice of a table, a head used by the loss), so the operators' arguments are watched; modules are noted
    too, for kernels that no operator shows. What is never read outside the blocks may be read first for
    another batch, and counts as early.
    """
    weights = weights or InMemory()
    reads = _FirstReads(weights)
    trace = FirstPass(parameters=[p for p in model.parameters() if p.requires_grad])
    order = {id(block): index for index, (_, block) in enumerate(blocks)}

    def before_block(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index = order[id(block)]
        name = blocks[index][0]
        if index != len(trace.calls):
            raise BlocksNotFoundError(f"{name} does not run once, and after the blocks before it in the list")
        call, hidden = BlockCall.of(name, args, kwargs)
        if trace.last_output is not None and storage_id(hidden) != storage_id(trace.last_output):
            raise BlocksNotFoundError(
                f"the model changes the hidden state between {blocks[index - 1][0]} and {name}: name blocks "
                "that include what stands between them"
            )
        if index == 0:
            trace.first_input = hidden.detach()
        reads.stage = index
        trace.calls.append(call)

    def after_block(block: nn.Module, args: Any, output: Any) -> None:
        trace.last_output = hidden_of(output).detach()
        trace.calls[-1].rest = tuple(output[1:]) if isinstance(output, (tuple, list)) else None
        if len(trace.calls) == len(blocks):
            reads.stage = len(blocks)

    def before_other(module: nn.Module, args: Any) -> None:
        reads.note(list(module.parameters(recurse=False)))

    with ExitStack() as stack:
        for _, block in blocks:
            stack.enter_context(block.register_forward_pre_hook(before_block, with_kwargs=True))
            stack.enter_context(block.register_forward_hook(after_block))
        for module in model.modules():
            stack.enter_context(module.register_forward_pre_hook(before_other))
        with torch.no_grad(), reads:
            run()
    if len(trace.calls) != len(blocks):
        raise BlocksNotFoundError(f"{blocks[len(trace.calls)][0]} did not run: the model skips it")
    trace.last_output = None
    inside: dict[int, int] = {}
    for index, (_, block) in enumerate(blocks):
        for parameter in block.parameters():
            inside.setdefault(id(parameter), index)
    for parameter in model.parameters():
        ready = inside.get(id(parameter), len(blocks))
        unread = ready if id(parameter) in inside else -1
        if reads.first.get(weights.key(parameter), unread) < ready:
            trace.early.add(id(parameter))
        if reads.last.get(weights.key(parameter)) == len(blocks):
            trace.late.add(id(parameter))
    return trace
