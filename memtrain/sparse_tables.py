"""Embedding tables of a session that lie on a tier by rows, weight and optimizer state.

``prepare(..., sparse_optimizer=torch.optim.SparseAdam([...]))`` names them: each embedding with
``sparse=True`` whose weight is in it leaves before the model is measured (``RowTable``), so that what is
measured is what will run, and comes home when the session is closed. Tables of a streamed model are on its
tier already, and stay. They are in no unit of the plan, which counts them as ``TableProfile`` says.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from memtrain.offload.contents import Content
from memtrain.offload.errors import OffloadError, TierFullError
from memtrain.offload.row_probe import row_states, sparse_rows
from memtrain.offload.row_records import NOTES_BYTES, RowState, extent_bytes
from memtrain.offload.row_sparse import RowSparseOptimizer
from memtrain.offload.row_table import RowTable, row_tables
from memtrain.offload.store import Store
from memtrain.planner.actions import Tier
from memtrain.planner.machine import Budget
from memtrain.planner.profile import ModelProfile, TableProfile
from memtrain.planner.tracing.live_bytes import LiveBytes


class SparseTableError(OffloadError):
    """A table cannot be used by rows in a session; names it, the reason and the remedy."""


class SparseTables:
    """The tables of a session.

    Attributes:
        tables: by the names of their weights.
        optimizer: what steps them.
        store: where they lie.
    """

    def __init__(
        self, tables: Mapping[str, RowTable], optimizer: RowSparseOptimizer, store: Store, undo: ExitStack
    ) -> None:
        self.tables, self.optimizer, self.store = dict(tables), optimizer, store
        self._undo = undo

    @property
    def weights(self) -> list[nn.Parameter]:
        """Parameters without bytes."""
        return [table.weight for table in self.tables.values()]

    def profile(self, micro_batches: int) -> tuple[TableProfile, ...]:
        """What the plan must know, once forwards of the largest batch have run. Steps are measured on rows
        that have their values again afterwards."""
        shared = self.optimizer.staging_bytes  # slots of the one optimizer: the first table's
        found = []
        for name, table in self.tables.items():
            seconds, workspace = self._measured(table, micro_batches)
            weight, state = table.records, self.optimizer.tables[name]
            found.append(
                TableProfile(
                    name=name,
                    tier=self.store.tier,
                    rows=table.num_embeddings,
                    row_bytes=weight.row_bytes,
                    weight_group_rows=weight.group_rows,
                    weight_group_bytes=weight.group_bytes,
                    state_group_rows=state.group_rows,
                    state_group_bytes=state.group_bytes,
                    lookups=table.lookups,
                    used_rows=table.used_rows,
                    slot_bytes=table.staging_bytes + shared,
                    note_bytes=NOTES_BYTES,
                    workspace_bytes=workspace,
                    update_seconds=seconds,
                )
            )
            shared = 0
        self.optimizer.forget()
        return tuple(found)

    def _measured(self, table: RowTable, micro_batches: int) -> tuple[float, int]:
        """Seconds of a step on as many rows as the sample batch has, and temporaries of one on as many as any
        batch may have."""
        live = LiveBytes()
        with live:
            self._step(table, min(table.num_embeddings, micro_batches * table.lookups))
        rows = min(table.num_embeddings, micro_batches * table.used_rows)
        return self._step(table, rows), live.peak_bytes

    @torch.no_grad()
    def _step(self, table: RowTable, count: int) -> float:
        """A step with a gradient of zeros on rows that are far from each other; its seconds."""
        rows = torch.arange(count) * table.num_embeddings // max(1, count)
        before, kept = table.fetch(rows), [weight.grad for weight in self.weights]
        try:
            for weight in self.weights:  # the caller's, for a step of its own
                weight.grad = None
            table.weight.grad = sparse_rows(rows, torch.zeros_like(before), table.weight.shape)
            began = time.perf_counter()
            self.optimizer.update_rows()
            seconds = time.perf_counter() - began
        finally:
            for weight, gradient in zip(self.weights, kept, strict=True):
                weight.grad = gradient
        table.put(rows, before)
        return seconds

    def resident_bytes(self) -> int:
        """Slots."""
        return self.optimizer.staging_bytes + sum(t.staging_bytes for t in self.tables.values())

    def changed_bytes(self) -> dict[Content, int]:
        """Of rows that steps have changed so far."""
        weights = sum(table.changed_bytes for table in self.tables.values())
        return {Content.WEIGHTS: weights, Content.STATE: self.optimizer.changed_bytes}

    def lines(self) -> list[str]:
        """For people."""
        tier = self.store.tier.value
        return [
            f"{name} on {tier} by rows: {table.num_embeddings} rows, at most {table.used_rows} in a forward"
            for name, table in self.tables.items()
        ]

    def close(self) -> None:
        """Give state's room back; tables that left come home. May be called twice.

        Raises:
            OffloadError: a tier failed; the model has its own modules again, and that table's weight is away.
        """
        self._undo.close()


def put_tables_away(
    model: nn.Module,
    sparse_optimizer: torch.optim.Optimizer,
    optimizer: torch.optim.Optimizer,
    *,
    blocks: Sequence[tuple[str, nn.Module]],
    budget: Budget,
    lent: Store | None,
    open_store: Any,
    master_weights: bool,
) -> SparseTables:
    """Send the tables of ``sparse_optimizer`` to a tier, with room for their state.

    Args:
        optimizer: of the other parameters.
        lent: where a streamed model's weights are; its tables are there by rows already.
        open_store: ``(budget, tier) -> Store``, for any other model.

    Raises:
        SparseTableError: names a parameter that is no table, or one that cannot leave.
        UnsupportedOptimizerError, PlanMismatchError: as ``RowSparseOptimizer`` and ``RowTable``.
        TierFullError: no tier of the budget has room.
    """
    modules = _modules_of(model, sparse_optimizer, optimizer, blocks, master_weights)
    with ExitStack() as undo:
        tables: dict[str, RowTable] = {}
        if lent is None:
            needs = _needs(modules, sparse_optimizer)
            store: Store = open_store(budget, _tier_for(needs, budget))
            undo.callback(store.close)
        else:
            store = lent
        for name, (path, module) in modules.items():
            if isinstance(module, RowTable):
                tables[name] = module
                continue
            assert isinstance(module, nn.Embedding)
            tables[name] = _replaced(model, path, module, name, store, undo)
        for table in tables.values():
            undo.callback(model.register_forward_pre_hook(lambda *_, each=table: each.begin_forward()).remove)
        kept = dict(sparse_optimizer.state)
        sparse_optimizer.state.clear()
        try:
            rows = RowSparseOptimizer(
                sparse_optimizer, store=store, names=list(tables), tables=list(tables.values())
            )
        except BaseException:
            sparse_optimizer.state.update(kept)
            raise
        undo.callback(rows.close)
        made = SparseTables(tables, rows, store, undo.pop_all())
    return made


def take_over(tables: SparseTables, state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Give the tables the state that their optimizer had."""
    entries = {name: state[t.weight] for name, t in tables.tables.items() if state.get(t.weight)}

    def reader(entry: dict[str, Any]) -> Any:
        return lambda key, rows: entry[key][rows]

    tables.optimizer.load_rows({name: reader(entry) for name, entry in entries.items()}, entries)


