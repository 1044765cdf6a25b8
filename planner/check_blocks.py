"""What the independent checker (``check``, ``check_timeline``) knows of one block's decision.

Where its tensors must be between forward and backward, what its backward needs, and the least that computing
it again can take; worked out from profile and decision alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from memtrain.planner.actions import PLAIN, Action, BlockDecision, Tier
from memtrain.planner.profile import BlockForm, BlockProfile

PAGE = 4096
LINE = 64
"""Every tensor in a slot starts on a cache line."""


def whole_pages(size: int) -> int:
    """``size`` rounded up."""
    return (size + PAGE - 1) // PAGE * PAGE


def running(block: BlockProfile, decision: BlockDecision) -> BlockProfile | BlockForm:
    """What was measured of the block as it runs; of a form that it does not have, the plain one's."""
    named = [form for form in block.forms if form.name == decision.form]
    return named[0] if named else block


def loses(block: BlockProfile, decision: BlockDecision) -> float:
    """The error of the gradients of the block's form."""
    return sum(form.error for form in block.forms if form.name == decision.form)


def again(decision: BlockDecision) -> bool:
    """Whether anything of the block is computed a second time."""
    return decision.action in (
        Action.RECOMPUTE,
        Action.RECOMPUTE_EXCEPT_ATTENTION,
        Action.RECOMPUTE_NEARLY_FREE,
    )


def impossible(block: BlockProfile, decision: BlockDecision, *, exact_only: bool) -> Iterator[str]:
    """Why the block cannot be treated as decided, as far as its profile says; ``exact_only`` of the plan."""
    if decision.form != PLAIN and decision.form not in [form.name for form in block.forms]:
        why = [reason for name, reason in block.missing_forms if name == decision.form]
        yield f"has no form {decision.form!r}: {why[0] if why else 'it was not measured'}"
    if exact_only and loses(block, decision) > 0:
        error = f"{loses(block, decision):.1e}"
        yield f"form {decision.form!r} has gradients that are off by {error}, and the plan says exact_only"
    if not again(decision):
        return
    if not block.recomputable:
        yield block.reason
    if decision.action is Action.RECOMPUTE_EXCEPT_ATTENTION and not block.attention_bytes:
        yield "has no attention outputs to store"
    if decision.action is Action.RECOMPUTE_NEARLY_FREE and block.nearly_free is None:
        yield "was not measured with the outputs of its products stored"
    for count in (decision.recomputed_tokens, decision.attention_tokens or None):
        if count is None:
            continue
        if block.prefixes is None:
            yield f"{count} tokens cannot be cut off: {block.prefix_reason or 'no prefixes were tried'}"
        elif count not in block.prefixes.lengths:
            yield f"a prefix of {count} tokens was not tried, those of {block.prefixes.lengths} were"
        elif exact_only and count not in block.prefixes.exact:
            yield f"a prefix of {count} tokens is not bit-equal, and the plan says exact_only"


