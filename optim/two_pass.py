"""Clipping by the norm of all gradients without keeping them: two backward passes, one for the norm.

    clipping = TwoPassClipping(optimizer, max_norm=1.0)

    def closure():
        loss = loss_of(model(batch))
        loss.backward()
        return loss

    loss = clipping.step(closure)              # in the place of optimizer.step(closure)

The norm is known when the last gradient is there, and what needs a gradient whole (FRUGAL, Fira, APOLLO,
parameters without projection) cannot wait for it without keeping all of them. So the closure runs twice, as
in LOMO (arXiv 2306.09782): the first time each gradient leaves its norm and is freed, the second time it is
scaled, applied and freed. No more than one lives at a time. **It costs a forward and a backward pass more.**
Where residuals are ``none``, ``SmallGradients.clip_grad_norm_`` needs no second pass; it clips by the norm of
the projections, this by that of the gradients.

Exact: bit-equal to keeping all gradients and calling torch.nn.utils.clip_grad_norm_ on the optimizer's
parameters, for fp32 gradients on one device; for bf16 ones torch rounds each norm to bf16, and here norms are
fp32. Sharded by FSDP2 it is equal up to the order in which squares are summed. A gradient that is not finite
does what it does there.

Random numbers of torch, on the CPU and on the parameters' devices, begin the second time as they did the
first. The batch must be the same one, too, and what else a forward pass changes, such as the running
statistics of BatchNorm, is changed twice. A second pass whose gradients have other norms is an error.

Refused: several backward passes in a closure. The norm of a sum does not follow from the norms of its
summands: gradients that are accumulated must be kept (``SmallGradients(whole="keep")`` and its
``clip_grad_norm_``), or the losses summed before a single backward pass. GradScaler knows nothing of this:
bf16 needs no scaler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from memtrain.optim.gradient_norm import TINY, joined_norm, own_norm
from memtrain.optim.grid import GridOptimizer, Pending

_SAME = 1e-3
"""Of the norm of all gradients: by how much that of one may differ between the passes. It leaves room for
sums by atomic additions, whose order is not fixed on a GPU; on the CPU the two are equal."""


class TwoPassClipping:
    """See the module.

    Args:
        optimizer: any point of the grid, without ``SmallGradients``.
        max_norm: of all gradients together.

    Raises:
        TypeError: another optimizer, or one that memtrain.prepare has wrapped.
        ValueError: ``max_norm`` is not positive.
    """

    norm: Tensor
    """Of all gradients, before clipping, at the last step; fp32."""

    def __init__(self, optimizer: GridOptimizer, max_norm: float) -> None:
        if not isinstance(optimizer, GridOptimizer):
            raise TypeError(
                f"a {type(optimizer).__name__}: memtrain.optim's own optimizers can be stepped parameter by "
                "parameter. With memtrain.prepare, whose optimizer moves gradients itself, clip by its own "
                "clip_grad_norm_"
            )
        if not max_norm > 0:
            raise ValueError(f"max_norm must be > 0, got {max_norm}: 1.0 is usual")
        self.optimizer = optimizer
        self.max_norm = max_norm
        self._norms: dict[Tensor, Tensor] = {}
        self._factor = 1.0

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """Run the closure twice, and update every parameter that got a gradient, once.

        Args:
            closure: computes the loss, calls its ``backward()`` once and returns it.

        Returns:
            What the closure returned the second time.

        Raises:
            RuntimeError: the closure runs several backward passes, does not do the same twice, or gradients
                are there that did not come from it. In the first pass, and at the first gradient of the
                second one, nothing has been updated.
            ValueError: a gradient is sparse.
        """
        if hasattr(self.optimizer, "_step_supports_amp_scaling"):
            raise RuntimeError(
                "the optimizer has SmallGradients, which take its gradients: remove() them, or clip by their "
                "clip_grad_norm_()"
            )
        self.optimizer.replan()
        self._refuse_gradients("before step(closure): call zero_grad() first")
        self._norms.clear()
        with self._hooked(self._measure), self._random_numbers_kept(), torch.enable_grad():
            closure()
        self._refuse_gradients(
            "that did not come through its hook: DistributedDataParallel averages gradients after the hooks "
            "have run. Use fully_shard, whose gradients arrive averaged"
        )
        self.norm = self._total()
        self._factor = float((self.max_norm / (self.norm + TINY)).clamp(max=1.0))
        with self._hooked(self._apply), torch.enable_grad():
            loss = closure()
        if missing := self._norms.keys() - self.optimizer.pending.keys():
            raise self._differs(next(iter(missing)), "none")
        self.optimizer.step()
        return loss

    def _parameters(self) -> list[Tensor]:
        groups = self.optimizer.param_groups
        return [p for group in groups for p in group["params"] if p.requires_grad]

    @contextmanager
    def _hooked(self, hook: Callable[[Tensor], None]) -> Iterator[None]:
        parameters: list[Any] = self._parameters()
        handles = [parameter.register_post_accumulate_grad_hook(hook) for parameter in parameters]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _random_numbers_kept(self) -> Iterator[None]:
        devices = {p.device for p in self._parameters()} - {torch.device("cpu")}
        kind = next((device.type for device in devices), "cuda")
        indices = sorted({device.index or 0 for device in devices})
        with torch.random.fork_rng(devices=indices, device_type=kind):
            yield

    @torch.no_grad()
    def _measure(self, parameter: Tensor) -> None:
        if parameter in self._norms:
            parameter.grad = None
            raise RuntimeError(
                f"{self.optimizer.name_of(parameter)} got a second gradient in one closure, and the norm of "
                "a sum needs the sum: call backward() once, on the sum of the losses; or keep gradients, by "
                "SmallGradients(optimizer, whole='keep'), and call its clip_grad_norm_(). (A reentrant "
                "checkpoint that uses a parameter twice does this too; use_reentrant=False does not)"
            )
        self._norms[parameter] = self._norm_of(parameter)
        parameter.grad = None

    @torch.no_grad()
    def _apply(self, parameter: Tensor) -> None:
        pending = self.optimizer.pending.setdefault(parameter, Pending())
        before, now = self._norms.get(parameter), self._norm_of(parameter)
        # Not finite, as one of them may be: NaN is not larger.
        if before is None or pending.updated or bool((now - before).abs() > _SAME * self.norm.to(now.device)):
            parameter.grad = None
            raise self._differs(parameter, f"norm {float(now):g}")
        assert parameter.grad is not None
        parameter.grad.mul_(self._factor)
        self.optimizer.update_([parameter])
        parameter.grad, pending.updated = None, True

    def _norm_of(self, parameter: Tensor) -> Tensor:
        """Of what this process has of the gradient."""
        gradient = parameter.grad
        if gradient is None:
            raise RuntimeError(
                f"another hook has taken the gradient of {self.optimizer.name_of(parameter)}: remove what "
                "updates in backward, such as the SmallGradients of another optimizer"
            )
        self.optimizer.refuse_sparse([parameter])
        return own_norm(self.optimizer.cell_of(parameter).own(gradient))

    def _total(self) -> Tensor:
        """In the order of the groups, as torch sums."""
        own = [(p, self._norms[p]) for p in self._parameters() if p in self._norms]
        return joined_norm([(norm, self.optimizer.cell_of(p).norm_group(low=False)) for p, norm in own])

    def _refuse_gradients(self, where: str) -> None:
        pending = self.optimizer.pending
        for parameter in self._parameters():
            if parameter.grad is not None or parameter in pending:
                raise RuntimeError(f"{self.optimizer.name_of(parameter)} has a gradient {where}")

    def _differs(self, parameter: Tensor, now: str) -> RuntimeError:
        before = self._norms.get(parameter)
        first = "none" if before is None else f"norm {float(before):g}"
        updated = sum(pending.updated for pending in self.optimizer.pending.values())
        return RuntimeError(
            f"{self.optimizer.name_of(parameter)}: gradient of {now} in the second backward pass, of {first} "
            f"in the first, with {updated} parameters updated: the closure must do the same twice. Draw the "
            "batch outside of it, and random numbers from torch's default generators"
        )
