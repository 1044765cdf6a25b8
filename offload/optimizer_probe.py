"""What an optimizer does, found out by running it on small tensors: its state, and whether it may be cut.

An optimizer is *elementwise* when a step on a parameter equals, bit for bit, steps on flat pieces of it that
begin at multiples of ``PIECE_ALIGNMENT``: also one whose state is quantised in blocks, which then lie within
pieces. That is a property of the class, of its hyper-parameters and of the dtype, so it is tried on the very
instance's class, for each of them.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from memtrain.offload.errors import PlanMismatchError
from memtrain.offload.shards import PIECE_ALIGNMENT, StateSpec, StateTensor
from memtrain.offload.state_cuts import SHARED, Cuts, find_cuts

Original = tuple[Tensor, int]
"""What a stand-in is of: a parameter, and the element of it at which the stand-in begins. One that is not all
of it is flat."""

_PROBE_SHAPE = (48, 257)  # 12336 elements: no power of two, a tail behind six aligned blocks
_PROBE_CUTS = (0, 2 * PIECE_ALIGNMENT, 5 * PIECE_ALIGNMENT, 48 * 257)
_PROBE_STEPS = 4
_PROBE_LEARNING_RATE = 1e-2
_SCALAR_TYPES = (int, float, bool, type(None))


class UnsupportedOptimizerError(PlanMismatchError):
    """An optimizer whose update cannot be streamed, and why."""


class StandIns(Protocol):
    """What an optimizer's ``stand_ins()`` gives, where its step needs to know more of a parameter than
    gradient, state and group: such as a number that random bits depend on, a count of steps, or where in its
    parameter a piece lies.
    """

    def count_step(self) -> None:
        """A step has been asked for."""
        ...

    def run(
        self,
        groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        originals: Mapping[Tensor, Original],
    ) -> dict[Tensor, dict[str, Any]]:
        """One step over ``groups`` of stand-ins for ``originals``; the state after it.

        An original that is none of the optimizer's parameters is one of a trial: the only one there is.
        """
        ...


def plain_step(optimizer: torch.optim.Optimizer) -> Any:
    """The class's ``step``, to be called with an instance: no hooks of all optimizers fire."""
    step: Any = type(optimizer).step
    return getattr(step, "__wrapped__", step) if getattr(step, "hooked", None) else step


class Runner:
    """Runs an optimizer's own ``step`` on tensors that stand for its parameters.

    It shares the instance's attributes but has parameter groups, state and hooks of its own, so that the
    user's instance keeps its own. Hooks registered on the instance, or for all optimizers, do not fire here.
    An optimizer that has a method ``stand_ins`` does it itself; for those of bitsandbytes
    ``bitsandbytes_steps`` does.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.name = type(optimizer).__name__
        self.stand_ins: StandIns | None = None
        from memtrain.offload import bitsandbytes_steps  # which is made of this module

        if callable(getattr(optimizer, "stand_ins", None)):
            self.stand_ins = optimizer.stand_ins()  # type: ignore[attr-defined]
        elif bitsandbytes_steps.is_of_bitsandbytes(optimizer):
            self.stand_ins = bitsandbytes_steps.BitsAndBytesSteps(optimizer)
        self.twin: Any = object.__new__(type(optimizer))
        self.twin.__dict__.update(optimizer.__dict__)
        self.twin.__dict__.pop("step", None)  # a scheduler's wrapper, bound to the instance
        for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            setattr(self.twin, hooks, OrderedDict())
        self._step: Any = plain_step(optimizer)

    def count_step(self) -> None:
        """A step has been asked for, and ``run`` will be called for parts of it."""
        if self.stand_ins is not None:
            self.stand_ins.count_step()

    def run(
        self,
        groups: list[dict[str, Any]],
        state: dict[Tensor, dict[str, Any]],
        originals: Mapping[Tensor, Original] | None = None,
    ) -> dict[Tensor, dict[str, Any]]:
        """One step over ``groups``, from ``state``; the state after it.

        Args:
            originals: of what each stand-in is; one that is left out stands for itself, in a trial.
        """
        if self.stand_ins is not None:
            with torch.no_grad():
                return self.stand_ins.run(groups, state, originals or {})
        self.twin.param_groups = groups
        self.twin.state = defaultdict(dict, state)
        try:
            with torch.no_grad():
                self._step(self.twin)
            return self.twin.state
        finally:
            self.twin.param_groups, self.twin.state = [], defaultdict(dict)


def hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    """A group without its parameters, as it is now: a scheduler may change it, tensors in place, right
    after."""
    return {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in group.items()
        if key not in ("params", "param_names")
    }


def stepped_dtype(parameter: Tensor, *, master_weights: bool) -> torch.dtype:
    """In which dtype a parameter is stepped: that of its master, where it has one."""
    narrow = parameter.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if master_weights and narrow else parameter.dtype


def cuts_of_groups(
    optimizer: torch.optim.Optimizer, *, master_weights: bool
) -> dict[tuple[int, torch.dtype], Cuts | None]:
    """``state_cuts`` by number of the group and dtype that trainable parameters of it are stepped in."""
    kinds = {
        (number, stepped_dtype(parameter, master_weights=master_weights)): group
        for number, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
        if parameter.requires_grad
    }
    return {kind: state_cuts(optimizer, group, kind[1]) for kind, group in kinds.items()}


def may_be_cut(optimizer: torch.optim.Optimizer, *, master_weights: bool) -> bool:
    """Whether steps may be cut into flat pieces, bit for bit, of every group and in every dtype."""
    return None not in cuts_of_groups(optimizer, master_weights=master_weights).values()


def is_elementwise(optimizer: torch.optim.Optimizer, group: dict[str, Any], dtype: torch.dtype) -> bool:
    """Whether steps with the group's hyper-parameters may be cut into flat pieces, bit for bit."""
    return state_cuts(optimizer, group, dtype) is not None


