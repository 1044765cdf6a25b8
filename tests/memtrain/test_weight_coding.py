"""Weights coded on their tier, from ``prepare``, streamed models and recipes: bit-equal, as planned."""

from __future__ import annotations

import dataclasses
import errno
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import memtrain
from memtrain.coding import CodecError, weight_codecs_for, weight_dtype
from memtrain.offload.codec import staging_bytes
from memtrain.offload.errors import TierIOError
from memtrain.offload.io import Fault, FaultyBackend, ThreadPoolBackend
from memtrain.offload.measure import measure_machine
from memtrain.offload.snapshot import load_checkpoint, save_checkpoint
from memtrain.offload.tiers import NvmeStore
from memtrain.optim.storage.lossless import ExponentCodec, MissingZstandardError
from memtrain.planner.actions import Tier
from memtrain.planner.machine import Machine, StateCodec
from memtrain.planner.plan import Plan
from memtrain.recipe import RecipeError, parse_recipe
from memtrain.report import plan_text
from memtrain.streamed_models import StreamedModel, StreamedModelError, streamed_model
from tests.memtrain import test_streamed_session as streamed_session
from tests.memtrain.plans import AWAY
from tests.memtrain.sessions import MACHINE
from tests.memtrain.streamed_sessions import batch, loop, optimizer_for, plain
from tests.memtrain.test_coding import RECIPE
from tests.memtrain.test_train_streamed import away, run, same_run
from tests.offload.streamed import llama

__all__ = ["away"]
CODING = {"nvme": "exponent"}


@pytest.fixture(autouse=True)
def _library() -> None:
    pytest.importorskip("zstandard")


def coding_machine(**changes: Any) -> Machine:
    codec = StateCodec(
        name="exponent",
        ratio=0.67,
        read_bytes_per_second=1e9,
        write_bytes_per_second=5e8,
        cpu_seconds_per_byte=2e-9,
        segment_bytes=4 << 20,
        staging_bytes=staging_bytes(ExponentCodec()),
    )
    codec = dataclasses.replace(codec, **changes)
    links = [dataclasses.replace(link, weight_codec=codec) for link in MACHINE.links]
    return dataclasses.replace(MACHINE, links=tuple(links))


def prepare(
    model: nn.Module, folder: Path, *, nvme: str = "256MiB", schedule: str = "sequential", **arguments: Any
) -> memtrain.Session:
    fields: dict[str, Any] = {"weight_codecs": CODING, "machine": coding_machine()}
    return memtrain.prepare(
        model,
        optimizer_for(model),
        batch(0),
        budget=memtrain.Budget(device="3GiB", nvme=f"{folder}:{nvme}"),
        micro_batches=2,
        chunked_loss=False,
        options=memtrain.PlannerOptions(force=AWAY, update_schedule=schedule),
        **(fields | arguments),
    )


@pytest.mark.parametrize(
    ("dtype", "schedule", "masters"),
    [(torch.float32, "sequential", False), (torch.bfloat16, "ahead", False), (torch.bfloat16, "ahead", True)],
)
def test_training_is_bit_equal_and_the_plan_is_kept(
    tmp_path: Path, dtype: torch.dtype, schedule: str, masters: bool
) -> None:
    def trained(**arguments: Any) -> tuple[list[float], dict[str, torch.Tensor], memtrain.Session]:
        model = llama(dtype=dtype)
        session = prepare(model, tmp_path, schedule=schedule, master_weights=masters, **arguments)
        with session:
            torch.manual_seed(1)
            losses = loop(session.model, session.optimizer)
            used = session.engine.statistics()[Tier.NVME].peak_used_bytes
            assert used <= session.plan.peak(Tier.NVME)
            told = session.report()
        assert ("weights coded (exponent)" in told) is ("machine" not in arguments)
        return losses, model.state_dict(), session

    losses, weights, session = trained()
    assert [each.tier for each in session.plan.staging.coded_weights] == [Tier.NVME]
    assert "windows of" in plan_text(session.plan)
    assert "coded (exponent)" in plan_text(session.plan)
    done = session.engine.weight_coding_statistics()[Tier.NVME]
    assert done.ratio < (0.75 if dtype is torch.bfloat16 else 0.92)
    assert done.coded_bytes_read > 0
    expected, plain_weights, other = trained(machine=MACHINE, weight_codecs=None)
    assert other.plan.staging.coded_weights == ()
    assert losses == expected
    assert all(torch.equal(weights[name], value) for name, value in plain_weights.items())
    if not masters:
        assert losses == plain(llama(dtype=dtype))[0]