def left_behind(block: BlockProfile, decision: BlockDecision) -> list[tuple[Tier, int, int]]:
    """Tier, bytes and number of tensors of what the block's forward leaves for its backward."""
    if not again(decision):
        runs = running(block, decision)
        return [(decision.saved_tier, runs.saved_bytes, runs.saved_tensors)]
    if decision.action is Action.RECOMPUTE_NEARLY_FREE and block.nearly_free is not None:
        outputs = block.nearly_free.stored_bytes
        left = [(decision.saved_tier, outputs, block.nearly_free.stored_tensors)]
        return [*left, (decision.input_tier, block.input_bytes, 1)]
    row_count = block.prefixes.tokens if block.prefixes is not None else 1
    first = decision.recomputed_tokens or row_count
    left = [(decision.input_tier, block.input_bytes // row_count * first, 1)]
    if decision.action is Action.RECOMPUTE_EXCEPT_ATTENTION:
        rows = first - decision.attention_tokens
        whole = 0 if block.prefixes is None else block.prefixes.attention_whole_bytes
        outputs = (block.attention_bytes - whole) // row_count * rows + whole
        left.append((decision.saved_tier, outputs, 2))
    if block.prefixes is not None and first < row_count:
        behind = block.prefixes.cut_bytes // row_count * (row_count - first)
        rest = behind + block.prefixes.whole_bytes
        left.append((decision.rest_tier, rest, block.saved_tensors))
    return left


def room(left: list[tuple[Tier, int, int]], *tiers: Tier) -> int:
    """Pages that hold what is in ``tiers`` of what a block leaves, with a cache line more for each tensor."""
    return whole_pages(sum(size + LINE * count for tier, size, count in left if size and tier in tiers))


def sent(block: BlockProfile, decision: BlockDecision) -> dict[Tier, int]:
    """Bytes that leave the device, by tier."""
    out: dict[Tier, int] = {}
    for tier, size, _ in left_behind(block, decision):
        if tier is not Tier.DEVICE and (size or decision.action is Action.SWAP):
            out[tier] = out.get(tier, 0) + size
    return out


def during_backward(block: BlockProfile, decision: BlockDecision) -> int:
    """Bytes beside what the block has left behind."""
    if not again(decision):
        return running(block, decision).backward_transient_bytes
    if decision.action is Action.RECOMPUTE_NEARLY_FREE and block.nearly_free is not None:
        return block.nearly_free.backward_bytes
    saved, transient = block.saved_bytes, block.forward_transient_bytes
    if block.prefixes is None or not decision.recomputed_tokens:
        twice = block.attention_bytes if decision.attention_tokens else 0
        return saved + twice + max(transient, block.backward_transient_bytes)
    rows, row_count = decision.recomputed_tokens, block.prefixes.tokens
    prefix = (rows * (saved + transient) + row_count - 1) // row_count
    twice = (rows * block.prefixes.largest_bytes + row_count - 1) // row_count
    return max(prefix, saved + twice + block.backward_transient_bytes)


def gathered(block: BlockProfile, decision: BlockDecision) -> int:
    """Bytes of the rows of one tensor that forward puts together before they are stored."""
    if block.prefixes is None or not decision.recomputed_tokens:
        return 0
    behind, row_count = block.prefixes.tokens - decision.recomputed_tokens, block.prefixes.tokens
    return (behind * block.prefixes.largest_bytes + row_count - 1) // row_count


def looking(block: BlockProfile, decision: BlockDecision) -> int:
    """Bytes while a run finds out about the block's tokens: before its first forward has left anything."""
    cut = bool(decision.recomputed_tokens or decision.attention_tokens)
    return block.prefixes.probe_bytes if block.prefixes is not None and cut else 0


def compared(block: BlockProfile, decision: BlockDecision) -> int:
    """Bytes of the rows that wait in ordinary memory until they are computed again."""
    cut = bool(decision.recomputed_tokens or decision.attention_tokens)
    return block.prefixes.witness_bytes if block.prefixes is not None and cut else 0


def joined(block: BlockProfile, decision: BlockDecision) -> int:
    """Bytes copied together in backward, of rows that were stored and rows that were computed."""
    if decision.recomputed_tokens:
        return block.saved_bytes
    return block.attention_bytes if decision.attention_tokens else 0


def least_seconds_again(block: BlockProfile, decision: BlockDecision) -> float:
    """What computing the block again takes at least. Attention of a prefix is a triangle within the whole."""
    if decision.action is Action.RECOMPUTE_NEARLY_FREE and block.nearly_free is not None:
        return block.nearly_free.forward_seconds
    rows = part = 1.0
    cut = block.prefixes is not None and bool(decision.recomputed_tokens or decision.attention_tokens)
    if block.prefixes is not None and decision.recomputed_tokens:
        rows = part = decision.recomputed_tokens / block.prefixes.tokens
    if decision.action is Action.RECOMPUTE_EXCEPT_ATTENTION:
        part = decision.attention_tokens / block.prefixes.tokens if block.prefixes is not None else 0.0
    others = block.forward_seconds - block.attention_seconds
    overhead = block.prefixes.overhead_seconds if block.prefixes is not None and cut else 0.0
    return others * rows + block.attention_seconds * part * part + overhead
