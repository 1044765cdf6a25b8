"""Vertical order of micro-batches in plans: turns, bytes and seconds by hand; plan and checker agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from memtrain.planner.actions import THREAD_BYTES, Action, BlockDecision, MicroBatchOrder, Tier
from memtrain.planner.actions import UpdateSchedule as Schedule
from memtrain.planner.check import Rule, check
from memtrain.planner.decisions import Decisions, PlannerOptions, staging_for
from memtrain.planner.machine import Budget, Machine
from memtrain.planner.plan import Event, Plan
from memtrain.planner.profile import ModelProfile
from memtrain.planner.simulate import Timeline, simulate
from memtrain.planner.solve import make_plan
from memtrain.planner.trace import profile_model
from memtrain.planner.units import MiB
from memtrain.planner.weight_windows import WantedWindows, step_turns, weight_windows
from tests.planner.toys import make_machine
from tests.planner.weighty import (
    ALONE,
    EVERYTHING,
    FROZEN,
    KEPT,
    ONE,
    PAGE,
    any_weights,
    bill,
    billed,
    everybody,
    from_the_beginning,
    quicker,
    shifted,
    staged,
    states_of,
    weighty,
    without,
)

VERTICAL, HORIZONTAL = MicroBatchOrder.VERTICAL, MicroBatchOrder.HORIZONTAL
BUDGET = Budget(device="1GiB", nvme="/x:1GiB")
SLOW = {"read_bytes_per_second": 64 * MiB, "mixed_bytes_per_second": 1088 * MiB}


# -- turns and seconds -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slots", "schedule", "once", "updates"),
    [
        (2, Schedule.AHEAD, "- - - 2 3 - - - 1 0 -", ""),
        (3, Schedule.AHEAD, "- - - - 3 - - - - 0 -", ""),
        (2, Schedule.SEQUENTIAL, "- 0 1 2 3 - - - 1 0 -", "- - 2 3"),
    ],
)
def test_each_turn_comes_for_every_micro_batch_and_reads_once(
    slots: int, schedule: Schedule, once: str, updates: str
) -> None:
    profile = weighty(4, micro_batches=3)
    states = states_of(profile, everybody)
    windows = weight_windows(profile, states, WantedWindows(slots, sized=False))
    turns = step_turns(profile, states, schedule, windows, VERTICAL)
    found = ["".join(profile.units[r.unit].name[-1] for r in turn.reads) or "-" for turn in turns]
    assert found == [read for turn in once.split() for read in (turn, "-", "-")] + updates.split()


def run(
    profile: ModelProfile,
    order: MicroBatchOrder,
    *,
    machine: Machine | None = None,
    slots: int = 3,
    action: Action = Action.KEEP,
    saved_slots: int = 2,
    away: bool = True,
) -> Timeline:
    tier = Tier.NVME if action is Action.SWAP else Tier.DEVICE
    blocks = tuple(BlockDecision(block=i, action=action, saved_tier=tier) for i in range(len(profile.blocks)))
    states = states_of(profile, lambda _: away)
    machine = machine or make_machine()
    staging = staging_for(
        profile,
        blocks,
        states,
        saved_slots=saved_slots,
        input_slots=2,
        shard_elements=1 << 20,
        on_cpu=machine.on_cpu,
        wanted_windows=WantedWindows(slots, sized=False),
        held_passes=profile.micro_batches if order is VERTICAL else 1,
    )
    decisions = Decisions(
        blocks=blocks,
        states=states,
        staging=staging,
        update_schedule=Schedule.SEQUENTIAL,
        micro_batch_order=order,
    )
    return simulate(profile, machine, decisions)


def test_weights_that_are_waited_for_are_waited_for_once() -> None:
    # Three windows, 125 ms a read. Alone, two reads a micro-batch, each begun two blocks before it is needed.
    # In vertical order two a step, and a block takes four times as long.
    profile = weighty(4, micro_batches=4, **FROZEN)
    machine = make_machine(**SLOW)
    one_by_one = run(profile, HORIZONTAL, machine=machine)
    assert one_by_one.step_seconds == pytest.approx(4 * (ALONE + 2 * 16 * ONE - 0.020 - 0.040))
    together = run(profile, VERTICAL, machine=machine)
    assert together.step_seconds == pytest.approx(
        4 * ALONE + 2 * 16 * ONE - 0.080 - 4 * 0.040 + 0.035, abs=0.05
    )
    assert one_by_one.bytes_moved == 8 * (8 * MiB + PAGE)
    assert together.bytes_moved == 2 * (8 * MiB + PAGE)


def test_the_order_of_computing() -> None:
    found = run(weighty(2, micro_batches=2, frozen=(0, 1)), VERTICAL)
    assert [event.name for event in found.events if event.resource == "compute"] == [
        *["forward prologue"] * 2,
        *["forward layers.0"] * 2,
        *["forward layers.1"] * 2,
        *["loss epilogue"] * 2,
        *["backward layers.1"] * 2,
        *["backward layers.0"] * 2,
        *["backward prologue"] * 2,
    ]


@pytest.mark.parametrize(
    ("slots", "reads"),
    [
        # Six groups are sent away. The last two, or three, or four are still in their slots: of block 1 all
        # three, and with four the first of block 0 to be needed.
        (2, {"layers.1": 1, "layers.0": 3}),
        (3, {"layers.1": 0, "layers.0": 3}),
        (4, {"layers.1": 0, "layers.0": 2}),
    ],
)
def test_what_was_sent_away_last_is_needed_first(slots: int, reads: dict[str, int]) -> None:
    profile = weighty(2, micro_batches=3, frozen=(0, 1))
    found = run(profile, VERTICAL, action=Action.SWAP, saved_slots=slots, away=False)
    counts = Counter(event.name for event in found.events)
    assert {name: counts[f"read {name}"] for name in reads} == reads
    assert {name: counts[f"write {name}"] for name in reads} == dict.fromkeys(reads, 3)


# -- bytes and choice --------------------------------------------------------------------------------


def plan_for(
    profile: ModelProfile,
    force: dict[str, Any] | None = None,
    *,
    budget: Budget = BUDGET,
    machine: Machine | None = None,
    order: str = "vertical",
    **options: Any,
) -> Plan:
    chosen = PlannerOptions(force=force or {}, micro_batch_order=order, safety_margin=0.0, **options)
    plan = make_plan(profile, machine or make_machine(), budget, options=chosen)
    if plan.status != "infeasible":
        assert check(plan, profile, machine or make_machine(), budget) == ()
    return plan


AWAY: dict[str, Any] = {"block": KEPT, "state": {"weight_tier": "nvme"}}


@pytest.mark.usefixtures("solver_here")
def test_bytes_by_hand() -> None:
    profile = weighty(micro_batches=3, boundary_bytes=5 * MiB, persistent_backward_bytes=7 * MiB, **FROZEN)
    one, three = plan_for(profile, AWAY, order="horizontal"), plan_for(profile, AWAY)
    assert (one.held_passes, three.held_passes) == (1, 3)
    place = 10 * MiB + PAGE
    assert one.staging.kept_bytes == three.staging.kept_bytes == (place,) * 4
    # One micro-batch has its peak in forward, with 12 MiB for a moment. Of three, two wait with 5 MiB each,
    # and backward needs 4 MiB and 7 for each of them.
    assert bill(one)["activations", "device"] == 4 * place
    assert bill(three)["activations", "device"] == 12 * place + 10 * MiB
    assert bill(one)["transients", "device"] == 12 * MiB
    assert bill(three)["transients", "device"] == (4 + 3 * 7) * MiB
    swapped = AWAY | {"block": {"action": "swap"}}
    sent = bill(plan_for(profile, swapped, order="horizontal"))["activations", "nvme"]
    assert sent == 4 * place
    assert bill(plan_for(profile, swapped))["activations", "nvme"] == 3 * sent


@pytest.mark.usefixtures("solver_here")
def test_auto_takes_the_faster_order_and_needs_streamed_weights_for_it() -> None:
    profile = weighty(6, micro_batches=4, frozen=tuple(range(6)))
    machine = make_machine(**SLOW)
    both = {
        order: plan_for(profile, AWAY, machine=machine, order=order) for order in ("horizontal", "vertical")
    }
    assert both["vertical"].step_seconds < both["horizontal"].step_seconds / 1.5
    chosen = plan_for(profile, AWAY, machine=machine, order="auto")
    assert chosen.micro_batch_order is VERTICAL
    assert chosen.step_seconds <= both["vertical"].step_seconds
    assert 0 < chosen.lower_bound_seconds <= chosen.step_seconds
    assert plan_for(profile, machine=machine, order="auto").micro_batch_order is HORIZONTAL  # all fits
    # A device that holds the activations of one micro-batch and no more: 100 and 2 MiB, windows, 60 and 12.
    little = Budget(device=102 * MiB + 3 * (8 * MiB + PAGE) + 72 * MiB + PAGE, nvme="/x:48MiB")
    tight = plan_for(profile, AWAY, machine=machine, order="auto", budget=little)
    assert tight.status == "infeasible" or tight.micro_batch_order is HORIZONTAL
    alone = weighty(6, frozen=tuple(range(6)))
    assert plan_for(alone, AWAY, machine=machine, order="auto").micro_batch_order is HORIZONTAL


@pytest.mark.usefixtures("solver_here")
def test_updates_in_backward_are_of_one_micro_batch_after_the_other() -> None:
    """Forced together they are refused; where the planner chooses, it chooses one of both."""
    with pytest.raises(ValueError, match="update_schedule is in_backward and micro_batch_order vertical"):
        PlannerOptions(update_schedule="in_backward", micro_batch_order="vertical")
    profile = weighty(6, micro_batches=4, frozen=tuple(range(6)))
    machine = make_machine(**SLOW)
    forced = plan_for(profile, AWAY, machine=machine, order="auto", update_schedule="in_backward")
    assert (forced.update_schedule, forced.micro_batch_order) == (Schedule.IN_BACKWARD, HORIZONTAL)
    for order in ("auto", "vertical"):
        chosen = plan_for(profile, AWAY, machine=machine, order=order, gradients_untouched=True)
        assert chosen.micro_batch_order is VERTICAL
        assert chosen.update_schedule is not Schedule.IN_BACKWARD


@pytest.mark.usefixtures("solver_here")
def test_vertical_order_without_anything_to_order_is_refused() -> None:
    with pytest.raises(ValueError, match="a step has 1 micro-batch: raise micro_batches"):
        plan_for(weighty(2))
    with pytest.raises(ValueError, match="no weights may leave the device"):
        plan_for(weighty(2, micro_batches=2), budget=Budget(device="1GiB"))
    with pytest.raises(ValueError, match="must be auto, horizontal or vertical, got 'sideways'"):
        PlannerOptions(micro_batch_order="sideways")


@pytest.mark.usefixtures("solver_here")
def test_what_does_not_fit_in_vertical_order_is_said_with_its_bytes() -> None:
    profile = weighty(4, micro_batches=4, boundary_bytes=20 * MiB, **FROZEN)
    # 102 MiB, two windows, 14 of backward, a slot of 1 MiB and a page, three who wait with 20, four threads.
    need = 102 * MiB + 4 * 64 + 2 * (8 * MiB + PAGE) + MiB + PAGE + 14 * MiB + 60 * MiB + 4 * THREAD_BYTES
    fits = plan_for(profile, budget=Budget(device=need, nvme="/x:1GiB"))
    assert fits.peak(Tier.DEVICE) == need
    short = plan_for(profile, budget=Budget(device=need - 1, nvme="/x:1GiB"))
    assert short.shortfall_bytes == ((Tier.DEVICE, 1),)
    assert short.micro_batch_order is VERTICAL


@pytest.mark.usefixtures("solver_here")
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    any_weights(),
    st.integers(2, 4),
    st.integers(0, 3 * MiB),
    st.integers(40 * MiB, 190 * MiB),
    st.sampled_from(["cpu", "cuda:0"]),
    st.sampled_from(["vertical", "auto"]),
    st.sampled_from(
        [{}, {"action": "swap"}, {"action": "recompute"}, {"action": "recompute", "input_tier": "nvme"}]
    ),
)
def test_never_over_budget_and_always_approved(
    profile: ModelProfile,
    micro_batches: int,
    boundary: int,
    device: int,
    kind: str,
    order: str,
    block: dict[str, str],
) -> None:
    profile = replace(
        profile,
        micro_batches=micro_batches,
        boundary_bytes=boundary,
        persistent_backward_bytes=boundary // 3,
    )
    cuda = kind != "cpu"
    machine = make_machine(
        Tier.NVME,
        *([Tier.HOST] if cuda else []),
        device=kind,
        read_bytes_per_second=200 * MiB,
        mixed_bytes_per_second=1000 * MiB,
        dram_copy_bytes_per_second=1e10,
    )
    budget = Budget(device=device, nvme="/x:800MiB", **({"host": "400MiB"} if cuda else {}))
    options = PlannerOptions(micro_batch_order=order, force={"block": block} if block else {})
    if order == "vertical" and not any(unit.movable_weight_bytes for unit in profile.units):
        with pytest.raises(ValueError, match="no weights may leave"):
            make_plan(profile, machine, budget, options=options)
        return
    plan = make_plan(profile, machine, budget, options=options)
    assert Plan.from_json(plan.to_json()) == plan
    assert ModelProfile.from_json(profile.to_json()) == profile
    if plan.status != "infeasible":
        assert check(plan, profile, machine, budget) == ()


class Masked(nn.Module):
    """A table, a mask for all blocks, and blocks of one product."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.blocks = nn.ModuleList(Product() for _ in range(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        embedded = self.table(tokens)
        mask = torch.ones(tokens.shape[1], tokens.shape[1])
        hidden = embedded
        for block in self.blocks:
            hidden = block(hidden, mask)
        return hidden.square().mean()


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return mask @ self.linear(hidden)


