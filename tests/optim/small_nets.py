"""A small net, its batches and a loop, for tests of how gradients are kept."""

import torch
from torch import Tensor, nn

from memtrain.optim.grid import GridOptimizer

ORTHONORMAL = ("svd", "eigh", "power", "semi_orthogonal", "columns", "rows", "randk", "block")
PROJECTIONS = (*ORTHONORMAL, "gaussian", "rademacher")
GAP = 3


class Net(nn.Module):
    """Matrices of both orientations, a vector, and a matrix that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(24, 40, bias=False)
        self.norm = nn.LayerNorm(40)
        self.narrow = nn.Linear(40, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.tanh(self.narrow(self.norm(self.wide(x))))
        return x


def make(dtype: torch.dtype = torch.float32, **settings: object) -> tuple[Net, GridOptimizer]:
    torch.manual_seed(0)
    net = Net().to(dtype)
    if settings.get("projection"):
        size = {"density": 0.25} if settings["projection"] == "randk" else {"rank": 5}
        settings = {"update_gap": GAP, **size, **settings}
    return net, GridOptimizer(net.named_parameters(), **{"lr": 1e-2, **settings})


def batches(steps: int, micro: int, dtype: torch.dtype = torch.float32) -> list[list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    draw = lambda: torch.randn(8, 24, generator=generator).to(dtype)  # noqa: E731
    return [[(draw(), draw()) for _ in range(micro)] for _ in range(steps)]


def backward(net: nn.Module, batch: tuple[Tensor, Tensor], of: int = 1) -> None:
    (nn.functional.mse_loss(net(batch[0]), batch[1]) / of).backward()


def run(net: nn.Module, optimizer: GridOptimizer, data: list[list[tuple[Tensor, Tensor]]]) -> None:
    for step in data:
        for batch in step:
            backward(net, batch, len(step))
        optimizer.step()
        optimizer.zero_grad()


def flat(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().float().reshape(-1) for p in net.parameters()])


def relative(a: nn.Module, b: nn.Module) -> float:
    """Difference of the two, over how far the second has come."""
    start = flat(make(next(b.parameters()).dtype)[0])
    return float((flat(a) - flat(b)).norm() / (flat(b) - start).norm())
