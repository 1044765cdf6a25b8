from __future__ import annotations

from typing import Any

import pytest

from memtrain.planner.actions import Action, Tier
from memtrain.planner.check import check
from memtrain.planner.compose import SWAP_PLACE, machine_for
from memtrain.planner.decisions import PlannerOptions
from memtrain.planner.gpus import accelerator
from memtrain.planner.hardware import Accelerator
from memtrain.planner.machine import Link, Machine
from memtrain.planner.memory_place import MemoryPlace
from memtrain.planner.solve import make_plan
from memtrain.planner.units import GiB, TiB
from tests.planner.toys import make_block, make_profile


def rates(link: Link) -> tuple[float, float, float]:
    """Read, write and mixed in GB/s."""
    return (
        link.read_bytes_per_second / 1e9,
        link.write_bytes_per_second / 1e9,
        link.mixed_bytes_per_second / 1e9,
    )


def test_one_gpu_with_memory_and_a_disk_by_hand() -> None:
    setup = machine_for("rtx-4090", dram="64GiB@2xddr5-4800", nvme="/mnt/fast:2TB@7GB/s,5GB/s")
    machine, budget = setup.machine, setup.budget
    assert (machine.name, machine.device) == ("rtx-4090", "cuda:0")
    assert machine.source == "preset: rtx-4090; quoted numbers, nothing measured"
    assert [link.tier for link in machine.links] == [Tier.HOST, Tier.NVME]
    assert rates(machine.link(Tier.HOST)) == pytest.approx((26, 25, 37.12))
    assert rates(machine.link(Tier.NVME)) == pytest.approx((7, 5, 35 / 6))
    assert machine.dram_copy_bytes_per_second == pytest.approx(2 * 0.8 * 38.4e9)
    assert budget.device_bytes == int(23.64 * GiB) - GiB
    assert budget.host_bytes == int(0.9 * 64 * GiB)
    assert (budget.nvme_directory, budget.nvme_bytes) == ("/mnt/fast", 2 * 10**12)
    assert budget.cxl is None
    assert Machine.from_json(machine.to_json()) == machine


def test_eight_gpus_share_their_host_and_pairs_of_them_a_bus() -> None:
    setup = machine_for("a800-80g", gpus=8, dram="1TiB", nvme="2x4TB@6GB/s", cxl="256GiB@20GB/s")
    assert setup.machine.name == "a800-80gb-sxm, one of 8"
    # Two sockets of eight channels, 0.8 of 25.6 GB/s each, for eight GPUs: 40.96 GB/s, above the bus.
    assert setup.dram_bytes_per_second.value == pytest.approx(16 * 0.8 * 25.6e9 / 8)
    assert rates(setup.machine.link(Tier.HOST)) == pytest.approx((13, 12.5, 18.56))
    assert setup.host_link.read.source.startswith("derived: 1/2, GPUs behind one switch (https://github.com/")
    assert rates(setup.machine.link(Tier.NVME)) == pytest.approx((1.5, 1.5, 1.5))
    assert rates(setup.machine.link(Tier.CXL)) == pytest.approx((2.5, 2.5, 2.5))
    assert setup.budget.host_bytes == int(0.9 * TiB / 8)
    assert setup.budget.nvme == f"{SWAP_PLACE}:{10**12}"
    assert (setup.budget.cxl_place, setup.budget.cxl_bytes) == (MemoryPlace(nodes=(1,)), 32 * GiB)
    assert setup.interconnect.name == "nvlink-3-a800"


