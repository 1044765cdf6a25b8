"""What the planner may choose from, and one complete choice.

A choice (``Decisions``) is an action per block, tiers per unit of parameters, the schedule of the update
and the staging slabs. Slab sizes follow from the rest: ``staging_for`` is the one place that computes them.

Index letters: ``l`` block, ``u`` unit, ``t`` tier.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from memtrain.planner.actions import (
    Action,
    BlockDecision,
    MicroBatchOrder,
    StateDecision,
    Tier,
    UpdateSchedule,
)
from memtrain.planner.block_choices import (
    PREFIX_STEPS,
    TOKEN_FIELDS,
    WHOLE_FIELDS,
    Wish,
    block_choices,
    matches,
)
from memtrain.planner.block_parts import (
    PAGE_BYTES,
    groups,
    input_slot_bytes,
    is_recomputed,
    kept_slot_bytes,
    saved_slot_bytes,
)
from memtrain.planner.machine import Budget, BudgetError, Machine
from memtrain.planner.plan import CodedTier, Plan, Staging
from memtrain.planner.profile import ModelProfile, UnitProfile
from memtrain.planner.units import MiB, round_up
from memtrain.planner.weight_windows import DEFAULT_WEIGHT_SLOTS, place_of, weight_slots

STATE_FIELDS = ("gradient_tier", "optimizer_tier", "weight_tier")
GRADIENT_SLOTS = 4
GRADIENT_SLOT_BYTES = 4 * MiB
"""Four pieces of 4 MiB: pieces of 4 to 8 MiB reach a local disk's bandwidth (reference: fio, direct I/O)."""
SMALLEST_PIECE_ELEMENTS = 65536  # parameters below this never leave memory
UPDATE_SLOTS = 6
"""Step a shard while others are read ahead and written behind: several small ones, so that the disk has work
while a block computes (docs/log.md: a tenth faster than three slots of twice the size)."""
WHOLE_UPDATE_SLOTS = 3
"""Read shard k+1, step k, write k-1: where a shard is a whole parameter, which may be large."""
SHARD_ELEMENTS = (1 << 18, 1 << 19, 1 << 20, 1 << 21, 1 << 22)
DEFAULT_SHARD_ELEMENTS = 1 << 20
"""Cuts the flat index where no state moves."""
SLOT_COUNTS = (2, 3, 4)
"""Two is the least that overlaps a transfer with a block; beyond four nothing was gained in simulation."""
MIRRORED_SLOTS = 2
"""Slots of a ring that a device with memory of its own holds too: one in use, one coming or going."""
SHARD_GRANULE = 2048
"""Elements: shards start at multiples of it (see docs/architecture.md)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decisions:
    """One complete choice, without any prediction of what it costs."""

    blocks: tuple[BlockDecision, ...]
    states: tuple[StateDecision, ...]
    staging: Staging
    update_schedule: UpdateSchedule
    staging_tier: Tier = Tier.DEVICE
    """Where the rings lie: on a CPU in the device's own memory; otherwise in host memory, and the device
    holds mirrors of some of their slots (``mirror_bytes``)."""
    micro_batch_order: MicroBatchOrder = MicroBatchOrder.HORIZONTAL

    def held_passes(self, profile: ModelProfile) -> int:
        """Micro-batches whose activations are held at the same time."""
        return profile.micro_batches if self.micro_batch_order is MicroBatchOrder.VERTICAL else 1

    @classmethod
    def of(cls, plan: Plan, *, on_cpu: bool) -> Decisions:
        """What ``plan`` decided; ``on_cpu`` is that of the machine it was made for (``Machine.on_cpu``)."""
        return cls(
            blocks=plan.blocks,
            states=plan.states,
            staging=plan.staging,
            update_schedule=plan.update_schedule,
            staging_tier=staging_tier(on_cpu=on_cpu),
            micro_batch_order=plan.micro_batch_order,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannerOptions:
    """How to plan: limits of the search, and what may be chosen."""

    time_limit_seconds: float = 10.0
    gap: float = 5e-3
    """Relative distance from the bound at which the search stops: about what a profile's seconds vary by."""
    allow: frozenset[Action] = frozenset(Action)
    force: Mapping[str, Wish] = field(default_factory=dict)
    """Restricts choices: ``{"block": {"action": "swap"}, "block.3": {"action": "keep"},
    "state": {"optimizer_tier": "nvme"}, "state.prologue": {"weight_tier": "device"}}``. An entry for one
    block or unit replaces the general one. Keys inside are those of BlockDecision and StateDecision; a
    number of tokens must be one of the profile's prefixes, or None for ``recomputed_tokens``: all."""
    exact_only: bool = True
    """Compute a token prefix again only where it was found bit-equal to the whole forward's first rows, as
    all else that a plan does is in any case. So a budget decides how fast a model trains, not to which
    weights. The plan carries it, and a run that finds otherwise ends with an error. False allows prefixes
    that are equal within rounding, what another order of additions gives; the report says which."""
    allow_lossy: tuple[str, ...] = ()
    """Forms (``BlockProfile.forms``) that may be chosen although gradients are not the plain form's:
    ``int8``, ``int4`` and so on. Needs ``exact_only=False``."""
    error_budget: float | None = None
    """Of the lossy forms that are chosen: the largest mean of their errors over all bytes that the blocks
    save (``block_parts.plan_error``). None: what the forms lose is not limited."""
    safety_margin: float = 0.015
    """Part of the predicted need that is left free on the device, on the bill as slack: 1.5 % covers what
    was seen between predicted and measured peaks when everything is measured on the same machine."""
    update_schedule: str = "auto"
    """``auto``, ``sequential``, ``ahead`` or ``in_backward``."""
    gradients_untouched: bool = False
    """Nothing looks at gradients, or changes them or a parameter group, between the last backward pass and
    ``step()``: no clipping, no loss scaler, no look for NaN, no closure. Then ``auto`` may choose
    ``in_backward`` too."""
    weight_tiers: tuple[Tier, ...] | None = None
    """Where weights may be beside the device; None: in every tier of the budget. Those of a streamed model
    are in one already, and ``prepare`` names it."""
    micro_batch_order: str = "horizontal"
    """``horizontal``, ``vertical`` or ``auto``: the faster of both, where weights are streamed. Only
    ``Session.accumulate`` carries vertical order out; a loop that calls the model itself is horizontal."""
    overlay: bool = False
    """On a CPU, give gradients addresses in memory that activations have left by then
    (``Staging.overlaid_bytes``). For loops that let go of a step's gradients (``zero_grad()``) before the
    next forward."""

    def __post_init__(self) -> None:
        if self.time_limit_seconds <= 0:
            raise ValueError(f"time_limit_seconds must be > 0, got {self.time_limit_seconds}")
        if not 0 <= self.gap < 1:
            raise ValueError(f"gap must be in [0, 1), got {self.gap}")
        if not 0 <= self.safety_margin < 1:
            raise ValueError(f"safety_margin must be in [0, 1), got {self.safety_margin}")
        if self.update_schedule not in ("auto", *(schedule.value for schedule in UpdateSchedule)):
            raise ValueError(
                "update_schedule must be auto, sequential, ahead or in_backward, got "
                f"{self.update_schedule!r}"
            )
        if self.micro_batch_order not in ("auto", "horizontal", "vertical"):
            raise ValueError(
                f"micro_batch_order must be auto, horizontal or vertical, got {self.micro_batch_order!r}"
            )
        if (self.update_schedule, self.micro_batch_order) == ("in_backward", "vertical"):
            raise ValueError(
                "update_schedule is in_backward and micro_batch_order vertical: a unit's last gradient then "
                "comes from another micro-batch's graph than its turn. Leave one of both to auto"
            )
        if self.allow_lossy and self.exact_only:
            raise ValueError(
                f"allow_lossy names {', '.join(self.allow_lossy)}, but exact_only is on, under which nothing "
                "is lossy: set exact_only to false, or take allow_lossy away"
            )
        if self.error_budget is not None and not self.allow_lossy:
            raise ValueError("error_budget says how much lossy forms may lose: name them in allow_lossy")
        if self.error_budget is not None and not 0 <= self.error_budget < math.inf:
            raise ValueError(f"error_budget must be finite and at least 0, got {self.error_budget}")
        if not self.allow:
            raise ValueError("allow is empty: name at least one action")
        for key, entry in self.force.items():
            _check_force(key, entry)


