"""The options of ``memtrain plan``, as typer reads them, in the panels of its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from memtrain.planner.grid_rule import NAMED
from memtrain.planner.optimizer_bytes import OptimizerRule
from memtrain.planning.request import Attention, Dtype

_JOB, _MACHINE, _SPLIT = (
    "What is trained",
    "On what (all of one host; each GPU gets its share)",
    "How it is divided",
)
_SEARCH, _QUESTIONS, _OUTPUT = "The search", "Questions", "Output"


def _option(panel: str, help_text: str, *names: str, metavar: str | None = None) -> object:
    return typer.Option(*names, help=help_text, rich_help_panel=panel, metavar=metavar)


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A preset, a folder with config.json, such a file, or a hub id in the local cache.",
    ),
]

Seq = Annotated[str | None, _option(_JOB, "Tokens of a sequence: 8192, 8k, 1M (8k).")]
MicroBatch = Annotated[int | None, _option(_JOB, "Sequences in a forward pass (1).")]
Accumulate = Annotated[int, _option(_JOB, "Micro-batches of a data rank in a step.")]
_OPTIMIZERS = ", ".join([*(rule.value for rule in OptimizerRule), *NAMED])
Optimizer = Annotated[str, _option(_JOB, f"{_OPTIMIZERS}; arguments as in 'galore(rank=128)'.")]
DtypeName = Annotated[
    str, _option(_JOB, f"Of weights and activations: {', '.join(get_args(Dtype))}.", "--dtype")
]
MasterWeights = Annotated[bool | None, _option(_JOB, "fp32 copies of bf16 weights (on for bfloat16).")]
Clipping = Annotated[bool, _option(_JOB, "By the global norm: no update begins before backward ends.")]
UpdateSchedule = Annotated[
    str,
    _option(_JOB, "When weights are updated: sequential, ahead, in_backward, or auto.", "--update-schedule"),
]
MicroBatchOrder = Annotated[
    str,
    _option(
        _JOB,
        "vertical (all micro-batches pass a block together), horizontal, or auto.",
        "--micro-batch-order",
    ),
]
ChunkedLoss = Annotated[bool, _option(_JOB, "The loss by chunks of tokens, as memtrain trains.")]
AttentionName = Annotated[
    str | None,
    _option(
        _JOB,
        f"The kernel: {', '.join(get_args(Attention))} (flash; efficient for float32).",
        "--attention",
    ),
]

Gpu = Annotated[str, _option(_MACHINE, "A GPU's name: a800-80g, h100, 'rtx 4090' ...")]
Gpus = Annotated[int, _option(_MACHINE, "GPUs of a host.")]
Nodes = Annotated[int, _option(_MACHINE, "Hosts.")]
Dram = Annotated[str | None, _option(_MACHINE, "1TiB, 1TiB@200GB/s, 1TiB@8xddr5-4800.")]
Nvme = Annotated[str | None, _option(_MACHINE, "4TB, 4TB@6GB/s,5GB/s, 2x4TB@nvme-gen5, /mnt/fast:4TB.")]
NvmeWrites = Annotated[
    str | None, _option(_MACHINE, "What a step may write to NVMe, to spare it: 200GB.", "--nvme-writes")
]
Cxl = Annotated[str | None, _option(_MACHINE, "256GiB, 1:2x128GiB@20GB/s.")]
HostLink = Annotated[
    str | None, _option(_MACHINE, "Of each GPU: pcie-gen5-x16, or read,write,both: 25GB/s,24GB/s.")
]
Interconnect = Annotated[str | None, _option(_MACHINE, "Between GPUs of a host: nvlink-4, or a rate.")]
Network = Annotated[str | None, _option(_MACHINE, "Between hosts: infiniband-ndr, or a rate a GPU.")]
MachineFile = Annotated[
    str | None,
    _option(_MACHINE, "Links as `memtrain profile -o FILE` measured them.", "--machine", metavar="FILE"),
]
Budgets = Annotated[
    list[str] | None,
    _option(_MACHINE, "What a GPU's job may use of a tier: device=70GiB.", "--budget", metavar="TIER=SIZE"),
]
Overrides = Annotated[
    list[str] | None,
    _option(_MACHINE, "A number of the GPU: matmul_efficiency=0.6.", "--override", metavar="NUMBER=VALUE"),
]

Dp = Annotated[int | None, _option(_SPLIT, "Data ranks (all that the others leave).")]
Zero = Annotated[int | None, _option(_SPLIT, "ZeRO stage, 0 to 3 (3 where weights have several ranks).")]
Tp = Annotated[int, _option(_SPLIT, "Tensor ranks.")]
SequenceParallel = Annotated[bool | None, _option(_SPLIT, "With --tp: cut what it leaves whole (on).")]
Cp = Annotated[int, _option(_SPLIT, "Context ranks.")]
CpMethod = Annotated[str | None, _option(_SPLIT, "With --cp: ring or ulysses (ring).")]
Pp = Annotated[int, _option(_SPLIT, "Pipeline stages (1F1B).")]
Ep = Annotated[int, _option(_SPLIT, "Expert ranks, of data x context.")]

AllowLossy = Annotated[str | None, _option(_SEARCH, "Codecs that may be used: int8,int4.")]
ErrorBudget = Annotated[
    float | None, _option(_SEARCH, "With --allow-lossy: mean error over all saved bytes.")
]
Chunks = Annotated[int | None, _option(_SEARCH, "Token chunks that are decided apart (16).")]
Seconds = Annotated[float, _option(_SEARCH, "How long to look.")]
Gap = Annotated[float, _option(_SEARCH, "How near to the best is near enough.")]

WhatFits = Annotated[
    str | None,
    _option(
        _QUESTIONS, "Plan the longest sequence (seq) or largest micro-batch (batch).", metavar="seq|batch"
    ),
]
SweepText = Annotated[
    str | None,
    _option(_QUESTIONS, "A line for each: seq=8k..1M (doubling), seq=8k,12k, batch=1..16.", "--sweep"),
]
Ablation = Annotated[bool, _option(_QUESTIONS, "What simpler rules would give.", "--ablation")]
Explain = Annotated[
    str | None, _option(_QUESTIONS, "What other choices would cost there: layers.40.", metavar="BLOCK")
]
Sources = Annotated[bool, _option(_QUESTIONS, "Where every number is from.", "--sources")]

Json = Annotated[bool, _option(_OUTPUT, "JSON on standard output, and nothing else.", "--json")]
Csv = Annotated[bool, _option(_OUTPUT, "One CSV table on standard output, and nothing else.", "--csv")]
Html = Annotated[Path | None, _option(_OUTPUT, "Write a page with pictures.", metavar="FILE")]
Emit = Annotated[Path | None, _option(_OUTPUT, "Write what to run the plan with.", metavar="DIRECTORY")]
Output = Annotated[
    Path | None, _option(_OUTPUT, "Write the plan, as JSON.", "--output", "-o", metavar="FILE")
]
