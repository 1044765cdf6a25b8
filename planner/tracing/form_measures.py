"""What other forms of a block take and lose, beside the plain one, at the batch that is trained on.

A form that promises the plain form's bits is held to it: output, the input's gradient and every parameter's
are compared, and a form that differs in one bit is left out, with the reason. Of one that loses the error is
measured. Forms and the plain one run in turn, so that a busy moment of the machine falls on both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memtrain.planner.actions import EXACT
from memtrain.planner.profile import BlockForm
from memtrain.planner.tracing.rehearsal import Rehearsal

_REPETITIONS = 3
"""Of each form that is timed. The fastest counts: of two times whose ratio is wanted, what else the machine
does must not be in one alone."""
_OUTPUT, _INPUT, _PARAMETERS = "output", "the gradient of its input", "the gradients of its parameters"


@dataclass(frozen=True, kw_only=True, slots=True)
class Lone:
    """One block to be run alone.

    Its backward is the tracer's: parameters' gradients vanish as they are made.
    """

    block: nn.Module
    run: Callable[[Tensor], Tensor]
    given: Callable[[], Tensor]
    """Its input, fresh each time, as in training."""
    count: Callable[[], dict[str, int]]
    """The byte fields of a BlockForm."""
    seconds: Callable[[], tuple[float, float]]
    """Of forward and backward."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredForm:
    """A form of one block."""

    name: str
    error: float
    sizes: dict[str, int]
    slowdown: tuple[float, float]
    """Seconds over the plain form's, forward and backward."""

    def of(self, forward_seconds: float, backward_seconds: float) -> BlockForm:
        """For a block whose plain form takes these."""
        return BlockForm(
            name=self.name,
            error=self.error,
            forward_seconds=forward_seconds * self.slowdown[0],
            backward_seconds=backward_seconds * self.slowdown[1],
            **self.sizes,
        )


def measure_forms(
    rehearsal: Rehearsal, name: str, lone: Lone, plain_bytes: int
) -> tuple[tuple[MeasuredForm, ...], tuple[tuple[str, str], ...]]:
    """Forms that may be chosen, and name and reason of those that may not.

    Args:
        rehearsal: puts forms on.
        name: of the block.
        lone: the block.
        plain_bytes: what its plain form saves.
    """
    missing = dict(rehearsal.missing_forms(name))
    found = []
    names = rehearsal.forms(name)
    plain = _Results(keep=any(form != EXACT for form in names))
    if names:
        _pass(lone, plain.note)
    for form in names:
        with rehearsal.in_form(name, form):
            error, reason = _exact(lone, plain) if form == EXACT else _lossy(lone, plain)
            sizes = {} if reason else lone.count()
        if not reason and sizes["saved_bytes"] >= plain_bytes:
            reason = f"it saves {sizes['saved_bytes']} bytes, the plain form {plain_bytes}"
        if reason:
            missing[form] = reason
            continue
        slowdown = _slowdown(rehearsal, name, form, lone)
        found.append(MeasuredForm(name=form, error=error, sizes=sizes, slowdown=slowdown))
    return tuple(found), tuple(sorted(missing.items()))


class _Results:
    """What one forward and backward gave: bits of everything, and the gradients themselves where asked."""

    def __init__(self, *, keep: bool) -> None:
        self.bits: dict[tuple[str, int], bytes] = {}
        self.gradients: dict[tuple[str, int], Tensor] = {}
        self._keep = keep

    def note(self, what: str, number: int, value: Tensor) -> None:
        self.bits[what, number] = _bits(value)
        if self._keep and what != _OUTPUT:
            self.gradients[what, number] = value.detach().clone()


def _bits(value: Tensor) -> bytes:
    raw: Any = value.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy()
    return hashlib.blake2b(raw, digest_size=16).digest()


def _pass(lone: Lone, visit: Callable[[str, int, Tensor], None]) -> None:
    """Forward and backward from the same random state and the same gradient each time."""
    given = lone.given()
    device = given.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        if given.requires_grad:
            given.register_hook(lambda gradient: visit(_INPUT, 0, gradient))  # type: ignore[no-untyped-call]
        handles = [
            parameter.register_hook(_visitor(visit, number))  # type: ignore[no-untyped-call]
            for number, parameter in enumerate(lone.block.parameters())
            if parameter.requires_grad
        ]
        try:
            output = lone.run(given)
            visit(_OUTPUT, 0, output)
            if output.requires_grad:
                torch.manual_seed(1)
                gradient, edge = torch.randn_like(output), torch.autograd.graph.get_gradient_edge(output)
                del given, output
                torch.autograd.backward(edge, gradient)
        finally:
            for handle in handles:
                handle.remove()


def _visitor(visit: Callable[[str, int, Tensor], None], number: int) -> Callable[[Tensor], None]:
    return lambda gradient: visit(_PARAMETERS, number, gradient)


def _exact(lone: Lone, plain: _Results) -> tuple[float, str]:
    """No error, or why the form is not what it promises."""
    found = _Results(keep=False)
    _pass(lone, found.note)
    apart = {what for what, _ in plain.bits.keys() ^ found.bits.keys()}
    apart |= {key[0] for key in plain.bits.keys() & found.bits.keys() if plain.bits[key] != found.bits[key]}
    if apart:
        return 0.0, f"{' and '.join(sorted(apart))} are not bit-equal to the plain form's at this batch"
    return 0.0, ""


def _lossy(lone: Lone, plain: _Results) -> tuple[float, str]:
    """The error of the form's gradients, or why there is none."""
    squares: dict[str, float] = {_INPUT: 0.0, _PARAMETERS: 0.0}

    def compare(what: str, number: int, value: Tensor) -> None:
        if what != _OUTPUT:
            wanted = plain.gradients[what, number]
            squares[what] += float((value.detach().float() - wanted.float()).square().sum())

    _pass(lone, compare)
    error = 0.0
    for what, square in squares.items():
        gradients = [value for (of, _), value in plain.gradients.items() if of == what]
        whole = sum(float(value.float().square().sum()) for value in gradients)
        if square:
            error = max(error, (square / whole) ** 0.5 if whole else float("inf"))
    if not error < float("inf"):
        return 0.0, f"its gradients are no numbers, or those of the plain form are zero (error {error})"
    return error, ""


def _slowdown(rehearsal: Rehearsal, name: str, form: str, lone: Lone) -> tuple[float, float]:
    """What the form takes over what the plain one takes, forward and backward."""
    plain, treated = [], []
    for _ in range(_REPETITIONS):
        plain.append(lone.seconds())
        with rehearsal.in_form(name, form):
            treated.append(lone.seconds())
    forward, backward = (
        min(ours) / min(theirs) if min(theirs) else 1.0
        for ours, theirs in zip(zip(*treated, strict=True), zip(*plain, strict=True), strict=True)
    )
    return forward, backward