def test_a_budget_of_the_planned_bytes_is_enough(tmp_path: Path) -> None:
    with prepare(llama(), tmp_path) as session:
        planned = session.plan.peak(Tier.NVME)
    with prepare(llama(), tmp_path, nvme=f"{planned}B") as session:
        loop(session.model, session.optimizer)
    with pytest.raises(memtrain.InfeasibleError, match="nvme by 1 bytes"):
        prepare(llama(), tmp_path, nvme=f"{planned - 1}B")


@pytest.mark.parametrize(("rate", "coded"), [(1e6, False), (1e12, True)])
def test_auto_does_what_is_predicted_to_be_faster(tmp_path: Path, rate: float, coded: bool) -> None:
    machine = coding_machine(
        read_bytes_per_second=rate, write_bytes_per_second=rate, cpu_seconds_per_byte=0.0
    )
    slow = tuple(
        dataclasses.replace(
            link, read_bytes_per_second=1e8, write_bytes_per_second=1e8, mixed_bytes_per_second=2e8
        )
        for link in machine.links
    )
    machine = dataclasses.replace(machine, links=slow)
    model = llama()
    with prepare(model, tmp_path, machine=machine, weight_codecs={"nvme": "auto"}) as session:
        assert bool(session.plan.staging.coded_weights) is coded
        assert loop(session.model, session.optimizer) == plain(llama())[0]
        assert bool(session.engine.weight_coding_statistics()) is coded


def test_a_plan_that_leaves_weights_as_they_are_is_refused_where_they_were_to_be_coded(
    tmp_path: Path,
) -> None:
    machine = coding_machine(read_bytes_per_second=1e6, write_bytes_per_second=1e6)
    with prepare(llama(), tmp_path, machine=machine, weight_codecs={"nvme": "auto"}) as session:
        plan, profile = session.plan, session.profile
    assert plan.staging.coded_weights == ()

    def again(codecs: dict[str, str]) -> None:
        from memtrain.coding import codecs_of_plan

        codecs_of_plan(plan, weight_codecs_for(codecs, session.budget))

    assert profile.digest == plan.profile_digest
    again({"nvme": "auto"})
    with pytest.raises(CodecError, match=r"weight_codecs\['nvme'\] is 'exponent', and the plan leaves"):
        again(CODING)


def test_a_failed_write_is_named_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FaultyBackend(ThreadPoolBackend(2))
    monkeypatch.setattr(
        "memtrain.offload.engine.NvmeStore", lambda where, size: NvmeStore(where, size, backend=backend)
    )
    model = llama()
    with prepare(model, tmp_path) as session:
        torch.manual_seed(1)
        expected, _ = plain(llama())
        streamer = session.weights
        assert streamer is not None
        with streamer.hold("model.layers.1"), torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(1.0)  # type: ignore[union-attr,index]
        for number in range(backend.submitted, backend.submitted + 400):
            backend.plan[number] = Fault(error=errno.ENOSPC)
        with pytest.raises(TierIOError, match=r"layers\.1\.mlp\.up_proj.*ENOSPC"):
            streamer.flush()
        backend.plan.clear()
        torch.manual_seed(1)
        assert loop(session.model, session.optimizer) == expected


@pytest.mark.parametrize(
    ("codecs", "message"),
    [
        ({"nvme": "zip"}, r"weight_codecs\['nvme'\] is 'zip': there are exponent"),
        ({"device": "auto"}, r"weight_codecs\['device'\]: a codec is for one of host, cxl, nvme"),
        ({"host": "auto"}, r"weight_codecs\['host'\] is 'exponent', but the budget has no bytes in host"),
    ],
)
def test_what_cannot_be_coded_is_named(codecs: dict[str, str], message: str) -> None:
    with pytest.raises(CodecError, match=message):
        weight_codecs_for(codecs, memtrain.Budget(device="1GiB", nvme="/x:1GiB"))


