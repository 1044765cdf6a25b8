"""``prepare``: from a model, an optimizer and a budget to training that stays inside it.

    session = memtrain.prepare(model, optimizer, sample_batch, budget=budget)
    for batch in loader:
        loss = session.model(**batch).loss
        loss.backward()
        session.optimizer.step(); session.optimizer.zero_grad()

The loop is an ordinary one. What the session adds to the model (hooks, wrapped forwards, the chunked loss)
``close`` takes away again.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from memtrain.accumulation import RandomWatch, accumulate
from memtrain.arena import library as arena_library
from memtrain.arena.passes import ALLOCATORS, PlannedPasses
from memtrain.coding import codecs_for, coding_text, refuse_other_codecs
from memtrain.copy_guard import CopyGuard, is_planned
from memtrain.endurance import WriteMeter, written_rows
from memtrain.forms import BlockForms
from memtrain.largest_layer import with_largest_layer
from memtrain.offload.activations import ActivationExecutor
from memtrain.offload.codec import Codec
from memtrain.offload.device import Device, make_device
from memtrain.offload.engine import Engine, open_engine
from memtrain.offload.errors import PlanMismatchError
from memtrain.offload.gradient_slab import GradientSlab
from memtrain.offload.in_backward import guard_modules, is_applied, refuse_combination
from memtrain.offload.measure import measure_machine
from memtrain.offload.offloaded_grad import OffloadedGrad
from memtrain.offload.optimizer import OffloadedOptimizer, OptimizerConfig
from memtrain.offload.optimizer_probe import is_elementwise
from memtrain.offload.parameters import ParameterStreamer
from memtrain.offload.shards import Unit
from memtrain.offload.slab import HighWater
from memtrain.offload.stored_weights import StoredWeights
from memtrain.optim.autograd.causal_lm import ChunkedLossHandle, install_chunked_loss
from memtrain.optim.autograd.treatments import ChangedModuleError
from memtrain.optim.grid import GridOptimizer
from memtrain.optim.kernels import native
from memtrain.planner import resident
from memtrain.planner.actions import EXACT, PLAIN, MicroBatchOrder, Tier, UpdateSchedule
from memtrain.planner.check import check
from memtrain.planner.decisions import PlannerOptions, gradients_come_and_go
from memtrain.planner.machine import Budget, Machine
from memtrain.planner.plan import Plan
from memtrain.planner.profile import ModelProfile
from memtrain.planner.solve import make_plan
from memtrain.planner.trace import profile_model
from memtrain.planner.tracing.blocks import find_blocks
from memtrain.planner.units import MiB, format_gib
from memtrain.reclaim import Reclaimer, transients_of
from memtrain.rehearsal import BlockRehearsal
from memtrain.report import form_facts, recompute_facts, staging_lines, table
from memtrain.runfiles import make_folder, write_text
from memtrain.streamed_model import bring_home, stored_weights
from memtrain.streamed_tracing import TracedWeights, traced_weights
from memtrain.tiling import carried_out, split_units, tiles_of, tiling_lines, windows_in_tiles
from memtrain.weight_guard import WeightGuard

_ARENA_ALLOWANCE = 1.125
"""Of the planned peak, where the budget has as much: a program may hold more graphs at once than the plan
foresaw. What was foreseen fits without: state and gradients, which stay, are reserved first, and what a pass
over the blocks saves comes and goes behind them."""
_WARM_UP_STEPS = 1  # the first step creates state and touches memory for the first time


class PrepareError(ValueError):
    """What ``prepare`` was given does not fit together; the message names it and the remedy."""


class InfeasibleError(RuntimeError):
    """No plan fits the budget.

    Attributes:
        plan: its ``shortfall_bytes`` says what is short, ``remedies`` what would help, the cheapest first.
    """

    def __init__(self, plan: Plan) -> None:
        short = ", ".join(
            f"{tier.value} by {size} bytes ({format_gib(size)})" for tier, size in plan.shortfall_bytes
        )
        remedies = "; or ".join(plan.remedies) or "none known"
        super().__init__(f"the budget cannot work: short of {short or 'memory'}. Remedies: {remedies}")
        self.plan = plan


def prepare(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    sample_batch: Any,
    *,
    budget: Budget,
    micro_batches: int = 1,
    master_weights: bool = False,
    nonfinite: str = "ignore",
    plan: Plan | None = None,
    options: PlannerOptions | None = None,
    machine: Machine | None = None,
    block_names: Sequence[str] | None = None,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    chunked_loss: bool = True,
    codecs: Mapping[str, str] | None = None,
    directory: Path | str | None = None,
    reached_bytes: int = 0,
    spare_state_bytes: int = 0,
    allocator: str = "default",
) -> Session:
    """Profile ``model``, plan, and install the plan.

    Args:
        model: any Hugging Face causal LM with repeated blocks, or an ``nn.Module`` with repeated blocks; its
            weights are where it is to be trained, on the CPU or on one CUDA device.
        optimizer: over the model's parameters; state that it already has is taken over.
        sample_batch: the largest batch that will be used: a mapping (``model(**batch)``), a tuple
            (``model(*batch)``) or a tensor. Where the forward passes run under ``torch.autocast``, call this
            inside the same context: other tensors are saved under it.
        budget: bytes that the job may use in each tier. On a CPU, ``device`` is the whole process. Beside a
            GPU, ``host`` covers what is sent there and all staging memory.
        micro_batches: forward-backward passes per optimizer step (gradient accumulation).
        master_weights: keep fp32 masters of bf16 or fp16 weights, and update those with fp32 gradients.
        nonfinite: what ``optimizer.step()`` does about NaN or inf gradients: ``ignore`` as PyTorch does,
            ``skip`` the step, or ``raise``.
        plan: use this one instead of solving; it must fit the profile that is measured now.
        options: limits of the search, and what the planner may choose. Updates during backward only where
            ``options.update_schedule`` or ``options.gradients_untouched`` says so: whether the loop clips
            gradients is not known here.
        machine: instead of the measured one.
        block_names: the repeated blocks, or their container, where they are not found automatically.
        loss_fn: ``loss_fn(output, batch)``, for a model whose output carries no loss; used to profile.
        chunked_loss: for a causal LM with labels in the batch, compute the loss by chunks of tokens, so that
            the logits are never whole in memory.
        codecs: by tier the codec of optimizer state that waits there, such as ``{"nvme": "exponent"}``:
            exact, for fewer bytes written; the plan counts its seconds and memory. None: state lies as it is.
        directory: where the planned run writes its files; profile and plan are left there when given.
        reached_bytes: the most that the job has occupied of the device before this call, where the budget is
            to cover that too: a smaller one is then infeasible. What this call itself takes always counts.
        spare_state_bytes: of the nvme budget, to be left beyond the plan for optimizer state and weights that
            a snapshot still needs (``AsyncCheckpointer``); reserved where the plan keeps either there.
        allocator: ``planned`` gives what passes and updates ask for addresses that were packed, once it is
            known (``memtrain.arena.passes``), on a CPU, in horizontal order of micro-batches; ``default``
            leaves it to the process's allocator.

    Raises:
        InfeasibleError: no plan fits.
        PlanMismatchError: ``plan`` was made for another model or budget.
        BlocksNotFoundError, UnsupportedHeadError, UnsupportedOptimizerError: what is not supported, by name.
        OffloadError: a tier cannot serve.
        BudgetError: the budget gives a tier that the machine does not have.
        RunFileError: a file of ``directory`` cannot be written.
        PrepareError: a session of the model is open; the allocator is unknown, or planned and the model not
            on a CPU or the order of micro-batches vertical; gradient checkpointing is on; apply_to() has
            treated what a session watches; parameters are on several devices, on one that is neither a CPU
            nor a CUDA device, or not on that of ``machine``.
        CodecError: a codec is unknown, for a tier without a budget, or not the one that ``machine`` was
            measured with.
        MissingZstandardError: a codec's library is not installed.
        OrderError: vertical order of micro-batches was asked for with nothing to order, or for a model whose
            forward draws random numbers.
    """
    coding = codecs_for(codecs or {}, budget)
    _refuse_in_backward(options, plan, nonfinite)
    if is_planned(model) or isinstance(optimizer, OffloadedOptimizer):
        raise PrepareError(
            "the model or the optimizer belongs to a session that is open: close it with session.close() "
            "before preparing again, and pass the optimizer that was given to it, not session.optimizer"
        )
    if any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules()):
        raise PrepareError(
            "the model has its own gradient checkpointing switched on, which would work against the plan: "
            "call model.gradient_checkpointing_disable() first; the plan recomputes where that is best"
        )
    place = _device_of(model)
    device = make_device(str(place) if machine is None else machine.device)
    if device.place != place:
        assert machine is not None
        raise PrepareError(
            f"the model is on {place}, machine {machine.name} computes on {machine.device}: move the model "
            f"there with model.to(), or plan for a machine whose device is {place}"
        )
    if allocator not in ALLOCATORS or (allocator == "planned" and place.type != "cpu"):
        raise PrepareError(
            f"allocator is {allocator!r} for a model on {place}: give one of {', '.join(ALLOCATORS)}; "
            "planned is for models on the CPU"
        )
    if allocator == "planned":
        options = _in_one_thread(options or PlannerOptions(), plan)
        arena_library.compile_ahead()
    if place.type == "cpu" and isinstance(optimizer, GridOptimizer):
        native.compile_missing()  # not inside the budget: a compiler takes more than many a slack
    resident.limit_heap()
    resident.trim()
    resident.drop_library_pages()  # what is measured from here on is what a step uses
    peak = _PeakSinceNow(device)
    blocks = find_blocks(model, block_names)
    handle: ChunkedLossHandle | None = None
    try:
        if machine is None:
            machine = measure_machine(
                budget.nvme_directory if budget.nvme_bytes else None,
                device=str(place),
                host=budget.host_place,
                cxl=budget.cxl_place,
                codecs=coding,
            )
        refuse_other_codecs(machine, coding, budget)
        work = torch.float32 if master_weights else None
        options = options or PlannerOptions()
        if (stored := stored_weights(model)) is not None:  # on one tier: another one is no choice
            options = dataclasses.replace(options, weight_tiers=(stored.store.tier,))
        elementwise = all(
            is_elementwise(optimizer, group, work or group["params"][0].dtype)
            for group in optimizer.param_groups
        )
        with _weights_brought(model, blocks, device) as weights:
            if chunked_loss:
                handle = _install_loss(model, sample_batch, weights)
            installed = nullcontext() if weights is None else weights.installed()
            with installed, RandomWatch().watching(model, place) as random_watch:
                forms = _find_forms(model, blocks, sample_batch, options, weights)
                profile = profile_model(
                    model,
                    sample_batch,
                    optimizer=optimizer,
                    elementwise=elementwise,
                    micro_batches=micro_batches,
                    master_weights=master_weights,
                    loss_fn=loss_fn,
                    block_names=block_names,
                    rehearsal=BlockRehearsal(model, forms),
                    weights=weights,
                    window_bytes=windows_in_tiles(model),
                )
        libraries_bytes = 0 if machine.on_cpu else profile.baseline_bytes
        profile = dataclasses.replace(
            profile, prepare_peak_bytes=max(reached_bytes, peak.known_bytes(libraries_bytes))
        )
        options = random_watch.possible(options)
        if plan is None:
            plan = make_plan(profile, machine, budget, options=options)
        if plan.status == "infeasible":
            raise InfeasibleError(with_largest_layer(plan, profile, model))
        broken = check(plan, profile, machine, budget)
        if broken:
            raise PlanMismatchError(
                "the plan does not hold for this model, machine and budget: "
                + "; ".join(map(str, broken[:3]))
            )
        _check_spare(plan, budget, spare_state_bytes)
        if directory is not None:
            _write(Path(directory), profile=profile.to_json(), machine=machine.to_json(), plan=plan.to_json())
        return Session(
            model,
            optimizer,
            plan=plan,
            profile=profile,
            machine=machine,
            device=device,
            budget=budget,
            config=OptimizerConfig(
                master_weights=master_weights, nonfinite=nonfinite, elementwise=profile.elementwise
            ),
            blocks=blocks,
            forms=forms,
            chunked_loss=handle,
            codecs=coding,
            began_peak_bytes=peak.before_bytes,
            spare_state_bytes=spare_state_bytes,
            allocator=allocator,
        )
    except BaseException as error:
        if handle is not None:
            handle.uninstall()
        if isinstance(error, ChangedModuleError):
            raise PrepareError(
                f"{error}. A session watches modules that apply_to() passes by: call revert(model) first. "
                "The plan has the exact form of blocks itself, and lossy ones by options.allow_lossy"
            ) from error
        raise


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
        began_peak_bytes: int,
        spare_state_bytes: int,
        allocator: str = "default",
    ) -> None:
        self.model = model
        self.passes: PlannedPasses | None = None
        self._allocator = allocator
        self._codecs = codecs
        self._spare_state_bytes = spare_state_bytes if _overwrites_disk(plan) else 0
        self.plan = plan
        self.profile = profile
        self.machine = machine
        self.budget = budget
        self._blocks = blocks
        self._step_ends: list[float] = []
        self._undo = ExitStack()
        """How to take away what is installed below, in reverse; also when installing fails half-way."""
        with self._undo:
            self._install(optimizer, config, blocks, forms, chunked_loss, device)
            self._undo = self._undo.pop_all()
        self._prepared_peak_bytes = max(began_peak_bytes, device.peak_bytes())
        device.reset_peak()

    def _install(
        self,
        optimizer: torch.optim.Optimizer,
        config: OptimizerConfig,
        blocks: Sequence[tuple[str, nn.Module]],
        forms: BlockForms,
        chunked_loss: ChunkedLossHandle | None,
        device: Device,
    ) -> None:
        model, plan, budget = self.model, self.plan, self.budget
        undo = self._undo.callback
        stored = stored_weights(model)
        undo(_set_use_cache, model, _set_use_cache(model, False))
        device.limit(budget.device_bytes - self._libraries_bytes)
        undo(device.limit, None)
        if chunked_loss is not None:
            undo(chunked_loss.uninstall)
        bypassing: list[nn.Module] = []
        for (name, _), decision in zip(blocks, plan.blocks, strict=True):
            if decision.form != PLAIN:
                undo(forms.take_off, name)
                forms.put_on(name, decision.form)
                bypassing += forms.bypassing(name, decision.form)
        resident.trim()
        staged = sum(
            line.size_bytes for line in plan.bill if (line.tier, line.category) == (Tier.HOST, "staging")
        )
        sent = {
            tier: int((plan.peak(tier) - size) * _ARENA_ALLOWANCE)
            for tier, size in ((Tier.NVME, 0), (Tier.HOST, staged))
        }
        sent[Tier.NVME] += self._spare_state_bytes
        self.engine: Engine = open_engine(
            budget,
            device,
            nvme_bytes=min(sent[Tier.NVME], budget.nvme_bytes) if budget.nvme_bytes else None,
            host_bytes=min(sent[Tier.HOST], budget.host_bytes - staged),
            codecs=self._codecs,
            lent={stored.store.tier: stored.store} if stored is not None else None,
        )
        undo(self.engine.close)
        planned = _units(model, self.profile)
        units = split_units(model, planned)
        self._carried = plan = carried_out(plan, planned, units)
        self._weights = self._stream_weights(blocks, units, stored)
        self._activations = ActivationExecutor(model, blocks, plan, self.engine)
        undo(self._activations.remove)
        self.optimizer = OffloadedOptimizer(
            optimizer, engine=self.engine, plan=plan, units=units, config=config, weights=self._weights
        )
        undo(self.optimizer.close)
        undo(self._bring_gradients_back)
        if plan.staging.gradient_slab_bytes:
            undo(self._make_gradient_slab().close)
        self._activations.install()
        if self._allocator == "planned":
            self.passes = PlannedPasses.of_session(self, blocks)
            undo(self.passes.remove)
        undo(CopyGuard(model).remove)
        if plan.update_schedule is UpdateSchedule.IN_BACKWARD:
            for hook in guard_modules(
                [model, *(block for _, block in blocks)], self.optimizer.refuse_half_done
            ):
                undo(hook.remove)
        if plan.update_schedule is UpdateSchedule.AHEAD:
            guard = WeightGuard(
                model,
                blocks,
                units,
                self.optimizer.ensure,
                bypassing=bypassing,
                tiles=tiles_of(model),
            )
            undo(guard.remove)
        self._reclaimer = self._make_reclaimer(blocks) if self.machine.on_cpu else None
        if self._reclaimer is not None:
            undo(self._reclaimer.remove)
        self.writes = WriteMeter(self.engine, plan, self.optimizer, self._activations)
        undo(self.optimizer.register_step_post_hook(self._note_step).remove)

    @property
    def weights(self) -> ParameterStreamer | None:
        """What brings weights that are on tiers; None where all are in memory."""
        return self._weights

    def _stream_weights(
        self, blocks: Sequence[tuple[str, nn.Module]], units: Sequence[Unit], stored: StoredWeights | None
    ) -> ParameterStreamer | None:
        """Weights that the plan has on tiers leave, and come when they are used; None where all stay."""
        tiers = {decision.unit: decision.weight_tier for decision in self._carried.states}
        if stored is not None:
            for unit, members in units:
                if tiers[unit] is Tier.DEVICE:
                    bring_home(stored, members)
                elif tiers[unit] is not stored.store.tier:
                    raise PlanMismatchError(
                        f"the plan has the weights of {unit} on {tiers[unit].value}, those of this streamed "
                        f"model are on {stored.store.tier.value}: plan with options.force "
                        f'{{"state": {{"weight_tier": "{stored.store.tier.value}"}}}}, or stream the model '
                        "with a budget of one tier"
                    )
        if all(tier is Tier.DEVICE for tier in tiers.values()):
            return None
        staging = self.plan.staging
        streamer = ParameterStreamer(
            self.model,
            blocks,
            units,
            tiers=tiers,
            engine=self.engine,
            slots=staging.weight_slots,
            borrowed={name for unit in self.profile.units if unit.block is None for name in unit.borrows},
            placed=None if stored is None else stored.extents,
            tiles=tiles_of(self.model),
        )
        if stored is None:
            self._undo.callback(streamer.remove)
        else:
            self._undo.callback(lambda: stored.take_back(streamer.release()))
        if streamer.window_bytes != staging.weight_slot_bytes:
            raise PlanMismatchError(
                f"the plan has windows of {staging.weight_slot_bytes} bytes for weights, this model needs "
                f"{streamer.window_bytes}: make a plan for this model"
            )
        streamer.install()
        resident.trim()  # of what the weights took
        return streamer

    def _make_reclaimer(self, blocks: Sequence[tuple[str, nn.Module]]) -> Reclaimer:
        return Reclaimer(
            self.model,
            blocks,
            self.optimizer,
            limit_bytes=self.plan.peak(Tier.DEVICE),
            transients=transients_of(self.plan, self.profile),
            rss_bytes=resident.rss_bytes if self.passes is None else self.passes.occupied_bytes,
        )

    def _make_gradient_slab(self) -> GradientSlab:
        return GradientSlab(
            index=self.optimizer.index,
            tiers={decision.unit: decision.gradient_tier for decision in self._carried.states},
            slab_bytes=self.plan.staging.gradient_slab_bytes,
            before_overwrite=self.optimizer.ensure,
            one_unit_at_a_time=gradients_come_and_go(self.profile, self.plan.update_schedule),
        )

    def accumulate(
        self, batches: Iterable[Any], loss_fn: Callable[[Any, Any], torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        """Forward and backward of all micro-batches of one optimizer step, in the plan's order.

        Gradients are those of the mean of the losses, bit for bit what this loop adds up:
        ``for batch in batches: (loss(batch) / len(batches)).backward()``.

        Args:
            batches: as ``sample_batch`` of ``prepare``; in vertical order ``plan.micro_batches`` at most.
            loss_fn: ``loss_fn(output, batch)``; None: ``output.loss``.

        Returns:
            The losses, detached, in the order of ``batches``.

        Raises:
            ValueError: no batches, or no gradients may be made here.
            PlanMismatchError: more batches than vertical order was planned for.
            OffloadError: a tier failed; or vertical order cannot be exact, for what the message names.
        """
        return accumulate(self.model, self._blocks, self.plan, batches, loss_fn, self.engine.device.place)

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
        self._step_ends.append(time.perf_counter())
        self.writes.note_step()

    def measure(self) -> dict[str, float]:
        """Predicted and measured peak and step time.

        ``peak_bytes`` is the device's peak since ``prepare`` returned; ``process_peak_bytes`` also covers
        loading and profiling. On a GPU both are what torch's allocator had reserved, and what the libraries
        hold. ``step_seconds`` is the median distance between the ends of two steps, the first left out; NaN
        before there is one.
        """
        peak = self.device_peak_bytes()
        process = max(peak, self._prepared_peak_bytes + self._libraries_bytes)
        ends = self._step_ends[_WARM_UP_STEPS:]
        seconds = [b - a for a, b in itertools.pairwise(ends)]
        return {
            "predicted_peak_bytes": self.plan.peak(Tier.DEVICE),
            "peak_bytes": peak,
            "process_peak_bytes": process,
            "budget_bytes": self.budget.device_bytes,
            "predicted_step_seconds": self.plan.step_seconds,
            "step_seconds": statistics.median(seconds) if seconds else float("nan"),
            "steps": len(self._step_ends),
        }

    def device_peak_bytes(self) -> int:
        """The device's peak since ``prepare`` returned, or since its ``reset_peak`` was called."""
        return self.engine.device.peak_bytes() + self._libraries_bytes

    def device_used_bytes(self) -> int:
        """What the job occupies of the device now."""
        return self.engine.device.used_bytes() + self._libraries_bytes

    @property
    def _libraries_bytes(self) -> int:
        """Context and libraries on a GPU, of which its allocator knows nothing."""
        return 0 if self.machine.on_cpu else self.profile.baseline_bytes

    def report(self) -> str:
        """Prediction beside measurement, for people."""
        found = self.measure()
        rows: list[tuple[str, float, float, Callable[[float], str]]] = [
            ("peak", found["predicted_peak_bytes"], found["peak_bytes"], lambda v: format_gib(int(v))),
            ("step", found["predicted_step_seconds"], found["step_seconds"], lambda v: f"{v:.3f} s"),
        ]
        lines = [f"{'':6}{'predicted':>14}{'measured':>14}{'error':>9}"]
        for name, predicted, measured, show in rows:
            if measured != measured:
                lines.append(f"{name:6}{show(predicted):>14}{'not yet':>14}")
                continue
            error = (predicted - measured) / measured
            lines.append(f"{name:6}{show(predicted):>14}{show(measured):>14}{error:>+9.1%}")
        lines.append(f"budget {format_gib(self.budget.device_bytes)}, steps {int(found['steps'])}")
        seen = {name: probe.difference for name, probe in self._activations.token_probes.items()}
        lines += [*form_facts(self.plan, self.profile), *recompute_facts(self.plan, self.profile, seen)]
        if self._reclaimer is not None:
            lines.append(f"freed memory asked back {self._reclaimer.times} times")
        lines += [] if self.passes is None else self.passes.lines()
        lines += [*self._weight_lines(), *tiling_lines(self.model)]
        for tier, statistics_ in self.engine.statistics().items():
            lines.append(
                f"{tier.value}: read {format_gib(statistics_.bytes_read)}, "
                f"wrote {format_gib(statistics_.bytes_written)}"
            )
        if written := self.writes.per_step():
            lines.append(table(*written_rows(written)))
        lines += staging_lines(self.high_water())
        return "\n".join(lines + self.coding_lines())

    def _weight_lines(self) -> list[str]:
        if self.weights is None:
            return []
        found = self.weights.statistics()
        return [
            f"weights of {len(self.weights.streamed)} units streamed through {found.windows} windows of "
            f"{found.window_bytes / MiB:.1f} MiB: {found.reads} reads, {found.waits} of them waited for; "
            f"read {format_gib(found.bytes_read)}, wrote {format_gib(found.bytes_written)}"
        ]

    def high_water(self) -> tuple[HighWater, ...]:
        """The most that was used of each ring of staging slots, and of each slab of activations that stay."""
        return (*self._activations.high_water(), *self.optimizer.high_water())

    def coding_lines(self) -> list[str]:
        """What coding optimizer state has done so far, a line for each tier; none without a codec."""
        done = self.engine.coding_statistics()
        return [coding_text(tier, self._codecs[tier].name, found) for tier, found in done.items()]

    # ending -----------------------------------------------------------------------------------

    def close(self) -> None:
        """Make the model plain PyTorch again, bit for bit, and give all tiers back. May be called twice.

        A pending update is finished. Gradients that had left become ordinary tensors, and weights that had
        left are in memory again; those of a streamed model go back to its tier. Optimizer state is not
        brought back into memory: take ``optimizer.state_dict()`` or a checkpoint before.
        """
        self._undo.close()

    def _bring_gradients_back(self) -> None:
        self.flush()
        for parameter in self.model.parameters():
            if is_applied(parameter.grad):
                parameter.grad = None
            elif isinstance(parameter.grad, OffloadedGrad):
                parameter.grad = parameter.grad.materialize()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _PeakSinceNow:
    """The device's peak from here on, told apart from an older one, which is somebody else's."""

    def __init__(self, device: Device) -> None:
        self.before_bytes = device.peak_bytes()
        self._device, self._set_back = device, device.reset_peak()

    def known_bytes(self, libraries_bytes: int) -> int:
        """The peak, with what the device's own figure leaves out; 0 where an older and larger one could not
        be set back and hides it."""
        now_bytes = self._device.peak_bytes()
        known = self._set_back or now_bytes > self.before_bytes
        return now_bytes + libraries_bytes if known else 0


