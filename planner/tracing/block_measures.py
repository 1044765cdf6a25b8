"""Each block alone, on the output of the one before: bytes of its forward and backward, and seconds.

Blocks of one kind (class, configuration, shapes) are counted once and timed each; the median of their times
is used.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from memtrain.planner.block_choices import prefix_lengths
from memtrain.planner.profile import BlockProfile, Prefixes
from memtrain.planner.tracing import clock
from memtrain.planner.tracing.blocks import BlockCall, FirstPass
from memtrain.planner.tracing.form_measures import Lone, MeasuredForm, measure_forms
from memtrain.planner.tracing.live_bytes import LiveBytes, storage_id
from memtrain.planner.tracing.rehearsal import Rehearsal
from memtrain.planner.tracing.weights import Weights

_FORM_FIELDS = ("saved_bytes", "saved_tensors", "forward_transient_bytes", "backward_transient_bytes")


def measure_blocks(
    model: nn.Module,
    blocks: list[tuple[str, nn.Module]],
    trace: FirstPass,
    rehearsal: Rehearsal | None,
    weights: Weights,
) -> tuple[list[BlockProfile], Tensor]:
    """Each block alone on the output of the one before, its weights in memory. Returns profiles and the last
    hidden state."""
    outside = {weights.key(t) for t in (*model.parameters(), *model.buffers())}
    inside = {id(p) for _, block in blocks for p in block.parameters()}
    needs = any(p.requires_grad for p in model.parameters() if id(p) in trace.early - inside)
    assert trace.first_input is not None
    hidden = trace.first_input
    counted: dict[Any, dict[str, Any]] = {}
    forms: dict[Any, tuple[tuple[MeasuredForm, ...], tuple[tuple[str, str], ...]]] = {}
    seconds: dict[Any, list[tuple[float, float]]] = {}
    kinds = []
    for (name, block), call in zip(blocks, trace.calls, strict=True):
        with weights.present(block.parameters()):
            kind = _kind(block, call, hidden, needs)
            if rehearsal is not None:
                forms_of = tuple(rehearsal.forms(name).items()), tuple(rehearsal.missing_forms(name))
                kind = kind, forms_of
            if kind not in counted:
                excluded = outside | {storage_id(t) for t in call.shared()}
                reason = _not_recomputable(block, call, hidden, needs)
                counted[kind] = _count(block, call, hidden, needs, excluded)
                counted[kind] |= {"recomputable": not reason, "reason": reason}
                largest_bytes = counted[kind].pop("largest_bytes")
                if rehearsal is not None and counted[kind]["recomputable"]:
                    given = call.given(_given(hidden, needs))
                    attention_bytes = counted[kind]["attention_bytes"]
                    counted[kind] |= _rehearse(rehearsal, name, block, given, largest_bytes, attention_bytes)
                if rehearsal is not None:
                    lone = _lone(block, call, hidden, needs, excluded)
                    forms[kind] = measure_forms(rehearsal, name, lone, counted[kind]["saved_bytes"])
            kinds.append(kind)
            forward, backward, hidden = _time(block, call, hidden, needs)
            seconds.setdefault(kind, []).append((forward, backward))
        needs = needs or any(p.requires_grad for p in block.parameters())
    profiles = []
    for (name, _), kind in zip(blocks, kinds, strict=True):
        forward, backward = (median(column) for column in zip(*seconds[kind], strict=True))
        values = counted[kind]
        attention = min(values["attention_seconds"], forward)
        found, missing = forms.get(kind, ((), ()))
        profiles.append(
            BlockProfile(
                **{**values, "attention_seconds": attention},
                name=name,
                forward_seconds=forward,
                backward_seconds=backward,
                forms=tuple(form.of(forward, backward) for form in found),
                missing_forms=missing,
            )
        )
    return profiles, hidden


def _kind(block: nn.Module, call: BlockCall, hidden: Tensor, needs: bool) -> Any:
    parameters = tuple((n, p.shape, p.dtype, p.requires_grad) for n, p in block.named_parameters())
    shared = tuple((t.shape, t.dtype) for t in call.shared())
    return repr(block), parameters, shared, hidden.shape, hidden.dtype, needs


def _given(hidden: Tensor, needs: bool) -> Tensor:
    """The block's input as in training: not a leaf, so that in-place operations behave as they would."""
    return hidden.detach().clone().requires_grad_().clone() if needs else hidden.detach().clone()


def _lone(block: nn.Module, call: BlockCall, hidden: Tensor, needs: bool, excluded: set[int]) -> Lone:
    def count() -> dict[str, int]:
        sizes = _count(block, call, hidden, needs, excluded)
        return {name: sizes[name] for name in _FORM_FIELDS}

    return Lone(
        block=block,
        run=lambda given: call.run(block, given),
        given=lambda: _given(hidden, needs),
        count=count,
        seconds=lambda: _time(block, call, hidden, needs)[:2],
    )


def _count(
    block: nn.Module, call: BlockCall, hidden: Tensor, needs: bool, excluded: set[int]
) -> dict[str, Any]:
    """Bytes of one forward and backward of ``block``, and the seconds of its attention."""
    given, saved = _given(hidden, needs), {}
    own = storage_id(given)

    def pack(tensor: Tensor) -> Tensor:
        if storage_id(tensor) not in excluded:
            saved[storage_id(tensor)] = tensor.untyped_storage().nbytes()
        return tensor

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
    }


def _not_recomputable(block: nn.Module, call: BlockCall, hidden: Tensor, needs: bool) -> str:
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
    call: BlockCall,
    largest_bytes: int,
    attention_bytes: int,
) -> dict[str, Any]:
    """What the block takes if only its costly part is stored, and if only a prefix is computed again."""
    found = rehearsal.prefixes(
        name, block.forward, call.args, call.kwargs, lengths=prefix_lengths, largest_bytes=largest_bytes
    )
    if isinstance(found, Prefixes):
        of_rows = attention_bytes - found.attention_whole_bytes
        if of_rows < 0 or of_rows % found.tokens:  # such as rows that a kernel rounds up to whole tiles
            found = (
                f"its attention kernels leave {attention_bytes} bytes, {found.attention_whole_bytes} of them "
                f"whole, and the others are no {found.tokens} equal rows: something is beside them"
            )
    return {
        "nearly_free": rehearsal.nearly_free(name, block.forward, call.args, call.kwargs),
        "prefixes": found if isinstance(found, Prefixes) else None,
        "prefix_reason": found if isinstance(found, str) else "",
    }


def _time(block: nn.Module, call: BlockCall, hidden: Tensor, needs: bool) -> tuple[float, float, Tensor]:
    """Seconds of forward and backward, and the output."""
    given = _given(hidden, needs)
    start = clock.now(hidden.device)
    output = call.run(block, given)
    middle = clock.now(hidden.device)
    if not output.requires_grad:
        return middle - start, 0.0, output
    gradient = torch.randn_like(output)
    resumed = clock.now(hidden.device)
    torch.autograd.backward(output, gradient)
    return middle - start, clock.now(hidden.device) - resumed, output.detach()
