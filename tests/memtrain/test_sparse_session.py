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
from tests.memtrain.plans import AWAY
from tests.memtrain.sessions import MACHINE
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


def test_all_micro_batches_may_pass_a_block_together(tmp_path: Path) -> None:
    losses, weights, _ = plain()
    model = sparse_llama()
    options = {"force": AWAY, "micro_batch_order": "vertical"}
    with prepare(model, tmp_path, options=options) as session:
        assert session.plan.micro_batch_order.value == "vertical"
        torch.manual_seed(1)
        found: list[float] = []
        for step in range(STEPS):
            found += [float(each) for each in session.accumulate([batch(2 * step), batch(2 * step + 1)])]
            session.optimizer.step()
            session.optimizer.zero_grad()
        assert found == losses
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("streamed", [False, True])
def test_a_checkpoint_is_taken_up(tmp_path: Path, streamed: bool) -> None:
    _, weights, state = plain(steps=4)
    forces = (AWAY, RESIDENT) if streamed else (RESIDENT, AWAY)
    with prepare(sparse_llama(), tmp_path, options={"force": forces[0]}) as session:
        torch.manual_seed(1)
        loop(session.model, session.optimizer, steps=2)
        with pytest.raises(CheckpointError, match="sparse_optimizer"):
            AsyncCheckpointer(session)
        save_checkpoint(tmp_path / "saved", session, progress={"steps": 2})
    model = sparse_llama()
    with torch.no_grad():
        model.get_parameter(TABLE).zero_()
    with prepare(model, tmp_path, options={"force": forces[1]}) as session:
        assert load_checkpoint(tmp_path / "saved", session) == {"steps": 2}
        loop(session.model, session.optimizer, first=2, steps=2)
        assert session.sparse_optimizer is not None
        assert same_state(session.sparse_optimizer.state_dict()["state"][0], state)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_the_files_of_a_checkpoint_are_the_plain_models(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    with prepare(sparse_llama(), tmp_path) as session:
        loop(session.model, session.optimizer, steps=1)
        save_checkpoint(tmp_path / "saved", session, progress={})
        lazy = session.sparse_optimizer
        assert lazy is not None
        state = lazy.state_dict()["state"][0]
    found = load_file(tmp_path / "saved" / "model.safetensors")
    assert torch.equal(found[TABLE], session.model.get_parameter(TABLE))
    assert '"format_version": 3' in (tmp_path / "saved" / "optimizer.json").read_text()
    stored = load_file(tmp_path / "saved" / "sparse_optimizer.safetensors")
    assert stored.keys() == {f"{TABLE}/exp_avg", f"{TABLE}/exp_avg_sq"}
    assert all(torch.equal(value, state[name.rpartition("/")[2]]) for name, value in stored.items())
    without = llama(tied=False)
    dense = torch.optim.AdamW(without.parameters())
    budget = memtrain.Budget(device="3GiB", nvme=f"{tmp_path}:256MiB")
    with memtrain.prepare(without, dense, batch(0), budget=budget, machine=MACHINE) as other:
        with pytest.raises(
            PlanMismatchError, match="session has none: prepare the model with a sparse_optim"
        ):
            load_checkpoint(tmp_path / "saved", other)
        save_checkpoint(tmp_path / "plain", other, progress={})
    with prepare(sparse_llama(), tmp_path) as session:
        with pytest.raises(PlanMismatchError, match=r"session has tables .* without a sparse_optimizer"):
            load_checkpoint(tmp_path / "plain", session)
        loop(session.model, session.optimizer, steps=1)


def test_state_that_there_was_is_taken_over(tmp_path: Path) -> None:
    _, weights, _ = plain(steps=4)
    model = sparse_llama()
    dense, lazy = optimizers(model)
    torch.manual_seed(1)
    loop(model, dense, lazy, steps=2)
    budget = memtrain.Budget(device="3GiB", nvme=f"{tmp_path}:256MiB")
    arguments: dict[str, Any] = {"budget": budget, "micro_batches": 2, "machine": MACHINE}
    with memtrain.prepare(
        model, dense, batch(0), sparse_optimizer=lazy, chunked_loss=False, **arguments
    ) as session:
        loop(session.model, session.optimizer, first=2, steps=2)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_what_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    model = sparse_llama()
    table = model.get_parameter(TABLE)
    head = model.get_parameter("lm_head.weight")
    dense, lazy = optimizers(model)
    budget = memtrain.Budget(device="3GiB", nvme=f"{tmp_path}:256MiB")

    def refused(match: str, error: type[Exception] = SparseTableError, **changed: Any) -> None:
        given: dict[str, Any] = {"sparse_optimizer": lazy, "budget": budget, "machine": MACHINE, **changed}
        subject, optimizer = given.pop("model", model), given.pop("optimizer", dense)
        with pytest.raises(error, match=match):
            memtrain.prepare(subject, optimizer, batch(0), **given)
        assert isinstance(model.get_submodule("model.embed_tokens"), nn.Embedding)
        assert torch.isfinite(table).all()

    refused(
        "lm_head.weight cannot be a table.*no nn.Embedding", sparse_optimizer=torch.optim.SparseAdam([head])
    )
    refused("in the other optimizer too", optimizer=torch.optim.AdamW(model.parameters()))
    refused("fails on a sparse gradient", OffloadError, sparse_optimizer=torch.optim.Adam([table]))
    refused("allocator is 'planned'", memtrain.PrepareError, allocator="planned")
    small = memtrain.Budget(device="3GiB", nvme=f"{tmp_path}:64KiB")
    refused("take .* bytes, and no tier", TierFullError, budget=small)
    tied = llama(tied=True)
    weight = tied.get_parameter(TABLE)
    tied.get_submodule("model.embed_tokens").sparse = True  # type: ignore[assignment]
    others = torch.optim.AdamW([p for p in tied.parameters() if p is not weight])
    refused(
        "is tied .*lm_head.weight",
        model=tied,
        optimizer=others,
        sparse_optimizer=torch.optim.SparseAdam([weight]),
    )
    with pytest.raises(SparseTableError, match="are tied"):
        sparse_inputs(llama(tied=True))
    handle = model.get_submodule("model.embed_tokens").register_forward_hook(lambda *_: None)
    refused("has hooks")
    handle.remove()
    model.get_submodule("model.embed_tokens").sparse = False  # type: ignore[assignment]
    refused("sparse=False", PlanMismatchError)


def test_a_step_that_is_refused_has_stepped_no_table(tmp_path: Path) -> None:
    with prepare(sparse_llama(), tmp_path, micro=1, master_weights=True) as session:
        optimizer, lazy = session.optimizer, session.sparse_optimizer
        assert lazy is not None
        head = session.model.get_parameter("lm_head.weight")
        loop(session.model, optimizer, micro=1, steps=1)
        session.model(**batch(1)).loss.backward()
        optimizer.clip_grad_norm_(1e-3, parameters=[head])
        assert head.grad is not None
        head.grad.add_(1.0)
        with pytest.raises(OffloadError, match="changed between clip_grad_norm_"):
            optimizer.step()
        assert lazy.state_dict()["state"][0]["step"] == 1
        optimizer.step()
        assert lazy.state_dict()["state"][0]["step"] == 2


def test_what_looks_at_gradients(tmp_path: Path) -> None:
    model = sparse_llama()
    with prepare(model, tmp_path, micro=1, nonfinite="raise") as session:
        optimizer, lazy = session.optimizer, session.sparse_optimizer
        assert lazy is not None
        with pytest.raises(OffloadError, match=r"session.optimizer.step\(\) steps the tables"):
            lazy.step()
        loss = session.model(**batch(0)).loss
        loss.backward()
        with pytest.raises(NotImplementedError):  # as plain PyTorch
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with pytest.raises(PlanMismatchError, match="no norm of sparse gradients"):
            optimizer.clip_grad_norm_(1.0)
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(loss.detach())
        with pytest.raises(PlanMismatchError, match="a loss scaler"):
            scaler.step(optimizer)
        model.zero_grad()
        weight = model.get_parameter(TABLE)
        assert weight.grad is None
        session.model(**batch(0)).loss.backward()
        weight.grad._values()[3, 5] = float("nan")  # type: ignore[union-attr]
        with pytest.raises(NonFiniteGradientError, match=TABLE):
            optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        assert weight.grad is not None
        assert not weight.grad._values().any()
        optimizer.zero_grad()
        assert weight.grad is None


def test_a_step_that_is_skipped_leaves_tables_alone(tmp_path: Path) -> None:
    model = sparse_llama()
    before = model.get_parameter(TABLE).detach().clone()
    with prepare(model, tmp_path, micro=1, nonfinite="skip") as session:
        session.model(**batch(0)).loss.backward()
        model.get_parameter("lm_head.weight").grad.mul_(float("inf"))  # type: ignore[union-attr]
        session.optimizer.step()
        assert session.optimizer.last_step_skipped
        assert session.sparse_optimizer is not None
        assert session.sparse_optimizer.scalar_state() == {}
    assert torch.equal(model.get_parameter(TABLE), before)


def test_a_schedule_over_the_lazy_optimizer(tmp_path: Path) -> None:
    def scheduled(model: nn.Module, stepped: list[Any], lazy: Any) -> None:
        schedule = torch.optim.lr_scheduler.LambdaLR(lazy, lambda step: 1.0 / (1 + step))
        for step in range(STEPS):
            model(**batch(step)).loss.backward()
            for optimizer in stepped:
                optimizer.step()
                optimizer.zero_grad()
            schedule.step()

    expected = sparse_llama()
    dense, lazy = optimizers(expected)
    scheduled(expected, [dense, lazy], lazy)
    model = sparse_llama()
    with prepare(model, tmp_path, micro=1) as session:
        scheduled(session.model, [session.optimizer], session.sparse_optimizer)
    found = model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in expected.state_dict().items())


