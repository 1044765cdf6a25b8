"""Activations under a plan: keep, swap or recompute what each block saves for its backward pass.

Every decided block's forward runs inside ``saved_tensors_hooks``. Under *swap* each saved tensor is
copied once into the block's staging slot as autograd packs it, so its memory is free as soon as
forward lets go of it; the slot is written to the tier behind the following blocks and read back ahead
of the block's backward. Under *recompute* nothing is saved but the input (``recompute.py``).

On a CPU what the plan *keeps* is copied to a slab as well, and stays there. glibc's heap fragments when
tensors that live through the whole backward pass lie between those that live for one operator: the process
then took 1.6 GiB where 1.2 GiB were alive (measured on SmolLM2-135M, docs/log.md).

Rules that keep this exact, each the answer to a bug that other engines have had:

- A tensor is identified by its storage and version, and the storage by a weak reference, never by an
  address alone: an address is reused, and then two tensors would share one copy.
- One copy per storage; views are restored as views of it.
- Parameters, buffers, and arguments that several blocks share are never moved.
- A copy is taken when autograd saves the tensor, so what backward sees is the value that was saved.
- Slots, extents and handles live exactly as long as the graph that needs them: a graph that is dropped
  without a backward pass, or walked twice, leaves nothing behind and finds everything.
"""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from memtrain.offload.block_survey import BlockSurvey
from memtrain.offload.engine import Engine
from memtrain.offload.errors import OffloadError, PlanMismatchError
from memtrain.offload.overlaid_slab import OverlaidSlab, OverlayWarning
from memtrain.offload.recompute import RecomputeFrame
from memtrain.offload.saved_group import (
    SavedGroup,
    abandoned_on_error,
    pack_alone_into,
    pack_into,
    unpack,
)
from memtrain.offload.slab import HighWater
from memtrain.offload.staging import SlotCache, Ticket
from memtrain.offload.token_kinds import TokenProbe
from memtrain.offload.unmoved import FixedTensors, shared_storages, unchanged
from memtrain.planner.actions import Action, BlockDecision, Tier
from memtrain.planner.plan import Plan

_MIN_MOVED_BYTES = 4096  # below one page a copy costs more than the memory it frees


