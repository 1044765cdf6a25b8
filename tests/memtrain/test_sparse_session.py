"""Embedding tables by rows in a session: bit-equal to plain PyTorch with the same two optimizers."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memtrain
from memtrain.offload.async_snapshot import AsyncCheckpointer
from memtrain.offload.atomic import CheckpointError
from memtrain.offload.errors import OffloadError, PlanMismatchError, TierFullError, WeightAwayError
from memtrain.offload.optimizer import NonFiniteGradientError
from memtrain.offload.row_table import RowTable
from memtrain.offload.snapshot import load_checkpoint, save_checkpoint
from memtrain.planner.actions import Tier
from memtrain.planner.plan import Plan
from memtrain.sparse_tables import SparseTableError, sparse_inputs
from tests.memtrain.test_session import MACHINE
from tests.offload.streamed import llama

STEPS = 3
TABLE = "model.embed_tokens.weight"


def batch(step: int, *, rows: int = 300) -> dict[str, Tensor]:
    tokens = torch.randint(0, rows, (2, 16), generator=torch.Generator().manual_seed(step))
    return {"input_ids": tokens, "labels": tokens}


def sparse_llama() -> nn.Module:
    model = llama(tied=False)
    sparse_inputs(model)
    return model


def optimizers(model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    table = model.get_parameter(TABLE)
    others = [p for p in model.parameters() if p is not table]
    return torch.optim.AdamW(others, lr=1e-2), torch.optim.SparseAdam([table], lr=1e-2)


def loop(model: nn.Module, *steppers: Any, micro: int = 2, first: int = 0, steps: int = STEPS) -> list[float]:
    """Two micro-batches a step; ``steppers`` are all optimizers, or the one that leads."""
    found = []
    for step in range(first, first + steps):
        for each in range(micro):
            loss = model(**batch(micro * step + each)).loss
            (loss / micro).backward()
            found.append(loss.item())
        for optimizer in steppers:
            optimizer.step()
            optimizer.zero_grad()
    return found


def plain(micro: int = 2, steps: int = STEPS) -> tuple[list[float], dict[str, Tensor], dict[str, Any]]:
    torch.manual_seed(1)
    model = sparse_llama()
    dense, lazy = optimizers(model)
    losses = loop(model, dense, lazy, micro=micro, steps=steps)
    return losses, model.state_dict(), lazy.state_dict()["state"][0]


def prepare(model: nn.Module, folder: Path, *, micro: int = 2, **arguments: Any) -> memtrain.Session:
    given = arguments.pop("options", {})
    dense, lazy = optimizers(model)
    return memtrain.prepare(
        model,
        dense,
        batch(0),
        budget=memtrain.Budget(device="3GiB", nvme=f"{folder}:256MiB"),
        sparse_optimizer=lazy,
        micro_batches=micro,
        machine=MACHINE,
        chunked_loss=False,
        options=memtrain.PlannerOptions(**given),
        **arguments,
    )


def same_state(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(torch.as_tensor(ours[key]), torch.as_tensor(theirs[key])) for key in theirs
    )


AWAY = {"state": {"weight_tier": "nvme", "optimizer_tier": "nvme", "gradient_tier": "nvme"}}
RESIDENT = {"state": {"weight_tier": "device", "optimizer_tier": "device", "gradient_tier": "device"}}


@pytest.mark.parametrize(
    ("micro", "force", "schedule"),
    [
        (2, AWAY, "sequential"),
        (2, AWAY, "ahead"),
        (1, AWAY, "in_backward"),
        (2, RESIDENT, "sequential"),
        (1, RESIDENT, "ahead"),
    ],
)
def test_a_table_by_rows_trains_bit_for_bit(
    tmp_path: Path, micro: int, force: dict[str, Any], schedule: str
) -> None:
    losses, weights, state = plain(micro)
    model = sparse_llama()
    embedding, parameter = model.get_submodule("model.embed_tokens"), model.get_parameter(TABLE)
    session = prepare(model, tmp_path, micro=micro, options={"force": force, "update_schedule": schedule})
    assert isinstance(model.get_submodule("model.embed_tokens"), RowTable)
    assert model.get_parameter(TABLE) is parameter
    with pytest.raises(WeightAwayError, match="save_checkpoint"):
        model.state_dict()
    torch.manual_seed(1)
    assert loop(session.model, session.optimizer, micro=micro) == losses
    assert session.sparse_optimizer is not None
    assert same_state(session.sparse_optimizer.state_dict()["state"][0], state)
    assert f"{TABLE} on nvme by rows: 300 rows" in session.report()
    rows = {(row.tier, row.content): row for row in session.writes.per_step()}
    written = rows["nvme", "optimizer state"]
    assert 0 < written.changed_bytes <= written.written_bytes
    assert rows["nvme", "weights"].changed_bytes <= rows["nvme", "weights"].written_bytes
    session.close()
    session.close()
    assert model.get_submodule("model.embed_tokens") is embedding
    assert model.get_parameter(TABLE) is parameter
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
