"""Streamed models under a session: the profile, the numbers and the checkpoints of a model in memory."""

import dataclasses
import errno
import subprocess
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import memtrain
from memtrain.forms import BlockForms
from memtrain.offload.async_snapshot import AsyncCheckpointer
from memtrain.offload.atomic import CheckpointError
from memtrain.offload.device import make_device
from memtrain.offload.errors import PlanMismatchError, WeightAwayError
from memtrain.offload.snapshot import latest_checkpoint, load_checkpoint, save_checkpoint
from memtrain.optim.autograd.causal_lm import install_chunked_loss
from memtrain.planner.actions import Tier
from memtrain.planner.trace import profile_model
from memtrain.planner.tracing.blocks import find_blocks
from memtrain.rehearsal import BlockRehearsal
from memtrain.streamed_models import StreamedModelError, streamed_model
from memtrain.streamed_tracing import traced_weights
from memtrain.weight_streaming import stream_weights
from tests.memtrain.plans import AWAY
from tests.memtrain.sessions import MACHINE
from tests.offload.async_runs import assert_same_folders

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 272,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 300,
}


def llama(tie):
    return AutoConfig.for_model("llama", **SHAPE, tie_word_embeddings=tie)


def in_memory(tie, dtype=torch.bfloat16):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(llama(tie), dtype=dtype)
    model.config.use_cache = False
    return model.train()


@pytest.fixture
def budget(tmp_path):
    (tmp_path / "swap").mkdir()
    return memtrain.Budget(device="4GiB", nvme=f"{tmp_path / 'swap'}:64MiB")


def streamed(tie, budget, seed=0):
    torch.manual_seed(seed)
    made = streamed_model(llama(tie), dtype=torch.bfloat16, budget=budget)
    made.model.config.use_cache = False
    made.model.train()
    return made


def batch(step):
    ids = torch.randint(0, 300, (1, 32), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids}


def prepare(model, budget, force=AWAY, machine=MACHINE):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    options = memtrain.PlannerOptions(force=force)
    return memtrain.prepare(
        model,
        optimizer,
        batch(0),
        budget=budget,
        options=options,
        machine=machine,
        micro_batches=2,
        master_weights=True,
    )


def train(session, steps):
    losses = []
    for step in steps:
        for micro in range(2):
            loss = session.model(**batch(2 * step + micro)).loss / 2
            loss.backward()
            losses.append(loss.item())
        session.optimizer.clip_grad_norm_(1.0)
        session.optimizer.step()
        session.optimizer.zero_grad()
    return losses


def profile_of(model, budget, stored=None):
    """Without seconds, and without what the process holds beside the model."""
    blocks = find_blocks(model)
    optimizer = torch.optim.AdamW(model.parameters())

    def measure(weights):
        present = {} if weights is None else {"present": weights.present_in}
        forms = BlockForms(model, blocks, batch(0), ("exact",), **present)
        return profile_model(
            model,
            batch(0),
            optimizer=optimizer,
            elementwise=True,
            rehearsal=BlockRehearsal(model, forms),
            weights=weights,
        )

    if stored is None:
        handle = install_chunked_loss(model)
        found = measure(None)
    else:
        with traced_weights(model, blocks, stored, make_device("cpu")) as weights:
            head = model.get_output_embeddings()
            handle = install_chunked_loss(model, probing=weights.probing(head))
            with weights.installed():
                found = measure(weights)
    handle.uninstall()
    data = dataclasses.asdict(found)
    assert data.pop("baseline_bytes") > 0
    return _without_seconds(data)


