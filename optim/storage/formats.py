"""How an optimizer's moments lie in memory between two steps: fp32, bf16, 8-bit or 4-bit blocks.

A format turns fp32 values into plain tensors and back; the plain tensors are what ``state_dict`` holds, so
that checkpoints load with ``weights_only=True``. Elements count in the row-major order of the logical shape,
whatever the strides of the values. The grid loads, computes in fp32 and stores; fused kernels read and write
the same tensors.

Why not bitsandbytes' 8-bit states: its second moment has a zero code, and where neighbours in a block differ
widely the update explodes (the table in ``blocks.py``); its code books need a look-up for each element where
three products do; and on a CPU its step took 14 times as long as ours (benchmarks/optimizers.py).
``bitsandbytes_format.py`` reads its states, for those who go on from a checkpoint.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from memtrain.optim.storage import blocks
from memtrain.optim.storage.random import RandomKey, random_bits, stochastic_round

Stored = dict[str, Tensor]


class StateFormat(Protocol):
    """Between fp32 values and the tensors that hold them."""

    name: str
    """What users write: ``fp32``, ``bf16``, ``int8`` or ``int4``."""

    def empty(self, shape: torch.Size, *, signed: bool, device: torch.device | str) -> Stored:
        """Tensors that load as zeros of ``shape``. Unsigned states never hold a value below zero."""

    def load(self, stored: Stored, shape: torch.Size, *, signed: bool) -> Tensor:
        """The fp32 values. May be ``stored``'s own memory: change it only to store it back."""

    def store_(self, stored: Stored, value: Tensor, *, signed: bool, key: RandomKey | None = None) -> None:
        """Overwrite ``stored``. ``value``: fp32, any strides. ``key``: for formats that round at random."""

    def size_bytes(self, shape: torch.Size, *, signed: bool) -> int:
        """Bytes of the tensors that ``empty`` makes, exactly."""


class Fp32Format:
    """The values themselves."""

    name = "fp32"

    def empty(self, shape: torch.Size, *, signed: bool, device: torch.device | str) -> Stored:
        return {"value": torch.zeros(shape, dtype=torch.float32, device=device)}

    def load(self, stored: Stored, shape: torch.Size, *, signed: bool) -> Tensor:
        return stored["value"]

    def store_(self, stored: Stored, value: Tensor, *, signed: bool, key: RandomKey | None = None) -> None:
        stored["value"].copy_(value)

    def size_bytes(self, shape: torch.Size, *, signed: bool) -> int:
        return 4 * shape.numel()


class Bf16Format:
    """bf16, rounded at random when a key is given and to nearest otherwise.

    A second moment needs the key. Its relative change a step, .1% with beta .999, is below half a unit in
    bf16's last place (.2 to .4%): to nearest it can rise but not fall. Measured on sqrt(v), 4,096 elements,
    gradients N(0, s^2) whose s falls to 3% after 1,500 steps: 7% too large on average at step 1,500 and 126%
    at 3,000; at random .1% too small on average at both, with a spread of 1.7% and 4.5%.
    """

    name = "bf16"

    def empty(self, shape: torch.Size, *, signed: bool, device: torch.device | str) -> Stored:
        return {"value": torch.zeros(shape, dtype=torch.bfloat16, device=device)}

    def load(self, stored: Stored, shape: torch.Size, *, signed: bool) -> Tensor:
        return stored["value"].float()

    def store_(self, stored: Stored, value: Tensor, *, signed: bool, key: RandomKey | None = None) -> None:
        if key is not None:
            value = stochastic_round(value, random_bits(key, value.numel(), value.device))
        stored["value"].copy_(value)

    def size_bytes(self, shape: torch.Size, *, signed: bool) -> int:
        return 2 * shape.numel()


class BlockFormat:
    """8 or 4 bits an element and an fp32 scale to 128 of them: 1.03 or .53 bytes.

    Curves, errors and what happens to NaN: ``blocks.py``. 8-bit codes have the shape of the value, 4-bit
    codes are flat, two to a byte.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.name = f"int{bits}"

    def empty(self, shape: torch.Size, *, signed: bool, device: torch.device | str) -> Stored:
        numel = shape.numel()
        codes = torch.int8 if signed and self.bits == 8 else torch.uint8
        return {
            "codes": torch.zeros(shape if self.bits == 8 else -(-numel // 2), dtype=codes, device=device),
            "scales": torch.zeros(blocks.block_count(numel), dtype=torch.float32, device=device),
        }

    def load(self, stored: Stored, shape: torch.Size, *, signed: bool) -> Tensor:
        codes = stored["codes"]
        if self.bits == 4:
            codes = blocks.unpack_nibbles(codes, shape.numel(), signed=signed)
        ratio = blocks.decode(blocks.to_blocks(codes), bits=self.bits, signed=signed)
        return (ratio * stored["scales"][:, None]).view(-1)[: shape.numel()].view(shape)

    def store_(self, stored: Stored, value: Tensor, *, signed: bool, key: RandomKey | None = None) -> None:
        cut = blocks.to_blocks(value)
        scales = blocks.block_scales(cut)
        codes = blocks.encode(blocks.normalised(cut, scales), bits=self.bits, signed=signed)
        codes = codes.view(-1)[: value.numel()]
        stored["codes"].copy_(codes.view(value.shape) if self.bits == 8 else blocks.pack_nibbles(codes))
        stored["scales"].copy_(scales)

    def size_bytes(self, shape: torch.Size, *, signed: bool) -> int:
        numel = shape.numel()
        return (numel if self.bits == 8 else -(-numel // 2)) + 4 * blocks.block_count(numel)


_FORMATS: dict[str, StateFormat] = {
    each.name: each for each in (Fp32Format(), Bf16Format(), BlockFormat(8), BlockFormat(4))
}


def state_format(name: str) -> StateFormat:
    """The format of that name. Raises ValueError that lists the names."""
    try:
        return _FORMATS[name]
    except KeyError:
        raise ValueError(f"state dtype must be one of {', '.join(_FORMATS)}, got {name!r}") from None