@pytest.mark.parametrize(
    ("gpu", "options", "expected"),
    [
        (accelerator("a800"), {"gpus": 1}, (26, 25, 37.12)),  # alone behind its switch
        (accelerator("a800").given({"gpus_per_uplink": 1}), {"gpus": 8}, (26, 25, 37.12)),
        (
            accelerator("a800"),
            {"gpus": 8, "host_link": "gen4"},
            (26, 25, 37.12),
        ),  # what is named is each GPU's
        (accelerator("a100-80gb-pcie"), {"gpus": 8}, (26, 25, 37.12)),
        (accelerator("h100"), {"gpus": 8, "dram": "1TiB@1000GB/s"}, (55.43, 55.06, 87.22)),
    ],
)
def test_who_shares_a_bus(gpu: Accelerator, options: dict[str, Any], expected: tuple[float, ...]) -> None:
    setup = machine_for(gpu, **({"dram": "1TiB"} | options))
    assert rates(setup.machine.link(Tier.HOST)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("gpu", "gpus", "gigabytes_per_second"),
    [
        ("rtx-4090", 1, 2 * 0.8 * 38.4),
        ("rtx-4090", 2, 2 * 0.8 * 38.4 / 2),
        ("rtx-4090", 4, 8 * 0.8 * 25.6 / 4),  # a server's board, of the GPU's generation
        ("rtx-4060-laptop", 1, 2 * 0.8 * 38.4),
        ("a100-80g", 8, 16 * 0.8 * 25.6 / 8),
        ("h100", 8, 16 * 0.8 * 38.4 / 8),
    ],
)
def test_dram_that_nobody_described(gpu: str, gpus: int, gigabytes_per_second: float) -> None:
    rate = machine_for(gpu, gpus=gpus, dram="64GiB").dram_bytes_per_second
    assert rate.value == pytest.approx(gigabytes_per_second * 1e9)
    assert "assumption: " in rate.source


def test_dram_that_is_slower_than_the_buses_limits_them() -> None:
    setup = machine_for("h100", gpus=8, dram="1TiB@8xddr4-3200")
    assert rates(setup.machine.link(Tier.HOST)) == pytest.approx((20.48, 20.48, 20.48))


def test_a_copy_waits_for_every_link_of_its_way() -> None:
    setup = machine_for("h100", gpus=8, dram="1TiB", nvme="8x4TB", cxl="1TiB@20GB/s")
    waits = {link.tier: link.latency_seconds for link in setup.machine.links}
    assert waits == pytest.approx({Tier.HOST: 7e-6, Tier.CXL: 7.5e-6, Tier.NVME: 157e-6})
    nvme = setup.tiers[Tier.NVME].latency_seconds
    assert nvme is not None
    assert nvme.source.startswith("derived: the sum of [https://arxiv.org/abs/2602.21548")


def test_a_disk_faster_than_the_bus_is_limited_by_it() -> None:
    setup = machine_for("rtx-4090", nvme="8x4TB@7GB/s,1GB/s")  # 56 GB/s read, 8 written
    assert rates(setup.machine.link(Tier.NVME)) == pytest.approx((26, 8, 14))  # 8 * 2 / (1/7 + 1/1)
    assert [link.tier for link in setup.machine.links] == [Tier.NVME]
    assert setup.budget.host_bytes == 0


def test_the_processor_reaches_stores_without_the_bus() -> None:
    setup = machine_for("rtx-4090", dram="64GiB", cxl="4x256GiB@20GB/s", nvme="8x4TB@7GB/s,1GB/s")
    assert setup.tiers[Tier.CXL].read.value == pytest.approx(26e9)
    assert setup.stores[Tier.CXL].read.value == setup.stores[Tier.CXL].mixed.value == pytest.approx(80e9)
    assert setup.stores[Tier.NVME].read.value == pytest.approx(56e9)
    assert Tier.HOST not in setup.stores


def test_without_rates_a_disk_is_of_the_buss_generation() -> None:
    assert machine_for("h100", nvme="4TB").tiers[Tier.NVME].name == "nvme-gen5"
    assert machine_for("l40s", nvme="4TB").tiers[Tier.NVME].name == "nvme-gen4"
    assert machine_for("h100", nvme="4TB", host_link="gen3").tiers[Tier.NVME].name == "nvme-gen3"
    assert machine_for("h100", nvme="4TB", host_link="40GB/s").tiers[Tier.NVME].name == "nvme-gen5"
    assert machine_for("h100", cxl="0:256GiB").tiers[Tier.CXL].mixed.value == 36e9


