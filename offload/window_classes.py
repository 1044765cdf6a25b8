"""Sizes of windows for streamed weights, and which units take turns in which.

A model has units of a few sizes: its blocks, mostly alike, and around them tables as large as the vocabulary
asks for. If every window could hold the largest table, most of their memory would never be used. So a plan
may have windows of several sizes, and a unit takes turns in the smallest that hold it. The classes share
nothing: no order of uses lets one keep a window from another, and each works with as many windows as there
are units of it in use at one time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from memtrain.offload.errors import PlanMismatchError
from memtrain.offload.weight_units import StreamedUnit
from memtrain.planner.plan import WindowClass

FEWEST_SLOTS = 2
"""Where all windows are of one size: one unit is used while the next arrives."""


def class_of(nbytes: int, classes: Sequence[WindowClass]) -> int:
    """Which of ``classes``, the smallest first, a unit of so many bytes takes turns in.

    Raises:
        PlanMismatchError: it is larger than all.
    """
    for number, each in enumerate(classes):
        if nbytes <= each.slot_bytes:
            return number
    sizes = ", ".join(str(each.slot_bytes) for each in classes)
    raise PlanMismatchError(
        f"the plan has windows of {sizes} bytes for weights, this model needs {nbytes}: make a plan for this "
        "model"
    )


def classes_for(
    units: Sequence[StreamedUnit],
    slots: int | Sequence[WindowClass] | None,
    together: Callable[[Collection[str]], int],
) -> tuple[WindowClass, ...]:
    """The classes that ``slots`` asks for.

    Args:
        slots: so many windows, all as large as the largest unit; or classes; or None: as few as can be, of
            one size.
        together: of units by name, how many of them are in use at one time.

    Raises:
        PlanMismatchError: sizes other than those of the largest unit of each class, a class without units, or
            too few windows.
    """
    if slots is None or isinstance(slots, int):
        fewest = max(FEWEST_SLOTS, together([unit.name for unit in units]))
        count = fewest if slots is None else slots
        slots = [WindowClass(slots=count, slot_bytes=max(unit.nbytes for unit in units))]
    classes = tuple(sorted(slots, key=lambda each: each.slot_bytes))
    members: list[list[StreamedUnit]] = [[] for _ in classes]
    for unit in units:
        members[class_of(unit.nbytes, classes)].append(unit)
    for each, own in zip(classes, members, strict=True):
        needed = max((unit.nbytes for unit in own), default=0)
        if each.slot_bytes != needed:
            raise PlanMismatchError(
                f"the plan has windows of {each.slot_bytes} bytes for weights, this model needs "
                f"{needed or 'none of that size'}: make a plan for this model"
            )
        fewest = max(together([unit.name for unit in own]), FEWEST_SLOTS if len(classes) == 1 else 1)
        if each.slots < fewest:
            raise PlanMismatchError(
                f"staging.weight_windows must have at least {fewest} for this model, got {each.slots} "
                f"of {each.slot_bytes} bytes: raise it, or let units stay on the device"
            )
    return classes
