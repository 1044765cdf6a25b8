"""Codecs of optimizer state and weights at rest, by name.

The arithmetic is ``memtrain.optim``'s and the bytes move in ``memtrain.offload``, which do not know each
other: here both meet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from memtrain.offload.codec import SEGMENT_BYTES, Codec, CodingStatistics, staging_bytes
from memtrain.offload.stored_weights import StoredWeights
from memtrain.optim.storage.lossless import ExponentCodec
from memtrain.planner.actions import Tier
from memtrain.planner.machine import Budget, Machine, StateCodec
from memtrain.planner.plan import Plan
from memtrain.planner.units import format_gib

CODECS: dict[str, type[ExponentCodec]] = {"exponent": ExponentCodec}
"""By the names of recipes and of ``prepare(codecs=...)``."""


class CodecError(ValueError):
    """A codec that was asked for cannot be used; names it, the tier and the remedy."""


AUTO = "auto"
"""Of weights: coded where the plan is predicted to be faster for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightCoding:
    """What was asked for weights that live on tiers."""

    codecs: Mapping[Tier, Codec] = field(default_factory=dict)
    optional: tuple[Tier, ...] = ()
    """Tiers of ``codecs`` on which the plan may leave weights as they are."""


def codecs_for(names: Mapping[str, str], budget: Budget, *, option: str = "codecs") -> dict[Tier, Codec]:
    """The codecs of tiers.

    Args:
        names: by tier.
        budget: must have bytes there.
        option: that named them, for messages.

    Raises:
        CodecError: there is no such codec or tier, or the budget has no bytes there.
        MissingZstandardError: its library is not installed.
    """
    known = [tier.value for tier in Tier if tier is not Tier.DEVICE]
    found: dict[Tier, Codec] = {}
    for tier, name in names.items():
        if tier not in known:
            raise CodecError(f"{option}[{tier!r}]: a codec is for one of {', '.join(known)}")
        if name not in CODECS:
            raise CodecError(f"{option}[{tier!r}] is {name!r}: there are {', '.join(CODECS)}")
        if not budget.capacity(Tier(tier)):
            raise CodecError(
                f"{option}[{tier!r}] is {name!r}, but the budget has no bytes in {tier}: give budget.{tier} "
                f"a size, or leave the codec out"
            )
        found[Tier(tier)] = CODECS[name]()
    return found


def weight_codecs_for(names: Mapping[str, str], budget: Budget) -> WeightCoding:
    """The same of weights, where a name may be ``auto``. Raises as ``codecs_for``."""
    every = {tier: next(iter(CODECS)) if name == AUTO else name for tier, name in names.items()}
    codecs = codecs_for(every, budget, option="weight_codecs")
    return WeightCoding(codecs=codecs, optional=tuple(t for t in codecs if names[t.value] == AUTO))


def weight_coding_of(names: Mapping[str, str], budget: Budget, stored: StoredWeights | None) -> WeightCoding:
    """Of a session, whose model's weights are on a tier already where it is a streamed one. Raises as
    ``codecs_for`` and ``coding_of_streamed``."""
    if stored is None:
        return weight_codecs_for(names, budget)
    return coding_of_streamed(names, stored.store.tier, stored.codec)


def coding_of_streamed(asked: Mapping[str, str] | None, tier: Tier, codec: Codec | None) -> WeightCoding:
    """For a streamed model, whose weights are on ``tier`` already, through ``codec`` or as they are: a plan
    does not change it.

    Raises:
        CodecError: something else is asked for.
    """
    names = dict(asked or {})
    lies = None if codec is None else codec.name
    wanted = names.pop(tier.value, AUTO)
    if wanted not in (AUTO, lies):
        raise CodecError(
            f"weight_codecs[{tier.value!r}] is {wanted!r}, but the weights of this streamed model are on "
            f"{tier.value} {'as they are' if lies is None else f'through codec {lies}'}: give "
            f"streamed_model() weight_codecs={{{tier.value!r}: {wanted!r}}} too"
        )
    if names:
        other = next(iter(names))
        raise CodecError(
            f"weight_codecs[{other!r}]: the weights of this streamed model are on {tier.value}, and stay "
            f"there: leave {other} out"
        )
    return WeightCoding(codecs={} if codec is None else {tier: codec})


def weight_dtype(model: nn.Module) -> torch.dtype:
    """That of most bytes: the one to measure a codec with."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel() * parameter.dtype.itemsize
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def refuse_other_codecs(
    machine: Machine,
    codecs: Mapping[Tier, Codec],
    budget: Budget,
    weight_codecs: Mapping[Tier, Codec] | None = None,
) -> None:
    """Raise CodecError where the machine was measured with other codecs than are asked for: a plan would be
    about something else than what runs."""
    for link in machine.links:
        if budget.capacity(link.tier):
            _refuse_other(link.tier, machine, codecs.get(link.tier), link.state_codec, "codec")
            asked = (weight_codecs or {}).get(link.tier)
            _refuse_other(link.tier, machine, asked, link.weight_codec, "weight codec")


def _refuse_other(
    tier: Tier, machine: Machine, codec: Codec | None, found: StateCodec | None, what: str
) -> None:
    asked, measured = None if codec is None else codec.name, None if found is None else found.name
    if asked != measured:
        raise CodecError(
            f"{tier.value}: {what} {asked or 'none'} is asked for, machine {machine.name} was "
            f"measured with {measured or 'none'}: leave machine out, or measure it for the same codecs "
            f"with measure_machine({what.replace(' ', '_')}s=...)"
        )
    if codec is not None and found is not None:
        needs = SEGMENT_BYTES, staging_bytes(codec)
        had = found.segment_bytes, found.staging_bytes
        if had != needs:
            raise CodecError(
                f"{tier.value}: {what} {measured} works in segments of {needs[0]} bytes and takes "
                f"{needs[1]}, machine {machine.name} was measured when these were {had[0]} and {had[1]}: "
                f"leave machine out, or measure it again with measure_machine(refresh=True)"
            )


def codecs_of_plan(plan: Plan, coding: WeightCoding) -> dict[Tier, Codec]:
    """Those through which weights go in a run of ``plan``.

    Raises:
        CodecError: the plan leaves weights as they are that were to be coded, or the other way round.
    """
    coded = {each.tier for each in plan.staging.coded_weights}
    for tier in sorted({state.weight_tier for state in plan.states} - {Tier.DEVICE}):
        if tier in coding.codecs and tier not in coded and tier not in coding.optional:
            raise CodecError(
                f"weight_codecs[{tier.value!r}] is {coding.codecs[tier].name!r}, and the plan leaves weights "
                f"on {tier.value} as they are: make a plan for this machine, or ask for 'auto'"
            )
        if tier in coded and tier not in coding.codecs:
            raise CodecError(
                f"the plan has weights on {tier.value} coded: ask for weight_codecs={{{tier.value!r}: ...}}"
            )
    return {tier: coding.codecs[tier] for tier in coded}


def coding_text(tier: Tier, what: str, name: str, done: CodingStatistics) -> str:
    """What coding has done, for the report."""
    ways = ", ".join(f"{count} {way}" for way, count in done.ways.items() if count)
    return (
        f"{tier.value}: {what} coded ({name}): {format_gib(done.plain_bytes_written)} written as "
        f"{format_gib(done.coded_bytes_written)} (ratio {done.ratio:.3f}; parts: {ways or 'none'}), "
        f"{format_gib(done.plain_bytes_read)} read as {format_gib(done.coded_bytes_read)}, "
        f"{done.encode_seconds:.1f} s of coding and {done.decode_seconds:.1f} s of decoding"
    )
