"""Moments from a checkpoint of bitsandbytes' 8-bit optimizers, for those who go on from it with ours.

There a moment is one byte an element, an index into a code book of 256 numbers in [-1, 1], and the largest
magnitude of each run of 256 elements (Dettmers et al., arXiv 2110.02861). Why our own states are not kept so
says ``formats.py``. Plain torch; bitsandbytes need not be installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_BLOCK = 256
_WRAPPED = "__bnb_optimizer_quant_state__"
"""Where ``state_dict`` puts the tensors, so that FSDP does not take them for shards of the parameter."""


def moments_from_bitsandbytes(state: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """First and second moment in fp32 of one parameter's entry in ``optimizer.state_dict()["state"]``.

    Small parameters and 32-bit optimizers, whose entries hold the moments themselves, are read as well; the
    second is None where the optimizer has none (Lion, momentum). Store them with
    ``state_format("int8").store_``.

    Raises:
        ValueError: 8-bit codes that are not in blocks of 256 (the formats before 0.44), or no state at all.
    """
    state = state.get(_WRAPPED, state)
    if "state1" not in state:
        raise ValueError(f"not an entry of a bitsandbytes optimizer: it holds {sorted(state)}")
    second = _moment(state, "2") if state.get("state2") is not None else None
    return _moment(state, "1"), second


def _moment(state: Mapping[str, Tensor], which: str) -> Tensor:
    codes = state["state" + which]
    if codes.dtype != torch.uint8:
        return codes.float()
    largest, book = state.get("absmax" + which), state.get("qmap" + which)
    if largest is None or book is None or largest.numel() != -(-codes.numel() // _BLOCK):
        raise ValueError(f"state{which}: {codes.numel()} codes without a scale for each {_BLOCK} of them")
    scales = largest.float().repeat_interleave(_BLOCK)[: codes.numel()]
    return (book.float()[codes.reshape(-1).long()] * scales).view(codes.shape)
