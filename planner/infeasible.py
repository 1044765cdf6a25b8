"""The answer when nothing fits: how much is short, what budget would work, and the cheapest remedies."""

from __future__ import annotations

import dataclasses

from memtrain.planner import baselines
from memtrain.planner.actions import Action, Tier
from memtrain.planner.bill import device_need_bytes, device_positions, make_bill, tier_peaks
from memtrain.planner.block_choices import RULED_OUT, may_be_nearly_free
from memtrain.planner.block_parts import plan_error
from memtrain.planner.decisions import MIRRORED_SLOTS, Decisions, open_space
from memtrain.planner.plan import Plan
from memtrain.planner.simulate import simulate
from memtrain.planner.units import MiB, format_gib

MORE_DEVICE = "device at least "
"""What a remedy says that names a larger device budget."""
_UNLIKE_THE_NEXT = 100
"""Part of the device's need by which the next run may need more: what SmolLM2-135M's process held beside its
tensors, and with it the least budget, differed by 3.4 of 680 MiB between two runs."""


def infeasible_plan(search: baselines.Search, *, solve_seconds: float) -> Plan:
    """The plan that comes nearest to fitting, marked infeasible, with shortfall and remedies."""
    profile, budget = search.profile, search.budget
    tiers = search.space.billed_tiers
    nearest = baselines.smallest(search)
    timeline = simulate(profile, search.machine, nearest)
    peaks = tier_peaks(profile, nearest, tiers, search.options.safety_margin)
    excess = search.excess(nearest)
    return Plan(
        status="infeasible",
        blocks=nearest.blocks,
        states=nearest.states,
        staging=nearest.staging,
        update_schedule=nearest.update_schedule,
        micro_batches=profile.micro_batches,
        micro_batch_order=search.order,
        step_seconds=timeline.step_seconds,
        lower_bound_seconds=0.0,
        gap=0.0,
        solver="none: nothing fits",
        bill=make_bill(profile, nearest, tiers, search.options.safety_margin),
        peaks=tuple((t, size) for t, size in peaks.items() if size),
        capacities=tuple((t, budget.capacity(t)) for t in (Tier.DEVICE, *tiers)),
        bytes_moved_per_step=timeline.bytes_moved,
        shortfall_bytes=tuple(excess.items()),
        remedies=_remedies(search, nearest, excess),
        exact_only=search.options.exact_only,
        error=round(plan_error(profile.blocks, nearest.blocks), 9),
        error_budget=search.options.error_budget and round(search.options.error_budget, 9),
        profile_digest=profile.digest,
        machine_digest=search.machine.digest,
        provenance={"solve_seconds": round(solve_seconds, 3)},
    )


def _remedies(search: baselines.Search, nearest: Decisions, excess: dict[Tier, int]) -> tuple[str, ...]:
    """What would make a plan exist, in words, by the bytes each asks for: nothing to buy comes first."""
    budget = search.budget
    too_late = search.profile.prepare_peak_bytes > budget.device_bytes
    remedies: list[tuple[int, str]] = []
    allow = _allow_remedy(search)
    if allow:
        remedies.append((0, allow))
    lossier = _error_remedy(search)
    if lossier:
        remedies.append((0, lossier))
    words = []
    for tier, size in excess.items():
        capacity = budget.capacity(tier)
        if tier is Tier.DEVICE:
            words.append(_device_words(search, size))
        else:
            words.append(
                f"{tier.value} {format_gib(_up(capacity + size))} instead of {format_gib(capacity)} "
                f"({tier.value} +{format_gib(size)})"
            )
    remedies.append((sum(excess.values()), " and ".join(words)))
    remedies += _device_alone(search, excess)
    if too_late:  # a plan for less would come after the budget was overrun
        return tuple(dict.fromkeys(text for _, text in sorted(remedies)))
    shrink = _sequence_remedy(search, nearest, excess)
    if shrink:
        remedies.append((sum(excess.values()) + 1, shrink))
    if Tier.NVME not in search.space.tiers and any(k.tier is Tier.NVME for k in search.machine.links):
        remedies.append((sum(excess.values()) + 2, "give an nvme budget, such as nvme='/mnt/fast:40GiB'"))
    return tuple(dict.fromkeys(text for _, text in sorted(remedies)))


