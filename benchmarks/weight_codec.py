"""Streamed weights that lie on this disk coded (exponents, exactly, as NeuZip has it) against plain ones.

SmolLM2-135M in bf16, every block streamed through two windows more than the fewest: forward and backward
passes whose gradients are dropped, so that weights are read and nothing is written. The same on this disk as
it is, and behind a backend that lets so many bytes a second pass and no more: what a slower disk would do.
The sides take turns; ratios are taken within a round, and medians count. Losses must have the same bits.

``tiers.nvme.weight_codec: auto`` codes weights where a plan is predicted to be faster for it. This measures
where it is.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections import deque
from contextlib import ExitStack
from typing import Any

import torch
from _harness import BenchmarkError, model_directory, publish, spread, table

from memtrain.offload.device import make_device
from memtrain.offload.engine import Engine
from memtrain.offload.io import Direction, IOBackend, IORequest, ThreadPoolBackend
from memtrain.offload.parameters import ParameterStreamer
from memtrain.offload.tiers import NvmeStore
from memtrain.optim.storage.lossless import ExponentCodec
from memtrain.planner.actions import Tier
from memtrain.planner.tracing.blocks import find_blocks

SIDES = ("plain", "coded")
SLOTS = 4
CAPACITY_BYTES = 400 << 20


class ThrottledBackend:
    """Passes requests on no faster than ``bytes_per_second`` in each direction."""

    def __init__(self, inner: IOBackend, bytes_per_second: float) -> None:
        self._inner, self._rate = inner, bytes_per_second
        self._queues: dict[Direction, deque[IORequest]] = {d: deque() for d in Direction}
        self._changed, self._closed = threading.Condition(), False
        self._threads = [threading.Thread(target=self._pass_on, args=(d,), daemon=True) for d in Direction]
        for thread in self._threads:
            thread.start()

    def submit(self, request: IORequest) -> None:
        with self._changed:
            self._queues[request.direction].append(request)
            self._changed.notify_all()

    def _pass_on(self, direction: Direction) -> None:
        free_at, queue = time.perf_counter(), self._queues[direction]
        while True:
            with self._changed:
                while not queue and not self._closed:
                    self._changed.wait()
                if not queue:
                    return
                request = queue.popleft()
            free_at = max(free_at, time.perf_counter()) + request.buffer.numel() / self._rate
            time.sleep(max(0.0, free_at - time.perf_counter()))
            self._inner.submit(request)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._inner.close()


class Side:
    """A model whose blocks are streamed."""

    def __init__(
        self, directory: str, undo: ExitStack, *, coded: bool, bytes_per_second: float | None
    ) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(model_directory(), dtype=torch.bfloat16)
        self.model.config.use_cache = False
        pool: Any = ThreadPoolBackend(4, "memtrain-nvme-bench")
        backend = pool if bytes_per_second is None else ThrottledBackend(pool, bytes_per_second)
        self.store = NvmeStore(directory, CAPACITY_BYTES, backend=backend)
        codecs = {Tier.NVME: ExponentCodec()} if coded else {}
        engine = undo.enter_context(Engine({Tier.NVME: self.store}, make_device("cpu"), weight_codecs=codecs))
        blocks = find_blocks(self.model)
        named = dict(self.model.named_parameters())
        inside = {f"{block}.{name}" for block, module in blocks for name, _ in module.named_parameters()}
        units = [("prologue", [(name, p) for name, p in named.items() if name not in inside])]
        for block, module in blocks:
            units.append((block, [(f"{block}.{name}", p) for name, p in module.named_parameters()]))
        tiers = {name: Tier.NVME for name, _ in blocks}
        streamer = ParameterStreamer(self.model, blocks, units, tiers=tiers, engine=engine, slots=SLOTS)
        undo.callback(streamer.close)
        streamer.install()

    def run(self, tokens: torch.Tensor) -> tuple[float, float, int]:
        """Seconds, loss, bytes that the disk gave."""
        before = self.store.statistics().bytes_read
        start = time.perf_counter()
        loss = self.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        seconds = time.perf_counter() - start
        self.model.zero_grad()
        return seconds, float(loss.detach()), self.store.statistics().bytes_read - before


def measure(directory: str, rounds: int, tokens: torch.Tensor, rate: float | None) -> dict[str, Any]:
    """Seconds of the coded side by those of the plain one, and what each read."""
    with ExitStack() as undo:
        sides = {}
        for name in SIDES:
            os.makedirs(place := os.path.join(directory, name), exist_ok=True)
            sides[name] = Side(place, undo, coded=name == "coded", bytes_per_second=rate)
        ratios, seconds, read = [], {name: [] for name in SIDES}, dict.fromkeys(SIDES, 0)  # type: ignore[var-annotated]
        for number in range(rounds + 1):
            order = SIDES if number % 2 else SIDES[::-1]
            found = {name: sides[name].run(tokens) for name in order}
            if found["plain"][1] != found["coded"][1]:
                raise BenchmarkError(f"losses differ: {found}")
            if number:
                ratios.append(found["coded"][0] / found["plain"][0])
                for name in SIDES:
                    seconds[name].append(found[name][0])
                    read[name] = found[name][2]
    return {
        "seconds_ratio": spread(ratios),
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "bytes_read": read,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--swap", default=".", help="directory on the disk to measure")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rates", type=float, nargs="*", default=[50.0, 150.0, 500.0], help="MB/s")
    args = parser.parse_args()
    tokens = torch.randint(0, 49_152, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="memtrain_bench_", dir=args.swap) as directory:
        for rate in (None, *args.rates):
            name = "this disk" if rate is None else f"{rate:g} MB/s"
            results[name] = measure(directory, args.rounds, tokens, None if rate is None else rate * 1e6)
    rows = [
        (
            name, *(f"{found['seconds'][side]['median']:.2f}" for side in SIDES),
            *(f"{found['seconds_ratio'][k]:.3f}" for k in ("min", "median", "max")),
            f"{found['bytes_read']['coded'] / found['bytes_read']['plain']:.3f}",
        )
        for name, found in results.items()
    ]  # fmt: skip
    header = ("tier", "plain s", "coded s", "coded by plain, min", "median", "max", "bytes by plain")
    summary = {f"{name}_seconds_ratio": round(f["seconds_ratio"]["median"], 3) for name, f in results.items()}
    first = results["this disk"]["bytes_read"]
    summary |= {"bytes_ratio": round(first["coded"] / first["plain"], 4), "rounds": args.rounds}
    publish("weight_codec", text=table(header, rows), summary=summary, details=results)


if __name__ == "__main__":
    main()
