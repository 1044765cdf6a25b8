"""Optimizer state on this disk, coded and plain: bandwidth, bytes and processor time of the exponent codec.

Both sides are our own engine with direct I/O in preallocated files that were written once before, and move
transfers of 8 MiB, four a direction under way (as ``measure_machine`` does). Three kinds of bytes: SmolLM2's
weights in bf16, AdamW's fp32 moments after a few steps of SmolLM2's last layers on real text, and random
bytes, which no codec shrinks. A round runs every pattern on both sides, first the one, then the other; the
ratio is taken within a round, and the median of the rounds counts. Rates are of plain bytes; processor
seconds are those of the process. What the first round read last is compared bit by bit with what was written.

A virtual machine's disk may lie in the host's cache: say "this disk", not "NVMe".
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _harness import BenchmarkError, model_directory, publish, spread, table
from torch import Tensor

from memtrain.data import Tokens
from memtrain.offload.codec import SEGMENT_BYTES
from memtrain.offload.coded import CodedStore
from memtrain.offload.rates import TRANSFER_BYTES, TRANSFERS
from memtrain.offload.slab import Slab
from memtrain.offload.tiers import NvmeStore, Store
from memtrain.optim.storage.lossless import ExponentCodec

PATTERNS = ("read", "write", "mixed")
SIDES = ("plain", "coded")
SEQUENCE = 256
PAGE_BYTES = 4096


def smollm2_bytes(corpus: Path, size_bytes: int, steps: int) -> dict[str, Tensor]:
    """``size_bytes`` of bf16 weights, and of fp32 first and second moments, alternating by tensor."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_directory(), dtype=torch.bfloat16)
    model.requires_grad_(False)
    trained: list[torch.nn.Parameter] = []
    for layer in reversed(model.model.layers):
        if 8 * sum(p.numel() for p in trained) >= size_bytes:
            break
        trained += [p.requires_grad_(True) for p in layer.parameters() if p.dim() == 2]
    masters = [p.detach().float() for p in trained]
    optimizer = torch.optim.AdamW(masters, lr=1e-5)
    tokens = Tokens(corpus)
    for step in range(steps):
        window = torch.from_numpy(tokens.ids[step * SEQUENCE : (step + 1) * SEQUENCE].astype("int64"))[None]
        model(input_ids=window, labels=window).loss.backward()
        for master, parameter in zip(masters, trained, strict=True):
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, trained, strict=True):
                parameter.copy_(master)
    weights = [p.detach() for p in model.parameters() if p.dim() == 2]
    moments = [optimizer.state[m][key] for m in masters for key in ("exp_avg", "exp_avg_sq")]
    return {"weights": _first(weights, size_bytes), "moments": _first(moments, size_bytes)}


def _first(tensors: list[Tensor], size_bytes: int) -> Tensor:
    found = torch.cat([tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in tensors])[:size_bytes]
    if found.numel() < size_bytes:
        raise BenchmarkError(f"the model has {found.numel()} bytes of a kind, {size_bytes} are wanted")
    return found


