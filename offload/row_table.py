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
import weakref
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from memtrain.offload import away
from memtrain.offload.errors import OffloadError, PlanMismatchError
from memtrain.offload.row_records import RowRecords, RowState, finish
from memtrain.offload.slab import Slab
from memtrain.offload.store import Store

SLOT_BYTES = 1 << 20
_KEY = "weight"
_TABLE = "_memtrain_row_table"  # key of a weight's __dict__


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
        weight: the parameter that leaves, once its rows are on the tier; None: one is made.

    Attributes:
        lookups: the most tokens of a model's forward so far, all calls of the table together.
        used_rows: the most rows of one, a call's different ones, and no more than the table has.

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
        weight: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        if padding_idx is not None and not -rows <= padding_idx < rows:
            raise PlanMismatchError(f"padding_idx of {name} is {padding_idx}, it has {rows} rows")
        self.num_embeddings, self.embedding_dim = rows, width
        self.padding_idx = None if padding_idx is None else padding_idx % rows
        self._name, self._device, self._pid = name, torch.device(device), os.getpid()
        self.changed_bytes = 0
        """Of rows that were given other values so far; what is written are the groups that they are in."""
        self.lookups = self.used_rows = 0
        self._calls = 0, 0
        """Tokens and rows of the calls since ``begin_forward``."""
        self.failure: BaseException | None = None
        """What left weights and state that do not belong together."""
        state = RowState(key=_KEY, dtype=dtype, initial=0.0)
        self.records = RowRecords(store, f"weight {name}", (rows, width), [state])
        self._slab = Slab(max(SLOT_BYTES, self.records.group_bytes))
        self._slot = self._slab.buffer
        self._room = self._slot.numel() // self.records.group_bytes
        try:
            with torch.no_grad():
                self._fill(parts)
        except BaseException:
            self.close()
            raise
        where = (
            f"{name}, which are on {store.tier.value} by rows: call the table, fetch(rows) or "
            "to_embedding(); save_checkpoint() writes them"
        )
        if weight is None:
            meta = torch.empty(rows, width, dtype=dtype, device="meta")
            self.weight = nn.Parameter(meta, requires_grad=trainable)
            away.born_away(self.weight, self._device, where)
        else:
            self.weight = weight
            away.put(weight, away.without_bytes(weight))
            away.forbid(weight, where)
        self.weight.__dict__[_TABLE] = weakref.ref(self)

    @classmethod
    def of(
        cls, embedding: nn.Embedding, *, store: Store, name: str = "table.weight", leave: bool = False
    ) -> RowTable:
        """A table with the rows of ``embedding``.

        Args:
            leave: the embedding's own parameter is the table's, without bytes until ``bring_home``; else the
                embedding keeps its weight, and the table has another one.

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
            weight=weight if leave else None,
        )

    @property
    def name(self) -> str:
        """Of the weight."""
        return self._name

    @property
    def staging_bytes(self) -> int:
        """Memory of the slot."""
        return self._slab.nbytes

    def forward(self, tokens: Tensor) -> Tensor:
        """As ``nn.Embedding``. Raises IndexError: a token is no row; OffloadError: the tier failed."""
        rows, places = torch.unique(tokens, return_inverse=True)
        self._note_call(tokens.numel(), len(rows))
        held = self.fetch(rows)
        padding = None
        if self.padding_idx is not None:
            found = (rows == self.padding_idx).nonzero()
            padding = int(found) if found.numel() else None
        if torch.is_grad_enabled() and self.weight.requires_grad:
            held.requires_grad_().register_post_accumulate_grad_hook(self._note_gradient(rows))
        found = nn.functional.embedding(places, held, padding_idx=padding, sparse=True)
        if held.requires_grad:  # autograd keeps it until backward, and asks for its shape alone
            held.data = away.without_bytes(held)
        return found

    def begin_forward(self) -> None:
        """A forward of the model begins, which may call the table several times."""
        self._calls = 0, 0

    def _note_call(self, tokens: int, rows: int) -> None:
        self._calls = self._calls[0] + tokens, self._calls[1] + rows
        self.lookups = max(self.lookups, self._calls[0])
        self.used_rows = max(self.used_rows, min(self._calls[1], self.num_embeddings))

    def _note_gradient(self, rows: Tensor) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def note(held: Tensor) -> None:
            gradient, held.grad = held.grad, None
            assert gradient is not None
            # As autograd would have made it for the whole table: same values, same order, not yet summed.
            whole = torch.sparse_coo_tensor(
                rows[gradient._indices()], gradient._values(), self.weight.shape, check_invariants=False
            )
            for hook in (self.weight._backward_hooks or {}).values():
                changed = hook(whole)
                whole = whole if changed is None else changed
            self.weight.grad = whole if self.weight.grad is None else self.weight.grad + whole
            for hook in (self.weight._post_accumulate_grad_hooks or {}).values():
                hook(self.weight)

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
            finish(self.records.write(groups, self._slot))
        self.changed_bytes += len(rows) * self.records.row_bytes

    @torch.no_grad()
    def bring_home(self) -> None:
        """The weight has its rows again, whole in memory, also after an update that failed, and the tier its
        room. Raises OffloadError: the tier failed, or the process is another one; the weight stays away."""
        self._refuse_gone()
        home = torch.empty(self.weight.shape, dtype=self.weight.dtype)
        start = 0
        for part in self._all_parts():
            home[start : start + len(part)] = part
            start += len(part)
        away.put(self.weight, home.to(self._device))
        away.permit(self.weight)
        del self.weight.__dict__[_TABLE]
        self.close()

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
        self._refuse_use()
        yield from self._all_parts()

    def _all_parts(self) -> Iterator[Tensor]:
        for groups in self.records.in_runs(self._room, written=False):
            last = self.records.rows_of(groups[-1]).stop
            whole = self._read(groups).reshape(-1, self.embedding_dim)
            yield whole[: last - self.records.rows_of(groups[0]).start]

    @torch.no_grad()
    def load(self, parts: Iterable[Tensor]) -> None:
        """Replace all rows, as after a failed update. Args and raises: as the class."""
        self._refuse_gone()
        try:
            self._fill(parts)
        except BaseException as error:
            self.failure = error
            raise
        self.failure = None

    def close(self) -> None:
        """Give the tier its room and the slot its memory back. May be called twice."""
        if os.getpid() == self._pid and self._room:
            self._room = 0
            self._slot = self._slot.new_empty(0)
            self._slab.close()
            self.records.close()

    def _fill(self, parts: Iterable[Tensor]) -> None:
        records, start = self.records, 0
        self._slot.zero_()  # padding, too, is written
        for rows in _in_runs(parts, self._room * records.group_rows):
            stop = start + len(rows)
            if stop <= self.num_embeddings:
                groups = list(range(start // records.group_rows, -(-stop // records.group_rows)))
                numbers = torch.arange(len(rows))
                at = numbers // records.group_rows, numbers % records.group_rows
                view = records.views(len(groups), self._slot)[_KEY]
                view[at] = rows.to("cpu", view.dtype)
                finish(records.write(groups, self._slot))
            start = stop
        if start != self.num_embeddings:
            raise PlanMismatchError(
                f"{self._name} has {self.num_embeddings} rows, {start} were given: give each once, in order"
            )

    def _runs(self, rows: Tensor) -> Iterator[tuple[list[int], slice, tuple[Tensor, Tensor]]]:
        """Groups that are in the slot together, which of ``rows`` are in them, and where in the view."""
        rows = rows.to("cpu")
        size = self.records.group_rows
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
        finish(self.records.read(groups, self._slot))
        return self.records.views(len(groups), self._slot)[_KEY]

    def _check(self, rows: Tensor) -> None:
        self._refuse_use()
        if bool((rows[1:] <= rows[:-1]).any()):
            raise IndexError(f"rows of {self._name} are to be given in order, each once: see torch.unique")
        if len(rows) and not 0 <= int(rows[0]) <= int(rows[-1]) < self.num_embeddings:
            raise IndexError(
                f"{self._name} has rows 0 to {self.num_embeddings - 1}, {int(rows[0])} to {int(rows[-1])} "
                "were asked for"
            )

    def _refuse_gone(self) -> None:
        if os.getpid() != self._pid:
            raise OffloadError(f"{self._name} belongs to process {self._pid}; a forked child may not use it")
        if not self._room:
            raise OffloadError(f"the table of {self._name} is closed, and its rows have left the tier")

    def _refuse_use(self) -> None:
        self._refuse_gone()
        if self.failure is not None:
            raise OffloadError(
                f"an update of {self._name} failed half-way ({self.failure}): weights and state no longer "
                "belong together. Restore the last checkpoint"
            ) from self.failure


def table_of(weight: Tensor) -> RowTable | None:
    """Whose weight it is; None where it is no table's."""
    found: weakref.ref[RowTable] | None = weight.__dict__.get(_TABLE)
    return None if found is None else found()


def row_tables(model: nn.Module) -> dict[str, RowTable]:
    """The tables of a model, by the names of their weights in it."""
    return {
        f"{path}.weight" if path else "weight": module
        for path, module in model.named_modules()
        if isinstance(module, RowTable)
    }


def as_rows(parts: Iterable[Tensor], width: int) -> Iterator[Tensor]:
    """Elements that come flat, each part perhaps in the memory of the one before, as whole rows, copied."""
    rest: Tensor | None = None
    for part in parts:
        flat = part.reshape(-1).clone() if rest is None else torch.cat([rest, part.reshape(-1)])
        whole = flat.numel() // width * width
        if whole:
            yield flat[:whole].view(-1, width)
        rest = flat[whole:]


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