class ActivationExecutor:
    """Carries out ``plan.blocks`` on the blocks of a model.

    Args:
        model: for its parameters and buffers, which are never moved.
        blocks: ``(name, module)`` in forward order, one per decision of the plan.
        plan: decisions and staging sizes.
        engine: the stores of the tiers that the plan uses.

    Raises:
        PlanMismatchError: the plan decides for another number of blocks.
        OffloadError: the device refuses the staging memory; none of it stays.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[tuple[str, nn.Module]], plan: Plan, engine: Engine
    ) -> None:
        if len(plan.blocks) != len(blocks):
            raise PlanMismatchError(
                f"the plan decides for {len(plan.blocks)} blocks, the model has {len(blocks)}: "
                f"make a plan for this model"
            )
        self.device = engine.device
        self.fixed = FixedTensors(model)
        self.lock = threading.RLock()
        """One lock for groups, caches and this: backward may run in a thread of its own (CUDA)."""
        self._model = model
        self._engine = engine
        self._blocks = list(blocks)
        self._decisions = sorted(plan.blocks, key=lambda decision: decision.block)
        self._surveys = {
            name: BlockSurvey(name, module, decision, self.fixed.__contains__, exact_only=plan.exact_only)
            for (name, module), decision in zip(self._blocks, self._decisions, strict=True)
        }
        staging = plan.staging
        with ExitStack() as made:
            self.overlaid = shared = self._make_overlaid(made, plan)
            self._saved = self._make_cache(
                made, staging.saved_slots, staging.saved_slot_bytes, "saved", shared and shared.saved_offsets
            )
            self._input = self._make_cache(
                made, staging.input_slots, staging.input_slot_bytes, "input", shared and shared.input_offsets
            )
            self._kept = self._make_kept(made, staging.kept_bytes, plan.held_passes)
            self._caches = made.pop_all()
        self._groups: dict[int, weakref.ref[SavedGroup]] = {}
        self._retired: list[tuple[Any, Any, list[Ticket]]] = []
        self._dead: deque[tuple[int, Tier, Any, list[Ticket]]] = deque()
        """What dead groups left: sequence, tier, extent, transfers. Any thread may append, without a lock."""
        self._held: list[torch.Tensor] = []
        """What is held of the group that backward has reached: that group's own list."""
        self._before: list[weakref.ref[SavedGroup]] = []
        """Groups of the block that ran last."""
        self._newest: list[weakref.ref[SavedGroup]] = []
        """Groups of the block that runs."""
        self._has_told = False
        self._sequence = 0
        self.changed_bytes: Counter[Tier] = Counter()
        """Of saved tensors that have been sent to tiers so far."""
        self._hook: RemovableHandle | None = None
        self._originals: list[tuple[nn.Module, Callable[..., Any] | None]] = []

    def _make_cache(
        self, made: ExitStack, count: int, slot_bytes: int, name: str, offsets: Sequence[int] | None = None
    ) -> SlotCache | None:
        if not count or not slot_bytes:
            return None
        shared = None if offsets is None else self.overlaid
        cache = SlotCache(
            count,
            slot_bytes,
            name,
            self.lock,
            self.device,
            shared=shared,
            offsets=offsets,
            before_leaving=self.release_held,
        )
        made.callback(cache.close)
        return cache

    def _make_overlaid(self, made: ExitStack, plan: Plan) -> OverlaidSlab | None:
        """What slabs and rings are together, where the plan has them overlap."""
        if not (plan.staging.overlaid_bytes or plan.staging.update_overlaid_bytes):
            return None
        overlaid = OverlaidSlab(plan.staging, plan.held_passes)
        made.callback(overlaid.close)
        return overlaid

    def _make_kept(
        self, made: ExitStack, places_bytes: Sequence[int], passes: int
    ) -> dict[int, SlotCache | None]:
        """By block the slab that holds what stays of it on a CPU; blocks with equal places share one."""
        caches = {
            size: self._make_cache(made, count * passes, size, "kept", self._offsets(places_bytes, size))
            for size, count in Counter(places_bytes).items()
        }
        return {block: caches[size] for block, size in enumerate(places_bytes)}

    def _offsets(self, places_bytes: Sequence[int], size: int) -> list[int] | None:
        """Of the places of ``size`` in memory that is shared, the lowest first."""
        if self.overlaid is None:
            return None
        places = zip(places_bytes, self.overlaid.kept_offsets, strict=True)
        return [offset for nbytes, offsets in places if nbytes == size for offset in offsets]

    @property
    def token_probes(self) -> dict[str, TokenProbe]:
        """What was found out about the tokens of each block that has run and needed it, by name."""
        found = {name: survey.probe for name, survey in self._surveys.items()}
        return {name: probe for name, probe in found.items() if probe is not None}

    def high_water(self) -> tuple[HighWater, ...]:
        """What was used of the slots for activations so far: ring by ring, and slab by slab of what stays."""
        kept = dict.fromkeys(self._kept.values())  # blocks with equal places share one
        return tuple(cache.high_water() for cache in (self._saved, self._input, *kept) if cache is not None)

    # installing -------------------------------------------------------------------------------

    def install(self) -> None:
        """Route every decided block's forward through its action."""
        self._hook = self._model.register_forward_pre_hook(lambda *_: self.fixed.refresh())
        for (name, module), decision in zip(self._blocks, self._decisions, strict=True):
            original = module.__dict__.get("forward")
            self._originals.append((module, original))
            run = functools.partial(self._run, name, decision, original or module.forward)
            module.forward = functools.update_wrapper(run, module.forward)

    def remove(self) -> None:
        """Give the blocks their own forward back and release the staging memory. May be called twice, and
        where ``install`` never was.

        A graph that is still alive has lost its saved tensors: its backward raises.
        """
        self.release_held()
        if self._hook is not None:
            self._hook.remove()
        for module, original in self._originals:
            if original is None:
                del module.forward
            else:
                module.forward = original
        self._originals.clear()
        for group in self._living():
            group.abandon()
        self._groups.clear()
        with self._caches:
            self._sweep(patient=True)

    # forward ----------------------------------------------------------------------------------

    def _run(
        self, name: str, decision: BlockDecision, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        output = self._act(name, decision, forward, args, kwargs)
        self._limit_leaving()
        return output

    def _act(
        self,
        name: str,
        decision: BlockDecision,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if decision.action in (Action.KEEP, Action.SWAP):
            cache = self._saved if decision.action is Action.SWAP else self._kept.get(decision.block)
            group = self._open(cache, name, decision.saved_tier, shared_storages(args, kwargs))
            if group is None:
                return forward(*args, **kwargs)
            with abandoned_on_error([group]), torch.autograd.graph.saved_tensors_hooks(group.pack, unpack):
                output = forward(*args, **kwargs)
            group.seal()
            return output
        return self._recompute(name, decision, forward, args, kwargs)

    def _recompute(
        self,
        name: str,
        decision: BlockDecision,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        survey = self._surveys[name]
        parts = survey.parts(forward, args, kwargs)
        tiers = {decision.input_tier}
        if decision.action is not Action.RECOMPUTE:
            tiers.add(decision.saved_tier)
        if parts.is_cut:
            tiers.add(decision.rest_tier)
        groups = {
            tier: self._open(
                self._kept.get(decision.block) if tier is Tier.DEVICE else self._input, name, tier
            )
            for tier in sorted(tiers)
        }
        opened = [group for group in groups.values() if group is not None]
        with abandoned_on_error(opened):
            frame = RecomputeFrame(
                name,
                forward,
                args,
                kwargs,
                is_fixed=self.fixed.__contains__,
                pack_input=(pack_alone_into if parts.is_cut else pack_into)(groups[decision.input_tier]),
                unpack=unpack,
                tape=parts.tape(groups.get(decision.saved_tier)),
                cut=parts.cut(groups.get(decision.rest_tier), shared_storages(args, kwargs)),
            )
            with unchanged(name, survey.buffers()):
                output = frame.forward()
        for group in opened:
            group.seal()
        return output

    def _open(
        self, cache: SlotCache | None, name: str, tier: Tier, shared: frozenset[int] = frozenset()
    ) -> SavedGroup | None:
        """A group with a slot. None for the device tier where there is no slab, or none left: a program that
        holds more graphs at once than the plan foresaw then keeps tensors as plain PyTorch does."""
        if tier is Tier.DEVICE and (cache is None or not cache.has_room):
            if cache is not None and cache.is_taken:
                self._tell_of_gradients(name)
            return None
        assert cache is not None
        group = SavedGroup(self, cache, name, tier, shared)
        self._newest.append(weakref.ref(group))
        return group

    def _tell_of_gradients(self, name: str) -> None:
        """What stays of the block then has memory of its own, beside the plan."""
        if self._has_told:
            return
        self._has_told = True
        warnings.warn(
            f"gradients are still there (or optimizer state is being read) when {name} runs forward, in "
            "memory that the plan gives to what it saves; that now takes more than was planned. Call "
            "optimizer.zero_grad() and end the reading before the forward, or plan with options.overlay off",
            OverlayWarning,
            stacklevel=2,
        )

    def _limit_leaving(self) -> None:
        """A block has run: what the one before it sends away has left the device, or is waited for now.

        So never more than two blocks' tensors are on their way out, the one that is running included.
        """
        before, self._before, self._newest = self._before, self._newest, []
        if self.device.shares_memory:
            return
        for group in (reference() for reference in before):
            if group is not None:
                group.try_submit(patient=True)

    def movable(self, tensor: torch.Tensor) -> bool:
        """Whether swapping ``tensor`` is right and worth it."""
        return (
            type(tensor) in (torch.Tensor, nn.Parameter)
            and tensor.layout is torch.strided
            and tensor.device == self.device.place
            and not tensor.is_conj()
            and not tensor.is_neg()
            and tensor.numel() * tensor.element_size() >= _MIN_MOVED_BYTES
            and tensor not in self.fixed
        )

    # groups -----------------------------------------------------------------------------------

    def store(self, tier: Tier) -> Any:
        """The store of ``tier``."""
        return self._engine.store(tier)

    def reserve(self, tier: Tier, name: str, nbytes: int) -> Any:
        """Room for what block ``name`` sends to ``tier``. Raises TierFullError.

        The first one of a pass waits for what dead groups still move: then the room of all of them is one run
        again, in which this pass's extents follow each other without gaps, whatever their sizes. So the bytes
        that the plan counted are enough; the same bytes in several runs need not be.
        """
        if not any(group.has_extent for group in self._living()):
            self._sweep(patient=True)
        return self.store(tier).allocate(f"activations of {name}", nbytes)

    def next_sequence(self) -> int:
        """Creation order of groups."""
        with self.lock:
            self._sequence += 1
            return self._sequence

    def register(self, group: SavedGroup) -> None:
        """Remember a living group, weakly: the graph owns it."""
        with self.lock:
            self._groups[group.sequence] = weakref.ref(group)

    def _living(self) -> list[SavedGroup]:
        with self.lock:
            groups = (reference() for _, reference in sorted(self._groups.items()))
            return [group for group in groups if group is not None]

    def submit_ready(self) -> None:
        """Queue the writes of all sealed groups whose copies are done, oldest first."""
        self._sweep()
        for group in self._living():
            if not group.try_submit():
                break

    def hold(self, group: SavedGroup, base: torch.Tensor) -> None:
        """Backward reached ``group``: keep its bytes until the next group, and prefetch what follows.

        Several nodes of the block unpack from it one after the other; between two of them nothing else
        may refer to the slot's memory, yet it must not be given away.
        """
        if not self.device.shares_memory:
            self._copy_ahead(group)
        if self._held is group.holding:
            return
        self._held.clear()
        self._held = group.holding
        group.holding.append(base)
        for other in reversed(self._living()):
            if other.sequence < group.sequence and other.cache is group.cache and not other.prefetch():
                break

    def release_held(self) -> None:
        """Backward has left the last group."""
        self._held.clear()
        self._held = []

    def _copy_ahead(self, group: SavedGroup) -> None:
        """The next group starts for the device while ``group`` is worked on: two are there at most."""
        for other in reversed(self._living()):
            if other.sequence < group.sequence and other.tier is not Tier.DEVICE:
                other.come_ahead()
                return

    def retire(self, sequence: int, tier: Tier, extent: Any, tickets: list[Ticket]) -> None:
        """A group is gone: the sweep frees its extent once no transfer uses it (slots hold groups weakly).

        Takes no lock: the cycle collector calls it from whatever code of whatever thread it interrupts.
        """
        self._dead.append((sequence, tier, extent, tickets))

    def _sweep(self, *, patient: bool = False) -> None:
        """Free what dead groups left. Each is looked at once: a transfer that failed is reported once."""
        with self.lock:
            while self._dead:
                sequence, tier, extent, tickets = self._dead.popleft()
                self._groups.pop(sequence, None)
                if extent is not None:
                    self._retired.append((self.store(tier), extent, tickets))
            entries, self._retired = self._retired, []
            over = []
            for entry in entries:
                done = patient or all(ticket.done() for ticket in entry[2])
                (over if done else self._retired).append(entry)
            failure: OffloadError | None = None
            for store, extent, tickets in over:
                for ticket in tickets:
                    try:
                        ticket.wait()
                    except OffloadError as error:
                        failure = failure or error
                store.free(extent)
            if failure is not None:
                raise failure
