"""Embeddings whose weights lie on a tier by rows: bit-equal to those in memory, and no other group moves."""

from __future__ import annotations

import copy
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memtrain.offload.contents import Content
from memtrain.offload.errors import (
    OffloadError,
    PlanMismatchError,
    TierFullError,
    TierIOError,
    WeightAwayError,
)
from memtrain.offload.io import Fault, FaultyBackend, ThreadPoolBackend
from memtrain.offload.row_records import GROUP_BYTES, finish
from memtrain.offload.row_sparse import RowSparseOptimizer
from memtrain.offload.row_table import RowTable
from memtrain.offload.tiers import MemoryStore, NvmeStore
from memtrain.planner.actions import Tier

ROWS, WIDTH = 1000, 64
GROUP_ROWS = GROUP_BYTES // (4 * WIDTH)  # 16


def embedding(dtype: torch.dtype = torch.float32, padding: int | None = 0) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(ROWS, WIDTH, sparse=True, padding_idx=padding, dtype=dtype)


def batches(count: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        tokens = torch.randint(0, ROWS, (4, 30), generator=generator)
        tokens[0] = 7
        yield tokens


def train(table: nn.Module, optimizer: Any, steps: int = 4) -> list[Tensor]:
    """Two micro-batches a step, the first of which uses the table twice; gradients of the first step."""
    found = []
    for step, tokens in enumerate(batches(2 * steps)):
        loss = table(tokens).float().sin().square().sum()
        if step % 2 == 0:
            loss = loss + table(tokens.flip(0)[:, :3]).float().cos().sum()
        loss.backward()
        if step % 2:
            gradient = table.weight.grad.coalesce()
            found += [gradient.indices().clone(), gradient.values().clone(), loss.detach()]
            optimizer.step()
            optimizer.zero_grad()
    return found


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    made = MemoryStore(Tier.HOST, 8 << 20) if request.param == "memory" else NvmeStore(tmp_path, 8 << 20)
    with made:
        yield made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slot_bytes", [GROUP_BYTES, 1 << 20])
def test_training_is_bit_equal(
    store: Any, dtype: torch.dtype, slot_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memtrain.offload.row_table.SLOT_BYTES", slot_bytes)
    plain = embedding(dtype)
    table = RowTable.of(embedding(dtype), store=store)
    expected = train(plain, torch.optim.SparseAdam(plain.parameters(), lr=0.1))
    optimizer = RowSparseOptimizer(
        torch.optim.SparseAdam(table.parameters(), lr=0.1), store=store, tables=[table]
    )
    found = train(table, optimizer)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one, other), number
    home = table.to_embedding()
    assert torch.equal(home.weight, plain.weight)
    assert home.sparse
    assert home.padding_idx == 0
    with torch.no_grad():
        tokens = next(batches(1))
        assert torch.equal(table(tokens), plain(tokens))
    optimizer.close()
    table.close()
    table.close()
    assert store.used_bytes == 0


def test_only_groups_that_are_used_are_read_and_written() -> None:
    with MemoryStore(Tier.HOST, 8 << 20) as store:
        table = RowTable.of(embedding(padding=None), store=store)
        optimizer = RowSparseOptimizer(
            torch.optim.SparseAdam([table.weight]), store=store, tables=[table], names=["table"]
        )
        assert store.written_bytes()[Content.WEIGHTS] == -(-ROWS // GROUP_ROWS) * GROUP_BYTES
        before, read = store.written_bytes(), store.statistics().bytes_read
        table(torch.tensor([1, 15, 16, 1, 999])).sum().backward()
        assert store.statistics().bytes_read - read == 3 * GROUP_BYTES
        optimizer.step()
        after = store.written_bytes()
        assert after[Content.WEIGHTS] - before[Content.WEIGHTS] == 3 * GROUP_BYTES
        assert table.changed_bytes == 4 * WIDTH * 4
        optimizer.close()
        table.close()


def test_the_weight_has_no_bytes_and_says_where_they_are() -> None:
    with MemoryStore(Tier.HOST, 8 << 20) as store:
        table = RowTable.of(embedding(), store=store, name="embed_tokens.weight")
        assert table.weight.shape == (ROWS, WIDTH)
        assert table.weight.untyped_storage().nbytes() == 0
        with pytest.raises(WeightAwayError, match=r"embed_tokens.weight, which are on host by rows: .*fetch"):
            table.weight.sum()
        rows = torch.tensor([3, 999])
        assert torch.equal(table.fetch(rows), embedding().weight[rows])
        table.close()


def test_a_table_that_was_never_whole() -> None:
    whole = embedding().weight.detach()
    with MemoryStore(Tier.HOST, 8 << 20) as store:
        table = RowTable(ROWS, WIDTH, whole.double().split([1, 700, 299]), store=store)
        assert torch.equal(torch.cat([part.clone() for part in table.parts()]), whole)
        table.load([2 * whole])
        assert torch.equal(table.to_embedding().weight, 2 * whole)
        for parts, given in (([whole, whole[:1]], 1001), ([whole[1:]], 999)):
            with pytest.raises(PlanMismatchError, match=f"has {ROWS} rows, {given} were given"):
                RowTable(ROWS, WIDTH, parts, store=store)
        table.close()
        assert store.used_bytes == 0


def test_a_frozen_table_has_no_gradient() -> None:
    with MemoryStore(Tier.HOST, 8 << 20) as store:
        frozen = embedding().requires_grad_(False)
        table = RowTable.of(frozen, store=store)
        layer = nn.Linear(WIDTH, 2)
        layer(table(torch.tensor([4, 5]))).sum().backward()
        assert table.weight.grad is None
        assert not table.to_embedding().weight.requires_grad
        table.close()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "sparse=False: its gradient is dense"),
        ({"sparse": True, "max_norm": 1.0}, "max_norm"),
        ({"sparse": True, "scale_grad_by_freq": True}, "scale_grad_by_freq"),
    ],
)
def test_embeddings_that_cannot_leave(options: dict[str, Any], said: str) -> None:
    with (
        MemoryStore(Tier.HOST, 8 << 20) as store,
        pytest.raises(PlanMismatchError, match=f"cannot leave by rows with {said}"),
    ):
        RowTable.of(nn.Embedding(10, 4, **options), store=store)


