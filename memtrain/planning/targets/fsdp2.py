"""FSDP2 in a plain training script: a Python file with one function, ``shard(model, blocks)``.

The calls are those of torch 2.13: ``fully_shard``, ``MixedPrecisionPolicy`` and ``CPUOffloadPolicy`` of
torch.distributed.fsdp, and the composable ``checkpoint``, which like ``fully_shard`` leaves modules in place.
"""

from __future__ import annotations

from memtrain.planning.targets.accelerate import offload_notes, offloads, root_note
from memtrain.planning.targets.common import Context, Target, torchrun

FILENAME = "fsdp2.py"

_TEMPLATE = '''"""FSDP2 as memtrain plan chose it; import this from your training script.

    torch.distributed.init_process_group("{backend}")
    shard(model, model.model.layers)
"""

from collections.abc import Iterable

import torch
from torch import nn
{imports}
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import {fsdp_names}


def shard(model: nn.Module, blocks: Iterable[nn.Module], device: str = "cuda") -> nn.Module:
    """Shard ``blocks`` and the rest of ``model`` over all {ranks} ranks, in place."""
    mesh = init_device_mesh(device, ({ranks},))
    settings = {{
        "mesh": mesh,
        "reshard_after_forward": {reshard},
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.{dtype}, reduce_dtype=torch.{dtype}),
{offload}    }}
    for block in blocks:
{wrap}        fully_shard(block, **settings)
    return fully_shard(model, **settings)
'''


def refusal(context: Context) -> str | None:
    """Why ``fully_shard`` alone is not this plan, or None."""
    degrees = context.degrees
    if degrees.replicas == 1:
        return "one rank has nothing to shard: no fsdp2.py is written"
    if degrees.zero_stage < 2:
        return f"FSDP2 is stage 2 or 3, and the plan has stage {degrees.zero_stage}: no fsdp2.py is written"
    others = {
        "tensor": degrees.tensor,
        "context": degrees.context,
        "pipeline": degrees.pipeline,
        "expert": degrees.expert,
    }
    needed = [name for name, value in others.items() if value > 1]
    if needed:
        return (
            f"fsdp2.py shards and does nothing else; this plan has {', '.join(needed)} ranks: none is written"
        )
    return None


def fsdp2(context: Context) -> Target:
    """The file, and what it leaves out."""
    offload = offloads(context)
    imports = []
    names = ["CPUOffloadPolicy"] * offload + ["MixedPrecisionPolicy", "fully_shard"]
    if context.recomputes:
        imports.append("from torch.distributed._composable import checkpoint")
    text = _TEMPLATE.format(
        backend="cpu:gloo,cuda:nccl" if offload else "nccl",
        imports="\n".join(imports),
        fsdp_names=", ".join(names),
        ranks=context.degrees.replicas,
        reshard=context.degrees.zero_stage == 3,
        dtype=context.request.work.dtype,
        offload='        "offload_policy": CPUOffloadPolicy(pin_memory=device == "cuda"),\n'
        if offload
        else "",
        wrap="        checkpoint(block)\n" if context.recomputes else "",
    ).replace("import nn\n\nfrom", "import nn\nfrom")
    return Target(
        tool="FSDP2",
        filename=FILENAME,
        text=text,
        command=torchrun(context, "train.py"),
        notes=(*offload_notes(context), root_note(context), *context.unrepresented("FSDP2")),
    )
