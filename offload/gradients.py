"""Gradients leave memory as they are produced.

A hook on every trainable parameter copies its finished gradient, chunk by chunk through a bounded ring, to
the plan's tier and puts an ``OffloadedGrad`` in its place. A later micro-batch reads the old gradient back,
adds it into the incoming one's own memory (addition commutes bit by bit), and writes the sum: no second
gradient is ever in memory, and the norm is taken, by the operator that ``clip_grad_norm_`` uses, while the
whole is hot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from memtrain.offload.errors import PlanMismatchError, UnsupportedGradientOperation
from memtrain.offload.gradient_home import Chunk, Engine, GradientValue, OffloadedGradient, Ticket
from memtrain.offload.gradient_ring import GradientRing
from memtrain.offload.norms import float_norm
from memtrain.offload.offloaded_grad import Fingerprint, OffloadedGrad
from memtrain.offload.overlaid_slab import OverlaidSlab
from memtrain.offload.shards import PAGE_BYTES, PIECE_ALIGNMENT, SMALL, FlatIndex, Piece
from memtrain.offload.slab import HighWater
from memtrain.planner.actions import Tier
from memtrain.planner.units import round_up

_EXPECTED = 2
"""Gradients that are read ahead of their turn: one in hand and one on its way."""


class GradientStore:
    """Installs the hooks and owns the ring through which gradients pass.

    Args:
        engine: whose stores hold the bytes.
        index: the parameters and their pieces.
        tiers: gradient tier of each unit. Small parameters stay in memory whatever it says.
        slots, slot_bytes: the ring, allocated here where any gradient leaves.
        norm_dtype: of the 2-norm that is kept: float32 (``norms.float_norm``) where clipping is done on fp32
            gradients, None for the gradient's own dtype. The other is computed from the bytes when asked for.
        before_overwrite: called with the unit before a gradient's bytes are replaced.
        overlaid: where the ring lies, if the plan has it share memory with others.

    Raises:
        PlanMismatchError: gradients leave but there is no ring.
        TierFullError: no room for them.
        OffloadError: the device refuses the ring's memory.

    Where it raises, nothing is installed.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        index: FlatIndex,
        tiers: Mapping[str, Tier],
        slots: int,
        slot_bytes: int,
        norm_dtype: torch.dtype | None = None,
        before_overwrite: Callable[[str], None] = lambda unit: None,
        overlaid: OverlaidSlab | None = None,
    ) -> None:
        self.norm_dtype = norm_dtype
        self._before_overwrite = before_overwrite
        self._slot_bytes = slot_bytes // PAGE_BYTES * PAGE_BYTES
        self._hooks: list[Any] = []
        self._ring: GradientRing | None = None
        self._exclusive: frozenset[Fingerprint] = frozenset()
        self.homes: dict[str, OffloadedGradient] = {}
        """By parameter, of the gradients that leave."""
        self._order = _BackwardOrder()
        self.changed_bytes: Counter[Tier] = Counter()
        """Of gradients, and of sums of micro-batches, that have left so far."""
        leaving = [
            name
            for name, parameter in index.parameters.items()
            if tiers[index.unit_of[name]] is not Tier.DEVICE and parameter.numel() >= SMALL
        ]
        if leaving and (slots < 1 or self._slot_bytes < 2 * PAGE_BYTES):
            raise PlanMismatchError(
                f"gradients such as that of {leaving[0]} leave the device, but the plan has {slots} "
                f"gradient slots of "
                f"{slot_bytes} bytes: at least 1 slot of {2 * PAGE_BYTES} bytes is needed"
            )
        try:
            for name in leaving:
                self._adopt(engine, index, name, tiers[index.unit_of[name]])
            if leaving:
                self._ring = GradientRing(slots, self._slot_bytes, engine.device, overlaid)
                self._exclusive = exclusive_fingerprints(engine.device.place)
            for home in self.homes.values():
                # A closure of each parameter's own would take a kilobyte more.
                self._hooks.append(home.parameter.register_hook(partial(_look_before, home)))
                self._hooks.append(
                    home.parameter.register_post_accumulate_grad_hook(partial(self._leave, home))
                )
        except BaseException:
            self.close()
            raise

    def load(
        self, home: OffloadedGradient, value: GradientValue, piece: Piece, buffer: Tensor
    ) -> list[Ticket]:
        """Start reading the piece's gradient into ``buffer`` (uint8, padded to pages).

        When the tickets are waited for, call ``value.apply`` on the typed view.
        """
        if value.zero:
            buffer.zero_()
            return []
        assert self._ring is not None
        self._ring.submit_all_of(home)
        tickets, position = [], 0
        for chunk in home.chunks:
            if piece.start <= chunk.start < piece.stop:
                tickets.append(
                    home.store.read(home.extent, buffer[position : position + chunk.nbytes], chunk.offset)
                )
                position += chunk.nbytes
        return tickets

    def high_water(self) -> tuple[HighWater, ...]:
        """What was used of the ring so far; empty where no gradient leaves."""
        return () if self._ring is None else (self._ring.high_water(),)

    def drain(self) -> None:
        """Wait until every gradient is on its tier. Raises what went wrong."""
        if self._ring is not None:
            self._ring.drain()

    def close(self) -> None:
        """Remove the hooks and give tiers and memory back. Gradients not materialised are gone."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        homes, self.homes = self.homes, {}
        ring, self._ring = self._ring, None
        self._order = _BackwardOrder()
        with ExitStack() as stack:  # the last first
            for home in homes.values():
                if isinstance(home.parameter.grad, OffloadedGrad):
                    home.parameter.grad = None
                stack.callback(home.store.free, home.extent)
            if ring is not None:
                stack.callback(ring.close)
                stack.callback(ring.drain)

    def _adopt(self, engine: Engine, index: FlatIndex, name: str, tier: Tier) -> None:
        parameter = index.parameters[name]
        itemsize = parameter.dtype.itemsize
        step = self._slot_bytes // itemsize // PIECE_ALIGNMENT * PIECE_ALIGNMENT
        chunks = []
        for _, piece in index.pieces[name]:
            for start in range(piece.start, piece.stop, step):
                stop = min(start + step, piece.stop)
                nbytes = round_up((stop - start) * itemsize, PAGE_BYTES)
                chunks.append(Chunk(start=start, stop=stop, offset=start * itemsize, nbytes=nbytes))
        store = engine.store(tier)
        self.homes[name] = OffloadedGradient(
            owner=self,
            name=name,
            unit=index.unit_of[name],
            parameter=parameter,
            store=store,
            extent=store.allocate(f"gradient of {name}", round_up(parameter.numel() * itemsize, PAGE_BYTES)),
            chunks=tuple(chunks),
        )

    @torch.no_grad()
    def _leave(self, home: OffloadedGradient, parameter: Tensor) -> None:
        """A hook, called when the parameter's gradient is finished."""
        gradient = parameter.grad
        if gradient is None or isinstance(gradient, OffloadedGrad):
            return
        if gradient.layout is not torch.strided:
            raise UnsupportedGradientOperation(
                f"the gradient of {home.name} is {gradient.layout}: only dense gradients can leave the "
                f"device; "
                f"make it dense (sparse=False) or keep this unit's gradients on the device"
            )
        if gradient.requires_grad:
            raise UnsupportedGradientOperation(
                f"the gradient of {home.name} has a graph of its own (backward with create_graph=True), "
                f"which would be lost with its bytes: call backward without create_graph, or use "
                f"torch.autograd.grad(..., create_graph=True), or keep this unit's gradients on the "
                f"device"
            )
        whole_bytes = gradient.untyped_storage().nbytes()
        if home.found_assigned and whole_bytes > gradient.nbytes:
            raise UnsupportedGradientOperation(
                f"the gradient of {home.name} was assigned before backward and is a window of "
                f"{gradient.nbytes} bytes of a storage of {whole_bytes} bytes, which would no longer see "
                f"it: set its grad to None before backward, or keep this unit's gradients on the device"
            )
        self._before_overwrite(home.unit)
        self._write(home, gradient.detach())
        home.identity += 1
        parameter.grad = OffloadedGrad(parameter, home)

    def accumulate(
        self, home: OffloadedGradient, incoming: Tensor, alpha: Any, fingerprint: Fingerprint
    ) -> None:
        self._before_overwrite(home.unit)
        same = incoming.dtype == home.parameter.dtype and incoming.shape == home.parameter.shape
        if alpha == 1 and same and incoming.is_contiguous() and fingerprint in self._exclusive:
            flat = incoming.detach().view(-1)
            for chunk, old in self.stream(home):
                flat[chunk.start : chunk.stop].add_(old)
            total = incoming
        else:
            # Somebody else may see the incoming memory: bring the old gradient in instead.
            total = home.materialize()
            total.add_(incoming, alpha=alpha)
        self._write(home, total)

    def _write(self, home: OffloadedGradient, gradient: Tensor) -> None:
        norm = torch.linalg.vector_norm(gradient, 2.0) if self.norm_dtype is None else float_norm(gradient)
        low, high = torch.aminmax(gradient)
        assert self._ring is not None
        self._ring.send(home, gradient.reshape(-1))
        self.changed_bytes[home.store.tier] += gradient.nbytes
        home.value = GradientValue(norm=norm, largest=torch.maximum(low.abs(), high.abs()).view(1))
        following = self._order.after(home)
        # What is there now will be added to.
        self._ring.expect([one for one in following if isinstance(one.parameter.grad, OffloadedGrad)])

    def stream(self, home: OffloadedGradient) -> Iterator[tuple[Chunk, Tensor]]:
        """The gradient's chunks in order, scaled; each is valid until the next is asked for."""
        assert self._ring is not None
        return self._ring.stream(home)