def _without_seconds(value):
    if isinstance(value, dict):
        return {key: _without_seconds(v) for key, v in value.items() if "seconds" not in key}
    return [_without_seconds(v) for v in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("tie", [False, True])
def test_the_profile_is_that_of_the_model_in_memory(budget, tie):
    expected = profile_of(in_memory(tie), budget)
    with streamed(tie, budget) as made:
        before = dict(made.weights.extents)
        assert profile_of(made.model, budget, made.weights) == expected
        assert dict(made.weights.extents) == before  # handed back
        with pytest.raises(WeightAwayError):
            made.model.lm_head.weight.sum()


@pytest.mark.parametrize("tie", [False, True])
def test_training_and_its_checkpoint_are_bit_equal(tmp_path, budget, tie):
    with prepare(in_memory(tie), budget, force={}) as session:
        expected = train(session, range(3))
        save_checkpoint(tmp_path / "expected", session, progress={})
    with streamed(tie, budget) as made:
        with prepare(made.model, budget, {"state": AWAY["state"]}) as session:  # prefixes may be chosen too
            away = {decision.unit for decision in session.plan.states if decision.weight_tier.value == "nvme"}
            assert {f"model.layers.{index}" for index in range(4)} <= away
            assert train(session, range(3)) == expected
            save_checkpoint(tmp_path / "saved", session, progress={})
            with pytest.raises(StreamedModelError, match=r"hold one unit"):
                made.model.state_dict()
            with session.weights.hold("model.layers.2"):
                held = made.model.model.layers[2].mlp.up_proj.state_dict()["weight"].clone()
        weights, wanted = (
            load_file(tmp_path / folder / "model.safetensors") for folder in ("saved", "expected")
        )
        assert list(weights) == list(wanted)
        assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
        assert torch.equal(held, wanted["model.layers.2.mlp.up_proj.weight"])
        # After the session the weights are on the tier, as trained, and nothing else is.
        for name in made.weights.extents:
            assert torch.equal(made.weights.read(name), wanted[name])
        assert made.weights.store.used_bytes == sum(e.reserved_bytes for e in made.weights.extents.values())
    files = {path.name for path in (tmp_path / "expected").iterdir()}
    assert {path.name for path in (tmp_path / "saved").iterdir()} == files
    reread = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert all(torch.equal(p, wanted[name]) for name, p in reread.named_parameters())


def test_a_run_is_taken_up_bit_for_bit_also_by_a_model_in_memory(tmp_path, budget):
    with streamed(False, budget) as made, prepare(made.model, budget) as session:
        train(session, range(2))
        save_checkpoint(tmp_path / "at", session, progress={"steps": 2})
        expected = train(session, range(2, 4))
        save_checkpoint(tmp_path / "end", session, progress={})
    with streamed(False, budget, seed=5) as other, prepare(other.model, budget) as session:
        assert load_checkpoint(tmp_path / "at", session) == {"steps": 2}
        assert train(session, range(2, 4)) == expected
        save_checkpoint(tmp_path / "again", session, progress={})
    with prepare(in_memory(False), budget, force={}) as session:
        load_checkpoint(tmp_path / "at", session)
        assert train(session, range(2, 4)) == expected
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in ("end", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_weights_that_the_plan_keeps_come_home(budget):
    with streamed(False, budget) as made:
        with prepare(made.model, budget, force={"state": {"weight_tier": "device"}}) as session:
            assert session.weights is None
            assert made.weights.extents == {}
            plain = in_memory(False).state_dict()
            assert all(torch.equal(value, plain[name]) for name, value in made.model.state_dict().items())
        train_all = made.model(**batch(0)).loss
        assert torch.isfinite(train_all)


def test_a_full_disk_is_a_typed_error_and_leaves_nothing(tmp_path, budget):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(small)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a file system can be mounted by root alone")
    try:
        with streamed(False, budget) as made, prepare(made.model, budget) as session:
            train(session, range(1))
            with pytest.raises(CheckpointError, match="bytes are free there") as raised:
                save_checkpoint(small / "at", session, progress={})
            assert raised.value.errno == errno.ENOSPC
            assert list(small.iterdir()) == []
            assert latest_checkpoint(small) is None
            train(session, range(1, 2))  # no unit is left held
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_saving_holds_one_unit_at_a_time(tmp_path, budget):
    from memtrain.offload.snapshot_weights import present

    held = []

    class Watched(SimpleNamespace):
        def unit_of(self, tensor):
            return self.units[tensor]

        def hold(self, unit):
            from contextlib import contextmanager

            @contextmanager
            def holding():
                held.append(unit)
                assert len(held) == 1
                yield
                held.remove(unit)

            return holding()

    units = {"a": "one", "b": "one", "c": None, "d": "two", "e": "one"}
    seen = [(tensor, list(held)) for tensor in present(units, Watched(units=units))]
    assert seen == [("a", ["one"]), ("b", ["one"]), ("c", ["one"]), ("d", ["two"]), ("e", ["one"])]
    assert held == []


def test_weights_that_a_session_brought_home_stay_there_for_the_next(budget):
    stays = {**AWAY, "state.model.layers.1": {**AWAY["state"], "weight_tier": "device"}}
    with streamed(False, budget) as made:
        found = []
        for _ in range(2):
            with prepare(made.model, budget, stays) as session:
                assert session.weights is not None
                assert "model.layers.1" not in session.weights.streamed
                found += train(session, range(1))
    torch.manual_seed(0)
    model = in_memory(False)
    expected = []
    for _ in range(2):
        with prepare(model, budget, {"state": {**AWAY["state"], "weight_tier": "device"}}) as session:
            expected += train(session, range(1))
    assert found == expected


def test_a_streamed_model_is_offered_no_tier_but_its_own(budget):
    with streamed(False, budget) as made:
        both = memtrain.Budget(device="4GiB", cxl="0:64MiB", nvme=f"{budget.nvme_directory}:64MiB")
        machine = dataclasses.replace(
            MACHINE, links=(*MACHINE.links, dataclasses.replace(MACHINE.links[0], tier=Tier.CXL))
        )
        with pytest.raises(ValueError, match=r"leaves nothing; tiers are \['device', 'nvme'\]"):
            prepare(made.model, both, {"state": {"weight_tier": "cxl"}}, machine)
        with prepare(made.model, both, {"state": {"optimizer_tier": "cxl"}}, machine) as session:
            assert {state.weight_tier for state in session.plan.states} <= {Tier.DEVICE, Tier.NVME}
            moved = [dataclasses.replace(state, weight_tier=Tier.CXL) for state in session.plan.states]
            plan = dataclasses.replace(session.plan, states=tuple(moved))
            rest = {"profile": session.profile, "engine": session.engine, "undo": ExitStack()}
            units = [(state.unit, []) for state in moved]
        with pytest.raises(PlanMismatchError, match=r"on cxl, those of this .* on nvme: plan with options"):
            stream_weights(made.model, [], units, plan=plan, stored=made.weights, **rest)


@pytest.mark.parametrize("schedule", ["sequential", "ahead"])
def test_snapshots_beside_training(tmp_path, budget, schedule):
    """The synchronous checkpoint at every step, and the session is taken up from one of them."""

    def begun(made):
        options = memtrain.PlannerOptions(force=AWAY, update_schedule=schedule)
        return memtrain.prepare(
            made.model,
            torch.optim.AdamW(made.model.parameters(), lr=1e-3),
            batch(0),
            budget=budget,
            options=options,
            machine=MACHINE,
            micro_batches=2,
            master_weights=True,
            spare_state_bytes=8 << 20,
        )

    with streamed(True, budget) as made, begun(made) as session:
        expected = []
        for step in range(3):
            expected += train(session, [step])
            save_checkpoint(tmp_path / f"sync-{step}", session, progress={"n": step})
    with streamed(True, budget) as made:
        with (
            begun(made) as session,
            AsyncCheckpointer(session, spare_bytes={Tier.NVME: 8 << 20}) as snapshots,
        ):
            losses = []
            for step in range(3):
                losses += train(session, [step])
                snapshots.save(tmp_path / f"async-{step}", progress={"n": step})
        assert losses == expected
        for step in range(3):
            assert_same_folders(tmp_path / f"sync-{step}", tmp_path / f"async-{step}")
        with begun(made) as session:  # weights are where the snapshots left them: home or in a spare
            assert load_checkpoint(tmp_path / "async-0", session) == {"n": 0}
            assert train(session, [1, 2]) == expected[2:]
