"""Linear layers and embedding tables stored by tiles of their weight.

ZeRO-Infinity's memory-centric tiling (arXiv 2104.07857, section 5.1.3): a weight too large to be moved,
differentiated or updated at once becomes several parameters. Checkpoints keep the untiled name.

What is exact. A row of the weight is an element of the output, so cutting rows leaves dot products whole:
forward is bit-equal to the untiled layer wherever a matrix product does not depend on its number of columns,
and so are gradients of weight and bias. The gradient of the input is a sum over tiles, the last one first,
each partial sum rounded to the dtype of the gradient: with ``k`` tiles it differs from that of the untiled
layer by at most ``2 k u sum_j |g_j W_j|``, ``u`` the unit roundoff, beside what the products' own sums differ
by (nothing to speak of for bf16, which is summed in fp32). A table looks rows up: all of it is exact. Columns
that are cut (``in_tiles``) make the output such a sum as well.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Operation = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""What is done with an input and the weight and bias of one tile."""


class Tile(nn.Module):
    """Part of a weight, with the bias of its rows, and its part of the product.

    A module, so that what brings weights to the modules that use them can bring one tile at a time: nobody
    else uses them.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, requires_grad: tuple[bool, bool]
    ) -> None:
        super().__init__()
        # .data: each has a version counter of its own, whatever memory it shares.
        self.weight = nn.Parameter(weight.data, requires_grad=requires_grad[0])
        self.bias = None if bias is None else nn.Parameter(bias.data, requires_grad=requires_grad[1])

    def forward(self, x: Tensor, operation: Operation = nn.functional.linear) -> Tensor:
        """``[..., columns]`` to ``[..., rows]``; or what ``operation`` makes of ``x``."""
        return operation(x, self.weight, self.bias)


class Tiled(nn.Module):
    """A layer whose weight is in ``tiles``, row by row of tiles.

    ``state_dict`` holds ``weight`` and ``bias`` as the untiled layer does, and reads them.

    Args:
        weight: ``[rows, columns]``, cut without being copied.
        bias: ``[rows]``; it goes with the first tile of its rows.
        rows: of each row of tiles; their sum is the weight's.
        in_tiles: of each row of tiles.

    Raises:
        ValueError: rows that are not the weight's.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, rows: Sequence[int], in_tiles: int = 1
    ) -> None:
        super().__init__()
        if sum(rows) != len(weight) or min(rows, default=0) < 0:
            raise ValueError(
                f"tiles of {list(rows)} rows for a weight of {len(weight)}: give numbers of rows whose "
                "sum is the weight's"
            )
        self.rows, self.in_tiles = tuple(rows), in_tiles
        needs = (weight.requires_grad, bias is not None and bias.requires_grad)
        self.tiles = nn.ModuleList()
        data = weight.detach()
        biases: Sequence[Tensor | None] = (
            [None] * len(rows) if bias is None else bias.detach().split(self.rows)
        )
        for part, own in zip(data.split(self.rows), biases, strict=True):
            for number, tile in enumerate(part.tensor_split(in_tiles, 1)):
                self.tiles.append(Tile(tile, own if number == 0 else None, requires_grad=needs))
        self.register_state_dict_post_hook(_merge_tiles)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_split_tiles)  # type: ignore[no-untyped-call]

    @property
    def starts(self) -> list[int]:
        """The first row of each row of tiles."""
        return [sum(self.rows[:number]) for number in range(len(self.rows))]

    @property
    def parts(self) -> list[Tile]:
        """The tiles."""
        return [tile for tile in self.tiles if isinstance(tile, Tile)]

    def untiled_parameters(self) -> dict[str, list[str]]:
        """By the untiled layer's name of a parameter those of its parts, along the first dimension: what a
        checkpoint stores as one tensor. Empty where columns are cut."""
        if self.in_tiles > 1:
            return {}
        names = {"weight": [f"tiles.{number}.weight" for number in range(len(self.tiles))]}
        if self.parts[0].bias is not None:
            names["bias"] = [f"tiles.{number}.bias" for number in range(len(self.tiles))]
        return names

    def merged_weight(self) -> Tensor:
        """``[rows, columns]``, a copy."""
        weights = [tile.weight.detach() for tile in self.parts]
        rows = (weights[r : r + self.in_tiles] for r in range(0, len(weights), self.in_tiles))
        return torch.cat([torch.cat(row, 1) for row in rows])

    def merged_bias(self) -> Tensor | None:
        """``[rows]``, a copy."""
        biases = [tile.bias.detach() for tile in self.parts if tile.bias is not None]
        return torch.cat(biases) if biases else None