class _BackwardOrder:
    """In which order gradients arrive: that of the last backward pass, which the next one will repeat."""

    def __init__(self) -> None:
        self._next: dict[OffloadedGradient, OffloadedGradient] = {}
        self._arrived: dict[OffloadedGradient, None] = {}
        """In this pass, in order."""

    def after(self, home: OffloadedGradient) -> list[OffloadedGradient]:
        """``home`` has arrived: which two are expected next, the sooner first."""
        if home in self._arrived:
            self._arrived.clear()  # another pass has begun
        if self._arrived:
            self._next[next(reversed(self._arrived))] = home
        self._arrived[home] = None
        expected: list[OffloadedGradient] = []
        following = self._next.get(home)
        while following is not None and following not in self._arrived and len(expected) < _EXPECTED:
            expected.append(following)
            following = self._next.get(following)
        return expected


def _look_before(home: OffloadedGradient, incoming: Tensor) -> None:
    """Afterwards nothing tells a window that the user assigned from one that autograd made (backward of
    ``cat`` hands out windows of one tensor, which nobody expects to be kept up to date)."""
    present = home.parameter.grad
    home.found_assigned = present is not None and not isinstance(present, OffloadedGrad)


@dataclass(eq=False)
class _Witness:
    """A home that only records how its incoming gradient is referenced."""

    name: str = "witness"
    identity: int = 0
    seen: list[Fingerprint] = field(default_factory=list)

    def accumulate(self, incoming: Tensor, alpha: Any, fingerprint: Fingerprint) -> None:
        self.seen.append(fingerprint)


def exclusive_fingerprints(device: torch.device) -> frozenset[Fingerprint]:
    """How a gradient on ``device`` looks when autograd hands it over and nobody else holds it.

    Measured on two backward passes whose gradients are exclusive by construction: a fresh tensor (of a
    product) and a view of a fresh tensor (of a linear layer, whose gradient is a transpose).
    """
    witness = _Witness()
    with torch.enable_grad():
        for run in (
            lambda weight: (weight * 2.0).sum(),
            lambda weight: torch.nn.functional.linear(torch.ones(2, 3, device=device), weight).sum(),
        ):
            weight = torch.nn.Parameter(torch.ones(4, 3, device=device))
            weight.grad = OffloadedGrad(weight.detach(), witness)  # type: ignore[arg-type]
            run(weight).backward()
    return frozenset(witness.seen)
