"""Runs one block's forward on its arguments, or on other ones like them, to see what it saves for backward.

Nothing is kept of a run: what is saved is shown to the caller, and no graph holds it. Arguments, gradients
and random numbers stay as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from memtrain.offload.compare import Mismatch
from memtrain.offload.random_rows import ShapesDrawn
from memtrain.offload.refusals import thrown_away
from memtrain.offload.results import ATTENTION, AroundCalls, QuietMode
from memtrain.offload.surroundings import Surroundings
from memtrain.offload.token_rows import token_count
from memtrain.offload.unmoved import shared_storages

Cuts = dict[int, tuple[int, ...]]
"""Dimensions to cut, by number among the leaves of arguments and keyword arguments."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """An attention kernel that ran."""

    operator: Any
    args: Any
    kwargs: Any
    outputs: list[torch.Tensor]


class BlockRuns:
    """One block and its arguments, and what its forward on them saved.

    Args:
        function: the block's forward.
        args, kwargs: what it is called with, at least one tensor of two dimensions.
        is_fixed: whether a tensor is a parameter or buffer: these are passed over.

    Attributes:
        tokens: dimension -2 of the first tensor argument.
        saved: tensors in the order in which they are saved; they are held.
        kernels: attention kernels, in order.
        drawn: shapes of what dropouts draw, in order.
        is_random: whether any random numbers are drawn.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        is_fixed: Callable[[torch.Tensor], bool],
    ) -> None:
        self._function = function
        self._is_fixed = is_fixed
        self._leaves, self._spec = pytree.tree_flatten((args, kwargs))
        self._tensors = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, torch.Tensor)]
        self._input: torch.Tensor = self._leaves[self._tensors[0]]
        self._given = shared_storages(args, kwargs)
        self._surroundings = Surroundings(self._input.device)
        self.tokens = token_count(args, kwargs)
        self.saved: list[torch.Tensor] = []
        self.kernels: list[Kernel] = []
        shapes = ShapesDrawn()
        watch = AroundCalls(_KernelWatch(self.kernels), ATTENTION.call)
        self.is_random = self._run(
            self._leaves, lambda _, tensor: self.saved.append(tensor), watch, shapes.watching()
        )
        self.drawn = shapes.shapes

    def is_given(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in an argument other than the input."""
        return tensor.untyped_storage().data_ptr() in self._given

    def on_prefix(
        self,
        cuts: Cuts,
        prefix: int,
        visit: Callable[[int, torch.Tensor], None],
        *around: AbstractContextManager[Any],
    ) -> None:
        """Run on the first ``prefix`` tokens; ``visit`` is shown the number and value of all that is saved.

        Raises:
            Mismatch: another number of tensors is saved.
        """
        leaves = list(self._leaves)
        for index, dims in cuts.items():
            for dim in dims:
                leaves[index] = leaves[index].narrow(dim, 0, prefix)
        first = self._tensors[0]
        leaves[first] = leaves[first].clone()  # dense and in the same order: as it comes back in backward
        self._run(leaves, visit, *around)

    def with_other_tokens(self, prefix: int, visit: Callable[[int, torch.Tensor], None]) -> None:
        """Run on all tokens, those from ``prefix`` on replaced by others, of four times their size.

        Raises:
            Mismatch: another number of tensors is saved.
        """
        behind = self._input.detach()[..., prefix:, :]
        generator = torch.Generator(behind.device).manual_seed(prefix)
        size = float(behind.float().square().mean().sqrt()) or 1.0
        noise = torch.randn(behind.shape, generator=generator, device=behind.device).mul_(4.0 * size)
        leaves = list(self._leaves)
        other = self._input.detach().clone()
        other[..., prefix:, :] = noise
        leaves[self._tensors[0]] = other
        self._run(leaves, visit)

    def ways_to_cut(self) -> Iterator[Cuts]:
        """Ways to cut the arguments: at first every dimension with as many entries as there are tokens."""
        choices: list[list[tuple[int, ...]]] = []
        for index in self._tensors:
            tensor = self._leaves[index]
            if index == self._tensors[0]:
                choices.append([(tensor.dim() - 2,)])
                continue
            dims = [dim for dim, size in enumerate(tensor.shape) if size == self.tokens]
            sizes = range(len(dims), -1, -1)
            choices.append([chosen for size in sizes for chosen in itertools.combinations(dims, size)])
        for way in itertools.product(*choices):
            yield dict(zip(self._tensors, way, strict=True))

    def _run(
        self,
        leaves: list[Any],
        visit: Callable[[int, torch.Tensor], None],
        *around: AbstractContextManager[Any],
    ) -> bool:
        """One forward inside ``around``. Whether it drew random numbers."""
        count = 0

        def pack(tensor: torch.Tensor) -> None:
            nonlocal count
            if not self._is_fixed(tensor):
                visit(count, tensor.detach())
                count += 1

        given = list(leaves)
        for index in self._tensors:
            given[index] = given[index].detach().requires_grad_(self._leaves[index].requires_grad)
        args, kwargs = pytree.tree_unflatten(given, self._spec)
        with ExitStack() as stack:
            stack.enter_context(self._surroundings.again())
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, thrown_away))
            for context in around:
                stack.enter_context(context)
            self._function(*args, **kwargs)
            is_random = self._surroundings.random_numbers_drawn
        if count != len(self.saved):
            raise Mismatch(f"{count} tensors are saved for backward instead of {len(self.saved)}")
        return is_random


class _KernelWatch(QuietMode):  # type: ignore[no-untyped-call]
    """Notes the attention kernels that run.

    Its tensors are without history: with it they would hold the graph, whose hooks hold them, a cycle that
    runs through C++ and that no collector sees.
    """

    def __init__(self, kernels: list[Kernel]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kernels = kernels

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if ATTENTION.operator(func):
            given = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}))
            self._kernels.append(
                Kernel(operator=func, args=given[0], kwargs=given[1], outputs=tensors_of(output))
            )
        return output


def tensors_of(value: Any) -> list[torch.Tensor]:
    """The tensors of a nested value, without their history."""
    return [leaf.detach() for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