def _check_force(key: str, entry: Wish) -> None:
    kind, _, which = key.partition(".")
    known = {"block": (*WHOLE_FIELDS, *TOKEN_FIELDS, "form"), "state": STATE_FIELDS}
    if kind not in known or (kind == "block" and which and not which.isdigit()):
        raise ValueError(f"force key {key!r}: use block, block.INDEX, state or state.UNIT")
    for name, value in entry.items():
        if name not in known[kind]:
            raise ValueError(f"force[{key!r}] has {name!r}; it may have {', '.join(known[kind])}")
        if name == "form":
            if not isinstance(value, str):
                raise ValueError(f"force[{key!r}] has form {value!r}; it must be the name of one")
        elif name not in TOKEN_FIELDS:
            WHOLE_FIELDS.get(name, Tier)(value)
        elif not isinstance(value, int) and (name, value) != ("recomputed_tokens", None):
            raise ValueError(f"force[{key!r}] has {name} {value!r}; it must be a number of tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """Every choice that is open for this profile, machine and budget."""

    blocks: tuple[tuple[BlockDecision, ...], ...]
    states: tuple[tuple[StateDecision, ...], ...]
    """Places of gradients and optimizer state; weights are chosen beside them."""
    weights: tuple[tuple[Tier, ...], ...]
    """Per unit the places of its weights, the device first where it is open: any of them with any of
    ``states``."""
    in_block: tuple[bool, ...]
    """Per unit whether it is a block's."""
    schedules: tuple[UpdateSchedule, ...]
    tiers: tuple[Tier, ...]
    shards: tuple[int, ...]
    """Possible sizes of an update shard, in elements; only the default when no state may leave."""
    on_cpu: bool
    """What stays on the device is copied into slabs, and rings lie in the device's memory."""
    coded: tuple[CodedTier, ...] = ()
    """Of ``tiers`` those whose optimizer state is coded."""
    overlay: bool = False
    """Gradients come to lie where activations were; on a CPU, in horizontal order."""

    @property
    def staging_tier(self) -> Tier:
        """Where rings lie."""
        return staging_tier(on_cpu=self.on_cpu)

    @property
    def billed_tiers(self) -> tuple[Tier, ...]:
        """Tiers beside the device that a plan may fill: rings take room even where nothing may be sent."""
        needs_host = not self.on_cpu and Tier.HOST not in self.tiers
        return (Tier.HOST, *self.tiers) if needs_host else self.tiers


def staging_tier(*, on_cpu: bool) -> Tier:
    """Where rings lie: what a GPU computes with passes through pinned memory of the host."""
    return Tier.DEVICE if on_cpu else Tier.HOST


def open_space(profile: ModelProfile, machine: Machine, budget: Budget, options: PlannerOptions) -> Space:
    """The choices that machine, budget and options leave open.

    Raises:
        ValueError: the options force what cannot be, the budget names a tier that the machine lacks, or the
            profile lacks the bytes per element that sharding needs. The message names value and remedy.
    """
    tiers = usable_tiers(machine, budget)
    copy_seconds_per_byte = machine.on_cpu / machine.dram_copy_bytes_per_second
    blocks = tuple(
        block_choices(
            index,
            block,
            tiers,
            options,
            copy_seconds_per_byte=copy_seconds_per_byte,
            mixes=len(profile.blocks) > PREFIX_STEPS,
        )
        for index, block in enumerate(profile.blocks)
    )
    states = tuple(_state_choices(unit, tiers, options) for unit in profile.units)
    weights = tuple(_weight_choices(unit, tiers, options) for unit in profile.units)
    for key in options.force:
        kind, _, which = key.partition(".")
        if kind == "block" and which and int(which) >= len(profile.blocks):
            raise ValueError(f"force names {key}; {profile.model} has {len(profile.blocks)} blocks")
        if kind == "state" and which and which not in {unit.name for unit in profile.units}:
            raise ValueError(f"force names {key}; units are {', '.join(unit.name for unit in profile.units)}")
    _check_lossy(profile, options)
    state_leaves = any(c.optimizer_tier is not Tier.DEVICE for choices in states for c in choices)
    if state_leaves and profile.state_bytes_per_element <= 0:
        raise ValueError(
            f"{profile.model}: units have state_bytes but state_bytes_per_element is 0; profile the model "
            f"with its optimizer, or force optimizer_tier device"
        )
    return Space(
        blocks=blocks,
        states=states,
        weights=weights,
        in_block=tuple(unit.block is not None for unit in profile.units),
        schedules=_schedules(options, state_leaves=state_leaves),
        tiers=tiers,
        shards=_shard_sizes(profile) if state_leaves else (default_shard_elements(profile),),
        on_cpu=machine.on_cpu,
        coded=tuple(
            CodedTier(
                tier=tier,
                codec=codec.name,
                segment_bytes=codec.segment_bytes,
                staging_bytes=codec.staging_bytes,
            )
            for tier in tiers
            if (codec := machine.link(tier).state_codec) is not None
        ),
        overlay=options.overlay and machine.on_cpu,
    )


def _schedules(options: PlannerOptions, *, state_leaves: bool) -> tuple[UpdateSchedule, ...]:
    """The last one is the one more likely to win."""
    if options.update_schedule != "auto":
        return (UpdateSchedule(options.update_schedule),)
    one_by_one = options.gradients_untouched and options.micro_batch_order != "vertical"
    in_backward = (UpdateSchedule.IN_BACKWARD,) * one_by_one
    ahead = (UpdateSchedule.AHEAD,) * state_leaves
    return (UpdateSchedule.SEQUENTIAL, *in_backward, *ahead)


def _check_lossy(profile: ModelProfile, options: PlannerOptions) -> None:
    """Raises ValueError where a form is allowed that nobody has looked into."""
    known = {form.name for block in profile.blocks for form in block.forms}
    known |= {name for block in profile.blocks for name, _ in block.missing_forms}
    for name in options.allow_lossy:
        if name not in known:
            raise ValueError(
                f"allow_lossy names {name!r}, but the profile of {profile.model} knows "
                f"{', '.join(sorted(known)) or 'no forms'}: profile the model with that form, or leave it out"
            )


def usable_tiers(machine: Machine, budget: Budget) -> tuple[Tier, ...]:
    """Tiers beside the device that have capacity in the budget and a link in the machine.

    Raises:
        BudgetError: the budget gives bytes in a tier that the machine does not have.
    """
    tiers = []
    for tier in (Tier.HOST, Tier.CXL, Tier.NVME):
        if budget.capacity(tier) == 0:
            continue
        if tier is Tier.HOST and machine.on_cpu:
            raise BudgetError(
                "budget.host is for machines with a GPU: on a CPU DRAM is the device, use budget.device"
            )
        if tier not in {link.tier for link in machine.links}:
            raise BudgetError(
                f"the budget gives {tier.value} {budget.capacity(tier)} bytes but machine {machine.name} has "
                f"no link to it; measure the machine again with that tier, or drop it from the budget"
            )
        tiers.append(tier)
    return tuple(tiers)


def _state_choices(
    unit: UnitProfile, tiers: tuple[Tier, ...], options: PlannerOptions
) -> tuple[StateDecision, ...]:
    gradient_places = (Tier.DEVICE, *tiers) if unit.gradient_bytes else (Tier.DEVICE,)
    state_places = (Tier.DEVICE, *tiers) if unit.state_bytes else (Tier.DEVICE,)
    wanted = {key: value for key, value in _wish_for(unit, options).items() if key != "weight_tier"}
    choices = tuple(
        decision
        for g, o in itertools.product(gradient_places, state_places)
        if matches(decision := StateDecision(unit=unit.name, gradient_tier=g, optimizer_tier=o), wanted)
    )
    if not choices:
        raise _nothing_left(unit, wanted, tiers)
    return choices


def _weight_choices(unit: UnitProfile, tiers: tuple[Tier, ...], options: PlannerOptions) -> tuple[Tier, ...]:
    if options.weight_tiers is not None:
        tiers = tuple(tier for tier in tiers if tier in options.weight_tiers)
    places = (Tier.DEVICE, *tiers) if unit.movable_weight_bytes else (Tier.DEVICE,)
    wish = _wish_for(unit, options)
    wanted = {key: value for key, value in wish.items() if key == "weight_tier"}
    choices = tuple(
        tier for tier in places if matches(StateDecision(unit=unit.name, weight_tier=tier), wanted)
    )
    if not choices:
        raise _nothing_left(unit, wanted, tiers)
    return choices


def _wish_for(unit: UnitProfile, options: PlannerOptions) -> Wish:
    """What is forced of a unit. A general wish speaks of units that have something to move; a frozen unit has
    neither gradients nor state."""
    own = options.force.get(f"state.{unit.name}")
    if own is not None:
        return own
    has = dict(
        zip(STATE_FIELDS, (unit.gradient_bytes, unit.state_bytes, unit.movable_weight_bytes), strict=True)
    )
    return {key: value for key, value in options.force.get("state", {}).items() if has[key]}


def _nothing_left(unit: UnitProfile, wanted: Wish, tiers: tuple[Tier, ...]) -> ValueError:
    return ValueError(
        f"unit {unit.name}: force={dict(wanted)} leaves nothing; tiers are "
        f"{[t.value for t in (Tier.DEVICE, *tiers)]}"
    )


def unit_elements(profile: ModelProfile, unit: UnitProfile) -> int:
    """Elements of a unit whose state or gradients may leave memory."""
    by_state = unit.state_bytes / profile.state_bytes_per_element if profile.state_bytes_per_element else 0
    by_gradient = (
        unit.gradient_bytes / profile.gradient_bytes_per_element if profile.gradient_bytes_per_element else 0
    )
    return -int(-max(by_state, by_gradient) // 1)


def _shard_sizes(profile: ModelProfile) -> tuple[int, ...]:
    largest_unit = max((unit_elements(profile, unit) for unit in profile.units), default=0)
    cap = round_up(max(largest_unit, 1), SHARD_GRANULE)
    return tuple(sorted({max(min(size, cap), _least_shard(profile)) for size in SHARD_ELEMENTS}))


def _least_shard(profile: ModelProfile) -> int:
    return 0 if profile.elementwise else round_up(profile.largest_parameter_elements, SHARD_GRANULE)


def default_shard_elements(profile: ModelProfile) -> int:
    """The shard of a plan that moves no state."""
    return max(DEFAULT_SHARD_ELEMENTS, _least_shard(profile))


def gradient_passes(*, stays: bool, first: bool) -> float:
    """How often a CPU goes over a unit's gradient in one micro-batch, in copies of as many bytes.

    The first micro-batch's is copied out of the heap (1), a later one is added to the sum, which reads a
    second operand (1.5). What leaves is gone over twice more while it is in memory: for its norm, and for its
    largest element. What stays is judged only where gradients are clipped, once a step and not here.
    """
    return (1.0 if first else 1.5) + (0.0 if stays else 2.0)


def gradients_come_and_go(profile: ModelProfile, schedule: UpdateSchedule) -> bool:
    """Whether a unit's gradients are gone before the next one's are there: updated in backward, and never
    added to."""
    return schedule is UpdateSchedule.IN_BACKWARD and profile.micro_batches == 1


def gradient_slab_bytes(profile: ModelProfile, unit: UnitProfile, decision: StateDecision) -> int:
    """A CPU's slab for the gradients of ``unit`` that stay: every parameter's begins on a page."""
    if decision.gradient_tier is not Tier.DEVICE or not unit.gradient_bytes:
        return 0
    return round_up(unit.gradient_bytes + PAGE_BYTES * _most_parameters(profile, unit), PAGE_BYTES)


def gradient_extent_bytes(profile: ModelProfile, unit: UnitProfile) -> int:
    """The most that the unit's gradients take on a tier: an extent for each parameter."""
    return _whole_pages(unit.gradient_bytes, _most_parameters(profile, unit))


def state_extent_bytes(profile: ModelProfile, unit: UnitProfile, coded: CodedTier | None = None) -> int:
    """The most that the unit's optimizer state takes on a tier: in the records every state tensor of every
    piece has pages of its own. Where it is coded there is room for what does not shrink, and a page more for
    each segment; a record ends in a segment of its own.

    A parameter is one piece, and one more wherever a shard ends within it: once in the elements of the
    smallest shard at most, less what may be left over at its end. Where a state tensor does not have its
    parameter's shape (never so for an elementwise optimizer), its size is the profile's estimate, or what the
    optimizer says that it is.
    """
    pieces = _most_pieces(profile, unit)
    if unit.updates:
        plain = sum(update.record_bytes for update in unit.updates)
    else:
        plain = _whole_pages(unit.state_bytes, pieces * _state_tensors(profile))
    if coded is None or not plain:
        return plain
    return plain + PAGE_BYTES * (pieces + plain // coded.segment_bytes)


def _most_pieces(profile: ModelProfile, unit: UnitProfile) -> int:
    cuts = unit_elements(profile, unit) // (SHARD_ELEMENTS[0] - SHARD_GRANULE) if profile.elementwise else 0
    return _most_parameters(profile, unit) + cuts


def _whole_pages(size_bytes: int, parts: int) -> int:
    """The most that ``parts`` can take which are ``size_bytes`` together, where each fills whole pages."""
    return (size_bytes + parts * (PAGE_BYTES - 1)) // PAGE_BYTES * PAGE_BYTES if size_bytes else 0


def _most_parameters(profile: ModelProfile, unit: UnitProfile) -> int:
    """The parameters of a unit, small and frozen ones among them. A profile without names does not know them:
    one per 64 Ki elements."""
    return len(unit.parameters) or max(1, -(-unit_elements(profile, unit) // SMALLEST_PIECE_ELEMENTS))


def _state_tensors(profile: ModelProfile) -> int:
    return profile.state_tensors or -int(-profile.state_bytes_per_element // 4)


def streams_update(decision: StateDecision) -> bool:
    """Whether the unit's update passes through the update ring: state or gradients come from a tier."""
    return decision.optimizer_tier is not Tier.DEVICE or decision.gradient_tier is not Tier.DEVICE


def update_slots(profile: ModelProfile) -> int:
    """Slots of the update ring."""
    return UPDATE_SLOTS if profile.elementwise else WHOLE_UPDATE_SLOTS


def update_slot_bytes(profile: ModelProfile, shard_elements: int) -> int:
    """One slot of the update ring: state, gradient and workspace of one shard.

    Where the profile knows the parameters one by one it is exact: what the largest run of them fills, without
    workspace, of which there is one however many slots there are.
    """
    if any(unit.updates for unit in profile.units):
        return max(size for unit in profile.units for size in whole_shards(unit, shard_elements))
    per_element = (
        profile.state_bytes_per_element
        + profile.gradient_bytes_per_element
        + profile.update_workspace_bytes_per_element
    )
    # A shard holds one piece per 64 Ki elements at most, and each piece's regions (gradient, workspace and
    # state tensors) begin on a page.
    pieces = shard_elements // SMALLEST_PIECE_ELEMENTS + 1
    regions = 2 + _state_tensors(profile)
    padding = pieces * regions * PAGE_BYTES
    return round_up(-int(-shard_elements * per_element // 1), PAGE_BYTES) + padding


def whole_shards(unit: UnitProfile, shard_elements: int) -> list[int]:
    """Bytes that the shards of a unit fill in a slot: parameters in order, as many as have at most
    ``shard_elements`` elements together; one at least."""
    shards: list[int] = []
    room = 0
    for update in unit.updates:
        if not shards or update.elements > room:
            shards.append(0)
            room = shard_elements
        shards[-1] += update.record_bytes + update.gradient_bytes
        room -= update.elements
    return shards


def update_workspace_bytes(profile: ModelProfile, unit: UnitProfile, *, streamed: bool) -> int:
    """Temporaries of a unit's update outside of slots. A shard that is streamed in pieces has them in its
    slot."""
    if unit.updates:
        return unit.workspace_bytes
    per_element = 0.0 if streamed else profile.update_workspace_bytes_per_element
    return -int(-per_element * unit_elements(profile, unit) // 1)


def staging_for(
    profile: ModelProfile,
    blocks: tuple[BlockDecision, ...],
    states: tuple[StateDecision, ...],
    *,
    saved_slots: int,
    input_slots: int,
    shard_elements: int,
    on_cpu: bool,
    coded: tuple[CodedTier, ...] = (),
    wanted_weight_slots: int = DEFAULT_WEIGHT_SLOTS,
    schedule: UpdateSchedule = UpdateSchedule.SEQUENTIAL,
    held_passes: int = 1,
    overlay: bool = False,
) -> Staging:
    """The slabs that ``blocks`` and ``states`` need; a ring that nothing uses has no slots."""
    decided = list(zip(profile.blocks, blocks, strict=True))
    saved = [size for b, d in decided if (size := saved_slot_bytes(b, d))]
    moved = [size for b, d in decided if (size := input_slot_bytes(b, d))]
    taken = [groups(b, d) for b, d in decided if is_recomputed(d)]
    kept = tuple(kept_slot_bytes(b, d) for b, d in decided) if on_cpu else ()
    resident = [gradient_slab_bytes(profile, u, d) for u, d in zip(profile.units, states, strict=True)]
    together = max if gradients_come_and_go(profile, schedule) else sum
    gradients = [
        unit.gradient_bytes
        for unit, d in zip(profile.units, states, strict=True)
        if d.gradient_tier is not Tier.DEVICE
    ]
    updates = any(streams_update(d) for d in states)
    windows, window_bytes = weight_slots(profile, states, wanted_weight_slots)
    overlaid = on_cpu and overlays(profile, schedule, overlay)
    return Staging(
        saved_slots=min(saved_slots, len(saved) * held_passes),
        saved_slot_bytes=max(saved, default=0),
        input_slots=max(min(input_slots, sum(taken) * held_passes), max(taken, default=0)),
        input_slot_bytes=max(moved, default=0),
        gradient_slots=GRADIENT_SLOTS if gradients else 0,
        gradient_slot_bytes=gradient_slot_bytes(profile) if gradients else 0,
        update_slots=update_slots(profile) if updates else 0,
        update_slot_bytes=update_slot_bytes(profile, shard_elements) if updates else 0,
        update_shard_elements=shard_elements if updates else default_shard_elements(profile),
        kept_bytes=kept if any(kept) else (),
        gradient_slab_bytes=together(resident) * on_cpu if resident else 0,
        overlaid_bytes=_overlaid_bytes(profile, kept, resident) if overlaid else 0,
        weight_slots=windows,
        weight_slot_bytes=window_bytes,
        coded=coded,
    )


def overlays(profile: ModelProfile, schedule: UpdateSchedule, wanted: bool) -> bool:
    """Whether gradients appear while activations go, and are gone when those come again. With several
    micro-batches all gradients are there while the last one's activations are; where a unit's are gone before
    the next one's come, there is nothing to gain."""
    return wanted and profile.micro_batches == 1 and not gradients_come_and_go(profile, schedule)


def _overlaid_bytes(profile: ModelProfile, kept: tuple[int, ...], gradients: list[int]) -> int:
    """How much less than both slabs is ever used: while block l's backward runs, there are places of blocks
    0 to l and gradients of l and all behind it; at last all gradients."""
    places = [place_of(unit) for unit in profile.units]
    most = sum(gradients)
    for block in range(len(kept)):
        made = sum(size for place, size in zip(places, gradients, strict=True) if place >= block)
        most = max(most, sum(kept[: block + 1]) + made)
    return sum(kept) + sum(gradients) - most


def mirror_bytes(profile: ModelProfile, decisions: Decisions) -> int:
    """What the device holds of rings that lie in host memory; 0 where they are its own memory.

    Two slots of each ring for activations: in forward what two blocks send away, in backward what one block
    works on and the next one will. Two update slots: one is stepped, one arrives. As much as the ring of
    gradients, for sums of several micro-batches, and the gradient that leaves while the next one is made.
    """
    if decisions.staging_tier is Tier.DEVICE:
        return 0
    staging = decisions.staging
    activations = staging.saved_slot_bytes + staging.input_slot_bytes
    gradients = staging.gradient_slots * staging.gradient_slot_bytes
    leaving = profile.largest_gradient_bytes if staging.gradient_slots else 0
    updates = staging.update_slot_bytes if staging.update_slots else 0
    return MIRRORED_SLOTS * (activations + updates) + gradients + leaving


def gradient_slot_bytes(profile: ModelProfile) -> int:
    """4 MiB, or less for a model whose largest unit has less."""
    largest = max((unit.gradient_bytes for unit in profile.units), default=0)
    return min(GRADIENT_SLOT_BYTES, round_up(max(largest, 1), PAGE_BYTES))
