"""What updates a sharded parameter: each process its rows, with the numbers that one process alone would get.

States are plain local tensors while they are worked on. In a checkpoint those that are sharded as the
parameter is are DTensors, which DCP writes once and reads on any number of processes; the others are whole in
every process and are written as they are.

Random rounding draws the bits that belong to an element's place in the whole parameter. Blocks of 8-bit and
4-bit states must not straddle two processes, which holds if a row of R is a whole number of blocks, or all
shards are equal and whole; else it is refused.
"""

from __future__ import annotations

from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from memtrain.optim.cell import Cell, Projected, State
from memtrain.optim.distributed.pieces import Pieces
from memtrain.optim.distributed.projectors import sharded_projector
from memtrain.optim.distributed.residual import ShardedResidual
from memtrain.optim.distributed.rows import Rows
from memtrain.optim.projection import Stored
from memtrain.optim.projection.matrix import LEFT
from memtrain.optim.refresh import leading_cosines
from memtrain.optim.residual import Residual
from memtrain.optim.rules import Adafactor, Adam, AdamMini, Lion, Momentum
from memtrain.optim.settings import Settings
from memtrain.optim.storage.blocks import BLOCK

_ENTRY_BY_ENTRY = (Adam, Lion, Momentum)
_BY_MATRIX = (*_ENTRY_BY_ENTRY, Adafactor)
_OF_EXPERTS = ("projector.left", "projector.right", "residual.norm")
"""What each expert of a stack has one of, beside moments and master."""