def test_a_missing_library_is_named_before_anything_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingZstandardError, match=r'pip install "memtrain\[lossless\]"'):
        weight_codecs_for({"nvme": "auto"}, memtrain.Budget(device="1GiB", nvme="/x:1GiB"))


def test_a_machine_that_was_measured_otherwise_is_refused(tmp_path: Path) -> None:
    for machine, codecs, message in (
        (MACHINE, CODING, "nvme: weight codec exponent is asked for, machine .* was measured with none"),
        (coding_machine(), None, "nvme: weight codec none is asked for, .* was measured with exponent"),
        (
            coding_machine(staging_bytes=1),
            CODING,
            "weight codec exponent works in segments of .* and 1:",
        ),
    ):
        with pytest.raises(CodecError, match=message):
            prepare(llama(), tmp_path, machine=machine, weight_codecs=codecs)


def test_a_machine_is_measured_through_the_codec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    swap = tmp_path / "swap"
    swap.mkdir()
    codecs: Any = {Tier.NVME: ExponentCodec()}
    found = {
        dtype: measure_machine(swap, weight_codecs=codecs, weight_dtype=dtype, round_seconds=0.02)
        for dtype in (torch.bfloat16, torch.float32)
    }
    for dtype, least, most in ((torch.bfloat16, 0.64, 0.69), (torch.float32, 0.82, 0.86)):
        link = found[dtype].link(Tier.NVME)
        assert link.state_codec is None
        assert link.weight_codec is not None
        assert least < link.weight_codec.ratio < most
        assert measure_machine(swap, weight_codecs=codecs, weight_dtype=dtype) == found[dtype]  # remembered
    assert list(swap.iterdir()) == []


def test_the_dtype_of_most_bytes_is_measured() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(64, 64).to(torch.bfloat16))
    assert weight_dtype(model) is torch.bfloat16


# streamed models --------------------------------------------------------------------------------


@pytest.fixture
def budget(tmp_path: Path) -> memtrain.Budget:
    (tmp_path / "swap").mkdir()
    return memtrain.Budget(device="4GiB", nvme=f"{tmp_path / 'swap'}:64MiB")


def streamed(budget: memtrain.Budget, seed: int = 0, **arguments: Any) -> StreamedModel:
    torch.manual_seed(seed)
    fields: dict[str, Any] = {"weight_codecs": CODING} | arguments
    made = streamed_model(streamed_session.llama(False), dtype=torch.bfloat16, budget=budget, **fields)
    made.model.config.use_cache = False  # type: ignore[union-attr]
    made.model.train()
    return made


def test_a_streamed_model_is_coded_from_the_start(tmp_path: Path, budget: memtrain.Budget) -> None:
    expected = streamed_session.in_memory(False)
    with streamed(budget) as made:
        for name, parameter in expected.named_parameters():
            if name in made.weights.extents:
                assert torch.equal(made.weights.read(name), parameter)
        before = made.weights.store.used_bytes
        session = streamed_session.prepare(made.model, budget, machine=coding_machine())
        assert [each.tier for each in session.plan.staging.coded_weights] == [Tier.NVME]
        losses = streamed_session.train(session, range(2))
        save_checkpoint(tmp_path / "saved", session, progress={"steps": 2})
        used = session.engine.statistics()[Tier.NVME].peak_used_bytes
        assert used <= session.plan.peak(Tier.NVME)
        session.close()
        assert made.weights.store.used_bytes == before
        with pytest.raises(CodecError, match=r"exponent is asked for, machine .* measured with none"):
            streamed_session.prepare(made.model, budget, machine=MACHINE)
        again = streamed_session.prepare(made.model, budget, machine=coding_machine())
        trained = {n: made.weights.extents[n].nbytes for n in made.weights.extents}
        assert trained.keys() == {n for n, p in expected.named_parameters() if p.numel() >= 65536}
        again.close()
    with streamed_session.prepare(expected, budget) as session:
        assert streamed_session.train(session, range(2)) == losses
        rest = streamed_session.train(session, range(2, 4))
    with (
        streamed(budget, seed=9) as made,
        streamed_session.prepare(made.model, budget, machine=coding_machine()) as session,
    ):
        load_checkpoint(tmp_path / "saved", session)
        assert streamed_session.train(session, range(2, 4)) == rest


