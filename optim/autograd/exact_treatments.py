"""The treatments that change no result: those of ``norms`` and ``recomputed``, and of MLPs.

Each tries its functions on what the module was given in the probe, and stands in only for a module whose
output it reproduces: to the bit, or within a few roundings where the module is known to write the same
function in other operators; the offer says which.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memtrain.optim.autograd.mlp_treatments import RecomputeProduct, TileTokens
from memtrain.optim.autograd.norms import RMSNormForm, default_eps, layer_norm, rms_norm, rms_norm_forward
from memtrain.optim.autograd.recomputed import linear
from memtrain.optim.autograd.sites import Site, is_transposed
from memtrain.optim.autograd.treatments import (
    Forward,
    NotServedError,
    Offer,
    as_leaf,
    distance_ulps,
    in_words,
    measured_bytes,
    register_treatment,
)


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
            return measured_bytes(lambda: run(as_leaf(site.input)), site.module.parameters(), site.tokens)

        assert site.output is not None
        # A kernel may round otherwise than the operators that the form was recognised by.
        distance = distance_ulps(forward(site.module, site.input), site.output)
        return Offer(
            forward=forward,
            plain_bytes=saved(site.module),
            saved_bytes=saved(lambda x: forward(site.module, x)),
            equal=in_words(distance),
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
        with torch.no_grad():
            probes = list(_norm_probes(site.input, torch.randn_like(weight)))
            wanted = [torch.func.functional_call(module, {"weight": w}, (x,)) for x, w in probes]
            numbers = {v for v in vars(module).values() if isinstance(v, float) and 0 < v < 1e-2}
            if isinstance(module, nn.RMSNorm) and module.eps is None:
                numbers = {default_eps(site.input.dtype)}
            for eps, form in itertools.product(sorted(numbers), RMSNormForm):
                got = [rms_norm_forward(x, w, eps, form)[0] for x, w in probes]
                if all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, wanted, strict=True)):
                    return _RMSNormForward(eps=eps, form=form)
        raise NotServedError("no known form of RMSNorm gives its output to the bit")


def _norm_probes(x: Tensor, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and weights that tell the forms of RMSNorm apart; those of a fresh model are ones, and do not.

    Of the second input the mean square is about that of eps, which the first may not show. In fp32 two forms
    round alike, and the model may be cast later.
    """
    yield x, weight
    yield x * (1e-3 / x.float().pow(2).mean().sqrt()).to(x.dtype), weight
    yield x.bfloat16(), weight.bfloat16()


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
        if type(site.module.weight) is not nn.Parameter:
            raise NotServedError(f"its weight is a {type(site.module.weight).__name__}")
        plain = site.input.nbytes / site.tokens if site.first_to_read else 0.0
        forward = _LinearForward(transposed=is_transposed(site.module))
        return Offer(forward=forward, plain_bytes=plain, saved_bytes=0.0)


def register_exact() -> None:
    """Make them known to policies. Called once, by ``apply``."""
    register_treatment("norm", "recompute", _RecomputeNorm())
    register_treatment("linear", "recompute", _RecomputeInput())
    for kind in ("gated_mlp", "mlp"):
        register_treatment(kind, "recompute", RecomputeProduct())
        register_treatment(kind, "tiled", TileTokens())
