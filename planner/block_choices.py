"""What may be decided for one block: every action that profile, tiers and options leave open.

Token prefixes multiply the choices, and most are of no use. A block that is cut sends all that it stores to
one tier, or keeps it. In a model of many blocks it is open only where it beats a mixture: as many blocks
treated whole, some as its first tokens are and some as the others are, store the same bytes in the same
places, and take what a straight line between them says. A prefix is below that line where attention, which
costs less at the start of a row than at its end, saves more than cutting and joining take.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from memtrain.planner.actions import PLAIN, Action, BlockDecision, Tier
from memtrain.planner.block_parts import joined_bytes, recompute_seconds
from memtrain.planner.profile import BlockProfile

if TYPE_CHECKING:
    from memtrain.planner.decisions import PlannerOptions

WHOLE_FIELDS = {"action": Action, "saved_tier": Tier, "input_tier": Tier, "rest_tier": Tier}
TOKEN_FIELDS = ("recomputed_tokens", "attention_tokens")
Wish = Mapping[str, str | int | None]
"""Fields of a BlockDecision or StateDecision that are forced, by name."""


PREFIX_STEPS = 8
"""Prefixes are whole eighths of the tokens: the least of a parabola is met to 1/256 of its whole. HiGHS
solves 80 blocks in 4.5 s without prefixes and in 13 s with all of them, in 8.5 s with quarters."""


def prefix_lengths(tokens: int) -> tuple[int, ...]:
    """The prefixes that may be computed again of a row of ``tokens``, the shortest first."""
    steps = {tokens * step // PREFIX_STEPS for step in range(1, PREFIX_STEPS)}
    return tuple(sorted(steps - {0, tokens}))


def block_choices(
    index: int,
    block: BlockProfile,
    tiers: tuple[Tier, ...],
    options: PlannerOptions,
    *,
    copy_seconds_per_byte: float = 0.0,
    mixes: bool = False,
) -> tuple[BlockDecision, ...]:
    """The choices that are open for block ``index``.

    Args:
        index, block: which one, and its profile.
        tiers: beside the device.
        options: what is allowed and what is forced; prefixes that are forced are open in any case.
        copy_seconds_per_byte: what joining takes; 0 where the processor is not the device.
        mixes: whether the model has so many blocks that they mix as finely as tokens do.

    Raises:
        ValueError: there is none; names the block and what has closed them.
    """
    places = (Tier.DEVICE, *tiers)
    wanted = options.force.get(f"block.{index}", options.force.get("block", {}))
    choices = []
    for form in _open_forms(block, options, wanted):
        choices.append(BlockDecision(block=index, action=Action.KEEP, form=form))
        choices += [BlockDecision(block=index, action=Action.SWAP, saved_tier=t, form=form) for t in tiers]
    if block.recomputable:
        choices += _recomputed(index, block, places)
        choices += _cut(index, block, places, options, wanted, copy_seconds_per_byte if mixes else None)
    found = tuple(c for c in choices if _any_open([c.action], wanted, options) and matches(c, wanted))
    if not found:
        raise ValueError(
            f"block {index} ({block.name}): no action is left by "
            f"allow={sorted(a.value for a in options.allow)}, force={dict(wanted)} "
            f"and tiers {[t.value for t in places]}{_reason(block, wanted, options)}"
        )
    return found


RULED_OUT = "the options of this plan rule it out, so it was not measured"
"""Of prefixes and forms that no block may have, in a profile that was made for one plan."""


def may_cut(options: PlannerOptions) -> bool:
    """Whether any block may compute a prefix of its tokens again, as far as options say."""
    return any(
        _any_open((Action.RECOMPUTE, Action.RECOMPUTE_EXCEPT_ATTENTION), wanted, options)
        and ("action" not in wanted or any(name in wanted for name in TOKEN_FIELDS))
        and (wanted.get("recomputed_tokens", 1) is not None or wanted.get("attention_tokens") != 0)
        for wanted in _block_wishes(options)
    )


def may_be_nearly_free(options: PlannerOptions) -> bool:
    """Whether any block may store what its products leave, as far as options say."""
    return any(
        _any_open((Action.RECOMPUTE_NEARLY_FREE,), wanted, options) for wanted in _block_wishes(options)
    )


def may_take_forms(options: PlannerOptions) -> bool:
    """Whether any block may be in another form than the plain one, as far as options say."""
    return any(
        _any_open((Action.KEEP, Action.SWAP), wanted, options)
        and ("action" not in wanted if "form" not in wanted else wanted["form"] != PLAIN)
        for wanted in _block_wishes(options)
    )


def _block_wishes(options: PlannerOptions) -> list[Wish]:
    """What is forced of blocks: in general, and of some."""
    own = [wanted for key, wanted in options.force.items() if key.startswith("block.")]
    return [options.force.get("block", {}), *own]


def _any_open(actions: Iterable[Action], wanted: Wish, options: PlannerOptions) -> bool:
    """Whether one of ``actions`` is allowed, or wished for."""
    return any(wanted["action"] == a.value if "action" in wanted else a in options.allow for a in actions)


def _open_forms(block: BlockProfile, options: PlannerOptions, wanted: Wish) -> list[str]:
    """The plain one, those that lose nothing, and those that are allowed to. A wish for an action is one for
    the plain form, unless it names another."""
    found = [PLAIN, *(f.name for f in block.forms if not f.error or f.name in options.allow_lossy)]
    return [name for name in found if "action" not in wanted or name == wanted.get("form", PLAIN)]


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
    index: int,
    block: BlockProfile,
    places: tuple[Tier, ...],
    options: PlannerOptions,
    wanted: Wish,
    line_copy: float | None,
) -> Iterator[BlockDecision]:
    """A prefix computed again, of the tokens or of attention alone; where ``line_copy``, the seconds to copy
    a byte, is given, only what beats a mixture. A wish for an action is one for all tokens, unless it says
    how many."""
    if block.prefixes is None or ("action" in wanted and not any(name in wanted for name in TOKEN_FIELDS)):
        return
    lengths = block.prefixes.exact if options.exact_only else block.prefixes.lengths
    if any(name in wanted for name in TOKEN_FIELDS):
        yield from _every_cut(index, block, lengths, places)
        return
    for length, place in itertools.product(lengths, places):
        cuts = [
            BlockDecision(
                block=index,
                action=Action.RECOMPUTE,
                recomputed_tokens=length,
                rest_tier=place,
                input_tier=place,
            ),
            BlockDecision(
                block=index,
                action=Action.RECOMPUTE_EXCEPT_ATTENTION,
                attention_tokens=length,
                saved_tier=place,
                input_tier=place,
            ),
        ]
        for cut in cuts if block.attention_bytes > 0 else cuts[:1]:
            if line_copy is None or _beats_a_mixture(block, cut, line_copy):
                yield cut


def _every_cut(
    index: int, block: BlockProfile, lengths: tuple[int, ...], places: tuple[Tier, ...]
) -> Iterator[BlockDecision]:
    """Every pair of prefixes with every place of what is stored: for a wish, which says which."""
    for again, attended, rest, saved, entry in itertools.product(
        (None, *lengths), (0, *lengths), places, places, places
    ):
        if again is None and (rest is not Tier.DEVICE or not attended):
            continue
        if again is not None and attended >= again:
            continue
        tokens: dict[str, Any] = {"recomputed_tokens": again, "rest_tier": rest, "input_tier": entry}
        if not attended and saved is Tier.DEVICE:
            yield BlockDecision(block=index, action=Action.RECOMPUTE, **tokens)
        if block.attention_bytes > 0:
            yield BlockDecision(
                block=index,
                action=Action.RECOMPUTE_EXCEPT_ATTENTION,
                attention_tokens=attended,
                saved_tier=saved,
                **tokens,
            )


def _beats_a_mixture(block: BlockProfile, cut: BlockDecision, copy_seconds_per_byte: float) -> bool:
    """Whether a cut takes less than its share of the whole's seconds and the other's share together."""
    assert block.prefixes is not None
    length = cut.recomputed_tokens or cut.attention_tokens
    whole = BlockDecision(block=cut.block, action=Action.RECOMPUTE)
    none = whole if cut.recomputed_tokens else dataclasses.replace(cut, attention_tokens=0)
    without = 0.0 if none is whole else recompute_seconds(block, none)
    share = length / block.prefixes.tokens
    line = share * recompute_seconds(block, whole) + (1 - share) * without
    return recompute_seconds(block, cut) + joined_bytes(block, cut) * copy_seconds_per_byte < line


def _reason(block: BlockProfile, wanted: Wish, options: PlannerOptions) -> str:
    if wanted.get("form", PLAIN) != PLAIN:
        return f"; {_no_form(block, str(wanted['form']), options)}"
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
    others = "; exact_only=False allows others" if lengths != block.prefixes.lengths else ""
    return f"; its{exact} prefixes are of {', '.join(map(str, lengths)) or 'no'} tokens{others}"


def _no_form(block: BlockProfile, name: str, options: PlannerOptions) -> str:
    """Why a form cannot be had."""
    missing = dict(block.missing_forms)
    if missing.get(name, RULED_OUT) != RULED_OUT:
        return f"it has no form {name}: {missing[name]}"
    if name in missing:
        return f"form {name} is only for keep and swap"
    if name not in {form.name for form in block.forms}:
        return f"its forms are {', '.join([PLAIN, *(form.name for form in block.forms)])}"
    if name not in _open_forms(block, options, {}):
        return f"form {name} is lossy: name it in allow_lossy"
    return f"form {name} is only for keep and swap"


def matches(decision: object, wanted: Wish) -> bool:
    """Whether ``decision`` has the value of every field that is forced."""
    return all(getattr(decision, name) == value for name, value in _typed(wanted))


def _typed(wanted: Wish) -> Iterable[tuple[str, object]]:
    for name, value in wanted.items():
        plain = name in TOKEN_FIELDS or name == "form"
        yield name, value if plain else (Action if name == "action" else Tier)(value)
