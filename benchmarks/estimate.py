"""What the planner estimates without weights or a GPU, against torch's MemTracker and against real runs.

    python benchmarks/estimate.py            # about eight minutes on two idle cores

Ten models from their configurations, one row of 1024 tokens in bf16, each under three optimizers. The
estimate traces one block of each class on fake tensors; torch's MemTracker, under fake tensors too, watches
the whole model go forward, backward and step. SmolLM2-135M whole, and a small sibling of each of the ten (two
layers, the same architecture), then run for real on the CPU: their parameters, gradients, optimizer states
and the unique storages that autograd packs are counted.

- worst_error: the greatest ``|estimated - found| / found`` of any category of any case.
- cases: models x optimizers, both oracles together. A case is exact when no category is a byte off.

Beside them stands what Accelerate's and DeepSpeed's estimators say of the same models under AdamW in mixed
precision; neither knows activations, and Accelerate's takes the greatest of its parts for the whole.
DeepSpeed's is called in its own environment, or worked out from its published formula where there is none,
and the table says which.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from _harness import DEEPSPEED_VENV, GiB, publish, table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode

from memtrain.planner.estimate import ModelEstimate
from memtrain.planner.model_presets import PRESETS
from memtrain.planner.optimizer_bytes import OptimizerRule, ParameterSpec, StateBytes
from memtrain.planner.tracing import fake_model
from memtrain.planner.tracing.estimator import estimate_config

MODELS = (
    "smollm2-135m gpt2-xl llama-7b mistral-7b qwen2.5-7b "
    "llama-3-8b gemma-2-9b mixtral-8x7b llama-2-70b llama-3-70b"
).split()
SEQUENCE = 1024
WHOLE_MODEL, WHOLE_SEQUENCE = "smollm2-135m", 256
"""Run for real as it is: with AdamW and its activations about 1.5 GiB."""
SMALL_SEQUENCE = 128
OPTIMIZERS: dict[OptimizerRule, Callable[[Any], torch.optim.Optimizer]] = {
    OptimizerRule.ADAMW: lambda p: torch.optim.AdamW(p, lr=1e-4),
    OptimizerRule.SGD_MOMENTUM: lambda p: torch.optim.SGD(p, lr=1e-4, momentum=0.9),
    OptimizerRule.ADAFACTOR: lambda p: torch.optim.Adafactor(p, lr=1e-4),
}


@dataclass
class Case:
    """One model under one optimizer, estimated and found, in bytes by category."""

    model: str
    optimizer: str
    oracle: str
    estimated: dict[str, int]
    found: dict[str, int]
    errors: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        self.errors = {
            key: abs(self.estimated[key] - self.found[key]) / self.found[key] for key in self.found
        }


class Tracker(MemTracker):
    """Without peaks: they are not asked for here, and it looks at every module after every operator."""

    def _update_peak_stats(self, peak_state: Any) -> None:
        return


class Ones(TorchDispatchMode):
    """Optimizers read their step count; a fake one has no value, and any will do for counting bytes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        return func(*args, **(kwargs or {}))


def track(name: str) -> Iterator[tuple[OptimizerRule, dict[str, int]]]:
    """What MemTracker finds, one optimizer after the other, of a whole model on fake tensors."""
    tracker = Tracker()

    def found(kind: str) -> int:
        (device,) = tracker.get_tracker_snapshot().values()
        return int(next(size for key, size in device.items() if getattr(key, "name", "") == kind))

    with FakeTensorMode(), fake_model.unpacked_rows():
        model = fake_model.build(fake_model.read_config(name), torch.bfloat16, "default")
        batch = fake_model.token_batch(1, SEQUENCE)
        tracker.track_external(model, *batch.values())
        with tracker:
            loss = model(**batch).loss
            activations = found("ACT")
            loss.backward()
            del loss
            state = {"parameters": found("PARAM"), "gradients": found("GRAD"), "activations": activations}
            for rule, make in OPTIMIZERS.items():
                optimizer = make(model.parameters())
                with Ones():
                    optimizer.step()
                yield rule, {**state, "optimizer": found("OPT")}
                optimizer.state.clear()


