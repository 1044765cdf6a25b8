"""Tables whose gradients are sparse: of their optimizer state, only the rows that are used leave the tier.

An embedding with ``sparse=True`` has a gradient with the rows that a batch names. ``torch.optim.SparseAdam``
steps those and no others (its update is *lazy*: moments of a row do not decay while it is not used). So a
step needs the state of those rows alone, and this reads and writes no more, in groups of a page or a row
(``row_records.py``): bit-equal to SparseAdam, which is what runs, on rows that stand for the table.

Weights stay where they are: in memory, or on a tier by rows too (``row_table.py``). Dense optimizers decay
rows that were not used, and are refused.

    embedding = nn.Embedding(50_000, 576, sparse=True)
    optimizer = RowSparseOptimizer(torch.optim.SparseAdam(embedding.parameters()), store=engine.store(tier))
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from memtrain.offload.clipping import is_finite
from memtrain.offload.errors import OffloadError, PlanMismatchError
from memtrain.offload.gradient_ring import settle
from memtrain.offload.optimizer_probe import Runner, hyperparameters
from memtrain.offload.row_probe import row_states, sparse_rows
from memtrain.offload.row_records import RowRecords, finish, scalar_copy
from memtrain.offload.row_table import RowTable
from memtrain.offload.slab import Slab
from memtrain.offload.state_cuts import same_scalar
from memtrain.offload.store import Store, Ticket

SLOTS = 3
"""One is read, one stepped, one written."""
SLOT_BYTES = 1 << 20
"""64 groups: enough of them under way for a disk to sort them."""

ReadRows = Callable[[str, slice], Tensor]
"""Rows of a state tensor, by its key."""


@dataclass(slots=True, eq=False)
class _Table:
    """One parameter and its state."""

    name: str
    parameter: Tensor
    group: int
    records: RowRecords
    home: RowTable | None
    """Where its weight is, if that is on a tier."""
    scalars: dict[str, Any] | None = None
    """``step`` and the like; None before its first step."""


@dataclass(slots=True, eq=False)
class _Place:
    """A slot, and what uses it."""

    buffer: Tensor
    tickets: list[Ticket] = field(default_factory=list)

    def finish(self) -> None:
        """Return when nothing uses it. Raises what went wrong."""
        tickets, self.tickets = self.tickets, []
        finish(tickets)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Groups that are in a slot together, and the used rows in them, in order."""

    groups: list[int]
    rows: Tensor
    values: Tensor


