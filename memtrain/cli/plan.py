"""``memtrain plan``: whether a job fits a machine, how long its step takes, what to offload; no GPU needed.

    memtrain plan llama-3-70b --seq 8192 --gpu a800-80g --gpus 8 --cp 8 --dram 1TiB --nvme 4TB@6GB/s

Exit codes: 0 it fits, 1 a mistake or a failure, 2 nothing fits, 3 it fits and nothing is proved of the plan.
"""

from __future__ import annotations

import typer

from memtrain.cli import plan_options as options
from memtrain.planning.parsing import (
    parse_attention,
    parse_axis,
    parse_budget,
    parse_codecs,
    parse_degrees,
    parse_dtype,
    parse_optimizer,
    parse_order,
    parse_overrides,
    parse_schedule,
    parse_sweep,
    parse_work_size,
)
from memtrain.planning.request import (
    Hardware,
    Outputs,
    OwnOptimizer,
    PlanError,
    PlanRequest,
    Questions,
    Search,
    Work,
)


def plan(
    model: options.Model,
    gpu: options.Gpu,
    seq: options.Seq = None,
    micro_batch: options.MicroBatch = None,
    accumulate: options.Accumulate = 1,
    optimizer: options.Optimizer = "adamw",
    dtype: options.DtypeName = "bfloat16",
    master_weights: options.MasterWeights = None,
    clipping: options.Clipping = True,
    update_schedule: options.UpdateSchedule = "auto",
    micro_batch_order: options.MicroBatchOrder = "auto",
    chunked_loss: options.ChunkedLoss = True,
    attention: options.AttentionName = None,
    gpus: options.Gpus = 1,
    nodes: options.Nodes = 1,
    dram: options.Dram = None,
    nvme: options.Nvme = None,
    nvme_writes: options.NvmeWrites = None,
    cxl: options.Cxl = None,
    host_link: options.HostLink = None,
    interconnect: options.Interconnect = None,
    network: options.Network = None,
    machine: options.MachineFile = None,
    budget: options.Budgets = None,
    override: options.Overrides = None,
    dp: options.Dp = None,
    zero: options.Zero = None,
    tp: options.Tp = 1,
    sequence_parallel: options.SequenceParallel = None,
    cp: options.Cp = 1,
    cp_method: options.CpMethod = None,
    pp: options.Pp = 1,
    ep: options.Ep = 1,
    allow_lossy: options.AllowLossy = None,
    error_budget: options.ErrorBudget = None,
    chunks: options.Chunks = None,
    seconds: options.Seconds = 6.0,
    gap: options.Gap = 5e-3,
    what_fits: options.WhatFits = None,
    sweep: options.SweepText = None,
    ablation: options.Ablation = False,
    explain: options.Explain = None,
    sources: options.Sources = False,
    json: options.Json = False,
    csv: options.Csv = False,
    html: options.Html = None,
    emit: options.Emit = None,
    output: options.Output = None,
) -> None:
    """Say whether MODEL can be trained on a machine, how fast, and what to offload. No GPU is needed."""
    questions = Questions(
        what_fits=None if what_fits is None else parse_axis(what_fits),
        sweep=None if sweep is None else parse_sweep(sweep),
        ablation=ablation,
        explain=explain,
        sources=sources,
    )
    outputs = Outputs(json=json, csv=csv, html=html, emit=emit, plan=output)
    outputs.check(questions)
    sequence, sequences = parse_work_size(seq, micro_batch, questions)
    precision = parse_dtype(dtype)
    if master_weights and precision == "float32":
        raise PlanError(
            "--master-weights copies weights of lower precision, and --dtype is float32: drop one"
        )
    chosen = parse_optimizer(optimizer)
    own = isinstance(chosen, OwnOptimizer)
    if master_weights and own:
        raise PlanError(
            f"--master-weights is for torch's optimizers: write master=fp32 or master=split24 into "
            f"--optimizer {chosen.value}"
        )
    masters = (precision == "bfloat16" and not own) if master_weights is None else master_weights
    request = PlanRequest(
        work=Work(
            model=model,
            sequence=sequence,
            micro_batch=sequences,
            accumulate=accumulate,
            optimizer=chosen,
            dtype=precision,
            master_weights=masters,
            clipping=clipping,
            chunked_loss=chunked_loss,
            attention=parse_attention(attention, precision),
            update_schedule=parse_schedule(update_schedule),
            micro_batch_order=parse_order(micro_batch_order),
        ),
        hardware=Hardware(
            gpu=gpu,
            gpus=gpus,
            nodes=nodes,
            dram=dram,
            cxl=cxl,
            nvme=nvme,
            nvme_writes=nvme_writes,
            host_link=host_link,
            interconnect=interconnect,
            network=network,
            machine=machine,
            budget=parse_budget(budget or []),
            overrides=parse_overrides(override or []),
        ),
        degrees=parse_degrees(
            gpus * nodes,
            data=dp,
            zero_stage=zero,
            tensor=tp,
            context=cp,
            pipeline=pp,
            expert=ep,
            context_method=cp_method,
            sequence_parallel=sequence_parallel,
        ),
        search=Search(
            chunks=chunks,
            seconds=seconds,
            gap=gap,
            allow_lossy=parse_codecs(allow_lossy),
            error_budget=error_budget,
        ),
    )
    from memtrain.planning.command import run

    raise typer.Exit(run(request, questions, outputs))
