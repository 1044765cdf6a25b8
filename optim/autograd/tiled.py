"""A module that works token by token, run by tiles of tokens.

``tiled`` saves the module's input alone. Backward runs the module again for one tile after another, so that
the intermediates of one tile exist at a time: for an MLP of 4 times its input, 1/tiles of what one forward
holds (ALST's TiledMLP, arXiv 2506.13996; here dropout, unequal tiles, unused and frozen parameters and the
incoming gradient are as without tiles). Rows of the input's gradient are those of the untiled module wherever
a matrix product does not depend on its number of rows; a parameter's gradient is a sum over tiles,
accumulated in fp32 and rounded once.

Dropout inside a tile drops what the untiled module would drop: a generator gives numbers in the order in
which they lie in a tensor, so the first tile draws for all tokens, and a mask of one byte an element is kept
until the last tile has taken its rows. Any other random operator is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from memtrain.optim.autograd.recomputed import refuse_double_backward
from memtrain.optim.autograd.surroundings import Surroundings


def tiled(module: nn.Module, x: Tensor, *, tile_tokens: int | None = None) -> Tensor:
    """``module(x)`` for a module that treats every token alike, ``tile_tokens`` at a time.

    Saved: ``x``; the parameters by reference. The module is called with ``[tile_tokens, features]`` and runs
    twice, in forward and in backward, under the same random numbers and autocast.

    Args:
        module: takes one tensor, gives one with as many rows; every tensor that it reads and that needs a
            gradient is a parameter of its own.
        x: ``[..., features]``.
        tile_tokens: None: as many as ``x`` has features, so that what an MLP makes of a tile is about as
            large as its weights (ALST's choice).

    Raises:
        ValueError: tile_tokens is not positive; the module returns other than one tensor with the tile's
        rows.
        RuntimeError: the module draws random numbers other than dropout's, or not one row for each token; or
            needs a gradient for a tensor that is not a parameter of its own; or a parameter or the mode
            (train, eval) was changed between forward and backward; ``create_graph=True``.
    """
    tokens = x.shape[:-1].numel()
    tile_tokens = max(1, x.shape[-1]) if tile_tokens is None else tile_tokens
    if tile_tokens < 1:
        raise ValueError(f"tile_tokens must be >= 1, got {tile_tokens}")
    if torch.compiler.is_compiling():
        raise RuntimeError("tiled runs its module again in backward, which torch.compile does not trace")
    parameters = tuple(p for p in module.parameters() if p.requires_grad)
    rows = x.reshape(tokens, x.shape[-1])
    out: Tensor = _Tiled.apply(rows, module, tile_tokens, *parameters)  # type: ignore[no-untyped-call]
    return out.view(*x.shape[:-1], out.shape[-1])


class _WholeDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Draws dropout's masks for all tokens and hands every tile its rows.

    Within one pass over the tiles, which run in order.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tokens = tokens
        self._masks: list[Tensor] = []
        self._tile = range(0)
        self._next = 0

    @property
    def drew(self) -> bool:
        """Whether there was anything random in the first tile."""
        return bool(self._masks)

    def start(self, tile: range) -> None:
        """What follows belongs to these tokens."""
        self._tile, self._next = tile, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **(kwargs or {}))
        part = args[0]
        if func is torch.ops.aten.bernoulli_.float:
            return part.copy_(self._rows(part, lambda whole: whole.bernoulli_(*args[1:], **(kwargs or {}))))
        if func is torch.ops.aten.native_dropout.default:
            probability = args[1]
            mask = self._rows(part, lambda whole: func(whole.to(part.dtype), probability, True)[1])
            return part * mask * (1.0 / (1.0 - probability)), mask
        raise RuntimeError(f"tiled knows how to draw for dropout, and not how {func} draws by tiles")

    def _rows(self, part: Tensor, draw: Any) -> Tensor:
        tile = self._tile
        if part.dim() == 0 or len(part) != len(tile):
            raise RuntimeError(
                f"tiled: random numbers of shape {tuple(part.shape)} are drawn in a tile of {len(tile)} "
                "tokens; only one row for each token can be drawn by tiles"
            )
        if self._next == len(self._masks):
            if tile.start:
                raise RuntimeError("tiled: a later tile draws random numbers that the first one did not")
            whole = torch.ones(self._tokens, *part.shape[1:], dtype=torch.bool, device=part.device)
            self._masks.append(draw(whole))
        self._next += 1
        return self._masks[self._next - 1][tile.start : tile.stop]


def _tiles(tokens: int, tile_tokens: int) -> list[range]:
    return [range(s, min(s + tile_tokens, tokens)) for s in range(0, max(tokens, 1), tile_tokens)]


def _run(module: nn.Module, rows: Tensor, tile: range, draws: _WholeDraws) -> Tensor:
    if tile.start and not draws.drew:
        out = module(rows)
    else:
        draws.start(tile)
        with draws:
            out = module(rows)
    if not isinstance(out, Tensor) or out.dim() != 2 or len(out) != len(rows):
        found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"tiled: the module must give [{len(rows)}, features] for a tile, got {found}")
    return out


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module, tile_tokens: int, *parameters: Tensor) -> Tensor:
        ctx.surroundings = Surroundings(x.device)
        ctx.module, ctx.tile_tokens = module, tile_tokens
        if any(ctx.needs_input_grad):
            ctx.noted = _Noted(module)
        ctx.save_for_backward(x)
        draws = _WholeDraws(len(x))
        out = None
        for tile in _tiles(len(x), tile_tokens):
            part = _run(module, x[tile.start : tile.stop], tile, draws)
            if out is None:
                out = part.new_empty(len(x), part.shape[1])
            out[tile.start : tile.stop] = part
        assert out is not None
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("tiled")
        (x,) = ctx.saved_tensors
        parameters = ctx.noted.trainable_unchanged(ctx.module)
        needs_x = ctx.needs_input_grad[0]
        grad_x = torch.empty_like(x) if needs_x else None
        sums: list[Tensor | None] = [None] * len(parameters)
        draws = _WholeDraws(len(x))
        with ctx.surroundings.again(), torch.enable_grad():
            for tile in _tiles(len(x), ctx.tile_tokens):
                rows = x[tile.start : tile.stop].detach().requires_grad_(needs_x)
                out = _run(ctx.module, rows, tile, draws)
                leaves = [rows, *parameters] if needs_x else parameters
                if not tile.start:
                    _refuse_other_leaves(out, leaves)
                gradients = list(
                    torch.autograd.grad(out, leaves, grad[tile.start : tile.stop], allow_unused=True)
                )
                if grad_x is not None:
                    grad_rows = gradients.pop(0)
                    grad_x[tile.start : tile.stop] = 0 if grad_rows is None else grad_rows
                _add(sums, gradients)
        rounded = (None if s is None else s.to(p.dtype) for s, p in zip(sums, parameters, strict=True))
        return (grad_x, None, None, *rounded)


class _Noted:
    """What the module computed with in forward, and must still have in backward.

    Parameters are not saved as tensors: hooks on those (checkpointing, offload) may give back copies, and the
    module that runs again reads the parameters themselves.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parameters = [(p, p._version, p.requires_grad) for p in module.parameters()]
        self._modes = [m.training for m in module.modules()]

    def trainable_unchanged(self, module: nn.Module) -> list[Tensor]:
        """The parameters that needed a gradient in forward; RuntimeError if anything is not what it was."""
        now = list(module.parameters())
        if len(now) != len(self._parameters) or any(
            a is not b for a, (b, *_) in zip(now, self._parameters, strict=True)
        ):
            raise RuntimeError(
                "tiled: a parameter was replaced between forward and backward, which computes with it again"
            )
        for parameter, version, _ in self._parameters:
            if parameter._version != version:
                raise RuntimeError(
                    f"tiled: a parameter of shape {tuple(parameter.shape)} was modified by an inplace "
                    "operation between forward and backward, which computes with it again"
                )
        if self._modes != [m.training for m in module.modules()]:
            raise RuntimeError(
                "tiled: train() or eval() was called between forward and backward, which runs the module "
                "again"
            )
        return [parameter for parameter, _, trainable in self._parameters if trainable]


def _add(sums: list[Tensor | None], gradients: Sequence[Tensor | None]) -> None:
    for index, gradient in enumerate(gradients):
        if gradient is None:
            continue
        total = sums[index]
        if total is None:
            sums[index] = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        else:
            total += gradient


def _refuse_other_leaves(out: Tensor, leaves: Sequence[Tensor]) -> None:
    """A tensor from outside would silently get no gradient."""
    known = {id(leaf) for leaf in leaves}
    seen: set[Any] = set()
    to_visit = [out.grad_fn]
    while to_visit:
        node = to_visit.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in known:
            raise RuntimeError(
                f"tiled: the module reads a tensor of shape {tuple(variable.shape)} that needs a gradient "
                "and is not a parameter of its own; make it one, or detach it"
            )
        to_visit += [function for function, _ in node.next_functions]
