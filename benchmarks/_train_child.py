"""One training run of SmolLM2-135M by one engine, in this process; ends with one JSON line.

    python benchmarks/_train_child.py --engine plain --model data/models/smollm2-135m --steps 5

Every engine trains the same thing: bf16 weights, fp32 master weights and moments, AdamW, global-norm
clipping at 1.0, micro-batch 1, the same tokens. The engines:

- plain: an ordinary loop. Gradients are released parameter by parameter as they are widened; AdamW is fused.
- checkpointing: the same loop with Hugging Face's gradient checkpointing (not re-entrant).
- deepspeed: ZeRO stage 3, optimizer (and parameters, if asked) on NVMe, the same checkpointing.
- memtrain: ``memtrain.prepare`` with the budget given.

Every number of the JSON line carries its unit. ``step_seconds`` is the median after the warm-up steps.
Exit code 2, with ``shortfall_bytes``: no plan fits the budget.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0
INFEASIBLE_EXIT_CODE = 2

# DeepSpeed's own options, as searched for the smallest peak (benchmarks/README.md has the search).
DEEPSPEED_DEFAULTS: dict[str, Any] = {
    "sub_group_size": 30_000_000,
    "buffer_count": 5,
    "pipeline": False,
    "parameters": "none",
    "parameter_buffer_count": 20,
    "prefetch": 5_000_000,
    "aio_threads": 2,
}


def memory_bytes(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def token_batches(vocabulary: int, sequence: int, count: int) -> list[dict[str, Any]]:
    """``count`` micro-batches of (1, sequence) random tokens, the same in every engine."""
    import torch

    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(count):
        ids = torch.randint(vocabulary, (1, sequence), generator=generator)
        batches.append({"input_ids": ids, "labels": ids})
    return batches


def load_model(folder: str) -> Any:
    """The model in bf16, ready to train."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.config.use_cache = False
    return model.train()


def run_steps(
    args: argparse.Namespace, vocabulary: int, step: Callable[[list[Any]], float]
) -> dict[str, Any]:
    """Call ``step`` with the micro-batches of each step; losses and seconds."""
    batches = token_batches(vocabulary, args.sequence, args.steps * args.micro_batches)
    losses, seconds = [], []
    for index in range(args.steps):
        start = time.perf_counter()
        losses.append(step(batches[index * args.micro_batches : (index + 1) * args.micro_batches]))
        seconds.append(time.perf_counter() - start)
        print(f"step {index}: loss {losses[-1]:.4f}, {seconds[-1]:.2f} s", flush=True)
    measured = seconds[min(args.warmup, args.steps - 1) :]
    return {
        "losses": losses,
        "seconds": seconds,
        "step_seconds": statistics.median(measured),
        "tokens_per_second": args.sequence * args.micro_batches / statistics.median(measured),
    }


def train_plain(args: argparse.Namespace) -> dict[str, Any]:
    """Mixed precision by hand: fp32 masters beside bf16 weights."""
    import torch

    model = load_model(args.model)
    if args.engine == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    weights = [p for p in model.parameters() if p.requires_grad]
    masters = [weight.detach().float() for weight in weights]
    optimizer = torch.optim.AdamW(masters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)

    def step(batches: list[Any]) -> float:
        total = 0.0
        for batch in batches:
            loss = model(**batch).loss / len(batches)
            loss.backward()
            total += loss.item()
        for weight, master in zip(weights, masters, strict=True):
            master.grad = weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(masters, CLIP_NORM)
        optimizer.step()
        with torch.no_grad():
            for weight, master in zip(weights, masters, strict=True):
                weight.copy_(master)
                master.grad = None
        return total

    return run_steps(args, model.config.vocab_size, step)


def deepspeed_config(args: argparse.Namespace) -> dict[str, Any]:
    """ZeRO-3 with the optimizer on NVMe; ``--deepspeed`` overrides what was searched."""
    chosen = {**DEEPSPEED_DEFAULTS, **json.loads(args.deepspeed)}
    unknown = set(chosen) - set(DEEPSPEED_DEFAULTS)
    if unknown:
        raise SystemExit(f"--deepspeed: unknown keys {sorted(unknown)}; known: {sorted(DEEPSPEED_DEFAULTS)}")
    zero: dict[str, Any] = {
        "stage": 3,
        "sub_group_size": chosen["sub_group_size"],
        "stage3_max_live_parameters": 10_000_000,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": chosen["prefetch"],
        "reduce_bucket_size": 5_000_000,
        "stage3_param_persistence_threshold": 1000,
        "offload_optimizer": {
            "device": "nvme",
            "nvme_path": args.swap,
            "buffer_count": chosen["buffer_count"],
            "pin_memory": False,
            "pipeline_read": chosen["pipeline"],
            "pipeline_write": chosen["pipeline"],
        },
    }
    if chosen["parameters"] == "nvme":
        zero["offload_param"] = {
            "device": "nvme",
            "nvme_path": args.swap,
            "buffer_count": chosen["parameter_buffer_count"],
            "buffer_size": 28_400_000,  # the embedding, 49152 x 576
            "max_in_cpu": 0,
            "pin_memory": False,
        }
    elif chosen["parameters"] == "cpu":
        zero["offload_param"] = {"device": "cpu", "pin_memory": False}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": args.micro_batches,
        "gradient_clipping": CLIP_NORM,
        "bf16": {"enabled": True},
        "zero_optimization": zero,
        "aio": {
            "block_size": 1 << 20,
            "queue_depth": 8,
            "intra_op_parallelism": chosen["aio_threads"],
            "overlap_events": True,
        },
        "steps_per_print": 1 << 30,
    }


