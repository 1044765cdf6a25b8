"""Rows that were stored and rows that were computed again make up the tensor that was saved."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from memtrain.offload.token_rows import (
    CutStorage,
    RowAxis,
    StorageRows,
    all_bytes,
    empty_in_order,
    memory_order,
    token_count,
)
from memtrain.offload.unmoved import Unmoved


def cut(whole: torch.Tensor, axis: RowAxis, tokens: int, first: int) -> torch.Tensor:
    """Store the rows behind ``first`` of the storage, give the others again, and join them."""
    rows = StorageRows.of(whole, axis, tokens)
    assert rows is not None
    rest = rows.view(all_bytes(whole))[:, first:].clone()
    storage = CutStorage(rows, first, whole.untyped_storage().nbytes(), rest)
    saved = storage.tensor(whole, axis)
    assert not saved.is_there
    part = axis.rows(whole, tokens, 0, first).clone().flatten(*_folded(axis, whole, tokens))
    saved.first_rows = Unmoved.of(part)
    return saved.take(lambda packed: packed)


def _folded(axis: RowAxis, whole: torch.Tensor, tokens: int) -> tuple[int, int]:
    return (axis.dim, axis.dim + (whole.shape[axis.dim] != tokens))


@seed(1)
@settings(max_examples=200, deadline=None)
@given(
    order=st.permutations(range(4)),
    sizes=st.tuples(*[st.integers(1, 3)] * 3),
    tokens=st.integers(2, 6),
    place=st.integers(0, 3),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.bool]),
    data=st.data(),
)
def test_any_order_in_memory(
    order: list[int], sizes: tuple[int, ...], tokens: int, place: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    first = data.draw(st.integers(1, tokens - 1))
    shape = [*sizes[:place], tokens, *sizes[place:]]
    dense = torch.empty([shape[dim] for dim in order])
    whole = torch.randn_like(dense).to(dtype).permute(*(order.index(dim) for dim in range(4)))
    found = cut(whole, RowAxis(dim=place), tokens, first)
    assert torch.equal(found, whole)
    assert found.stride() == whole.stride()


@pytest.mark.parametrize("leading", [False, True])
def test_tokens_folded_with_rows_of_the_batch(leading: bool) -> None:
    whole = torch.randn(3 * 5, 4)
    axis = RowAxis(dim=0, leading=leading)
    split = whole.view(5, 3, 4) if leading else whole.view(3, 5, 4)
    expected = split[1:3] if leading else split[:, 1:3]
    assert torch.equal(axis.rows(whole, 5, 1, 3), expected)
    assert axis.resized(whole.shape, 5, 2) == (6, 4)
    assert torch.equal(cut(whole, axis, 5, 2), whole)


def test_views_share_one_storage_again() -> None:
    qkv = torch.randn(2, 5, 12)
    parts = qkv.chunk(3, -1)
    axis = RowAxis(dim=1)
    rows = StorageRows.of(parts[1], axis, 5)
    assert rows == StorageRows(tokens=5, row_bytes=48) == StorageRows.of(qkv.view(10, 12), RowAxis(dim=0), 5)
    storage = CutStorage(rows, 2, qkv.nbytes, rows.view(all_bytes(qkv))[:, 2:].clone())
    saved = [storage.tensor(part, axis) for part in parts]
    for one, part in zip(saved, parts, strict=True):
        one.first_rows = Unmoved.of(part[:, :2].clone())
    found = [one.take(lambda packed: packed) for one in saved]
    assert all(torch.equal(one, part) for one, part in zip(found, parts, strict=True))
    assert len({one.untyped_storage().data_ptr() for one in found}) == 1
    assert not any(one.is_there for one in saved)


def test_what_is_in_no_regular_pattern_is_not_cut_by_storage() -> None:
    axis = RowAxis(dim=0)
    assert StorageRows.of(torch.randn(1, 4).expand(5, 4), axis, 5) is None  # one row for all tokens
    assert StorageRows.of(torch.randn(7, 4)[1:6], axis, 5) is None  # two rows that are no tokens
    assert (
        StorageRows.of(torch.randn(100).as_strided((5, 3), (10, 4), 2), axis, 5) is None
    )  # over a row's end


def test_dimensions_in_the_order_of_another_tensor() -> None:
    like = torch.empty(2, 5, 4, 3).transpose(1, 2)
    assert memory_order(like) == [0, 2, 1, 3]
    new = empty_in_order(like, (2, 4, 7, 3))
    assert new.shape == (2, 4, 7, 3)
    assert new.stride() == (84, 3, 12, 1)


def test_tokens_are_counted_in_the_first_tensor() -> None:
    assert token_count((None, torch.empty(2, 7, 4)), {"mask": torch.empty(3, 3)}) == 7
    assert token_count((), {"hidden": torch.empty(5, 4)}) == 5
    assert token_count((torch.empty(4),), {}) == token_count((1,), {}) == 0
