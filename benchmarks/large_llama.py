"""A Llama of 1.3 billion parameters takes two full AdamW steps under a hard limit of 5 GiB.

    python benchmarks/large_llama.py

Random weights in bf16, fp32 master weights and moments, sequence length 512. The model is made without
storage and its modules are filled one after another, so that construction, too, stays inside the limit. The
kernel enforces the limit (a memory group of its own). Ends with one JSON line: ``peak_bytes``,
``step_seconds``, and ``in_memory_bytes``, what weights, gradients and state alone would take in memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _harness import (
    RESERVE_BYTES,
    GiB,
    child_environment,
    publish,
    run_child,
    table,
)

LIMIT_BYTES = 5 * GiB
SEQUENCE = 512
STEPS = 2
SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "tie_word_embeddings": False,
    "use_cache": False,
}
STATE_BYTES_PER_PARAMETER = 16
"""bf16 weight and gradient (2 + 2), fp32 master weight and two moments (4 + 4 + 4)."""
TIMEOUT_SECONDS = 3600.0


def build_model() -> Any:
    """The model in bf16, module by module: nothing exists in fp32 and nothing twice."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(**SHAPE)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                made = torch.empty(parameter.shape, dtype=torch.bfloat16)
                if made.dim() == 1:
                    made.fill_(1.0)  # Llama's only vectors are the scales of its norms
                else:
                    made.normal_(0.0, config.initializer_range, generator=generator)
                setattr(module, name, torch.nn.Parameter(made))
    model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its buffers are computed, not learned
    left = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    if left:
        raise RuntimeError(f"still without storage: {left}")
    return model.train()


def child(budget_bytes: int, swap: str) -> None:
    """Build, prepare, and take the steps; one JSON line."""
    import torch
    from _train_child import memory_bytes

    import memtrain
    from memtrain.planner.actions import Tier

    start = time.perf_counter()
    model = build_model()
    built = {"build_seconds": time.perf_counter() - start, "built_peak_bytes": memory_bytes("VmHWM")}
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e9:.3f} billion parameters, {built['built_peak_bytes'] / GiB:.2f} GiB", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(SHAPE["vocab_size"], (STEPS, 1, SEQUENCE), generator=generator)
    batches = [{"input_ids": batch, "labels": batch} for batch in ids]
    start = time.perf_counter()
    session = memtrain.prepare(
        model,
        optimizer,
        batches[0],
        budget=memtrain.Budget(device=budget_bytes, nvme=f"{swap}:30GiB"),
        master_weights=True,
    )
    prepare_seconds = time.perf_counter() - start
    losses, seconds = [], []
    for batch in batches:
        start = time.perf_counter()
        loss = session.model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        del loss
        session.optimizer.clip_grad_norm_(1.0)
        session.optimizer.step()
        session.optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        print(f"loss {losses[-1]:.4f}, {seconds[-1]:.1f} s", flush=True)
    report = {
        "parameters": parameters,
        "losses": losses,
        "seconds": seconds,
        "peak_bytes": session.measure()["process_peak_bytes"],
        "predicted_peak_bytes": session.plan.peak(Tier.DEVICE),
        "predicted_step_seconds": session.plan.step_seconds,
        "actions": session.plan.action_counts(),
        "update_schedule": session.plan.update_schedule.value,
        "prepare_seconds": prepare_seconds,
        **built,
    }
    print(json.dumps(report), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--swap", default="/var/tmp", help="directory on a local disk with 25 GiB free")
    parser.add_argument("--child", type=int, metavar="BUDGET_BYTES", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        child(args.child, args.swap)
        return
    with tempfile.TemporaryDirectory(prefix="memtrain_bench_", dir=args.swap) as swap:
        command = [sys.executable, str(Path(__file__).resolve()), "--child", str(LIMIT_BYTES - RESERVE_BYTES)]
        run = run_child(
            [*command, "--swap", swap],
            limit_bytes=LIMIT_BYTES,
            environment=child_environment("memtrain"),
            timeout_seconds=TIMEOUT_SECONDS,
        )
    report = dict(run.require())
    in_memory_bytes = report["parameters"] * STATE_BYTES_PER_PARAMETER
    rows = [
        ("parameters", f"{report['parameters'] / 1e9:.3f} billion"),
        ("weights, gradients and state in memory", f"{in_memory_bytes / GiB:.1f} GiB, activations aside"),
        ("hard limit", f"{LIMIT_BYTES / GiB:.1f} GiB"),
        ("peak (VmHWM)", f"{report['peak_bytes'] / GiB:.2f} GiB"),
        ("peak predicted", f"{report['predicted_peak_bytes'] / GiB:.2f} GiB"),
        ("steps", ", ".join(f"{seconds:.1f} s" for seconds in report["seconds"])),
        ("step predicted", f"{report['predicted_step_seconds']:.1f} s"),
        ("losses", ", ".join(f"{loss:.4f}" for loss in report["losses"])),
        ("blocks", ", ".join(f"{count} {action}" for action, count in report["actions"].items())),
    ]
    summary = {
        "peak_bytes": report["peak_bytes"],
        "limit_bytes": LIMIT_BYTES,
        "in_memory_bytes": in_memory_bytes,
        "step_seconds": round(report["seconds"][-1], 2),
    }
    publish("large_llama", text=table(("what", "value"), rows), summary=summary, details=report)


if __name__ == "__main__":
    main()
