"""Say of each saved storage what it is, and whether it could be had again almost for nothing.

*What it is* follows from the operators and from the modules in which they ran: a norm's class has "norm" in
its name, attention's "attention" or "attn", a router's "router", experts' "experts"; kernels and activation
functions are known by their operators. What no rule knows is ``OTHER``, which is safe: a class is a name,
and no byte depends on it.

*Almost for nothing* does not rest on names. A storage is nearly free when every operation that wrote to it
and to what it was made from is neither a matrix product nor attention nor random, back to saved tensors,
to the block's input, to parameters or to what blocks share. So the saved tensors are gone through in the
order of their birth, and each is kept unless those before it suffice. Choices of a router are always kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

from memtrain.planner.estimate import LifetimeKind, SavedTensor, TensorClass
from memtrain.planner.tracing.recorder import Call, Recorder, Storage

_NORMS = {"native_layer_norm", "_fused_rms_norm", "native_batch_norm", "native_group_norm"}
_ACTIVATIONS = {"silu", "gelu", "relu", "tanh", "sigmoid", "mish", "leaky_relu", "elu", "hardswish", "relu6"}
_CHOICES = {"topk", "sort", "argsort", "multinomial", "histc", "nonzero", "bincount"}
_INTEGERS = ("int", "uint")
_ATTENTION = ("attention", "attn")


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Class names of a part's modules by their paths, in lower case; and the storages that norms returned."""

    classes: Mapping[str, str]
    norm_outputs: Set[int]

    def inside(self, path: str, *words: str) -> bool:
        """Whether the module at ``path``, or one around it, has one of ``words`` in its class name."""
        while path:
            if any(word in self.classes.get(path, "") for word in words):
                return True
            path = path.rpartition(".")[0]
        return False


def saved_tensors(
    recorder: Recorder,
    places: Places,
    *,
    forward_operations: int,
    batch: int,
    sequence: int,
    default: TensorClass,
    source: str,
) -> tuple[SavedTensor, ...]:
    """Records of all that autograd packed, in the order of birth."""
    calls = recorder.calls[:forward_operations]
    classes = _classes(recorder, calls, places, sequence, default)
    order = sorted(recorder.saved)
    index = {serial: place for place, serial in enumerate(order)}
    found: list[SavedTensor] = []
    kept: set[int] = set()
    for serial in order:
        storage, tensor_class = recorder.storages[serial], classes.get(serial, default)
        recipe = None
        if tensor_class is not TensorClass.ROUTING and storage.kind is not LifetimeKind.INPUT:
            recipe = _recipe(serial, recorder, calls, kept)
        kept.add(serial)
        sources, steps = recipe or (set(), set())
        found.append(
            SavedTensor(
                tensor_class=tensor_class,
                shape=storage.shape,
                dtype=storage.dtype,
                size_bytes=storage.size_bytes,
                operator=storage.operator,
                module=storage.module,
                token_axis=token_axis(storage.shape, batch, sequence),
                nearly_free=recipe is not None,
                recompute_from=tuple(sorted(index[s] for s in sources if s in index)),
                recompute_from_input=any(recorder.storages[s].kind is LifetimeKind.INPUT for s in sources),
                recompute_moved_bytes=sum(
                    recorder.operations[i].read_bytes + recorder.operations[i].written_bytes for i in steps
                ),
                source=source if storage.operator.startswith("memtrain::") else "fake trace",
            )
        )
    return tuple(found)


def token_axis(shape: tuple[int, ...], batch: int, sequence: int) -> int | None:
    """The axis of one row's tokens behind the batch's, or that of all tokens of the batch; None: neither.

    Of several axes of this length it is the first.
    """
    if len(shape) > 1 and shape[0] == batch:
        for axis in range(1, len(shape)):
            if shape[axis] == sequence:
                return axis
    return next((axis for axis, size in enumerate(shape) if size in (batch * sequence, sequence)), None)


