"""What may be decided for one block: every action that profile, tiers and options leave open.

Token prefixes multiply the choices. A block that is cut sends what is not computed again to one tier, with
what else it stores, or keeps all of it; and a block that stores outputs of products uses at most one tier
beside the device. What that leaves out would be a block's bytes cut over two queues.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from memtrain.planner.actions import Action, BlockDecision, Tier
from memtrain.planner.profile import BlockProfile

if TYPE_CHECKING:
    from memtrain.planner.decisions import PlannerOptions

WHOLE_FIELDS = {"action": Action, "saved_tier": Tier, "input_tier": Tier, "rest_tier": Tier}
TOKEN_FIELDS = ("recomputed_tokens", "attention_tokens")
Wish = Mapping[str, str | int]
"""Fields of a BlockDecision or StateDecision that are forced, by name."""


PREFIX_STEPS = 8
"""Prefixes are whole eighths of the tokens. A plan of many blocks mixes blocks that keep, swap and recompute,
which is as fine as their number; what prefixes add is the rest, and attention, which is cheaper at the start
of a row than at its end: with eighths the least of its square is met to 1/256 of the whole."""


def prefix_lengths(tokens: int) -> tuple[int, ...]:
    """The prefixes that may be computed again of a row of ``tokens``, the shortest first."""
    steps = {tokens * step // PREFIX_STEPS for step in range(1, PREFIX_STEPS)}
    return tuple(sorted(steps - {0, tokens}))


def block_choices(
    index: int, block: BlockProfile, tiers: tuple[Tier, ...], options: PlannerOptions
) -> tuple[BlockDecision, ...]:
    """The choices that are open for block ``index``.

    Raises:
        ValueError: there is none; names the block and what has closed them.
    """
    places = (Tier.DEVICE, *tiers)
    choices = [BlockDecision(block=index, action=Action.KEEP)]
    choices += [BlockDecision(block=index, action=Action.SWAP, saved_tier=t) for t in tiers]
    if block.recomputable:
        choices += _recomputed(index, block, places)
        if block.prefixes is not None:
            choices += _cut(index, block, places, options)
    wanted = options.force.get(f"block.{index}", options.force.get("block", {}))
    found = tuple(
        c for c in choices if (c.action in options.allow or "action" in wanted) and matches(c, wanted)
    )
    if not found:
        raise ValueError(
            f"block {index} ({block.name}): no action is left by "
            f"allow={sorted(a.value for a in options.allow)}, force={dict(wanted)} "
            f"and tiers {[t.value for t in places]}{_reason(block, wanted, options)}"
        )
    return found


def _recomputed(index: int, block: BlockProfile, places: tuple[Tier, ...]) -> Iterator[BlockDecision]:
    """All tokens computed again."""
    for place in places:
        yield BlockDecision(block=index, action=Action.RECOMPUTE, input_tier=place)
    for saved, entry in itertools.product(places, places):
        if block.attention_bytes > 0:
            yield BlockDecision(
                block=index, action=Action.RECOMPUTE_EXCEPT_ATTENTION, saved_tier=saved, input_tier=entry
            )
    for saved, entry in itertools.product(places, places):
        if block.nearly_free is not None and len({saved, entry, Tier.DEVICE}) <= 2:
            yield BlockDecision(
                block=index, action=Action.RECOMPUTE_NEARLY_FREE, saved_tier=saved, input_tier=entry
            )


def _cut(
    index: int, block: BlockProfile, places: tuple[Tier, ...], options: PlannerOptions
) -> Iterator[BlockDecision]:
    """A prefix computed again, of the tokens or of attention alone."""
    assert block.prefixes is not None
    lengths = block.prefixes.exact if options.exact_only else block.prefixes.lengths
    attends = block.attention_bytes > 0
    for length, rest in itertools.product(lengths, places):
        for entry in dict.fromkeys((Tier.DEVICE, rest)):
            yield BlockDecision(
                block=index,
                action=Action.RECOMPUTE,
                recomputed_tokens=length,
                rest_tier=rest,
                input_tier=entry,
            )
            if attends:
                yield BlockDecision(
                    block=index,
                    action=Action.RECOMPUTE_EXCEPT_ATTENTION,
                    attention_tokens=length,
                    saved_tier=rest,
                    input_tier=entry,
                )


def _reason(block: BlockProfile, wanted: Wish, options: PlannerOptions) -> str:
    if not block.recomputable:
        return f"; it may not be recomputed: {block.reason or 'profile says so'}"
    if wanted.get("action") == Action.RECOMPUTE_NEARLY_FREE.value and block.nearly_free is None:
        return "; what its products leave was not measured"
    if not any(name in wanted for name in TOKEN_FIELDS):
        return ""
    if block.prefixes is None:
        return f"; its tokens cannot be cut: {block.prefix_reason or 'the profile has no prefixes'}"
    lengths = block.prefixes.exact if options.exact_only else block.prefixes.lengths
    exact = " exact" if options.exact_only else ""
    return f"; its{exact} prefixes are of {', '.join(map(str, lengths)) or 'no'} tokens"


def matches(decision: object, wanted: Wish) -> bool:
    """Whether ``decision`` has the value of every field that is forced."""
    return all(getattr(decision, name) == value for name, value in _typed(wanted))


def _typed(wanted: Wish) -> Iterable[tuple[str, object]]:
    for name, value in wanted.items():
        yield name, value if name in TOKEN_FIELDS else (Action if name == "action" else Tier)(value)