def test_a_padding_row_may_be_counted_from_the_end() -> None:
    rows, tokens = torch.ones(8, 4), torch.tensor([7, 3])
    plain = nn.Embedding(8, 4, padding_idx=-1, sparse=True, _weight=rows)
    with MemoryStore(Tier.HOST, 8 << 20) as store:
        table = RowTable(8, 4, [rows], store=store, padding_idx=-1)
        for each in (plain, table):
            each(tokens).sin().sum().backward()
        assert table.weight.grad is not None
        assert torch.equal(table.weight.grad.to_dense(), plain.weight.grad.to_dense())  # type: ignore[union-attr]
        assert table.to_embedding().padding_idx == plain.padding_idx == 7
        for wrong in (8, -9):
            with pytest.raises(PlanMismatchError, match=f"padding_idx of table.weight is {wrong}, it has 8"):
                RowTable(8, 4, [rows], store=store, padding_idx=wrong)


def test_rows_in_another_order_are_refused() -> None:
    with MemoryStore(Tier.HOST, 8 << 20) as store:
        table = RowTable.of(embedding(), store=store)
        for rows in ([0, 100, 50, 200], [5, 5, 7], [5, 2000, 10]):
            with pytest.raises(IndexError, match="in order, each once"):
                table.fetch(torch.tensor(rows))
            with pytest.raises(IndexError, match="in order, each once"):
                table.put(torch.tensor(rows), torch.zeros(len(rows), WIDTH))


def test_tokens_that_are_no_rows_and_no_room() -> None:
    with MemoryStore(Tier.HOST, 300 << 10) as store:
        table = RowTable.of(embedding(), store=store)
        for token in (-1, ROWS):
            with pytest.raises(IndexError, match="has rows 0 to 999"):
                table(torch.tensor([5, token]))
        assert table(torch.empty((2, 0), dtype=torch.int64)).shape == (2, 0, WIDTH)
        with pytest.raises(TierFullError, match=r"weight other"):
            RowTable.of(embedding(), store=store, name="other")
        table.close()


