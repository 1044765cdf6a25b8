"""Optimizers whose resume is tested in a new process; run as a program it is that process.

    python -m tests.optim.resume_cases DIRECTORY

loads what ``save`` left in the directory, goes on for 20 steps, and writes the weights beside it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from memtrain.optim.grid import GridOptimizer
from memtrain.optim.named import FRUGAL, AdamW8bit, Apollo, Fira, GaLore, NaturalGaLore

GAP, MORE = 6, 20
CASES = {
    "galore": lambda p: GaLore(p, rank=4, update_proj_gap=GAP),
    "galore-spread-lazy": lambda p: GaLore(p, rank=4, update_proj_gap=GAP, spread=True, lazy=True),
    "galore-8bit": lambda p: GaLore(p, rank=8, update_proj_gap=GAP, state_dtype="int8", master="split24"),
    "natural": lambda p: NaturalGaLore(p, rank=4, update_proj_gap=GAP, history=3),
    "frugal-bf16-basis": lambda p: FRUGAL(p, update_gap=GAP, basis_dtype="bf16"),
    "frugal-randk": lambda p: FRUGAL(p, update_gap=GAP, projection="randk", state_dtype="bf16"),
    "frugal-block-reset": lambda p: FRUGAL(p, update_gap=GAP, projection="block"),
    "fira": lambda p: Fira(p, rank=4, update_proj_gap=GAP),
    "apollo": lambda p: Apollo(p, rank=4, update_proj_gap=GAP),
    "adamw8bit": lambda p: AdamW8bit(p),
    "adafactor-eigh": lambda p: GridOptimizer(
        p, rule="adafactor", projection="eigh", rank=4, update_gap=GAP, lr=0.01
    ),
}
STOPS = (GAP - 1, GAP, GAP + 1)


def weights(dtype: torch.dtype) -> list[nn.Parameter]:
    """A matrix that is large enough for 8-bit states, a stack, a vector."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(80, 64), (2, 12, 8), (80,)]
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def dtypes_of(case: str) -> tuple[torch.dtype, ...]:
    """A split master is for bf16 weights."""
    return (torch.bfloat16,) if case == "galore-8bit" else (torch.float32, torch.bfloat16)


def run(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], first: int, count: int) -> None:
    """Steps with gradients that follow from the number of the step."""
    for step in range(first, first + count):
        for index, parameter in enumerate(params):
            generator = torch.Generator().manual_seed(1000 * index + step)
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


def main(directory: Path) -> None:
    """Every saved run goes on."""
    for path in sorted(directory.glob("*.saved")):
        saved = torch.load(path, weights_only=True)
        params = [nn.Parameter(value) for value in saved["weights"]]
        optimizer = CASES[saved["case"]](params)
        optimizer.load_state_dict(saved["optimizer"])
        run(optimizer, params, saved["step"], MORE)
        torch.save([parameter.detach() for parameter in params], path.with_suffix(".resumed"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