def _recipe(
    serial: int, recorder: Recorder, calls: list[Call], kept: set[int]
) -> tuple[set[int], set[int]] | None:
    """From which storages, kept or given, ``serial`` follows, by which operations; None: it does not."""
    sources: set[int] = set()
    steps: set[int] = set()
    pending, seen = [serial], {serial}
    while pending:
        writers = recorder.storages[pending.pop()].writers
        if not writers:
            return None  # made out of sight
        for writer in writers:
            if writer >= len(calls) or not _cheap(calls[writer]):
                return None
            steps.add(writer)
            for given in calls[writer].inputs:
                storage = recorder.storages[given]
                if given != serial and storage.writers and storage.writers[-1] > writer:
                    return None  # changed in place after it was read
                if given in kept or storage.kind is LifetimeKind.INPUT:
                    sources.add(given)
                elif given not in seen:
                    seen.add(given)
                    pending.append(given)
    return sources - {serial}, steps


def _cheap(call: Call) -> bool:
    bare = _bare(call.name)
    return not (call.flops or call.random or bare in _CHOICES or "attention" in bare)


def _bare(name: str) -> str:
    return name.partition("::")[2].rstrip("_")


def _classes(
    recorder: Recorder, calls: list[Call], places: Places, sequence: int, default: TensorClass
) -> dict[int, TensorClass]:
    """Every storage's class, in the order of birth, so that later rules see earlier answers."""
    inputs = {s.serial for s in recorder.storages if s.kind is LifetimeKind.INPUT}
    known = dict.fromkeys(inputs, TensorClass.BLOCK_INPUT)
    from_input = set(inputs)
    attended: list[str] = []
    for call in calls:
        if not from_input.isdisjoint(call.inputs):
            from_input.update(call.outputs)
        for serial in call.outputs:
            if serial in known:
                continue
            storage = recorder.storages[serial]
            if _square(storage, sequence):
                own = serial in from_input
                known[serial] = TensorClass.ATTENTION_WEIGHTS if own else TensorClass.MASK
            else:
                after = any(call.module.startswith(module) for module in attended)
                known[serial] = (
                    _by_place(storage, call, places, after) or _by_mlp(call, known, places) or default
                )
        kernel = "attention" in call.name
        if kernel or ("softmax" in call.name and places.inside(call.module, *_ATTENTION)):
            attended.append(call.module)
        if kernel:
            given = [serial for serial in call.inputs if known.get(serial) is default]
            known.update(dict.fromkeys(given, TensorClass.QKV))
    if TensorClass.MLP_PRODUCT not in known.values():
        return {s: TensorClass.MLP_UP if c is TensorClass.MLP_GATE else c for s, c in known.items()}
    return known


def _square(storage: Storage, sequence: int) -> bool:
    """Tokens by tokens, for every head: with three axes it could as well be tokens by features."""
    return len(storage.shape) > 3 and storage.shape[-2:] == (sequence, sequence)


def _by_place(storage: Storage, call: Call, places: Places, after_attention: bool) -> TensorClass | None:
    bare = _bare(call.name)
    if places.inside(call.module, "norm") or bare in _NORMS:
        returned = storage.serial in places.norm_outputs or (
            bare in _NORMS and storage.serial == call.outputs[0]
        )
        return TensorClass.NORM_OUTPUT if returned else TensorClass.NORM_INTERNAL
    if places.inside(call.module, "router") or bare in _CHOICES:
        return TensorClass.ROUTING
    if places.inside(call.module, "experts") and storage.dtype.startswith(_INTEGERS):
        return TensorClass.ROUTING
    if "softmax" in bare and places.inside(call.module, *_ATTENTION):
        return TensorClass.ATTENTION_WEIGHTS
    if "attention" in bare:
        return TensorClass.ATTENTION_OUTPUT
    if places.inside(call.module, *_ATTENTION):
        return TensorClass.ATTENTION_OUTPUT if after_attention else TensorClass.QKV
    return None


def _by_mlp(call: Call, known: dict[int, TensorClass], places: Places) -> TensorClass | None:
    """Activation functions by their operators, the product by what it multiplies."""
    if _bare(call.name) in _ACTIVATIONS or places.inside(call.module, "activation"):
        for serial in call.inputs:
            if known.get(serial) is TensorClass.OTHER:
                known[serial] = TensorClass.MLP_GATE
        return TensorClass.MLP_ACTIVATION
    if _bare(call.name) != "mul" or not any(known.get(s) is TensorClass.MLP_ACTIVATION for s in call.inputs):
        return None
    for serial in call.inputs:
        if known.get(serial) is TensorClass.OTHER:
            known[serial] = TensorClass.MLP_UP
    return TensorClass.MLP_PRODUCT
