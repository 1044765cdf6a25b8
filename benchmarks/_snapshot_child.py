"""Train a random Llama and take snapshots of it, as told line by line; what the parent is told is JSON.

    python benchmarks/_snapshot_child.py --engine memtrain --directory /var/tmp/x
    run KIND      a stretch of steps with a snapshot of KIND (or none) at its beginning
    finish        a last snapshot of every kind that a restart may take up; then it waits to be killed

With ``--recover KIND`` it takes such a snapshot up instead, says how long that took, and ends. Engines:

- memtrain: bf16 weights in memory, fp32 masters and moments on disk. Kinds: asynchronous, held, synchronous.
- torch: the same training with everything in memory, and torch.distributed.checkpoint (DCP) in one process.
  Kinds: dcp (async_save as it comes), dcp_reused (its stager, and the memory staged to, kept from one save to
  the next), dcp_staged (the same, staged by a thread during forward and backward; the update waits for that),
  dcp_sync (save), torch_save.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _train_child import LEARNING_RATE, WEIGHT_DECAY, memory_bytes, token_batches

SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
"""SmolLM2-135M's, but for the number of layers and the vocabulary."""
VOCABULARY = 16_384
SEQUENCE = 256
IN_MEMORY_BUT_STATE = {
    "block": {"action": "keep"},
    "state": {"weight_tier": "device", "gradient_tier": "device", "optimizer_tier": "nvme"},
}


def make_model(layers: int) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("llama", **SHAPE, num_hidden_layers=layers, vocab_size=VOCABULARY)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.config.use_cache = False
    return model.train()