def test_what_is_given_says_given() -> None:
    setup = machine_for(
        "h100", dram="1TiB@400GB/s", nvme="4TB@6GB/s,5GB/s,7GB/s", host_link="40GB/s,30GB/s,50GB/s"
    )
    assert rates(setup.machine.link(Tier.HOST)) == pytest.approx((40, 30, 50))
    assert [link.source for link in setup.machine.links] == ["given", "given"]
    assert setup.dram_bytes_per_second.source == "given"
    preset = machine_for("h100", dram="1TiB").machine.link(Tier.HOST)
    assert preset.source.startswith("preset: read: https://")
    half = machine_for("h100", dram="1TiB", host_link="40GB/s").machine.link(Tier.HOST)
    assert half.source == (
        "given: read: given; write: given; mixed: assumption: 0.728 of both directions' sum, as measured on "
        "PCIe 4.0"
    )


def test_gpus_without_a_tie_of_their_own_meet_over_the_host() -> None:
    tie = machine_for("l40s", gpus=2, dram="256GiB").interconnect
    assert tie.name == "pcie-gen4-x16 through the host"
    assert tie.peer_bytes_per_second.value == pytest.approx(25e9)
    assert tie.collective_bytes_per_second.value == pytest.approx(37.12e9 / 2)
    assert machine_for("l40s", interconnect="nvlink-4").interconnect.name == "nvlink-4"
    told = machine_for("l40s", interconnect="100GB/s").interconnect.collective_bytes_per_second
    assert (told.value, told.source) == (100e9, "given")


def test_every_fact_has_a_unit_and_a_source() -> None:
    setup = machine_for(
        accelerator("h200").given({"matmul_efficiency": 0.6}), gpus=8, dram="2TiB", cxl="1TiB", nvme="8x4TB"
    )
    facts = setup.facts()
    assert len(facts) == 9 + 3 * 4 + 1 + 2  # the GPU, three tiers, DRAM, the interconnect
    assert all(fact.source and fact.unit and fact.value > 0 for fact in facts)
    given = [(fact.name, fact.value, fact.unit) for fact in facts if fact.source == "given"]
    assert given == [("h200-141gb-sxm: matmul_efficiency", 0.6, "of the peak")]
    units = {fact.name: fact.unit for fact in facts}
    assert units["h200-141gb-sxm: memory_bytes"] == "bytes"
    assert units["h200-141gb-sxm: memory_bytes_per_second"] == "bytes/s"
    assert units["h200-141gb-sxm: half_flops_per_second"] == "FLOP/s"
    assert units["nvme: mixed"] == "GB/s"
    assert units["nvme: latency"] == "us"
    assert units["h200-141gb-sxm: gpus_per_uplink"] == "GPUs"


def test_budgets_can_be_lowered() -> None:
    setup = machine_for("a100-80g", dram="1TiB", nvme="/s:4TB", budget={"device": "70GiB", "nvme": "1TB"})
    assert (setup.budget.device_bytes, setup.budget.nvme) == (70 * GiB, "/s:1000000000000")
    none = machine_for("a100-80g", dram="1TiB", nvme="4TB", budget={"nvme": "0"})
    assert none.budget.nvme is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 0}, "gpus must be at least 1, got 0"),
        (
            {"budget": {"device": "80GiB"}},
            r"budget device=80GiB is above the 79\.250 GiB that one of 1 GPU\(s\) of a100-80gb-sxm has "
            r"there; lower it",
        ),
        (
            {"dram": "1TiB", "gpus": 8, "budget": {"host": "1TiB"}},
            r"host=1TiB is above the 128\.000 GiB that one of 8",
        ),
        (
            {"budget": {"nvme": "1TB"}},
            r"no tier 'nvme' to budget; this machine has device: describe the tier",
        ),
        ({"nvme": "4TB@6"}, r"no --nvme preset is called '6'"),
        ({"host_link": "gen9"}, r"no --host-link preset is called 'gen9'"),
        ({"interconnect": "nvlink-9"}, r"no interconnect is called 'nvlink-9'; did you mean nvlink-"),
    ],
)
def test_what_cannot_be_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        machine_for("a100-80g", **options)


