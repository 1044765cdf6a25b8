"""Cuts, shards and layouts, worked out by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from memtrain.offload.errors import PlanMismatchError
from memtrain.offload.shards import MASTER_KEY, FlatIndex, ShardLayout, StateSpec, StateTensor


def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape, dtype=dtype))


def test_pieces_fill_shards_at_aligned_starts() -> None:
    units = [("u", [("a", parameter(70000)), ("norm", parameter(65535)), ("b", parameter(300, 300))])]
    index = FlatIndex(units, 100_000)  # 48 * 2048 = 98304 elements a shard
    small, *shards = index.shards["u"]
    assert [(p.name, p.start, p.stop) for p in small.pieces] == [("norm", 0, 65535)]
    # a leaves 28304 elements, of which 13 * 2048 = 26624 are aligned; the rest of b, 63376, is the next
    # shard.
    assert [[(p.name, p.start, p.stop) for p in s.pieces] for s in shards] == [
        [("a", 0, 70000), ("b", 0, 26624)],
        [("b", 26624, 90000)],
    ]
    assert [s.name for s in index.all_shards()] == ["u small parameters", "u shard 0", "u shard 1"]


@given(sizes=st.lists(st.integers(1, 400_000), min_size=1, max_size=5), shard=st.integers(2048, 300_000))
def test_pieces_cover_every_element_once(sizes: list[int], shard: int) -> None:
    named = [(str(i), parameter(n)) for i, n in enumerate(sizes)]
    index = FlatIndex([("u", named)], shard)
    for name, tensor in named:
        pieces = [piece for _, piece in index.pieces[name]]
        assert pieces[0].start == 0
        assert pieces[-1].stop == tensor.numel()
        assert all(a.stop == b.start for a, b in pairwise(pieces))
        assert all(piece.start % 2048 == 0 for piece in pieces)
    assert all(s.elements <= shard for s in index.all_shards() if not s.small)


def test_tied_parameters_belong_to_the_first_unit_and_frozen_ones_to_none() -> None:
    tied, frozen = parameter(300, 300), parameter(300, 300).requires_grad_(False)
    index = FlatIndex([("one", [("embed", tied), ("frozen", frozen)]), ("two", [("head", tied)])], 1 << 20)
    assert list(index.parameters) == ["embed"]
    assert index.unit_of == {"embed": "one"}
    assert index.shards["two"] == ()


def test_whole_parameters_are_not_cut() -> None:
    index = FlatIndex(
        [("u", [("a", parameter(300, 300)), ("b", parameter(70000))])], 80_000, whole_parameters=True
    )
    assert [[(p.name, p.shape) for p in s.pieces] for s in index.shards["u"]] == [
        [("a", (300, 300))],
        [("b", (70000,))],
    ]


def test_a_piece_shares_memory_and_version_with_its_parameter() -> None:
    weight = parameter(300, 300)
    index = FlatIndex([("u", [("a", weight)])], 50_000)
    piece = index.pieces["a"][1][1]
    before = weight._version
    piece.weight().fill_(1.0)
    assert weight._version == before + 1
    assert weight.detach().sum().item() == piece.elements == 90000 - 49152


def on_meta() -> nn.Parameter:
    return nn.Parameter(torch.zeros(4, device="meta"))


@pytest.mark.parametrize(
    ("units", "message"),
    [
        ([("u", [("a", nn.Parameter(torch.zeros(300, 300).t()))])], None),
        ([("u", [("a", nn.Parameter(torch.zeros(300, 400).t()))])], "a is not contiguous"),
        ([("u", [("a", parameter(5)), ("a", parameter(6))])], "two parameters are called 'a'"),
        ([("u", [("a", parameter(5))]), ("u", [("b", parameter(5))])], "two units are called 'u'"),
        ([("u", [("a", parameter(5)), ("b", on_meta())])], "b is on meta and a on cpu: all parameters must"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(units: list, message: str | None) -> None:
    with pytest.raises(PlanMismatchError, match=message or "a is not contiguous"):
        FlatIndex(units, 50_000)


def test_a_shard_size_that_cuts_nothing_is_refused() -> None:
    with pytest.raises(PlanMismatchError, match="update_shard_elements must be at least 2048 for a"):
        FlatIndex([("u", [("a", parameter(70000))])], 2047)


def layout_of(elements: int, dtype: torch.dtype, master: bool) -> ShardLayout:
    index = FlatIndex([("u", [("a", parameter(elements, dtype=dtype))])], 1 << 20)
    (shard,) = index.shards["u"]
    tensors = [StateTensor(key=MASTER_KEY, dtype=torch.float32)] if master else []
    tensors += [StateTensor(key="m", dtype=torch.float32)]
    widened = frozenset({"a"}) if master else frozenset()
    return ShardLayout(shard=shard, specs={"a": StateSpec(tensors=tuple(tensors))}, widened=widened)


def test_layout_in_bytes() -> None:
    plain = layout_of(70_000, torch.float32, master=False)
    assert (plain.record_bytes, plain.slot_bytes) == (282_624, 565_248)  # 280000 padded to 69 pages, twice
    wide = layout_of(70_000, torch.bfloat16, master=True)
    assert (wide.record_bytes, wide.slot_bytes) == (565_248, 565_248 + 2 * 143_360)  # 140000 is 35 pages


@pytest.mark.parametrize("elements", [65536, 65537, 70001, 98305])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widening_in_place_equals_float(elements: int, dtype: torch.dtype) -> None:
    layout = layout_of(elements, dtype, master=True)
    (piece,) = layout.shard.pieces
    slot = torch.zeros(layout.slot_bytes, dtype=torch.uint8)
    values = torch.randn(elements, generator=torch.Generator().manual_seed(0)).to(dtype)
    layout.gradient(slot, piece).copy_(values)
    state = layout.state(slot, piece)
    assert torch.equal(layout.widen(slot, piece), values.float())
    assert all(int(tensor.count_nonzero()) == 0 for tensor in state.values())
