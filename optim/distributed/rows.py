"""Which rows of a parameter this process has, and the sums and gathers over the processes that share it.

FSDP2 (``fully_shard``) cuts parameters along their first dimension as ``torch.chunk`` does: process k of W
has the rows from ``k * ceil(m / W)`` on, the last processes fewer, or none. The rows of a stack are its
experts. With a mesh of copies and shards (HSDP) FSDP2 averages gradients over the copies itself; all that is
sent here stays among the shards of one copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard


@dataclass(frozen=True)
class Rows:
    """The rows ``start .. start + count - 1`` of ``total``."""

    total: int
    start: int
    count: int
    chunk: int
    """Rows of the first process: as many as any has."""
    world: int
    """Processes that share the parameter."""
    rank: int
    """Of this process among them."""
    group: dist.ProcessGroup

    @classmethod
    def of(cls, parameter: DTensor) -> Rows:
        """Of a parameter that is sharded by rows over one dimension of its mesh, and copied over others.

        Raises:
            ValueError: it is laid out in another way.
        """
        mesh, placements = parameter.device_mesh, tuple(parameter.placements)
        shards = [place for place, placement in enumerate(placements) if placement == Shard(0)]
        if len(shards) != 1 or any(
            p != Replicate() for place, p in enumerate(placements) if place != shards[0]
        ):
            raise ValueError(
                f"placements {placements}: Shard(0) over one dimension of the mesh and Replicate() over the "
                "others are served, as of fully_shard with a mesh of shards, or of copies and shards. Leave "
                "tensor-parallel layers to an optimizer of torch"
            )
        total, world, rank = parameter.shape[0], mesh.size(shards[0]), mesh.get_local_rank(shards[0])
        chunk = -(-total // world)
        start = min(rank * chunk, total)
        count = min(chunk, total - start)
        if (held := parameter.to_local().shape[0]) != count:
            raise ValueError(
                f"this process holds {held} of {total} rows, FSDP2 would give it {count}: use fully_shard"
            )
        return cls(total, start, count, chunk, world, rank, mesh.get_group(shards[0]))

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

    def each(self, own: Tensor) -> Iterator[Tensor]:
        """The ``own`` of every process that has rows, one after the other, so that no more than two are here
        at a time."""
        for process in range(-(-self.total // self.chunk)):
            count = min(self.chunk, self.total - process * self.chunk)
            part = own.contiguous() if process == self.rank else own.new_empty((count, *own.shape[1:]))
            if self.world > 1:
                dist.broadcast(part, group=self.group, group_src=process)
            yield part
