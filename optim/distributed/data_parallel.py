"""DistributedDataParallel that averages projections instead of gradients.

    model = DistributedDataParallel(module)
    gradients = SmallGradients(optimizer)
    share_projections(gradients, model)
    ...
    with model.no_sync():                       # all micro-batches but the last: R is summed here alone
        loss(first).backward()
    loss(last).backward()                       # R is averaged over the processes, r/n of the bytes

A communication hook takes the place of DDP's own: what it finds in a bucket it projects, and what must stay
whole (no projection; a residual that needs the gradient; a refresh that does) it averages as DDP would. This
saves traffic, and memory between micro-batches; it does not save DDP's buckets, which are as large as the
gradients, nor the ``.grad`` that DDP writes from them, which is dropped at the next forward pass or step. For
memory use FSDP2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.futures import Future, collect_all
from torch.nn.parallel import DistributedDataParallel

from memtrain.optim.small_gradients import SmallGradients


def share_projections(gradients: SmallGradients, model: DistributedDataParallel) -> None:
    """To be called before the first backward pass, once; DDP keeps the hook for good.

    Raises:
        ValueError: updates in backward, which come before any average; or bases made from the first
            micro-batch, which each process would take from its own.
    """
    if gradients.update != "step":
        raise ValueError(
            f"update={gradients.update!r} with DistributedDataParallel: gradients are averaged after their "
            "hooks have run. Use update='step', or fully_shard, whose gradients arrive averaged"
        )
    if gradients.refresh_from != "sum":
        raise ValueError(
            f"refresh_from={gradients.refresh_from!r} with DistributedDataParallel: each process would take "
            "its basis from a gradient of its own. Use refresh_from='sum'"
        )
    gradients.reduced_later = lambda: bool(model.require_backward_grad_sync)
    # A lambda, because DDP compares annotations with types, and ours are strings.
    model.register_comm_hook(_Sharing(gradients, model), lambda state, bucket: state.reduce(bucket))
    model.register_forward_pre_hook(lambda *_: gradients.drop_stale())


class _Sharing:
    """The state of the hook."""

    def __init__(self, gradients: SmallGradients, model: DistributedDataParallel) -> None:
        self.gradients = gradients
        self.group: dist.ProcessGroup = model.process_group

    @torch.no_grad()
    def reduce(self, bucket: GradBucket) -> Future[Tensor]:
        """Project and average one bucket; the result is the bucket, in which only whole gradients count."""
        projected: list[Tensor] = []
        whole: list[Tensor] = []
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            if self.gradients.project(parameter, gradient):
                projected.append(self.gradients.low_of(parameter))
            else:
                whole.append(gradient)
        waiting = [self._average(tensors) for tensors in (projected, whole) if tensors]

        def done(_: Any) -> Tensor:
            buffer: Tensor = bucket.buffer()
            return buffer

        finished: Future[Tensor] = collect_all(waiting).then(done)
        return finished

    def _average(self, tensors: list[Tensor]) -> Future[None]:
        """In place, through one buffer."""
        flat = torch.cat([each.reshape(-1) for each in tensors]).div_(self.group.size())

        def write_back(done: Any) -> None:
            done.value()
            with torch.no_grad():
                parts = torch.split(flat, [each.numel() for each in tensors])
                for each, part in zip(tensors, parts, strict=True):
                    each.copy_(part.view(each.shape))

        future: Future[None] = (
            dist.all_reduce(flat, group=self.group, async_op=True).get_future().then(write_back)
        )
        return future
