"""A linear layer stored by tiles of its weight.

ZeRO-Infinity's memory-centric tiling (arXiv 2104.07857, section 5.1.3): a weight too large to be moved,
differentiated or updated at once becomes several parameters. Checkpoints keep the untiled name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Tile(nn.Module):
    """Part of a weight, and its part of the product.

    A module, so that what brings weights to the modules that use them can bring one tile at a time.
    """

    def __init__(self, weight: Tensor, *, requires_grad: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., columns]`` to ``[..., rows]``."""
        return nn.functional.linear(x, self.weight)


class TiledLinear(nn.Module):
    """``nn.Linear`` whose weight is ``out_tiles`` x ``in_tiles`` parameters.

    Each is given its gradient, and may be moved and updated, by itself. ``state_dict`` holds ``weight`` and
    ``bias`` as the untiled layer does, and reads them. With ``in_tiles`` = 1 the output is bit-equal to that
    of the untiled layer wherever a matrix product does not depend on its number of columns; otherwise partial
    products are added in the dtype of the output.

    Args:
        linear: whose weight is copied, tile by tile.
        out_tiles, in_tiles: at most as many as it has output and input features.
    """

    def __init__(self, linear: nn.Linear, *, out_tiles: int = 1, in_tiles: int = 1) -> None:
        super().__init__()
        for name, tiles, features in (
            ("out_tiles", out_tiles, linear.out_features),
            ("in_tiles", in_tiles, linear.in_features),
        ):
            if not 1 <= tiles <= features:
                raise ValueError(f"{name} must be in 1..{features}, got {tiles}")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.out_tiles, self.in_tiles = out_tiles, in_tiles
        needs_grad = linear.weight.requires_grad
        self.tiles = nn.ModuleList(Tile(tile, requires_grad=needs_grad) for tile in self._cut(linear.weight))
        self.bias = linear.bias
        self.register_state_dict_post_hook(_merge_tiles)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_split_tiles)  # type: ignore[no-untyped-call]

    def _cut(self, weight: Tensor) -> list[Tensor]:
        return [
            tile for row in weight.tensor_split(self.out_tiles) for tile in row.tensor_split(self.in_tiles, 1)
        ]

    def merged_weight(self) -> Tensor:
        """``[out, in]``, a copy."""
        weights = [tile.weight.detach() for tile in self.tiles]
        rows = (weights[r : r + self.in_tiles] for r in range(0, len(weights), self.in_tiles))
        return torch.cat([torch.cat(row, 1) for row in rows])

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        parts = x.tensor_split(self.in_tiles, -1)
        outputs = []
        for row in range(self.out_tiles):
            tiles = self.tiles[row * self.in_tiles : (row + 1) * self.in_tiles]
            total = tiles[0](parts[0])
            for part, tile in zip(parts[1:], tiles[1:], strict=True):
                total = total + tile(part)
            outputs.append(total)
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return out if self.bias is None else out + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, tiles={self.out_tiles}x{self.in_tiles}"


def _merge_tiles(module: TiledLinear, state: dict[str, Any], prefix: str, _: Any) -> None:
    for index in range(len(module.tiles)):
        del state[f"{prefix}tiles.{index}.weight"]
    state[f"{prefix}weight"] = module.merged_weight()


def _split_tiles(module: TiledLinear, state: dict[str, Any], prefix: str, *_: Any) -> None:
    weight = state.pop(f"{prefix}weight", None)
    if weight is not None:
        for index, tile in enumerate(module._cut(weight)):
            state[f"{prefix}tiles.{index}.weight"] = tile