def state_cuts(optimizer: torch.optim.Optimizer, group: dict[str, Any], dtype: torch.dtype) -> Cuts | None:
    """How state is cut where steps with the group's hyper-parameters may be cut into flat pieces; None where
    that does not give the same bits.

    Tried at the learning rate that the group has now, and at one that surely moves weights: under a warm-up
    that begins at 0 no weight moves, and whatever is done with a whole parameter's norm does not show.
    """
    moved, found = False, list[Cuts]()
    for tried in (group, _with_learning_rate(group, _PROBE_LEARNING_RATE)):
        outcome = _try_cut(optimizer, tried, dtype)
        if outcome is None:
            return None
        found.append(outcome[0])
        moved |= outcome[1]
    # Weights that never move say nothing.
    return found[0] if moved and found[0] == found[1] else None


def _with_learning_rate(group: dict[str, Any], value: float) -> dict[str, Any]:
    rate = group.get("lr")
    if rate is None:
        return group
    return {**group, "lr": torch.full_like(rate, value) if isinstance(rate, Tensor) else value}


def _try_cut(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], dtype: torch.dtype
) -> tuple[Cuts, bool] | None:
    """How state is cut in a trial whose cut and uncut steps agree, and whether weights moved; None where they
    do not agree."""
    device = _device_of(group)  # another device has other kernels
    whole = _Trial(optimizer, group, [torch.empty(_PROBE_SHAPE, dtype=dtype, device=device)])
    sizes = [stop - start for start, stop in pairwise(_PROBE_CUTS)]
    pieces = [torch.empty(size, dtype=dtype, device=device) for size in sizes]
    cut = _Trial(optimizer, group, pieces, starts=_PROBE_CUTS[:-1], whole=whole.parameters[0])
    cuts: Cuts | None = None
    generator = torch.Generator().manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(_PROBE_SHAPE, generator=generator).to(device, dtype)

    start = draw()
    whole.fill([start])
    cut.fill(start.view(-1).split(sizes))
    try:
        for _ in range(_PROBE_STEPS):
            gradient = draw()
            whole.step([gradient])
            cut.step(gradient.view(-1).split(sizes))
            found = _agree(whole, cut)
            if found is None or (cuts is not None and found != cuts):
                return None
            cuts = found
    except UnsupportedOptimizerError:
        raise
    except Exception:
        # Refuses flat pieces (Muon takes matrices only). Whether it takes whole parameters, state_spec will
        # see.
        return None
    assert cuts is not None
    return cuts, not torch.equal(whole.parameters[0], start)


def state_spec(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    cuts: Cuts | None,
) -> StateSpec:
    """The state of a parameter of ``shape`` after a step.

    Args:
        cuts: how state is cut; what they do not name, where it has the parameter's shape. None: not at all.

    Raises:
        UnsupportedOptimizerError: it needs a closure, keeps state outside tensors and numbers, changes the
        shape of
            its state, or counts in its attributes or parameter groups.
    """
    device = _device_of(group)
    trial = _Trial(optimizer, group, [torch.zeros(tuple(shape), dtype=dtype, device=device)])
    specs = []
    for _ in range(2):
        try:
            trial.step([torch.zeros(tuple(shape), dtype=dtype, device=device)])
        except UnsupportedOptimizerError:
            raise
        except Exception as error:
            raise UnsupportedOptimizerError(
                f"{trial.runner.name}.step() fails on a parameter of shape {tuple(shape)} that stands for "
                f"the real one: "
                f"{error!r}. Such an optimizer cannot be run on substituted parameters"
            ) from error
        specs.append(
            _describe(trial.runner.name, trial.state.get(trial.parameters[0], {}), tuple(shape), cuts)
        )
    if specs[0] != specs[1]:
        raise UnsupportedOptimizerError(
            f"{trial.runner.name} changes the form of its state from step to step ({specs[0]}, then "
            f"{specs[1]}): "
            f"its state has no fixed place on a tier; keep its optimizer in plain PyTorch"
        )
    return specs[0]