class Side:
    """A store with extents for both directions, every one written once."""

    def __init__(self, directory: str, plain: Tensor, *, coded: bool) -> None:
        count = 2 * TRANSFERS
        segments = count * -(-TRANSFER_BYTES // SEGMENT_BYTES)
        self.inner = NvmeStore(directory, count * TRANSFER_BYTES + segments * PAGE_BYTES)
        self.store: Store | CodedStore = self.inner
        if coded:
            self.store = CodedStore(self.inner, ExponentCodec())
        self.sources, self.found = Slab(count * TRANSFER_BYTES), Slab(TRANSFERS * TRANSFER_BYTES)
        self.sources.buffer.copy_(plain)
        views = list(torch.split(self.sources.buffer, TRANSFER_BYTES))
        extents: list[Any] = [self.store.allocate(f"probe {i}", TRANSFER_BYTES) for i in range(count)]
        for extent, view in zip(extents, views, strict=True):
            self.store.write(extent, view).wait()
        targets = torch.split(self.found.buffer, TRANSFER_BYTES)
        self._reads = [
            partial(self.store.read, e, t) for e, t in zip(extents[:TRANSFERS], targets, strict=True)
        ]
        self._writes = [
            partial(self.store.write, e, v)
            for e, v in zip(extents[TRANSFERS:], views[TRANSFERS:], strict=True)
        ]

    def run(self, pattern: str, seconds: float) -> dict[str, float]:
        """Plain bytes per second, processor seconds per plain GB, and bytes on the disk by plain ones."""
        submit: list[Callable[[], Any]] = {
            "read": self._reads,
            "write": self._writes,
            "mixed": [f for pair in zip(self._reads, self._writes, strict=True) for f in pair],
        }[pattern]
        before, before_cpu, start = self._disk_bytes(), _cpu_seconds(), time.perf_counter()
        tickets = [again() for again in submit]
        moved, stopping = 0, False
        while not stopping:
            stopping = time.perf_counter() - start >= seconds
            for index, again in enumerate(submit):
                tickets[index].wait()
                moved += TRANSFER_BYTES
                if not stopping:
                    tickets[index] = again()
        elapsed, cpu = time.perf_counter() - start, _cpu_seconds() - before_cpu
        return {
            "bytes_per_second": moved / elapsed,
            "cpu_seconds_per_gb": cpu / moved * 1e9,
            "disk_bytes_by_plain": (self._disk_bytes() - before) / moved,
        }

    def check(self) -> None:
        """What was read last is what was written first. Raises BenchmarkError."""
        if not torch.equal(self.found.buffer, self.sources.buffer[: self.found.nbytes]):
            raise BenchmarkError("bytes came back changed")

    def close(self) -> None:
        if isinstance(self.store, CodedStore):
            self.store.close()
        self.inner.close()
        self.sources.close()
        self.found.close()

    def _disk_bytes(self) -> int:
        now = self.inner.statistics()
        return now.bytes_read + now.bytes_written


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(directory: str, plain: Tensor, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Rounds of every pattern on both sides, which take turns at beginning."""
    sides = {name: Side(directory, plain, coded=name == "coded") for name in SIDES}
    found: list[dict[str, Any]] = []
    try:
        for number in range(rounds):
            order = SIDES if number % 2 == 0 else SIDES[::-1]
            for pattern in PATTERNS:
                runs = {name: sides[name].run(pattern, seconds) for name in order}
                found.append({"round": number, "pattern": pattern, "runs": runs})
            if number == 0:
                for side in sides.values():
                    side.check()
    finally:
        for side in sides.values():
            side.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--swap", default=".", help="directory on the disk to measure")
    parser.add_argument("--corpus", type=Path, default=Path("data/corpora/torch-sources/train.bin"))
    parser.add_argument("--steps", type=int, default=4, help="of AdamW, before its moments are taken")
    parser.add_argument("--rounds", type=int, default=7, help="at least 5 for a claim")
    parser.add_argument("--seconds", type=float, default=1.0, help="of each run")
    args = parser.parse_args()
    size = 2 * TRANSFERS * TRANSFER_BYTES
    kinds = smollm2_bytes(args.corpus, size, args.steps)
    generator = torch.Generator().manual_seed(0)
    kinds["random"] = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    results: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="memtrain_bench_", dir=args.swap) as directory:
        for kind, plain in kinds.items():
            os.mkdir(place := os.path.join(directory, kind))
            results[kind] = measure(place, plain, args.rounds, args.seconds)
    report(results, args)


def report(results: dict[str, list[dict[str, Any]]], args: argparse.Namespace) -> None:
    """Print the table and the JSON line, and keep the evidence."""
    summary: dict[str, Any] = {}
    rows, said = [], []
    for kind, rounds in results.items():
        for pattern in PATTERNS:
            runs = [entry["runs"] for entry in rounds if entry["pattern"] == pattern]
            ratios = spread([r["coded"]["bytes_per_second"] / r["plain"]["bytes_per_second"] for r in runs])
            summary[f"{kind}_{pattern}_vs_plain"] = round(ratios["median"], 3)
            said.append(
                f"{kind}, {pattern}: coded by plain {ratios['median']:.3f} "
                f"(from {ratios['min']:.3f} to {ratios['max']:.3f})"
            )
            for side in SIDES:
                rate = spread([r[side]["bytes_per_second"] / 1e9 for r in runs])
                cpu = spread([r[side]["cpu_seconds_per_gb"] for r in runs])["median"]
                disk = spread([r[side]["disk_bytes_by_plain"] for r in runs])["median"]
                rates = (f"{rate[k]:.2f}" for k in ("min", "median", "max"))
                rows.append((kind, pattern, side, *rates, f"{cpu:.2f}", f"{disk:.3f}"))
                summary[f"{kind}_{pattern}_cpu_seconds_per_gb_{side}"] = round(cpu, 3)
                if side == "coded" and pattern == "write":
                    summary[f"{kind}_ratio"] = round(disk, 4)
    summary |= {"rounds": args.rounds, "seconds": args.seconds, "steps": args.steps}
    header = ("bytes", "pattern", "side", "GB/s min", "median", "max", "CPU s/GB", "disk bytes by plain")
    text = "\n".join([table(header, rows), *said])
    publish("tier_codec", text=text, summary=summary, details={"results": results})


if __name__ == "__main__":
    main()
