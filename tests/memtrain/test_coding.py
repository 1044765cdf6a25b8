"""Optimizer state that is coded on its way to a tier, from ``prepare`` to a resumed checkpoint: bit-equal."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import memtrain
from memtrain.coding import CodecError, codecs_for
from memtrain.offload.codec import staging_bytes
from memtrain.offload.coded import CodedStore
from memtrain.offload.measure import measure_machine
from memtrain.offload.snapshot import load_checkpoint, save_checkpoint
from memtrain.optim import GaLore, classify, param_groups
from memtrain.optim.storage.lossless import ExponentCodec, MissingZstandardError
from memtrain.planner.actions import Tier
from memtrain.planner.machine import Machine, StateCodec
from memtrain.recipe import RecipeError, parse_recipe
from tests.memtrain.sessions import EVERYTHING_AWAY, MACHINE, Net, loop, tokens

CODING = {"nvme": "exponent"}


@pytest.fixture(autouse=True)
def _library() -> None:
    pytest.importorskip("zstandard")


def coding_machine() -> Machine:
    codec = StateCodec(
        name="exponent",
        ratio=0.86,
        read_bytes_per_second=1e9,
        write_bytes_per_second=5e8,
        cpu_seconds_per_byte=2e-9,
        segment_bytes=4 << 20,
        staging_bytes=staging_bytes(ExponentCodec()),
    )
    links = [
        dataclasses.replace(link, state_codec=codec) if link.tier is Tier.NVME else link
        for link in MACHINE.links
    ]
    return dataclasses.replace(MACHINE, links=tuple(links))


def build(kind: str) -> tuple[Net, torch.optim.Optimizer, bool]:
    torch.manual_seed(0)
    model = Net().to(torch.bfloat16 if kind == "masters" else torch.float32)
    if kind == "galore":
        groups = param_groups(model, classify(model, rank=16))
        return model, GaLore(groups, lr=1e-2, rank=16, update_proj_gap=4, state_dtype="int8"), False
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2), kind == "masters"


def prepare(kind: str, folder: Path, *, coded: bool, nvme: str = "1GiB", **options: Any) -> memtrain.Session:
    model, optimizer, masters = build(kind)
    return memtrain.prepare(
        model,
        optimizer,
        (tokens(0),),
        budget=memtrain.Budget(device="3GiB", nvme=f"{folder}:{nvme}"),
        micro_batches=2,
        master_weights=masters,
        options=memtrain.PlannerOptions(force=EVERYTHING_AWAY, **options),
        machine=coding_machine() if coded else MACHINE,
        codecs=CODING if coded else None,
    )


def state_of(session: memtrain.Session) -> dict[tuple[str, str], torch.Tensor]:
    return {(name, key): value for name, key, value in session.optimizer.iter_state()}


@pytest.mark.parametrize(
    ("kind", "schedule"), [("adamw", "ahead"), ("masters", "sequential"), ("galore", "ahead")]
)
def test_training_is_bit_equal_and_the_plan_is_kept(tmp_path: Path, kind: str, schedule: str) -> None:
    found = []
    for coded in (False, True):
        with prepare(kind, tmp_path, coded=coded, update_schedule=schedule) as session:
            torch.manual_seed(1)
            losses = loop(session.model, session.optimizer)
            weights = {name: value.clone() for name, value in session.model.state_dict().items()}
            found.append((losses, weights, state_of(session)))
            statistics = session.engine.coding_statistics()
            used = session.engine.statistics()[Tier.NVME].peak_used_bytes
            assert used <= session.plan.peak(Tier.NVME)
            assert list(statistics) == ([Tier.NVME] if coded else [])
            assert ("optimizer state coded (exponent)" in session.report()) is coded
    (losses, weights, state), (coded_losses, coded_weights, coded_state) = found
    assert coded_losses == losses
    assert all(torch.equal(coded_weights[name], value) for name, value in weights.items())
    assert coded_state.keys() == state.keys()
    assert all(torch.equal(coded_state[key], value) for key, value in state.items())
    assert statistics[Tier.NVME].ratio < (0.9 if kind == "adamw" else 1.0)
    assert statistics[Tier.NVME].coded_bytes_read > 0


def test_a_budget_of_the_planned_bytes_is_enough(tmp_path: Path) -> None:
    with prepare("adamw", tmp_path, coded=True) as session:
        planned, coded = session.plan.peak(Tier.NVME), session.plan.staging.coded[0]
        store = session.engine.state_store(Tier.NVME)
        assert isinstance(store, CodedStore)
        assert store.staging_bytes == coded.staging_bytes
    with prepare("adamw", tmp_path, coded=True, nvme=f"{planned}B") as session:
        loop(session.model, session.optimizer)
    with pytest.raises(memtrain.InfeasibleError, match="nvme by 1 bytes"):
        prepare("adamw", tmp_path, coded=True, nvme=f"{planned - 1}B")


def test_a_checkpoint_goes_between_coded_and_plain(tmp_path: Path) -> None:
    with prepare("adamw", tmp_path, coded=True) as session:
        torch.manual_seed(1)
        loop(session.model, session.optimizer, steps=3)
        save_checkpoint(tmp_path / "saved", session, progress={"steps": 3})
        state = state_of(session)
    for coded in (False, True):
        with prepare("adamw", tmp_path, coded=coded) as session:
            load_checkpoint(tmp_path / "saved", session)
            again = state_of(session)
            assert again.keys() == state.keys()
            assert all(torch.equal(again[key], value) for key, value in state.items())


def test_a_machine_that_was_measured_otherwise_is_refused(tmp_path: Path) -> None:
    budget = memtrain.Budget(device="3GiB", nvme=f"{tmp_path}:1GiB")
    links = [
        dataclasses.replace(link, state_codec=dataclasses.replace(link.state_codec, staging_bytes=1 << 20))
        for link in coding_machine().links
        if link.state_codec is not None
    ]
    older = dataclasses.replace(coding_machine(), links=tuple(links))
    for machine, codecs, message in (
        (older, CODING, "nvme: codec exponent works in segments of 4194304 bytes and takes .* and 1048576"),
        (MACHINE, CODING, "nvme: codec exponent is asked for, machine .* was measured with none"),
        (coding_machine(), None, "nvme: codec none is asked for, machine .* was measured with exponent"),
    ):
        model, optimizer, _ = build("adamw")
        with pytest.raises(CodecError, match=message):
            memtrain.prepare(model, optimizer, (tokens(0),), budget=budget, machine=machine, codecs=codecs)


@pytest.mark.parametrize(
    ("codecs", "message"),
    [
        ({"nvme": "zip"}, r"codecs\['nvme'\] is 'zip': there are exponent"),
        ({"device": "exponent"}, r"codecs\['device'\]: a codec is for one of host, cxl, nvme"),
        ({"host": "exponent"}, "the budget has no bytes in host: give budget.host a size"),
    ],
)
def test_what_cannot_be_coded_is_named(codecs: dict[str, str], message: str) -> None:
    with pytest.raises(CodecError, match=message):
        codecs_for(codecs, memtrain.Budget(device="1GiB", nvme="/x:1GiB"))


def test_a_missing_library_is_named_before_anything_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingZstandardError, match=r'pip install "memtrain\[lossless\]"'):
        codecs_for(CODING, memtrain.Budget(device="1GiB", nvme="/x:1GiB"))


def test_a_machine_is_measured_through_the_codec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    swap = tmp_path / "swap"
    swap.mkdir()
    codecs: Any = {Tier.NVME: ExponentCodec()}
    plain = measure_machine(swap, round_seconds=0.02)
    machine = measure_machine(swap, codecs=codecs, round_seconds=0.02)
    codec = machine.link(Tier.NVME).state_codec
    assert codec is not None
    assert plain.link(Tier.NVME).state_codec is None
    assert (codec.name, codec.segment_bytes) == ("exponent", 4 << 20)
    assert codec.staging_bytes == staging_bytes(ExponentCodec())
    assert 0.84 < codec.ratio < 0.88
    assert codec.cpu_seconds_per_byte > 1e-10
    # Each has a place of its own in the cache.
    assert measure_machine(swap, codecs=codecs) == machine
    assert measure_machine(swap) == plain
    assert list(swap.iterdir()) == []
    with pytest.raises(ValueError, match="a codec is given for host, which this machine does not have here"):
        measure_machine(swap, codecs={Tier.HOST: ExponentCodec()}, refresh=True, round_seconds=0.02)


RECIPE: dict[str, Any] = {
    "name": "coded",
    "model": {"config": {"model_type": "llama"}},
    "data": {"train": "a.txt", "heldout": "b.txt", "sequence_length": 8},
    "budget": {"device": "1GiB", "nvme": "1GiB"},
    "training": {"steps": 1},
    "optimizer": {"name": "AdamW", "lr": 1e-3},
}


def test_a_recipe_names_codecs_by_tier() -> None:
    assert parse_recipe(RECIPE).tiers.codecs() == {}
    recipe = parse_recipe({**RECIPE, "tiers": {"nvme": {"codec": "exponent"}}})
    assert recipe.tiers.codecs() == CODING
    assert recipe.digest == parse_recipe(RECIPE).digest  # it decides no number
    for tiers, message in (
        ({"nvme": {"codec": "zip"}}, "tiers.nvme.codec"),
        ({"nvme": {"coded": "exponent"}}, "unknown key; did you mean codec"),
        ({"disk": {}}, "tiers.disk: unknown key"),
    ):
        with pytest.raises(RecipeError, match=message):
            parse_recipe({**RECIPE, "tiers": tiers})
