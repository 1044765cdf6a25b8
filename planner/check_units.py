"""What the checker's parts count alike: places, parameters and elements, in arithmetic of its own."""

from __future__ import annotations

import math

from memtrain.planner.actions import UpdateSchedule
from memtrain.planner.machine import Machine
from memtrain.planner.plan import Plan
from memtrain.planner.profile import ModelProfile, UnitProfile


def is_on_cpu(machine: Machine) -> bool:
    """What stays on the device lies in slabs, and rings in the device's memory."""
    return machine.device.startswith("cpu")


def one_by_one(plan: Plan) -> bool:
    """Each unit's gradients are used up before the next unit's come."""
    return plan.update_schedule is UpdateSchedule.IN_BACKWARD and plan.micro_batches == 1


def tensors_of_state(profile: ModelProfile) -> int:
    """For each parameter; a profile that does not know has them in fp32."""
    return profile.state_tensors or math.ceil(profile.state_bytes_per_element / 4)


def parameters_of(profile: ModelProfile, unit: UnitProfile) -> int:
    """How many parameters a unit may have: all that are named, or, if none is, one per 64 Ki elements."""
    return len(unit.parameters) or max(1, math.ceil(elements_of(profile, unit) / 65536))


def elements_of(profile: ModelProfile, unit: UnitProfile) -> float:
    """Elements of a unit's parameters that may leave, whole."""
    if unit.movable_elements:
        return float(unit.movable_elements)
    counts = [0.0]
    if profile.state_bytes_per_element:
        counts.append(unit.state_bytes / profile.state_bytes_per_element)
    if profile.gradient_bytes_per_element:
        counts.append(unit.gradient_bytes / profile.gradient_bytes_per_element)
    return float(math.ceil(max(counts)))
