"""Gradients that never pile up: projected as they arrive, or applied as they arrive.

    optimizer = GaLore(model.named_parameters(), rank=128)
    gradients = SmallGradients(optimizer)                     # or update="backward"
    for batch in micro_batches:
        loss(batch).backward()                                # each .grad is gone when its layer is done
    gradients.clip_grad_norm_(1.0)
    optimizer.step()

A hook on each parameter, run when its gradient is complete, does one of two things.

*update="step"*: ``R += down(G)`` in fp32, and G is freed. Projections are linear, so R is what the sum of the
gradients would have given, up to rounding, and ``step`` goes on from R. This is exact for every projection
and every inner rule if nothing but R is asked of the gradient, which is so for residual ``none`` alone: sign
and SGD residuals (FRUGAL), scaled ones (Fira) and scaled gradients (APOLLO) need the whole sum. Such
parameters are refused, or keep whole gradients where ``whole="keep"`` says so; parameters without projection
always keep theirs.

*update="backward"*: the last micro-batch's hook updates the parameter, and its gradient is freed. Exact for
all settings, since each parameter's update depends on its own gradient alone; what depends on all of them,
clipping by their norm or skipping the step when one is infinite, is refused. ``step`` is called as ever: it
updates what no hook has, and counts, so that schedulers and refreshes see one step.

A basis that follows the gradient must come from one. ``refresh_from="sum"`` keeps the whole gradient of a
parameter from the first to the last micro-batch of the step in which its refresh is due, as without this
module; ``spread=True`` in its group makes that a few parameters a step, except at the first step, at which
all of them are due. ``refresh_from="first"`` takes the basis from the first micro-batch instead, so that no
gradient of a projected parameter is ever kept: another basis, as good as one micro-batch can tell, and the
same one when there is one micro-batch. Seeded bases are renewed when the first gradient arrives.

``optimizer.zero_grad()`` drops what has been accumulated; ``model.zero_grad()`` knows nothing of it. ``step``
leaves no gradients behind, as if zero_grad() followed.

Norms. ``|R|`` is the norm of the gradient's projection if the projection is orthonormal, which is not the
gradient's norm but at most as large; for ``gaussian`` and ``rademacher`` it is an unbiased estimate of the
latter, squared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from memtrain.optim.cell import Cell, State, Turn
from memtrain.optim.gradient_norm import TINY, norm_of
from memtrain.optim.grid import GridOptimizer, Pending


class SmallGradients:
    """See the module. At most one for an optimizer; parameters of groups that are added later get their hooks
    at the next step.

    Args:
        optimizer: whose gradients.
        update: where parameters are updated.
        micro_batches: backward passes to a step, for ``update="backward"``. None: the loop says it, by
            :meth:`no_update` around all but the last. A parameter that some of them do not reach is updated
            in ``step``.
        whole: what is done about projected parameters whose residual needs the sum of the gradients whole.
        refresh_from: of which gradient a basis is made.

    Raises:
        ValueError: a combination that could not be exact.
    """

    def __init__(
        self,
        optimizer: GridOptimizer,
        *,
        update: Literal["step", "backward"] = "step",
        micro_batches: int | None = 1,
        whole: Literal["refuse", "keep"] = "refuse",
        refresh_from: Literal["sum", "first"] = "sum",
    ) -> None:
        for field, value, known in (
            ("update", update, ("step", "backward")),
            ("whole", whole, ("refuse", "keep")),
            ("refresh_from", refresh_from, ("sum", "first")),
        ):
            if value not in known:
                raise ValueError(f"{field} must be {' or '.join(known)}, got {value!r}")
        if micro_batches is not None and micro_batches < 1:
            raise ValueError(f"micro_batches must be at least 1 or None, got {micro_batches}")
        if update == "step" and micro_batches != 1:
            raise ValueError(
                f"micro_batches={micro_batches!r} is for update='backward': with update='step' any number of "
                "backward passes may come before step()"
            )
        self.optimizer = optimizer
        self.update = update
        self.micro_batches = micro_batches
        self.whole = whole
        self.refresh_from = refresh_from
        self.reduced_later: Callable[[], bool] | None = None
        """Whether what arrives now is one process's share, which somebody else projects and sums."""
        self._holds_back = False
        if hasattr(optimizer, "_step_supports_amp_scaling"):
            raise ValueError("the optimizer has its SmallGradients already: remove() the other one first")
        # Makes GradScaler.step leave its findings on the optimizer, where the hook before the step sees them.
        optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
        self._hooks: dict[Tensor, RemovableHandle] = {}
        self._attach()
        self._others = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_pre_hook(lambda _: self._refuse_pending("state_dict()")),
            optimizer.register_load_state_dict_pre_hook(lambda *_: self._refuse_pending("load_state_dict()")),
        ]

    def remove(self) -> None:
        """Take all hooks away; gradients are whole again from the next backward pass on.

        Raises:
            RuntimeError: in the middle of a step.
        """
        self._refuse_pending("remove()")
        for handle in (*self._hooks.values(), *self._others):
            handle.remove()
        self._hooks.clear()
        del self.optimizer._step_supports_amp_scaling  # type: ignore[attr-defined]

    @contextmanager
    def no_update(self) -> Iterator[None]:
        """Backward passes within only accumulate, as all but the last of a step shall.

        Raises:
            RuntimeError: ``update`` or ``micro_batches`` says otherwise.
        """
        if self.update != "backward" or self.micro_batches is not None:
            raise RuntimeError(
                f"no_update() with update={self.update!r}, micro_batches={self.micro_batches}: it is for "
                "update='backward' with micro_batches=None"
            )
        before, self._holds_back = self._holds_back, True
        try:
            yield
        finally:
            self._holds_back = before

    def _attach(self) -> None:
        found = [p for group in self.optimizer.param_groups for p in group["params"]]
        new = [p for p in found if p not in self._hooks and p.requires_grad and p.numel()]
        if new:
            self.optimizer.replan()
        for parameter in new:
            self._check(parameter)
        for parameter in new:
            self._hooks[parameter] = parameter.register_post_accumulate_grad_hook(self._arrived)

    def _check(self, parameter: Tensor) -> None:
        cell = self.optimizer.cell_of(parameter)
        accumulates = self.update == "step" or self.micro_batches != 1
        if accumulates and self.whole == "refuse" and cell.projected is not None and not _compressible(cell):
            raise ValueError(
                f"{self.optimizer.name_of(parameter)}: residual {cell.projected.residual.kind!r} needs the "
                "sum of the gradients whole, of which the projection is not enough. whole='keep' keeps it; "
                "update='backward' with micro_batches=1 needs no sum; residual 'none' needs the projection "
                "alone"
            )

    def _pending(self, parameter: Tensor) -> Pending:
        if not self.optimizer.pending:
            self.optimizer.replan()
        return self.optimizer.pending.setdefault(parameter, Pending())

    @torch.no_grad()
    def _arrived(self, parameter: Tensor) -> None:
        if self.reduced_later is not None and self.reduced_later():
            return
        pending = self._pending(parameter)
        if pending.updated:
            parameter.grad = None
            raise RuntimeError(
                f"{self.optimizer.name_of(parameter)} got a gradient after its update in backward: step() "
                "was not called, or there are more backward passes to a step than micro_batches="
                f"{self.micro_batches}, or a reentrant checkpoint uses the parameter twice (use_reentrant="
                "False does not)"
            )
        pending.backwards += 1
        last = self._is_last(pending)
        gradient = parameter.grad
        if (
            gradient is not None
            and (not last or pending.low is not None)
            and self.project(parameter, gradient)
        ):
            parameter.grad = None
        if last:
            self.optimizer.update_([parameter])
            parameter.grad, pending.low, pending.updated = None, None, True

    def _is_last(self, pending: Pending) -> bool:
        if self.update == "step":
            return False
        return not self._holds_back if self.micro_batches is None else pending.backwards == self.micro_batches

    def project(self, parameter: Tensor, gradient: Tensor) -> bool:
        """Add a gradient's projection to what is pending; False where the gradient must be kept whole."""
        cell, state, turn = self.optimizer.situation(parameter)
        gradient = cell.own(gradient)
        if not _compressible(cell) or not self._has_basis(cell, gradient, state, turn):
            return False
        self.add_low(parameter, cell.down(cell.open(state, gradient.device), gradient))
        return True

    def add_low(self, parameter: Tensor, low: Tensor) -> None:
        """Add a projection, fp32 and the caller's to give away, to what is pending.

        Raises:
            RuntimeError: it comes too late for this step's clipping, or after :meth:`remove`.
        """
        if not self._hooks:
            raise RuntimeError(
                f"a projection for {self.optimizer.name_of(parameter)} after remove(): take away what makes "
                "it too (CompActFeeds.remove())"
            )
        pending = self._pending(parameter)
        if pending.summed:
            raise RuntimeError(
                f"{self.optimizer.name_of(parameter)} got a gradient between clip_grad_norm_() and step(): "
                "clip after the last backward pass"
            )
        pending.low = low if pending.low is None else pending.low.add_(low)

    def _has_basis(self, cell: Cell, gradient: Tensor, state: State, turn: Turn) -> bool:
        """Whether there is the basis of this step, made now if it may be. A gradient that is not finite makes
        none: it is kept, and ``step`` finds it so."""
        assert cell.projected is not None
        if cell.projected.projector.needs_gradient and self.refresh_from == "sum":
            return not cell.is_due(state, turn)
        return cell.refresh_if_due_(gradient.reshape(cell.shape), state, turn)

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale what has been accumulated to a norm of at most ``max_norm``; the norm as it was.

        What torch.nn.utils.clip_grad_norm_ does, which sees whole gradients alone: here projections count
        too, with their norms (see the module).

        Raises:
            RuntimeError: parameters are updated in backward, before the norm is known.
        """
        self._refuse_in_backward("clip_grad_norm_()", "the norm is known after the last of them")
        kept = self._accumulated()
        total = norm_of(kept)
        factor = (max_norm / (total + TINY)).clamp(max=1.0)
        for each, _ in kept:
            each.mul_(factor.to(each.device))
        return total

    def _accumulated(self) -> list[tuple[Tensor, Any]]:
        """Each with the processes that have the rest of it."""
        found: list[tuple[Tensor, Any]] = []
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                cell, pending = self.optimizer.cell_of(parameter), self.optimizer.pending.get(parameter)
                if pending is not None and pending.low is not None:
                    if not pending.summed:
                        pending.low, pending.summed = cell.summed(pending.low), True
                    found.append((pending.low, cell.norm_group(low=True)))
                elif parameter.grad is not None:
                    found.append((cell.own(parameter.grad), cell.norm_group(low=False)))
        return found

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """For ``torch.amp.GradScaler``, which is given this object in the optimizer's place: tensors whose
        ``grad`` is what has been accumulated."""
        self._refuse_in_backward("GradScaler", "whether to skip the step is known after the last of them")
        kept = self._accumulated()
        if any(group is not None for _, group in kept):
            raise RuntimeError(
                "GradScaler with sharded parameters: each process would decide about its part alone whether "
                "to skip the step. bf16 needs no scaler"
            )
        return [{"params": [_carrier(each) for each, _ in kept]}]

    def step(self) -> None:
        """The optimizer's; for ``GradScaler.step``."""
        self.optimizer.step()

    def _before_step(self, *_: Any) -> None:
        if hasattr(self.optimizer, "found_inf"):
            self._refuse_in_backward("GradScaler", "whether to skip the step is known after the last of them")
            raise RuntimeError(
                "GradScaler was given the optimizer, whose gradients it does not see: give its step() and "
                "unscale_() the SmallGradients in the optimizer's place"
            )
        for parameter, pending in self.optimizer.pending.items():
            taken = pending.low is not None or pending.updated
            if taken and parameter.grad is not None and self.reduced_later is None:
                raise RuntimeError(
                    f"{self.optimizer.name_of(parameter)} has a gradient that did not come through its hook, "
                    "beside one that did: with DistributedDataParallel call share_projections(), and assign "
                    "no gradients by hand"
                )
        self.drop_stale()

    def drop_stale(self) -> None:
        """Drop whole gradients whose projection is pending; where they came from has no use for them now."""
        for parameter, pending in self.optimizer.pending.items():
            if pending.low is not None:
                parameter.grad = None

    def low_of(self, parameter: Tensor) -> Tensor:
        """The pending projection itself, for those who sum it over processes."""
        low = self.optimizer.pending[parameter].low
        assert low is not None
        return low

    def _after_step(self, *_: Any) -> None:
        # Whole gradients go as projected ones did; else some would be summed over steps and others not.
        for parameter in self._hooks:
            parameter.grad = None
        self._attach()

    def _refuse_in_backward(self, what: str, why: str) -> None:
        if self.update == "backward":
            raise RuntimeError(
                f"{what} with update='backward': parameters are updated one by one as their gradients come, "
                f"and {why}. update='step' keeps what is small until then"
            )

    def _refuse_pending(self, what: str) -> None:
        if self.optimizer.pending:
            raise RuntimeError(
                f"{what} between backward and step(): what has been accumulated belongs to no state, as "
                "gradients belong to none of torch's. Call it after step(); or drop what there is by "
                "zero_grad(), and run the micro-batches of this step again after a resume, which gives the "
                "same bits"
            )


def _compressible(cell: Cell) -> bool:
    return cell.projected is not None and cell.projected.residual.kind == "none"


def _carrier(gradient: Tensor) -> Tensor:
    """A tensor with this ``grad``; the memory is shared."""
    carrier = gradient.detach()
    carrier.grad = gradient
    return carrier