@pytest.mark.parametrize("write", [False, True])
def test_a_tier_that_fails_is_a_typed_error_until_a_checkpoint_is_loaded(tmp_path: Path, write: bool) -> None:
    _, weights, _ = plain(micro=1, steps=2)
    model = sparse_llama()
    with prepare(model, tmp_path, micro=1) as session:
        torch.manual_seed(1)
        loop(session.model, session.optimizer, micro=1, steps=1)
        save_checkpoint(tmp_path / "saved", session, progress={})
        session.model(**batch(1)).loss.backward()
        store = session.engine.store(Tier.NVME)
        real = store.write if write else store.read

        def broken(*_: Any) -> Any:
            raise OSError(errno.EIO, "broken")

        setattr(store, "write" if write else "read", broken)
        with pytest.raises(OSError, match="broken"):
            session.optimizer.step()
        setattr(store, "write" if write else "read", real)
        with pytest.raises(OffloadError, match=f"{TABLE} failed half-way"):
            session.model(**batch(1))
        session.optimizer.zero_grad()
        load_checkpoint(tmp_path / "saved", session)
        loop(session.model, session.optimizer, micro=1, first=1, steps=1)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_the_plan_counts_tables(tmp_path: Path) -> None:
    with prepare(sparse_llama(), tmp_path) as session:
        (table,) = session.profile.tables
        assert (table.name, table.tier, table.rows, table.lookups) == (TABLE, Tier.NVME, 300, 32)
        assert table.used_rows == batch(0)["input_ids"].unique().numel()
        width = session.model.get_parameter(TABLE).shape[1]
        group_rows = 4096 // (4 * width)
        assert (table.row_bytes, table.weight_group_rows) == (4 * width, group_rows)
        lines = {(line.tier, line.category): line.size_bytes for line in session.plan.bill}
        state_groups = -(-300 // (4096 // (8 * width)))
        assert lines[Tier.NVME, "tables"] == 4096 * (-(-300 // group_rows) + state_groups)
        gradient = 2 * 32 * (4 * width + 8)
        others = (1 << 20) * 4 + 448 * state_groups + (32 - table.used_rows) * 4 * width
        assert lines[Tier.DEVICE, "tables"] == gradient + others
        assert not any(TABLE in unit.parameters for unit in session.profile.units)
        assert [event.name for event in session.plan.timeline].count("update tables") == 1
        assert Plan.from_json(session.plan.to_json()) == session.plan
        loop(session.model, session.optimizer)
        found = session.measure()
        assert found["peak_bytes"] == pytest.approx(found["predicted_peak_bytes"], rel=0.08)


def test_what_the_other_weights_refuse_leaves_tables_alone(tmp_path: Path) -> None:
    model = sparse_llama()
    with prepare(model, tmp_path, micro=1, options={"force": RESIDENT}) as session:
        loop(session.model, session.optimizer, micro=1, steps=1)
        head = model.get_parameter("lm_head.weight")
        session.model(**batch(1)).loss.backward()
        kept, head.grad = head.grad, torch.zeros_like(head).to_sparse()
        assert session.sparse_optimizer is not None
        before = session.sparse_optimizer.scalar_state()
        with pytest.raises(PlanMismatchError, match="only dense gradients"):
            session.optimizer.step()
        assert session.sparse_optimizer.scalar_state() == before
        head.grad = kept
        session.optimizer.step()
    _, weights, _ = plain(micro=1, steps=2)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


class TwoTables(nn.Module):
    """The first table is looked up twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Embedding(700, 128, sparse=True)
        self.second = nn.Embedding(500, 128, sparse=True)
        self.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.first(tokens) + self.second(tokens) + self.first(tokens // 2 + 100)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden.square().mean()


def prepare_two(model: TwoTables, folder: Path, tokens: Tensor) -> memtrain.Session:
    return memtrain.prepare(
        model,
        torch.optim.AdamW(model.layers.parameters()),
        tokens,
        budget=memtrain.Budget(device="3GiB", nvme=f"{folder}:64MiB"),
        sparse_optimizer=torch.optim.SparseAdam([model.first.weight, model.second.weight], lr=0.1),
        machine=MACHINE,
    )


def test_gradients_that_there_are_wait_for_their_step(tmp_path: Path) -> None:
    tokens = torch.arange(64).view(4, 16)
    model, twin = TwoTables(), TwoTables()
    for each in (model, twin):
        each(tokens).backward()
    with prepare_two(model, tmp_path, tokens):
        pass
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, twin.get_parameter(name))
        gradient = twin.get_parameter(name).grad
        assert gradient is not None
        assert parameter.grad is not None
        assert torch.equal(parameter.grad.to_dense(), gradient.to_dense())


def test_a_table_that_is_called_twice_has_both_calls_on_the_bill(tmp_path: Path) -> None:
    model, tokens = TwoTables(), torch.arange(64).view(4, 16)
    with prepare_two(model, tmp_path, tokens) as session:
        first, second = session.profile.tables
        assert (first.lookups, first.used_rows) == (128, 64 + 32)
        assert (second.lookups, second.used_rows) == (64, 64)
        for _ in range(2):
            session.model(tokens).backward()
            assert model.first.weight.grad is not None
            assert model.first.weight.grad._nnz() == first.lookups
            session.optimizer.zero_grad()
        assert "first.weight on nvme by rows: 700 rows, at most 96 in a forward" in session.report()
    assert not model._forward_pre_hooks
