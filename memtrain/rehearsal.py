"""Rehearses a block for the tracer: carried out alone by what will carry it out in training.

What a block stores when only its costly results are kept, or only some tokens are computed again, is the
executor's to say (``memtrain.offload``); what that means for bytes and seconds is measured here with the
tracer's own instruments, and becomes part of the profile.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from memtrain.forms import BlockForms
from memtrain.offload.block_survey import BlockSurvey
from memtrain.offload.errors import TokenRangeError
from memtrain.offload.recompute import RecomputeFrame
from memtrain.offload.result_survey import wanted_results
from memtrain.offload.results import PRODUCTS_AND_ATTENTION, ResultTape
from memtrain.offload.token_kinds import TokenProbe
from memtrain.offload.token_probe import probe_tokens
from memtrain.offload.token_rows import token_count
from memtrain.offload.unmoved import FixedTensors, Unmoved, shared_storages
from memtrain.planner.actions import Action, BlockDecision
from memtrain.planner.block_choices import RULED_OUT, may_be_nearly_free, may_cut, may_take_forms
from memtrain.planner.options import PlannerOptions
from memtrain.planner.profile import NearlyFree, Prefixes
from memtrain.planner.tracing import clock
from memtrain.planner.tracing.live_bytes import LiveBytes

_REPETITIONS = 3
"""Of a second forward that is timed; the median counts."""


class BlockRehearsal:
    """Blocks of one model (``planner.tracing.rehearsal.Rehearsal``).

    Args:
        model: for its parameters and buffers, which are never stored.
        forms: of its blocks; None: they have the plain one alone.
        options: of the plan that is to be made: what they rule out for every block is not rehearsed. Prefixes
            alone are 15 forwards of a block, each of which brings its weights where they are streamed. None:
            all is.
    """

    def __init__(
        self, model: nn.Module, forms: BlockForms | None = None, options: PlannerOptions | None = None
    ) -> None:
        self._fixed = FixedTensors(model)
        self._forms = forms
        self._options = options or PlannerOptions()

    def forms(self, name: str) -> Mapping[str, Hashable]:
        """Those of block ``name`` beside the plain one, and what each treats."""
        return self._forms.of(name) if self._forms is not None and may_take_forms(self._options) else {}

    def missing_forms(self, name: str) -> Mapping[str, str]:
        """Those that it cannot have, and why."""
        if self._forms is None:
            return {}
        ruled_out = () if may_take_forms(self._options) else self._forms.of(name)
        return {**self._forms.missing(name), **dict.fromkeys(ruled_out, RULED_OUT)}

    def in_form(self, name: str, form: str) -> AbstractContextManager[None]:
        """Block ``name`` runs in ``form`` for a while."""
        assert self._forms is not None
        return self._forms.worn(name, form)

    def nearly_free(
        self, name: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> NearlyFree | None:
        """With results of products and attention kernels stored, and the rest computed again."""
        if not may_be_nearly_free(self._options):
            return None
        is_fixed = self._fixed.__contains__
        wanted = wanted_results(PRODUCTS_AND_ATTENTION, forward, args, kwargs, is_fixed=is_fixed)

        def run(results: _Elsewhere) -> tuple[RecomputeFrame, Any]:
            tape = ResultTape(name, PRODUCTS_AND_ATTENTION, results.pack, _unpack, wanted=wanted)
            entry = _Elsewhere(results.live)
            frame = self._frame(name, forward, args, kwargs, pack_input=entry.pack, tape=tape)
            return frame, _first(frame.forward())

        with LiveBytes() as live:
            results = _Elsewhere(live)
            _, output = run(results)
            stored, peak = (results.size_bytes, results.tensors), 0
            del results
            if output.requires_grad:
                edge, gradient = torch.autograd.graph.get_gradient_edge(output), torch.randn_like(output)
                del output
                live.restart_peak()
                torch.autograd.backward(edge, gradient)
                peak = live.peak_bytes
        frame, output = run(_Elsewhere(None))
        return NearlyFree(
            stored_bytes=stored[0],
            stored_tensors=stored[1],
            forward_seconds=_seconds_again(frame, output),
            backward_bytes=peak,
        )

    def prefixes(
        self,
        name: str,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        lengths: Callable[[int], tuple[int, ...]],
        largest_bytes: int,
    ) -> Prefixes | str:
        """With the first tokens alone computed again, as many as ``lengths`` says of all; or why not."""
        if not may_cut(self._options):
            return RULED_OUT
        tokens = token_count(args, kwargs)
        tried = lengths(tokens) if tokens else ()
        if not tried:
            return f"it has {tokens} tokens, too few to be cut"
        try:
            with LiveBytes() as live:
                probes = [self._look(name, forward, args, kwargs, length) for length in tried]
            half = tried[len(tried) // 2]
            part = self._seconds_of_prefix(name, forward, args, kwargs, half)
        except TokenRangeError as error:
            return str(error)
        rows = {probe.row_bytes for probe in probes}
        if len(rows) > 1:
            return (
                f"which of its saved tensors have tokens depends on the prefix ({sorted(rows)} bytes a token)"
            )
        whole = self._seconds_of_prefix(name, forward, args, kwargs, None)
        return Prefixes(
            tokens=tokens,
            lengths=tried,
            differences=tuple(probe.difference for probe in probes),
            overhead_seconds=max(0.0, part - whole * half / tokens),
            cut_bytes=rows.pop() * tokens,
            whole_bytes=max(probe.whole_bytes for probe in probes),
            largest_bytes=largest_bytes,
            probe_bytes=live.peak_bytes + _input(args, kwargs).untyped_storage().nbytes(),
            witness_bytes=max(probe.witness_bytes for probe in probes),
            attention_whole_bytes=max(probe.attention_whole_bytes for probe in probes),
        )

    def _look(
        self,
        name: str,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        length: int,
    ) -> TokenProbe:
        """As the executor does before the first forward of a block that is cut at ``length``."""
        return probe_tokens(
            name,
            forward,
            args,
            kwargs,
            is_fixed=self._fixed.__contains__,
            prefix=length,
            attention_prefixes=[length],
        )

    def _seconds_of_prefix(
        self,
        name: str,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        length: int | None,
    ) -> float:
        """Of the second forward on the first ``length`` tokens; None: on all."""
        decision = BlockDecision(block=0, action=Action.RECOMPUTE, recomputed_tokens=length)
        survey = BlockSurvey(name, nn.Module(), decision, self._fixed.__contains__)
        cut = survey.parts(forward, args, kwargs).cut(None, shared_storages(args, kwargs))
        frame = self._frame(name, forward, args, kwargs, cut=cut)
        return _seconds_again(frame, frame.forward())

    def _frame(
        self,
        name: str,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        **parts: Any,
    ) -> RecomputeFrame:
        given = {"pack_input": None} | parts
        is_fixed = self._fixed.__contains__
        return RecomputeFrame(name, forward, args, kwargs, is_fixed=is_fixed, unpack=_unpack, **given)


class _Elsewhere:
    """Stands for a slot: what is packed is copied, once per storage, and counts as live no longer."""

    def __init__(self, live: LiveBytes | None) -> None:
        self.live = live
        self._copies: dict[tuple[int, int], tuple[Tensor, StorageWeakRef]] = {}
        """Of every storage; the weak reference keeps its identity from being given to another one."""

    @property
    def size_bytes(self) -> int:
        """Of the copies."""
        return sum(copy.nbytes for copy, _ in self._copies.values())

    @property
    def tensors(self) -> int:
        """Copies."""
        return len(self._copies)

    def pack(self, tensor: Tensor) -> Tensor:
        """A view of the copy that is ``tensor`` again."""
        storage = tensor.untyped_storage()
        key = storage._cdata, tensor._version
        if key not in self._copies:
            elements = storage.nbytes() // tensor.element_size()
            copy = torch.as_strided(tensor.detach(), (elements,), (1,), 0).clone()
            if self.live is not None:
                self.live.forget(copy)
            self._copies[key] = copy, StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        flat = self._copies[key][0].view(tensor.dtype)
        return torch.as_strided(flat, tensor.shape, tensor.stride(), int(tensor.storage_offset()))


def _unpack(saved: Tensor | Unmoved) -> Tensor:
    return saved.get() if isinstance(saved, Unmoved) else saved


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden state that a block is given."""
    return next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))


def _first(output: Any) -> Tensor:
    """The hidden state that a block returns."""
    hidden: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return hidden


def _seconds_again(frame: RecomputeFrame, output: Any) -> float:
    """Of the second forward, run alone; ``output`` keeps the graph alive whose holes it fills."""
    device = _first(output).device
    seconds = []
    for _ in range(_REPETITIONS):
        started = clock.now(device)
        frame.compute_again()
        seconds.append(clock.now(device) - started)
    return median(seconds)
