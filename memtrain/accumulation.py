"""Forward and backward of all micro-batches of an optimizer step, in the order that the plan has chosen.

A loop that calls the model itself runs one micro-batch after the other; only who is given all of them can
have them pass the blocks together (``offload/vertical.py``). So the order is planned where it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from memtrain.draws import Draws
from memtrain.offload.errors import PlanMismatchError, RandomDrawsError
from memtrain.offload.surroundings import random_states, set_random_states
from memtrain.offload.vertical import VerticalPass
from memtrain.planner.actions import MicroBatchOrder
from memtrain.planner.plan import Plan
from memtrain.planner.trace import loss_runner


def accumulate(
    model: nn.Module,
    blocks: Sequence[tuple[str, nn.Module]],
    plan: Plan,
    batches: Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor] | None,
    device: torch.device,
    draws: Draws,
    before_waiting: Callable[[], None],
) -> list[Tensor]:
    """``Session.accumulate``. ``before_waiting``: as of ``VerticalPass``."""
    given = list(batches)
    if not given:
        raise ValueError("accumulate() was given no batches: give those of one optimizer step")
    if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        raise ValueError("accumulate() runs backward: call it outside no_grad() and inference_mode()")
    passes = [partial(_pass, loss_runner(model, batch, loss_fn), len(given)) for batch in given]
    if plan.micro_batch_order is MicroBatchOrder.HORIZONTAL or len(given) == 1:
        return [each() for each in passes]
    if len(given) > plan.micro_batches:
        raise PlanMismatchError(
            f"{len(given)} micro-batches were given, the plan has memory for {plan.micro_batches} at once: "
            "give so many to accumulate(), or call prepare with more micro_batches"
        )
    kinds = draws.kinds(given)
    advances, began = draws.of(kinds), random_states(device)
    try:
        if advances is None:
            return [draws.measured(kind, each) for kind, each in zip(kinds, passes, strict=True)]
        return VerticalPass[Tensor](blocks, device, before_waiting).run(passes, advances)
    except RandomDrawsError:
        draws.forget()
        set_random_states(device, began)
        raise


def _pass(run: Callable[[], Tensor], count: int) -> Tensor:
    loss = run()
    (loss / count).backward()  # type: ignore[no-untyped-call]
    return loss.detach()
