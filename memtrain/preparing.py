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
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memtrain.arena import library as arena_library
from memtrain.coding import codecs_for, codecs_of_plan, refuse_other_codecs, weight_coding_of, weight_dtype
from memtrain.draws import Draws, RandomWatch
from memtrain.largest_layer import with_largest_layer, with_tiles_kept
from memtrain.offload.device import make_device
from memtrain.offload.lower_halves import keeps_lower_half
from memtrain.offload.measure import measure_machine
from memtrain.offload.optimizer import OptimizerConfig
from memtrain.offload.optimizer_probe import may_be_cut
from memtrain.optim.autograd.causal_lm import ChunkedLossHandle
from memtrain.optim.autograd.treatments import ChangedModuleError
from memtrain.optim.grid import GridOptimizer
from memtrain.optim.kernels import native
from memtrain.planner import resident
from memtrain.planner.decisions import PlannerOptions
from memtrain.planner.machine import Budget, Machine
from memtrain.planner.plan import Plan
from memtrain.planner.solve import make_plan
from memtrain.planner.trace import profile_model
from memtrain.planner.tracing.blocks import find_blocks
from memtrain.profiling import PeakSinceNow, find_forms, install_loss, weights_brought
from memtrain.refusals import (
    InfeasibleError,
    PrepareError,
    check_spare,
    device_of,
    in_one_thread,
    refuse_allocator,
    refuse_broken,
    refuse_device,
    refuse_in_backward,
    refuse_model,
    refuse_overlaid_tiles,
    refuse_with_tables,
)
from memtrain.rehearsal import BlockRehearsal
from memtrain.runfiles import write_documents
from memtrain.session import Session
from memtrain.sparse_tables import SparseTables, put_tables_away, refuse_left_out, take_over, with_tables
from memtrain.streamed_models import open_store, stored_weights
from memtrain.tiling import tiles_of, windows_in_tiles


