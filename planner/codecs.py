"""Lossy compressions of saved activations, by name: what they weigh, cost and lose.

Both are group-wise absolute-maximum quantisation: of every ``GROUP`` values one scale in 16 bits, and each
value in 8 or 4 bits: the family of ActNN (arXiv 2104.14129), with a symmetric code rounded to the nearest
where ActNN has a zero point and rounds at random. Here a codec belongs to a kind of tensor and its error is
that of the values; a run has the same names as forms of whole blocks (``profile.BlockForm``), on top of what
is computed again exactly, and the error is measured of their gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from memtrain.planner.hardware import Accelerator, Quoted, suggest
from memtrain.planner.ranges.model import Codec

GROUP = 128
"""Values that share a scale."""
_SCALE_BYTES = 2
_ABSOLUTE_MAXIMUM = 2.8555
"""Root of the mean square of the largest of ``GROUP`` normally distributed values, over their deviation:
integrated numerically, and drawn in a test."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantiser:
    """A codec apart from the device that runs it."""

    name: str
    bits: int

    def ratio(self, element_bytes: int) -> float:
        """Compressed over plain bytes, scales counted, of elements of ``element_bytes``."""
        return (self.bits / 8 + _SCALE_BYTES / GROUP) / element_bytes

    @property
    def error(self) -> float:
        """Deviation of the rounding over that of the values, for normally distributed ones.

        Codes are ``-m ... m`` with ``m = 2**(bits - 1) - 1``; a step is the group's largest magnitude over m,
        and rounding to the nearest leaves a step over the root of 12.
        """
        codes = (1 << (self.bits - 1)) - 1
        return _ABSOLUTE_MAXIMUM / codes / math.sqrt(12)


QUANTISERS = (Quantiser(name="int8", bits=8), Quantiser(name="int4", bits=4))


def codec_rate(device: Accelerator, ratio: float) -> Quoted:
    """Plain bytes per second of either direction: memory traffic alone, plain bytes and compressed ones."""
    return Quoted(
        value=device.memory_bytes_per_second.value * device.memory_efficiency.value / (1 + ratio),
        source=(
            "assumption: a fused kernel bound by memory, plain bytes one way and compressed ones the other, "
            f"at the copy rate of {device.name}"
        ),
    )


def codecs(
    names: Iterable[str], device: Accelerator, *, element_bytes: int, places: tuple[str, ...] = ()
) -> tuple[Codec, ...]:
    """The codecs called ``names``, as fast as ``device`` can be expected to run them.

    Args:
        names: of ``QUANTISERS``; one that is named twice counts once.
        device: whose memory bandwidth bounds them.
        element_bytes: of the tensors that they compress.
        places: where compressed tensors may be sent to.

    Raises:
        ValueError: no codec has such a name.
    """
    known = {quantiser.name: quantiser for quantiser in QUANTISERS}
    found = []
    for name in dict.fromkeys(names):
        if name not in known:
            raise ValueError(f"no codec is called {name!r}; {suggest(name, list(known))}")
        ratio = known[name].ratio(element_bytes)
        rate = codec_rate(device, ratio).value
        found.append(
            Codec(
                name=name,
                ratio=ratio,
                compress_bytes_per_second=rate,
                decompress_bytes_per_second=rate,
                error=known[name].error,
                places=places,
            )
        )
    return tuple(found)
