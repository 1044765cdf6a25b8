"""A net that FSDP2 shards where there is a process group, its optimizer and a loop that shares each batch."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from memtrain.optim.grid import GridOptimizer
from memtrain.optim.small_gradients import SmallGradients
from memtrain.optim.two_pass import TwoPassClipping

MICRO, ROWS = 2, 12


class Net(nn.Module):
    """Shards of 14, 14 and 12 rows, of 8, 8 and 8, and of 1, 1 and 0, on three processes."""

    def __init__(self, large: bool = False) -> None:
        super().__init__()
        width, hidden = (200, 136) if large else (24, 40)
        self.wide = nn.Linear(width, hidden, bias=False)
        self.norm = nn.LayerNorm(hidden)
        self.narrow = nn.Linear(hidden, width, bias=False)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.tanh(self.narrow(self.norm(self.wide(x))))
        return self.head(x)


def make_net(large: bool = False, copies: int = 1) -> Net:
    torch.manual_seed(0)
    net = Net(large)
    shard(net, copies)
    return net


def shard(net: Net, copies: int = 1) -> None:
    """Over all processes, or over those of each of some copies (HSDP)."""
    if dist.is_initialized():
        world = dist.get_world_size()
        if copies == 1:
            mesh = init_device_mesh("cpu", (world,))
        else:
            names = ("copies", "shards")
            mesh = init_device_mesh("cpu", (copies, world // copies), mesh_dim_names=names)
        fully_shard(net.wide, mesh=mesh)
        fully_shard(net, mesh=mesh)


def make_late(**settings: Any) -> tuple[Net, GridOptimizer]:
    """The optimizer is made first and gets the shards in its parameters' places."""
    torch.manual_seed(0)
    net = Net()
    optimizer = make_optimizer(net, **settings)
    names = {parameter: name for name, parameter in net.named_parameters()}
    shard(net)
    for group in optimizer.param_groups:
        group["params"] = [net.get_parameter(names[parameter]) for parameter in group["params"]]
    return net, optimizer


def make_optimizer(net: Net, **settings: Any) -> GridOptimizer:
    projected = [("wide", net.wide.weight), ("narrow", net.narrow.weight)]
    others = [(n, p) for n, p in net.named_parameters() if n.split(".")[0] in ("norm", "head")]
    if "projection" in settings:
        settings = {"update_gap": 2, "rank": None if "density" in settings else 5, **settings}
    return GridOptimizer([{"params": projected, **settings}, {"params": others}], lr=1e-2)


def train(net: Net, optimizer: GridOptimizer, start: int, steps: int, **options: Any) -> list[float]:
    """Every process takes its share of each batch; norms where they are clipped."""
    clip, hooks, two_pass = options.pop("clip", None), options.pop("hooks", True), options.pop("two_pass", 0)
    gradients = SmallGradients(optimizer, **options) if hooks and not two_pass else None
    clipping = TwoPassClipping(optimizer, two_pass) if two_pass else None
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    norms = []
    micro = 1 if options.get("update") == "backward" else MICRO
    for step in range(start, start + steps):
        generator = torch.Generator().manual_seed(step)
        drawn = [torch.randn(ROWS, net.wide.in_features, generator=generator) for _ in range(micro)]
        parts = [x.chunk(world)[rank] for x in drawn]
        if clipping:
            clipping.step(lambda x=parts[0]: backward(net, x))
            norms.append(float(clipping.norm))
            continue
        for x in parts:
            backward(net, x, micro)
        if clip and gradients:
            norms.append(float(gradients.clip_grad_norm_(clip)))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def backward(net: nn.Module, x: Tensor, of: int = 1) -> Tensor:
    loss = net(x).square().mean() / of
    loss.backward()
    return loss


def whole(net: nn.Module) -> Tensor:
    parts = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in net.parameters()]
    return torch.cat([part.detach().flatten() for part in parts])
