"""One forward of a block of which only the first tokens are computed again in backward.

Under a causal block the forward on the first ``r`` tokens gives the first ``r`` rows of everything that the
forward on all ``T`` saves. So the second forward runs on a prefix, and the rows behind it are stored by the
first one. How the tokens lie in each tensor is what ``token_probe.py`` has found.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from memtrain.offload.compare import beyond_rounding
from memtrain.offload.errors import TokenRangeError
from memtrain.offload.random_rows import DrawnWhole
from memtrain.offload.refusals import prefix_differs
from memtrain.offload.results import Pack
from memtrain.offload.token_kinds import Kind, TokenProbe
from memtrain.offload.token_rows import CutStorage, RowAxis, SavedRows, StorageRows, all_bytes
from memtrain.offload.unmoved import Unmoved


class TokenCut:
    """Stores rows ``first`` to ``tokens`` of what a forward saves.

    Args:
        name: of the block, for errors.
        probe: how the tokens lie in the block's tensors.
        tokens: of each row of the batch.
        first: how many of them are computed again; fewer than ``tokens``.
        shared: storages of arguments that other blocks get, too: they stay where they are.
        pack: how rows are stored.
    """

    def __init__(
        self, name: str, probe: TokenProbe, *, tokens: int, first: int, shared: frozenset[int], pack: Pack
    ) -> None:
        self._name = name
        self._probe = probe
        self._tokens = tokens
        self._first = first
        self._shared = shared
        self._pack = pack
        self._storages: dict[tuple[int, ...], tuple[CutStorage, StorageWeakRef]] = {}
        self._count = 0
        """Of saved tensors so far."""
        self._witness: torch.Tensor | None = None
        """The last row that is computed again, of one saved tensor, as the first forward had it."""

    def argument(self, index: int, tensor: torch.Tensor) -> torch.Tensor:
        """The argument of this number for the first tokens alone, a view."""
        for dim in self._probe.arguments[index]:
            tensor = tensor.narrow(dim, 0, self._first)
        return tensor

    def store(self, number: int, tensor: torch.Tensor) -> SavedRows | Any | None:
        """Store the rows of the saved tensor of this number that will not be computed again.

        Returns:
            what stands for the tensor whose other rows are still to come; or anything else, which stands for
            all of it; or None where all of it is computed again.
        """
        kind = self._kind(number, tensor)
        self._count = number + 1
        if tensor.untyped_storage().data_ptr() in self._shared or not _is_plain(tensor):
            return Unmoved.of(tensor)
        if kind is Kind.GIVEN:
            raise self._refused(f"saved tensor {number} was an argument when its tokens were probed")
        if kind is Kind.AGAIN:
            return None
        if kind is Kind.WHOLE:
            return self._pack(tensor.detach())
        assert isinstance(kind, RowAxis)
        if number == self._probe.witness:
            self._witness = kind.rows(tensor.detach(), self._tokens, self._first - 1, self._first).clone()
        storage = tensor.untyped_storage()
        rows = None if _is_window(tensor) else StorageRows.of(tensor, kind, self._tokens)
        key: tuple[int, ...] = (storage._cdata, tensor._version)
        if rows is not None:
            key = (*key, rows.row_bytes)
        else:  # a small part of a large storage, or an irregular one: the tensor alone
            key = (*key, int(tensor.storage_offset()), *tensor.shape, *tensor.stride())
            tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
            rows = StorageRows.of(tensor, kind, self._tokens)
            assert rows is not None
        placed = self._storages.get(key)
        if placed is None:
            # The weak reference keeps the storage's identity from being given to another one.
            placed = self._cut(tensor, rows), StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            self._storages[key] = placed
        return placed[0].tensor(tensor, kind)

    @property
    def is_random(self) -> bool:
        """Whether the block draws random numbers, as far as the probe knows."""
        return self._probe.is_random

    def drawing(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, dropouts of the first tokens draw what they drew for all."""
        if not self._probe.drawn:
            return contextlib.nullcontext()
        return DrawnWhole(self._probe.drawn, self._tokens, self._first).drawing()

    def shape_again(self, number: int, shape: torch.Size) -> torch.Size | None:
        """The shape of the saved tensor of this number in the second forward; None where it does not matter,
        for the tensor itself is there."""
        kind = self._probe.saved[number]
        if isinstance(kind, RowAxis):
            return kind.resized(shape, self._tokens, self._first)
        return shape if kind is Kind.AGAIN else None

    def check_again(self, number: int, tensor: torch.Tensor) -> None:
        """Look at what the second forward saves under this number.

        The probe has seen another batch. Where its answer does not hold for this one, as under a mask that
        lets the first tokens look ahead, the last row of the prefix is among those that differ.

        Raises:
            TokenRangeError: that row is not what it was in the first forward, not even within rounding.
        """
        kind = self._probe.saved[number]
        if number != self._probe.witness or self._witness is None or not isinstance(kind, RowAxis):
            return
        row = kind.rows(tensor.detach(), self._first, self._first - 1, self._first)
        apart = beyond_rounding(self._witness, row, self._probe.tolerance)
        if apart:
            raise prefix_differs(self._name, f"saved tensor {number}", self._first, apart)

    def seal(self) -> None:
        """The forward is over. Raises TokenRangeError if it saved less than when its tokens were probed."""
        self._storages.clear()
        if self._count != len(self._probe.saved):
            raise self._refused(
                f"saves {self._count} tensors, and {len(self._probe.saved)} when its tokens were probed"
            )

    def _cut(self, tensor: torch.Tensor, rows: StorageRows) -> CutStorage:
        window = rows.view(all_bytes(tensor))[:, self._first :]
        return CutStorage(rows, self._first, tensor.untyped_storage().nbytes(), self._pack(window))

    def _kind(self, number: int, tensor: torch.Tensor) -> RowAxis | Kind:
        if number >= len(self._probe.saved):
            raise self._refused(
                f"saves more tensors than the {len(self._probe.saved)} when its tokens were probed"
            )
        kind = self._probe.saved[number]
        if isinstance(kind, RowAxis) and not kind.fits(tensor.shape, self._tokens):
            raise self._refused(
                f"saved tensor {number} of shape {tuple(tensor.shape)} does not have {self._tokens} tokens "
                f"in dimension {kind.dim}, where the probe found them"
            )
        return kind

    def _refused(self, why: str) -> TokenRangeError:
        return TokenRangeError(f"{self._name}: {why}; plan without recomputed_tokens for it")


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether the bytes of a tensor's storage are all that there is to it."""
    return (
        type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def _is_window(tensor: torch.Tensor) -> bool:
    """Whether a tensor is less than half of its storage, which is not stored for its sake."""
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.untyped_storage().nbytes() > 2 * span * tensor.element_size()