def with_tables(profile: ModelProfile, tables: SparseTables) -> ModelProfile:
    """``profile`` with what there is of the tables. Slots were there when the process was measured."""
    baseline = max(0, profile.baseline_bytes - tables.resident_bytes())
    return dataclasses.replace(profile, tables=tables.profile(profile.micro_batches), baseline_bytes=baseline)


def refuse_left_out(model: nn.Module, chosen: Iterable[Tensor]) -> None:
    """Raises SparseTableError where a table by rows, or a trainable embedding with sparse gradients, has no
    lazy optimizer."""
    known = set(map(id, chosen))
    for path, module in model.named_modules():
        by_rows = isinstance(module, RowTable)
        sparse = isinstance(module, nn.Embedding) and module.sparse and module.weight.requires_grad
        if (by_rows or (sparse and known)) and id(module.weight) not in known:
            raise SparseTableError(
                f"{path}.weight is a table with sparse gradients and in no lazy optimizer: put it into "
                "prepare(sparse_optimizer=torch.optim.SparseAdam([...]))"
            )


def _modules_of(
    model: nn.Module,
    sparse_optimizer: torch.optim.Optimizer,
    optimizer: torch.optim.Optimizer,
    blocks: Sequence[tuple[str, nn.Module]],
    master_weights: bool,
) -> dict[str, tuple[str, nn.Module]]:
    """By the weight's name the path and the module, in the order of the optimizer."""
    if isinstance(sparse_optimizer, RowSparseOptimizer):
        raise SparseTableError(
            "sparse_optimizer is a RowSparseOptimizer: give the optimizer that it was made of, which a "
            "session wraps itself"
        )
    owners = {
        id(m.weight): (path, m)
        for path, m in model.named_modules()
        if isinstance(m, (nn.Embedding, RowTable))
    }
    inside = {id(p): name for name, block in blocks for p in block.parameters()}
    dense = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found: dict[str, tuple[str, nn.Module]] = {}
    for group in sparse_optimizer.param_groups:
        for parameter in group["params"]:
            all_names = names.get(id(parameter), [])
            name = all_names[0] if all_names else f"a parameter of shape {tuple(parameter.shape)}"
            why = None
            if id(parameter) not in owners:
                why = "is no nn.Embedding's weight of this model"
            elif len(all_names) > 1:
                why = f"is tied ({' and '.join(all_names)}): a table by rows is looked up and nothing else"
            elif id(parameter) in inside:
                why = f"is inside of block {inside[id(parameter)]}, which may run twice"
            elif id(parameter) in dense:
                why = "is in the other optimizer too"
            elif master_weights and parameter.dtype != torch.float32:
                why = f"is {parameter.dtype} and would need a master: have it in fp32, or no master_weights"
            elif parameter.device.type != "cpu":
                why = f"is on {parameter.device}: tables by rows are for the CPU"
            else:
                why = _unusual(owners[id(parameter)][1])
            if why is not None:
                raise SparseTableError(
                    f"{name} cannot be a table of sparse_optimizer: it {why}. Give it to the other optimizer "
                    "(with sparse=False), or mend that"
                )
            found[name] = owners[id(parameter)]
    if not found:
        raise SparseTableError("sparse_optimizer has no parameters: leave it out")
    refuse_left_out(model, [m.weight for _, m in found.values()])  # type: ignore[misc]
    return found


