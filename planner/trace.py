"""Measure a model: one real step, block by block, into a ``ModelProfile``.

Never more than one block's activations exist: the model runs once without gradients to see what each block
is given; then each block runs alone, forward and backward, on the output of the one before; and at last the
model runs with its blocks passing a known hidden state through, for what stands before and after them.

Bytes are counted, not estimated. *Saved* bytes are the storages that autograd packs; *peaks* come from a
dispatch mode that sees every storage born by an operator and, by weak reference, its death. Both are exact
and repeatable, unlike the resident memory of a process, in which the allocator's habits are mixed. Blocks of
one kind (class, configuration, shapes) are counted once and timed each; the median of their times is used.

The resting state to which transients refer holds weights and saved tensors, so that a block's output, the
incoming gradient and, where it is not saved, the block's input are transients.
"""

from __future__ import annotations

import copy
import gc
import inspect
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from memtrain.planner import resident
from memtrain.planner.block_choices import prefix_lengths
from memtrain.planner.profile import BlockProfile, ModelProfile, Prefixes, UnitProfile
from memtrain.planner.tracing.live_bytes import LiveBytes, storage_id, tensors_in
from memtrain.planner.tracing.rehearsal import Rehearsal

SMALL = 65536
"""Parameters of fewer elements keep gradient and state in memory: moving them would cost more."""
_PAGE_BYTES = 4096
_PROBE_ELEMENTS = 1 << 20
"""For measuring the optimizer: more than the caches hold, less than 20 MiB with gradient and moments."""


class BlocksNotFoundError(ValueError):
    """The model's repeated blocks cannot be found, or do not follow one another."""


def find_blocks(model: nn.Module, names: Sequence[str] | None = None) -> list[tuple[str, nn.Module]]:
    """The repeated blocks of ``model`` with their qualified names, in order.

    Args:
        model: any module.
        names: the blocks, or containers of blocks; None: the ``ModuleList`` or ``Sequential`` whose children
            are of one class and which has the most bytes of parameters.

    Raises:
        BlocksNotFoundError: a name does not exist, or nothing repeats.
    """
    modules = dict(model.named_modules())
    if names is not None:
        found: list[tuple[str, nn.Module]] = []
        for name in names:
            if name not in modules:
                raise BlocksNotFoundError(f"{type(model).__name__} has no module {name!r}")
            found += _children(name, modules[name]) or [(name, modules[name])]
        if not found:
            raise BlocksNotFoundError("names is empty: name at least one block")
        return found
    repeated = [_children(name, module) for name, module in modules.items()]
    repeated = [c for c in repeated if len(c) > 1 and len({type(block) for _, block in c}) == 1]
    best = max(repeated, key=lambda c: sum(_unique_bytes(b.parameters()) for _, b in c), default=None)
    if best is None or not any(True for _, block in best for _ in block.parameters()):
        raise BlocksNotFoundError(
            f"{type(model).__name__} holds no ModuleList or Sequential of at least two blocks of one class "
            "with parameters: name the blocks (block_names)"
        )
    return best