def _device_of(group: dict[str, Any]) -> torch.device:
    parameter: Tensor = group["params"][0]
    return parameter.device


class _Trial:
    """Some stand-in parameters under the optimizer's class and a group's hyper-parameters.

    Args:
        starts: where in ``whole`` the parameters begin, if they are pieces of it.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        group: dict[str, Any],
        parameters: list[Tensor],
        *,
        starts: Sequence[int] = (),
        whole: Tensor | None = None,
    ) -> None:
        self.parameters = parameters
        self._originals: dict[Tensor, Original] = {}
        if whole is not None:
            self._originals = {p: (whole, start) for p, start in zip(parameters, starts, strict=True)}
        self.runner = Runner(optimizer)
        self.hyper = hyperparameters(group)
        self.state: dict[Tensor, dict[str, Any]] = {}
        if optimizer.state and self.runner.stand_ins is None:
            self._initial_state(optimizer)

    def _initial_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Classes such as Adagrad make state in the constructor: have it made for the stand-ins too."""
        kind: Any = type(optimizer)
        try:
            fresh = kind([{"params": self.parameters, **self.hyper}], **optimizer.defaults)
        except TypeError:
            return  # its constructor takes something else; then state is made by step(), or step() will say
        self.state = {parameter: dict(fresh.state[parameter]) for parameter in self.parameters if fresh.state}

    def fill(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def step(self, gradients: Sequence[Tensor]) -> None:
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        group = {**self.hyper, "params": list(self.parameters)}
        before = self._numbers(group)
        try:
            with torch.random.fork_rng({p.device for p in self.parameters if p.is_cuda}):
                self.state = dict(self.runner.run([group], self.state, self._originals))
        except TypeError as error:
            if "closure" in str(error):
                raise UnsupportedOptimizerError(
                    f"{self.runner.name}.step() needs a closure that evaluates the model several times: "
                    f"such an "
                    f"optimizer cannot be streamed; use one whose step() takes the gradients as they are"
                ) from error
            raise
        if self._numbers(group) != before:
            raise UnsupportedOptimizerError(
                f"{self.runner.name}.step() changes its own attributes or parameter groups, from {before} to "
                f"{self._numbers(group)}: run shard by shard it would count each shard; keep such values in "
                f"state"
            )

    def _numbers(self, group: dict[str, Any]) -> dict[str, Any]:
        values = {
            **self.runner.twin.__dict__,
            **{f"param_groups.{key}": value for key, value in group.items()},
        }
        return {
            key: value.tolist() if isinstance(value, Tensor) else value
            for key, value in values.items()
            if isinstance(value, (*_SCALAR_TYPES, str, tuple))
            or (isinstance(value, Tensor) and value.dim() == 0)
        }


def _agree(whole: _Trial, cut: _Trial) -> Cuts | None:
    """How state is cut, where parameter and state of the uncut trial are those of the cut one, end to end."""
    parameter = whole.parameters[0]
    if not torch.equal(parameter.view(-1), torch.cat(cut.parameters)):
        return None
    states = [cut.state.get(piece, {}) for piece in cut.parameters]
    sizes = [piece.numel() for piece in cut.parameters]
    return find_cuts(parameter.shape, whole.state.get(parameter, {}), sizes, states)


def _describe(name: str, state: dict[str, Any], shape: tuple[int, ...], cuts: Cuts | None) -> StateSpec:
    tensors, scalars, on_device = [], set(), set()
    for key, value in state.items():
        if isinstance(value, Tensor) and value.layout is torch.strided:
            if value.dim() == 0:
                scalars.add(key)
                on_device |= {key} if value.is_cuda else set()
            else:
                tensors.append(_state_tensor(key, value, shape, cuts))
        elif isinstance(value, _SCALAR_TYPES):
            scalars.add(key)
        else:
            raise UnsupportedOptimizerError(
                f"{name} keeps state {key!r} of type {type(value).__name__}: only dense tensors and numbers "
                f"have a place "
                f"on a tier"
            )
    return StateSpec(
        tensors=tuple(tensors), scalars=frozenset(scalars), scalars_on_device=frozenset(on_device)
    )


def _state_tensor(key: str, value: Tensor, shape: tuple[int, ...], cuts: Cuts | None) -> StateTensor:
    if cuts is not None and (per := cuts.get(key, 1)) != SHARED:
        tensor = StateTensor(key=key, dtype=value.dtype, per=per)
        if tensor.shape_for(shape) == tuple(value.shape):
            return tensor
    return StateTensor(key=key, dtype=value.dtype, shape=tuple(value.shape))
