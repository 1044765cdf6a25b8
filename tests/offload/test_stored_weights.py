"""Weights on their way to a tier: pieces, conversion, and what happens when a write fails."""

import errno

import pytest
import torch

from memtrain.offload import stored_weights
from memtrain.offload.errors import OffloadError, TierFullError, TierIOError
from memtrain.offload.io import Fault, FaultyBackend, ThreadPoolBackend
from memtrain.offload.stored_weights import StoredWeights, room_bytes
from memtrain.offload.tensorfile import Entry
from memtrain.offload.tiers import NvmeStore
from tests.offload.tier_stores import U

PIECE = 2 * U  # bytes, in these tests


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(stored_weights, "PIECE_BYTES", PIECE)


@pytest.fixture
def weights(tmp_path):
    with StoredWeights(NvmeStore(tmp_path, 64 * U)) as opened:
        yield opened


def entry(name, dtype, *shape):
    return Entry(name=name, dtype=dtype, shape=shape)


@pytest.mark.parametrize("elements", [1, 2047, 2048, 2049, 4096, 4097, 9000])
def test_what_is_put_is_read(weights, elements):
    values = torch.randn(elements)
    weights.put("w", values)
    weights.finish()
    assert torch.equal(weights.read("w"), values)
    chunks = -(-elements * 4 // PIECE)
    assert len(weights.extents["w"].chunks) == chunks


def test_an_empty_weight_has_a_place_and_no_bytes(weights):
    weights.put("none", torch.empty(0, 3))
    weights.finish()
    assert weights.read("none").shape == (0, 3)


def test_parts_are_joined_and_converted(weights):
    values = torch.randn(3, 5000)
    flat = values.view(-1)
    parts = [flat[:1], flat[1:1], flat[1:4099], flat[4099:]]
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        weights.put_parts(entry(f"to {dtype}", dtype, 3, 5000), parts)
    weights.finish()
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(weights.read(f"to {dtype}"), values.to(dtype))


def test_the_source_may_change_at_once(weights):
    values = torch.randn(9000)
    kept = values.clone()
    weights.put("w", values)
    values.zero_()
    weights.finish()
    assert torch.equal(weights.read("w"), kept)


def test_a_strided_weight_is_stored_in_its_logical_order(weights):
    values = torch.randn(30, 70).t()
    weights.put("w", values)
    weights.finish()
    assert torch.equal(weights.read("w"), values)


@pytest.mark.parametrize("given", [4095, 4097, 9000, 0])
def test_the_number_of_elements_must_be_right(weights, given):
    with pytest.raises(OffloadError, match=rf"w float32 \[4096\] has 16384 bytes, {4 * given} were given"):
        weights.put_parts(entry("w", torch.float32, 4096), [torch.zeros(given)])
    assert not weights.extents
    weights.finish()
    assert weights.store.used_bytes == 0


def test_each_weight_is_written_once(weights):
    weights.put("w", torch.zeros(3))
    with pytest.raises(OffloadError, match="w was written before"):
        weights.put("w", torch.zeros(3))


def test_no_room_is_a_typed_error_and_takes_none(weights):
    with pytest.raises(TierFullError, match="tensor weight large needs 266240 bytes on nvme"):
        weights.put("large", torch.zeros(65 * U, dtype=torch.uint8))
    assert weights.store.used_bytes == 0


def test_room_is_counted_in_whole_pages(tmp_path):
    entries = [entry("a", torch.bfloat16, 2049), entry("b", torch.float32), entry("c", torch.float32, 0, 4)]
    assert room_bytes(entries) == 2 * U + U + U
    with StoredWeights(NvmeStore(tmp_path, room_bytes(entries))) as weights:
        for one in entries:
            weights.put(one.name, torch.zeros(one.shape, dtype=one.dtype))
        weights.finish()
        assert weights.store.used_bytes == 4 * U


def test_a_source_that_fails_leaves_nothing(weights):
    def parts():
        yield torch.zeros(3000)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        weights.put_parts(entry("w", torch.float32, 6000), parts())
    weights.finish()
    assert not weights.extents
    assert weights.store.used_bytes == 0
    weights.put("w", torch.ones(6000))
    weights.finish()
    assert torch.equal(weights.read("w"), torch.ones(6000))


def put_and_finish(weights, values):
    weights.put("w", values)
    weights.finish()


@pytest.mark.parametrize("elements", [100, 20000])
def test_a_failed_write_is_told_with_the_weight_s_name(tmp_path, elements):
    backend = FaultyBackend(ThreadPoolBackend(1), {0: Fault(error=errno.ENOSPC)})
    with StoredWeights(NvmeStore(tmp_path, 64 * U, backend=backend)) as weights:
        with pytest.raises(TierIOError, match="tensor weight w") as raised:
            put_and_finish(weights, torch.zeros(elements))
        assert raised.value.errno == errno.ENOSPC


def test_two_pieces_of_memory_and_none_when_it_is_finished(weights):
    weights.put("w", torch.zeros(9000))
    assert weights._slab is not None
    assert weights._slab.nbytes == 2 * PIECE
    weights.finish()
    assert weights._slab is None


def test_coded_weights_are_read_as_they_were_put(tmp_path, monkeypatch):
    pytest.importorskip("zstandard")
    from memtrain.optim.storage.lossless import ExponentCodec

    monkeypatch.setattr(stored_weights, "PIECE_BYTES", 8 << 20)
    values = {"large": torch.randn(5 << 20), "small": torch.randn(70000).bfloat16()}
    entries = [entry(name, value.dtype, *value.shape) for name, value in values.items()]
    room = room_bytes(entries, ExponentCodec())
    assert room > room_bytes(entries)
    with StoredWeights(NvmeStore(tmp_path, room), ExponentCodec()) as weights:
        for name, value in values.items():
            weights.put(name, value)
        weights.finish()
        assert weights.store.used_bytes == room
        assert weights.store.statistics().bytes_written < 0.9 * room
        for name, value in values.items():
            assert torch.equal(weights.read(name), value)
            weights.drop(name)
        weights.finish()
        assert weights.store.used_bytes == 0