def _device_of(model: nn.Module) -> torch.device:
    devices = {parameter.device for parameter in model.parameters()}
    names = ", ".join(sorted(map(str, devices))) or "no device, for it has none"
    if len(devices) != 1 or {device.type for device in devices} - {"cpu", "cuda"}:
        raise PrepareError(
            f"the model's parameters are on {names}: memtrain trains on the CPU or on one CUDA device; move "
            f"all of the model there with model.to()"
        )
    return next(iter(devices))


def _weights_brought(
    model: nn.Module, blocks: Sequence[tuple[str, nn.Module]], device: Device
) -> AbstractContextManager[TracedWeights | None]:
    """For a streamed model, what brings its weights while it is measured."""
    stored = stored_weights(model)
    if stored is None or not stored.extents:
        return nullcontext()
    return traced_weights(model, blocks, stored, device)


def _find_forms(
    model: nn.Module,
    blocks: Sequence[tuple[str, nn.Module]],
    sample_batch: Any,
    options: PlannerOptions,
    weights: TracedWeights | None,
) -> BlockForms:
    """The exact form always, lossy ones where the options name them. Raises PrepareError for a wrong name."""
    present = None if weights is None else weights.present_in
    try:
        return BlockForms(model, blocks, sample_batch, (EXACT, *options.allow_lossy), present=present)
    except ValueError as error:
        raise PrepareError(f"options.allow_lossy: {error}") from error


