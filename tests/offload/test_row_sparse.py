"""Tables whose optimizer state leaves the tier by rows: bit-equal to SparseAdam, no group more than used."""

from __future__ import annotations

import copy
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memtrain.offload.contents import Content
from memtrain.offload.errors import (
    CorruptExtentError,
    OffloadError,
    PlanMismatchError,
    TierFullError,
    TierIOError,
)
from memtrain.offload.io import Fault, FaultyBackend, ThreadPoolBackend
from memtrain.offload.optimizer_probe import UnsupportedOptimizerError
from memtrain.offload.row_records import GROUP_BYTES, RowRecords, RowState
from memtrain.offload.row_sparse import SLOT_BYTES, RowSparseOptimizer
from memtrain.offload.tiers import MemoryStore, NvmeStore, Store
from memtrain.planner.actions import Tier

ROWS, WIDTH = 1000, 64
ROW_BYTES = 2 * WIDTH * 4  # two moments in fp32
GROUP_ROWS = GROUP_BYTES // ROW_BYTES
assert (ROW_BYTES, GROUP_ROWS) == (512, 8)


class Tables(nn.Module):
    """Two tables, the second of an odd width; tokens repeat, so gradients are not coalesced."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Embedding(ROWS, WIDTH, sparse=True, padding_idx=0, dtype=dtype)
        self.two = nn.Embedding(301, 37, sparse=True, dtype=dtype)

    def forward(self, tokens: Tensor, others: Tensor | None) -> Tensor:
        loss = self.one(tokens).float().sin().square().sum()
        return loss if others is None else loss + self.two(others).float().cos().sum()


def batches(steps: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    generator = torch.Generator().manual_seed(1)
    for number in range(steps):
        tokens = torch.randint(0, ROWS, (5, 40), generator=generator)
        tokens[0] = 7
        others = torch.randint(0, 301, (9,), generator=generator)
        yield tokens, None if number == 1 else others


def run(model: nn.Module, optimizer: Any, steps: int, scheduler: Any = None, skip: int = 0) -> None:
    for number, batch in enumerate(batches(steps)):
        if number < skip:
            continue
        model(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()


def assert_equal(model: nn.Module, ours: dict[str, Any], other: nn.Module, plain: dict[str, Any]) -> None:
    for (name, parameter), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(parameter, expected), name
    assert ours["param_groups"] == plain["param_groups"]
    assert ours["state"].keys() == plain["state"].keys()
    for number, state in plain["state"].items():
        assert ours["state"][number].keys() == state.keys()
        for key, value in state.items():
            found = ours["state"][number][key]
            assert torch.equal(found, value) if isinstance(value, Tensor) else found == value, (number, key)


@contextmanager
def open_store(directory: Path | None = None, **options: Any) -> Iterator[Store]:
    store: Store = (
        MemoryStore(Tier.HOST, 16 << 20, **options)
        if directory is None
        else NvmeStore(directory, 16 << 20, direct="allow_buffered", **options)
    )
    with store:
        yield store


@pytest.mark.filterwarnings("ignore:.*goes through the page cache")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("slot_bytes", [GROUP_BYTES, SLOT_BYTES])
def test_equals_sparse_adam(
    dtype: torch.dtype, on_disk: bool, slot_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memtrain.offload.row_sparse.SLOT_BYTES", slot_bytes)

    def schedule(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)

    model, other = Tables(dtype), Tables(dtype)
    plain = torch.optim.SparseAdam(other.parameters(), lr=0.1)
    run(other, plain, 6, schedule(plain))
    with open_store(tmp_path if on_disk else None) as store:
        inner = torch.optim.SparseAdam(model.parameters(), lr=0.1)
        optimizer = RowSparseOptimizer(inner, store=store, names=["one", "two"])
        assert optimizer.param_groups is inner.param_groups
        run(model, optimizer, 6, schedule(optimizer))
        assert_equal(model, optimizer.state_dict(), other, plain.state_dict())
        assert not inner.state
        optimizer.close()
        assert store.used_bytes == 0


def one_step(model: Tables, optimizer: Any, rows: list[int]) -> None:
    model(torch.tensor([rows]), None).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_only_groups_that_are_used_are_read_and_written() -> None:
    model = Tables()
    with open_store() as store:
        inner = torch.optim.SparseAdam([model.one.weight])
        optimizer = RowSparseOptimizer(inner, store=store)
        assert store.used_bytes == -(-ROWS // GROUP_ROWS) * GROUP_BYTES  # the last group is a whole one
        # rows, groups they are in, groups that hold something already
        for rows, used, known in [([1, 2, 7], 1, 0), ([7, 8, 999], 3, 1), ([5, 999, 999], 2, 2)]:
            before, changed = store.statistics(), optimizer.changed_bytes
            written = store.written_bytes()[Content.STATE]
            one_step(model, optimizer, rows)
            after = store.statistics()
            assert store.written_bytes()[Content.STATE] - written == used * GROUP_BYTES
            assert after.bytes_written - before.bytes_written == used * GROUP_BYTES
            assert after.bytes_read - before.bytes_read == known * GROUP_BYTES
            assert optimizer.changed_bytes - changed == len(set(rows)) * ROW_BYTES
        optimizer.close()


def test_a_gradient_without_rows_counts_as_a_step() -> None:
    model, other = Tables(), Tables()
    plain = torch.optim.SparseAdam([other.one.weight], lr=0.1)
    with open_store() as store:
        optimizer = RowSparseOptimizer(torch.optim.SparseAdam([model.one.weight], lr=0.1), store=store)
        for rows in [[3, 4], [0, 0], [3], [0]]:  # 0 is padding, which has no gradient
            one_step(other, plain, rows)
            one_step(model, optimizer, rows)
        assert_equal(model, optimizer.state_dict(), other, plain.state_dict())
        assert optimizer.state_dict()["state"][0]["step"] == 4
        optimizer.close()


def test_state_comes_and_goes_as_the_plain_optimizer_has_it() -> None:
    model, other = Tables(), Tables()
    plain = torch.optim.SparseAdam(other.parameters(), lr=0.1)
    run(other, plain, 3)
    taken, weights = copy.deepcopy(plain.state_dict()), copy.deepcopy(other.state_dict())
    run(other, plain, 6, skip=3)
    model.load_state_dict(weights)
    with open_store() as store:
        optimizer = RowSparseOptimizer(torch.optim.SparseAdam(model.parameters(), lr=0.5), store=store)
        run(model, optimizer, 1)  # whatever it had before is gone
        model.load_state_dict(weights)
        optimizer.load_state_dict(taken)
        assert_equal(model, optimizer.state_dict(), model, taken)
        run(model, optimizer, 6, skip=3)
        assert_equal(model, optimizer.state_dict(), other, plain.state_dict())
        again = torch.optim.SparseAdam(model.parameters(), lr=0.5)
        again.load_state_dict(optimizer.state_dict())  # and back
        optimizer.close()


def test_loading_writes_rows_that_hold_something_alone() -> None:
    model = Tables()
    plain = torch.optim.SparseAdam([model.one.weight])
    one_step(model, plain, [33, 34, 500])
    with open_store() as store:
        optimizer = RowSparseOptimizer(torch.optim.SparseAdam([model.one.weight]), store=store)
        optimizer.load_state_dict(plain.state_dict())
        assert store.written_bytes()[Content.STATE] == 2 * GROUP_BYTES
        optimizer.close()


class EveryRow(torch.optim.SparseAdam):
    """Decays what was not used."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.9)


