"""What can be done at a site, by name: a registry of treatments.

A treatment looks at a site and answers with the forward that will stand in its place, or with the reason why
it has none. Lossy treatments register themselves here as well, with ``exact=False``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from memtrain.optim.autograd.saved_bytes import SavedBytes
from memtrain.optim.autograd.sites import Site

KEEP = "keep"
"""The treatment that is none: the module stays as it is."""
ROUNDINGS = 4.0
"""Units in the last place of the largest output that still count as the same function: NewGELU writes
gelu_tanh in five operators, and tiles may multiply matrices in another order."""
KINDS = ("norm", "linear", "gated_mlp", "mlp", "layer")
Forward = Callable[..., Any]
"""``forward(module, *args, **kwargs)``; a module-level function or a dataclass, so that a treated model can
be copied and pickled."""


class NotServedError(ValueError):
    """A treatment cannot stand in for what this module computes; says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Offer:
    """What a treatment would do at one site."""

    forward: Forward
    plain_bytes: float | None
    """Saved per token by the plain module, as measured in the probe; None where that says nothing."""
    saved_bytes: float | None
    """Saved per token in its place."""
    equal: str = "bit-equal"
    """How its result compares with the plain module's in the probe."""


class Treatment(Protocol):
    """Named by ``register_treatment``."""

    exact: bool
    """Whether results differ from the plain module's by rounding at most."""

    def offer(self, site: Site) -> Offer:
        """Raises NotServedError."""
        ...


_REGISTRY: dict[tuple[str, str], Treatment] = {}


def register_treatment(kind: str, name: str, treatment: Treatment) -> None:
    """Let policies say ``name`` for sites of ``kind``. Raises ValueError for a name that is taken."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if name == KEEP or (kind, name) in _REGISTRY:
        raise ValueError(f"a treatment {name!r} for {kind} is already there")
    _REGISTRY[kind, name] = treatment


def find_treatment(kind: str, name: str) -> Treatment:
    """Raises ValueError that lists what there is."""
    if (kind, name) not in _REGISTRY:
        there = sorted(known for of, known in _REGISTRY if of == kind)
        raise ValueError(f"no treatment {name!r} for {kind}; there are {', '.join([KEEP, *there])}")
    return _REGISTRY[kind, name]


def measured_bytes(function: Callable[[], Any], fixed: Iterator[Tensor], tokens: int) -> float:
    """Bytes per token that ``function`` saves for backward, ``fixed`` tensors apart."""
    with torch.enable_grad(), SavedBytes(fixed) as saved:
        kept_alive = function()
    del kept_alive
    return saved.total_bytes / tokens


def as_leaf(x: Tensor) -> Tensor:
    """The same values, which need a gradient."""
    return x.detach().requires_grad_()


def refuse_hooks(module: nn.Module, name: str) -> None:
    """Raises NotServedError where calling ``module`` does more than its class's forward."""
    if _does_more(module):
        raise NotServedError(f"{name} carries a hook or a forward of its own, which would be passed by")


def _does_more(module: nn.Module) -> bool:
    return bool(
        "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


class ChangedModuleError(RuntimeError):
    """A module was changed behind the back of the treatment that stands in for its parent."""


@dataclass(frozen=True, slots=True)
class Bypassed:
    """Children whose weights or functions a treated forward uses without calling them.

    What happens to them later (an adapter in their place, a hook) would be without effect, and silently so.
    """

    classes: tuple[tuple[str, type[nn.Module]], ...]

    @classmethod
    def of(cls, children: Mapping[str, nn.Module], *names: str) -> Bypassed:
        """Those of ``children`` that are called ``names``, as they are now."""
        return cls(tuple((name, type(children[name])) for name in names))

    def check(self, parent: nn.Module) -> None:
        """Raises ChangedModuleError if one is not what it was."""
        for name, kind in self.classes:
            child = getattr(parent, name)
            if type(child) is not kind or _does_more(child):
                raise ChangedModuleError(
                    f"{name} of a treated {type(parent).__name__} was a plain {kind.__name__} when it was "
                    "treated, and has been replaced or given a hook since, which would be passed by: "
                    "revert(model), make the change, then apply_to(model)"
                )


def distance_ulps(got: Tensor, wanted: Tensor) -> float:
    """Largest distance in units of the last place of the largest element."""
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return float("inf")
    unit = torch.finfo(wanted.dtype).eps * max(float(wanted.abs().max()), torch.finfo(wanted.dtype).tiny)
    return float((got.double() - wanted.double()).abs().max()) / unit


def in_words(distance: float) -> str:
    """For the table of what was done; 0 is to the bit."""
    return "bit-equal" if distance == 0 else "equal within rounding"


def same_when_training(site: Site, forward: Forward, allowed: float) -> bool:
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
    return distance_ulps(results[1], results[0]) <= allowed