def test_a_failed_transfer_is_named_and_loading_mends_it() -> None:
    backend = FaultyBackend(ThreadPoolBackend(2))
    plain = embedding()
    with MemoryStore(Tier.HOST, 8 << 20, backend=backend) as store:
        table = RowTable.of(embedding(), store=store)
        optimizer = RowSparseOptimizer(torch.optim.SparseAdam([table.weight]), store=store, tables=[table])
        expected, loaded = plain.weight.detach().clone(), copy.deepcopy(optimizer.state_dict())
        table(torch.tensor([5])).sum().backward()
        # the state's group is new; the weight's is read, and its write fails
        for number in range(backend.submitted + 1, backend.submitted + 5):
            backend.plan[number] = Fault(error=errno.ENOSPC)
        with pytest.raises(TierIOError, match=r"weight table\.weight"):
            optimizer.step()
        backend.plan.clear()
        with pytest.raises(OffloadError, match="an earlier update failed"):
            optimizer.step()
        table.load([expected])
        optimizer.load_state_dict(loaded)
        optimizer.zero_grad()
        steps = train(table, optimizer, 1), train(plain, torch.optim.SparseAdam(plain.parameters()), 1)
        assert all(torch.equal(a, b) for a, b in zip(*steps, strict=True))
        assert torch.equal(table.to_embedding().weight, plain.weight)
        optimizer.close()
        table.close()


def test_hooks_of_the_weight_see_its_gradient_before_it_is_added() -> None:
    plain = embedding()
    seen: list[Tensor] = []
    with MemoryStore(Tier.HOST, 8 << 20) as store:
        table = RowTable.of(embedding(), store=store)
        for each in (plain, table):
            weight: Any = each.weight
            weight.register_hook(lambda gradient: gradient * 2)
            weight.register_hook(lambda gradient: seen.append(gradient.coalesce()))
            each(torch.tensor([3, 5, 3])).sin().sum().backward()
            each(torch.tensor([5])).sin().sum().backward()
        assert torch.equal(table.weight.grad.to_dense(), plain.weight.grad.to_dense())  # type: ignore[union-attr]
        assert [gradient._nnz() for gradient in seen] == [2, 1, 2, 1]
        table.close()


def test_rows_in_hand_are_given_up_when_they_are_looked_up() -> None:
    with MemoryStore(Tier.HOST, 8 << 20) as store:
        table = RowTable.of(embedding(), store=store)
        found = table(torch.tensor([3, 5, 3]))
        assert found.grad_fn is not None
        held = found.grad_fn.next_functions[0][0].variable
        assert held.shape == (2, WIDTH)
        assert held.untyped_storage().nbytes() == 0
        table.close()


def test_a_table_that_is_closed_says_so() -> None:
    with MemoryStore(Tier.HOST, 8 << 20) as store:
        table = RowTable.of(embedding(), store=store)
        optimizer = RowSparseOptimizer(torch.optim.SparseAdam([table.weight]), store=store, tables=[table])
        optimizer.close()
        table.close()
        of_state: list[Any] = [optimizer.step, optimizer.state_dict]
        for use in of_state:
            with pytest.raises(OffloadError, match="the row-sparse optimizer is closed"):
                use()
        of_rows: list[Any] = [lambda: table(torch.tensor([3])), table.bring_home, table.to_embedding]
        for use in of_rows:
            with pytest.raises(OffloadError, match=r"the table of table\.weight is closed"):
                use()


def test_an_interrupt_leaves_no_transfer_under_way() -> None:
    waits: list[str] = []

    class Interrupted:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait(self) -> None:
            waits.append(self.name)
            if waits == ["first"]:
                raise KeyboardInterrupt

    tickets: list[Any] = [Interrupted("first"), Interrupted("second")]
    with pytest.raises(KeyboardInterrupt):
        finish(tickets)
    assert waits == ["first", "first", "second"]