def run_for_real(config: dict[str, Any], sequence: int) -> Iterator[tuple[OptimizerRule, dict[str, int]]]:
    """The same numbers of a model that really goes forward, backward and step."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(fake_model.read_config(config), dtype=torch.bfloat16).train()
    model.config.use_cache = False
    ids = torch.randint(0, 97, (1, sequence))
    labels = ids.clone()
    outside = {storage(t) for t in (*model.parameters(), *model.buffers(), ids, labels)}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[storage(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=labels).loss
    kept = {key: t.untyped_storage().nbytes() for key, t in saved.items() if key not in outside}
    kept[storage(loss)] = loss.untyped_storage().nbytes()
    saved.clear()
    loss.backward()
    parameters = list(model.parameters())
    state = {
        "parameters": sum(p.nbytes for p in parameters),
        "gradients": sum(p.grad.nbytes for p in parameters),
        "activations": sum(kept.values()),
    }
    for rule, make in OPTIMIZERS.items():
        optimizer = make(parameters)
        optimizer.step()
        values = (value for entry in optimizer.state.values() for value in entry.values())
        yield rule, {**state, "optimizer": sum(v.nbytes for v in values if isinstance(v, Tensor))}


def storage(tensor: Tensor) -> int:
    """Identifies a storage that is alive."""
    return tensor.untyped_storage()._cdata


def sibling(name: str) -> dict[str, Any]:
    """A small model of the same architecture: two layers, narrow, with a window shorter than its rows."""
    fields = dict(PRESETS[name])
    if fields["model_type"] == "gpt2":
        return {
            **fields,
            "n_embd": 128,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": 997,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
    groups = fields["num_attention_heads"] // fields["num_key_value_heads"]
    fields |= {"num_attention_heads": 8, "num_key_value_heads": max(1, 8 // groups), "vocab_size": 997}
    fields |= {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2}
    fields |= {"head_dim": 32} if "head_dim" in fields else {}
    return fields | ({"sliding_window": 64} if fields.get("sliding_window") else {})


def estimated(estimate: ModelEstimate, rule: OptimizerRule) -> dict[str, int]:
    """The planner's numbers in the oracles' categories; the loss itself is alive when forward ends."""
    state = estimate.state(rule)
    return {
        "parameters": state.weights,
        "gradients": state.gradients,
        "activations": estimate.saved_bytes + estimate.epilogue.output_bytes,
        "optimizer": state.moments,
    }


def compare(
    name: str, oracle: str, estimate: ModelEstimate, found: Iterator[tuple[OptimizerRule, dict[str, int]]]
) -> list[Case]:
    return [
        Case(
            model=name,
            optimizer=rule.value,
            oracle=oracle,
            estimated=estimated(estimate, rule),
            found=numbers,
        )
        for rule, numbers in found
    ]


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def largest_layer(parameters: list[ParameterSpec]) -> int:
    """Elements of the parameters of one module, as DeepSpeed counts a layer."""
    modules: dict[str, int] = {}
    for parameter in parameters:
        module = parameter.name.rpartition(".")[0]
        modules[module] = modules.get(module, 0) + parameter.elements
    return max(modules.values())


def deepspeed_bytes(total: int, largest: int) -> tuple[int, str]:
    """ZeRO-3's model states on one GPU without offload, and how they were had."""
    python = DEEPSPEED_VENV / "bin/python"
    if not python.exists():
        return 18 * total + 4 * largest, "formula"
    code = (
        "from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as e;"
        f"print(e({total}, {largest}, cpu_offload=False, cpu_offload_params=False)[1])"
    )
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]), "called"