class RowSparseOptimizer(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` around a lazy one for tables, whose state lies on a tier.

    It shares the wrapped optimizer's parameter groups, so that schedulers of either work; step the wrapped
    one no more.

    Args:
        optimizer: ``torch.optim.SparseAdam``, or one that treats rows as it does (``row_probe.py``), over
            tables whose gradients are sparse. It has no state yet; ``load_state_dict`` brings some.
        store: of the tier; its owner closes it, after this.
        names: of the parameters, for messages; by default numbered.
        tables: those of the parameters' tables whose weights are on a tier themselves.

    Raises:
        UnsupportedOptimizerError: the optimizer does not leave other rows alone, or takes no sparse gradient.
        PlanMismatchError: it has state already, or a parameter has no rows.
        TierFullError: no room for the state.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        store: Store,
        names: Sequence[str] | None = None,
        tables: Sequence[RowTable] = (),
    ) -> None:
        if optimizer.state:
            raise PlanMismatchError(
                f"the {type(optimizer).__name__} has state already: wrap it before its first step, and give "
                "its state_dict() to load_state_dict()"
            )
        self.optimizer = optimizer
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.param_groups, self.defaults = optimizer.param_groups, optimizer.defaults
        self._runner = Runner(optimizer)
        for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            setattr(self, hooks, getattr(optimizer, hooks))  # they fire here, once a step
        self._store, self._pid = store, os.getpid()
        self._failure: BaseException | None = None
        self._leader: str | None = None
        """What steps this one with the rest of a model."""
        self._led_on = False
        self.changed_bytes = 0
        """State of rows that steps have changed so far; what is written are the groups that they are in."""
        with ExitStack() as made:
            self._tables = self._make_tables(names, tables, made)
            slot_bytes = max(SLOT_BYTES, *(table.records.group_bytes for table in self._tables))
            self._slab = Slab(SLOTS * slot_bytes)
            made.callback(self._slab.close)
            self._slab.populate()
            self._places = [_Place(part) for part in torch.split(self._slab.buffer, slot_bytes)]
            self._made = made.pop_all()

    def _make_tables(
        self, names: Sequence[str] | None, homes: Sequence[RowTable], made: ExitStack
    ) -> list[_Table]:
        tables: list[_Table] = []
        for number, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                name = f"table {len(tables)}" if names is None else names[len(tables)]
                if parameter.dim() < 2 or not parameter.numel():
                    raise PlanMismatchError(
                        f"{name} has shape {tuple(parameter.shape)}: a table has rows of one element at least"
                    )
                states = row_states(self.optimizer, group, parameter.dtype)
                extent_name = f"optimizer state of {name}"
                records = RowRecords(self._store, extent_name, parameter.shape, states)
                made.callback(records.close)
                home = next((table for table in homes if table.weight is parameter), None)
                tables.append(_Table(name, parameter, number, records, home))
        return tables

    @property
    def staging_bytes(self) -> int:
        """Memory of the slots."""
        return self._slab.nbytes

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of the rows that have a gradient.

        Raises:
            PlanMismatchError: a gradient is dense, or sparse in more than its rows.
            OffloadError: a transfer failed. The update is then incomplete: restore the last checkpoint. Or
                something else steps this optimizer (``lead``).
        """
        if self._leader is not None and not self._led_on:
            raise OffloadError(
                f"{self._leader} steps the tables with the rest of the model: leave this step() out"
            )
        self._check_alive()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # its schedulers ask
        self.update_rows()
        return loss

    @torch.no_grad()
    def update_rows(self) -> None:
        """What ``step`` does with the gradients that there are, without hooks."""
        found = [(table, _row_gradient(table)) for table in self._tables if table.parameter.grad is not None]
        try:
            for table, gradient in found:
                self._step_table(table, gradient)
            for place in self._places:
                place.finish()
        except BaseException as error:
            self._abandon(error)
            raise

    def lead(self, leader: str) -> None:
        """From now on ``advance`` makes the steps; ``leader`` is what calls it, for the message of others."""
        self._leader = leader

    def advance(self) -> None:
        """``step``, by whoever leads."""
        self._led_on = True
        try:
            self.step()
        finally:
            self._led_on = False

    def nonfinite(self) -> list[str]:
        """Names of tables whose gradients, each row summed, hold NaN or inf."""
        found = [t for t in self._tables if t.parameter.grad is not None]
        return [table.name for table in found if not is_finite(_row_gradient(table).values())]

    def _step_table(self, table: _Table, gradient: Tensor) -> None:
        hyper = hyperparameters(self.param_groups[table.group])
        after: dict[str, Any] | None = None
        waiting: tuple[_Batch, _Place] | None = None
        for number, batch in enumerate([*self._batches(table, gradient), None]):
            coming = None
            if batch is not None:
                coming = batch, self._places[number % SLOTS]
                coming[1].finish()  # of its last batch's writes
                coming[1].tickets = table.records.read(batch.groups, coming[1].buffer)
            if waiting is not None:
                scalars = self._step_batch(table, hyper, *waiting)
                if after is not None and any(not same_scalar(after[key], scalars[key]) for key in after):
                    raise OffloadError(f"rows of {table.name} disagree about {after} and {scalars}")
                after = scalars
            waiting = coming
        table.scalars = after if after is not None else self._count_step(table, hyper)

    def _batches(self, table: _Table, gradient: Tensor) -> Iterator[_Batch]:
        """The used rows, as many groups at a time as a slot holds."""
        rows, values = gradient.indices()[0], gradient.values()
        groups, counts = torch.unique_consecutive(rows // table.records.group_rows, return_counts=True)
        ends = counts.cumsum(0).tolist()
        numbers = groups.tolist()
        room = self._places[0].buffer.numel() // table.records.group_bytes
        for start in range(0, len(numbers), room):
            stop = min(start + room, len(numbers))
            span = slice(ends[start - 1] if start else 0, ends[stop - 1])
            yield _Batch(numbers[start:stop], rows[span], values[span])

    def _step_batch(
        self, table: _Table, hyper: dict[str, Any], batch: _Batch, place: _Place
    ) -> dict[str, Any]:
        """Step the batch's rows, and start writing their groups; the scalars after it."""
        place.finish()
        records, device = table.records, table.parameter.device
        views = records.views(len(batch.groups), place.buffer)
        rows = batch.rows.cpu()
        position = torch.searchsorted(torch.tensor(batch.groups), rows // records.group_rows)
        at = position, rows % records.group_rows
        home = table.home
        weight = table.parameter.detach()[batch.rows] if home is None else home.fetch(batch.rows)
        weight.grad = sparse_rows(torch.arange(len(rows), device=device), batch.values, weight.shape)
        state = {key: view[at].to(device) for key, view in views.items()}
        stepped = self._run(table, hyper, weight, state)
        weight.grad = None
        if home is None:
            table.parameter.detach().index_copy_(0, batch.rows, weight)
        else:
            home.put(batch.rows, weight)
        for key, view in views.items():
            view[at] = stepped.pop(key).to(view.device)
        place.tickets = records.write(batch.groups, place.buffer)
        self.changed_bytes += len(rows) * records.row_bytes
        return stepped

    def _count_step(self, table: _Table, hyper: dict[str, Any]) -> dict[str, Any]:
        """A gradient without rows is a step all the same."""
        parameter = table.parameter
        weight = torch.zeros((1, *parameter.shape[1:]), dtype=parameter.dtype, device=parameter.device)
        none = torch.empty(0, dtype=torch.int64, device=weight.device)
        weight.grad = sparse_rows(none, weight[:0], weight.shape)
        state = {s.key: torch.full_like(weight, s.initial, dtype=s.dtype) for s in table.records.states}
        stepped = self._run(table, hyper, weight, state)
        return {key: value for key, value in stepped.items() if key not in state}

    def _run(
        self, table: _Table, hyper: dict[str, Any], weight: Tensor, state: dict[str, Tensor]
    ) -> dict[str, Any]:
        """The optimizer's own step on rows that stand for the table; their state after it."""
        given: dict[Tensor, dict[str, Any]] = {}
        if table.scalars is not None:
            scalars = {key: scalar_copy(value) for key, value in table.scalars.items()}
            given[weight] = {**state, **scalars}
        after = self._runner.run([{**hyper, "params": [weight]}], given)
        return dict(after[weight])

    # -- checkpoints ---------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As the wrapped optimizer's would be, with whole state tensors in memory."""
        self._check_alive()
        plain = self.optimizer.state_dict()
        plain["state"] = {
            number: {**self._read(table), **table.scalars}
            for number, table in enumerate(self._tables)
            if table.scalars is not None
        }
        return plain

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` of this class, or of the plain optimizer, returned.

        Raises:
            ValueError: other parameter groups.
            PlanMismatchError: state of another optimizer, or of tables of another shape; nothing has been
                changed then.
            OffloadError: a transfer failed; the state is then undefined until loaded again.
        """
        entries = {number: state_dict["state"].get(number) for number in range(len(self._tables))}
        for number, table in enumerate(self._tables):
            _check_entry(table, entries[number])
        self.optimizer.load_state_dict({**state_dict, "state": {}})
        self.param_groups = self.optimizer.param_groups

        def reader(entry: dict[str, Any]) -> ReadRows:
            return lambda key, rows: entry[key][rows]

        self._replace(
            {t.name: reader(e) for n, t in enumerate(self._tables) if (e := entries[n]) is not None},
            {t.name: e for n, t in enumerate(self._tables) if (e := entries[n]) is not None},
        )

    @property
    def tables(self) -> dict[str, RowRecords]:
        """Where the state of each table lies, by name."""
        return {table.name: table.records for table in self._tables}

    def scalar_state(self) -> dict[str, dict[str, Any]]:
        """``step`` and the like by table; none of a table before its first step."""
        return {t.name: dict(t.scalars) for t in self._tables if t.scalars is not None}

    def state_parts(self, name: str, key: str) -> Iterator[Tensor]:
        """A state tensor's rows from the first to the last, a slot's at a time; each valid until the next is
        asked for. Raises OffloadError."""
        self._check_alive()
        records, place = self._named(name).records, self._places[0]
        for groups in records.in_runs(self._room(records), written=False):
            place.tickets = records.read(groups, place.buffer)
            place.finish()
            count = records.rows_of(groups[-1]).stop - records.rows_of(groups[0]).start
            yield records.views(len(groups), place.buffer)[key].flatten(0, 1)[:count]

    def load_rows(self, readers: Mapping[str, ReadRows], scalars: Mapping[str, Mapping[str, Any]]) -> None:
        """Replace all state, some rows at a time.

        Args:
            readers: by table, its state tensors; a table without one has no state yet.
            scalars: by table, what ``scalar_state`` gives.

        Raises:
            OffloadError: a transfer failed; the state is then undefined until loaded again.
        """
        self._replace(readers, scalars)

    def forget(self) -> None:
        """No table has made a step."""
        self._replace({}, {})

    @torch.no_grad()
    def _replace(self, readers: Mapping[str, ReadRows], scalars: Mapping[str, Mapping[str, Any]]) -> None:
        self._failure = None
        try:
            for table in self._tables:
                self._load(table, readers.get(table.name), scalars.get(table.name, {}))
        except BaseException as error:
            self._abandon(error)
            raise

    def _named(self, name: str) -> _Table:
        return next(table for table in self._tables if table.name == name)

    def _read(self, table: _Table) -> dict[str, Tensor]:
        records, place = table.records, self._places[0]
        whole = dict(records.fresh())
        for groups in records.in_runs(self._room(records), written=True):
            place.tickets = records.read(groups, place.buffer)
            place.finish()
            for key, view in records.views(len(groups), place.buffer).items():
                for index, group in enumerate(groups):
                    rows = records.rows_of(group)
                    whole[key][rows] = view[index, : rows.stop - rows.start]
        return {key: value.to(table.parameter.device) for key, value in whole.items()}

    def _load(self, table: _Table, read: ReadRows | None, scalars: Mapping[str, Any]) -> None:
        records, place = table.records, self._places[0]
        records.forget()
        table.scalars = None
        if read is None:
            return
        for groups in records.in_runs(self._room(records), written=False):
            records.read(groups, place.buffer)  # as a new optimizer has them
            used = set()
            first = records.rows_of(groups[0]).start
            for key, view in records.views(len(groups), place.buffer).items():
                run = read(key, slice(first, records.rows_of(groups[-1]).stop)).to("cpu")
                for index, group in enumerate(groups):
                    rows = records.rows_of(group)
                    part, given = (
                        view[index, : rows.stop - rows.start],
                        run[rows.start - first : rows.stop - first],
                    )
                    if not torch.equal(_bits(part), _bits(given)):
                        used.add(group)
                        part.copy_(given)
            # Groups in a row of the slot are written one by one: only those that hold something.
            for index, group in enumerate(groups):
                if group in used:
                    at = slice(index * records.group_bytes, (index + 1) * records.group_bytes)
                    place.tickets += records.write([group], place.buffer[at])
            place.finish()
        keys = {state.key for state in records.states}
        table.scalars = {key: scalar_copy(value) for key, value in scalars.items() if key not in keys}

    def _room(self, records: RowRecords) -> int:
        return self._places[0].buffer.numel() // records.group_bytes

    # -- ending --------------------------------------------------------------------------------

    def close(self) -> None:
        """Give the tier its room and the slots their memory back. May be called twice."""
        if os.getpid() == self._pid:
            self._places = []
            self._made.close()

    def _abandon(self, error: BaseException) -> None:
        """Nothing uses the slots any more, whatever became of the transfers."""
        self._failure = error
        for table in self._tables:
            if table.home is not None:
                table.home.failure = error
        for place in self._places:
            for ticket in place.tickets:
                settle(ticket)
            place.tickets = []

    def _check_alive(self) -> None:
        if os.getpid() != self._pid:
            raise OffloadError(
                f"the row-sparse optimizer belongs to process {self._pid}; a forked child may not use it"
            )
        if not self._places:
            raise OffloadError("the row-sparse optimizer is closed, and its state has left the tier")
        if self._failure is not None:
            raise OffloadError(
                f"an earlier update failed half-way ({self._failure}): weights and state no longer belong "
                f"together. Restore the last checkpoint"
            ) from self._failure


def _row_gradient(table: _Table) -> Tensor:
    """The table's gradient, each row once and in order."""
    gradient = table.parameter.grad
    assert gradient is not None
    if gradient.layout is not torch.sparse_coo:
        raise PlanMismatchError(
            f"the gradient of {table.name} is dense ({gradient.layout}), and says nothing of which rows were "
            "used: make the layer with sparse=True, or give the table to a dense optimizer"
        )
    if gradient.sparse_dim() != 1:
        raise PlanMismatchError(
            f"the gradient of {table.name} is sparse in {gradient.sparse_dim()} dimensions: only whole rows "
            "(sparse_dim 1), as an embedding has them, can be stepped apart"
        )
    return gradient.coalesce()


def _check_entry(table: _Table, entry: dict[str, Any] | None) -> None:
    if entry is None:
        return
    shape = tuple(table.parameter.shape)
    for state in table.records.states:
        found = entry.get(state.key)
        if not isinstance(found, Tensor) or tuple(found.shape) != shape or found.dtype != state.dtype:
            what = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)
            raise PlanMismatchError(
                f"state {state.key!r} of {table.name} is {what}, expected {state.dtype} {shape}: load the "
                "state of the same optimizer and tables"
            )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)
