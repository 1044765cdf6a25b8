"""What stands before and after the blocks: the model runs while they pass a known hidden state through."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from memtrain.planner.tracing import clock
from memtrain.planner.tracing.blocks import BlockCall, FirstPass
from memtrain.planner.tracing.left_as_found import gradient_hook
from memtrain.planner.tracing.live_bytes import LiveBytes


def measure_around(
    blocks: list[tuple[str, nn.Module]], trace: FirstPass, run: Callable[[], Tensor], last: Tensor
) -> dict[str, Any]:
    """What stands before and after the blocks: once for time, once for bytes."""
    counted = _around(blocks, trace, run, last, LiveBytes())  # first, so that the clock sees a warm machine
    measured = _around(blocks, trace, run, last, None)
    return {key: measured[key] if key.endswith("_seconds") else counted[key] for key in counted}


def _around(
    blocks: list[tuple[str, nn.Module]],
    trace: FirstPass,
    run: Callable[[], Tensor],
    last: Tensor,
    live: LiveBytes | None,
) -> dict[str, Any]:
    last = last.detach().clone().requires_grad_(last.is_floating_point())
    entered: list[Tensor] = []
    marks: dict[str, float] = {}
    levels: dict[str, int] = {}

    def note(name: str) -> None:
        marks[name] = clock.now(last.device)
        if live is not None:
            levels[name], levels[f"{name} peak"] = live.now_bytes, live.peak_bytes
            live.restart_peak()

    def passing(index: int) -> Callable[..., Any]:
        call = trace.calls[index]

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = BlockCall.of(blocks[index][0], args, kwargs)[1]
            if index == 0:
                entered.append(hidden)
                note("blocks")
            if index == len(blocks) - 1:
                hidden = last
                note("epilogue")
            return hidden if call.rest is None else (hidden, *call.rest)

        return forward

    late: dict[int, int] = {}
    both: dict[int, int] = {}
    with ExitStack() as stack:
        for index, (_, block) in enumerate(blocks):
            stack.enter_context(_forward_replaced(block, passing(index)))
        if live is not None:
            stack.enter_context(live)
        note("start")
        loss = run()
        note("loss")
        if loss.requires_grad:
            with _seeing_gradients(trace, late):
                torch.autograd.backward(loss)
        del loss
        note("epilogue done")
        before = entered.pop()
        gradient = torch.randn_like(before) if before.requires_grad else None
        note("prologue again")
        if gradient is not None:
            edge = torch.autograd.graph.get_gradient_edge(before)
            del before
            with _seeing_gradients(trace, both):
                torch.autograd.backward(edge, gradient)
        note("end")
    inside = {id(p): p.nbytes for _, block in blocks for p in block.parameters()}
    result: dict[str, Any] = {
        "prologue_forward_seconds": marks["blocks"] - marks["start"],
        "epilogue_forward_seconds": marks["loss"] - marks["epilogue"],
        "epilogue_backward_seconds": marks["epilogue done"] - marks["loss"],
        "prologue_backward_seconds": marks["end"] - marks["prologue again"],
    }
    if live is not None:
        base, hidden_bytes = levels["epilogue"], last.nbytes
        peak = max(levels["loss peak"], levels["epilogue done peak"])
        result["epilogue_saved_bytes"] = max(0, levels["loss"] - base) + hidden_bytes
        result["epilogue_peak_bytes"] = max(0, peak - base) + hidden_bytes
        result["prologue_peak_bytes"] = max(levels["blocks peak"], levels["end peak"]) - levels["start"]
        result["boundary_bytes"] = max(0, base - levels["start"]) + hidden_bytes
        result["persistent_backward_bytes"] = sum(
            size for key, size in late.items() if key in both or key in inside
        )
    return result


@contextmanager
def _forward_replaced(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = block.__dict__.get("forward")
    block.__dict__["forward"] = forward
    try:
        yield
    finally:
        del block.__dict__["forward"]
        if before is not None:
            block.__dict__["forward"] = before


@contextmanager
def _seeing_gradients(trace: FirstPass, seen: dict[int, int]) -> Iterator[None]:
    def hook(parameter: Tensor) -> None:
        seen[id(parameter)] = parameter.nbytes

    with ExitStack() as stack:
        for parameter in trace.parameters:
            stack.enter_context(gradient_hook(parameter, hook))
        yield