def _up(size_bytes: int) -> int:
    """Rounded up to what three digits of GiB can say, so that the number printed works when typed in."""
    step = MiB * 1024 // 1000
    return -(-size_bytes // step) * step + step


def _device_words(search: baselines.Search, excess_bytes: int) -> str:
    capacity = search.budget.device_bytes
    prepare_bytes = search.profile.prepare_peak_bytes
    return _more_device(max(capacity + excess_bytes, prepare_bytes), capacity, prepare_bytes)


def _more_device(need_bytes: int, capacity_bytes: int, prepare_bytes: int) -> str:
    """In words. At least: under a hard limit the kernel takes pages of libraries away, and what is measured
    there is less than what a larger limit shows."""
    least_bytes = _up(need_bytes + need_bytes // _UNLIKE_THE_NEXT)
    words = f"{MORE_DEVICE}{format_gib(least_bytes)} instead of {format_gib(capacity_bytes)}"
    if prepare_bytes > capacity_bytes:
        words += f" (loading and measuring the model took {format_gib(prepare_bytes)})"
    return words


def overrun(plan: Plan, reached_bytes: int) -> Plan:
    """``plan`` as the answer that it cannot work: ``reached_bytes`` of the device, more than its budget, were
    occupied before the first step."""
    capacity = dict(plan.capacities)[Tier.DEVICE]
    return dataclasses.replace(
        plan,
        status="infeasible",
        shortfall_bytes=((Tier.DEVICE, reached_bytes - capacity),),
        remedies=(_more_device(reached_bytes, capacity, reached_bytes),),
    )


def _allow_remedy(search: baselines.Search) -> str:
    """Actions that were not allowed, if allowing all of them makes a plan fit."""
    freed = dataclasses.replace(search.options, allow=frozenset(Action), force={})
    space = open_space(search.profile, search.machine, search.budget, freed)
    offered = {choice.action for choices in space.blocks for choice in choices}
    missing = sorted(a.value for a in offered - search.options.allow)
    if not missing and not search.options.force:
        return ""
    other = dataclasses.replace(search, options=freed, space=space, best=None)
    if other.excess(baselines.smallest(other)):
        if _is_unmeasured(search):
            return "force or forbid less: what the options rule out was not measured, and may fit"
        return ""
    return f"allow {', '.join(missing)}" if missing else "drop the forced choices"


def _is_unmeasured(search: baselines.Search) -> bool:
    """Whether a block may have had a choice that the profile lacks for these options alone."""
    blocks = search.profile.blocks
    reasons = [b.prefix_reason for b in blocks] + [why for b in blocks for _, why in b.missing_forms]
    nearly_free = may_be_nearly_free(search.options) or all(
        b.nearly_free is not None or not b.recomputable for b in blocks
    )
    return RULED_OUT in reasons or not nearly_free


def _error_remedy(search: baselines.Search) -> str:
    """The error of a plan that fits, if nothing but the error budget stands against one."""
    if search.options.error_budget is None:
        return ""
    freed = dataclasses.replace(search.options, error_budget=None)
    other = dataclasses.replace(search, options=freed, best=None)
    found = baselines.smallest(other)
    if other.excess(found):
        return ""
    error = plan_error(search.profile.blocks, found.blocks)
    return f"error_budget {error:.2g} instead of {search.options.error_budget:.2g}"


def _device_alone(search: baselines.Search, excess: dict[Tier, int]) -> list[tuple[int, str]]:
    """If another tier is what is short: the device that would do without more of it."""
    if set(excess) == {Tier.DEVICE}:
        return []
    needs = []
    for other in baselines.small_choices(search, search.space.schedules[0]):
        over = search.excess(other)
        if set(over) <= {Tier.DEVICE}:
            needs.append(over.get(Tier.DEVICE, 0))
    if not needs:
        return []
    return [(min(needs), _device_words(search, min(needs)))]


def _sequence_remedy(search: baselines.Search, nearest: Decisions, excess: dict[Tier, int]) -> str:
    """Activations shrink at least in proportion to the sequence; only said where that alone is enough."""
    short = excess.get(Tier.DEVICE, 0)
    top = max(device_positions(search.profile, nearest), key=lambda p: p.total_bytes)
    scalable = top.kept_bytes + top.transient_bytes
    staging, on_cpu = nearest.staging, search.space.on_cpu
    scalable += (staging.saved_slots if on_cpu else MIRRORED_SLOTS) * staging.saved_slot_bytes
    scalable += (staging.input_slots if on_cpu else MIRRORED_SLOTS) * staging.input_slot_bytes
    scalable += nearest.held_passes(search.profile) * staging.kept_slab_bytes
    # Neither gradients nor updates shrink, and they have come to bind the slab by then.
    scalable -= staging.overlaid_bytes + staging.update_overlaid_bytes
    if not short or set(excess) != {Tier.DEVICE} or scalable <= short:
        return ""
    assert device_need_bytes(search.profile, nearest) >= scalable
    percent = int(100 * (scalable - short) / scalable)
    return f"sequence length (or micro-batch) at most about {percent} % of the present one" if percent else ""
