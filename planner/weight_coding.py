"""Weights that lie coded on their tier: what moving them costs, what they take there, and whether it pays.

Coding is exact, and a choice of the plan wherever the machine was measured through a codec
(``machine.Link.weight_codec``): it moves fewer bytes, and takes processor time and memory. All weights of a
tier are coded, or none.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from memtrain.planner.actions import Tier
from memtrain.planner.block_parts import PAGE_BYTES
from memtrain.planner.machine import Link, Machine, StateCodec
from memtrain.planner.options import PlannerOptions
from memtrain.planner.plan import CodedTier
from memtrain.planner.profile import UnitProfile
from memtrain.planner.space import Space, coded_tier
from memtrain.planner.staging import SMALLEST_PIECE_ELEMENTS


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightWay:
    """What one byte of weights costs between a tier and a window."""

    read_load: float
    """Bytes of other traffic that occupy the link as long."""
    write_load: float
    moved: float
    """Bytes that move."""
    cpu_seconds: float
    """Of the arithmetic: 0 beside a GPU."""

    def load(self, *, read: bool) -> float:
        """Of either direction."""
        return self.read_load if read else self.write_load


def weight_ways(machine: Machine, coded: Iterable[CodedTier]) -> dict[Tier, WeightWay]:
    """By tier, where ``coded`` are those whose weights are coded."""
    tiers = {each.tier for each in coded}
    return {link.tier: _way(link, machine, coded=link.tier in tiers) for link in machine.links}


def _way(link: Link, machine: Machine, *, coded: bool) -> WeightWay:
    codec = link.weight_codec if coded else None
    cpu_seconds = link.cpu_seconds_per_byte if codec is None else codec.cpu_seconds_per_byte
    return WeightWay(
        read_load=link.load(1.0, codec, read=True),
        write_load=link.load(1.0, codec, read=False),
        moved=1.0 if codec is None else codec.ratio,
        cpu_seconds=cpu_seconds * machine.on_cpu,
    )


def weight_room_bytes(unit: UnitProfile, coded: CodedTier | None) -> int:
    """The most that the unit's weights take on a tier: whole pages for each parameter. Where they are coded
    there is room for what does not shrink, and a page more for each segment; a parameter ends in its own."""
    plain = unit.weight_extent_bytes
    if coded is None or not plain:
        return plain
    parameters = len(unit.parameters) or -(-unit.movable_weight_bytes // SMALLEST_PIECE_ELEMENTS)
    return plain + PAGE_BYTES * (parameters + plain // coded.segment_bytes)


def coding_spaces(space: Space, machine: Machine, options: PlannerOptions) -> Iterator[Space]:
    """``space``, in which weights are coded where they must be, and then with every set of other tiers coded
    with which a plan may be faster."""
    streamed = {tier for tiers in space.weights for tier in tiers}
    optional = [
        coded_tier(link.tier, codec)
        for link in machine.links
        if link.tier in space.tiers and link.tier in streamed and link.tier in options.coding_optional
        if (codec := link.weight_codec) is not None and may_be_faster(link)
    ]
    for count in range(len(optional) + 1):
        for chosen in itertools.combinations(optional, count):
            yield dataclasses.replace(space, coded_weights=(*space.coded_weights, *chosen))


def may_be_faster(link: Link) -> bool:
    """Whether anything is gained by coding weights there; otherwise no plan is faster with it."""
    codec = link.weight_codec
    return codec is not None and (
        codec.read_bytes_per_second > link.read_bytes_per_second
        or codec.write_bytes_per_second > link.write_bytes_per_second
        or codec.cpu_seconds_per_byte < link.cpu_seconds_per_byte
    )


def is_faster(link: Link) -> bool:
    """Whether coding gains before there is a model to plan for: of the disk alone, in a step that reads every
    weight for forward and for backward, and writes it once."""
    codec = link.weight_codec
    if codec is None:
        return False

    def seconds(of: Link | StateCodec) -> float:
        return 2 / of.read_bytes_per_second + 1 / of.write_bytes_per_second

    return seconds(codec) < seconds(link)