def _refuse_in_backward(options: PlannerOptions | None, plan: Plan | None, nonfinite: str) -> None:
    """Raises PlanMismatchError where updates may come during backward, and gradients are looked at first."""
    chosen = plan.update_schedule.value if plan is not None else options and options.update_schedule
    offered = plan is None and options is not None and options.gradients_untouched
    if offered or chosen == UpdateSchedule.IN_BACKWARD.value:
        refuse_combination(nonfinite)


def _in_one_thread(options: PlannerOptions, plan: Plan | None) -> PlannerOptions:
    """``options`` without the order in which several passes are under way at once: addresses are planned for
    one, and the others would find their memory beside an arena that is resident.

    Raises:
        PrepareError: that order was asked for.
    """
    chosen = options.micro_batch_order if plan is None else plan.micro_batch_order.value
    if chosen == MicroBatchOrder.VERTICAL.value:
        raise PrepareError(
            "allocator is 'planned', and micro-batches are to pass the blocks together (micro_batch_order "
            "vertical): addresses are planned for one pass at a time. Use allocator 'default', or "
            "micro_batch_order 'horizontal'"
        )
    return dataclasses.replace(options, micro_batch_order=MicroBatchOrder.HORIZONTAL.value)


def _overwrites_disk(plan: Plan) -> bool:
    return any(Tier.NVME in (state.optimizer_tier, state.weight_tier) for state in plan.states)