def accelerate_bytes(name: str) -> int:
    """What ``accelerate estimate-memory`` prints for Adam in bf16.

    Its command builds ``AutoModel``, which has no head, and reports the greatest of weights, gradients and
    optimizer states, not their sum.
    """
    from accelerate import init_empty_weights
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes
    from transformers import AutoModel

    with init_empty_weights():
        model = AutoModel.from_config(fake_model.read_config(name), dtype=torch.float32)
    total, _ = calculate_maximum_sizes(model)
    return max(estimate_training_usage(total, "bfloat16").values())


def beside(estimates: dict[str, ModelEstimate]) -> tuple[str, list[dict[str, Any]]]:
    """AdamW in mixed precision: bf16 weights and gradients, fp32 masters and moments."""
    rows, records = [], []
    for name, estimate in estimates.items():
        parameters = [p for unit in estimate.units for p in unit.parameters]
        state: StateBytes = estimate.state(OptimizerRule.ADAMW, master_weights=True)
        theirs, how = deepspeed_bytes(sum(p.elements for p in parameters), largest_layer(parameters))
        record = {
            "model": name,
            "states": state.total,
            "activations": estimate.saved_bytes,
            "accelerate": accelerate_bytes(name),
            "deepspeed": theirs,
            "deepspeed_source": how,
        }
        records.append(record)
        sizes = (f"{record[key] / GiB:.2f}" for key in ("states", "activations", "accelerate", "deepspeed"))
        rows.append((name, *sizes))
    header = ("model", "states GiB", f"activations, {SEQUENCE} tokens", "accelerate", f"deepspeed ({how})")
    return table(header, rows), records


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="only these")
    models = parser.parse_args().models
    seconds: dict[str, float] = {}
    estimates: dict[str, ModelEstimate] = {}
    for name in models:
        with timed(seconds, name):
            estimates[name] = estimate_config(name, sequence=SEQUENCE)
    tracing_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    cases: list[Case] = []
    for name, estimate in estimates.items():
        cases += compare(name, "MemTracker", estimate, track(name))
    for name in models:
        config = sibling(name)
        small = estimate_config(config, sequence=SMALL_SEQUENCE)
        cases += compare(f"{name}, small", "real run", small, run_for_real(config, SMALL_SEQUENCE))
    if WHOLE_MODEL in models:
        whole = estimate_config(WHOLE_MODEL, sequence=WHOLE_SEQUENCE)
        found = run_for_real(PRESETS[WHOLE_MODEL], WHOLE_SEQUENCE)
        cases += compare(f"{WHOLE_MODEL}, whole", "real run", whole, found)
    neighbours, records = beside(estimates)
    rows = [
        (
            case.model,
            case.optimizer,
            case.oracle,
            *(f"{case.found[key]:,}" for key in case.found),
            f"{max(case.errors.values()):.2%}",
            sum(abs(case.estimated[key] - case.found[key]) for key in case.found),
        )
        for case in cases
    ]
    header = ("model", "optimizer", "oracle", *cases[0].found, "worst error", "bytes off")
    tracing = ", ".join(f"{name} {spent:.1f} s" for name, spent in seconds.items())
    publish(
        "estimate",
        text="\n\n".join(
            [
                table(header, rows),
                neighbours,
                f"tracing (the first one loads transformers): {tracing}; peak {tracing_peak / GiB:.2f} GiB",
            ]
        ),
        summary={
            "worst_error": max(max(case.errors.values()) for case in cases),
            "cases": len(cases),
            "exact_cases": sum(case.estimated == case.found for case in cases),
            "slowest_trace_seconds": round(max(seconds.values()), 2),
            "tracing_peak_gib": round(tracing_peak / GiB, 3),
        },
        details={
            "cases": [json.loads(json.dumps(vars(case))) for case in cases],
            "beside": records,
            "trace_seconds": seconds,
        },
    )


if __name__ == "__main__":
    main()