def test_weights_that_stay_come_home_decoded(budget: memtrain.Budget) -> None:
    stay = {"state": {"weight_tier": "device", "gradient_tier": "nvme", "optimizer_tier": "nvme"}}
    expected = streamed_session.in_memory(False)
    with streamed(budget) as made:
        session = streamed_session.prepare(made.model, budget, stay, coding_machine())
        assert session.weights is None
        assert session.plan.staging.coded_weights == ()
        for name, parameter in expected.named_parameters():
            assert torch.equal(made.model.get_parameter(name), parameter)
        assert not made.weights.extents
        session.close()


def test_a_streamed_model_stays_as_it_lies(budget: memtrain.Budget) -> None:
    message = r"on nvme as they are: give streamed_model\(\) weight_codecs="
    with streamed(budget, weight_codecs=None) as made, pytest.raises(CodecError, match=message):
        memtrain.prepare(
            made.model,
            torch.optim.AdamW(made.model.parameters()),
            streamed_session.batch(0),
            budget=budget,
            weight_codecs=CODING,
        )


def test_a_codec_for_another_tier_than_the_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "swap").mkdir()
    both = memtrain.Budget(device="4GiB", host="64MiB", nvme=f"{tmp_path / 'swap'}:64MiB")
    with pytest.raises(StreamedModelError, match="the weights go to host, the fastest tier"):
        streamed(both)
    with pytest.raises(StreamedModelError, match=r"is 'auto', and host memory .* is not measured"):
        streamed(memtrain.Budget(device="4GiB", host="64MiB"), weight_codecs={"host": "auto"})


@pytest.mark.parametrize("pays", [False, True])
def test_auto_asks_the_disk(budget: memtrain.Budget, monkeypatch: pytest.MonkeyPatch, pays: bool) -> None:
    rate = 1e12 if pays else 1e6
    machine = coding_machine(read_bytes_per_second=rate, write_bytes_per_second=rate)
    monkeypatch.setattr("memtrain.streamed_models.measure_machine", lambda *_, **__: machine)
    with streamed(budget, weight_codecs={"nvme": "auto"}) as made:
        assert (made.weights.codec is not None) is pays
        known = machine if pays else MACHINE
        with streamed_session.prepare(made.model, budget, machine=known) as session:
            assert bool(session.plan.staging.coded_weights) is pays


def test_no_room_names_what_coded_weights_may_take(tmp_path: Path, budget: memtrain.Budget) -> None:
    with streamed(budget) as made:
        room = made.weights.store.used_bytes
    swap = tmp_path / "swap"
    with streamed(memtrain.Budget(device="4GiB", nvme=f"{swap}:{room}B")):
        pass
    with pytest.raises(memtrain.offload.errors.TierFullError, match=f"the weights take {room} bytes"):
        streamed(memtrain.Budget(device="4GiB", nvme=f"{swap}:{room - 1}B"))


# recipes ----------------------------------------------------------------------------------------


def test_a_recipe_names_codecs_of_weights_by_tier() -> None:
    assert parse_recipe(RECIPE).tiers.weight_codecs() == {}
    for name in ("exponent", "auto"):
        recipe = parse_recipe({**RECIPE, "tiers": {"nvme": {"weight_codec": name}}})
        assert recipe.tiers.weight_codecs() == {"nvme": name}
        assert recipe.tiers.codecs() == {}
        assert recipe.digest == parse_recipe(RECIPE).digest  # it decides no number
    with pytest.raises(RecipeError, match=r"tiers\.nvme\.weight_codec"):
        parse_recipe({**RECIPE, "tiers": {"nvme": {"weight_codec": "zip"}}})


@pytest.mark.parametrize("from_the_start", [False, True])
def test_a_recipe_trains_as_without(
    tmp_path: Path, away: None, from_the_start: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "coded", streamed=from_the_start, tiers={"nvme": {"weight_codec": "exponent"}})
    assert "weights coded (exponent)" in capsys.readouterr().out
    plan = Plan.from_json((tmp_path / "coded" / "plan.json").read_text())
    assert [each.tier for each in plan.staging.coded_weights] == [Tier.NVME]
    run(tmp_path / "plain", streamed=from_the_start)
    same_run(tmp_path / "coded", tmp_path / "plain")
