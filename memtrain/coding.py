"""Codecs of optimizer state at rest, by name.

The arithmetic is ``memtrain.optim``'s and the bytes move in ``memtrain.offload``, which do not know each
other: here both meet.
"""

from __future__ import annotations

from collections.abc import Mapping

from memtrain.offload.codec import SEGMENT_BYTES, Codec, CodingStatistics, staging_bytes
from memtrain.optim.storage.lossless import ExponentCodec
from memtrain.planner.actions import Tier
from memtrain.planner.machine import Budget, Machine
from memtrain.planner.units import format_gib

CODECS: dict[str, type[ExponentCodec]] = {"exponent": ExponentCodec}
"""By the names of recipes and of ``prepare(codecs=...)``."""


class CodecError(ValueError):
    """A codec that was asked for cannot be used; names it, the tier and the remedy."""


def codecs_for(names: Mapping[str, str], budget: Budget) -> dict[Tier, Codec]:
    """The codecs of tiers.

    Raises:
        CodecError: there is no such codec or tier, or the budget has no bytes there.
        MissingZstandardError: its library is not installed.
    """
    known = [tier.value for tier in Tier if tier is not Tier.DEVICE]
    found: dict[Tier, Codec] = {}
    for tier, name in names.items():
        if tier not in known:
            raise CodecError(f"codecs[{tier!r}]: a codec is for one of {', '.join(known)}")
        if name not in CODECS:
            raise CodecError(f"codecs[{tier!r}] is {name!r}: there are {', '.join(CODECS)}")
        if not budget.capacity(Tier(tier)):
            raise CodecError(
                f"codecs[{tier!r}] is {name!r}, but the budget has no bytes in {tier}: give budget.{tier} a "
                f"size, or leave the codec out"
            )
        found[Tier(tier)] = CODECS[name]()
    return found


def refuse_other_codecs(machine: Machine, codecs: Mapping[Tier, Codec], budget: Budget) -> None:
    """Raise CodecError where the machine was measured with other codecs than are asked for: a plan would be
    about something else than what runs."""
    for link in machine.links:
        if not budget.capacity(link.tier):
            continue
        asked = codecs[link.tier].name if link.tier in codecs else None
        measured = None if link.state_codec is None else link.state_codec.name
        if asked != measured:
            raise CodecError(
                f"{link.tier.value}: codec {asked or 'none'} is asked for, machine {machine.name} was "
                f"measured with {measured or 'none'}: leave machine out, or measure it for the same codecs "
                f"with measure_machine(codecs=...)"
            )

        if measured is not None and link.state_codec is not None:
            needs = SEGMENT_BYTES, staging_bytes(codecs[link.tier])
            had = link.state_codec.segment_bytes, link.state_codec.staging_bytes
            if had != needs:
                raise CodecError(
                    f"{link.tier.value}: codec {measured} works in segments of {needs[0]} bytes and takes "
                    f"{needs[1]}, machine {machine.name} was measured when these were {had[0]} and {had[1]}: "
                    f"leave machine out, or measure it again with measure_machine(refresh=True)"
                )


def coding_text(tier: Tier, name: str, done: CodingStatistics) -> str:
    """What coding has done, for the report."""
    ways = ", ".join(f"{count} {way}" for way, count in done.ways.items() if count)
    return (
        f"{tier.value}: optimizer state coded ({name}): {format_gib(done.plain_bytes_written)} written as "
        f"{format_gib(done.coded_bytes_written)} (ratio {done.ratio:.3f}; parts: {ways or 'none'}), "
        f"{done.encode_seconds:.1f} s of coding and {done.decode_seconds:.1f} s of decoding"
    )
