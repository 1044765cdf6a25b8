"""The treatments that change no result: those of ``norms``, ``recomputed``, ``swiglu`` and ``tiled``.

Each tries its functions on what the module was given in the probe, and stands in only for a module whose
output
it reproduces: to the bit, or within a few roundings where the module is known to write the same function in
other operators; the offer says which.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memtrain.optim.autograd.norms import RMSNormForm, layer_norm, rms_norm, rms_norm_forward
from memtrain.optim.autograd.recomputed import linear
from memtrain.optim.autograd.sites import Site, features, is_linear, is_transposed
from memtrain.optim.autograd.swiglu import ACTIVATIONS, activation_linear, gated_linear
from memtrain.optim.autograd.tiled import tiled
from memtrain.optim.autograd.treatments import (
    Forward,
    NotServedError,
    Offer,
    measured_bytes,
    register_treatment,
)

_ROUNDINGS = 4.0
"""Units in the last place of the largest output that still count as the same function: NewGELU writes
gelu_tanh in five operators, and tiles may multiply matrices in another order."""


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _refuse_hooks(module: nn.Module, name: str) -> None:
    if "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks:
        raise NotServedError(f"{name} carries a hook or a forward of its own, which would be passed by")


@dataclass(frozen=True, kw_only=True, slots=True)
class _RMSNormForward:
    eps: float
    form: RMSNormForm

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        return rms_norm(x, module.weight, self.eps, form=self.form)  # type: ignore[arg-type]


def _layer_norm_forward(module: nn.LayerNorm, x: Tensor) -> Tensor:
    return layer_norm(x, module.weight, module.bias, module.eps)


class _RecomputeNorm:
    """``norms.py``, in the form of RMSNorm that gives the module's output to the bit."""

    exact = True

    def offer(self, site: Site) -> Offer:
        forward = self._forward(site)

        def saved(run: Callable[[Tensor], Any]) -> float:
            return measured_bytes(lambda: run(_leaf(site.input)), site.module.parameters(), site.tokens)

        assert site.output is not None
        # A kernel may round otherwise than the operators that the form was recognised by.
        distance = _ulps(forward(site.module, site.input), site.output)
        return Offer(
            forward=forward,
            plain_bytes=saved(site.module),
            saved_bytes=saved(lambda x: forward(site.module, x)),
            equal=_in_words(distance),
        )

    def _forward(self, site: Site) -> Forward:
        module = site.module
        if type(module) is nn.LayerNorm:
            if module.normalized_shape != site.input.shape[-1:]:
                raise NotServedError(f"normalises {len(module.normalized_shape)} dimensions")
            return _layer_norm_forward
        weight = getattr(module, "weight", None)
        if weight is None or len(list(module.parameters(recurse=False))) != 1:
            raise NotServedError("neither an RMSNorm with one weight nor torch.nn.LayerNorm")
        # Of the second input the mean square is about that of eps, which the first may not show.
        inputs = (
            site.input,
            site.input * (1e-3 / site.input.float().pow(2).mean().sqrt()).to(site.input.dtype),
        )
        with torch.no_grad():
            wanted = [module(x) for x in inputs]
            numbers = {v for v in vars(module).values() if isinstance(v, float) and 0 < v < 1e-2}
            if isinstance(module, nn.RMSNorm) and module.eps is None:
                numbers = {torch.finfo(site.input.dtype).eps}
            for eps, form in itertools.product(sorted(numbers), RMSNormForm):
                got = [rms_norm_forward(x, weight, eps, form)[0] for x in inputs]
                if all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, wanted, strict=True)):
                    return _RMSNormForward(eps=eps, form=form)
        raise NotServedError("no known form of RMSNorm gives its output to the bit")


@dataclass(frozen=True, kw_only=True, slots=True)
class _LinearForward:
    transposed: bool

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        weight, bias = module.weight, module.bias
        return linear(x, weight, bias, transposed=self.transposed)  # type: ignore[arg-type]