def _check_spare(plan: Plan, budget: Budget, spare_bytes: int) -> None:
    """Raises PrepareError where the plan leaves less of the nvme budget."""
    free = budget.nvme_bytes - plan.peak(Tier.NVME)
    if spare_bytes > free and _overwrites_disk(plan):
        raise PrepareError(
            f"{spare_bytes} bytes of nvme are to be spared for snapshots, the plan leaves {free} of "
            f"{budget.nvme_bytes}: raise budget.nvme by {spare_bytes - free} bytes, or spare less"
        )


def _install_loss(
    model: nn.Module, sample_batch: Any, weights: TracedWeights | None
) -> ChunkedLossHandle | None:
    """Only for a Hugging Face causal LM that computes its own loss from labels."""
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "config"):
        return None
    if not hasattr(sample_batch, "keys") or sample_batch.get("labels") is None:
        return None
    if weights is None:
        return install_chunked_loss(model)
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    return install_chunked_loss(model, probing=weights.probing(head))


def _set_use_cache(model: nn.Module, value: bool | None) -> bool | None:
    """Set the configuration's switch where there is one; what it was before.

    Training has no use for a key-value cache, and a block that is recomputed would fill it twice.
    """
    config = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if not isinstance(before, bool) or value is None:
        return None
    config.use_cache = value  # type: ignore[union-attr]
    return before


def _units(model: nn.Module, profile: ModelProfile) -> list[Unit]:
    parameters = dict(model.named_parameters())
    return [(unit.name, [(name, parameters[name]) for name in unit.parameters]) for unit in profile.units]


def _write(directory: Path, **documents: str) -> None:
    make_folder(directory)
    for name, text in documents.items():
        write_text(directory / f"{name}.json", text + "\n")