def prepare(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    sample_batch: Any,
    *,
    budget: Budget,
    sparse_optimizer: torch.optim.Optimizer | None = None,
    micro_batches: int = 1,
    master_weights: bool = False,
    split_masters: bool = True,
    nonfinite: str = "ignore",
    plan: Plan | None = None,
    options: PlannerOptions | None = None,
    machine: Machine | None = None,
    block_names: Sequence[str] | None = None,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    chunked_loss: bool = True,
    codecs: Mapping[str, str] | None = None,
    weight_codecs: Mapping[str, str] | None = None,
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
        sparse_optimizer: over embeddings with ``sparse=True``, on a CPU, that are in no other optimizer:
            ``torch.optim.SparseAdam`` or one that leaves rows alone that a step does not use. Weights and
            state lie on the fastest tier of the budget beside the device that has room for both, and only
            rows that are used are read and written; ``Session.optimizer`` steps them too. State that it
            already has is taken over.
        micro_batches: forward-backward passes per optimizer step (gradient accumulation).
        master_weights: keep fp32 masters of bf16 or fp16 weights, and update those with fp32 gradients.
        split_masters: under ``AdamW(fused=True)`` on a CPU, keep only what a bf16 weight does not hold of its
            master: 10 bytes of state a parameter instead of 12, and the same bits. A weight that anybody else
            writes between steps is then refused; False, and any model in tiles, keeps whole masters, which
            follow it.
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
        weight_codecs: the same of weights that live on a tier; ``auto`` codes them where the plan is
            predicted to be faster for it. None: as they are; a streamed model's always as they lie already.
        directory: where the planned run writes its files; profile and plan are left there when given.
        reached_bytes: the most that the job has occupied of the device before this call, where the budget is
            to cover that too: a smaller one is then infeasible. What this call itself takes always counts.
        spare_state_bytes: of the nvme budget, to be left beyond the plan for optimizer state and weights that
            a snapshot still needs (``AsyncCheckpointer``); reserved where the plan keeps either there.
        allocator: ``planned`` gives what passes and updates ask for addresses that were packed, once it is
            known (``memtrain.arena.passes``), on a CPU, in horizontal order of micro-batches; and unless
            ``options.overlay`` is False gradients those of activations, and an update's slots those of
            passes: call ``zero_grad()`` before the next forward. ``default`` leaves it to the process's
            allocator.

    Raises:
        InfeasibleError: no plan fits.
        PlanMismatchError: ``plan`` was made for another model or budget.
        BlocksNotFoundError, UnsupportedHeadError, UnsupportedOptimizerError: what is not supported, by name.
        OffloadError: a tier cannot serve.
        BudgetError: the budget gives a tier that the machine does not have.
        SparseTableError: a table of ``sparse_optimizer`` cannot be used by rows, or has no such optimizer.
        RunFileError: a file of ``directory`` cannot be written.
        PrepareError: a session of the model is open; the allocator is unknown, or planned and the model not
            on a CPU or the order of micro-batches vertical; gradient checkpointing is on; apply_to() has
            treated what a session watches; parameters are on several devices, on one that is neither a CPU
            nor a CUDA device, or not on that of ``machine``.
        CodecError: a codec is unknown, for a tier without a budget, or not the one that ``machine`` was
            measured with.
        MissingZstandardError: a codec's library is not installed.
        OrderError: vertical order of micro-batches was asked for with nothing to order, or for a model whose
            forward draws random numbers that cannot be counted.
    """
    coding, stored = codecs_for(codecs or {}, budget), stored_weights(model)
    weight_coding = weight_coding_of(weight_codecs or {}, budget, stored)
    refuse_in_backward(options, plan, nonfinite)
    refuse_model(model, optimizer)
    place = device_of(model)
    device = make_device(str(place) if machine is None else machine.device)
    refuse_device(device, place, machine)
    refuse_allocator(allocator, place)
    if sparse_optimizer is None:
        refuse_left_out(model, ())
    else:
        refuse_with_tables(allocator, place)
    if allocator == "planned":
        options = in_one_thread(options or PlannerOptions(), plan)
        if options.overlay is None:
            options = dataclasses.replace(options, overlay=not tiles_of(model))
        arena_library.compile_ahead()
    if place.type == "cpu" and isinstance(optimizer, GridOptimizer):
        native.compile_missing()  # not inside the budget: a compiler takes more than many a slack
    elif place.type == "cpu" and any(group.get("fused") for group in optimizer.param_groups):
        native.available("fused_adamw")  # as above
    resident.limit_heap()
    resident.trim()
    resident.drop_library_pages()  # what is measured from here on is what a step uses
    peak = PeakSinceNow(device)
    blocks = find_blocks(model, block_names)
    handle: ChunkedLossHandle | None = None
    tables: SparseTables | None = None
    try:
        if sparse_optimizer is not None:
            lazy_state = dict(sparse_optimizer.state)
            tables = put_tables_away(
                model,
                sparse_optimizer,
                optimizer,
                blocks=blocks,
                budget=budget,
                lent=None if stored is None else stored.store,
                open_store=open_store,
                master_weights=master_weights,
            )
            resident.trim()  # of what the tables took
        if machine is None:
            machine = measure_machine(
                budget.nvme_directory if budget.nvme_bytes else None,
                device=str(place),
                host=budget.host_place,
                cxl=budget.cxl_place,
                codecs=coding,
                weight_codecs=weight_coding.codecs,
                weight_dtype=weight_dtype(model),
            )
        refuse_other_codecs(machine, coding, budget, weight_coding.codecs)
        options = dataclasses.replace(options or PlannerOptions(), coding_optional=weight_coding.optional)
        if stored is not None:  # on one tier: another one is no choice
            options = dataclasses.replace(options, weight_tiers=(stored.store.tier,))
        elementwise = may_be_cut(optimizer, master_weights=master_weights)
        split_masters = split_masters and not tiles_of(model)  # a tile's master is whole
        splits = master_weights and split_masters and elementwise
        keeps_half = functools.partial(keeps_lower_half, optimizer) if splits else None
        with weights_brought(model, blocks, device) as weights:
            if chunked_loss:
                handle = install_loss(model, sample_batch, weights)
            installed = nullcontext() if weights is None else weights.installed()
            with installed, RandomWatch().watching(model, place) as random_watch:
                forms = find_forms(model, blocks, sample_batch, options, weights)
                profile = profile_model(
                    model,
                    sample_batch,
                    optimizer=optimizer,
                    elementwise=elementwise,
                    micro_batches=micro_batches,
                    master_weights=master_weights,
                    keeps_half=keeps_half,
                    loss_fn=loss_fn,
                    block_names=block_names,
                    rehearsal=BlockRehearsal(model, forms, options if plan is None else None),
                    weights=weights,
                    window_bytes=windows_in_tiles(model),
                    apart=[] if tables is None else tables.weights,
                )
        if tables is not None:
            profile = with_tables(profile, tables)
            take_over(tables, lazy_state)
        libraries_bytes = 0 if machine.on_cpu else profile.baseline_bytes
        profile = dataclasses.replace(
            profile, prepare_peak_bytes=max(reached_bytes, peak.known_bytes(libraries_bytes))
        )
        options = random_watch.possible(options)
        if plan is None:
            plan = make_plan(profile, machine, budget, options=options)
        if plan.status == "infeasible":
            named = with_largest_layer(plan, profile, model)
            raise InfeasibleError(with_tiles_kept(named, model))
        refuse_broken(plan, profile, machine, budget)
        refuse_overlaid_tiles(plan, model)
        check_spare(plan, budget, spare_state_bytes)
        if directory is not None:
            write_documents(
                Path(directory), profile=profile.to_json(), machine=machine.to_json(), plan=plan.to_json()
            )
        resident.trim()  # what planning has freed does not stand beside the slabs
        return Session(
            model,
            optimizer,
            plan=plan,
            profile=profile,
            machine=machine,
            device=device,
            budget=budget,
            config=OptimizerConfig(
                master_weights=master_weights,
                nonfinite=nonfinite,
                elementwise=profile.elementwise,
                split_masters=split_masters,
            ),
            blocks=blocks,
            forms=forms,
            chunked_loss=handle,
            codecs=coding,
            weight_codecs=codecs_of_plan(plan, weight_coding),
            began_peak_bytes=peak.before_bytes,
            spare_state_bytes=spare_state_bytes,
            allocator=allocator,
            draws=Draws(model, place, drawn=random_watch.drawn),
            tables=tables,
        )
    except BaseException as error:
        if handle is not None:
            handle.uninstall()
        if tables is not None:
            tables.close()
            assert sparse_optimizer is not None
            sparse_optimizer.state.update(lazy_state)
        if isinstance(error, ChangedModuleError):
            raise PrepareError(
                f"{error}. A session watches modules that apply_to() passes by: call revert(model) first. "
                "The plan has the exact form of blocks itself, and lossy ones by options.allow_lossy"
            ) from error
        raise
