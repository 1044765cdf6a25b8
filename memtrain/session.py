"""The model and the optimizer under a plan, from ``prepare`` until ``close``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import nn

from memtrain.accumulation import accumulate
from memtrain.arena.passes import PlannedPasses
from memtrain.draws import Draws
from memtrain.endurance import WriteMeter, written_rows
from memtrain.forms import BlockForms
from memtrain.installing import (
    bring_gradients_back,
    make_gradient_slab,
    make_reclaimer,
    open_tiers,
    put_forms_on,
    put_guards_on,
    set_use_cache,
)
from memtrain.offload.activations import ActivationExecutor
from memtrain.offload.codec import Codec
from memtrain.offload.device import Device
from memtrain.offload.engine import Engine
from memtrain.offload.optimizer import OffloadedOptimizer, OptimizerConfig
from memtrain.offload.parameters import ParameterStreamer
from memtrain.offload.row_sparse import RowSparseOptimizer
from memtrain.offload.slab import HighWater
from memtrain.offload.store import Store
from memtrain.offload.stored_weights import StoredWeights
from memtrain.optim.autograd.causal_lm import ChunkedLossHandle
from memtrain.planner import resident
from memtrain.planner.actions import Tier
from memtrain.planner.machine import Budget, Machine
from memtrain.planner.plan import Plan
from memtrain.planner.profile import ModelProfile
from memtrain.reclaim import Reclaimer
from memtrain.refusals import overwrites_disk
from memtrain.report import form_facts, own_step_lines, recompute_facts, staging_lines, table
from memtrain.session_report import SessionMeter, coding_lines, comparison_lines, tier_lines, weight_lines
from memtrain.sparse_tables import SparseTables
from memtrain.streamed_models import stored_weights
from memtrain.tiling import carried_out, split_units, tiling_lines
from memtrain.weight_streaming import plan_units, stream_weights


class Session:
    """A model and an optimizer under a plan. Made by ``prepare``; a context manager.

    Attributes:
        model: the model that was given, with the plan installed.
        optimizer: stands for the one that was given; step this one.
        plan, profile, machine, budget: what was decided, and from what.
        engine: the stores of the tiers.
        writes: what steps write to the tiers, and how much of it had changed.
        weights: what streams weights that the plan has on tiers; None where all stay on the device.
        passes: what gives passes planned addresses; None with the default allocator.
        tables: embeddings that are used by rows; None without ``sparse_optimizer``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        plan: Plan,
        profile: ModelProfile,
        machine: Machine,
        device: Device,
        budget: Budget,
        config: OptimizerConfig,
        blocks: Sequence[tuple[str, nn.Module]],
        forms: BlockForms,
        chunked_loss: ChunkedLossHandle | None,
        codecs: Mapping[Tier, Codec],
        weight_codecs: Mapping[Tier, Codec],
        began_peak_bytes: int,
        spare_state_bytes: int,
        draws: Draws,
        allocator: str = "default",
        tables: SparseTables | None = None,
    ) -> None:
        self.model = model
        self._draws = draws
        self.tables = tables
        self.passes: PlannedPasses | None = None
        self._allocator = allocator
        self._codecs, self._weight_codecs = codecs, weight_codecs
        self._spare_state_bytes = spare_state_bytes if overwrites_disk(plan) else 0
        self.plan = plan
        self.profile = profile
        self.machine = machine
        self.budget = budget
        self._blocks = blocks
        self._undo = ExitStack()
        """How to take away what is installed below, in reverse; also when installing fails half-way."""
        with self._undo:
            self._install(optimizer, config, blocks, forms, chunked_loss, device)
            self._undo = self._undo.pop_all()
        self._meter = SessionMeter(device, began_peak_bytes, self._libraries_bytes)

    def _install(
        self,
        optimizer: torch.optim.Optimizer,
        config: OptimizerConfig,
        blocks: Sequence[tuple[str, nn.Module]],
        forms: BlockForms,
        chunked_loss: ChunkedLossHandle | None,
        device: Device,
    ) -> None:
        model, plan, profile, budget = self.model, self.plan, self.profile, self.budget
        undo = self._undo.callback
        if self.tables is not None:
            undo(self.tables.close)
        stored = stored_weights(model)
        undo(set_use_cache, model, set_use_cache(model, False))
        device.limit(budget.device_bytes - self._libraries_bytes)
        undo(device.limit, None)
        if chunked_loss is not None:
            undo(chunked_loss.uninstall)
        bypassing = put_forms_on(forms, blocks, plan, self._undo)
        resident.trim()
        self.engine: Engine = open_tiers(
            plan,
            budget,
            device,
            codecs=self._codecs,
            weight_codecs=self._weight_codecs,
            lent={store.tier: store for store in self._lent(stored)},
            spare_state_bytes=self._spare_state_bytes,
        )
        undo(self.engine.close)
        planned = plan_units(model, profile)
        units = split_units(model, planned)
        plan = carried_out(plan, planned, units)
        self._weights = stream_weights(
            model,
            blocks,
            units,
            plan=plan,
            profile=profile,
            engine=self.engine,
            stored=stored,
            undo=self._undo,
        )
        self._activations = ActivationExecutor(model, blocks, plan, self.engine)
        undo(self._activations.remove)
        self.optimizer = OffloadedOptimizer(
            optimizer,
            engine=self.engine,
            plan=plan,
            units=units,
            config=config,
            weights=self._weights,
            tables=self.sparse_optimizer,
            overlaid=self._activations.overlaid,
        )
        undo(self.optimizer.close)
        undo(self._bring_gradients_back)
        if plan.staging.gradient_slab_bytes:
            undo(make_gradient_slab(plan, profile, self.optimizer, self._activations.overlaid).close)
        self._activations.install()
        if self._allocator == "planned":
            self.passes = PlannedPasses.of_session(self, blocks)
            undo(self.passes.remove)
        put_guards_on(model, blocks, plan, units, self.optimizer, bypassing, self._undo)
        self._reclaimer: Reclaimer | None = None
        if self.machine.on_cpu:
            self._reclaimer = make_reclaimer(model, blocks, self.optimizer, self.plan, profile, self.passes)
            undo(self._reclaimer.remove)
        self.writes = WriteMeter(self.engine, plan, self.optimizer, self._activations, self.tables)
        undo(self.optimizer.register_step_post_hook(self._note_step).remove)

    def _lent(self, stored: StoredWeights | None) -> list[Store]:
        """Stores that were open before the session."""
        stores = [] if stored is None else [stored.store]
        return stores + ([] if self.tables is None else [self.tables.store])

    @property
    def sparse_optimizer(self) -> RowSparseOptimizer | None:
        """Stands for the one that was given, for schedulers and ``state_dict()``; ``optimizer.step()`` and
        ``optimizer.zero_grad()`` are its too. None where none was given."""
        return None if self.tables is None else self.tables.optimizer

    def _bring_gradients_back(self) -> None:
        self.flush()
        bring_gradients_back(self.model)

    @property
    def weights(self) -> ParameterStreamer | None:
        """What brings weights that are on tiers; None where all are in memory."""
        return self._weights

    def accumulate(
        self, batches: Iterable[Any], loss_fn: Callable[[Any, Any], torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        """Forward and backward of all micro-batches of one optimizer step, in the plan's order.

        Gradients are those of the mean of the losses, bit for bit what this loop adds up:
        ``for batch in batches: (loss(batch) / len(batches)).backward()``, and so are random numbers that are
        drawn, as by dropout, and the generators afterwards. In vertical order a step with a batch of a new
        shape then runs as that loop, which counts what is drawn (``memtrain.draws``).

        Args:
            batches: as ``sample_batch`` of ``prepare``; in vertical order ``plan.micro_batches`` at most.
            loss_fn: ``loss_fn(output, batch)``; None: ``output.loss``.

        Returns:
            The losses, detached, in the order of ``batches``.

        Raises:
            ValueError: no batches, or no gradients may be made here.
            PlanMismatchError: more batches than vertical order was planned for.
            RandomDrawsError: in vertical order a batch draws more or fewer random numbers than one of equal
                shapes did.
            OffloadError: a tier failed; or vertical order cannot be exact, for what the message names.
        """
        place = self.engine.device.place
        waits = (lambda: None) if self._reclaimer is None else self._reclaimer.leave
        return accumulate(self.model, self._blocks, self.plan, batches, loss_fn, place, self._draws, waits)

    def flush(self) -> None:
        """Finish an update that runs ahead of the next forward.

        Needed before weights are read or changed through a reference that was taken earlier; forward,
        ``parameters()``, ``state_dict()`` and ``load_state_dict()`` of any module do it themselves.
        """
        if self.passes is not None:
            self.passes.vacate()
        self.optimizer.flush()

    # measuring --------------------------------------------------------------------------------

    def _note_step(self, *_: Any) -> None:
        self._meter.note_step()
        self.writes.note_step()

    def measure(self) -> dict[str, float]:
        """Predicted and measured peak and step time.

        ``peak_bytes`` is the device's peak since ``prepare`` returned; ``process_peak_bytes`` also covers
        loading and profiling. On a GPU both are what torch's allocator had reserved, and what the libraries
        hold. ``step_seconds`` is the median distance between the ends of two steps, the first left out; NaN
        before there is one.
        """
        return self._meter.measure(self.plan, self.budget)

    def device_peak_bytes(self) -> int:
        """The device's peak since ``prepare`` returned, or since its ``reset_peak`` was called."""
        return self._meter.peak_bytes()

    def device_used_bytes(self) -> int:
        """What the job occupies of the device now."""
        return self._meter.used_bytes()

    @property
    def _libraries_bytes(self) -> int:
        """Context and libraries on a GPU, of which its allocator knows nothing."""
        return 0 if self.machine.on_cpu else self.profile.baseline_bytes

    def report(self) -> str:
        """Prediction beside measurement, for people."""
        lines = comparison_lines(self.measure())
        seen = {name: probe.difference for name, probe in self._activations.token_probes.items()}
        lines += [*form_facts(self.plan, self.profile), *recompute_facts(self.plan, self.profile, seen)]
        if self._reclaimer is not None:
            lines.append(self._reclaimer.line())
        lines += [] if self.passes is None else self.passes.lines()
        lines += [*weight_lines(self.weights), *tiling_lines(self.model), *self._draws.lines()]
        lines += [] if self.tables is None else self.tables.lines()
        lines += tier_lines(self.engine)
        if written := self.writes.per_step():
            lines.append(table(*written_rows(written)))
        lines += own_step_lines(self.optimizer.refused_one_pass())
        lines += staging_lines(self.high_water())
        return "\n".join(lines + self.coding_lines())

    def high_water(self) -> tuple[HighWater, ...]:
        """The most that was used of each ring of staging slots, of each slab of activations that stay, and of
        the windows of each size for weights."""
        windows = () if self.weights is None else self.weights.high_water()
        return (*self._activations.high_water(), *self.optimizer.high_water(), *windows)

    def coding_lines(self) -> list[str]:
        """What coding has done so far, a line for each tier and kind; none without a codec."""
        return coding_lines(self.engine)

    # ending -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Make the model plain PyTorch again, bit for bit, and give all tiers back. May be called twice.

        A pending update is finished. Gradients that had left become ordinary tensors, and weights that had
        left are in memory again; those of a streamed model go back to its tier, and its tables stay there.
        Optimizer state is not
        brought back into memory: take ``optimizer.state_dict()`` or a checkpoint before.
        """
        self._undo.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
