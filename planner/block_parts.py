"""What one block stores where between its forward and its backward, and what computing it again takes.

The one account of a block's decision that bill, program and simulator share; the checker has its own. What
goes to one tier goes there together: one slot, one extent, one transfer.

Index letters: ``T`` tokens of a row, ``r`` of them computed again, ``a`` of those with attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memtrain.planner.actions import Action, BlockDecision, Tier
from memtrain.planner.profile import BlockForm, BlockProfile
from memtrain.planner.units import round_up

PAGE_BYTES = 4096
"""Direct I/O and the kernel's page: every slot and every extent is a multiple of it."""
TENSOR_ALIGNMENT_BYTES = 64
"""Each tensor in a slot starts on a cache line."""
ATTENTION_TENSORS = 2
"""A kernel's output and the logarithms of its sums."""


@dataclass(frozen=True, slots=True)
class Part:
    """Tensors of a block that live in one tier from its forward to its backward."""

    tier: Tier
    size_bytes: int
    tensors: int


def stored_parts(block: BlockProfile, decision: BlockDecision) -> tuple[Part, ...]:
    """Everything that outlives the block's forward; parts without bytes left out."""
    if decision.action in (Action.KEEP, Action.SWAP):
        found = [_saved(block, decision)]
    else:
        found = [*_outputs(block, decision), Part(decision.input_tier, _rows(block, decision), 1)]
        found += _rest(block, decision)
    return tuple(part for part in found if part.size_bytes)


def _saved(block: BlockProfile, decision: BlockDecision) -> Part:
    """All saved tensors, of the form in which the block runs."""
    form = block.in_form(decision.form)
    return Part(decision.saved_tier, form.saved_bytes, form.saved_tensors)


def _outputs(block: BlockProfile, decision: BlockDecision) -> list[Part]:
    """Outputs of kernels that the second forward is given."""
    if decision.action is Action.RECOMPUTE_NEARLY_FREE:
        assert block.nearly_free is not None
        stored = block.nearly_free
        return [Part(decision.saved_tier, stored.stored_bytes, stored.stored_tensors)]
    if decision.action is Action.RECOMPUTE_EXCEPT_ATTENTION:
        tokens, again = _tokens(block, decision)
        whole = block.prefixes.attention_whole_bytes if block.prefixes is not None else 0
        size = whole + (block.attention_bytes - whole) * (again - decision.attention_tokens) // tokens
        return [Part(decision.saved_tier, size, ATTENTION_TENSORS)]
    return []


def _rows(block: BlockProfile, decision: BlockDecision) -> int:
    """Bytes of the input's first r rows."""
    tokens, again = _tokens(block, decision)
    return block.input_bytes * again // tokens


def _rest(block: BlockProfile, decision: BlockDecision) -> list[Part]:
    """Saved tensors of the tokens that are not computed again."""
    tokens, again = _tokens(block, decision)
    if again == tokens:
        return []
    assert block.prefixes is not None
    size = block.prefixes.cut_bytes * (tokens - again) // tokens + block.prefixes.whole_bytes
    return [Part(decision.rest_tier, size, block.saved_tensors)]


def _tokens(block: BlockProfile, decision: BlockDecision) -> tuple[int, int]:
    """T and r; one token stands for all where the block is not cut."""
    if not is_cut(decision):
        return 1, 1
    assert block.prefixes is not None
    tokens = block.prefixes.tokens
    return tokens, tokens if decision.recomputed_tokens is None else decision.recomputed_tokens


def _slot_bytes(parts: list[Part]) -> int:
    """A slot for ``parts``: each tensor on a cache line, in whole pages; 0 for none."""
    return round_up(sum(p.size_bytes + TENSOR_ALIGNMENT_BYTES * p.tensors for p in parts), PAGE_BYTES)


def saved_slot_bytes(block: BlockProfile, decision: BlockDecision) -> int:
    """A staging slot for all saved tensors of a swapped ``block``; 0 for another."""
    return _slot_bytes([_saved(block, decision)]) if decision.action is Action.SWAP else 0


def input_slot_bytes(block: BlockProfile, decision: BlockDecision) -> int:
    """A slot of the input ring for what leaves of a recomputed ``block``; 0 when nothing does."""
    if decision.action is Action.SWAP:
        return 0
    return _slot_bytes([p for p in stored_parts(block, decision) if p.tier is not Tier.DEVICE])


def kept_slot_bytes(block: BlockProfile, decision: BlockDecision) -> int:
    """The block's place in a CPU's slab, for what stays on the device; 0 when nothing does."""
    return _slot_bytes([p for p in stored_parts(block, decision) if p.tier is Tier.DEVICE])


def kept_bytes(block: BlockProfile, decision: BlockDecision) -> int:
    """Bytes of what stays on the device, without a slab's alignment."""
    return sum(p.size_bytes for p in stored_parts(block, decision) if p.tier is Tier.DEVICE)


def activation_extents(block: BlockProfile, decision: BlockDecision) -> tuple[tuple[Tier, int], ...]:
    """(tier, bytes) of each extent that ``block`` fills from its forward to its backward."""
    if decision.action is Action.SWAP:  # also where it saves nothing, so that every swapped block has one
        return ((decision.saved_tier, saved_slot_bytes(block, decision)),)
    parts = stored_parts(block, decision)
    tiers = dict.fromkeys(p.tier for p in parts if p.tier is not Tier.DEVICE)
    return tuple((tier, _slot_bytes([p for p in parts if p.tier is tier])) for tier in tiers)