def _unusual(module: nn.Module) -> str | None:
    """What of the module a ``RowTable`` in its place would lose."""
    if isinstance(module, RowTable):
        return None
    if type(module) is not nn.Embedding or "forward" in module.__dict__:
        return f"belongs to a {type(module).__name__} with a forward of its own"
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(module, name) for name in hooks):
        return "has hooks, which would not be called"
    return None


def _needs(modules: Mapping[str, tuple[str, nn.Module]], optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights and state on a tier."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    total = 0
    for _, module in modules.values():
        weight: Any = module.weight
        shape = tuple(weight.shape)
        total += weight_bytes(shape, weight.dtype)
        total += extent_bytes(shape, row_states(optimizer, groups[id(weight)], weight.dtype))
    return total


def weight_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """What the weight of a table takes on a tier."""
    return extent_bytes(shape, [RowState(key="weight", dtype=dtype, initial=0.0)])


def _tier_for(needs: int, budget: Budget) -> Tier:
    room = {Tier.CXL: budget.cxl_bytes, Tier.NVME: budget.nvme_bytes}
    tier = next((tier for tier, size in room.items() if size >= needs), None)
    if tier is None:
        given = ", ".join(f"{tier.value} {size} bytes" for tier, size in room.items() if size) or "none"
        raise TierFullError(
            f"the tables of sparse_optimizer and their state take {needs} bytes, and no tier beside the "
            f"device has as much in the budget ({given}): give budget.nvme, or raise it, to at "
            f"least {needs} bytes"
        )
    return tier


def _replaced(
    model: nn.Module, path: str, embedding: nn.Embedding, name: str, store: Store, undo: ExitStack
) -> RowTable:
    parent, _, own = path.rpartition(".")
    holder = model.get_submodule(parent)
    table = RowTable.of(embedding, store=store, name=name, leave=True)
    table.train(embedding.training)

    def put_back() -> None:
        embedding.train(table.training)
        setattr(holder, own, embedding)
        table.bring_home()

    undo.callback(put_back)
    setattr(holder, own, table)
    return table


def tables_in(model: nn.Module, *, of_inputs: bool) -> dict[str, tuple[str, nn.Embedding]]:
    """Embeddings of a model whose weights are nowhere yet that are to be tables, by the names of weights.

    Args:
        of_inputs: make the model's input embeddings one; otherwise those with ``sparse=True`` are.

    Raises:
        SparseTableError: one cannot be.
    """
    if of_inputs:
        sparse_inputs(model)
    names = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    found: dict[str, tuple[str, nn.Embedding]] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.sparse:
            why = _unusual(module)
            if names[id(module.weight)] > 1:
                why = "is tied to another layer: untie them (tie_word_embeddings: false)"
            if why is not None:
                raise SparseTableError(f"{path}.weight cannot be a table by rows: it {why}")
            found[f"{path}.weight"] = path, module
    return found


def sparse_inputs(model: nn.Module) -> nn.Embedding:
    """Give a model's input embeddings sparse gradients.

    Raises:
        SparseTableError: it does not say which they are, or they are tied to the head.
    """
    ask: Any = getattr(model, "get_input_embeddings", None)
    module = ask() if ask is not None else None
    if not isinstance(module, nn.Embedding):
        raise SparseTableError(
            f"{type(model).__name__} names no nn.Embedding as its input embeddings: make the layer with "
            "sparse=True in its constructor"
        )
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if p is module.weight]
    if len(names) > 1:
        raise SparseTableError(
            f"{' and '.join(names)} are tied: a table by rows is looked up and nothing else. Untie them "
            "(tie_word_embeddings: false), or leave sparse_tables out"
        )
    module.sparse = True
    return module


def sparse_weights(model: nn.Module) -> list[nn.Parameter]:
    """Weights of the model's tables by rows, and of its embeddings with sparse gradients."""
    of_tables = [table.weight for table in row_tables(model).values()]
    others: list[Any] = [m.weight for m in model.modules() if isinstance(m, nn.Embedding) and m.sparse]
    return of_tables + others
