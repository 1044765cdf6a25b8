"""Why a block cannot be computed again: errors that several modules raise in the same words."""

from __future__ import annotations

from typing import Any

import torch

from memtrain.offload.errors import OffloadError, TokenRangeError


def differs(name: str, how: str) -> OffloadError:
    """The error for a second forward that is not the first one again."""
    return OffloadError(
        f"{name}: computing the block again went another way than its forward ({how}); it depends on "
        f"something beside its arguments and the random number generator: exclude recompute for it"
    )


def prefix_differs(name: str, what: str, first: int, apart: float) -> TokenRangeError:
    """The error for a prefix whose last row is not what it was in the forward on all tokens."""
    return TokenRangeError(
        f"{name}: the first {first} tokens alone give other values, unlike when they were probed: {what} "
        f"differs by {apart:.1e} of the largest entry, as under a mask that lets tokens look ahead, or where "
        "something depends on the length; plan without recomputed_tokens and attention_tokens for it"
    )


def cannot_be_cut(name: str, why: str) -> TokenRangeError:
    """The error for a block of which tokens cannot be computed again without the others."""
    return TokenRangeError(f"{name}: {why}; plan without recomputed_tokens and attention_tokens for it")


def not_bit_equal(name: str, first: int, tokens: int, apart: float) -> TokenRangeError:
    """The error for a prefix that differs within rounding, where the plan promises that none does."""
    return TokenRangeError(
        f"{name}: the first {first} of {tokens} tokens alone give values that differ by {apart:.1e} of the "
        "largest entry, which rounding explains, but the plan says exact_only: other sizes or kernels round "
        "otherwise than those that it was made with. Allow it with planner.exact_only: false "
        "(PlannerOptions(exact_only=False)), plan without recomputed_tokens and attention_tokens for this "
        "block, or pad the batches to the size of the sample"
    )


def thrown_away(_: Any) -> torch.Tensor:
    """For backward in a graph that was only built to look at a block. Raises OffloadError."""
    raise OffloadError(
        "backward reached a forward that was run only to look at a block: something kept what it computed, "
        "such as keys in a cache (turn use_cache off) or router logits that a hook collects; turn that off, "
        "or plan without recompute_nearly_free, recomputed_tokens and attention_tokens"
    )
