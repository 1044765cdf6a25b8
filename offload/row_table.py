"""An embedding whose weight lies on a tier: a forward reads the rows that its tokens name, and no others.

    table = RowTable.of(embedding, store=engine.store(tier))        # an nn.Embedding with sparse=True
    optimizer = RowSparseOptimizer(
        torch.optim.SparseAdam([table.weight]), store=engine.store(tier), tables=[table]
    )

``table.weight`` is a parameter without bytes: identity, shape, gradient and hooks are there, and any other
use raises ``WeightAwayError``. Its gradient is sparse, and to the bit what ``nn.Embedding(sparse=True)``
gives: autograd sees a table of the rows in hand, and their numbers are put in when its gradient arrives.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from memtrain.offload import away
from memtrain.offload.errors import OffloadError, PlanMismatchError
from memtrain.offload.row_records import RowRecords, RowState
from memtrain.offload.slab import Slab
from memtrain.offload.store import Store, wait_all

SLOT_BYTES = 1 << 20
_KEY = "weight"


class RowTable(nn.Module):
    """Stands in the place of an ``nn.Embedding``.

    Args:
        rows, width: of the table.
        parts: its rows from the first to the last, some at a time; each converted to ``dtype``.
        store: of the tier; its owner closes it, after this.
        dtype: of the weight.
        device: where the rows are used.
        padding_idx: as of ``nn.Embedding``: a row that gets no gradient, counted from the end if negative.
        name: of the weight, for messages.
        trainable: whether gradients are wanted.

    Raises:
        PlanMismatchError: the parts have other rows, or ``padding_idx`` is none of them.
        TierFullError: no room.
        OffloadError: the tier failed.
    """

    def __init__(
        self,
        rows: int,
        width: int,
        parts: Iterable[Tensor],
        *,
        store: Store,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        padding_idx: int | None = None,
        name: str = "table.weight",
        trainable: bool = True,
    ) -> None:
        super().__init__()
        if padding_idx is not None and not -rows <= padding_idx < rows:
            raise PlanMismatchError(f"padding_idx of {name} is {padding_idx}, it has {rows} rows")
        self.num_embeddings, self.embedding_dim = rows, width
        self.padding_idx = None if padding_idx is None else padding_idx % rows
        self._name, self._device, self._pid = name, torch.device(device), os.getpid()
        self.changed_bytes = 0
        """Of rows that were given other values so far; what is written are the groups that they are in."""
        state = RowState(key=_KEY, dtype=dtype, initial=0.0)
        self._records = RowRecords(store, f"weight {name}", (rows, width), [state])
        self._slab = Slab(max(SLOT_BYTES, self._records.group_bytes))
        self._slot = self._slab.buffer
        self._room = self._slot.numel() // self._records.group_bytes
        try:
            with torch.no_grad():
                self._fill(parts)
        except BaseException:
            self.close()
            raise
        self.weight = nn.Parameter(
            torch.empty(rows, width, dtype=dtype, device="meta"), requires_grad=trainable
        )
        away.born_away(
            self.weight,
            self._device,
            f"{name}, which are on {store.tier.value} by rows: call the table, fetch(rows) or to_embedding()",
        )

    @classmethod
    def of(cls, embedding: nn.Embedding, *, store: Store, name: str = "table.weight") -> RowTable:
        """A table with the rows of ``embedding``, which keeps its own.

        Raises:
            PlanMismatchError: its gradients are dense, or it renormalises or scales them. Else as the class.
        """
        for what, wrong in (
            ("sparse=False: its gradient is dense, and every row has one", not embedding.sparse),
            ("max_norm: it changes rows in forward", embedding.max_norm is not None),
            ("scale_grad_by_freq", embedding.scale_grad_by_freq),
        ):
            if wrong:
                raise PlanMismatchError(
                    f"{name} cannot leave by rows with {what}. Make it nn.Embedding(..., sparse=True) and "
                    "nothing else, or stream its unit's weights whole"
                )
        weight = embedding.weight
        return cls(
            *weight.shape,
            [weight.detach()],
            store=store,
            dtype=weight.dtype,
            device=weight.device,
            padding_idx=embedding.padding_idx,
            name=name,
            trainable=weight.requires_grad,
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """As ``nn.Embedding``. Raises IndexError: a token is no row; OffloadError: the tier failed."""
        rows, places = torch.unique(tokens, return_inverse=True)
        held = self.fetch(rows)
        padding = None
        if self.padding_idx is not None:
            found = (rows == self.padding_idx).nonzero()
            padding = int(found) if found.numel() else None
        if torch.is_grad_enabled() and self.weight.requires_grad:
            held.requires_grad_().register_post_accumulate_grad_hook(self._note_gradient(rows))
        return nn.functional.embedding(places, held, padding_idx=padding, sparse=True)

    def _note_gradient(self, rows: Tensor) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def note(held: Tensor) -> None:
            gradient, held.grad = held.grad, None
            assert gradient is not None
            # As autograd would have made it for the whole table: same values, same order, not yet summed.
            whole = torch.sparse_coo_tensor(
                rows[gradient._indices()], gradient._values(), self.weight.shape, check_invariants=False
            )
            self.weight.grad = whole if self.weight.grad is None else self.weight.grad + whole

        return note

    @torch.no_grad()
    def fetch(self, rows: Tensor) -> Tensor:
        """Rows in memory of their own, ``[len(rows), width]``.

        Args:
            rows: in order, each once.

        Raises:
            IndexError: a row that the table has not, or rows in another order.
            OffloadError: the tier failed.
        """
        self._check(rows)
        held = torch.empty((len(rows), self.embedding_dim), dtype=self.weight.dtype)
        for groups, span, at in self._runs(rows):
            held[span] = self._read(groups)[at]
        return held.to(self._device)

    @torch.no_grad()
    def put(self, rows: Tensor, values: Tensor) -> None:
        """Give rows other values. Raises as ``fetch``; what a failed write should have changed is lost then.

        Args:
            rows: in order, each once.
            values: ``[len(rows), width]``.
        """
        self._check(rows)
        for groups, span, at in self._runs(rows):
            self._read(groups)[at] = values[span].to("cpu")
            wait_all(self._records.write(groups, self._slot))
        self.changed_bytes += len(rows) * self._records.row_bytes

    def to_embedding(self) -> nn.Embedding:
        """An ``nn.Embedding`` with these rows, whole in memory."""
        made = nn.Embedding(
            self.num_embeddings,
            self.embedding_dim,
            padding_idx=self.padding_idx,
            sparse=True,
            dtype=self.weight.dtype,
            device=self._device,
        ).requires_grad_(self.weight.requires_grad)
        start = 0
        for part in self.parts():
            made.weight.data[start : start + len(part)] = part.to(self._device)
            start += len(part)
        return made

    def parts(self) -> Iterator[Tensor]:
        """The rows from the first to the last, a slot's at a time; each valid until the next is asked for."""
        self._refuse_child()
        for groups in self._records.in_runs(self._room, written=False):
            last = self._records.rows_of(groups[-1]).stop
            whole = self._read(groups).reshape(-1, self.embedding_dim)
            yield whole[: last - self._records.rows_of(groups[0]).start]

    @torch.no_grad()
    def load(self, parts: Iterable[Tensor]) -> None:
        """Replace all rows, as after a failed update. Args and raises: as the class."""
        self._refuse_child()
        self._fill(parts)

    def close(self) -> None:
        """Give the tier its room and the slot its memory back. May be called twice."""
        if os.getpid() == self._pid and self._room:
            self._room = 0
            self._records.close()
            self._slab.close()

    def _fill(self, parts: Iterable[Tensor]) -> None:
        records, start = self._records, 0
        self._slot.zero_()  # padding, too, is written
        for rows in _in_runs(parts, self._room * records.group_rows):
            stop = start + len(rows)
            if stop <= self.num_embeddings:
                groups = list(range(start // records.group_rows, -(-stop // records.group_rows)))
                numbers = torch.arange(len(rows))
                at = numbers // records.group_rows, numbers % records.group_rows
                view = records.views(len(groups), self._slot)[_KEY]
                view[at] = rows.to("cpu", view.dtype)
                wait_all(records.write(groups, self._slot))
            start = stop
        if start != self.num_embeddings:
            raise PlanMismatchError(
                f"{self._name} has {self.num_embeddings} rows, {start} were given: give each once, in order"
            )

    def _runs(self, rows: Tensor) -> Iterator[tuple[list[int], slice, tuple[Tensor, Tensor]]]:
        """Groups that are in the slot together, which of ``rows`` are in them, and where in the view."""
        rows = rows.to("cpu")
        size = self._records.group_rows
        groups, counts = torch.unique_consecutive(rows // size, return_counts=True)
        start = 0
        for numbers, sizes in zip(groups.split(self._room), counts.split(self._room), strict=True):
            stop = start + int(sizes.sum())
            part = rows[start:stop]
            yield (
                numbers.tolist(),
                slice(start, stop),
                (torch.searchsorted(numbers, part // size), part % size),
            )
            start = stop

    def _read(self, groups: list[int]) -> Tensor:
        """The groups' rows in the slot."""
        wait_all(self._records.read(groups, self._slot))
        return self._records.views(len(groups), self._slot)[_KEY]

    def _check(self, rows: Tensor) -> None:
        self._refuse_child()
        if bool((rows[1:] <= rows[:-1]).any()):
            raise IndexError(f"rows of {self._name} are to be given in order, each once: see torch.unique")
        if len(rows) and not 0 <= int(rows[0]) <= int(rows[-1]) < self.num_embeddings:
            raise IndexError(
                f"{self._name} has rows 0 to {self.num_embeddings - 1}, {int(rows[0])} to {int(rows[-1])} "
                "were asked for"
            )

    def _refuse_child(self) -> None:
        if os.getpid() != self._pid:
            raise OffloadError(f"{self._name} belongs to process {self._pid}; a forked child may not use it")


def _in_runs(parts: Iterable[Tensor], count: int) -> Iterator[Tensor]:
    """The same rows, ``count`` at a time, the last ones perhaps fewer."""
    held: list[Tensor] = []
    for part in parts:
        for rows in part.detach().split(count):
            held.append(rows)
            total = sum(map(len, held))
            if total >= count:
                joined = held[0] if len(held) == 1 else torch.cat(held)
                yield joined[:count]
                held = [joined[count:]] if total > count else []
    if held:
        yield torch.cat(held)