class _RecomputeInput:
    """``recomputed.linear``."""

    exact = True

    def offer(self, site: Site) -> Offer:
        plain = site.input.nbytes / site.tokens if site.first_to_read else 0.0
        forward = _LinearForward(transposed=is_transposed(site.module))
        return Offer(forward=forward, plain_bytes=plain, saved_bytes=0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class _GatedForward:
    gate: str
    up: str
    down: str
    activation: str
    transposed: bool

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
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

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        first, second = getattr(module, self.first), getattr(module, self.second)
        out = activation_linear(
            first(x), second.weight, second.bias, activation=self.activation, transposed=self.transposed
        )
        result: Tensor = out if self.dropout is None else getattr(module, self.dropout)(out)
        return result


class _RecomputeProduct:
    """``swiglu.py``: for a gated MLP, or one without a gate."""

    exact = True

    def offer(self, site: Site) -> Offer:
        children = dict(site.module.named_children())
        for name, child in children.items():
            _refuse_hooks(child, name)
        candidates = list(self._candidates(site.kind, children, site.input.shape[-1]))
        assert site.output is not None
        for allowed in (0.0, _ROUNDINGS):
            for forward in candidates:
                distance = _ulps(forward(site.module, site.input), site.output)
                if distance <= allowed and _same_when_training(site, forward, allowed):
                    return self._measured(site, forward, distance)
        raise NotServedError(f"not a linear layer of {', '.join(ACTIVATIONS)} to the bit")

    def _candidates(self, kind: str, children: dict[str, nn.Module], width: int) -> Iterator[Forward]:
        linears = {name: features(child) for name, child in children.items() if is_linear(child)}
        for names in itertools.permutations(linears):
            transposed = is_transposed(children[names[-1]])
            for activation in ACTIVATIONS:
                if linears[names[0]][0] != width or linears[names[0]] != linears[names[-1]][::-1]:
                    continue
                if kind == "gated_mlp":
                    gate, up, down = names
                    if linears[up] == linears[gate]:
                        yield _GatedForward(
                            gate=gate, up=up, down=down, activation=activation, transposed=transposed
                        )
                    continue
                first, second = names
                dropouts = [name for name, child in children.items() if isinstance(child, nn.Dropout)]
                yield _UngatedForward(
                    first=first,
                    second=second,
                    activation=activation,
                    transposed=transposed,
                    dropout=dropouts[0] if dropouts else None,
                )

    def _measured(self, site: Site, forward: Forward, distance: float) -> Offer:
        def saved(run: Callable[[Tensor], Any]) -> float:
            fixed = itertools.chain(site.module.parameters(), [site.input])
            return measured_bytes(lambda: run(_leaf(site.input)), fixed, site.tokens)

        return Offer(
            forward=forward,
            plain_bytes=saved(site.module),
            saved_bytes=saved(lambda x: forward(site.module, x)),
            equal=_in_words(distance),
        )


def _ulps(got: Tensor, wanted: Tensor) -> float:
    """Largest distance in units of the last place of the largest element."""
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return float("inf")
    unit = torch.finfo(wanted.dtype).eps * max(float(wanted.abs().max()), torch.finfo(wanted.dtype).tiny)
    return float((got.double() - wanted.double()).abs().max()) / unit


def _in_words(distance: float) -> str:
    return "bit-equal" if distance == 0 else "equal within rounding"


def _same_when_training(site: Site, forward: Forward, allowed: float) -> bool:
    """Whether a dropout sits where we think it does."""
    dropouts = [m for m in site.module.modules() if isinstance(m, nn.Dropout)]
    modes = [m.training for m in dropouts]
    try:
        results = []
        runs: list[Callable[[Tensor], Tensor]] = [site.module, lambda x: forward(site.module, x)]
        for run in runs:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(0)
                for dropout in dropouts:
                    dropout.train()
                results.append(run(site.input))
    finally:
        for dropout, mode in zip(dropouts, modes, strict=True):
            dropout.training = mode
    return _ulps(results[1], results[0]) <= allowed


def _tiled_forward(module: nn.Module, x: Tensor) -> Tensor:
    return tiled(_Untreated(module), x)


class _Untreated(nn.Module):
    """The module's own forward, under its own parameters, without the one that was put in its place."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return type(self.module).forward(self.module, x)


class _TileTokens:
    """``tiled.py``: nothing but the MLP's input is saved; backward computes it twice."""

    exact = True

    def offer(self, site: Site) -> Offer:
        fixed = site.module.parameters()
        x = site.input
        got = _tiled_forward(site.module, x)
        assert site.output is not None
        distance = _ulps(got, site.output)
        if not distance <= _ROUNDINGS:
            raise NotServedError("its rows depend on each other")
        return Offer(
            forward=_tiled_forward,
            plain_bytes=measured_bytes(lambda: site.module(_leaf(x)), fixed, site.tokens),
            saved_bytes=x.nbytes / site.tokens,
            equal=_in_words(distance),
        )


def register_exact() -> None:
    """Make them known to policies. Called once, by ``apply``."""
    register_treatment("norm", "recompute", _RecomputeNorm())
    register_treatment("linear", "recompute", _RecomputeInput())
    for kind in ("gated_mlp", "mlp"):
        register_treatment(kind, "recompute", _RecomputeProduct())
        register_treatment(kind, "tiled", _TileTokens())
