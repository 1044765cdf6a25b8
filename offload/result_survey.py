"""Which results of a block's matrix products and attention kernels are worth storing.

The block runs once, nothing is kept, and every operator is looked at. Not worth storing are results that the
second forward never asks for, because it ends with the last tensor that the block saves (a block's last
projection); and not safe those that are changed in place afterwards, for a stored result is handed out by
reference. Version counters do not tell: ``linear`` returns an unsafe view, which has a counter of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from memtrain.offload.refusals import thrown_away
from memtrain.offload.results import AroundCalls, Chosen, QuietMode, dropout
from memtrain.offload.surroundings import Surroundings


def wanted_results(
    chosen: Chosen,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    is_fixed: Callable[[torch.Tensor], bool],
) -> frozenset[int]:
    """Numbers of the results that a second forward of ``function`` needs and may be given again.

    Args:
        chosen: which operators' results are counted, in the order in which they run.
        function: the block's forward.
        args, kwargs: what it is called with; left as they are, and so are the random numbers.
        is_fixed: whether a tensor is a parameter or buffer: saving it needs no second forward.
    """
    survey = _Survey(chosen)
    needed = 0

    def pack(tensor: torch.Tensor) -> None:
        nonlocal needed
        if not is_fixed(tensor):
            needed = survey.count

    leaves, spec = pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    given = [
        leaf.detach().requires_grad_(leaf.requires_grad) if isinstance(leaf, torch.Tensor) else leaf
        for leaf in leaves
    ]
    call_args, call_kwargs = pytree.tree_unflatten(given, spec)
    with (
        Surroundings(device).again(),
        torch.autograd.graph.saved_tensors_hooks(pack, thrown_away),
        survey,
        AroundCalls(survey.counting, chosen.call),
    ):
        function(*call_args, **call_kwargs)
    return frozenset(range(needed)) - survey.unsafe


class _Survey(QuietMode):  # type: ignore[no-untyped-call]
    def __init__(self, chosen: Chosen) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._chosen = chosen
        self._storages: dict[int, tuple[int, StorageWeakRef]] = {}
        """Number of the result in each storage; the weak reference keeps the key from being given again."""
        self.counting = _Flag()
        """Up inside the calls in which results are recorded, too: numbers must be the same."""
        self.count = 0
        self.unsafe: set[int] = set()
        """Changed in place, or random."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _written(func, args, kwargs):
            found = self._storages.get(tensor.untyped_storage()._cdata)
            if found is not None:
                self.unsafe.add(found[0])
        output = func(*args, **kwargs)
        if self.counting.is_up and self._chosen.operator(func):
            if dropout(func, args, kwargs) != 0.0:
                self.unsafe.add(self.count)
            for leaf in pytree.tree_leaves(output):
                if isinstance(leaf, torch.Tensor):
                    storage = leaf.untyped_storage()
                    reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                    self._storages[storage._cdata] = self.count, reference
            self.count += 1
        return output


class _Flag:
    """Up while it is entered."""

    is_up = False

    def __enter__(self) -> None:
        self.is_up = True

    def __exit__(self, *_: object) -> None:
        self.is_up = False


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Arguments that an operator changes in place."""
    found = []
    for position, declared in enumerate(func._schema.arguments):
        if declared.is_write:
            value = kwargs.get(declared.name, args[position] if position < len(args) else None)
            found += [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return found
