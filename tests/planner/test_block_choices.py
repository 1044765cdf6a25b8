"""Which cuts of a block's tokens are open: all that were asked for, and of the others those of use."""

from __future__ import annotations

from typing import Any

import pytest

from memtrain.planner.actions import Action, BlockDecision, Tier
from memtrain.planner.block_choices import block_choices, prefix_lengths
from memtrain.planner.block_parts import is_cut
from memtrain.planner.decisions import PlannerOptions, open_space
from memtrain.planner.machine import Budget
from tests.planner.toys import make_block, make_machine, make_nearly_free, make_prefixes, make_profile

NVME = (Tier.NVME,)


def cuts(options: PlannerOptions | None = None, *, mixes: bool = False, **block: Any) -> list[BlockDecision]:
    profile = make_block(**{"prefixes": make_prefixes(), **block})
    found = block_choices(
        0,
        profile,
        NVME,
        options or PlannerOptions(exact_only=False),
        copy_seconds_per_byte=1e-11,
        mixes=mixes,
    )
    return [choice for choice in found if is_cut(choice)]


@pytest.mark.parametrize(
    ("tokens", "lengths"),
    [(1024, (128, 256, 384, 512, 640, 768, 896)), (8, (1, 2, 3, 4, 5, 6, 7)), (3, (1, 2)), (1, ()), (0, ())],
)
def test_prefixes_are_eighths(tokens: int, lengths: tuple[int, ...]) -> None:
    assert prefix_lengths(tokens) == lengths


def test_every_prefix_of_a_block_that_cannot_mix() -> None:
    # Three lengths, kept or on nvme, of all tokens or of attention alone.
    assert len(cuts()) == 3 * 2 * 2
    assert len(cuts(attention_bytes=0)) == 3 * 2
    assert cuts(prefixes=None) == []


def test_only_exact_prefixes_where_nothing_else_will_do() -> None:
    found = cuts(PlannerOptions(exact_only=True))
    assert {choice.recomputed_tokens or choice.attention_tokens for choice in found} == {2, 4}
    with pytest.raises(ValueError, match="exact prefixes are of 2, 4 tokens; exact_only=False allows others"):
        cuts(PlannerOptions(exact_only=True, force={"block": {"recomputed_tokens": 6}}))


def test_a_prefix_that_a_mixture_beats_is_closed() -> None:
    # A prefix of s = 1/4, 1/2, 3/4 saves s(1 - s) of attention's seconds: 3/16, 1/4, 3/16 of 4 ms are 0.75, 1
    # and 0.75 ms. Cutting takes 1 ms and joining another 0.1 (10 MiB) or 0.01 (1 MiB).
    assert cuts(mixes=True) == []
    quick = make_prefixes(overhead_seconds=0.00072)
    found = cuts(mixes=True, prefixes=quick)
    assert {choice.recomputed_tokens for choice in found if choice.recomputed_tokens} == {4}
    assert {choice.attention_tokens for choice in found if choice.attention_tokens} == {2, 4, 6}


def test_what_is_asked_for_is_open_in_any_case() -> None:
    wish: dict[str, str | int] = {"recomputed_tokens": 6, "rest_tier": "nvme", "input_tier": "device"}
    found = cuts(
        PlannerOptions(exact_only=False, force={"block": wish | {"attention_tokens": 0}}), mixes=True
    )
    assert {(c.action, c.saved_tier) for c in found} == {
        (Action.RECOMPUTE, Tier.DEVICE),
        (Action.RECOMPUTE_EXCEPT_ATTENTION, Tier.DEVICE),
        (Action.RECOMPUTE_EXCEPT_ATTENTION, Tier.NVME),
    }
    whole = PlannerOptions(exact_only=False, force={"block": {"action": "recompute"}})
    assert cuts(whole) == []  # nothing is said of tokens
    both = cuts(PlannerOptions(exact_only=False, force={"block": wish | {"attention_tokens": 2}}), mixes=True)
    assert {c.action for c in both} == {Action.RECOMPUTE_EXCEPT_ATTENTION}


@pytest.mark.parametrize(("blocks", "is_open"), [(8, True), (9, False)])
def test_blocks_mix_as_finely_as_eighths_when_there_are_more(blocks: int, is_open: bool) -> None:
    profile = make_profile(
        block_profiles=tuple(make_block(index, prefixes=make_prefixes()) for index in range(blocks))
    )
    space = open_space(profile, make_machine(), Budget(device="1GiB", nvme="/x:1GiB"), PlannerOptions())
    assert any(is_cut(choice) for choice in space.blocks[0]) is is_open


def test_nearly_free_uses_one_tier_beside_the_device() -> None:
    block = make_block(nearly_free=make_nearly_free())
    found = block_choices(0, block, (Tier.HOST, Tier.NVME), PlannerOptions())
    places = {(c.saved_tier, c.input_tier) for c in found if c.action is Action.RECOMPUTE_NEARLY_FREE}
    everywhere = {
        (a, b) for a in (Tier.DEVICE, Tier.HOST, Tier.NVME) for b in (Tier.DEVICE, Tier.HOST, Tier.NVME)
    }
    assert places == everywhere - {(Tier.HOST, Tier.NVME), (Tier.NVME, Tier.HOST)}
