"""The user's own optimizer, run over shards whose state lives on a tier.

A step substitutes flat pieces for the parameters, hands the optimizer their gradients and state as views of a
slot, and calls its own ``step``: no optimizer is re-implemented here. With master weights, the pieces are
fp32 masters out of the record, stepped with fp32 gradients, and the model's weights are their rounding:

    masters = [p.detach().float() for p in model.parameters()]; optimizer = Cls(masters)
    m.grad = p.grad.float(); clip_grad_norm_(masters, max_norm); optimizer.step(); p.copy_(m)

is what ``OffloadedOptimizer(Cls(model.parameters()), config=OptimizerConfig(master_weights=True))`` equals
bit for bit.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor

from memtrain.offload.clipping import clip_float_norm_, forget_clips, note_finite
from memtrain.offload.errors import PlanMismatchError
from memtrain.offload.gradient_checks import NonFiniteGradientError, refuse_nonfinite, refuse_unplanned
from memtrain.offload.gradient_home import Engine
from memtrain.offload.gradients import GradientStore
from memtrain.offload.in_backward import REMEDY, InBackward, refuse_combination
from memtrain.offload.lower_halves import LowerHalves, WeightsWrittenError
from memtrain.offload.optimizer_config import OptimizerConfig
from memtrain.offload.optimizer_layout import OptimizerLayout
from memtrain.offload.optimizer_state import OffloadedState, RecordStore, StateAccess
from memtrain.offload.overlaid_slab import OverlaidSlab
from memtrain.offload.parameters import ParameterStreamer
from memtrain.offload.row_sparse import RowSparseOptimizer
from memtrain.offload.shards import MASTER_KEY, Unit
from memtrain.offload.slab import HighWater
from memtrain.offload.state_dicts import from_state_dict, to_state_dict
from memtrain.offload.update import Update
from memtrain.offload.update_runner import InMemory, UpdateRunner
from memtrain.optim.kernels import fused_adamw
from memtrain.planner.actions import UpdateSchedule
from memtrain.planner.plan import Plan

__all__ = ["NonFiniteGradientError", "OffloadedOptimizer", "OptimizerConfig"]


class OffloadedOptimizer(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` around another one, whose state obeys a plan.

    It shares the wrapped optimizer's parameter groups, so that schedulers of either work; step the wrapped
    one no more.

    Args:
        optimizer: the user's, of any class whose state is tensors and numbers. State it already has is taken
        over.
        engine: the session's stores.
        plan: staging, schedule, and the tiers of each unit's gradients and state.
        units: parameters in forward order; every trainable parameter of the optimizer must be in one.
        config: master weights and so on.
        weights: what streams weights of the units, where some are on tiers; installed before, removed after.
        tables: a lazy optimizer of tables that are in no unit; ``step`` and ``zero_grad`` are theirs too.
        overlaid: where rings lie that the plan has share memory with activations; closed after.

    Raises:
        PlanMismatchError: units and optimizer do not fit each other or the plan, or the slots are too small.
        UnsupportedOptimizerError: the optimizer cannot be streamed; the message says why.
        TierFullError: no room for state or gradients.
        OffloadError: the device refuses the staging memory.

        Nothing stays allocated then, no hook on a parameter, and ``optimizer`` has its own state still.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        engine: Engine,
        plan: Plan,
        units: Sequence[Unit],
        config: OptimizerConfig | None = None,
        weights: ParameterStreamer | None = None,
        tables: RowSparseOptimizer | None = None,
        overlaid: OverlaidSlab | None = None,
    ) -> None:
        self._complete = False
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer = optimizer
        self._weights, self._tables = weights, tables
        if tables is not None:
            tables.lead("session.optimizer.step()")
            self._step_supports_amp_scaling = True  # a loss scaler then says that it is there, and is refused
        self.config = config or OptimizerConfig()
        self.param_groups = optimizer.param_groups
        self.defaults = optimizer.defaults
        self._adopt_hooks(optimizer)
        self._schedule = plan.update_schedule
        self._in_backward: InBackward | None = None
        if self._schedule is UpdateSchedule.IN_BACKWARD:
            refuse_combination(self.config.nonfinite)
        self.state_count = 0
        """How often the state has changed: by steps and by loading."""
        self.last_step_skipped = False
        """Whether the latest ``step`` found non-finite gradients and did nothing."""
        self.layout = OptimizerLayout(
            optimizer,
            units,
            plan.staging.update_shard_elements,
            master_weights=self.config.master_weights,
            split_masters=self.config.split_masters,
            elementwise=self.config.elementwise,
        )
        self.layout.check(plan)
        self.index = self.layout.index
        for name, parameter in self.index.parameters.items():
            if parameter.device != engine.device.place:
                raise PlanMismatchError(
                    f"{name} is on {parameter.device}, the session computes on {engine.device.place}: move "
                    f"the model there with model.to(), or plan for a machine whose device is the model's"
                )
        decisions = {unit: plan.state(unit) for unit, shards in self.index.shards.items() if shards}
        staging = plan.staging
        with ExitStack() as made:
            self._records = RecordStore(
                engine=engine,
                index=self.index,
                layouts=self.layout.shards,
                specs=self.layout.specs,
                tiers={unit: decision.optimizer_tier for unit, decision in decisions.items()},
                halves=LowerHalves(
                    self.layout.halves, self.index, hold=self._hold, always_there=self._is_in_memory
                ),
            )
            made.callback(self._records.close)
            self.gradients = GradientStore(
                engine=engine,
                index=self.index,
                tiers={unit: decision.gradient_tier for unit, decision in decisions.items()},
                slots=staging.gradient_slots,
                slot_bytes=staging.gradient_slot_bytes,
                norm_dtype=torch.float32 if self.config.master_weights else None,
                before_overwrite=self.ensure,
                overlaid=overlaid,
            )
            made.callback(self.gradients.close)
            self._updates = UpdateRunner(
                engine.device,
                self.layout,
                self._records,
                self.gradients,
                weights or InMemory(),
                slots=staging.update_slots,
                slot_bytes=staging.update_slot_bytes,
                overlaid=overlaid,
            )
            made.callback(self._updates.close)
            if self._schedule is UpdateSchedule.IN_BACKWARD:
                self._in_backward = InBackward(
                    layout=self.layout,
                    records=self._records,
                    gradients=self.gradients,
                    updates=self._updates,
                    micro_batches=plan.micro_batches,
                )
                made.callback(self._in_backward.close)
            self._access = StateAccess(self._records, self.index, self.layout.shards, self._updates.borrow)
            if optimizer.state:
                self._take_over(optimizer)
            made.callback(self.await_snapshot)
            self._made = made.pop_all()
        self._complete = True

    # -- the optimizer's public face
    # ---------------------------------------------------------------------------

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        """State by parameter, as handles that are read when used. To change it, ``load_state_dict``."""
        if not self._complete:
            return {}
        self.flush()
        return {
            self.index.parameters[name]: self._state_handles(name)
            for name in self.index.parameters
            if name in self._records.initialised
        }

    @state.setter
    def state(self, value: Mapping[Any, Any]) -> None:
        if value:
            raise TypeError(
                "optimizer state on a tier cannot be assigned: use load_state_dict() or load_state()"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once wrapped: the plan has no place for parameters that it does not know."""
        if self._complete:
            raise PlanMismatchError(
                "add_param_group after the plan was made: its parameters have no tier. Add the group to the "
                "optimizer "
                "first, then plan again"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update. Under the AHEAD schedule it is only begun, and done by ``ensure`` or ``flush``; under
        IN_BACKWARD this is the rest of it (``in_backward``).

        Tables are stepped here whatever the schedule.

        Raises:
            NonFiniteGradientError: if so configured.
            PlanMismatchError: a parameter that was frozen when the plan was made has a gradient now; or a
                loss scaler steps tables.
            WeightsWrittenError: nothing has been done; after ``weights_written`` the step may be made, with
                gradients clipped as they are.
            OffloadError: a transfer failed. The update is then incomplete: restore the last checkpoint.
        """
        self._refuse_scaler()
        if self._in_backward is not None:
            return self._finish_step(self._in_backward, closure)
        self.flush()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # its schedulers ask
        self._refuse_unplanned()
        clips_hold = False
        try:
            self.last_step_skipped = self.config.nonfinite != "ignore" and refuse_nonfinite(
                self.index.parameters,
                self.config.nonfinite,
                [] if self._tables is None else self._tables.nonfinite(),
            )
            if not self.last_step_skipped:
                clips_hold = True
                self._updates.make_room()
                clips_hold = False
                update = Update(self.layout, self._records, self.gradients)
                if self._tables is not None:
                    self._tables.advance()  # not before: an update that is refused has changed nothing
                self.state_count += 1
                self._updates.begin(update, ahead=self._schedule is UpdateSchedule.AHEAD)
        except WeightsWrittenError:
            clips_hold = True
            raise
        finally:
            if not clips_hold:  # as they do where nothing was done, and the step may be made after all
                forget_clips(self._all_parameters())
        return loss

    def _finish_step(self, in_backward: InBackward, closure: Callable[[], Any] | None) -> None:
        if closure is not None:
            raise PlanMismatchError(
                "step(closure) computes gradients inside of the step, the plan updates during backward "
                f"(update_schedule in_backward): call step() without one after backward, or {REMEDY}"
            )
        self._updates.check_alive()
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # its schedulers ask
        try:
            in_backward.finish(self._refuse_unplanned)
            self.state_count += 1
            if self._tables is not None:
                self._tables.advance()
        finally:
            forget_clips(self._all_parameters())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As PyTorch's; ``set_to_none=False`` first finishes an update that waits for gradients in memory.
        Under IN_BACKWARD it begins the count of micro-batches anew."""
        if self._in_backward is not None:
            self._in_backward.discard()
        if not set_to_none and self._updates.holds_tensors:
            self.flush()
        forget_clips(self._all_parameters())
        super().zero_grad(set_to_none)
        if self._tables is not None:
            self._tables.zero_grad(set_to_none)

    @torch.no_grad()
    def clip_grad_norm_(
        self, max_norm: float, error_if_nonfinite: bool = False, parameters: Iterable[Tensor] | None = None
    ) -> Tensor:
        """``torch.nn.utils.clip_grad_norm_``, bit for bit; with master weights, of the fp32 gradients.

        With master weights the factor is applied to the fp32 gradient when it is used; ``param.grad`` keeps
        showing the gradient before clipping.

        Args:
            parameters: order in which norms are summed; default: that of the parameter groups.

        Raises:
            PlanMismatchError: the plan updates during backward; or there are tables, whose gradients are
                sparse, and ``parameters`` does not say that they are left out.
        """
        if self._tables is not None and parameters is None:
            raise PlanMismatchError(
                "clip_grad_norm_() would leave out the tables, for torch has no norm of sparse gradients: "
                "name the others, clip_grad_norm_(max_norm, parameters=[...]), or leave clipping out"
            )
        if self._in_backward is not None:
            raise PlanMismatchError(
                "clip_grad_norm_() needs the norm of all gradients before any weight changes, the plan "
                f"updates during backward (update_schedule in_backward): leave clipping out, or {REMEDY}"
            )
        self.flush()
        chosen = self._all_parameters() if parameters is None else list(parameters)
        grads = [p.grad for p in chosen if p.grad is not None]
        if self.config.master_weights:
            total = clip_float_norm_(grads, max_norm, error_if_nonfinite)
        else:
            total = torch.nn.utils.clip_grad_norm_(chosen, max_norm, error_if_nonfinite=error_if_nonfinite)
        if self.config.nonfinite != "ignore":  # one pass over the gradients tells both
            note_finite(grads, total, max_norm)
        return total

    def high_water(self) -> tuple[HighWater, ...]:
        """What was used of the rings for gradients and updates so far."""
        return (*self.gradients.high_water(), *self._updates.high_water())

    def refused_one_pass(self) -> dict[str, int]:
        """Why parameters are stepped by the optimizer's own code and not in one pass with clipping, widening
        and rounding (``optim.kernels.fused_adamw``), and how many; empty where nothing keeps any from it."""
        found: Counter[str] = Counter()
        for group, members in Counter(self.layout.group_of.values()).items():
            reason = fused_adamw.refusal(self.layout.optimizer, self.param_groups[group])
            if reason is not None:
                found[reason] += members
        return dict(found)

    # -- updates that run ahead
    # --------------------------------------------------------------------------------

    @property
    def update_waits(self) -> bool:
        """Whether an update was begun that is not done yet."""
        return self._updates.waits

    @torch.no_grad()
    def ensure(self, unit: str) -> None:
        """Finish the pending update of ``unit``, if there is one, on the calling thread. Any order will
        do."""
        self.refuse_half_done("using weights", backward_may=True)
        self._updates.ensure(unit)

    def refuse_half_done(self, what: str, *, backward_may: bool = False) -> None:
        """Raise HalfDoneStepError where the update has begun in backward, and ``step()`` has not ended it;
        ``backward_may``: but not to backward itself."""
        if self._in_backward is not None:
            self._in_backward.refuse_half_done(what, backward_may=backward_may)

    @torch.no_grad()
    def flush(self) -> None:
        """Finish the pending update, and wait until all state is on its tier."""
        self.refuse_half_done("using weights or state")
        self._updates.flush()

    @torch.no_grad()
    def weights_written(self, parameters: Iterable[Tensor] | None = None) -> list[str]:
        """Say that weights which somebody has written since the last update are what counts.

        To be called, after ``flush`` and the writing, where fp32 masters are kept by their lower halves
        (``OptimizerConfig.split_masters``), before the next step or checkpoint would raise
        WeightsWrittenError. The master of each parameter of which anything was written is then its weight,
        all of it: which elements were written cannot be told, so the others lose the bits below bf16's too. A
        loop that writes weights at every step would lose every small update: ``split_masters=False`` is for
        it. Masters that are whole need no call, and follow where their weights were written alone.

        Args:
            parameters: those to look at; default: all.

        Returns:
            Names of the parameters whose masters have become their weights.

        Raises:
            PlanMismatchError: a parameter that this optimizer does not update.
            OffloadError: an update is half done, or a transfer failed. State is then undefined until loaded
                again.
        """
        self.flush()
        self.await_snapshot()
        chosen = self.index.parameters if parameters is None else [self._name_of(p) for p in parameters]
        try:
            found = self._access.restart_masters(chosen)
        finally:
            self.state_count += 1
        return found

    def _name_of(self, parameter: Tensor) -> str:
        for name, known in self.index.parameters.items():
            if known is parameter:
                return name
        raise PlanMismatchError(
            f"a tensor of shape {tuple(parameter.shape)} is none of the {len(self.index.parameters)} "
            f"parameters that this optimizer updates: pass parameters of the model itself, as "
            f"model.get_parameter() gives"
        )

    def _settle(self) -> None:
        self.refuse_half_done("reading state")
        self._updates.settle()

    # -- checkpoints
    # -------------------------------------------------------------------------------------------

    @property
    def records(self) -> RecordStore:
        """Where the state lies."""
        return self._records

    def iter_state(self) -> Iterator[tuple[str, str, Tensor]]:
        """``(parameter, key, tensor)``, one whole tensor in memory at a time. Empty before the first step."""
        self._settle()
        yield from self._access

    def stored_parts(self) -> Iterator[tuple[str, str, Tensor]]:
        """``iter_state`` as records hold it: of some masters the lower half alone (``lower_halves``); each
        tensor in parts of at most a shard, of which each is there until the next is asked for. For whoever
        puts weights beside them: ``check_masters`` says whether these are still what lower halves belong to.
        """
        self._settle()
        yield from self._access.stored_parts()

    def check_masters(self) -> None:
        """Raise WeightsWrittenError where weights and lower halves of masters do not belong together."""
        self._records.check_weights(self.index.parameters, thorough=True)

    def scalar_state(self) -> dict[str, dict[str, Any]]:
        """``step`` and the like by parameter: what ``iter_state`` leaves out."""
        self._settle()
        return {name: dict(values) for name, values in self._records.scalars.items()}

    def read_state(self, name: str, key: str) -> Tensor:
        """One state tensor of parameter ``name``."""
        self._settle()
        return self._access.read(name, key)

    @torch.no_grad()
    def load_state(
        self,
        tensors: Mapping[tuple[str, str], Any] | Iterable[tuple[str, str, Any]],
        scalars: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Replace all state, one tensor at a time.

        Args:
            tensors: by ``(parameter, key)``, or triples as ``iter_state`` yields; a value may be a function
            that
                reads the tensor when it is called.
            scalars: as ``scalar_state`` gives.

        Raises:
            PlanMismatchError: names, shapes or keys differ; the state is then undefined until loaded again.
        """
        self.flush()
        if isinstance(tensors, Mapping):
            tensors = ((name, key, value) for (name, key), value in tensors.items())
        self._load(tensors, scalars)

    def await_snapshot(self) -> None:
        """Return when no snapshot needs weights or state as they are: before either is replaced."""
        if self._records.keeper is not None:
            self._records.keeper.settle()

    def state_dict(self) -> dict[str, Any]:
        """In PyTorch's form. Offloaded tensors are handles: shape and dtype now, bytes when used, until the
        next step. ``copy.deepcopy`` of it is a snapshot."""
        self.flush()
        known = self._records.initialised
        return to_state_dict(
            self.param_groups,
            self._names(),
            lambda name: self._state_handles(name) if name in known else None,
        )

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` of this class, or of the plain optimizer, returned.

        Our own handles are already where they belong and are left alone.

        Raises:
            ValueError: other parameter groups.
            StaleStateError: handles from before the latest step or loading.
            PlanMismatchError: state of another optimizer or precision.
        """
        self.flush()
        entries, scalars = from_state_dict(state_dict, self.param_groups, self._names(), self.layout.specs)
        for _, _, value in entries:
            if isinstance(value, OffloadedState):
                value.check_fresh()
        for old, new in zip(state_dict["param_groups"], self.param_groups, strict=True):
            new.update({key: value for key, value in old.items() if key != "params"})
        if self._all_ours(entries) and scalars.keys() == self._records.initialised:
            self._records.scalars = scalars
            return
        self._load(entries, scalars)

    def close(self) -> None:
        """Finish what is pending, remove the hooks, and give tiers and memory back."""
        self._made.close()  # all of it, also where a part fails

    # -- construction
    # ------------------------------------------------------------------------------------------

    def _adopt_hooks(self, optimizer: torch.optim.Optimizer) -> None:
        """Hooks registered on the wrapped optimizer fire here, once a step."""
        for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            setattr(self, hooks, getattr(optimizer, hooks))

    @torch.no_grad()
    def _take_over(self, optimizer: torch.optim.Optimizer) -> None:
        """Move state that the wrapped optimizer already has into the records.

        Master weights start from the weights as they are.
        """
        entries: list[tuple[str, str, Any]] = []
        scalars: dict[str, dict[str, Any]] = {}
        for name, parameter in self.index.parameters.items():
            state = optimizer.state.get(parameter)
            if not state:
                continue
            keys = {tensor.key for tensor in self.layout.specs[name].tensors}
            if name in self.layout.masters:
                entries.append((name, MASTER_KEY, functools.partial(self._weight, name)))
            entries += [(name, key, value) for key, value in state.items() if key in keys]
            scalars[name] = {key: value for key, value in state.items() if key not in keys}
        self._access.load(entries, scalars)
        optimizer.state.clear()

    def _weight(self, name: str) -> Tensor:
        """In fp32."""
        with self._hold(name):
            return self.index.parameters[name].detach().float()

    def _hold(self, name: str) -> AbstractContextManager[None]:
        """The parameter's weights are in memory inside. Raises OffloadError where they belong to no state."""
        self._updates.check_alive()
        return nullcontext() if self._weights is None else self._weights.hold(self.index.unit_of[name])

    def _is_in_memory(self, name: str) -> bool:
        return self._weights is None or self._weights.unit_of(self.index.parameters[name]) is None

    # -- odds and ends
    # -----------------------------------------------------------------------------------------

    def _refuse_scaler(self) -> None:
        if self._tables is not None and hasattr(self, "found_inf"):
            for note in ("found_inf", "grad_scale"):  # the scaler leaves them where step() raises
                self.__dict__.pop(note, None)
            raise PlanMismatchError(
                "a loss scaler steps the optimizer, which steps tables too, whose gradients the scaler does "
                "not see: train in bf16 or fp32 without one"
            )

    def _refuse_unplanned(self) -> None:
        refuse_unplanned(self._all_parameters(), self.index.parameters, self.layout.unplanned)

    def _names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self.index.parameters.items()}

    def _all_parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _state_handles(self, name: str) -> dict[str, Any]:
        handles = {
            tensor.key: OffloadedState(
                self,
                name,
                tensor.key,
                self._records.shape(name, tensor),
                tensor.dtype,
                self.state_count,
                self.index.parameters[name].device,
            )
            for tensor in self._records.tensors(name)
        }
        return {**self._records.scalars.get(name, {}), **handles}

    def _load(
        self, entries: Iterable[tuple[str, str, Any]], scalars: Mapping[str, Mapping[str, Any]]
    ) -> None:
        self.await_snapshot()
        try:
            self._access.load(entries, scalars)
        finally:
            self.state_count += 1  # afterwards: entries may themselves be handles

    def _all_ours(self, entries: list[tuple[str, str, Any]]) -> bool:
        return all(
            isinstance(value, OffloadedState) and value.owner is self and value.name_and_key == (name, key)
            for name, key, value in entries
        )
