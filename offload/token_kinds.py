"""How the tokens lie in what a block saves for backward: the answer of ``token_probe.py``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import torch

from memtrain.offload.block_runs import Cuts
from memtrain.offload.token_rows import RowAxis

_ROUNDING = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference, in parts of a tensor's largest entry, that may come from rounding alone. Blocks of
SmolLM2's shapes and tiny ones of Llama and GPT-2 show up to 5e-7 in float32 and 8e-3 in bfloat16 on a CPU."""


def rounding(dtypes: Iterable[torch.dtype]) -> float:
    """What may come from rounding in tensors that are computed from each other: the coarsest type decides,
    for what is computed from it is no finer."""
    return max((_ROUNDING[dtype] for dtype in dtypes if dtype in _ROUNDING), default=0.0)


class Kind(Enum):
    """Of a saved tensor that is not cut."""

    AGAIN = "again"
    """A prefix gives the same, such as a weight in the precision of autocast: it is computed again."""
    WHOLE = "whole"
    """All of it is stored: it depends on all tokens, or has them along two dimensions, such as a mask."""
    GIVEN = "given"
    """It lies in an argument other than the input, which is there in backward anyway."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenProbe:
    """How the tokens lie in the tensors of one block, and how exact a prefix is."""

    name: str
    """Of the block."""
    tokens: int
    """In a row of the batch that was looked at."""
    arguments: Cuts
    """Of every tensor argument the dimensions to cut."""
    saved: tuple[RowAxis | Kind, ...]
    """Every tensor that is saved for backward, parameters and buffers left out."""
    attention: tuple[tuple[RowAxis | None, ...], ...]
    """The output tensors of every attention kernel."""
    attention_whole_bytes: int
    """Of the storages of those without a token axis."""
    is_random: bool
    """Whether the block draws random numbers."""
    drawn: tuple[RowAxis | None, ...]
    """What its dropouts draw."""
    row_bytes: int
    """Of the storages that are cut, a token's part."""
    whole_bytes: int
    """Of the storages that are stored whole."""
    difference: float
    """Largest difference between rows of a prefix and of the whole, in parts of the largest entry of their
    tensor, over all saved tensors, attention's outputs and prefixes that were looked at."""
    tolerance: float
    """What is let pass of a difference: what may come from rounding alone, or nothing where the plan promises
    that there is none."""
    chooses: bool
    """Whether whole numbers are saved for each token, as its experts: a prefix must be bit-equal then."""
    witness: int | None
    """The last saved tensor of real numbers that is cut. What goes wrong before it shows there."""
    witness_bytes: int
    """Of the rows that are kept from forward to backward to be compared: one of the witness, and one of each
    output of attention that has tokens."""

    @property
    def bit_equal(self) -> bool:
        """Whether there was no difference at all."""
        return self.difference == 0.0
