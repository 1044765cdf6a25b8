"""How a weight keeps the part of its value that its own dtype cannot hold.

``none``     nothing is kept; a bf16 weight is rounded at random, so that steps below its resolution count on
             average; an fp32 weight is its own value.
``split24``  bf16 weight + one int8: the 24 leading bits of the fp32 value, of which 15 are mantissa.
``fp32``     a full fp32 copy.

The split is an identity on 24-bit floats, made with integer arithmetic on the bit pattern: with q the
value's 24 leading bits, rounded, the weight is ``hi = (q + 128) >> 8`` and the correction
``lo = q - 256 * hi``, which lies in -128..127. Since the bit patterns of floats of one sign are ordered as
their values are, this is right across binades too, where the distance of neighbours below a power of two is
half of that above. A correction scaled by the weight's unit in the last place (FlashOptim's, arXiv
2602.23349, in steps of 1/254 of it) needs that case apart and is not idempotent. The weight is the value's
nearest bf16; a tie goes away from zero, since lo = +128 does not exist.

With a key the 24 bits are rounded at random as well, by a byte an element. Without one, steps below 1.5e-5 of
a weight are lost: a norm's scale of 1 would not move at a learning rate of 1e-5.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from memtrain.optim.storage.random import RandomKey, random_bits, random_bytes, stochastic_round

Stored = dict[str, Tensor]


class MasterFormat(Protocol):
    """Between a weight with what is stored beside it and the fp32 value the optimizer works on."""

    name: str
    """What users write: ``none``, ``split24`` or ``fp32``."""

    def empty(self, weight: Tensor) -> Stored:
        """Tensors with which ``load`` gives ``weight`` exactly. TypeError for a dtype it cannot serve."""

    def load(self, weight: Tensor, stored: Stored) -> Tensor:
        """The fp32 value. May be the weight's or ``stored``'s own memory: change it only to store it back."""

    def store_(self, weight: Tensor, stored: Stored, value: Tensor, *, key: RandomKey | None = None) -> None:
        """Write the fp32 ``value`` into ``weight`` and ``stored``; where it is rounded, at random by ``key``.

        Raises ValueError if the weight is to be rounded at random and there is no ``key``.
        """

    def size_bytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        """Bytes stored beside a weight of ``shape`` and ``dtype``, exactly."""


class NoMaster:
    """The weight alone: fp32 as it is, bf16 by stochastic rounding."""

    name = "none"

    def empty(self, weight: Tensor) -> Stored:
        _require(self.name, weight.dtype, (torch.float32, torch.bfloat16))
        return {}

    def load(self, weight: Tensor, stored: Stored) -> Tensor:
        return weight.detach().float()

    def store_(self, weight: Tensor, stored: Stored, value: Tensor, *, key: RandomKey | None = None) -> None:
        if weight.dtype == torch.bfloat16:
            if key is None:
                raise ValueError("a bfloat16 weight without a master is rounded at random: give a key")
            value = stochastic_round(value, random_bits(key, value.numel(), value.device))
        weight.detach().copy_(value)

    def size_bytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        _require(self.name, dtype, (torch.float32, torch.bfloat16))
        return 0


class Split24Master:
    """A bf16 weight and an int8 correction. Assigning to the weight from outside leaves the correction stale,
    which moves the value by up to half a unit in bf16's last place; ``empty`` gives a fresh one.
    """

    name = "split24"

    def empty(self, weight: Tensor) -> Stored:
        _require(self.name, weight.dtype, (torch.bfloat16,))
        return {"correction": torch.zeros(weight.shape, dtype=torch.int8, device=weight.device)}

    def load(self, weight: Tensor, stored: Stored) -> Tensor:
        return join24(weight.detach(), stored["correction"])

    def store_(self, weight: Tensor, stored: Stored, value: Tensor, *, key: RandomKey | None = None) -> None:
        high, low = split24(value, None if key is None else random_bytes(key, value.numel(), value.device))
        weight.detach().copy_(high)
        stored["correction"].copy_(low)

    def size_bytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        _require(self.name, dtype, (torch.bfloat16,))
        return shape.numel()


class Fp32Master:
    """A full fp32 copy; the weight is its nearest value."""

    name = "fp32"

    def empty(self, weight: Tensor) -> Stored:
        _require(self.name, weight.dtype, (torch.bfloat16, torch.float16, torch.float32))
        return {"master": weight.detach().to(torch.float32, copy=True)}

    def load(self, weight: Tensor, stored: Stored) -> Tensor:
        return stored["master"]

    def store_(self, weight: Tensor, stored: Stored, value: Tensor, *, key: RandomKey | None = None) -> None:
        stored["master"].copy_(value)
        weight.detach().copy_(value)

    def size_bytes(self, shape: torch.Size, dtype: torch.dtype) -> int:
        _require(self.name, dtype, (torch.bfloat16, torch.float16, torch.float32))
        return 4 * shape.numel()


def split24(value: Tensor, raise_by: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """fp32 -> (bf16, int8), to nearest or, given int32 numbers 0 to 255 for all elements, at random.

    NaN becomes (NaN, 0); what rounds beyond bf16's largest becomes infinite.
    """
    raised = 128 if raise_by is None else raise_by.reshape(value.shape)
    top = (value.contiguous().view(torch.int32) + raised) >> 8
    high = (top + 128) >> 8
    low = (top - (high << 8)).to(torch.int8)
    weight = torch.where(value.isnan(), torch.nan, high.to(torch.int16).view(torch.bfloat16))
    return weight, low.masked_fill_(~weight.isfinite(), 0)


def join24(weight: Tensor, correction: Tensor) -> Tensor:
    """(bf16, int8) -> fp32, exact. A weight that is not finite is returned as it is."""
    high = weight.contiguous().view(torch.int16).to(torch.int32)
    value = ((high << 16) + (correction.to(torch.int32) << 8)).view(torch.float32)
    return torch.where(weight.isfinite(), value, weight.float())


def _require(name: str, dtype: torch.dtype, served: tuple[torch.dtype, ...]) -> None:
    if dtype not in served:
        names = ", ".join(str(each).removeprefix("torch.") for each in served)
        raise TypeError(
            f"master {name!r} serves weights in {names}, got {str(dtype).removeprefix('torch.')}; "
            f"choose another master"
        )


_MASTERS: dict[str, MasterFormat] = {each.name: each for each in (NoMaster(), Split24Master(), Fp32Master())}


def master_format(name: str) -> MasterFormat:
    """The master of that name. Raises ValueError that lists the names."""
    try:
        return _MASTERS[name]
    except KeyError:
        raise ValueError(f"master must be one of {', '.join(_MASTERS)}, got {name!r}") from None
