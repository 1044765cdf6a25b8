"""Which rows of a parameter this process has, and the sums and gathers over the processes that share it.

FSDP2 (``fully_shard``) cuts parameters along their first dimension as ``torch.chunk`` does: process k of W
has the rows from ``k * ceil(m / W)`` on, the last processes fewer, or none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


@dataclass(frozen=True)
class Rows:
    """The rows ``start .. start + count - 1`` of ``total``."""

    total: int
    start: int
    count: int
    chunk: int
    """Rows of the first process: as many as any has."""
    world: int
    group: dist.ProcessGroup

    @classmethod
    def of(cls, parameter: DTensor) -> Rows:
        """Of a parameter that is sharded by rows over a one-dimensional mesh.

        Raises:
            ValueError: it is laid out in another way.
        """
        mesh, placements = parameter.device_mesh, tuple(parameter.placements)
        if mesh.ndim != 1 or placements != (Shard(0),):
            raise ValueError(
                f"placements {placements} on a mesh of {mesh.ndim} dimensions: Shard(0) on one dimension is "
                "served, as of fully_shard(module) with a one-dimensional mesh"
            )
        total, world = parameter.shape[0], mesh.size()
        chunk = -(-total // world)
        start = min(mesh.get_local_rank() * chunk, total)
        count = min(chunk, total - start)
        assert parameter.to_local().shape[0] == count
        return cls(total, start, count, chunk, world, mesh.get_group())

    @property
    def slice(self) -> slice:
        """Of the whole parameter."""
        return slice(self.start, self.start + self.count)

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in each of them, in place where the tensor is contiguous."""
        tensor = tensor.contiguous()
        if self.world > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def largest_(self, tensor: Tensor) -> Tensor:
        """The largest over all processes, entry by entry, in place."""
        if self.world > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor

    def norm_of_all(self, own: Tensor) -> Tensor:
        """From the norms of what each process has; in fp64, since squares of small norms underflow."""
        return self.sum_(own.double().square()).sqrt().to(own.dtype)

    def gather(self, own: Tensor) -> Tensor:
        """``[total, r]`` from the ``[count, r]`` of each process."""
        if self.world == 1:
            return own
        padded = own.new_zeros((self.chunk, *own.shape[1:]))
        padded[: self.count] = own
        whole = own.new_empty((self.world * self.chunk, *own.shape[1:]))
        dist.all_gather_single(whole, padded, group=self.group)
        return whole[: self.total]