def train_deepspeed(args: argparse.Namespace) -> dict[str, Any]:
    """DeepSpeed on one process without its launcher."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(args.port))
    import deepspeed
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from safetensors import safe_open
    from transformers import AutoConfig, LlamaForCausalLM  # imported outside zero.Init, which patches torch
    from transformers.initialization import no_init_weights

    deepspeed.init_distributed(dist_backend="gloo")
    config = deepspeed_config(args)
    # Parameters are partitioned as they are made, so that construction does not set the peak.
    with no_init_weights(), deepspeed.zero.Init(config_dict_or_path=config, dtype=torch.bfloat16):
        model = LlamaForCausalLM(AutoConfig.from_pretrained(args.model))
    model.tie_weights()
    with safe_open(str(Path(args.model) / "model.safetensors"), framework="pt") as weights:
        for name, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0), torch.no_grad():
                parameter.copy_(weights.get_tensor(name))
    model.config.use_cache = False
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = DeepSpeedCPUAdam(
        model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, adamw_mode=True
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def step(batches: list[Any]) -> float:
        total = 0.0
        for batch in batches:
            loss = engine(**batch).loss
            engine.backward(loss)
            total += loss.item() / len(batches)
            del loss
            engine.step()
        return total

    return run_steps(args, model.config.vocab_size, step)


def train_memtrain(args: argparse.Namespace) -> dict[str, Any]:
    """``memtrain.prepare`` on the same model and optimizer."""
    import torch

    import memtrain
    from memtrain.planner.actions import Tier
    from memtrain.report import recompute_facts

    model = load_model(args.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    sample = token_batches(model.config.vocab_size, args.sequence, 1)[0]
    budget = memtrain.Budget(device=args.budget, nvme=f"{args.swap}:{args.swap_size}")
    start = time.perf_counter()
    try:
        session = memtrain.prepare(
            model,
            optimizer,
            sample,
            budget=budget,
            micro_batches=args.micro_batches,
            master_weights=True,
            options=memtrain.PlannerOptions(force=json.loads(args.force), exact_only=args.exact_only),
        )
    except memtrain.InfeasibleError as error:
        shortfall = dict(error.plan.shortfall_bytes)
        print(error, file=sys.stderr, flush=True)
        print(json.dumps({"shortfall_bytes": shortfall.get(Tier.DEVICE, 0)}), flush=True)
        sys.exit(INFEASIBLE_EXIT_CODE)
    prepare_seconds = time.perf_counter() - start
    plan = session.plan
    predicted = {
        "budget_bytes": budget.device_bytes,
        "predicted_peak_bytes": plan.peak(Tier.DEVICE),
        "predicted_step_seconds": plan.step_seconds,
        "prepare_seconds": prepare_seconds,
        "actions": plan.action_counts(),
        "computed_again": recompute_facts(plan, session.profile),
        "update_schedule": plan.update_schedule.value,
    }
    print(json.dumps(predicted), flush=True)

    def step(batches: list[Any]) -> float:
        total = 0.0
        for batch in batches:
            loss = session.model(**batch).loss / len(batches)
            loss.backward()
            total += loss.item()
        session.optimizer.clip_grad_norm_(CLIP_NORM)
        session.optimizer.step()
        session.optimizer.zero_grad()
        return total

    result = run_steps(args, model.config.vocab_size, step)
    measured = session.measure()  # the session resets VmHWM when training begins, and knows both peaks
    session.close()
    peaks = {"peak_bytes": measured["process_peak_bytes"], "training_peak_bytes": measured["peak_bytes"]}
    return {**predicted, **result, **peaks}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    engines = ("plain", "checkpointing", "deepspeed", "memtrain")
    parser.add_argument("--engine", required=True, choices=engines)
    parser.add_argument("--model", required=True, help="folder with config.json and model.safetensors")
    parser.add_argument("--sequence", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2, help="steps that the median leaves out")
    parser.add_argument("--micro-batches", type=int, default=1, help="gradient accumulation")
    parser.add_argument("--budget", default="1.2GiB", help="memtrain: device budget")
    parser.add_argument("--swap", default="/var/tmp", help="directory on a local disk")
    parser.add_argument("--swap-size", default="16GiB")
    parser.add_argument("--exact-only", action=argparse.BooleanOptionalAction, default=True, help="memtrain")
    parser.add_argument("--force", default="{}", help="memtrain: JSON for PlannerOptions.force")
    overridable = ", ".join(DEEPSPEED_DEFAULTS)
    parser.add_argument("--deepspeed", default="{}", help=f"JSON that overrides {overridable}")
    parser.add_argument("--port", type=int, default=29511)
    args = parser.parse_args()

    import torch
    import transformers

    torch.manual_seed(0)
    train = {"deepspeed": train_deepspeed, "memtrain": train_memtrain}.get(args.engine, train_plain)
    gc.collect()
    libraries_bytes = memory_bytes("VmRSS")
    result = train(args)
    report = {
        "engine": args.engine,
        "sequence": args.sequence,
        "micro_batches": args.micro_batches,
        "libraries_bytes": libraries_bytes,
        "peak_bytes": memory_bytes("VmHWM"),
        **result,
        "cpu_seconds": time.process_time(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    sys.stdout.flush()
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
