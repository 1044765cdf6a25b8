"""The words of a decision: tiers, actions, and what is decided per block and per unit of state.

Index letters used throughout the planner: ``l`` block, ``u`` unit (a block, or what stands before
or after the blocks), ``a`` action, ``t`` tier.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Tier(str, Enum):
    """A place that holds bytes, from fast to slow.

    On a CPU-only machine ``DEVICE`` is DRAM, and ``HOST`` is the same DRAM under the same budget, so
    plans there use ``DEVICE``, ``NVME`` and, where a memory-only NUMA node exists, ``CXL``.
    """

    DEVICE = "device"
    HOST = "host"
    CXL = "cxl"
    NVME = "nvme"


PLAIN = "plain"
"""The form of a block that runs as its model has it."""
EXACT = "exact"
"""The form in which a block saves less and gives the same bits: cheap functions are computed again from what
they were given (``memtrain.optim.autograd``). Other forms are named after what compresses, and lose."""


class Action(str, Enum):
    """What happens to the tensors that one block saves for its backward pass."""

    KEEP = "keep"
    """They stay on the device, as in plain PyTorch."""
    SWAP = "swap"
    """They are written to another tier after forward and read back ahead of backward."""
    RECOMPUTE = "recompute"
    """Only the block's input survives; backward runs the block's forward again."""
    RECOMPUTE_EXCEPT_ATTENTION = "recompute_except_attention"
    """As RECOMPUTE, but the attention kernels' outputs are stored and not computed twice."""
    RECOMPUTE_NEARLY_FREE = "recompute_nearly_free"
    """As RECOMPUTE, but outputs of matrix products and attention kernels are stored: backward computes norms,
    activations and products of elements again, nothing that costs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockDecision:
    """What happens to the activations of block ``block``."""

    block: int
    action: Action
    saved_tier: Tier = Tier.DEVICE
    """Where the tensors that survive forward live: all saved tensors under SWAP, the attention
    outputs under RECOMPUTE_EXCEPT_ATTENTION. ``DEVICE`` under KEEP and RECOMPUTE."""
    input_tier: Tier = Tier.DEVICE
    """Where the block's input lives between forward and recompute; ``DEVICE`` unless recomputed."""
    recomputed_tokens: int | None = None
    """Of each row, how many of its first tokens are computed again; None, all of them. The others' saved
    tensors are stored in ``rest_tier``. A prefix is computed as the whole is: by the block's own forward.
    Not under RECOMPUTE_NEARLY_FREE, where a prefix would save next to no time."""
    rest_tier: Tier = Tier.DEVICE
    """Where saved tensors of tokens that are not computed again live; ``DEVICE`` where there are none."""
    attention_tokens: int = 0
    """Under RECOMPUTE_EXCEPT_ATTENTION: of the tokens that are computed again, for how many of the first ones
    attention is, too. The kernels' outputs are stored for the others alone."""
    form: str = PLAIN
    """How the block runs, of those that its profile has (``BlockProfile.forms``): what it saves, what that
    takes and what it loses. What is computed again is computed by the plain forward."""

    def __post_init__(self) -> None:
        if self.block < 0:
            raise ValueError(f"block must be >= 0, got {self.block}")
        if self.action is Action.SWAP and self.saved_tier is Tier.DEVICE:
            raise ValueError(f"block {self.block}: action swap needs saved_tier other than device")
        if self.action in (Action.KEEP, Action.RECOMPUTE) and self.saved_tier is not Tier.DEVICE:
            raise ValueError(
                f"block {self.block}: action {self.action.value} stores no saved tensors, "
                f"yet saved_tier is {self.saved_tier.value}; use device"
            )
        if self.action in (Action.KEEP, Action.SWAP) and self.input_tier is not Tier.DEVICE:
            raise ValueError(
                f"block {self.block}: input_tier {self.input_tier.value} is only for recomputed "
                f"blocks, not for action {self.action.value}"
            )
        if self.form != PLAIN and self.action not in (Action.KEEP, Action.SWAP):
            raise ValueError(
                f"block {self.block}: action {self.action.value} computes the plain form again, yet form is "
                f"{self.form!r}; keep or swap what another form saves"
            )
        self._check_tokens()

    def _check_tokens(self) -> None:
        name = f"block {self.block}: action {self.action.value}"
        if self.recomputed_tokens is None:
            if self.rest_tier is not Tier.DEVICE:
                raise ValueError(
                    f"{name} leaves no tokens for rest_tier {self.rest_tier.value}; give recomputed_tokens"
                )
        elif self.action in (Action.KEEP, Action.SWAP):
            raise ValueError(
                f"{name} computes nothing again, yet recomputed_tokens is {self.recomputed_tokens}"
            )
        elif self.action is Action.RECOMPUTE_NEARLY_FREE:
            raise ValueError(
                f"{name} is for all tokens, yet recomputed_tokens is {self.recomputed_tokens}; leave it out, "
                "or use action recompute"
            )
        elif self.recomputed_tokens < 1:
            raise ValueError(
                f"{name}: recomputed_tokens must be at least 1, got {self.recomputed_tokens}; keep or swap "
                "a block of which nothing is computed again"
            )
        if self.attention_tokens and self.action is not Action.RECOMPUTE_EXCEPT_ATTENTION:
            raise ValueError(f"{name} has no attention_tokens, got {self.attention_tokens}")
        most = self.recomputed_tokens
        if self.attention_tokens < 0 or (most is not None and self.attention_tokens >= most):
            raise ValueError(
                f"{name}: attention_tokens must lie between 0 and recomputed_tokens {most}, "
                f"got {self.attention_tokens}; action recompute stores no attention outputs at all"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class StateDecision:
    """Where the gradients, the optimizer's state and the weights of one unit of parameters live."""

    unit: str
    gradient_tier: Tier = Tier.DEVICE
    optimizer_tier: Tier = Tier.DEVICE
    """Moments, and master weights where the regime has them."""
    weight_tier: Tier = Tier.DEVICE
    """On another tier than the device they come to it only for as long as they are used: into a window, of
    which there are a few that all such units take turns in (``Staging.weight_windows``)."""


class MicroBatchOrder(str, Enum):
    """In which order the micro-batches of an optimizer step pass the blocks."""

    HORIZONTAL = "horizontal"
    """One after the other, each through forward and backward."""
    VERTICAL = "vertical"
    """All of them through a block, before the next block: weights that live on tiers come once in forward and
    once in backward, and what every micro-batch saves is held at the same time."""


THREAD_BYTES = 4 << 20
"""What a micro-batch takes on a CPU in vertical order for being a thread: stacks, also of the threads that
compute for it, and pages of the allocator that it fills in part. 3 to 5 MiB were measured with mimalloc and
two cores (docs/log.md)."""


class UpdateSchedule(str, Enum):
    """When ``optimizer.step()`` does its work."""

    SEQUENTIAL = "sequential"
    """Inside ``step()``; it returns when every weight is updated."""
    AHEAD = "ahead"
    """Unit by unit, just before the next forward needs the unit, so that reading and writing state
    hides behind the forward pass. Reading or saving weights waits for it."""
    IN_BACKWARD = "in_backward"
    """Unit by unit, during the last backward pass of the step, as soon as the unit's gradients are there, so
    that reading and writing state hides behind the backward pass and gradients need not stay. Only where
    nothing looks at gradients between backward and ``step()``, which does what is left."""
