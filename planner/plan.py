"""The plan: one versioned, canonical document that the executors obey and the checker checks.

Same inputs give the same bytes and the same hash. What differs from run to run (how long the solver
took) is provenance: written beside the plan, never hashed.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from memtrain.planner.actions import (
    PLAIN,
    Action,
    BlockDecision,
    MicroBatchOrder,
    StateDecision,
    Tier,
    UpdateSchedule,
)
from memtrain.planner.canonical import digest, plain, read_signed_plan, signed_plan
from memtrain.planner.units import MiB

PLAN_VERSION = 9
_DIGITS = 9
"""Of seconds in a plan."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CodedTier:
    """A tier on which optimizer state, or weights, lie coded."""

    tier: Tier
    codec: str
    segment_bytes: int
    staging_bytes: int
    """As ``machine.StateCodec`` has them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowClass:
    """Windows of one size, for the units that fit these and no smaller ones."""

    slots: int
    """How many units' weights are there at once."""
    slot_bytes: int
    """The largest of those units, every parameter in whole pages."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Staging:
    """Page-aligned slabs: rings through which bytes pass to slower tiers and, on a CPU, homes of what stays.

    All of it is allocated when the plan is installed. On a CPU it is the device's own memory and on its bill
    from then on; beside a GPU the rings are on the host's bill, and on the device's what it mirrors of them
    (``decisions.mirror_bytes``).
    """

    saved_slots: int = 0
    saved_slot_bytes: int = 0
    """Ring for swapped blocks: one slot holds all saved tensors of the largest of them."""
    input_slots: int = 0
    input_slot_bytes: int = 0
    """Ring for recomputed blocks: what leaves of the largest of them, its input, stored outputs and rests."""
    gradient_slots: int = 0
    gradient_slot_bytes: int = 0
    """Ring of chunks through which gradients leave and come back."""
    update_slots: int = 0
    update_slot_bytes: int = 0
    """Ring for the optimizer: read k+1, step k, write k-1."""
    update_shard_elements: int = 0
    """Elements of the flat index that one update slot holds; never 0, for the cut of the flat index needs it
    even when no state moves."""
    kept_bytes: tuple[int, ...] = ()
    """On a CPU, per block its place in a slab for what it leaves on the device (saved tensors that it keeps,
    input, stored outputs, rests) of one micro-batch, of which there are ``Plan.held_passes``; 0 where that is
    nothing, no entries where no block has any. Tensors that live as long as a step would otherwise break up
    the heap that the short-lived ones share. On a CUDA device there are none, and the next is 0."""
    gradient_slab_bytes: int = 0
    """Gradients that stay on the device, each from a page of its own."""
    overlaid_bytes: int = 0
    """Bytes that both slabs share, for what lies there is not there at the same time: one slab, so much
    shorter than both, with blocks' places in their order from its low end up, and gradients in the order in
    which backward makes them from its high end down."""
    update_overlaid_bytes: int = 0
    """Bytes of the update's ring that lie where the other rings and blocks' places are, which an update
    inside of ``step()`` finds empty: from the low end of that slab up, at most to where gradients begin."""
    weight_windows: tuple[WindowClass, ...] = ()
    """Windows of the device for weights that live on tiers, the smallest first."""
    coded: tuple[CodedTier, ...] = ()
    """Tiers whose optimizer state is coded on its way, for which there is memory where the rings are."""
    coded_weights: tuple[CodedTier, ...] = ()
    """The same of weights: tiers on which some live, and lie coded."""

    def coded_on(self, tier: Tier) -> CodedTier | None:
        """How optimizer state on ``tier`` is coded; None where it is not."""
        return next((each for each in self.coded if each.tier is tier), None)

    def weights_coded_on(self, tier: Tier) -> CodedTier | None:
        """How weights on ``tier`` are coded; None where they are not."""
        return next((each for each in self.coded_weights if each.tier is tier), None)

    @property
    def kept_slab_bytes(self) -> int:
        """What holds one micro-batch's activations that stay on a CPU: on the bill as activations, not as
        staging."""
        return sum(self.kept_bytes)

    @property
    def weight_window_bytes(self) -> int:
        """The device's windows for weights: on the bill as such, and not as staging."""
        return sum(each.slots * each.slot_bytes for each in self.weight_windows)

    @property
    def total_bytes(self) -> int:
        """The four rings of transfers together, as far as they lie by themselves, and what coding takes."""
        return (
            self.pass_ring_bytes
            + self.update_ring_bytes
            - self.update_overlaid_bytes
            + sum(each.staging_bytes for each in (*self.coded, *self.coded_weights))
        )

    @property
    def pass_ring_bytes(self) -> int:
        """The rings that forward and backward use."""
        return (
            self.saved_slots * self.saved_slot_bytes
            + self.input_slots * self.input_slot_bytes
            + self.gradient_slots * self.gradient_slot_bytes
        )

    @property
    def update_ring_bytes(self) -> int:
        """The ring that the optimizer uses, wherever it lies."""
        return self.update_slots * self.update_slot_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One interval of the predicted timeline of a step."""

    name: str
    """Such as ``forward model.layers.3`` or ``write model.layers.3``."""
    resource: str
    """``compute``, ``write`` or ``read`` (with the tier, as ``write:nvme``)."""
    start_seconds: float
    end_seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class BillLine:
    """Bytes of one category in one tier at that tier's peak."""

    category: str
    """libraries, weights, weight windows, gradients, optimizer state, activations, transients, staging,
    tables, threads, bookkeeping, slack."""
    tier: Tier
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What happens to every tensor of a training step, and what that is predicted to cost."""

    status: str
    """``optimal``, ``gap`` (feasible within ``gap`` of the bound), ``heuristic`` (feasible, no bound)
    or ``infeasible``."""
    blocks: tuple[BlockDecision, ...]
    states: tuple[StateDecision, ...]
    staging: Staging
    update_schedule: UpdateSchedule
    micro_batches: int
    micro_batch_order: MicroBatchOrder = MicroBatchOrder.HORIZONTAL
    step_seconds: float
    """Predicted wall-clock of one optimizer step, all micro-batches."""
    lower_bound_seconds: float
    gap: float
    solver: str
    bill: tuple[BillLine, ...]
    peaks: tuple[tuple[Tier, int], ...]
    """Predicted peak of each tier in use."""
    capacities: tuple[tuple[Tier, int], ...]
    bytes_moved_per_step: int
    timeline: tuple[Event, ...] = ()
    shortfall_bytes: tuple[tuple[Tier, int], ...] = ()
    """Infeasible only: by how many bytes each tier is short."""
    remedies: tuple[str, ...] = ()
    """Infeasible only: the cheapest relaxations, the cheapest first."""
    exact_only: bool = False
    """What is computed again has the bits that it had in the first forward, token prefixes too: a run that
    finds otherwise ends with an error. False: a prefix may differ within rounding."""
    error: float = 0.0
    """Mean over all saved bytes of what the blocks' forms lose (``block_parts.plan_error``); 0: nothing."""
    error_budget: float | None = None
    """What it may be at most; None: not limited."""
    profile_digest: str = ""
    machine_digest: str = ""
    version: int = PLAN_VERSION
    provenance: dict[str, Any] = field(default_factory=dict, compare=False)
    """``solve_seconds``, creation date: not hashed."""

    @property
    def held_passes(self) -> int:
        """Micro-batches whose activations are held at the same time."""
        return self.micro_batches if self.micro_batch_order is MicroBatchOrder.VERTICAL else 1

    def peak(self, tier: Tier) -> int:
        """Predicted peak of ``tier``; 0 where the plan does not use it."""
        return dict(self.peaks).get(tier, 0)

    def action_counts(self) -> dict[str, int]:
        """How many blocks get which action, as ``{"swap to nvme": 21, "keep": 9}``."""
        return dict(Counter(describe(block) for block in self.blocks))

    def state(self, unit: str) -> StateDecision:
        """The decision for ``unit``. Raises KeyError with the unit's name."""
        for decision in self.states:
            if decision.unit == unit:
                return decision
        raise KeyError(f"the plan has no unit {unit!r}")

    def _hashed(self) -> dict[str, Any]:
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "provenance"}
        return {key: plain(value, digits=_DIGITS) for key, value in data.items()}

    @property
    def digest(self) -> str:
        """Hash of everything but the provenance."""
        return digest(self._hashed())

    def to_json(self) -> str:
        """Canonical JSON of the plan, its hash, and its provenance."""
        return signed_plan(self, self._hashed())

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what ``to_json`` wrote.

        Raises:
            ValueError: not a plan, another version, unknown keys, or a hash that does not match.
        """
        return read_signed_plan(text, PLAN_VERSION, _plan_of)


def _plan_of(data: dict[str, Any]) -> Plan:
    data["blocks"] = tuple(_block_of(block) for block in data["blocks"])
    data["states"] = tuple(
        StateDecision(
            unit=s["unit"],
            gradient_tier=Tier(s["gradient_tier"]),
            optimizer_tier=Tier(s["optimizer_tier"]),
            weight_tier=Tier(s["weight_tier"]),
        )
        for s in data["states"]
    )
    staging = data["staging"]
    coded = {
        name: tuple(CodedTier(**{**each, "tier": Tier(each["tier"])}) for each in staging[name])
        for name in ("coded", "coded_weights")
    }
    windows = tuple(WindowClass(**each) for each in staging["weight_windows"])
    parts = {"kept_bytes": tuple(staging["kept_bytes"]), "weight_windows": windows, **coded}
    data["staging"] = Staging(**{**staging, **parts})
    data["update_schedule"] = UpdateSchedule(data["update_schedule"])
    data["micro_batch_order"] = MicroBatchOrder(data["micro_batch_order"])
    data["bill"] = tuple(BillLine(**{**line, "tier": Tier(line["tier"])}) for line in data["bill"])
    for key in ("peaks", "capacities", "shortfall_bytes"):
        data[key] = tuple((Tier(tier), size) for tier, size in data[key])
    data["timeline"] = tuple(Event(**event) for event in data["timeline"])
    data["remedies"] = tuple(data["remedies"])
    return Plan(**data)


def _block_of(data: dict[str, Any]) -> BlockDecision:
    tiers = {name: Tier(data[name]) for name in ("saved_tier", "input_tier", "rest_tier")}
    return BlockDecision(**{**data, "action": Action(data["action"]), **tiers})


def describe_windows(windows: Sequence[WindowClass]) -> str:
    """``2 windows of 6.8 MiB and 1 of 54.0 MiB``."""
    first, *others = windows
    words = [f"{first.slots} windows of {first.slot_bytes / MiB:.1f} MiB"]
    return " and ".join(words + [f"{each.slots} of {each.slot_bytes / MiB:.1f} MiB" for each in others])


def describe(block: BlockDecision) -> str:
    """``swap to nvme``, ``recompute 512 tokens, the others on device``: a decision in words."""
    if block.action in (Action.KEEP, Action.SWAP):
        words = "keep" if block.action is Action.KEEP else f"swap to {block.saved_tier.value}"
        return words if block.form == PLAIN else f"{words} in {block.form} form"
    words = "recompute" if block.recomputed_tokens is None else f"recompute {block.recomputed_tokens} tokens"
    if block.action is Action.RECOMPUTE_EXCEPT_ATTENTION:
        after = f" after {block.attention_tokens} tokens" if block.attention_tokens else ""
        words += f", attention outputs{after} on {block.saved_tier.value}"
    elif block.action is Action.RECOMPUTE_NEARLY_FREE:
        words += f" from outputs of products on {block.saved_tier.value}"
    if block.recomputed_tokens is not None:
        words += f", the others on {block.rest_tier.value}"
    return words + ("" if block.input_tier is Tier.DEVICE else f" (input to {block.input_tier.value})")