class TiledLinear(Tiled):
    """``nn.Linear`` whose weight is ``out_tiles`` x ``in_tiles`` parameters.

    Each is given its gradient, and may be moved and updated, by itself.

    Args:
        linear: whose weight is copied, tile by tile.
        out_tiles, in_tiles: at most as many as it has output and input features.
    """

    def __init__(self, linear: nn.Linear, *, out_tiles: int = 1, in_tiles: int = 1) -> None:
        for name, tiles, features in (
            ("out_tiles", out_tiles, linear.out_features),
            ("in_tiles", in_tiles, linear.in_features),
        ):
            if not 1 <= tiles <= features:
                raise ValueError(f"{name} must be in 1..{features}, got {tiles}")
        rows = [len(part) for part in torch.arange(linear.out_features).tensor_split(out_tiles)]
        self._make(linear, rows, in_tiles)
        for parameter in self.parameters():
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)

    def _make(self, linear: nn.Linear, rows: Sequence[int], in_tiles: int) -> None:
        super().__init__(linear.weight, linear.bias, rows, in_tiles)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.training = linear.training

    @classmethod
    def over(cls, linear: nn.Linear, rows: Sequence[int]) -> TiledLinear:
        """Tiles of so many rows each, in the memory of the layer's own weight."""
        made = cls.__new__(cls)
        made._make(linear, rows, 1)
        return made

    @property
    def out_tiles(self) -> int:
        """Rows of tiles."""
        return len(self.rows)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        columns = x.tensor_split(self.in_tiles, -1)
        outputs = []
        for row in range(self.out_tiles):
            tiles = self.tiles[row * self.in_tiles : (row + 1) * self.in_tiles]
            total = tiles[0](columns[0])
            for part, tile in zip(columns[1:], tiles[1:], strict=True):
                total = total + tile(part)
            outputs.append(total)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, tiles={self.out_tiles}x{self.in_tiles}"


class TiledEmbedding(Tiled):
    """``nn.Embedding`` whose table is cut by rows, in the memory of the table's own weight.

    Args:
        table: with plain dense gradients: no ``max_norm``, ``sparse`` or ``scale_grad_by_freq``.
        rows: of each tile.

    Raises:
        ValueError: the table has one of these.
    """

    def __init__(self, table: nn.Embedding, rows: Sequence[int]) -> None:
        for name in ("max_norm", "sparse", "scale_grad_by_freq"):
            if getattr(table, name):
                raise ValueError(f"an embedding with {name}={getattr(table, name)} cannot be cut into tiles")
        super().__init__(table.weight, None, rows)
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
        self.padding_idx = table.padding_idx
        self.training = table.training

    def forward(self, ids: Tensor) -> Tensor:
        """Integers of any shape ``[...]`` to ``[..., columns]``.

        Raises:
            IndexError: an id is outside of the table.
        """
        flat = ids.reshape(-1)
        if (
            ids.device.type == "cpu" and flat.numel()
        ):  # elsewhere the kernel asserts, as that of a whole table
            low, high = int(flat.min()), int(flat.max())
            if low < 0 or high >= self.num_embeddings:
                raise IndexError(
                    f"ids {low} to {high} are looked up in a table of {self.num_embeddings} rows"
                )
        found, places = [], []
        for start, count, tile in zip(self.starts, self.rows, self.parts, strict=True):
            here = ((flat >= start) & (flat < start + count)).nonzero().view(-1)
            # Also where there are none: the untiled table has a gradient, of zeros, for rows not used.
            found.append(tile(flat[here] - start, self._look_up(start, count)))
            places.append(here)
        order = torch.cat(places).argsort()
        return torch.cat(found).index_select(0, order).view(*ids.shape, self.embedding_dim)

    def _look_up(self, start: int, count: int) -> Operation:
        padding = None if self.padding_idx is None else self.padding_idx - start
        padding = padding if padding is not None and 0 <= padding < count else None
        return lambda ids, weight, _: nn.functional.embedding(ids, weight, padding_idx=padding)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, tiles={len(self.rows)}"


def _merge_tiles(module: Tiled, state: dict[str, Any], prefix: str, _: Any) -> None:
    for index, tile in enumerate(module.parts):
        for name, _parameter in tile.named_parameters():
            del state[f"{prefix}tiles.{index}.{name}"]
    state[f"{prefix}weight"] = module.merged_weight()
    if (bias := module.merged_bias()) is not None:
        state[f"{prefix}bias"] = bias


def _split_tiles(module: Tiled, state: dict[str, Any], prefix: str, *_: Any) -> None:
    weight = state.pop(f"{prefix}weight", None)
    bias = state.pop(f"{prefix}bias", None)
    if weight is not None and len(weight) == sum(module.rows):
        parts = [p for row in weight.split(module.rows) for p in row.tensor_split(module.in_tiles, 1)]
        state.update({f"{prefix}tiles.{index}.weight": part for index, part in enumerate(parts)})
    elif weight is not None:
        state[f"{prefix}weight"] = weight  # which load_state_dict() then names
    if bias is not None:
        for row, part in enumerate(bias.split(module.rows)):
            state[f"{prefix}tiles.{row * module.in_tiles}.bias"] = part
