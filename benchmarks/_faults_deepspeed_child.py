"""DeepSpeed's optimizer on a disk, as often as it is asked for, each time in a process of its own.

ZeRO stage 3 with the optimizer on NVMe, DeepSpeedCPUAdam, three layers of which each is a sub-group: per
layer 16 MiB in four files (weights in fp32, two moments and the gradient), read and written at every step.

An order is a line of JSON on the standard input:

    {"swap": folder, "weights": file, "seed": 0, "pause_at": 2, "nan_at": null, "skip_at": null}

Step ``nan_at`` has a loss that is no number, ``skip_at`` is left out. Answers are lines of JSON on the
standard output: ``{"pid": n}``; ``{"paused": true}`` before step ``pause_at``, which then waits for another
line; ``{"trained": true}`` once the weights are in their file, or ``{"error": type, "message": text}``; and
``{"exit": code}`` in the end. One that is killed answers that alone.

It imports DeepSpeed once and forks for each order. Run by ``_faults_deepspeed.py``, also with ``python -O``.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
from typing import Any

LAYERS = 3
STEPS = 4
WIDTH = 1024
ANSWERS = os.dup(1)
os.dup2(2, 1)  # what DeepSpeed prints goes to the log


def say(**answer: Any) -> None:
    os.write(ANSWERS, (json.dumps(answer) + "\n").encode())


def hear() -> str:
    """The next line; empty at the end. Unbuffered: parent and child read in turns."""
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := os.read(0, 1)):
            return ""
        line += byte
    return line.decode()


def configuration(swap: str) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "aio": {"block_size": 1 << 20, "queue_depth": 8, "intra_op_parallelism": 1, "overlap_events": True},
        "steps_per_print": 1 << 30,
        "zero_optimization": {
            "stage": 3,
            "sub_group_size": WIDTH * WIDTH,
            "reduce_bucket_size": 2_000_000,
            "stage3_prefetch_bucket_size": 2_000_000,
            "stage3_max_live_parameters": 2_000_000,
            "offload_optimizer": {
                "device": "nvme", "nvme_path": swap, "buffer_count": 4, "pin_memory": False,
            },
        },
    }  # fmt: skip


def train(order: dict[str, Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import deepspeed
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    config = configuration(order["swap"])
    torch.manual_seed(order["seed"])
    with deepspeed.zero.Init(config_dict_or_path=config, dtype=torch.bfloat16):
        model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    optimizer = DeepSpeedCPUAdam(model.parameters(), lr=1e-3, adamw_mode=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(STEPS):
        if step == order["pause_at"]:
            say(paused=True)
            hear()
        if step == order["skip_at"]:
            continue
        generator = torch.Generator().manual_seed(1000 * order["seed"] + step)
        loss = engine(torch.randn(4, WIDTH, generator=generator).bfloat16()).float().square().mean()
        engine.backward(loss * float("nan") if step == order["nan_at"] else loss)
        engine.step()
    resource.setrlimit(resource.RLIMIT_FSIZE, [resource.getrlimit(resource.RLIMIT_FSIZE)[1]] * 2)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        torch.save([weight.detach().clone() for weight in model.parameters()], order["weights"])
    say(trained=True)


def main() -> None:
    import deepspeed  # noqa: F401
    from deepspeed.ops.op_builder import AsyncIOBuilder, CPUAdamBuilder

    AsyncIOBuilder().load()
    CPUAdamBuilder().load()
    say(ready=True)
    while line := hear():
        child = os.fork()
        if child == 0:
            code = 1
            try:
                say(pid=os.getpid())
                train(json.loads(line))
                code = 0
            except BaseException as error:
                say(error=type(error).__name__, message=str(error)[:400])
            finally:
                sys.stderr.flush()
                os._exit(code)
        say(exit=os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    main()
