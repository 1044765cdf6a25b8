"""What a block stores where, what its backward needs, what computing it again takes: worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memtrain.planner import check_blocks
from memtrain.planner.actions import Action, BlockDecision, Tier
from memtrain.planner.bill import forward_bytes, lasting_bytes, slab_forward_bytes
from memtrain.planner.block_choices import block_choices
from memtrain.planner.block_parts import (
    Part,
    activation_extents,
    backward_bytes,
    copied_bytes,
    gathered_bytes,
    input_slot_bytes,
    joined_bytes,
    kept_bytes,
    kept_slot_bytes,
    probe_bytes,
    recompute_seconds,
    stored_parts,
    traffic,
    witness_bytes,
)
from memtrain.planner.decisions import PlannerOptions
from memtrain.planner.profile import BlockProfile
from memtrain.planner.units import MiB
from tests.planner.toys import make_block, make_nearly_free, make_prefixes

PAGE = 4096
# 10 MiB saved, 1 MiB in, 1 MiB of attention; 10 ms forward of which 4 in attention; rows of 8 tokens; 4 MiB
# of outputs of products, and 2 ms to compute the rest from them.
BLOCK = make_block(nearly_free=make_nearly_free(), prefixes=make_prefixes())


def decide(action: Action, **fields: Any) -> BlockDecision:
    return BlockDecision(block=0, action=action, **fields)


NEARLY_FREE = decide(Action.RECOMPUTE_NEARLY_FREE, saved_tier=Tier.NVME)
PREFIX = decide(Action.RECOMPUTE, recomputed_tokens=6, rest_tier=Tier.NVME)
ATTENTION = decide(Action.RECOMPUTE_EXCEPT_ATTENTION, attention_tokens=2)
BOTH = decide(
    Action.RECOMPUTE_EXCEPT_ATTENTION, recomputed_tokens=4, attention_tokens=2, input_tier=Tier.NVME
)


@pytest.mark.parametrize(
    ("decision", "parts"),
    [
        (NEARLY_FREE, {("nvme", 4 * MiB, 8), ("device", MiB, 1)}),
        # Six of eight rows of the input, two of eight rows of the saved tensors.
        (PREFIX, {("device", 6 * MiB // 8, 1), ("nvme", 10 * MiB // 4, 64)}),
        (ATTENTION, {("device", MiB, 1), ("device", 6 * MiB // 8, 2)}),
        # Rows 0 to 4 of the input, 2 to 4 of attention's outputs, 4 to 8 of everything.
        (BOTH, {("nvme", MiB // 2, 1), ("device", MiB // 4, 2), ("device", 5 * MiB, 64)}),
    ],
)
def test_what_is_stored(decision: BlockDecision, parts: set[tuple[str, int, int]]) -> None:
    assert {(p.tier.value, p.size_bytes, p.tensors) for p in stored_parts(BLOCK, decision)} == parts


def test_a_tensor_without_tokens_is_stored_whole_or_computed_alike() -> None:
    # 10 MiB: 8 have tokens, 1 depends on all of them, 1 is the same for a prefix.
    block = make_block(prefixes=make_prefixes(cut_bytes=8 * MiB, whole_bytes=MiB))
    assert Part(Tier.NVME, 3 * MiB, 64) in stored_parts(block, PREFIX)


@pytest.mark.parametrize(
    ("attended", "size"), [(0, MiB + 16), (2, 6 * MiB // 8 + 16)], ids=["outputs", "outputs of the others"]
)
def test_a_random_state_is_stored_whole(attended: int, size: int) -> None:
    """16 bytes beside the outputs of 8 tokens, as a GPU's flash attention leaves."""
    block = make_block(attention_bytes=MiB + 16, prefixes=make_prefixes(attention_whole_bytes=16))
    decision = decide(Action.RECOMPUTE_EXCEPT_ATTENTION, attention_tokens=attended, input_tier=Tier.NVME)
    assert Part(Tier.DEVICE, size, 2) in stored_parts(block, decision)
    assert (Tier.DEVICE, size, 2) in check_blocks.left_behind(block, decision)


def test_what_goes_to_one_tier_goes_together() -> None:
    together = decide(Action.RECOMPUTE_NEARLY_FREE, saved_tier=Tier.NVME, input_tier=Tier.NVME)
    assert traffic(BLOCK, together) == ((Tier.NVME, 5 * MiB),)
    # Nine tensors on lines of 64 bytes are less than a page more.
    assert activation_extents(BLOCK, together) == ((Tier.NVME, 5 * MiB + PAGE),)
    assert input_slot_bytes(BLOCK, together) == 5 * MiB + PAGE
    assert kept_slot_bytes(BLOCK, together) == 0
    # 5 MiB and 64 tensors, a quarter of one and 2: 66 lines of 64 bytes are a page and 128 bytes.
    assert kept_slot_bytes(BLOCK, BOTH) == 5 * MiB + MiB // 4 + 2 * PAGE
    assert input_slot_bytes(BLOCK, BOTH) == MiB // 2 + PAGE


@pytest.mark.parametrize(
    ("decision", "size"),
    [
        (NEARLY_FREE, 7 * MiB),
        # Six eighths of what is saved and of the forward's 2 MiB are less than the whole, three quarters of
        # the largest tensor (2 MiB) and the 4 MiB of backward.
        (PREFIX, int(15.5 * MiB)),
        (ATTENTION, 15 * MiB),  # the attention's output whole, beside what computed it
        (BOTH, 15 * MiB),  # 10 saved, half of 2, and 4
    ],
)
def test_what_backward_needs(decision: BlockDecision, size: int) -> None:
    assert backward_bytes(BLOCK, decision) == size