def test_what_waits_between_blocks_is_measured() -> None:
    model = Masked()
    optimizer = torch.optim.AdamW(model.parameters())
    profile = profile_model(
        model, torch.zeros(2, 16, dtype=torch.long), optimizer=optimizer, elementwise=True
    )
    # The hidden state, what the table gave, to which the model's code refers, and the mask.
    assert profile.boundary_bytes == 4 * (2 * (2 * 16 * 32) + 16 * 16)


# -- faults ------------------------------------------------------------------------------------------


FAULTY = weighty(
    6,
    around=True,
    tied=True,
    micro_batches=3,
    frozen=(1, 2),
    boundary_bytes=5 * MiB,
    persistent_backward_bytes=2 * MiB,
)
SOME = EVERYTHING | {
    "block.1": {"action": "swap"},
    "block.4": {"action": "swap"},
    "block.5": {"action": "swap"},
}


def turned(plan: Plan, one: str, other: str) -> Plan:
    """The last ``one`` and the first ``other`` change places."""
    first = max((e for e in plan.timeline if e.name == one), key=lambda e: e.start_seconds)
    second = min((e for e in plan.timeline if e.name == other), key=lambda e: e.start_seconds)
    swapped = {id(first): replace(first, name=other), id(second): replace(second, name=one)}
    return replace(plan, timeline=tuple(swapped.get(id(e), e) for e in plan.timeline))


