"""The exact treatments of MLPs: ``swiglu`` and ``tiled``.

What an MLP computes is found by trying. Its activation is compared by itself, on a grid in fp32: in bf16
eight tokens through a whole MLP do not always tell GELU from its tanh form. The order of the linear layers is
found by running them on the probe.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memtrain.optim.autograd.sites import Site, features, is_linear, is_transposed
from memtrain.optim.autograd.swiglu import ACTIVATIONS, activation_linear, gated_linear
from memtrain.optim.autograd.tiled import tiled
from memtrain.optim.autograd.treatments import (
    ROUNDINGS,
    Bypassed,
    Forward,
    NotServedError,
    Offer,
    as_leaf,
    distance_ulps,
    in_words,
    measured_bytes,
    refuse_hooks,
    same_when_training,
)

_PROBE_TILE_TOKENS = 3
"""Several tiles of the probe's tokens, the last of them shorter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _GatedForward:
    gate: str
    up: str
    down: str
    activation: str
    transposed: bool
    bypassed: Bypassed

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        self.bypassed.check(module)
        gate, up, down = (getattr(module, name) for name in (self.gate, self.up, self.down))
        return gated_linear(
            gate(x), up(x), down.weight, down.bias, activation=self.activation, transposed=self.transposed
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _UngatedForward:
    first: str
    second: str
    activation: str
    transposed: bool
    dropout: str | None
    bypassed: Bypassed

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        self.bypassed.check(module)
        first, second = getattr(module, self.first), getattr(module, self.second)
        out = activation_linear(
            first(x), second.weight, second.bias, activation=self.activation, transposed=self.transposed
        )
        result: Tensor = out if self.dropout is None else getattr(module, self.dropout)(out)
        return result


class RecomputeProduct:
    """``swiglu.py``: for a gated MLP, or one without a gate."""

    exact = True

    def offer(self, site: Site) -> Offer:
        """Of the order of linear layers that gives the module's output."""
        children = dict(site.module.named_children())
        for name, child in children.items():
            refuse_hooks(child, name)
        candidates = list(self._candidates(site, children))
        assert site.output is not None
        for allowed in (0.0, ROUNDINGS):
            for forward in candidates:
                distance = distance_ulps(forward(site.module, site.input), site.output)
                if distance <= allowed and same_when_training(site, forward, allowed):
                    return self._measured(site, forward, distance)
        raise NotServedError(f"not a linear layer of {', '.join(ACTIVATIONS)} to the bit")

    def _candidates(self, site: Site, children: dict[str, nn.Module]) -> Iterator[Forward]:
        linears = {name: features(child) for name, child in children.items() if is_linear(child)}
        width = site.input.shape[-1]
        hidden = next((out for into, out in linears.values() if into == width), 1)
        grid = torch.linspace(-8.0, 8.0, 64 * hidden, device=site.input.device).view(64, hidden)
        for own, activation in _activations(children, grid):
            for names in itertools.permutations(linears):
                if linears[names[0]][0] != width or linears[names[0]] != linears[names[-1]][::-1]:
                    continue
                known: dict[str, Any] = {
                    "activation": activation,
                    "transposed": is_transposed(children[names[-1]]),
                    "bypassed": Bypassed.of(children, own, names[-1]),
                }
                if site.kind == "gated_mlp":
                    gate, up, down = names
                    if linears[up] == linears[gate]:
                        yield _GatedForward(gate=gate, up=up, down=down, **known)
                    continue
                dropouts = [name for name, child in children.items() if isinstance(child, nn.Dropout)]
                dropout = dropouts[0] if dropouts else None
                yield _UngatedForward(first=names[0], second=names[1], dropout=dropout, **known)

    def _measured(self, site: Site, forward: Forward, distance: float) -> Offer:
        def saved(run: Callable[[Tensor], Any]) -> float:
            fixed = itertools.chain(site.module.parameters(), [site.input])
            return measured_bytes(lambda: run(as_leaf(site.input)), fixed, site.tokens)

        return Offer(
            forward=forward,
            plain_bytes=saved(site.module),
            saved_bytes=saved(lambda x: forward(site.module, x)),
            equal=in_words(distance),
        )


def _activations(children: dict[str, nn.Module], grid: Tensor) -> Iterator[tuple[str, str]]:
    """Names of the child that is an activation and of the one of ``ACTIVATIONS`` that it is on ``grid``."""
    for own, child in children.items():
        if is_linear(child) or isinstance(child, nn.Dropout):
            continue
        found = child(grid)
        for name, activation in ACTIVATIONS.items():
            if distance_ulps(activation.forward(grid), found) <= ROUNDINGS:
                yield own, name


def _tiled_forward(module: nn.Module, x: Tensor) -> Tensor:
    return tiled(_Untreated(module), x)


class _Untreated(nn.Module):
    """The module's own forward, under its own parameters, without the one that was put in its place."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return type(self.module).forward(self.module, x)


class TileTokens:
    """``tiled.py``: nothing but the MLP's input is saved; backward computes it twice."""

    exact = True

    def offer(self, site: Site) -> Offer:
        """Refuses a module whose rows depend on each other."""
        fixed = site.module.parameters()
        x = site.input
        got = tiled(_Untreated(site.module), x, tile_tokens=_PROBE_TILE_TOKENS)
        assert site.output is not None
        distance = distance_ulps(got, site.output)
        if not distance <= ROUNDINGS:
            raise NotServedError("its rows depend on each other")
        return Offer(
            forward=_tiled_forward,
            plain_bytes=measured_bytes(lambda: site.module(as_leaf(x)), fixed, site.tokens),
            saved_bytes=x.nbytes / site.tokens,
            equal=in_words(distance),
        )
