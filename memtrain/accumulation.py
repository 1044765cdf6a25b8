"""Forward and backward of all micro-batches of an optimizer step, in the order that the plan has chosen.

A loop that calls the model itself runs one micro-batch after the other; only who is given all of them can
have them pass the blocks together (``offload/vertical.py``). So the order is planned where it is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from memtrain.offload.errors import PlanMismatchError
from memtrain.offload.surroundings import Surroundings
from memtrain.offload.vertical import VerticalPass
from memtrain.planner.actions import MicroBatchOrder
from memtrain.planner.decisions import PlannerOptions
from memtrain.planner.plan import Plan
from memtrain.planner.trace import loss_runner
from memtrain.planner.vertical import OrderError


def accumulate(
    model: nn.Module,
    blocks: Sequence[tuple[str, nn.Module]],
    plan: Plan,
    batches: Iterable[Any],
    loss_fn: Callable[[Any, Any], Tensor] | None,
    device: torch.device,
) -> list[Tensor]:
    """``Session.accumulate``."""
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
    return VerticalPass[Tensor](blocks, device).run(passes)


def _pass(run: Callable[[], Tensor], count: int) -> Tensor:
    loss = run()
    (loss / count).backward()  # type: ignore[no-untyped-call]
    return loss.detach()


class RandomWatch:
    """Whether a model's forward draws random numbers, as dropout does in training."""

    def __init__(self) -> None:
        self.drawn = False

    @contextmanager
    def watching(self, model: nn.Module, device: torch.device) -> Iterator[RandomWatch]:
        """Looks at every forward inside."""
        began: list[Surroundings] = []

        def leave(*_: Any) -> None:
            self.drawn = self.drawn or began.pop().random_numbers_drawn

        hooks = [
            model.register_forward_pre_hook(lambda *_: began.append(Surroundings(device))),
            model.register_forward_hook(leave),
        ]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def possible(self, options: PlannerOptions) -> PlannerOptions:
        """``options`` without an order that would not be exact.

        Raises:
            OrderError: it was asked for.
        """
        if not self.drawn or options.micro_batch_order == "horizontal":
            return options
        if options.micro_batch_order == "vertical":
            raise OrderError(
                "micro_batch_order is vertical, but the model's forward draws random numbers, as dropout "
                "does in training: the micro-batches would draw others than one after the other. Set dropout "
                "to 0, or micro_batch_order to horizontal"
            )
        return dataclasses.replace(options, micro_batch_order="horizontal")
