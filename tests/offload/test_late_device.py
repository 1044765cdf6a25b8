"""The stand-in for a GPU finds what it is there to find."""

from __future__ import annotations

import pytest
import torch

from memtrain.offload.slab import Ring
from tests.offload.late_device import LateDevice


@pytest.fixture
def late() -> LateDevice:
    return LateDevice(eagerness=0.0)


@pytest.fixture
def slot(late: LateDevice) -> torch.Tensor:
    return Ring(1, 4096, device=late).acquire().buffer[:32]


def here(value: float) -> torch.Tensor:
    return torch.full((8,), value)


def test_what_is_not_waited_for_is_poison(late: LateDevice, slot: torch.Tensor) -> None:
    out = late.copy_out(here(1.0), slot)
    assert slot.view(torch.float32).isnan().all()
    out.wait()  # holds for the device, not for the host
    assert slot.view(torch.float32).isnan().all()
    out.synchronize()
    assert torch.equal(slot.view(torch.float32), here(1.0))
    target = here(0.0)
    back = late.copy_in(slot, target)
    assert target.isnan().all()
    back.wait()
    assert torch.equal(target, here(1.0))
    assert not back.done()
    back.synchronize()
    assert back.done()
    assert late.faults == []


def test_a_source_is_read_when_the_copy_runs(late: LateDevice, slot: torch.Tensor) -> None:
    source = here(1.0)
    copy = late.copy_out(source, slot)
    source.fill_(2.0)
    copy.synchronize()
    assert torch.equal(slot.view(torch.float32), here(2.0))


def test_copies_of_a_direction_run_in_order(late: LateDevice, slot: torch.Tensor) -> None:
    first = late.copy_out(here(1.0)[:4], slot[:16])
    second = late.copy_out(here(2.0)[:4], slot[16:])
    second.synchronize()
    assert first.done()


def test_a_slot_changed_before_the_host_knows_is_found(late: LateDevice, slot: torch.Tensor) -> None:
    slot.view(torch.float32).fill_(1.0)
    target = here(0.0)
    copy = late.copy_in(slot, target)
    copy.wait()
    slot.zero_()
    copy.synchronize()
    assert torch.equal(target, here(1.0))  # this once
    assert late.faults == ["a slot was changed before the copy from it was over"]


def test_a_slot_written_before_its_copy_is_over_is_found(late: LateDevice, slot: torch.Tensor) -> None:
    copy = late.copy_out(here(1.0), slot)
    slot.zero_()
    copy.synchronize()
    assert late.faults == ["a slot was written before the copy to it was over"]


def test_memory_that_is_not_registered_is_found(late: LateDevice) -> None:
    late.copy_out(here(1.0), torch.empty(32, dtype=torch.uint8)).synchronize()
    assert late.faults == ["a copy used staging memory that is not registered"]


def test_time_passes_by_itself(slot: torch.Tensor) -> None:
    late = LateDevice(eagerness=1.0)
    late.registered[slot.data_ptr()] = slot.numel()
    assert late.copy_out(here(1.0), slot).done()
