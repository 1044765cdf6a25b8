import pytest
from hypothesis import given
from hypothesis import strategies as st

from memtrain.offload.errors import ExtentStateError, TierIOError
from memtrain.offload.extents import Chunk, Extent, FreeList, pieces, reserved
from memtrain.planner.actions import Tier

U = 4096


def extent(nbytes=4 * U, offset=0, name="w", **kw):
    return Extent(
        name=name,
        tier=Tier.NVME,
        store_id="s",
        arena_offset=offset,
        nbytes=nbytes,
        reserved_bytes=nbytes,
        **kw,
    )


def publish(e, *ranges, generation=1):
    for start, end in ranges:
        e.publish(Chunk(start, end - start, generation, U, ()))


def test_free_list_takes_the_best_fit_and_merges_neighbours():
    space = FreeList(10 * U)
    a, b, c, d = (space.allocate(n * U) for n in (3, 2, 1, 4))
    assert (a, b, c, d) == (0, 3 * U, 5 * U, 6 * U)
    assert space.allocate(U) is None
    space.free(a, 3 * U)
    space.free(c, U)
    assert space.allocate(U) == 5 * U  # the hole of one unit, not the earlier one of three
    space.free(5 * U, U)
    space.free(b, 2 * U)
    assert (space.free_bytes, space.largest_bytes) == (6 * U, 6 * U)
    space.free(d, 4 * U)
    assert space.allocate(10 * U) == 0


def test_free_list_refuses_what_is_not_allocated():
    space = FreeList(4 * U)
    space.allocate(2 * U)
    space.free(0, U)
    for run in ((0, U), (U, 2 * U), (2 * U, U), (4 * U, U)):
        with pytest.raises(ValueError, match="not allocated"):
            space.free(*run)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 6), st.integers(0, 30)), max_size=80))
def test_free_list_never_overlaps_and_counts_right(steps):
    space, held = FreeList(16), {}
    for take, size, which in steps:
        if take:
            offset = space.allocate(size)
            if offset is None:
                assert space.largest_bytes < size
            else:
                held[offset] = size
        elif held:
            offset = sorted(held)[which % len(held)]
            space.free(offset, held.pop(offset))
        units = [u for start, size in held.items() for u in range(start, start + size)]
        assert len(units) == len(set(units))
        assert space.free_bytes == 16 - len(units)
        gaps = "".join("#" if u in units else "." for u in range(16)).split("#")
        assert space.largest_bytes == max(map(len, gaps))


def test_pieces_and_reserved_sizes():
    assert pieces(10, 4) == [(0, 4), (4, 4), (8, 2)]
    assert pieces(0, 4) == []
    assert [reserved(n, U) for n in (0, 1, U, U + 1)] == [U, U, U, 2 * U]


def test_covering_wants_whole_consecutive_chunks():
    e = extent()
    publish(e, (0, U), (U, 2 * U), (3 * U, 4 * U))
    assert [c.offset for c in e.covering(0, 2 * U)] == [0, U]
    assert [c.offset for c in e.covering(3 * U, U)] == [3 * U]
    for start, size in ((0, 3 * U), (0, U + 1), (U, U - 1), (2 * U, U)):
        with pytest.raises(
            ExtentStateError, match=r"tensor w on nvme.*Written chunks: 0\.\.4096, 4096\.\.8192"
        ):
            e.covering(start, size)


def test_never_written_is_said_so():
    with pytest.raises(
        ExtentStateError, match=r"tensor w on nvme: bytes 0..4096 cannot be read: the extent was never"
    ):
        extent().covering(0, U)


def test_a_failed_write_is_remembered_until_it_is_repeated():
    e = extent()
    e.failures[U] = TierIOError("disk died")
    publish(e, (0, U))
    with pytest.raises(ExtentStateError, match="last write failed: disk died"):
        e.covering(U, U)
    e.retract(U, U)
    publish(e, (U, 2 * U), generation=2)
    assert len(e.covering(0, 2 * U)) == 2
    assert e.generation == 2


def test_a_write_may_not_cut_a_chunk():
    e = extent()
    publish(e, (U, 3 * U))
    e.check_replaceable(0, 4 * U)
    e.check_replaceable(U, 2 * U)
    e.check_replaceable(3 * U, U)
    for start, size in ((U, U), (2 * U, 2 * U), (0, 2 * U)):
        with pytest.raises(ExtentStateError, match=r"cuts the chunk 4096\.\.12288"):
            e.check_replaceable(start, size)
    e.retract(0, 4 * U)
    assert e.chunks == {}


def test_the_seed_tells_tensor_generation_offset_place_and_type_apart():
    base = extent()
    others = [extent(name="v"), extent(offset=U), extent(dtype="bfloat16"), extent(shape=(2,))]
    seeds = {base.seed(1, 0), base.seed(2, 0), base.seed(1, U), *(o.seed(1, 0) for o in others)}
    assert len(seeds) == 7
    assert all(0 <= seed < 1 << 64 for seed in seeds)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 15), st.integers(0, 16)), max_size=40))
def test_chunks_are_found_as_a_look_at_each_of_them_finds_them(steps):
    e = extent(16 * U)
    for generation, (write, first, count) in enumerate(steps, 1):
        start, end = first * U, min(first + count, 16) * U
        every = sorted(e.chunks.values(), key=lambda chunk: chunk.offset)
        touching = [c for c in every if (c.offset < end and start < c.end) or c.offset == start]
        cut = any(c.offset < start or c.end > end for c in touching)
        if cut:
            with pytest.raises(ExtentStateError, match="cuts the chunk"):
                e.check_replaceable(start, end - start)
        else:
            e.check_replaceable(start, end - start)
        whole = [c for c in every if end > start and c.offset <= start and end <= c.end]
        inner = whole and whole[0].nbytes > end - start
        if inner:
            assert e.covering(start, end - start) == [Chunk(start, end - start, whole[0].generation, U, ())]
        if write:
            e.retract(start, end - start)
            publish(e, (start, end), generation=generation)
            assert e.chunks == {c.offset: c for c in every if c not in touching} | {start: e.chunks[start]}
            assert e.covering(start, end - start) == [e.chunks[start]]
