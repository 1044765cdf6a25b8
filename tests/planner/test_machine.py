from __future__ import annotations

import pytest

from memtrain.planner.actions import Tier
from memtrain.planner.machine import Budget, Machine
from memtrain.planner.memory_place import MemoryPlace
from memtrain.planner.units import GiB, MiB
from tests.planner.toys import make_machine


def test_round_trip_and_missing_tier() -> None:
    machine = make_machine(Tier.NVME, Tier.CXL)
    assert Machine.from_json(machine.to_json()) == machine
    with pytest.raises(KeyError, match="no tier host"):
        machine.link(Tier.HOST)
    with pytest.raises(ValueError, match="machine version 7"):
        Machine.from_json('{"version": 7}')


@pytest.mark.parametrize("slowdown", [0.99, 0.0, float("nan"), float("inf")])
def test_nothing_is_quicker_in_a_step_than_alone(slowdown: float) -> None:
    with pytest.raises(ValueError, match="machine toy: arithmetic_slowdown must be finite and at least 1"):
        make_machine(arithmetic_slowdown=slowdown)


def test_a_link_needs_bandwidth() -> None:
    with pytest.raises(ValueError, match=r"link to nvme: read_bytes_per_second must be > 0, got 0"):
        make_machine(read_bytes_per_second=0)


def test_budget_reads_every_tier() -> None:
    budget = Budget(device="1GiB", cxl="1:2GiB", nvme="/mnt/fast:3MiB")
    sizes = [budget.capacity(t) for t in (Tier.DEVICE, Tier.HOST, Tier.CXL, Tier.NVME)]
    assert sizes == [GiB, 0, 2 * GiB, 3 * MiB]
    assert (budget.cxl_place, budget.nvme_directory) == (MemoryPlace(nodes=(1,)), "/mnt/fast")


@pytest.mark.parametrize(
    "fields", [{"device": 0}, {"device": "1GiB", "nvme": "40GiB"}, {"device": "1GiB", "nvme": "/x:"}]
)
def test_a_budget_that_says_nothing_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"budget|size"):
        Budget(**fields)  # type: ignore[arg-type]