def _children(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return []
    return [(f"{name}.{key}" if name else key, child) for key, child in module.named_children()]


def _unique_bytes(tensors: Any) -> int:
    return sum({storage_id(t): t.untyped_storage().nbytes() for t in tensors if t is not None}.values())


class _FirstReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """For every storage that an operator is given, the stage of the model at which that first happened.

    A stage is the index of the block that runs or ran last: -1 before the first block, and the number of
    blocks once the last one has returned.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stage = -1
        self.first: dict[int, int] = {}

    def note(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            self.first.setdefault(storage_id(tensor), self.stage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.note(tensors_in((args, kwargs)))
        return func(*args, **(kwargs or {}))


@dataclass
class _Call:
    """What a block is given, its hidden state taken out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    place: int | str
    rest: tuple[Any, ...] | None = None
    """What follows the hidden state in a tuple that the block returns; None: it returns a tensor."""

    @classmethod
    def of(cls, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[_Call, Tensor]:
        given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        for place, value in given:
            if isinstance(value, Tensor):
                call = cls(tuple(args), dict(kwargs), place)
                call._put(call, None)
                return call, value
        raise BlocksNotFoundError(f"{name} is given no tensor")

    def _put(self, target: _Call, hidden: Tensor | None) -> None:
        if isinstance(self.place, int):
            target.args = (*self.args[: self.place], hidden, *self.args[self.place + 1 :])
        else:
            target.kwargs = {**self.kwargs, self.place: hidden}

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        call = self.given(hidden)
        return _first(block(*call.args, **call.kwargs))

    def given(self, hidden: Tensor) -> _Call:
        """The call with a hidden state in its place."""
        call = _Call(self.args, self.kwargs, self.place)
        self._put(call, hidden)
        return call

    def shared(self) -> list[Tensor]:
        return tensors_in((self.args, self.kwargs))


def _first(output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(hidden, Tensor):
        raise BlocksNotFoundError(
            f"a block must return a tensor, or a tuple that starts with one, not {type(output)}"
        )
    return hidden


@dataclass
class _Trace:
    """Of one model: what its blocks are given, and which parameters may be read before them."""

    calls: list[_Call] = field(default_factory=list)
    first_input: Tensor | None = None
    last_output: Tensor | None = None
    early: set[int] = field(default_factory=set)
    parameters: list[nn.Parameter] = field(default_factory=list)
    """Trainable."""


def profile_model(
    model: nn.Module,
    sample_batch: Any,
    *,
    optimizer: torch.optim.Optimizer,
    elementwise: bool,
    micro_batches: int = 1,
    master_weights: bool = False,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    block_names: Sequence[str] | None = None,
    rehearsal: Rehearsal | None = None,
) -> ModelProfile:
    """Measure one micro-batch of ``model`` and one step of its optimizer.

    Parameters, gradients, buffers, modes and random numbers are left as they were found, and hooks on
    parameters do not fire. An evaluating
    model is measured in training mode, and a Hugging Face model without its key-value cache, as it must be
    trained.

    Args:
        model: with its weights, on the device on which it will be trained.
        sample_batch: a mapping (``model(**batch)``), a tuple or list (``model(*batch)``) or one tensor.
        optimizer: over the model's parameters; a copy of its class is measured, it is not stepped.
        elementwise: a step on a parameter equals, bit for bit, steps on flat pieces of it, in every group.
        micro_batches: forward-backward passes per optimizer step.
        master_weights: the optimizer updates fp32 copies of lower-precision weights.
        loss_fn: ``loss_fn(output, batch)``; None: ``output.loss``, or the sum of a tensor output.
        block_names: as ``names`` of ``find_blocks``.
        rehearsal: what will carry the plan out; without it the profile allows no nearly free recompute and no
            token prefixes.

    Raises:
        BlocksNotFoundError: no blocks, or blocks that do not each run once, one after the other.
        TypeError: no loss can be had from the model's output.
        ValueError: the optimizer cannot be measured (it needs a closure, for example).
    """
    blocks = find_blocks(model, block_names)
    run = _runner(model, sample_batch, loss_fn)
    with _left_as_found(model):
        trace = _capture(model, blocks, run)
        resident.trim()  # here and below: what one part has freed does not stand beside what the next needs
        profiles, last = _measure_blocks(model, blocks, trace, rehearsal)
        resident.trim()
        around = _measure_around(blocks, trace, run, last)
        del last
        resident.trim()
        step = _measure_optimizer(optimizer, master_weights)
        units = _units(model, blocks, trace, step)
    parameters = list({id(p): p for p in model.parameters()}.values())
    baseline, slack = _baseline(model, optimizer)
    trainable = [p for p in parameters if p.requires_grad]
    return ModelProfile(
        model=type(model).__name__,
        batch=", ".join(f"{list(t.shape)} {str(t.dtype)[len('torch.') :]}" for t in tensors_in(sample_batch)),
        blocks=tuple(profiles),
        units=tuple(units),
        micro_batches=micro_batches,
        baseline_bytes=baseline,
        allocator_slack_bytes=slack,
        weight_bytes=_unique_bytes([*parameters, *model.buffers()]),
        **around,
        update_workspace_bytes_per_element=step.workspace,
        state_bytes_per_element=step.state,
        state_tensors=step.tensors,
        gradient_bytes_per_element=max((float(p.element_size()) for p in trainable), default=0.0),
        largest_gradient_bytes=max((p.nbytes for p in trainable), default=0),
        elementwise=elementwise,
        largest_parameter_elements=max((p.numel() for p in trainable), default=0),
    )


def _runner(
    model: nn.Module, batch: Any, loss_fn: Callable[[Any, Any], Tensor] | None
) -> Callable[[], Tensor]:
    def run() -> Tensor:
        if isinstance(batch, Mapping):
            output = model(**batch)
        else:
            output = model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
        if loss_fn is not None:
            return loss_fn(output, batch)
        loss = getattr(output, "loss", None)
        if isinstance(loss, Tensor):
            return loss
        if isinstance(output, Tensor):
            return output.sum()
        raise TypeError(
            f"{type(model).__name__} returned {type(output).__name__} without a loss: put labels into the "
            "sample batch, or give loss_fn(output, batch)"
        )

    return run


@contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(b, b.detach().clone()) for b in model.buffers()]
    gradients = [(p, p.grad) for p in model.parameters()]
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.enable_grad())
        for parameter, _ in gradients:
            parameter.grad = None
            if parameter.requires_grad and parameter.is_leaf:
                stack.enter_context(_own_hooks_silent(parameter))
                stack.enter_context(_gradient_hook(parameter, _drop))
        try:
            if not model.training:
                model.train()
            if config is not None and use_cache:
                config.use_cache = False
            yield
        finally:
            if config is not None and use_cache:
                config.use_cache = use_cache
            for module, training in modes:
                module.training = training
            for parameter, gradient in gradients:
                parameter.grad = gradient
            with torch.no_grad():
                for buffer, value in buffers:
                    if not torch.equal(buffer, value):
                        buffer.copy_(value)


@contextmanager
def _own_hooks_silent(parameter: Tensor) -> Iterator[None]:
    """The user's hooks on a parameter, such as an optimizer in backward, would change weights."""
    found: Any = parameter
    before = found._backward_hooks, found._post_accumulate_grad_hooks
    # Empty dictionaries: None would leave the hooks after accumulation in force.
    found._backward_hooks, found._post_accumulate_grad_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        # The very dictionaries, to which the handles that remove the hooks refer.
        found._backward_hooks, found._post_accumulate_grad_hooks = before


def _gradient_hook(parameter: Tensor, hook: Callable[[Tensor], None]) -> RemovableHandle:
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    return handle


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def _capture(model: nn.Module, blocks: list[tuple[str, nn.Module]], run: Callable[[], Tensor]) -> _Trace:
    """Run the whole model once without gradients and note what each block is given, and what is early.

    A parameter is early when it is read, or its module runs, before the stage at which its unit is sure to
    be up to date: its first block's, or the end of the last block. A weight need not be read by its module
    (a slice of a table, a head used by the loss), so the operators' arguments are watched; modules are noted
    too, for kernels that no operator shows. What is never read outside the blocks may be read first for
    another batch, and counts as early.
    """
    reads = _FirstReads()
    trace = _Trace(parameters=[p for p in model.parameters() if p.requires_grad])
    order = {id(block): index for index, (_, block) in enumerate(blocks)}

    def before_block(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        index = order[id(block)]
        name = blocks[index][0]
        if index != len(trace.calls):
            raise BlocksNotFoundError(f"{name} does not run once, and after the blocks before it in the list")
        call, hidden = _Call.of(name, args, kwargs)
        if trace.last_output is not None and storage_id(hidden) != storage_id(trace.last_output):
            raise BlocksNotFoundError(
                f"the model changes the hidden state between {blocks[index - 1][0]} and {name}: name blocks "
                "that include what stands between them"
            )
        if index == 0:
            trace.first_input = hidden.detach()
        reads.stage = index
        trace.calls.append(call)

    def after_block(block: nn.Module, args: Any, output: Any) -> None:
        trace.last_output = _first(output).detach()
        trace.calls[-1].rest = tuple(output[1:]) if isinstance(output, (tuple, list)) else None
        if len(trace.calls) == len(blocks):
            reads.stage = len(blocks)

    def before_other(module: nn.Module, args: Any) -> None:
        reads.note(list(module.parameters(recurse=False)))

    with ExitStack() as stack:
        for _, block in blocks:
            stack.enter_context(block.register_forward_pre_hook(before_block, with_kwargs=True))
            stack.enter_context(block.register_forward_hook(after_block))
        for module in model.modules():
            stack.enter_context(module.register_forward_pre_hook(before_other))
        with torch.no_grad(), reads:
            run()
    if len(trace.calls) != len(blocks):
        raise BlocksNotFoundError(f"{blocks[len(trace.calls)][0]} did not run: the model skips it")
    trace.last_output = None
    inside: dict[int, int] = {}
    for index, (_, block) in enumerate(blocks):
        for parameter in block.parameters():
            inside.setdefault(id(parameter), index)
    for parameter in model.parameters():
        ready = inside.get(id(parameter), len(blocks))
        unread = ready if id(parameter) in inside else -1
        if reads.first.get(storage_id(parameter), unread) < ready:
            trace.early.add(id(parameter))
    return trace


def _measure_blocks(
    model: nn.Module,
    blocks: list[tuple[str, nn.Module]],
    trace: _Trace,
    rehearsal: Rehearsal | None,
) -> tuple[list[BlockProfile], Tensor]:
    """Each block alone on the output of the one before. Returns profiles and the last hidden state."""
    outside = {storage_id(t) for t in (*model.parameters(), *model.buffers())}
    inside = {id(p) for _, block in blocks for p in block.parameters()}
    needs = any(p.requires_grad for p in model.parameters() if id(p) in trace.early - inside)
    assert trace.first_input is not None
    hidden = trace.first_input
    counted: dict[Any, dict[str, Any]] = {}
    seconds: dict[Any, list[tuple[float, float]]] = {}
    kinds = []
    for (name, block), call in zip(blocks, trace.calls, strict=True):
        kind = _kind(block, call, hidden, needs)
        if kind not in counted:
            excluded = outside | {storage_id(t) for t in call.shared()}
            counted[kind] = _count(block, call, hidden, needs, excluded)
            largest_bytes = counted[kind].pop("largest_bytes")
            if rehearsal is not None and counted[kind]["recomputable"]:
                given = call.given(_given(hidden, needs))
                attention_bytes = counted[kind]["attention_bytes"]
                counted[kind] |= _rehearse(rehearsal, name, block, given, largest_bytes, attention_bytes)
        kinds.append(kind)
        forward, backward, hidden = _time(block, call, hidden, needs)
        seconds.setdefault(kind, []).append((forward, backward))
        needs = needs or any(p.requires_grad for p in block.parameters())
    profiles = []
    for (name, _), kind in zip(blocks, kinds, strict=True):
        forward, backward = (median(column) for column in zip(*seconds[kind], strict=True))
        values = counted[kind]
        attention = min(values["attention_seconds"], forward)
        profiles.append(
            BlockProfile(
                **{**values, "attention_seconds": attention},
                name=name,
                forward_seconds=forward,
                backward_seconds=backward,
            )
        )
    return profiles, hidden


def _kind(block: nn.Module, call: _Call, hidden: Tensor, needs: bool) -> Any:
    parameters = tuple((n, p.shape, p.dtype, p.requires_grad) for n, p in block.named_parameters())
    shared = tuple((t.shape, t.dtype) for t in call.shared())
    return repr(block), parameters, shared, hidden.shape, hidden.dtype, needs


def _given(hidden: Tensor, needs: bool) -> Tensor:
    """The block's input as in training: not a leaf, so that in-place operations behave as they would."""
    return hidden.detach().clone().requires_grad_().clone() if needs else hidden.detach().clone()


def _count(block: nn.Module, call: _Call, hidden: Tensor, needs: bool, excluded: set[int]) -> dict[str, Any]:
    """Bytes of one forward and backward of ``block``, and whether its forward can be run again."""
    given, saved = _given(hidden, needs), {}
    own = storage_id(given)

    def pack(tensor: Tensor) -> Tensor:
        if storage_id(tensor) not in excluded:
            saved[storage_id(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

    reason = _not_recomputable(block, call, hidden, needs)
    with LiveBytes() as live, saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call.run(block, given)
        saved_bytes = sum(saved.values())
        attention = sum(size for key, size in live.attention.items() if key in saved)
        input_bytes = given.untyped_storage().nbytes()
        forward_transient = live.peak_bytes + input_bytes - saved_bytes
        backward_transient = 0
        if output.requires_grad:
            edge, gradient = torch.autograd.graph.get_gradient_edge(output), torch.randn_like(output)
            del given, output
            live.restart_peak()
            torch.autograd.backward(edge, gradient)
            backward_transient = live.peak_bytes + (input_bytes if own in saved else 0) - saved_bytes
    return {
        "input_bytes": hidden.nbytes,
        "saved_bytes": saved_bytes,
        "saved_tensors": len(saved),
        "largest_bytes": max(saved.values(), default=0),
        "attention_bytes": attention,
        "attention_seconds": live.attention_seconds,
        "forward_transient_bytes": max(0, forward_transient),
        "backward_transient_bytes": max(0, backward_transient),
        "recomputable": not reason,
        "reason": reason,
    }


def _not_recomputable(block: nn.Module, call: _Call, hidden: Tensor, needs: bool) -> str:
    """Why a second forward would not give the first one's output bit for bit; empty when it does."""
    cache = call.kwargs.get("past_key_values")
    if cache is not None:
        return "the block appends to a key-value cache (past_key_values); turn use_cache off"
    watched = [*call.shared(), *block.buffers()]
    before = [t._version for t in watched]
    outputs = []
    for _ in range(2):
        given = _given(hidden, needs)
        version = given._version
        with torch.random.fork_rng([hidden.device] if hidden.is_cuda else []):
            outputs.append(call.run(block, given).detach())
        if given._version != version:
            return "the block changes its input in place"
    if [t._version for t in watched] != before:
        return "forward changes a buffer, such as BatchNorm's statistics, or an argument of other blocks"
    if not torch.equal(*outputs):
        return "two forwards from the same input and random state differ"
    return ""


def _rehearse(
    rehearsal: Rehearsal,
    name: str,
    block: nn.Module,
    call: _Call,
    largest_bytes: int,
    attention_bytes: int,
) -> dict[str, Any]:
    """What the block takes if only its costly part is stored, and if only a prefix is computed again."""
    found = rehearsal.prefixes(
        name, block.forward, call.args, call.kwargs, lengths=prefix_lengths, largest_bytes=largest_bytes
    )
    if isinstance(found, Prefixes) and attention_bytes % found.tokens:  # such as a kernel's random state
        found = (
            f"its attention kernels leave {attention_bytes} bytes, which are no {found.tokens} equal rows: "
            "something is beside what belongs to tokens"
        )
    return {
        "nearly_free": rehearsal.nearly_free(name, block.forward, call.args, call.kwargs),
        "prefixes": found if isinstance(found, Prefixes) else None,
        "prefix_reason": found if isinstance(found, str) else "",
    }


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _time(block: nn.Module, call: _Call, hidden: Tensor, needs: bool) -> tuple[float, float, Tensor]:
    """Seconds of forward and backward, and the output."""
    given = _given(hidden, needs)
    start = _clock(hidden.device)
    output = call.run(block, given)
    middle = _clock(hidden.device)
    if not output.requires_grad:
        return middle - start, 0.0, output
    gradient = torch.randn_like(output)
    resumed = _clock(hidden.device)
    torch.autograd.backward(output, gradient)
    return middle - start, _clock(hidden.device) - resumed, output.detach()


def _measure_around(
    blocks: list[tuple[str, nn.Module]], trace: _Trace, run: Callable[[], Tensor], last: Tensor
) -> dict[str, Any]:
    """What stands before and after the blocks: once for time, once for bytes."""
    counted = _around(blocks, trace, run, last, LiveBytes())  # first, so that the clock sees a warm machine
    measured = _around(blocks, trace, run, last, None)
    return {key: measured[key] if key.endswith("_seconds") else counted[key] for key in counted}


def _around(
    blocks: list[tuple[str, nn.Module]],
    trace: _Trace,
    run: Callable[[], Tensor],
    last: Tensor,
    live: LiveBytes | None,
) -> dict[str, Any]:
    last = last.detach().clone().requires_grad_(last.is_floating_point())
    entered: list[Tensor] = []
    marks: dict[str, float] = {}
    levels: dict[str, int] = {}

    def note(name: str) -> None:
        marks[name] = _clock(last.device)
        if live is not None:
            levels[name], levels[f"{name} peak"] = live.now_bytes, live.peak_bytes
            live.restart_peak()

    def passing(index: int) -> Callable[..., Any]:
        call = trace.calls[index]

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = _Call.of(blocks[index][0], args, kwargs)[1]
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
def _seeing_gradients(trace: _Trace, seen: dict[int, int]) -> Iterator[None]:
    def hook(parameter: Tensor) -> None:
        seen[id(parameter)] = parameter.nbytes

    with ExitStack() as stack:
        for parameter in trace.parameters:
            stack.enter_context(_gradient_hook(parameter, hook))
        yield


@dataclass(frozen=True, kw_only=True)
class _Step:
    """One step of the optimizer, per element."""

    state: float
    tensors: int
    """Of the state of one parameter, scalars left out."""
    workspace: float
    seconds: float


def _measure_optimizer(optimizer: torch.optim.Optimizer, master_weights: bool) -> _Step:
    """The largest figures over every kind of settings and parameters: groups may run different algorithms."""
    kinds: dict[Any, _Step] = {}
    elements = _probe_elements(optimizer)
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for dtype, device in {(p.dtype, p.device) for p in group["params"]}:
            kind = repr(settings), dtype, device
            if kind not in kinds:
                kinds[kind] = _measure_step(optimizer, settings, dtype, device, master_weights, elements)
    steps = kinds.values()
    return _Step(
        state=max(step.state for step in steps),
        tensors=max(step.tensors for step in steps),
        workspace=max(step.workspace for step in steps),
        seconds=max(step.seconds for step in steps),
    )


def _probe_elements(optimizer: torch.optim.Optimizer) -> int:
    """A power of two, no more than a small model has: measuring it must not take more than training it."""
    elements: int = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    return min(_PROBE_ELEMENTS, max(SMALL, 1 << max(0, elements.bit_length() - 1)))


def _measure_step(
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
    model_dtype: torch.dtype,
    device: torch.device,
    master_weights: bool,
    elements: int,
) -> _Step:
    """One step over a probe of ``elements`` elements, a multiple of 1024."""
    master_weights = master_weights and model_dtype in (torch.bfloat16, torch.float16)
    dtype = torch.float32 if master_weights else model_dtype
    # A gradient of lower precision is widened within its slot, for which the slot holds its bytes twice.
    widening = model_dtype.itemsize if master_weights else 0
    weight = torch.zeros(1024, elements // 1024, dtype=dtype, device=device)
    gradient = torch.randn(weight.shape, device=device).to(model_dtype)
    low = weight.to(model_dtype)
    probe = _like(optimizer, settings, weight)
    _step(probe, gradient.to(dtype))
    start = _clock(device)
    _step(probe, gradient.to(dtype))
    if master_weights:
        low.copy_(weight)
    seconds = _clock(device) - start
    given = gradient.to(dtype)
    with LiveBytes() as live:
        _step(probe, given)
    kept = [t for t in tensors_in(list(probe.state.values())) if t.dim() > 0]
    return _Step(
        state=sum(t.nbytes for t in kept) / elements + (4 if master_weights else 0),
        tensors=len(kept) + master_weights,
        # Whole pages: scalars such as the step count do not grow with the shard.
        workspace=live.peak_bytes // _PAGE_BYTES * _PAGE_BYTES / elements + widening,
        seconds=seconds / elements,
    )


def _like(
    optimizer: torch.optim.Optimizer, settings: dict[str, Any], weight: Tensor
) -> torch.optim.Optimizer:
    """The optimizer's class over one tensor, in a group with ``settings``."""
    accepted = inspect.signature(type(optimizer).__init__).parameters
    own = copy.deepcopy(settings)
    defaults = {key: own.get(key, value) for key, value in optimizer.defaults.items() if key in accepted}
    return type(optimizer)([{**own, "params": [nn.Parameter(weight, requires_grad=True)]}], **defaults)


def _step(probe: torch.optim.Optimizer, gradient: Tensor) -> None:
    probe.param_groups[0]["params"][0].grad = gradient
    try:
        probe.step()
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{type(probe).__name__} cannot be measured by a plain step(): {error}") from error


def _units(
    model: nn.Module, blocks: list[tuple[str, nn.Module]], trace: _Trace, step: _Step
) -> list[UnitProfile]:
    """Every parameter once, in the first unit that needs it."""
    names = {id(p): name for name, p in model.named_parameters()}
    inside = {id(p) for _, block in blocks for p in block.parameters()}
    others = [p for p in model.parameters() if id(p) not in inside or id(p) in trace.early]
    early = [p for p in others if id(p) in trace.early]
    late = [p for p in others if id(p) not in trace.early]
    members: list[tuple[str, int | None, list[nn.Parameter]]] = [("prologue", None, early)]
    members += [(name, index, list(block.parameters())) for index, (name, block) in enumerate(blocks)]
    members.append(("epilogue", None, late))
    taken: set[int] = set()
    units = []
    for name, index, parameters in members:
        own = [p for p in parameters if id(p) not in taken]
        taken.update(id(p) for p in own)
        large = [p for p in own if p.requires_grad and p.numel() >= SMALL]
        small = [p for p in own if p.requires_grad and p.numel() < SMALL]
        units.append(
            UnitProfile(
                name=name,
                block=index,
                weight_bytes=sum(p.nbytes for p in own),
                gradient_bytes=sum(p.nbytes for p in large),
                state_bytes=round(sum(p.numel() for p in large) * step.state),
                resident_state_bytes=round(sum(p.nbytes + p.numel() * step.state for p in small)),
                update_seconds=sum(p.numel() for p in (*large, *small)) * step.seconds,
                parameters=tuple(names[id(p)] for p in own),
            )
        )
    return units


def _baseline(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """Resident bytes that are not tensors of the job, after a real step has loaded what it needs; and what
    the allocator keeps beyond them (CUDA).

    Weights that are memory-mapped are resident only once they were read, so every page of them is read
    first, and all their bytes can be subtracted.
    """
    gc.collect()
    parameters = list(model.parameters())
    tensors = [*parameters, *model.buffers(), *(p.grad for p in parameters)]
    tensors += tensors_in(list(optimizer.state.values()))
    if parameters[0].is_cuda:
        device = parameters[0].device
        torch.cuda.empty_cache()  # what profiling left in the allocator's cache, training uses again
        reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        free, total = torch.cuda.mem_get_info(device)
        return max(0, total - free - reserved), reserved - allocated
    for parameter in parameters:
        with torch.no_grad():
            parameter.detach().reshape(-1)[:: _PAGE_BYTES // parameter.element_size()].sum()
    # What the allocator holds back of freed memory is no slack: a session asks for it where it is needed.
    resident.trim()
    return max(0, resident.rss_bytes() - _unique_bytes(tensors)), 0
