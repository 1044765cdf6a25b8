"""What can be done at a site, by name: a registry of treatments.

A treatment looks at a site and answers with the forward that will stand in its place, or with the reason why
it has none. Lossy treatments register themselves here as well, with ``exact=False``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from memtrain.optim.autograd.saved_bytes import SavedBytes
from memtrain.optim.autograd.sites import Site

KEEP = "keep"
"""The treatment that is none: the module stays as it is."""
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
