"""How the tokens lie in what a block saves for backward: the answer of ``token_probe.py``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from memtrain.offload.block_runs import Cuts
from memtrain.offload.token_rows import RowAxis


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
    """What of a difference may come from rounding alone."""
    chooses: bool
    """Whether whole numbers are saved for each token, as its experts: a prefix must be bit-equal then."""
    witness: int | None
    """The last saved tensor of real numbers that is cut. What goes wrong before it shows there."""

    @property
    def bit_equal(self) -> bool:
        """Whether there was no difference at all."""
        return self.difference == 0.0
