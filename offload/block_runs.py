"""Runs one block's forward on its arguments, or on other ones like them, to see what it saves for backward.

Nothing is kept of a run: what is saved is shown to the caller, and no graph holds it. Arguments, gradients
and random numbers stay as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch.utils import _pytree as pytree

from memtrain.offload.compare import Mismatch
from memtrain.offload.random_rows import ShapesDrawn
from memtrain.offload.refusals import thrown_away
from memtrain.offload.surroundings import Surroundings
from memtrain.offload.token_rows import token_count
from memtrain.offload.unmoved import shared_storages

Cuts = dict[int, tuple[int, ...]]
"""Dimensions to cut, by number among the leaves of arguments and keyword arguments."""
Visit = Callable[[int, torch.Tensor], None]
"""Is shown the number and the value of each tensor as it is saved."""


class BlockRuns:
    """One block and its arguments; its forward runs on them at once.

    Args:
        function: the block's forward.
        args, kwargs: what it is called with, at least one tensor of two dimensions.
        is_fixed: whether a tensor is a parameter or buffer: these are passed over.
        watch: is entered around the first run.

    Attributes:
        tokens: dimension -2 of the first tensor argument.
        saved_dtypes: of the tensors that are saved, in that order.
        drawn: shapes of what dropouts draw, in order.
        is_random: whether any random numbers are drawn.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        is_fixed: Callable[[torch.Tensor], bool],
        watch: AbstractContextManager[Any],
    ) -> None:
        self._function = function
        self._is_fixed = is_fixed
        self._leaves, self._spec = pytree.tree_flatten((args, kwargs))
        self._tensors = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, torch.Tensor)]
        self._input: torch.Tensor = self._leaves[self._tensors[0]]
        self._given = shared_storages(args, kwargs)
        self._surroundings = Surroundings(self._input.device)
        self._count: int | None = None
        self.tokens = token_count(args, kwargs)
        dtypes: list[torch.dtype] = []
        shapes = ShapesDrawn()
        self.is_random = self._run(
            self._leaves, lambda _, tensor: dtypes.append(tensor.dtype), watch, shapes.watching()
        )
        self._count = len(dtypes)
        self.saved_dtypes = tuple(dtypes)
        self.drawn = shapes.shapes

    def is_given(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in an argument other than the input."""
        return tensor.untyped_storage().data_ptr() in self._given

    def on_all(self, visit: Visit) -> None:
        """Run as at first.

        Raises:
            Mismatch: another number of tensors is saved.
        """
        self._run(self._leaves, visit)

    def on_prefix(self, cuts: Cuts, prefix: int, visit: Visit, *around: AbstractContextManager[Any]) -> None:
        """Run on the first ``prefix`` tokens.

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

    def with_other_tokens(self, prefix: int, visit: Visit) -> None:
        """Run on all tokens, those from ``prefix`` on replaced by others, of four times their size.

        Raises:
            Mismatch: another number of tensors is saved.
        """
        other = self._input.detach().clone()
        behind = other[..., prefix:, :]
        norm = torch.linalg.vector_norm(behind, dtype=torch.promote_types(behind.dtype, torch.float32))
        size = float(norm) / max(1, behind.numel()) ** 0.5 or 1.0
        behind.normal_(generator=torch.Generator(behind.device).manual_seed(prefix)).mul_(4.0 * size)
        leaves = list(self._leaves)
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

    def _run(self, leaves: list[Any], visit: Visit, *around: AbstractContextManager[Any]) -> bool:
        """One forward inside ``around``. Whether it drew random numbers."""
        count = 0

        def pack(tensor: torch.Tensor) -> None:
            nonlocal count
            if self._is_fixed(tensor):
                return
            if count == self._count:
                raise Mismatch(f"more than {count} tensors are saved for backward")
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
        if self._count not in (None, count):
            raise Mismatch(f"{count} tensors are saved for backward instead of {self._count}")
        return is_random
