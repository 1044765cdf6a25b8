"""Updates during backward: a unit is updated as soon as the last of its gradients is there.

Fuyou's active gradient offloading (https://arxiv.org/abs/2403.06504), without a change of the mathematics:
the update begins in the last backward pass of a step, so accumulation is exact, and where gradients are to be
seen whole before any weight changes (clipping by a global norm, loss scaling, a look for NaN, a closure) it
is refused by name. What backward leaves, such as units of which a parameter got no gradient in the last pass,
``step()`` does.

How many passes a step has the plan says, and they are counted: a pass is one call of the autograd engine that
accumulates a gradient of a planned parameter. From the first update on, until ``step()`` has ended, the
weights are those of two steps; everything that would use them raises, and what fails leaves the optimizer
unusable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from memtrain.offload.errors import OffloadError, PlanMismatchError, UnsupportedGradientOperation
from memtrain.offload.gradients import GradientStore
from memtrain.offload.offloaded_grad import OffloadedGrad, Scaling
from memtrain.offload.optimizer_layout import OptimizerLayout
from memtrain.offload.optimizer_probe import hyperparameters
from memtrain.offload.optimizer_state import RecordStore
from memtrain.offload.shards import Shard
from memtrain.offload.update import Update
from memtrain.offload.update_runner import UpdateRunner

REMEDY = "plan with update_schedule 'sequential' or 'ahead'"
_READ_AHEAD_SHARDS = 32
"""How far ahead of the present unit shards are looked at; there are fewer slots."""


class MicroBatchCountError(OffloadError):
    """More or fewer backward passes between two steps than the plan has micro-batches."""


class HalfDoneStepError(OffloadError):
    """Weights, state or gradients were asked for between the first update in backward and the end of
    ``step()``."""


class ChangedHyperparameterError(OffloadError):
    """A parameter group was changed between the last backward pass and ``step()``."""


class AppliedGradient:
    """What ``param.grad`` refers to once the update has used it: shape and dtype, and no values."""

    identity = 0

    def __init__(self, name: str, refuse: Callable[[str, str], NoReturn]) -> None:
        self.name = name
        self._refuse = refuse

    def accumulate(self, incoming: Tensor, alpha: Any, fingerprint: tuple[int, ...]) -> None:
        """Raises: there is nothing to add to."""
        self._refuse(self.name, "accumulating into")

    def scale(self, scaling: Scaling) -> None:
        """Raises."""
        self._refuse(self.name, "scaling (clipping, unscaling)")

    def zero(self) -> None:
        """Raises."""
        self._refuse(self.name, "zeroing (set_to_none=False)")

    def norm(self, order: float, dtype: torch.dtype | None) -> Tensor:
        """Raises."""
        self._refuse(self.name, "the norm (clip_grad_norm_)")

    def finite(self) -> bool:
        """Raises."""
        self._refuse(self.name, "looking for NaN and inf (GradScaler)")

    def materialize(self) -> Tensor:
        """Raises."""
        self._refuse(self.name, "reading")


def is_applied(gradient: Tensor | None) -> bool:
    """Whether this gradient has been used by an update in backward, and is gone."""
    return isinstance(gradient, OffloadedGrad) and isinstance(gradient.home, AppliedGradient)


class InBackward:
    """Counts backward passes, and updates units in the last one.

    Args:
        layout, records, gradients: what is updated.
        updates: does it.
        micro_batches: backward passes of one step.

    Hooks of the gradients' own engine must have been registered before: this one's come last.
    """

    def __init__(
        self,
        *,
        layout: OptimizerLayout,
        records: RecordStore,
        gradients: GradientStore,
        updates: UpdateRunner,
        micro_batches: int,
    ) -> None:
        self._layout, self._records, self._gradients = layout, records, gradients
        self._parts = (layout, records, gradients)
        self._updates = updates
        self._micro_batches = micro_batches
        self._unit_of = layout.index.unit_of
        self._members: dict[str, list[str]] = {unit: [] for unit in layout.index.shards}
        for name, unit in self._unit_of.items():
            self._members[unit].append(name)
        self._readable = {
            unit: [
                shard
                for shard in shards
                if records.on_tier(shard) and not any(p.name in gradients.homes for p in shard.pieces)
            ]
            for unit, shards in layout.index.shards.items()
        }
        """Shards that may be read before their gradients are there: those are in memory when they come."""
        self._waited_for = {self._unit_of[name] for name in gradients.homes}
        """Units of which something comes from a tier when its gradient has been written, and not before."""
        self._order = list(reversed(self._members))
        """Units, in the order in which their gradients were complete in the step before."""
        self._handles: dict[str, OffloadedGrad] = {}
        self._passes = 0
        self._task: int | None = None
        """The pass that is under way, by the autograd engine's number; still there after one that failed."""
        self._missing: dict[str, set[str]] = {}
        """In the last pass, by unit the parameters whose gradients have not come."""
        self._update: Update | None = None
        self._done: list[str] = []
        """Units that have been updated."""
        self._asked: list[dict[str, Any]] = []
        """Hyper-parameters of the groups, as the update found them."""
        self._hooks: list[Any] = [
            parameter.register_post_accumulate_grad_hook(self._hook(name))
            for name, parameter in layout.index.parameters.items()
        ]

    def close(self) -> None:
        """Remove the hooks. Gradients that are gone become None."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for parameter in self._layout.index.parameters.values():
            if is_applied(parameter.grad):
                parameter.grad = None

    # backward ---------------------------------------------------------------------------------

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def arrived(parameter: Tensor) -> None:
            self._arrived(name)

        return arrived

    def _arrived(self, name: str) -> None:
        task: int = torch._C._current_graph_task_id()
        if task != self._task:
            self._begin_pass(task)
        if self._passes < self._micro_batches:
            return
        unit = self._unit_of[name]
        missing = self._missing[unit]
        if name in missing:
            missing.discard(name)
            if not missing:
                self._complete(unit)
                return
        if self._update is not None:
            self._updates.read_ahead(self._update, self._expected())

    def _begin_pass(self, task: int) -> None:
        self._updates.check_alive()
        if self._update is not None:
            self._too_many()
        if self._passes + 1 == self._micro_batches:
            self._records.check_weights(self._unit_of)  # nothing has been updated yet
        self._task = task
        self._passes += 1
        if self._passes > self._micro_batches:
            self._task = None
            raise MicroBatchCountError(self._counted())
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: self._end_pass(task))
        if self._passes == self._micro_batches:
            self._missing = {unit: set(names) for unit, names in self._members.items()}

    def _end_pass(self, task: int) -> None:
        if self._task == task:
            self._task = None

    def _complete(self, unit: str) -> None:
        """All gradients of the unit are there, and nothing in this pass needs its weights any more."""
        with self._failing():
            if self._update is None:
                self._update = Update(*self._parts, names=())
                self._asked = self._hyperparameters()
            names = self._members[unit]
            self._update.take(names)
            self._done.append(unit)
            self._updates.advance(self._update, unit, self._expected())
            self._update.forget(names)
            for name in names:
                self._layout.index.parameters[name].grad = self._handle(name)

    def _expected(self) -> list[Shard]:
        """What will be read next, the soonest first; nothing behind a unit that will want slots before it."""
        shards: list[Shard] = []
        for unit in self._order:
            if unit in self._done:
                continue
            shards += self._readable[unit]
            if unit in self._waited_for or len(shards) >= _READ_AHEAD_SHARDS:
                break
        return shards

    def _handle(self, name: str) -> OffloadedGrad:
        if name not in self._handles:
            parameter = self._layout.index.parameters[name]
            self._handles[name] = OffloadedGrad(parameter, AppliedGradient(name, self._refuse_use))
        return self._handles[name]

    # step -------------------------------------------------------------------------------------

    @property
    def begun(self) -> bool:
        """Whether weights of the next step are there, and not all of them."""
        return self._update is not None

    def finish(self, refuse_unplanned: Callable[[], None]) -> None:
        """The rest of the update, when backward is over.

        Raises:
            MicroBatchCountError: fewer passes than planned. Nothing is lost, if no update has begun.
            HalfDoneStepError: the last pass ended with an error, or gradients were changed since.
            ChangedHyperparameterError: a group is not what it was during backward.
        """
        with self._failing():
            if self._task is not None:
                raise HalfDoneStepError(
                    f"backward pass {self._passes} of {self._micro_batches} before step() did not end: "
                    f"{self._after_an_error()}"
                )
            if self._passes != self._micro_batches:
                raise MicroBatchCountError(self._counted())
            refuse_unplanned()
            if self._update is None:
                self._update = Update(*self._parts)
                self._updates.begin(self._update, ahead=False)
            else:
                self._refuse_changes()
                self._do_rest(self._update)
        self._order = [*self._done, *(unit for unit in self._order if unit not in set(self._done))]
        self._start_anew()

    def _do_rest(self, update: Update) -> None:
        rest = [unit for unit in self._members if unit not in set(self._done)]
        for unit in rest:
            update.take(self._members[unit])
        for position, unit in enumerate(rest):
            following = rest[position + 1 : position + 2]
            self._updates.advance(update, unit, [s for u in following for s in self._ready_shards(update, u)])
        self._updates.end()

    def _ready_shards(self, update: Update, unit: str) -> list[Shard]:
        shards = self._layout.index.shards[unit]
        return [s for s in shards if any(piece.name in update.gradients for piece in s.pieces)]

    def _start_anew(self) -> None:
        self._passes, self._task, self._update = 0, None, None
        self._done, self._asked, self._missing = [], [], {}

    def discard(self) -> None:
        """Gradients are cleared: a step that has not begun to update begins anew.

        Raises:
            HalfDoneStepError: it has.
        """
        if self._update is not None:
            raise HalfDoneStepError(
                f"zero_grad() between backward and step(): {self._half_done()}; the update cannot be "
                f"dropped. Call step() first, or, where a loop may drop gradients, {REMEDY}"
            )
        self._start_anew()

    def refuse_half_done(self, what: str, *, backward_may: bool = False) -> None:
        """Raise HalfDoneStepError if weights of two steps are there.

        Args:
            backward_may: not to a backward pass, which computes parts of its forward again with weights that
                wait for their gradients.
        """
        if self._update is None:
            return
        in_pass = torch._C._current_graph_task_id() != -1
        if in_pass and backward_may:
            return
        self._updates.check_alive()
        if in_pass:
            raise HalfDoneStepError(f"{what} in the midst of backward: {self._half_done()}. Wait for step()")
        if self._task is not None:
            error = HalfDoneStepError(
                f"{what} after backward pass {self._passes} of {self._micro_batches} did not end: "
                f"{self._after_an_error()}"
            )
            self._updates.fail(error)
            raise error
        raise HalfDoneStepError(f"{what} between backward and step(): {self._half_done()}. Call step() first")

    # what is refused --------------------------------------------------------------------------

    def _refuse_changes(self) -> None:
        for number, (before, now) in enumerate(zip(self._asked, self._hyperparameters(), strict=True)):
            for key in sorted(before.keys() | now.keys()):
                old, new = before.get(key), now.get(key)
                if not _same(old, new):
                    raise ChangedHyperparameterError(
                        f"param_groups[{number}][{key!r}] was {old!r} during backward, when units were "
                        f"updated with it, and is {new!r} at step(): change groups after optimizer.step(), "
                        f"as a scheduler does (call scheduler.step() after optimizer.step()), or {REMEDY}"
                    )
        for unit in self._done:
            for name in self._members[unit]:
                if self._layout.index.parameters[name].grad is not self._handles[name]:
                    raise HalfDoneStepError(
                        f"the gradient of {name} was replaced or cleared between backward and step(), but "
                        f"{name} has been updated with it already: leave it as it is until step(), or "
                        f"{REMEDY}"
                    )

    def _refuse_use(self, name: str, what: str) -> NoReturn:
        if what.startswith("accumulating") and self._update is not None:
            self._too_many()
        if what.startswith("accumulating"):
            raise UnsupportedGradientOperation(
                f"a gradient of {name} arrives while the one that step() has used is still in place, without "
                f"its values (update_schedule in_backward): call zero_grad() after step(), or {REMEDY} to "
                f"accumulate over steps"
            )
        raise UnsupportedGradientOperation(
            f"{what} of the gradient of {name}: {name} was updated with it during backward (update_schedule "
            f"in_backward), and its values are gone; {REMEDY}. Clear it after step(), with "
            f"zero_grad(set_to_none=True)"
        )

    def _too_many(self) -> NoReturn:
        self._updates.check_alive()
        self._passes += 1
        error: OffloadError
        if self._task is not None:
            error = HalfDoneStepError(
                f"a backward pass begins, but pass {self._passes - 1} of {self._micro_batches} before it did "
                f"not end: {self._after_an_error()}"
            )
        else:
            error = MicroBatchCountError(self._counted())
        self._updates.fail(error)
        raise error

    def _counted(self) -> str:
        begun = " Weights have been updated already: restore the last checkpoint." if self.begun else ""
        return (
            f"{self._passes} backward passes since the last step() or zero_grad(), the plan has "
            f"{self._micro_batches} micro-batches, and updates in the last of them (update_schedule "
            f"in_backward).{begun} Call backward once per micro-batch (a second pass over a retained graph, "
            f"and one inside of another, count too), pass that number as micro_batches to prepare(), or "
            f"{REMEDY}"
        )

    def _half_done(self) -> str:
        return (
            f"{len(self._done)} of {len(self._members)} units, {self._done[-1]} the last, were updated "
            f"during backward (update_schedule in_backward), so the weights are those of two steps"
        )

    def _after_an_error(self) -> str:
        if not self.begun:
            return "call zero_grad() and run the step's passes again"
        return f"{self._half_done()}: restore the last checkpoint"

    # odds and ends ----------------------------------------------------------------------------

    def _hyperparameters(self) -> list[dict[str, Any]]:
        return [hyperparameters(group) for group in self._layout.param_groups]

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """What goes wrong after the first update leaves weights of two steps."""
        try:
            yield
        except BaseException as error:
            if self._update is not None:
                self._updates.fail(error)
            raise


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, Tensor) or isinstance(new, Tensor):
        return isinstance(old, Tensor) and isinstance(new, Tensor) and torch.equal(old, new)
    return old is new or bool(old == new)


def refuse_combination(nonfinite: str) -> None:
    """Raises PlanMismatchError where gradients are to be seen whole before the update."""
    if nonfinite != "ignore":
        raise PlanMismatchError(
            f"nonfinite={nonfinite!r} looks at all gradients before any weight changes, the plan updates "
            f"during backward (update_schedule in_backward): choose nonfinite='ignore', or {REMEDY}"
        )


def guard_modules(modules: Iterable[nn.Module], refuse_half_done: Callable[..., None]) -> Sequence[Any]:
    """Hooks that let no forward, state dict or loading of ``modules`` see weights of two steps; the caller
    removes them."""
    hooks: list[Any] = []
    for module in modules:
        hooks += [
            module.register_forward_pre_hook(lambda *_: refuse_half_done("forward", backward_may=True)),
            module.register_state_dict_pre_hook(  # type: ignore[no-untyped-call]
                lambda *_: refuse_half_done("state_dict()")
            ),
            module.register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
                lambda *_: refuse_half_done("load_state_dict()")
            ),
        ]
    return hooks
