"""Every choice that is open to the planner, for a profile, machine, budget and options."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from memtrain.planner.actions import BlockDecision, StateDecision, Tier, UpdateSchedule
from memtrain.planner.block_choices import PREFIX_STEPS, Wish, block_choices, matches
from memtrain.planner.machine import Budget, BudgetError, Machine, StateCodec
from memtrain.planner.options import STATE_FIELDS, PlannerOptions
from memtrain.planner.plan import CodedTier
from memtrain.planner.profile import ModelProfile, UnitProfile
from memtrain.planner.staging import default_shard_elements, shard_sizes, staging_tier


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
    coded_weights: tuple[CodedTier, ...] = ()
    """Of ``tiers`` those whose weights are coded (``weight_coding.coding_spaces`` has others too)."""
    overlay: bool = False
    """Gradients come to lie where activations were, and updates where passes were; on a CPU."""

    @property
    def staging_tier(self) -> Tier:
        """Where rings lie."""
        return staging_tier(on_cpu=self.on_cpu)

    @property
    def billed_tiers(self) -> tuple[Tier, ...]:
        """Tiers beside the device that a plan may fill: rings take room even where nothing may be sent."""
        needs_host = not self.on_cpu and Tier.HOST not in self.tiers
        return (Tier.HOST, *self.tiers) if needs_host else self.tiers


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
        shards=shard_sizes(profile) if state_leaves else (default_shard_elements(profile),),
        on_cpu=machine.on_cpu,
        coded=tuple(
            coded_tier(tier, codec) for tier in tiers if (codec := machine.link(tier).state_codec) is not None
        ),
        coded_weights=tuple(
            coded_tier(tier, codec)
            for tier in tiers
            if (codec := machine.link(tier).weight_codec) is not None and tier not in options.coding_optional
        ),
        overlay=bool(options.overlay) and machine.on_cpu,
    )


def coded_tier(tier: Tier, codec: StateCodec) -> CodedTier:
    """As a plan has it."""
    return CodedTier(
        tier=tier, codec=codec.name, segment_bytes=codec.segment_bytes, staging_bytes=codec.staging_bytes
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