@pytest.mark.usefixtures("solver_here")
def test_the_planner_plans_for_a_machine_that_is_not_here() -> None:
    setup = machine_for("a100-40gb-pcie", dram="64GiB", budget={"device": "8GiB"})
    # Four blocks of 2 GiB do not fit beside the rest; each takes 86 ms on the bus and runs for one second.
    blocks = tuple(
        make_block(i, saved_bytes=2 * GiB, forward_seconds=1.0, backward_seconds=2.0) for i in range(4)
    )
    profile = make_profile(block_profiles=blocks)
    plan = make_plan(
        profile, setup.machine, setup.budget, options=PlannerOptions(force={}, time_limit_seconds=5.0)
    )
    assert plan.status in ("optimal", "gap")
    assert check(plan, profile, setup.machine, setup.budget) == ()
    assert {decision.action for decision in plan.blocks} <= {Action.KEEP, Action.SWAP}
    assert any(decision.saved_tier is Tier.HOST for decision in plan.blocks)


def measured(*tiers: Tier) -> Machine:
    """Links of 2 GB/s read, 1 GB/s write, 2.5 GB/s both at once, half a millisecond late."""
    links = tuple(
        Link(
            tier=tier,
            read_bytes_per_second=2e9,
            write_bytes_per_second=1e9,
            mixed_bytes_per_second=2.5e9,
            latency_seconds=5e-4,
            source="measured 2026-11-22",
        )
        for tier in tiers
    )
    return Machine(
        name="here", device="cuda:0", cores=8, dram_copy_bytes_per_second=1e10, links=links, source="measured"
    )


def test_measured_links_stand_in_for_presets() -> None:
    setup = machine_for("a100-80g", dram="1TiB", nvme="4TB", measured=measured(Tier.NVME))
    disk = setup.tiers[Tier.NVME]
    assert (disk.read.value, disk.write.value, disk.mixed.value) == (2e9, 1e9, 2.5e9)
    assert disk.read.source == "measured 2026-11-22 on here"
    assert setup.host_link.read.value == machine_for("a100-80g", dram="1TiB").host_link.read.value


def test_a_measured_host_link_is_shared_like_any_other() -> None:
    alone = machine_for("a100-80g", dram="1TiB", measured=measured(Tier.HOST))
    assert alone.host_link.read.value == 2e9
    eight = machine_for("a100-80g", gpus=8, dram="1TiB", measured=measured(Tier.HOST))
    assert eight.host_link.read.value == 2e9 / eight.accelerator.gpus_per_uplink.value


def test_rates_that_are_given_come_before_measured_ones() -> None:
    both = measured(Tier.NVME, Tier.HOST)
    setup = machine_for("a100-80g", dram="1TiB", nvme="4TB@6GB/s", measured=both)
    assert setup.stores[Tier.NVME].read.value == 6e9
    assert setup.host_link.read.value == 2e9
    setup = machine_for("a100-80g", dram="1TiB", nvme="4TB", host_link="20GB/s", measured=both)
    assert setup.host_link.read.value == 20e9
    with pytest.raises(ValueError, match=r"measured links to nvme, host, and none of them is used"):
        machine_for("a100-80g", dram="1TiB", nvme="4TB@6GB/s", host_link="20GB/s", measured=both)


def test_more_than_can_be_addressed_is_refused() -> None:
    for options in ({"dram": "3x8388607TiB"}, {"gpu": accelerator("a100-80g").given({"memory_bytes": 1e30})}):
        with pytest.raises(ValueError, match="is more than can be addressed, 8388607 TiB: lower it"):
            machine_for(**({"gpu": "a100-80g"} | options))  # type: ignore[arg-type]


def test_a_measured_machine_of_which_nothing_can_be_used() -> None:
    with pytest.raises(ValueError, match=r"here has measured links to nvme, and none of them is used"):
        machine_for("a100-80g", dram="1TiB", measured=measured(Tier.NVME))