class Counted(torch.optim.SparseAdam):
    """Looks at how many rows there are."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["exp_avg"].mul_(1.0 - 1.0 / len(parameter))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (torch.optim.AdamW, r"AdamW.step\(\) fails on a sparse gradient .*: use torch.optim.SparseAdam"),
        (torch.optim.SGD, "SGD keeps no state of a table's rows"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "SGD keeps state 'momentum_buffer'"),
        (EveryRow, "EveryRow changes rows that have no gradient"),
        (Counted, "Counted gives other numbers when rows are stepped apart, or touches rows"),
    ],
)
def test_optimizers_that_touch_other_rows_are_refused(make: Any, said: str) -> None:
    with open_store() as store:
        with pytest.raises(UnsupportedOptimizerError, match=said):
            RowSparseOptimizer(make(Tables().parameters()), store=store)
        assert store.used_bytes == 0


def sparse(indices: list[list[int]], values: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor(indices), values, (10, 4), check_invariants=True)


def test_gradients_and_tables_that_do_not_fit() -> None:
    weight = nn.Parameter(torch.zeros(10, 4))
    with open_store() as store:
        optimizer = RowSparseOptimizer(torch.optim.SparseAdam([weight]), store=store, names=["tokens"])
        weight.grad = torch.ones(10, 4)
        with pytest.raises(PlanMismatchError, match=r"the gradient of tokens is dense .*sparse=True"):
            optimizer.step()
        weight.grad = sparse([[1], [2]], torch.tensor([3.0]))
        with pytest.raises(PlanMismatchError, match="tokens is sparse in 2 dimensions"):
            optimizer.step()
        weight.grad = None
        optimizer.step()  # nothing to do, and nothing has failed
        other = {"state": {0: {"step": 1, "exp_avg": torch.zeros(9, 4)}}, "param_groups": []}
        with pytest.raises(
            PlanMismatchError, match=r"'exp_avg' of tokens is torch.float32 \(9, 4\), expected"
        ):
            optimizer.load_state_dict(other)
        optimizer.close()
        with pytest.raises(PlanMismatchError, match=r"table 0 has shape \(3,\)"):
            RowSparseOptimizer(torch.optim.SparseAdam([nn.Parameter(torch.zeros(3))]), store=store)
        used = torch.optim.SparseAdam([weight])
        weight.grad = sparse([[1]], torch.ones(1, 4))
        used.step()
        with pytest.raises(PlanMismatchError, match=r"has state already: .*load_state_dict"):
            RowSparseOptimizer(used, store=store)
        assert store.used_bytes == 0


def test_no_room() -> None:
    with MemoryStore(Tier.HOST, 64 << 10) as store:
        with pytest.raises(TierFullError, match="optimizer state of table 0"):
            RowSparseOptimizer(torch.optim.SparseAdam(Tables().parameters()), store=store)
        assert store.used_bytes == 0


@pytest.mark.parametrize(
    ("request_number", "fault"), [(0, Fault(error=errno.ENOSPC)), (1, Fault(error=errno.EIO))]
)
def test_a_transfer_that_fails_is_told_and_a_checkpoint_mends_it(request_number: int, fault: Fault) -> None:
    backend = FaultyBackend(ThreadPoolBackend(2), {request_number: fault})
    model, other = Tables(), Tables()
    plain = torch.optim.SparseAdam([other.one.weight])
    with open_store(backend=backend) as store:
        optimizer = RowSparseOptimizer(torch.optim.SparseAdam([model.one.weight]), store=store)
        weights = copy.deepcopy(model.state_dict())
        if request_number:
            one_step(model, optimizer, [3])
        with pytest.raises(TierIOError, match="optimizer state of table 0"):
            one_step(model, optimizer, [3])
        with pytest.raises(OffloadError, match="an earlier update failed half-way"):
            one_step(model, optimizer, [3])
        model.load_state_dict(weights)
        model.zero_grad()
        optimizer.load_state_dict(plain.state_dict())
        for rows in ([3], [3, 900]):
            one_step(other, plain, rows)
            one_step(model, optimizer, rows)
        assert_equal(model, optimizer.state_dict(), other, plain.state_dict())
        optimizer.close()


def test_what_was_changed_on_the_tier_is_found() -> None:
    model = Tables()
    store = MemoryStore(Tier.HOST, 1 << 20)
    with store:
        optimizer = RowSparseOptimizer(torch.optim.SparseAdam([model.one.weight]), store=store)
        one_step(model, optimizer, [40])
        store.slab.buffer[40 // GROUP_ROWS * GROUP_BYTES + 8] ^= 1
        one_step(model, optimizer, [3])
        with pytest.raises(CorruptExtentError, match="optimizer state of table 0"):
            one_step(model, optimizer, [41])
        optimizer.close()


def test_a_forked_child_is_refused() -> None:
    with open_store() as store:
        optimizer = RowSparseOptimizer(torch.optim.SparseAdam(Tables().parameters()), store=store)
        child = os.fork()
        if child == 0:
            try:
                optimizer.step()
            except OffloadError as error:
                os._exit(0 if "forked child" in str(error) else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        optimizer.close()


def test_groups_are_pages_and_rows_may_be_larger() -> None:
    state = [
        RowState(key="m", dtype=torch.bfloat16, initial=0.5),
        RowState(key="v", dtype=torch.float32, initial=0.0),
    ]
    with open_store() as store:
        odd = RowRecords(store, "odd", (301, 37), state)  # 222 bytes a row
        assert (odd.row_bytes, odd.group_rows, odd.groups) == (222, 18, 17)
        assert odd.group_bytes == 4096  # 18 * 74 to a cache line is 1344, and 18 * 148 behind it
        wide = RowRecords(store, "wide", (3, 4096), state)  # 24 KiB a row
        assert (wide.group_rows, wide.group_bytes) == (1, 24576)
        slot = torch.zeros(8 * wide.group_bytes, dtype=torch.uint8)
        assert wide.read([2], slot) == []
        views = wide.views(1, slot)
        assert views["m"].shape == (1, 1, 4096)
        assert bool((views["m"] == 0.5).all())
        odd.close()
        wide.close()
