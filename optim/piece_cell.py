"""A run of a parameter's elements, updated as the whole parameter would update them.

Whoever keeps states elsewhere may bring a parameter into memory piece by piece. Where nothing of an update
spans elements but the blocks of quantised moments, a piece that begins with a block needs to know two things
of the parameter to come out bit for bit: where it begins, for random bits belong to places in the parameter,
and how the parameter's moments are stored, for those of small parameters are not quantised.

The reference path does not get there on a CPU where it takes roots for 8-bit codes of second moments: torch's
``pow`` rounds one element in eight otherwise, in the last place, when it falls behind the last whole vector
of its thread, and threads share a tensor by its length. Kernels go block by block, whatever the length.
"""

from __future__ import annotations

import torch

from memtrain.optim.cell import Cell
from memtrain.optim.settings import Settings
from memtrain.optim.storage.blocks import BLOCK


class PieceCell(Cell):
    """The parts for a flat piece of a parameter.

    Args:
        settings, dtype: as for a whole one.
        whole: shape of the parameter.
        start: the element of it at which the piece begins, a multiple of the block of quantised moments.
        elements: of the piece.

    Raises:
        ValueError: the parameter is projected, or the piece begins within a block.
    """

    def __init__(
        self, settings: Settings, whole: torch.Size, start: int, elements: int, dtype: torch.dtype
    ) -> None:
        cell = Cell(settings, whole, dtype)
        if cell.projected is not None:
            raise ValueError(
                f"a projection spans the parameter of shape {tuple(whole)}: update it whole, not in pieces"
            )
        if start % BLOCK:
            raise ValueError(f"a piece must begin at a multiple of {BLOCK} elements, got {start}")
        super().__init__(settings, torch.Size((elements,)), dtype)
        self.formats = cell.formats
        self._start = start

    @property
    def takes_roots(self) -> bool:
        """Whether the reference path takes roots of what it stores."""
        return any(
            self.formats[name].name == "int8" and not spec.signed for name, spec in self.moments.items()
        )

    def first_entry(self, moment: str | None) -> int:
        """See :class:`Cell`: moments have an entry for each element."""
        return self._start