def test_a_forward_with_large_transients_decides() -> None:
    block = make_block(forward_transient_bytes=20 * MiB, prefixes=make_prefixes())
    assert backward_bytes(block, PREFIX) == 30 * MiB * 6 // 8


@pytest.mark.parametrize(
    ("decision", "seconds", "joined"),
    [
        (NEARLY_FREE, 0.002, 0),
        # 6 ms beside attention and 4 in it, and 1 ms that cutting costs.
        (PREFIX, 0.006 * 6 / 8 + 0.004 * 36 / 64 + 0.001, 10 * MiB),
        (ATTENTION, 0.006 + 0.004 * 4 / 64 + 0.001, MiB),
        (BOTH, 0.003 + 0.004 * 4 / 64 + 0.001, 10 * MiB),
        (decide(Action.RECOMPUTE), 0.010, 0),
        (decide(Action.RECOMPUTE_EXCEPT_ATTENTION), 0.006, 0),
        (decide(Action.KEEP), 0.0, 0),
    ],
)
def test_what_computing_again_takes(decision: BlockDecision, seconds: float, joined: int) -> None:
    assert recompute_seconds(BLOCK, decision) == pytest.approx(seconds)
    assert joined_bytes(BLOCK, decision) == joined


@st.composite
def cut_blocks(draw: st.DrawFn) -> BlockProfile:
    """Rows and sizes that no power of two divides."""
    tokens = draw(st.integers(2, 13))
    attention, cut = tokens * draw(st.integers(0, 999)), tokens * draw(st.integers(0, 9999))
    attention, state = min(attention, cut), draw(st.integers(0, 16))
    whole, alike = draw(st.integers(0, 99)), draw(st.integers(0, 99))
    lengths = tuple(sorted(draw(st.sets(st.integers(1, tokens - 1), max_size=3))))
    return make_block(
        input_bytes=tokens * draw(st.integers(0, 999)),
        attention_bytes=attention + state,
        saved_bytes=cut + whole + alike + state,
        saved_tensors=draw(st.integers(0, 99)),
        nearly_free=make_nearly_free(stored_bytes=draw(st.integers(0, 99999))),
        prefixes=make_prefixes(
            tokens=tokens,
            lengths=lengths,
            differences=(0.0,) * len(lengths),
            cut_bytes=cut,
            whole_bytes=whole,
            largest_bytes=draw(st.integers(0, cut)),
            probe_bytes=draw(st.integers(0, 99999)),
            witness_bytes=draw(st.integers(0, 99)),
            attention_whole_bytes=state,
        ),
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cut_blocks())
def test_the_checker_counts_the_same_by_its_own_arithmetic(block: BlockProfile) -> None:
    tiers = (Tier.HOST, Tier.NVME)
    for decision in block_choices(0, block, tiers, PlannerOptions(exact_only=False)):
        left = check_blocks.left_behind(block, decision)
        assert sum(size for _, size, _ in left) == copied_bytes(block, decision)
        assert check_blocks.room(left, Tier.DEVICE) == kept_slot_bytes(block, decision)
        assert check_blocks.sent(block, decision) == dict(traffic(block, decision))
        assert check_blocks.during_backward(block, decision) == backward_bytes(block, decision)
        assert check_blocks.joined(block, decision) == joined_bytes(block, decision)
        assert check_blocks.looking(block, decision) == probe_bytes(block, decision)
        assert check_blocks.compared(block, decision) == witness_bytes(block, decision)
        assert not list(check_blocks.impossible(block, decision, exact_only=False))
        if check_blocks.again(decision):
            assert check_blocks.room(left, *tiers) == input_slot_bytes(block, decision)
            assert check_blocks.least_seconds_again(block, decision) == pytest.approx(
                recompute_seconds(block, decision)
            )


@pytest.mark.parametrize(
    ("decision", "size"), [(PREFIX, MiB // 2), (BOTH, MiB), (ATTENTION, 0), (NEARLY_FREE, 0)]
)
def test_forward_puts_the_rows_of_one_rest_together(decision: BlockDecision, size: int) -> None:
    """Of the largest tensor, 2 MiB in 8 rows: those behind 6, and behind 4."""
    assert check_blocks.gathered(BLOCK, decision) == gathered_bytes(BLOCK, decision) == size
    transient = BLOCK.saved_bytes + BLOCK.forward_transient_bytes
    assert slab_forward_bytes(BLOCK, decision) == transient + size


@pytest.mark.parametrize(("decision", "cut"), [(PREFIX, 1), (BOTH, 1), (ATTENTION, 1), (NEARLY_FREE, 0)])
@pytest.mark.parametrize("looking", [MiB, 20 * MiB])
def test_a_look_at_tokens_and_rows_that_stay_are_on_the_bill(
    decision: BlockDecision, cut: int, looking: int
) -> None:
    """Forward saves 10 MiB and takes 2; the look, where there is one, is over before anything is kept."""
    block = make_block(
        nearly_free=make_nearly_free(), prefixes=make_prefixes(probe_bytes=looking, witness_bytes=4096)
    )
    running = 12 * MiB + gathered_bytes(block, decision) + 4096 * cut
    kept = kept_bytes(block, decision)
    assert slab_forward_bytes(block, decision) == max(running, looking * cut)
    assert forward_bytes(block, decision) == max(kept + running, looking * cut)
    assert lasting_bytes(block, decision) == kept + 4096 * cut