def digest(model: Any) -> str:
    import torch
    import xxhash

    found = xxhash.xxh3_128()
    for parameter in model.parameters():
        found.update(parameter.detach().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def written_bytes() -> int:
    """That this process has sent to disks, as the kernel counts them."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["write_bytes"])


class MemtrainEngine:
    """Ours."""

    KINDS = ("asynchronous", "held", "synchronous")

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        import memtrain
        from memtrain.offload.async_snapshot import AsyncCheckpointer
        from memtrain.offload.held import HeldSnapshots
        from memtrain.planner.actions import Tier
        from memtrain.planner.machine import Machine

        self.folder = Path(args.directory) / "checkpoints"
        swap = Path(args.directory) / "swap"
        swap.mkdir(parents=True, exist_ok=True)
        model = make_model(args.layers)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.batches = token_batches(VOCABULARY, SEQUENCE, 16)
        spare_bytes = args.spare_mib << 20
        measured = Path(args.directory) / "machine.json"  # a restart does not measure the machine anew
        known = Machine.from_json(measured.read_text()) if measured.exists() else None
        self.session = memtrain.prepare(
            model,
            optimizer,
            self.batches[0],
            budget=memtrain.Budget(device="6GiB", nvme=f"{swap}:12GiB"),
            master_weights=True,
            split_masters=False,  # the same bytes as the other engine's
            machine=known,
            options=memtrain.PlannerOptions(force=IN_MEMORY_BUT_STATE),
            spare_state_bytes=spare_bytes,
        )
        measured.write_text(self.session.machine.to_json())
        self.model = self.session.model
        self.held = HeldSnapshots(Path(args.directory) / "holder")
        spare = {Tier.NVME: spare_bytes} if spare_bytes else {}
        self.snapshots = AsyncCheckpointer(self.session, spare_bytes=spare)

    def step(self, number: int) -> None:
        self.session.model(**self.batches[number % len(self.batches)]).loss.backward()
        self.session.optimizer.step()
        self.session.optimizer.zero_grad()

    def settle(self) -> None:
        """Nothing of a stretch is left for the next one."""
        self.session.flush()

    def clear(self, kind: str) -> None:
        """The snapshot before is replaced when the new one is complete."""

    def done(self) -> bool:
        """Whether no snapshot is being written."""
        return not self.snapshots.busy

    def begin(self, kind: str) -> Callable[[], None]:
        """Begin a snapshot; what waits for its end."""
        from memtrain.offload.snapshot import save_checkpoint

        if kind == "asynchronous":
            self.snapshots.save(self.folder / kind, progress={})
        elif kind == "held":
            self.snapshots.begin(lambda: self.held.publish("held"), "held", progress={})
        else:
            save_checkpoint(self.folder / kind, self.session, progress={})
        return self.snapshots.wait

    def finish(self) -> None:
        for kind in ("asynchronous", "held"):
            self.begin(kind)()

    def recover(self, kind: str) -> None:
        from memtrain.offload.snapshot import load_checkpoint

        if kind == "held":
            with self.held.folder() as folder:
                assert folder is not None
                load_checkpoint(folder, self.session)
        else:
            load_checkpoint(self.folder / kind, self.session)

    def close(self) -> None:
        self.snapshots.close()
        self.held.leave()
        self.session.close()


class TorchEngine:
    """Plain mixed precision by hand, in memory."""

    KINDS = ("dcp", "dcp_reused", "dcp_staged", "dcp_sync", "torch_save")

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        self.folder = Path(args.directory) / "torch"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model = make_model(args.layers)
        self.weights = list(self.model.parameters())
        self.masters = [weight.detach().float() for weight in self.weights]
        self.optimizer = torch.optim.AdamW(
            self.masters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.batches = token_batches(VOCABULARY, SEQUENCE, 16)
        self.stagers: dict[str, Any] = {}
        self.staging: Any = None
        """To be waited for before weights change."""
        self.future: Any = None
        self.step(0)  # state exists from the first step on, for loading too

    def step(self, number: int) -> None:
        import torch

        self.model(**self.batches[number % len(self.batches)]).loss.backward()
        for weight, master in zip(self.weights, self.masters, strict=True):
            assert weight.grad is not None
            master.grad = weight.grad.float()
            weight.grad = None
        if self.staging is not None:
            self.staging.result()
            self.staging = None
        self.optimizer.step()
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters, strict=True):
                weight.copy_(master)
                master.grad = None

    def settle(self) -> None:
        """Nothing runs beside the steps."""

    def clear(self, kind: str) -> None:
        """Remove the snapshot before, off the clock: DCP replaces none."""
        shutil.rmtree(self.folder / kind, ignore_errors=True)

    def done(self) -> bool:
        """As ours."""
        return self.future is None or self.future.done()

    def state(self) -> dict[str, Any]:
        """The same bytes as ours: weights, masters, two moments."""
        found = {f"weight.{n}": weight.detach() for n, weight in enumerate(self.weights)}
        for n, master in enumerate(self.masters):
            found[f"master.{n}"] = master
            found |= {f"{key}.{n}": value for key, value in self.optimizer.state[master].items()}
        return found

    def begin(self, kind: str) -> Callable[[], None]:
        import torch
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        path = self.folder / kind
        if kind == "torch_save":
            path.mkdir()
            with open(path / "state.pt", "wb") as file:
                torch.save(self.state(), file)
                file.flush()
                os.fsync(file.fileno())
            return lambda: None
        if kind == "dcp_sync":
            dcp.save(self.state(), checkpoint_id=path, no_dist=True)
            return lambda: None
        if kind != "dcp" and kind not in self.stagers:
            options = StagingOptions(  # pinning and copies that do not block need an accelerator
                use_pinned_memory=False,
                use_shared_memory=False,
                use_async_staging=kind == "dcp_staged",
                use_non_blocking_copy=False,
            )
            self.stagers[kind] = DefaultStager(options)
        stager = self.stagers.get(kind)
        found: Any = dcp.async_save(self.state(), checkpoint_id=path, async_stager=stager, no_dist=True)
        self.staging = getattr(found, "staging_completion", None)
        self.future = getattr(found, "upload_completion", found)

        def wait() -> None:
            self.future.result()
            self.future = None

        return wait

    def finish(self) -> None:
        for kind in ("dcp_sync", "torch_save"):
            self.clear(kind)
            self.begin(kind)

    def recover(self, kind: str) -> None:
        import torch
        import torch.distributed.checkpoint as dcp

        if kind == "dcp_sync":
            dcp.load(self.state(), checkpoint_id=self.folder / kind, no_dist=True)
            return
        loaded = torch.load(self.folder / kind / "state.pt", weights_only=True)
        for name, tensor in self.state().items():
            tensor.copy_(loaded[name])

    def close(self) -> None:
        """Nothing is held."""


def stretch(engine: Any, kind: str, steps: int) -> dict[str, Any]:
    """``steps`` steps, and more until the snapshot that is begun before the first of them is complete."""
    engine.settle()
    engine.clear(kind)
    os.sync()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM from here on
    before_bytes, base_bytes = written_bytes(), memory_bytes("VmRSS")
    began = time.perf_counter()
    wait = engine.begin(kind) if kind != "none" else None
    request_seconds = time.perf_counter() - began
    complete_seconds, number = 0.0, 0
    while number < steps or not engine.done():
        engine.step(number)
        number += 1
        if engine.done() and not complete_seconds:
            complete_seconds = time.perf_counter() - began
    engine.settle()
    seconds = time.perf_counter() - began
    if wait is not None:
        wait()
    peak_bytes = memory_bytes("VmHWM")
    os.sync()
    return {
        "seconds": seconds,
        "steps": number,
        "request_seconds": request_seconds,
        "complete_seconds": complete_seconds,
        "peak_bytes": peak_bytes,
        "base_bytes": base_bytes,
        "written_bytes": written_bytes() - before_bytes,
    }


def main() -> None:
    started = time.perf_counter()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", required=True, choices=("memtrain", "torch"))
    parser.add_argument("--directory", required=True, help="on a local disk")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=4, help="of a stretch")
    parser.add_argument("--spare-mib", type=int, default=256, help="memtrain: room on disk for generations")
    parser.add_argument("--recover", help="the kind of the snapshot to take up")
    args = parser.parse_args()
    engine: Any = (MemtrainEngine if args.engine == "memtrain" else TorchEngine)(args)

    def tell(**facts: Any) -> None:
        print(json.dumps(facts), flush=True)

    if args.recover:
        prepared_seconds = time.perf_counter() - started
        began = time.perf_counter()
        engine.recover(args.recover)
        loaded_seconds = time.perf_counter() - began
        tell(load_seconds=loaded_seconds, prepared_seconds=prepared_seconds, digest=digest(engine.model))
        engine.close()
        return
    for number in range(2):
        engine.step(number)
    parameters = sum(parameter.numel() for parameter in engine.model.parameters())
    tell(ready=True, parameters=parameters)
    for line in sys.stdin:
        words = line.split()
        if words[0] == "run":
            tell(**stretch(engine, words[1], args.steps))
        elif words[0] == "finish":
            engine.settle()
            engine.finish()
            tell(digest=digest(engine.model))


if __name__ == "__main__":
    main()