def earliest(plan: Plan, name: str, resource: str, after: float = 0.0) -> Plan:
    """The first such event begins with the step."""
    old = next(e for e in plan.timeline if (e.name, e.resource) == (name, resource))
    event = Event(
        name=name,
        resource=resource,
        start_seconds=after,
        end_seconds=after + old.end_seconds - old.start_seconds,
    )
    return replace(plan, timeline=tuple(event if e is old else e for e in plan.timeline))


def as_if_horizontal(plan: Plan) -> Plan:
    """Its threads are off bill and peak, so that what else is wrong is seen."""
    peaks = dict(plan.peaks)
    peaks[Tier.DEVICE] -= plan.micro_batches * THREAD_BYTES
    bill = tuple(line for line in plan.bill if line.category != "threads")
    return replace(plan, micro_batch_order=HORIZONTAL, bill=bill, peaks=tuple(peaks.items()))


FAULTS: list[tuple[str, Rule, Callable[[Plan], Plan]]] = [
    ("horizontal events", Rule.DEPENDENCY, lambda p: replace(p, micro_batch_order=HORIZONTAL)),
    ("horizontal bytes", Rule.DEVICE_PEAK, as_if_horizontal),
    ("threads billed as slack", Rule.BILL, lambda p: billed(p, "threads", "slack")),
    ("horizontal extents", Rule.TIER_PEAK, lambda p: replace(p, micro_batch_order=HORIZONTAL)),
    (
        "updates in backward",
        Rule.ORDER,
        lambda p: replace(p, update_schedule=Schedule.IN_BACKWARD),
    ),
    ("horizontal traffic", Rule.BYTES_MOVED, lambda p: replace(p, micro_batch_order=HORIZONTAL)),
    (
        "a block before all have passed the one before",
        Rule.DEPENDENCY,
        lambda p: turned(p, "forward layers.2", "forward layers.3"),
    ),
    (
        "a block's backward before all have passed the one behind",
        Rule.DEPENDENCY,
        lambda p: turned(p, "backward layers.3", "recompute layers.3"),
    ),
    ("a pass is missing", Rule.DEPENDENCY, lambda p: without(p, "forward layers.4", 1)),
    ("a read of weights is missing", Rule.DEPENDENCY, lambda p: without(p, "read weights layers.4")),
    ("a read of activations is missing", Rule.DEPENDENCY, lambda p: without(p, "read layers.1")),
    ("a write of activations is missing", Rule.DEPENDENCY, lambda p: without(p, "write layers.1", 2)),
    (
        "activations are read before they are written",
        Rule.DEPENDENCY,
        lambda p: earliest(p, "read layers.1", "read:nvme"),
    ),
    (
        "weights come too late",
        Rule.DEPENDENCY,
        lambda p: shifted(p, "read weights layers.4", "read:nvme", 0.05),
    ),
    ("backward is quicker than it may be", Rule.DURATION, lambda p: quicker(p, "backward layers.0")),
    (
        "a unit comes while all windows are taken",
        Rule.WINDOWS,
        lambda p: from_the_beginning(p, "read weights layers.4"),
    ),
    ("a place too small", Rule.STAGING, lambda p: staged(p, kept_bytes=(PAGE, *p.staging.kept_bytes[1:]))),
    ("activations billed as slack", Rule.BILL, lambda p: billed(p, "activations", "slack")),
    ("micro-batches that are not there", Rule.MICRO_BATCHES, lambda p: replace(p, micro_batches=2)),
]


@pytest.fixture(scope="module")
def faulty() -> Plan:
    options = PlannerOptions(
        force=SOME, safety_margin=0.0, update_schedule="ahead", micro_batch_order="vertical", gap=0.99
    )
    plan = make_plan(FAULTY, make_machine(**SLOW), BUDGET, options=options)
    assert check(plan, FAULTY, make_machine(**SLOW), BUDGET) == ()
    return plan


@pytest.mark.parametrize(("name", "rule", "harm"), FAULTS, ids=[name for name, _, _ in FAULTS])
def test_the_checker_names_what_broke(
    faulty: Plan, name: str, rule: Rule, harm: Callable[[Plan], Plan]
) -> None:
    found = check(harm(faulty), FAULTY, make_machine(**SLOW), BUDGET)
    assert rule in {violation.rule for violation in found}, found


def test_one_micro_batch_in_vertical_order_is_a_violation(faulty: Plan) -> None:
    alone = replace(FAULTY, micro_batches=1)
    plan = replace(faulty, micro_batches=1, profile_digest=alone.digest)
    found = check(plan, alone, make_machine(**SLOW), BUDGET)
    assert [violation.rule for violation in found] == [Rule.ORDER]