def traffic(block: BlockProfile, decision: BlockDecision) -> tuple[tuple[Tier, int], ...]:
    """(tier, bytes) of what leaves the device between a block's forward and its backward."""
    if decision.action is Action.SWAP:
        return ((decision.saved_tier, _saved(block, decision).size_bytes),)
    sizes: dict[Tier, int] = {}
    for part in stored_parts(block, decision):
        if part.tier is not Tier.DEVICE:
            sizes[part.tier] = sizes.get(part.tier, 0) + part.size_bytes
    return tuple(sizes.items())


def groups(block: BlockProfile, decision: BlockDecision) -> int:
    """Slots that a block takes of its ring: one for each tier beside the device that gets something of it."""
    return len(traffic(block, decision))


def copied_bytes(block: BlockProfile, decision: BlockDecision) -> int:
    """What a CPU copies out of the heap in a block's forward, into a slab or a slot of a ring."""
    return sum(part.size_bytes for part in stored_parts(block, decision))


def is_recomputed(decision: BlockDecision) -> bool:
    """Whether the block's forward, or a part of it, runs again before its backward."""
    return decision.action not in (Action.KEEP, Action.SWAP)


def is_cut(decision: BlockDecision) -> bool:
    """Whether tokens of one row are treated apart."""
    return decision.recomputed_tokens is not None or decision.attention_tokens > 0


def recompute_seconds(block: BlockProfile, decision: BlockDecision) -> float:
    """What a block's second forward takes; 0 when there is none.

    Of a prefix attention takes the square of its share, since a token attends to those before it alone.
    """
    if not is_recomputed(decision):
        return 0.0
    if decision.action is Action.RECOMPUTE_NEARLY_FREE:
        assert block.nearly_free is not None
        return block.nearly_free.forward_seconds
    tokens, again = _tokens(block, decision)
    attended = again if decision.action is Action.RECOMPUTE else decision.attention_tokens
    seconds = max(0.0, block.forward_seconds - block.attention_seconds) * again / tokens
    seconds += min(block.attention_seconds, block.forward_seconds) * (attended / tokens) ** 2
    overhead = block.prefixes.overhead_seconds if tokens > 1 and block.prefixes is not None else 0.0
    return seconds + overhead


def largest_difference(block: BlockProfile, decision: BlockDecision) -> float:
    """Between what a cut block computes again and what its forward computed (``Prefixes.differences``); 0 for
    every other decision: nothing else changes a bit."""
    lengths = [n for n in (decision.recomputed_tokens, decision.attention_tokens) if n]
    if not lengths:
        return 0.0
    assert block.prefixes is not None
    return max(block.prefixes.difference(length) for length in lengths)


def lost_bytes(block: BlockProfile, decision: BlockDecision) -> float:
    """What a block adds to the plan's error: its form's error times what it saves in the plain form."""
    return error * block.saved_bytes if (error := _error(block, decision)) else 0.0


def _error(block: BlockProfile, decision: BlockDecision) -> float:
    form = block.in_form(decision.form)
    return form.error if isinstance(form, BlockForm) else 0.0


def plan_error(blocks: Sequence[BlockProfile], decisions: Sequence[BlockDecision]) -> float:
    """Mean over all saved bytes, in the plain form, of the errors of the forms that were chosen: what an
    error budget limits, here as in ``ranges``."""
    lost = sum(lost_bytes(b, d) for b, d in zip(blocks, decisions, strict=True))
    return lost / max(1, sum(block.saved_bytes for block in blocks))


def joined_bytes(block: BlockProfile, decision: BlockDecision) -> int:
    """What is put together in backward of computed rows and stored ones, each byte copied once."""
    if decision.recomputed_tokens is not None:
        return block.saved_bytes
    return block.attention_bytes if decision.attention_tokens else 0


def gathered_bytes(block: BlockProfile, decision: BlockDecision) -> int:
    """The most that one saved tensor's rows take on their way to where rests are stored: a copy in forward,
    beside the tensor itself, where they do not lie together."""
    if decision.recomputed_tokens is None:
        return 0
    assert block.prefixes is not None
    tokens, again = _tokens(block, decision)
    return -(-block.prefixes.largest_bytes * (tokens - again) // tokens)


def probe_bytes(block: BlockProfile, decision: BlockDecision) -> int:
    """Peak, input included, while the block's tokens are looked at: in the first step, before it has kept
    anything; 0 where tokens are not told apart."""
    if not is_cut(decision):
        return 0
    assert block.prefixes is not None
    return block.prefixes.probe_bytes


def witness_bytes(block: BlockProfile, decision: BlockDecision) -> int:
    """Rows kept in ordinary memory from forward to backward, outside slabs and slots, to be compared."""
    if not is_cut(decision):
        return 0
    assert block.prefixes is not None
    return block.prefixes.witness_bytes


def backward_bytes(block: BlockProfile, decision: BlockDecision) -> int:
    """Bytes that a block needs during its backward, above what is stored of it and of earlier blocks."""
    if not is_recomputed(decision):
        return block.in_form(decision.form).backward_transient_bytes
    if decision.action is Action.RECOMPUTE_NEARLY_FREE:
        assert block.nearly_free is not None
        return block.nearly_free.backward_bytes
    if decision.recomputed_tokens is None:
        beside = block.attention_bytes if decision.attention_tokens else 0
        return block.saved_bytes + beside + max(block.forward_transient_bytes, block.backward_transient_bytes)
    # The prefix is computed; then one tensor after the other is joined, when backward first asks for it.
    assert block.prefixes is not None
    tokens, again = _tokens(block, decision)
    computing = -(-(block.saved_bytes + block.forward_transient_bytes) * again // tokens)
    joining = -(-block.prefixes.largest_bytes * again // tokens)
    return max(computing, block.saved_bytes + joining + block.backward_transient_bytes)
