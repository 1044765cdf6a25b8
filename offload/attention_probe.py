"""Finds out whether a block's attention kernels can run on the first tokens alone, and how exactly.

Each kernel is looked at as it runs: it runs again on the first tokens of what it was given, and the results
are compared at once, so that nothing is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils import _pytree as pytree

from memtrain.offload.compare import Mismatch, token_axis
from memtrain.offload.refusals import cannot_be_cut
from memtrain.offload.results import ATTENTION, AroundCalls, QuietMode, dropout, on_first_tokens
from memtrain.offload.token_kinds import rounding
from memtrain.offload.token_rows import RowAxis


class AttentionProbe:
    """The attention kernels of one forward.

    Args:
        name: of the block, for errors.
        tokens: of a row of the batch.
        prefixes: numbers of tokens for which the kernels are to be computed again, each below ``tokens``.

    Attributes:
        axes: of each kernel that ran, where the tokens lie in its output tensors; None where one has none, or
            where there was nothing to find out.
        difference: largest one between the rows of a prefix and of the whole (``TokenProbe.difference``).
        row_bytes: of the last row of a prefix, of all outputs of real numbers that have tokens.
        whole_bytes: of the storages of outputs that have none, such as a kernel's random state.
    """

    def __init__(self, name: str, tokens: int, prefixes: Sequence[int]) -> None:
        self._name = name
        self._tokens = tokens
        self._prefixes = sorted(set(prefixes), reverse=True)
        self.axes: list[tuple[RowAxis | None, ...]] = []
        self.difference = 0.0
        self.row_bytes = 0
        self.whole_bytes = 0

    def watching(self) -> AbstractContextManager[Any]:
        """Look at the kernels that run inside."""
        return AroundCalls(_Watch(self), ATTENTION.call)

    def look_at(self, func: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Compare the kernel on each prefix with ``output``, which it gave for all tokens.

        Raises:
            TokenRangeError: it cannot be cut, or gives other values.
        """
        outputs = _tensors_of(output)
        axes: tuple[RowAxis | None, ...] = (None,) * len(outputs)
        if dropout(func, args, kwargs) == 0.0:  # the others are never stored
            for prefix in self._prefixes:
                self._check_that_it_can_be_cut(func, args)
                axes = tuple(self._compare(prefix, func, args, kwargs, outputs))
        self.axes.append(axes)
        for whole, axis in zip(outputs, axes, strict=True):
            if axis is None:
                self.whole_bytes += whole.untyped_storage().nbytes()
            elif whole.is_floating_point():
                self.row_bytes += whole.nbytes // self._tokens

    def _compare(
        self, prefix: int, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]
    ) -> list[RowAxis | None]:
        args, kwargs = on_first_tokens(func, args, kwargs, self._tokens, prefix)
        tolerance = rounding(tensor.dtype for tensor in outputs)
        axes = []
        for whole, part in zip(outputs, _tensors_of(func(*args, **kwargs)), strict=True):
            try:
                axis, apart = token_axis(whole, part, self._tokens, prefix)
            except Mismatch as error:
                raise cannot_be_cut(self._name, f"has attention that cannot be cut: {error}") from None
            if axis is not None and apart > tolerance:
                raise cannot_be_cut(
                    self._name,
                    f"is not causal: attention kernel {len(self.axes)} gives other values for the first "
                    f"{prefix} tokens alone, by {apart:.1e} of the largest",
                )
            if axis is not None:  # otherwise all of it is stored
                self.difference = max(self.difference, apart)
            axes.append(axis)
        return axes

    def _check_that_it_can_be_cut(self, func: Any, args: Any) -> None:
        query, key = (args[place].shape[-2] for place in range(2))
        if not func._opname.startswith("_scaled_dot_product") or {query, key} != {self._tokens}:
            raise cannot_be_cut(
                self._name,
                f"runs attention kernel {func._opname} on {query} queries and {key} keys, which cannot be "
                f"cut at a token of {self._tokens}",
            )


class _Watch(QuietMode):  # type: ignore[no-untyped-call]
    def __init__(self, probe: AttentionProbe) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._probe = probe

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if ATTENTION.operator(func):
            self._probe.look_at(func, args, kwargs or {}, output)
        return output


def _tensors_of(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
