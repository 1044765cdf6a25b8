"""What the bytes on a tier are of, as the names of extents say, and how many of them had to be written.

A tier wears by what is written to it, and what has not changed need not be. Executors count, by tier, the
bytes of what they found changed: the state of parameters that were stepped, weights with other bits than
before, gradients, what a block saved. Stores count what they were given to write. Beside each other the two
say how far writing is from the least possible.
"""

from __future__ import annotations

from enum import Enum


class Content(str, Enum):
    """A class of bytes that a tier may hold."""

    STATE = "optimizer state"
    GRADIENTS = "gradients"
    ACTIVATIONS = "activations"
    WEIGHTS = "weights"
    OTHER = "other"


_BEGINNINGS = {
    "optimizer state of ": Content.STATE,
    "spare extent ": Content.STATE,  # the next generation of a record that a snapshot still reads
    "gradient of ": Content.GRADIENTS,
    "activations of ": Content.ACTIVATIONS,
    "weight ": Content.WEIGHTS,
}


def content_of(extent_name: str) -> Content:
    """What an extent with this name holds."""
    for beginning, content in _BEGINNINGS.items():
        if extent_name.startswith(beginning):
            return content
    return Content.OTHER
