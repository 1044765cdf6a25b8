"""What is known of a gradient whose bytes are on a tier, and where they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from memtrain.offload.device import Device
from memtrain.offload.norms import NORM_CHUNK_ELEMENTS, float_norm
from memtrain.offload.offloaded_grad import Fingerprint, Scaling
from memtrain.planner.actions import Tier


class Ticket(Protocol):
    """A transfer under way."""

    def wait(self) -> None: ...
    def done(self) -> bool: ...


class Store(Protocol):
    """One tier, as ``tiers.Store``."""

    @property
    def tier(self) -> Tier: ...
    @property
    def piece_bytes(self) -> int: ...
    def allocate(self, name: str, nbytes: int) -> Any: ...
    def write(self, extent: Any, buffer: Tensor, offset: int = 0) -> Ticket: ...
    def read(self, extent: Any, buffer: Tensor, offset: int = 0) -> Ticket: ...
    def discard(self, extent: Any, offset: int, nbytes: int) -> None: ...
    def free(self, extent: Any) -> None: ...


class Engine(Protocol):
    """The session's stores and its device, as ``engine.Engine``."""

    @property
    def device(self) -> Device: ...
    def store(self, tier: Tier) -> Any: ...
    def state_store(self, tier: Tier) -> Any: ...


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class GradientValue:
    """One state of a gradient. A pending update keeps the one it was given."""

    zero: bool = False
    """All zeros; nothing is on the tier."""
    norm: Tensor | None = None
    """2-norm of the bytes on the tier, in the store's ``norm_dtype``."""
    largest: Tensor | None = None
    """Greatest absolute value on the tier, NaN where there is one; shape (1,), the gradient's dtype."""
    scalings: tuple[Scaling, ...] = ()
    """Still to be applied to what is on the tier, in order."""

    def apply(self, tensor: Tensor) -> None:
        """Scale bytes that were just read, in place."""
        for scaling in self.scalings:
            scaling.apply(tensor)

    def scaled_largest(self) -> Tensor:
        """Greatest absolute value after the scalings. Exact, since rounding is monotone."""
        assert self.largest is not None
        largest = self.largest.clone()
        self.apply(largest)
        return largest.abs()


@dataclass(frozen=True, slots=True)
class Chunk:
    """Elements ``start`` to ``stop`` of a parameter: one write, and later one read."""

    start: int
    stop: int
    offset: int
    nbytes: int


class GradientOwner(Protocol):
    """Who moves gradients: ``gradients.GradientStore``."""

    norm_dtype: torch.dtype | None

    def accumulate(
        self, home: OffloadedGradient, incoming: Tensor, alpha: Any, fingerprint: Fingerprint
    ) -> None: ...
    def stream(self, home: OffloadedGradient) -> Iterator[tuple[Chunk, Tensor]]: ...


@dataclass(kw_only=True, eq=False)
class OffloadedGradient:
    """The home of one parameter's gradient on a tier."""

    owner: GradientOwner
    name: str
    unit: str
    parameter: torch.nn.Parameter
    store: Store
    extent: Any
    chunks: tuple[Chunk, ...]
    identity: int = 0
    """Counts gradients; accumulating keeps it, a new gradient raises it."""
    value: GradientValue = field(default_factory=GradientValue)
    found_assigned: bool = False
    """Whether the backward pass found an ordinary gradient to accumulate into: the user's own."""

    def accumulate(self, incoming: Tensor, alpha: Any, fingerprint: Fingerprint) -> None:
        """``grad += alpha * incoming``."""
        self.owner.accumulate(self, incoming, alpha, fingerprint)

    def scale(self, scaling: Scaling) -> None:
        """Remember ``scaling``."""
        self.value = replace(self.value, scalings=(*self.value.scalings, scaling))

    def zero(self) -> None:
        """Make it all zeros; the bytes on the tier are left to whoever still needs them."""
        like = self.parameter
        self.value = GradientValue(
            zero=True,
            norm=torch.zeros((), dtype=self.owner.norm_dtype or like.dtype, device=like.device),
            largest=torch.zeros(1, dtype=like.dtype, device=like.device),
        )

    def finite(self) -> bool:
        """Whether every element is finite once the scalings are applied."""
        value = self.value
        assert value.largest is not None
        # A scaling only ever makes non-finite what was finite; 0 * inf and nan hide in no maximum but that of
        # 0.
        probes = torch.cat([value.scaled_largest(), torch.zeros_like(value.largest)])
        value.apply(probes[1:])
        return bool(torch.isfinite(probes).all()) and bool(torch.isfinite(value.largest).all())

    def norm(self, order: float, dtype: torch.dtype | None) -> Tensor:
        """2-norm or inf-norm, bit-equal to ``torch.linalg.vector_norm`` of the real gradient.

        Reads the bytes where the 2-norm that was kept is of another dtype, or scaled since.
        """
        own = self.parameter.dtype
        if order == float("inf"):
            largest = self.value.scaled_largest()[0]
            return largest if dtype is None else largest.to(dtype)
        kept = self.value.norm
        whole = self.owner.norm_dtype is None or self.parameter.numel() <= NORM_CHUNK_ELEMENTS
        same = whole and (dtype or own) == (self.owner.norm_dtype or own)
        if kept is not None and not self.value.scalings and same:
            return kept.clone()
        return torch.linalg.vector_norm(self.materialize(), order, dtype=dtype)

    def float_norm(self) -> Tensor:
        """``norms.float_norm`` of the real gradient; its bytes are read only where it was scaled since."""
        if self.value.norm is not None and not self.value.scalings and self.owner.norm_dtype is torch.float32:
            return self.value.norm.clone()
        return float_norm(self.materialize())

    def materialize(self) -> Tensor:
        """An ordinary tensor with the gradient's values."""
        whole = torch.empty_like(self.parameter, requires_grad=False)
        flat = whole.view(-1)
        for chunk, old in self.owner.stream(self):
            flat[chunk.start : chunk.stop].copy_(old)
        return whole