class ShardedCell(Cell):
    """See the module.

    Raises:
        ValueError: settings that need more of the parameter than this process has.
    """

    is_whole = False

    def __init__(self, settings: Settings, parameter: DTensor) -> None:
        # Checks, and formats, which must not depend on how many processes there are.
        super().__init__(settings, parameter.shape, parameter.dtype)
        self.rows = rows = Rows.of(parameter)
        self._mesh, self._placements = parameter.device_mesh, tuple(parameter.placements)
        self.of_experts = len(parameter.shape) == 3
        self.pieces = Pieces.of(settings.split or 1, rows)
        self.shape = self.own_shape = self.low_shape = torch.Size((rows.count, *parameter.shape[1:]))
        self.low_is_sharded = True
        if self.projected is not None:
            projector = sharded_projector(settings.projection_part, parameter.shape, rows, self.pieces)
            self._check_residual(self.projected.residual)
            self.low_shape, self.low_is_sharded = projector.low_shape, projector.low_is_sharded
            residual = ShardedResidual.of(
                self.projected.residual,
                rows,
                low_is_sharded=self.low_is_sharded,
                of_experts=self.of_experts,
            )
            self.projected = Projected(projector, self.projected.refresh, residual)
        self.moments = self.rule.moments(self.low_shape)
        if self.low_is_sharded:
            self._check_rule()
            self._check_blocks()

    def first_entry(self, moment: str | None) -> int:
        """See :class:`Cell`."""
        if moment is None:
            return self.rows.start * prod(self.shape[1:])
        return self.rows.start * prod(self.moments[moment].shape[1:]) if self.low_is_sharded else 0

    def _check_residual(self, residual: Residual) -> None:
        if self.pieces.count > 1 and residual.kind in ("scaled", "scale_only"):
            raise ValueError(
                f"residual {residual.kind!r} with split={self.pieces.count} of a sharded parameter: its "
                "norms are of pieces, which processes cut. Leave split out for this group"
            )

    def _check_rule(self) -> None:
        if self.of_experts:
            if not isinstance(self.rule, _BY_MATRIX):
                raise ValueError(
                    f"history={self.settings.history} for a stack that is sharded by experts: histories of "
                    "experts do not lie one after the other. Leave history out for this group"
                )
            return
        mini_of_vector = isinstance(self.rule, AdamMini) and len(self.low_shape) == 1
        if not isinstance(self.rule, _ENTRY_BY_ENTRY) or mini_of_vector:
            raise ValueError(
                f"rule {type(self.rule).__name__} takes means over R, which is sharded by rows as the "
                "parameter is: use rule 'adam', 'lion' or 'momentum' for it, or side='left', by which R is "
                "whole in every process"
            )

    def _check_blocks(self) -> None:
        for name, spec in self.moments.items():
            row, world = prod(spec.shape[1:]), self.rows.world
            equal = world == 1 or (self.rows.total % world == 0 and self.rows.chunk * row % BLOCK == 0)
            if self.formats[name].name in ("int8", "int4") and row % BLOCK and not equal:
                raise ValueError(
                    f"state_dtype {self.formats[name].name!r} scales blocks of {BLOCK} entries, and those of "
                    f"R would straddle the {world} processes: {self.rows.total} rows of {row} entries, up to "
                    f"{self.rows.chunk} rows to a process. Use state_dtype 'bf16', or a rank that is a "
                    f"multiple of {BLOCK}"
                )

    def own(self, tensor: Tensor) -> Tensor:
        """See :class:`Cell`."""
        if not isinstance(tensor, DTensor):
            return tensor
        if tuple(tensor.placements) != self._placements:
            # A gradient that autograd has left whole, or as summands.
            tensor = tensor.redistribute(placements=self._placements)
        local: Tensor = tensor.to_local()
        return local.detach()

    def summed(self, low: Tensor) -> Tensor:
        """See :class:`Cell`."""
        return low if self.low_is_sharded else self.rows.sum_(low)

    def extremes(self, gradient: Tensor) -> tuple[float, float]:
        """See :class:`Cell`; the answer is the same in all processes."""
        ends = torch.full((2,), -torch.inf, dtype=torch.float32, device=gradient.device)
        if gradient.numel():
            least, largest = gradient.float().aminmax()
            ends = torch.stack((-least, largest))
        # Not every backend carries NaN through a maximum.
        ends = self.rows.largest_(torch.where(ends.isnan(), torch.inf, ends))
        return -float(ends[0]), float(ends[1])

    def leading_cosine(self, old: Stored, new: Stored) -> float:
        """See :class:`Cell`; the answer is the same in all processes."""
        if self.of_experts:
            side = next(iter(old))
            total = self.rows.sum_(leading_cosines(old[side], new[side]).sum().reshape(1))
            return float(total) / self.rows.total
        if LEFT not in old:
            return super().leading_cosine(old, new)
        a, b = old[LEFT][:, :1].float(), new[LEFT][:, :1].float()
        products = torch.stack([self.pieces.products(*pair).flatten() for pair in ((a, b), (a, a), (b, b))])
        product, a_square, b_square = self.rows.sum_(products)
        return float((product.abs() / (a_square * b_square).sqrt().clamp_min(1e-8)).mean())

    def norm_group(self, *, low: bool) -> dist.ProcessGroup | None:
        """See :class:`Cell`."""
        return self.rows.group if self.low_is_sharded or not low else None

    def exported(self, state: State) -> State:
        """See :class:`Cell`."""
        return {name: self._exported(name, tensor) for name, tensor in state.items()}

    def imported(self, state: State) -> State:
        """See :class:`Cell`."""
        local = {name: self.own(tensor) for name, tensor in state.items()}
        here = self.empty_state(torch.empty(self.shape, dtype=self.dtype, device="meta"))
        for name in local.keys() & here.keys():
            if self._is_sharded(name):
                # Blocks come as rows of blocks.
                local[name] = local[name].reshape(here[name].shape)
        return local

    def _is_sharded(self, name: str) -> bool:
        part = name.partition(".")[0]
        if part in self.moments:
            return self.low_is_sharded
        if self.of_experts and name in _OF_EXPERTS:
            return True
        return part == "master" or name == "projector.left"

    def _exported(self, name: str, tensor: Tensor) -> Tensor:
        if not self._is_sharded(name):
            return tensor
        moment, _, piece = name.partition(".")
        if moment in self.moments and tensor.dim() == 1 and len(self.moments[moment].shape) > 1:
            tensor = self._rows_of_blocks(moment, piece, tensor)
        of_rows = tensor.shape[0] == self.rows.count
        total = self.rows.total if of_rows else tensor.shape[0] * self.rows.world
        shape = torch.Size((total, *tensor.shape[1:]))
        strides = tuple(prod(shape[place + 1 :]) for place in range(len(shape)))
        return DTensor.from_local(
            tensor, self._mesh, self._placements, run_check=False, shape=shape, stride=strides
        )

    def _rows_of_blocks(self, moment: str, piece: str, flat: Tensor) -> Tensor:
        """Scales and 4-bit codes, as many to each row where rows are whole blocks."""
        spec = self.moments[moment]
        row = torch.Size((1, *spec.shape[1:]))
        if row.numel() % BLOCK:
            return flat
        of_row = self.formats[moment].empty(row, signed=spec.signed, device="meta")[piece]
        return flat.view(self.rows.count, of_row.numel())
