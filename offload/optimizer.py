"""The user's own optimizer, run over shards whose state lives on a tier.

A step substitutes flat pieces for the parameters, hands the optimizer their gradients and state as views of a slot,
and calls its own ``step``: no optimizer is re-implemented here. With master weights, the pieces are fp32 masters out
of the record, stepped with fp32 gradients, and the model's weights are their rounding:

    masters = [p.detach().float() for p in model.parameters()]; optimizer = Cls(masters)
    m.grad = p.grad.float(); clip_grad_norm_(masters, max_norm); optimizer.step(); p.copy_(m)

is what ``OffloadedOptimizer(Cls(model.parameters()), config=OptimizerConfig(master_weights=True))`` equals bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from memtrain.offload.errors import OffloadError, PlanMismatchError
from memtrain.offload.gradients import Engine, GradientStore, GradientValue, OffloadedGradient, Ticket
from memtrain.offload.offloaded_grad import OffloadedGrad
from memtrain.offload.optimizer_probe import Runner, hyperparameters, is_elementwise, same_scalar, state_spec
from memtrain.offload.optimizer_state import OffloadedState, RecordStore, StateAccess
from memtrain.offload.pipeline import ShardPipeline, Stages
from memtrain.offload.shards import MASTER_KEY, FlatIndex, Piece, Shard, ShardLayout, StateSpec, StateTensor, Unit
from memtrain.offload.slab import Ring
from memtrain.planner.actions import Tier, UpdateSchedule
from memtrain.planner.plan import Plan

_ELEMENTWISE_SHAPE = (8, 16)  # any: an elementwise optimizer's state follows the parameter's shape
_CLIPPED = "_memtrain_clipped"


class NonFiniteGradientError(OffloadError):
    """A gradient holds NaN or inf and the optimizer was told to raise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """How updates are done."""

    master_weights: bool = False
    """Keep fp32 masters of bf16 and fp16 weights, and step those with fp32 gradients."""
    nonfinite: str = "ignore"
    """What ``step`` does about NaN or inf gradients: ``ignore`` (as PyTorch), ``skip`` the step, or ``raise``."""
    elementwise: bool | None = None
    """Whether the optimizer may be run on flat pieces; None tries it out."""

    def __post_init__(self) -> None:
        if self.nonfinite not in ("ignore", "skip", "raise"):
            raise ValueError(f"nonfinite must be 'ignore', 'skip' or 'raise', got {self.nonfinite!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Gradient:
    """A parameter's gradient as ``step`` found it."""

    tensor: Tensor | None = None
    version: int = 0
    home: OffloadedGradient | None = None
    value: GradientValue | None = None
    clips: tuple[Tensor, ...] = ()
    """Factors for the fp32 gradient (master weights)."""


@dataclass(kw_only=True)
class _Update:
    """A step that has been asked for; its shards may still be waiting."""

    groups: list[dict[str, Any]]
    gradients: dict[str, _Gradient]
    waiting: dict[str, list[Shard]] = field(default_factory=dict)
    pieces_left: dict[str, int] = field(default_factory=dict)
    scalars: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What the pieces stepped so far have made of their parameter's scalars."""


class OffloadedOptimizer(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` around another one, whose state obeys a plan.

    It shares the wrapped optimizer's parameter groups, so that schedulers of either work; step the wrapped one no more.

    Args:
        optimizer: the user's, of any class whose state is tensors and numbers. State it already has is taken over.
        engine: the session's stores.
        plan: staging, schedule, and the tiers of each unit's gradients and state.
        units: parameters in forward order; every trainable parameter of the optimizer must be in one.
        config: master weights and so on.

    Raises:
        PlanMismatchError: units and optimizer do not fit each other or the plan, or the slots are too small.
        UnsupportedOptimizerError: the optimizer cannot be streamed; the message says why.
        TierFullError: no room for state or gradients.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        engine: Engine,
        plan: Plan,
        units: Sequence[Unit],
        config: OptimizerConfig | None = None,
    ) -> None:
        self._complete = False
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer = optimizer
        self.config = config or OptimizerConfig()
        self.param_groups = optimizer.param_groups
        self.defaults = optimizer.defaults
        self._adopt_hooks(optimizer)
        self._schedule = plan.update_schedule
        self._update: _Update | None = None
        self._failure: BaseException | None = None
        self.last_step_skipped = False
        """Whether the latest ``step`` found non-finite gradients and did nothing."""
        self.elementwise = self._find_elementwise()
        self.index = FlatIndex(
            units, plan.staging.update_shard_elements, whole_parameters=not self.elementwise
        )
        self._group_of = self._match_groups()
        self._specs = self._find_specs()
        widened = frozenset(name for name in self.index.parameters if self._has_master(name))
        self._layouts = {
            shard: ShardLayout(shard=shard, specs=self._specs, widened=widened) for shard in self.index.all_shards()
        }
        decisions = {unit: plan.state(unit) for unit in self.index.shards if self.index.shards[unit]}
        self._check_slots(plan, {unit: d.optimizer_tier for unit, d in decisions.items()}, decisions)
        self._runner = Runner(optimizer)
        self._records = RecordStore(
            engine=engine,
            index=self.index,
            layouts=self._layouts,
            specs=self._specs,
            tiers={unit: decision.optimizer_tier for unit, decision in decisions.items()},
        )
        staging = plan.staging
        try:
            self.gradients = GradientStore(
                engine=engine,
                index=self.index,
                tiers={unit: decision.gradient_tier for unit, decision in decisions.items()},
                slots=staging.gradient_slots,
                slot_bytes=staging.gradient_slot_bytes,
                norm_dtype=torch.float32 if self.config.master_weights else None,
                before_overwrite=self.ensure,
            )
        except BaseException:
            self._records.close()
            raise
        self._ring = Ring(staging.update_slots, staging.update_slot_bytes) if staging.update_slots else None
        self._pipeline = ShardPipeline(
            self._ring,
            Stages(read=self._read, step=self._step_shard, write=self._records.write, needs_slot=self._needs_slot),
        )
        self._access = StateAccess(self._records, self.index, self._layouts, self._borrowed)
        self._complete = True
        if optimizer.state:
            self._take_over(optimizer)

    # -- the optimizer's public face ---------------------------------------------------------------------------

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:  # type: ignore[override]
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
            raise TypeError("optimizer state on a tier cannot be assigned: use load_state_dict() or load_state()")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused once wrapped: the plan has no place for parameters that it does not know."""
        if self._complete:
            raise PlanMismatchError(
                "add_param_group after the plan was made: its parameters have no tier. Add the group to the optimizer "
                "first, then plan again"
            )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update. Under the AHEAD schedule it is only begun, and done by ``ensure`` or ``flush``.

        Raises:
            NonFiniteGradientError: if so configured.
            OffloadError: a transfer failed. The update is then incomplete: restore the last checkpoint.
        """
        self.flush()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # a scheduler of the wrapped one asks
        self.last_step_skipped = self.config.nonfinite != "ignore" and self._refuse_nonfinite()
        if not self.last_step_skipped:
            self._begin()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As PyTorch's. With ``set_to_none=False`` gradients in memory that an update waits for are used first."""
        if not set_to_none and self._update is not None:
            if any(gradient.tensor is not None for gradient in self._update.gradients.values()):
                self.flush()
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def clip_grad_norm_(
        self, max_norm: float, error_if_nonfinite: bool = False, parameters: Iterable[Tensor] | None = None
    ) -> Tensor:
        """``torch.nn.utils.clip_grad_norm_``, bit for bit; with master weights, of the fp32 gradients.

        With master weights the factor is applied to the fp32 gradient when it is used; ``param.grad`` keeps showing
        the gradient before clipping.

        Args:
            parameters: order in which norms are summed; default: that of the parameter groups.
        """
        self.flush()
        chosen = [p for group in self.param_groups for p in group["params"]] if parameters is None else list(parameters)
        if not self.config.master_weights:
            return torch.nn.utils.clip_grad_norm_(chosen, max_norm, error_if_nonfinite=error_if_nonfinite)
        grads = [p.grad for p in chosen if p.grad is not None]
        norms = [self._float_norm(grad) for grad in grads]
        total = torch.linalg.vector_norm(torch.stack(norms), 2.0) if norms else torch.tensor(0.0)
        if error_if_nonfinite and not torch.isfinite(total):
            raise RuntimeError(
                f"the total norm of the gradients is {total.item()}, so they cannot be clipped: pass "
                f"error_if_nonfinite=False to scale by it anyway"
            )
        factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        for grad in grads:
            setattr(grad, _CLIPPED, (_version(grad), (*_clips(grad), factor)))
        return total

    # -- updates that run ahead --------------------------------------------------------------------------------

    @torch.no_grad()
    def ensure(self, unit: str) -> None:
        """Finish the pending update of ``unit``, if there is one, on the calling thread. Any order will do."""
        if self._update is None or unit not in self._update.waiting:
            return
        self._check_alive()
        shards = self._update.waiting.pop(unit)
        following = [shard for others in self._update.waiting.values() for shard in others]
        self._guarded(lambda: self._pipeline.run(shards, following))
        if not self._update.waiting:
            self._update = None

    @torch.no_grad()
    def flush(self) -> None:
        """Finish the pending update, and wait until all state is on its tier."""
        self._check_alive()
        while self._update is not None:
            self.ensure(next(iter(self._update.waiting)))
        self._guarded(self._pipeline.drain)

    # -- checkpoints -------------------------------------------------------------------------------------------

    def iter_state(self) -> Iterator[tuple[str, str, Tensor]]:
        """``(parameter, key, tensor)``, one whole tensor in memory at a time. Empty before the first step."""
        self._settle()
        yield from self._access

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
            tensors: by ``(parameter, key)``, or triples as ``iter_state`` yields; a value may be a function that
                reads the tensor when it is called.
            scalars: as ``scalar_state`` gives.

        Raises:
            PlanMismatchError: names, shapes or keys differ; the state is then undefined until loaded again.
        """
        self.flush()
        if isinstance(tensors, Mapping):
            tensors = ((name, key, value) for (name, key), value in tensors.items())
        self._access.load(tensors, scalars)

    def state_dict(self) -> dict[str, Any]:
        """In PyTorch's form. Offloaded tensors are handles: shape and dtype now, bytes when used."""
        self.flush()
        numbers = self._numbers()
        groups = [
            {**{key: value for key, value in group.items() if key != "params"},
             "params": [numbers[parameter] for parameter in group["params"]]}
            for group in self.param_groups
        ]
        return {
            "state": {
                numbers[self.index.parameters[name]]: self._state_handles(name)
                for name in sorted(self._records.initialised, key=lambda n: numbers[self.index.parameters[n]])
            },
            "param_groups": groups,
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` of this class, or of the plain optimizer, returned.

        Our own handles are already where they belong and are left alone.

        Raises:
            ValueError: other parameter groups.
            PlanMismatchError: state of another optimizer or precision.
        """
        self.flush()
        saved = state_dict["param_groups"]
        if [len(group["params"]) for group in saved] != [len(group["params"]) for group in self.param_groups]:
            raise ValueError(
                f"the state dict has parameter groups of {[len(g['params']) for g in saved]} parameters, this optimizer "
                f"of {[len(g['params']) for g in self.param_groups]}"
            )
        names = {id(parameter): name for name, parameter in self.index.parameters.items()}
        by_number = {
            number: names.get(id(parameter))
            for old, new in zip(saved, self.param_groups, strict=True)
            for number, parameter in zip(old["params"], new["params"], strict=True)
        }
        entries: list[tuple[str, str, Any]] = []
        scalars: dict[str, dict[str, Any]] = {}
        for number, state in state_dict["state"].items():
            name = by_number.get(number)
            if name is None:
                raise PlanMismatchError(f"the state dict has state for parameter {number}, which is not trainable here")
            tensors = {tensor.key for tensor in self._specs[name].tensors}
            entries += [(name, key, value) for key, value in state.items() if key in tensors]
            scalars[name] = {key: value for key, value in state.items() if key not in tensors}
        for old, new in zip(saved, self.param_groups, strict=True):
            new.update({key: value for key, value in old.items() if key != "params"})
        if self._all_ours(entries) and scalars.keys() == self._records.initialised:
            entries = []
            self._records.scalars = scalars
            return
        self._access.load(entries, scalars)

    def close(self) -> None:
        """Finish what is pending, remove the hooks, and give tiers and memory back."""
        try:
            if self._failure is None:
                self.flush()
        finally:
            self.gradients.close()
            self._records.close()
            if self._ring is not None:
                self._ring.close()
                self._ring = None

    # -- construction ------------------------------------------------------------------------------------------

    def _adopt_hooks(self, optimizer: torch.optim.Optimizer) -> None:
        """Hooks registered on the wrapped optimizer fire here, once a step."""
        for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            setattr(self, hooks, getattr(optimizer, hooks))

    def _work_dtype(self, parameter: Tensor) -> torch.dtype:
        narrow = parameter.dtype in (torch.bfloat16, torch.float16)
        return torch.float32 if self.config.master_weights and narrow else parameter.dtype

    def _has_master(self, name: str) -> bool:
        parameter = self.index.parameters[name]
        return self._work_dtype(parameter) != parameter.dtype

    def _find_elementwise(self) -> bool:
        if self.config.elementwise is not None:
            return self.config.elementwise
        return all(
            is_elementwise(self.optimizer, group, dtype)
            for group in self.param_groups
            for dtype in {self._work_dtype(parameter) for parameter in group["params"] if parameter.requires_grad}
        )

    def _match_groups(self) -> dict[str, int]:
        numbers = {id(p): number for number, group in enumerate(self.param_groups) for p in group["params"]}
        ours = {id(parameter): name for name, parameter in self.index.parameters.items()}
        for name, parameter in self.index.parameters.items():
            if id(parameter) not in numbers:
                raise PlanMismatchError(
                    f"{name} needs a gradient but is in no parameter group: add it, or set requires_grad_(False)"
                )
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad and id(parameter) not in ours:
                    raise PlanMismatchError(
                        f"the optimizer has a trainable parameter of shape {tuple(parameter.shape)} that is in no unit"
                    )
        return {name: numbers[id(parameter)] for name, parameter in self.index.parameters.items()}

    def _find_specs(self) -> dict[str, StateSpec]:
        found: dict[Any, StateSpec] = {}
        specs = {}
        for name, parameter in self.index.parameters.items():
            group, dtype = self._group_of[name], self._work_dtype(parameter)
            shape = _ELEMENTWISE_SHAPE if self.elementwise else tuple(parameter.shape)
            key = (group, dtype, shape)
            if key not in found:
                found[key] = state_spec(self.optimizer, self.param_groups[group], shape, dtype, cut=self.elementwise)
            master = (StateTensor(key=MASTER_KEY, dtype=torch.float32),) if dtype != parameter.dtype else ()
            specs[name] = StateSpec(tensors=master + found[key].tensors, scalars=found[key].scalars)
        return specs

    def _check_slots(self, plan: Plan, tiers: Mapping[str, Tier], decisions: Mapping[str, Any]) -> None:
        for shard, layout in self._layouts.items():
            decision = decisions[shard.unit]
            away = decision.optimizer_tier is not Tier.DEVICE or decision.gradient_tier is not Tier.DEVICE
            if shard.small or not away:
                continue
            if plan.staging.update_slots < 1 or plan.staging.update_slot_bytes < layout.slot_bytes:
                raise PlanMismatchError(
                    f"{shard.name} needs an update slot of {layout.slot_bytes} bytes, the plan has "
                    f"{plan.staging.update_slots} of {plan.staging.update_slot_bytes}: plan again for this optimizer"
                )

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
            keys = {tensor.key for tensor in self._specs[name].tensors}
            if self._has_master(name):
                entries.append((name, MASTER_KEY, parameter.detach().float))
            entries += [(name, key, value) for key, value in state.items() if key in keys]
            scalars[name] = {key: value for key, value in state.items() if key not in keys}
        self._access.load(entries, scalars)
        optimizer.state.clear()

    # -- one update --------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        gradients = {
            name: self._found(name, parameter.grad)
            for name, parameter in self.index.parameters.items()
            if parameter.grad is not None
        }
        update = _Update(
            groups=[hyperparameters(group) for group in self.param_groups],
            gradients=gradients,
            pieces_left={name: len(self.index.pieces[name]) for name in gradients},
        )
        now: list[Shard] = []
        for unit, shards in self.index.shards.items():
            work = [shard for shard in shards if any(piece.name in gradients for piece in shard.pieces)]
            # Small gradients stay in memory, where the next zero_grad may overwrite them: use them now.
            now += [shard for shard in work if shard.small]
            if later := [shard for shard in work if not shard.small]:
                update.waiting[unit] = later
        self._update = update
        self._guarded(lambda: self._pipeline.run(now, []))
        if not update.waiting:
            self._update = None
        elif self._schedule is UpdateSchedule.SEQUENTIAL:
            self.flush()
        else:
            following = [shard for shards in update.waiting.values() for shard in shards]
            self._guarded(lambda: self._pipeline.prefetch(following))

    def _found(self, name: str, grad: Tensor) -> _Gradient:
        clips = _clips(grad)
        if isinstance(grad, OffloadedGrad):
            home = grad._live()
            assert isinstance(home, OffloadedGradient)
            return _Gradient(home=home, value=home.value, clips=clips)
        if grad.layout is not torch.strided:
            raise PlanMismatchError(f"the gradient of {name} is {grad.layout}: only dense gradients can be streamed")
        return _Gradient(tensor=grad, version=grad._version, clips=clips)

    def _refuse_nonfinite(self) -> bool:
        """Whether to skip. Raises where told to."""
        names = [
            name
            for name, parameter in self.index.parameters.items()
            if parameter.grad is not None and not _finite(parameter.grad)
        ]
        if names and self.config.nonfinite == "raise":
            raise NonFiniteGradientError(
                f"NaN or inf in the gradients of {len(names)} parameters, first {names[0]}: lower the learning rate or "
                f"the loss scale, or choose nonfinite='skip'"
            )
        return bool(names)

    def _needs_slot(self, shard: Shard) -> bool:
        if shard.small:
            return False
        if self._records.on_tier(shard):
            return True
        assert self._update is not None
        found = (self._update.gradients.get(piece.name) for piece in shard.pieces)
        return any(gradient is not None and gradient.home is not None for gradient in found)

    def _read(self, shard: Shard, slot: Tensor) -> list[Ticket]:
        assert self._update is not None
        tickets = self._records.read(shard, slot)
        for piece in shard.pieces:
            gradient = self._update.gradients.get(piece.name)
            if gradient is not None and gradient.home is not None and gradient.value is not None:
                region = self._layouts[shard].gradient_bytes(slot, piece)
                tickets += self.gradients.load(gradient.home, gradient.value, piece, region)
        return tickets

    def _step_shard(self, shard: Shard, slot: Tensor | None) -> None:
        update = self._update
        assert update is not None
        record = self._records.memory(shard, slot)
        groups: dict[int, dict[str, Any]] = {}
        state: dict[Tensor, dict[str, Any]] = {}
        at_work: list[tuple[Piece, Tensor, dict[str, Tensor]]] = []
        for piece in shard.pieces:
            if piece.name not in update.gradients:
                continue
            views = self._layouts[shard].state(record, piece)
            master = views.pop(MASTER_KEY, None)
            work = piece.weight() if master is None else master
            if piece.name in self._records.initialised:
                scalars = self._records.scalars[piece.name]
                state[work] = {**views, **{key: _copy_scalar(value) for key, value in scalars.items()}}
            elif master is not None:
                master.copy_(piece.weight())
            work.grad = self._gradient(shard, piece, slot, update.gradients[piece.name])
            number = self._group_of[piece.name]
            groups.setdefault(number, {**update.groups[number], "params": []})["params"].append(work)
            at_work.append((piece, work, views))
        after = self._runner.run([groups[number] for number in sorted(groups)], state)
        for piece, work, views in at_work:
            work.grad = None
            self._keep_state(piece, views, after.get(work, {}))
            if self._has_master(piece.name):
                piece.weight().copy_(work)

    def _gradient(self, shard: Shard, piece: Piece, slot: Tensor | None, gradient: _Gradient) -> Tensor:
        layout = self._layouts[shard]
        if gradient.tensor is not None:
            if gradient.tensor._version != gradient.version:
                raise OffloadError(
                    f"the gradient of {piece.name} was changed in place while an update waited for it: use "
                    f"zero_grad(set_to_none=True), or call flush() before changing gradients"
                )
            narrow = piece.of(gradient.tensor.contiguous())
            grad = narrow.float() if self._has_master(piece.name) else narrow
        else:
            assert gradient.value is not None and slot is not None
            grad = layout.gradient(slot, piece)
            gradient.value.apply(grad)
            if self._has_master(piece.name):
                grad = layout.widen(slot, piece)
        if gradient.clips and gradient.tensor is not None and not self._has_master(piece.name):
            grad = grad.clone()  # clipping is not to show in param.grad for some parameters and not for others
        for factor in gradient.clips:
            grad.mul_(factor)
        return grad

    def _keep_state(self, piece: Piece, views: dict[str, Tensor], after: dict[str, Any]) -> None:
        """State that the optimizer made anew goes to its place; views it changed in place are there already."""
        update, spec = self._update, self._specs[piece.name]
        assert update is not None
        if after.keys() != views.keys() | spec.scalars:
            raise PlanMismatchError(
                f"the optimizer now keeps {sorted(after)} for {piece.name}, it was planned with "
                f"{sorted(views.keys() | spec.scalars)}: plan again for its present settings"
            )
        for key, view in views.items():
            made = after[key]
            if made.dtype != view.dtype or made.shape != view.shape:
                raise PlanMismatchError(
                    f"state {key!r} of {piece.name} is {made.dtype} {tuple(made.shape)}, planned as {view.dtype} "
                    f"{tuple(view.shape)}: plan again for the optimizer's present settings"
                )
            if made is not view:
                view.copy_(made)
        scalars = {key: after[key] for key in spec.scalars}
        known = update.scalars.setdefault(piece.name, scalars)
        if any(not same_scalar(known[key], scalars[key]) for key in scalars):
            raise OffloadError(
                f"pieces of {piece.name} disagree about {sorted(scalars)}: {known} and {scalars}. The optimizer is not "
                f"elementwise: use OptimizerConfig(elementwise=False)"
            )
        update.pieces_left[piece.name] -= 1
        if update.pieces_left[piece.name] == 0 and after:
            self._records.scalars[piece.name] = known
            self._records.initialised.add(piece.name)

    # -- odds and ends -----------------------------------------------------------------------------------------

    def _float_norm(self, grad: Tensor) -> Tensor:
        """2-norm of the fp32 gradient, after earlier clippings."""
        clips = _clips(grad)
        if not clips:
            return torch.linalg.vector_norm(grad, 2.0, dtype=torch.float32)
        wide = (grad.materialize() if isinstance(grad, OffloadedGrad) else grad.clone()).float()
        for factor in clips:
            wide.mul_(factor)
        return torch.linalg.vector_norm(wide, 2.0)

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._failure = error
            self._pipeline.abandon()
            raise

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise OffloadError(
                f"an earlier update failed half-way ({self._failure}): weights and state no longer belong together. "
                f"Restore the last checkpoint"
            ) from self._failure

    def _settle(self) -> None:
        """Nothing pending; after a failure, what is on the tiers may still be looked at."""
        if self._failure is None:
            self.flush()

    @contextmanager
    def _borrowed(self) -> Iterator[Tensor | None]:
        if self._ring is None:
            yield None
            return
        slot = self._pipeline.borrow()
        try:
            yield slot.buffer
        finally:
            slot.release()

    def _numbers(self) -> dict[Tensor, int]:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        return {parameter: number for number, parameter in enumerate(parameters)}

    def _state_handles(self, name: str) -> dict[str, Any]:
        handles = {
            tensor.key: OffloadedState(self, name, tensor.key, self._records.shape(name, tensor), tensor.dtype)
            for tensor in self._records.tensors(name)
        }
        return {**self._records.scalars.get(name, {}), **handles}

    def _all_ours(self, entries: list[tuple[str, str, Any]]) -> bool:
        return all(
            isinstance(value, OffloadedState) and value.owner is self and value.name_and_key == (name, key)
            for name, key, value in entries
        )


def _version(grad: Tensor) -> tuple[Any, ...]:
    """Changes with every change of the gradient's values."""
    if isinstance(grad, OffloadedGrad):
        home = grad._live()
        assert isinstance(home, OffloadedGradient)
        return home.identity, home.value
    return (grad._version,)


def _clips(grad: Tensor) -> tuple[Tensor, ...]:
    """Factors that ``clip_grad_norm_`` has left for the fp32 gradient.

    Raises:
        OffloadError: the gradient changed after it was clipped, so that the factors mean nothing.
    """
    version, factors = getattr(grad, _CLIPPED, (None, ()))
    if factors and version != _version(grad):
        raise OffloadError(
            "a gradient changed between clip_grad_norm_() and step(): clip after the last micro-batch, just before step()"
        )
    return tuple(factors)


def _finite(grad: Tensor) -> bool:
    if isinstance(grad, OffloadedGrad):
        return grad.finite()
    if grad.numel() == 0:
        return True
    # Two numbers instead of a mask as large as the gradient.
    low, high = torch.aminmax(grad)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _copy_scalar(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
