"""Layers cut into tiles and streamed: bit-equal to a plain loop over tiles, inside a budget that the whole
layers do not fit, with checkpoints in the untiled model's names and shapes."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import memtrain
from memtrain.offload.async_snapshot import AsyncCheckpointer
from memtrain.offload.atomic import publish
from memtrain.offload.shards import MASTER_KEY
from memtrain.offload.snapshot import load_checkpoint, load_optimizer_state, save_checkpoint
from memtrain.offload.snapshot_weights import load_weights, write_weights
from memtrain.offload.weight_units import window_bytes
from memtrain.optim import AdamW8bit
from memtrain.optim.autograd.tiled_linear import TiledEmbedding, TiledLinear
from memtrain.planner import resident, staging
from memtrain.planner.tracing.blocks import find_blocks
from memtrain.planner.weight_windows import WantedWindows, weight_windows
from memtrain.streamed_models import StreamedModelError, streamed_model, traced_units
from memtrain.tiling import (
    TilingError,
    automatic_tile_bytes,
    choose_cuts,
    cut,
    split_units,
    tiles_of,
    tiling_lines,
)
from tests.memtrain.plans import AWAY
from tests.memtrain.sessions import MACHINE, budget_beyond_now
from tests.offload.async_runs import assert_same_folders

MiB = 1 << 20
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 832,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 1203,
    "use_cache": False,
}
"""An odd number of rows: table and head."""
TILE_BYTES = 300 << 10


def config(**changes):
    return AutoConfig.for_model("llama", **{**SHAPE, **changes})


def in_memory(kind, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kind, dtype=dtype).train()


def in_tiles(model, tile_bytes=TILE_BYTES):
    """The plain loop over tiles: the same modules, in memory."""
    cut(model, choose_cuts(model, traced_units(model, find_blocks(model)), tile_bytes))
    return model


@pytest.fixture
def budget(tmp_path):
    (tmp_path / "swap").mkdir()
    return memtrain.Budget(device="4GiB", nvme=f"{tmp_path / 'swap'}:128MiB")


def streamed(kind, budget, tile_bytes=TILE_BYTES, seed=0):
    torch.manual_seed(seed)
    made = streamed_model(kind, dtype=torch.bfloat16, budget=budget, tile_bytes=tile_bytes)
    made.model.train()
    return made


def batch(step):
    ids = torch.randint(0, 1203, (1, 24), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids}


def adamw(model):
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)


def prepare(model, budget, make=adamw, force=AWAY, machine=MACHINE, master_weights=True, **options):
    return memtrain.prepare(
        model,
        make(model),
        batch(0),
        budget=budget,
        options=memtrain.PlannerOptions(force=force, **options),
        machine=machine,
        micro_batches=2,
        master_weights=master_weights,
    )


def train(session, steps):
    losses = []
    for step in steps:
        for micro in range(2):
            loss = session.model(**batch(2 * step + micro)).loss / 2
            loss.backward()
            losses.append(loss.item())
        session.optimizer.step()
        session.optimizer.zero_grad()
    return losses


def in_the_device(model, make=adamw, steps=range(3), master_weights=True):
    """Everything in memory, in the modules that ``model`` has: losses and weights."""
    stay = {"state": {"weight_tier": "device", "gradient_tier": "device", "optimizer_tier": "device"}}
    with prepare(model, memtrain.Budget(device="4GiB"), make, stay, master_weights=master_weights) as session:
        return train(session, steps), {k: v.clone() for k, v in model.state_dict().items()}


# -- what is cut ---------------------------------------------------------------------------------------------


def test_no_window_is_larger_than_a_tile_and_rows_begin_where_the_optimizer_does_not_notice():
    model = in_memory(config())
    units = traced_units(model, find_blocks(model))
    cuts = choose_cuts(model, units, TILE_BYTES)
    assert cuts.rows["lm_head"] == cuts.rows["model.embed_tokens"] == (256, 512, 435)
    assert cuts.rows["model.layers.1.mlp.gate_proj"] == (512, 320)
    assert cuts.rows["model.layers.1.mlp.down_proj"] == (128, 128)
    cut(model, cuts)
    split = split_units(model, traced_units(model, find_blocks(model)))
    assert max(window_bytes(members) for _, members in split) <= TILE_BYTES
    named = [name for _, members in split for name, _ in members]
    assert sorted(named) == sorted(name for name, _ in model.named_parameters())
    for tiled in (module for module in model.modules() if isinstance(module, (TiledLinear, TiledEmbedding))):
        assert all(start * tiled.parts[0].weight.shape[1] % 2048 == 0 for start in tiled.starts)
    (line,) = tiling_lines(model)
    assert "lm_head in 3 of at most 0.2 MiB" in line
    assert "model.layers.*.mlp.gate_proj (3 times) in 2" in line


def test_what_cannot_be_cut_is_named():
    tied = in_memory(config(tie_word_embeddings=True))
    units = traced_units(tied, find_blocks(tied))
    with pytest.raises(TilingError, match=r"model\.embed_tokens\.weight of .* is tied to another layer"):
        choose_cuts(tied, units, TILE_BYTES)
    left = choose_cuts(tied, units, TILE_BYTES, required=False)
    assert list(left.uncut) == ["prologue"]
    assert any("mlp" in path for path in left.rows)
    model = in_memory(config())
    units = traced_units(model, find_blocks(model))
    with pytest.raises(TilingError, match="at least 256 rows, 131072 bytes, and 4096 were asked for"):
        choose_cuts(model, units, 4096)


def test_a_size_that_is_none_is_refused(budget):
    for wrong in (0, -1, "large", 1.5):
        with pytest.raises(StreamedModelError, match="tile_bytes"):
            streamed_model(config(), budget=budget, tile_bytes=wrong)


def test_auto_cuts_where_two_windows_would_take_half_of_what_is_left():
    model = in_memory(config(vocab_size=40960))  # 20 MiB of head
    units = traced_units(model, find_blocks(model))
    now = resident.rss_bytes()
    assert automatic_tile_bytes(units, memtrain.Budget(device=now + 120 * MiB)) is None
    assert automatic_tile_bytes(units, memtrain.Budget(device=now + 40 * MiB)) in (4 * MiB, 5 * MiB)
    assert automatic_tile_bytes(units, memtrain.Budget(device=1)) is None  # nothing helps


# -- exactness -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["sequential", "ahead"])
def test_bit_equal_to_the_plain_loop_over_tiles(tmp_path, budget, schedule):
    expected, weights = in_the_device(in_tiles(in_memory(config())))
    with streamed(config(), budget) as made, prepare(made.model, budget, update_schedule=schedule) as session:
        assert session.weights.windows[-1].slot_bytes <= TILE_BYTES
        assert train(session, range(3)) == expected
        assert "weights in tiles, each in a window by itself" in session.report()
        folder = save_checkpoint(tmp_path / "saved", session, progress={})
    found = load_file(folder / "model.safetensors")
    assert found.keys() == weights.keys() == in_memory(config()).state_dict().keys()
    assert all(torch.equal(found[name], weights[name]) for name in found)


def test_in_backward_and_vertical_order(budget):
    expected, _ = in_the_device(in_tiles(in_memory(config())))
    with (
        streamed(config(), budget) as made,
        prepare(made.model, budget, update_schedule="in_backward") as session,
    ):
        assert train(session, range(3)) == expected
    with (
        streamed(config(), budget) as made,
        prepare(made.model, budget, micro_batch_order="vertical") as session,
    ):
        losses = []
        for step in range(3):
            losses += [x.item() / 2 for x in session.accumulate([batch(2 * step), batch(2 * step + 1)])]
            session.optimizer.step()
            session.optimizer.zero_grad()
        assert losses == expected


@pytest.mark.parametrize("action", ["keep", "swap", "recompute", "recompute_nearly_free"])
def test_under_every_action(budget, action):
    expected, _ = in_the_device(in_tiles(in_memory(config())), steps=range(2))
    force = {**AWAY, "block": {"action": action}}
    with streamed(config(), budget) as made, prepare(made.model, budget, force=force) as session:
        assert train(session, range(2)) == expected


@pytest.mark.parametrize("action", ["keep", "swap", "recompute", "recompute_nearly_free"])
def test_under_every_action_with_the_fewest_windows(budget, action, monkeypatch):
    """Backward looks at a tile of a block that it has computed again in the same two windows."""
    fewest = WantedWindows(2, sized=False)
    monkeypatch.setattr(staging, "weight_windows", lambda *given: weight_windows(*given[:2], fewest))
    expected, _ = in_the_device(in_tiles(in_memory(config())), steps=range(1))
    force = {**AWAY, "block": {"action": action}}
    with streamed(config(), budget) as made, prepare(made.model, budget, force=force) as session:
        assert [each.slots for each in session.plan.staging.weight_windows] == [2]
        assert train(session, range(1)) == expected
        for _ in range(2):  # each walk of a graph computes again
            ids = batch(7)
            loss = session.model(**ids).loss
            loss.backward(retain_graph=True)
            once = session.model.model.norm.weight.grad.clone()
            loss.backward()
            assert torch.equal(session.model.model.norm.weight.grad, 2 * once)
            session.optimizer.zero_grad()


def test_near_to_the_untiled_model(budget):
    expected, _ = in_the_device(in_memory(config()))
    with streamed(config(), budget) as made, prepare(made.model, budget) as session:
        found = train(session, range(3))
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=2e-3, atol=0)
    assert found[0] == pytest.approx(expected[0], rel=1e-4)  # forward: every dot product is whole


def test_a_model_with_biases_and_frozen_layers(tmp_path, budget):
    kind = AutoConfig.for_model("qwen2", **SHAPE, tie_word_embeddings=False)

    def frozen(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.1." not in name and "embed" not in name)
        return model

    tile_bytes = 220 << 10
    expected, weights = in_the_device(frozen(in_tiles(in_memory(kind), tile_bytes)))
    assert any(tile.bias is not None for tile in tiles_of(in_tiles(in_memory(kind), tile_bytes)))
    with streamed(kind, budget, tile_bytes) as made, prepare(frozen(made.model), budget) as session:
        assert train(session, range(3)) == expected
        written = {w.name for w, _ in session.weights.extents().items() if w.extent.generation > 1}
        assert written
        assert not any("layers.1." in name or "embed" in name for name in written)
        folder = save_checkpoint(tmp_path / "saved", session, progress={})
    found = load_file(folder / "model.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in found)


def test_a_weight_that_is_no_number_shows(budget):
    with streamed(config(), budget) as made, prepare(made.model, budget) as session:
        head = made.model.lm_head.tiles[1]
        unit = session.weights.unit_of(head.weight)
        with session.weights.hold(unit), torch.no_grad():
            head.weight[0, 0] = float("nan")
        loss = session.model(**batch(0)).loss
        assert loss.isnan()
        loss.backward()
        assert not session.model.model.norm.weight.grad.isfinite().any()


# -- checkpoints ---------------------------------------------------------------------------------------------


def test_checkpoints_pass_between_tiled_and_untiled(tmp_path, budget):
    """Untiled, then in tiles, then in other tiles, then untiled and plain."""
    with streamed(config(), budget, None) as made, prepare(made.model, budget) as session:
        train(session, range(2))
        first = save_checkpoint(tmp_path / "untiled", session, progress={"at": 1})
    with streamed(config(), budget, seed=5) as made, prepare(made.model, budget) as session:
        assert load_checkpoint(first, session) == {"at": 1}
        again = save_checkpoint(tmp_path / "tiled", session, progress={"at": 1})
        (tmp_path / "spare").mkdir()
        with AsyncCheckpointer(session) as checkpointer:
            checkpointer.save(tmp_path / "asynchronous", progress={"at": 1})
            checkpointer.wait()
        assert_same_folders(tmp_path / "asynchronous", again)
        for name in ("model.safetensors", "optimizer-00001-of-00001.safetensors"):
            one, other = load_file(first / name), load_file(again / name)
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one)
        after = train(session, range(2, 4))
        tiled = save_checkpoint(tmp_path / "later", session, progress={})
    with streamed(config(), budget, 600 << 10, seed=6) as made, prepare(made.model, budget) as session:
        load_checkpoint(again, session)
        for one, other in zip(train(session, range(2, 4)), after, strict=True):
            assert one == pytest.approx(other, rel=2e-3)
    with streamed(config(), budget, None, seed=7) as made, prepare(made.model, budget) as session:
        load_checkpoint(tiled, session)
        back = save_checkpoint(tmp_path / "back", session, progress={})
        assert_same_folders(back, tiled)
    plain = AutoModelForCausalLM.from_pretrained(tiled, dtype=torch.bfloat16)
    copies = [nn.Parameter(p.detach().float()) for p in plain.parameters()]
    named = dict(zip((n for n, _ in plain.named_parameters()), copies, strict=True))
    assert named.keys() == dict(plain.named_parameters()).keys()
    load_optimizer_state(tiled, torch.optim.AdamW(copies, lr=1e-3), plain)


def test_a_folder_is_read_tile_by_tile(tmp_path, budget):
    model = in_memory(config())
    model.save_pretrained(tmp_path / "model")
    with streamed_model(tmp_path / "model", budget=budget, tile_bytes=TILE_BYTES) as made:
        stored = made.weights
        for path, rows in made.cuts.rows.items():
            whole = model.get_submodule(path).weight
            parts = [stored.read(f"{path}.tiles.{n}.weight") for n in range(len(rows))]
            assert torch.equal(torch.cat(parts), whole)
        assert "lm_head.weight" not in stored.extents


def test_eight_bit_states_of_tiles_are_those_of_the_whole(tmp_path, budget):
    def make(model):
        return AdamW8bit(model.parameters(), lr=1e-3)

    expected, _ = in_the_device(in_tiles(in_memory(config())), make, range(2), master_weights=False)
    with (
        streamed(config(), budget) as made,
        prepare(made.model, budget, make, master_weights=False) as session,
    ):
        assert train(session, range(2)) == expected
        saved = save_checkpoint(tmp_path / "saved", session, progress={})
    with (
        streamed(config(), budget, None, seed=1) as made,
        prepare(made.model, budget, make, master_weights=False) as session,
    ):
        load_checkpoint(saved, session)
        assert_same_folders(save_checkpoint(tmp_path / "again", session, progress={}), saved)


# -- a budget ------------------------------------------------------------------------------------------------


def test_a_budget_that_whole_layers_do_not_fit_and_tiles_do(tmp_path):
    kind = config(intermediate_size=65536, num_hidden_layers=2)  # blocks of 96 MiB
    room = memtrain.Budget(device="4GiB", nvme=f"{tmp_path}:2GiB")
    reached = {}
    for tile_bytes in (None, 8 * MiB):
        tight = budget_beyond_now(150 * MiB, tmp_path)
        with streamed(kind, room, tile_bytes) as made:
            try:
                session = prepare(made.model, tight)
            except memtrain.InfeasibleError as error:
                told = str(error)
                assert "tile_bytes=" in told
                assert "model.tile:" in told
                continue
            with session:
                assert session.weights.windows == session.plan.staging.weight_windows
                assert session.weights.windows[-1].slot_bytes <= 8 * MiB
                train(session, range(2))
                found = session.weights.statistics()
                assert found.peak_in_use == found.windows
                reached[tile_bytes] = session.plan.staging.weight_window_bytes
    assert list(reached) == [8 * MiB]
    assert reached[8 * MiB] <= 4 * 8 * MiB


def test_a_model_in_memory_may_be_cut_too(budget):
    expected, _ = in_the_device(in_tiles(in_memory(config())), steps=range(2))
    model = in_tiles(in_memory(config()))
    with prepare(model, budget) as session:
        assert session.weights.windows[-1].slot_bytes <= TILE_BYTES
        assert train(session, range(2)) == expected
    assert copy.deepcopy(model).state_dict().keys() == in_memory(config()).state_dict().keys()


def test_tiles_of_columns_are_loaded_too(tmp_path):
    model = nn.Sequential(TiledLinear(nn.Linear(8, 8), out_tiles=1, in_tiles=2))
    with publish(tmp_path / "saved") as writer:
        write_weights(writer, model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_weights([tmp_path / "saved" / "model.safetensors"], model)
    assert all(map(torch.equal, before, model.parameters()))


def test_lower_halves_of_masters_come_into_tiles(tmp_path, budget):
    """Of an untiled model, whose upper halves are in its weights' files."""

    def fused(model):
        return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    with (
        streamed(config(), budget, None) as made,
        prepare(made.model, budget, fused) as session,
    ):
        train(session, range(2))
        saved = save_checkpoint(tmp_path / "saved", session, progress={})
        assert json.loads((saved / "optimizer.json").read_text())["upper_halves"]
        expected = session.optimizer.read_state("model.layers.0.mlp.up_proj.weight", MASTER_KEY)
    with (
        streamed(config(), budget, seed=1) as made,
        prepare(made.model, budget, fused) as session,
    ):
        load_checkpoint(saved, session)
        names = [n for n in session.optimizer.index.parameters if n.startswith("model.layers.0.mlp.up_proj.")]
        assert len(names) > 1
        found = [session.optimizer.read_state(name, MASTER_KEY) for name in names]
    assert torch.equal(torch.cat(found), expected)


# -- windows of two sizes ------------------------------------------------------------------------------------


def small_blocks(vocabulary):
    """Blocks of 256 KiB of weights that leave, under tables of which a tile has up to 400 KiB."""
    return config(vocab_size=vocabulary, num_key_value_heads=1, intermediate_size=128)


@pytest.mark.parametrize(
    ("vocabulary", "rows"), [(1536, (768, 768)), (1203, (512, 691))], ids=["apart", "in both sizes"]
)
@pytest.mark.parametrize(("schedule", "order"), [("sequential", "horizontal"), ("ahead", "vertical")])
def test_windows_of_two_sizes_to_the_byte(budget, monkeypatch, vocabulary, rows, schedule, order):
    """Of 1203 rows the first tile is as large as a block, and comes into the windows of blocks."""
    wanted = WantedWindows(4, sized=True)  # whatever is the fastest on the day
    monkeypatch.setattr(staging, "weight_windows", lambda *given: weight_windows(*given[:2], wanted))
    kind, tile_bytes = small_blocks(vocabulary), 400 << 10
    expected, _ = in_the_device(in_tiles(in_memory(kind), tile_bytes), steps=range(2))
    force = {**AWAY, "block": {"action": "recompute"}}
    options = {"update_schedule": schedule, "micro_batch_order": order}
    with (
        streamed(kind, budget, tile_bytes) as made,
        prepare(made.model, budget, force=force, **options) as session,
    ):
        assert tuple(tile.weight.shape[0] for tile in made.model.lm_head.tiles) == rows
        windows = session.plan.staging.weight_windows
        assert windows == session.weights.windows
        assert [(each.slots, each.slot_bytes) for each in windows] == [
            (2, 512 * 512),
            (2, -(-max(rows) * 512 // 4096) * 4096),
        ]
        billed = next(line for line in session.plan.bill if line.category == "weight windows")
        held = sum(each.slots * each.slot_bytes for each in windows)
        assert billed.size_bytes == held == session.weights.fill_windows()
        losses = []
        for step in range(2):
            before = session.weights.statistics()
            losses += [x.item() / 2 for x in session.accumulate([batch(2 * step), batch(2 * step + 1)])]
            session.optimizer.step()
            session.optimizer.zero_grad()
            session.flush()
        moved = session.weights.statistics().bytes_read - before.bytes_read
        assert losses == expected
        extents = {unit.name: unit.weight_extent_bytes for unit in session.profile.units}
        reads = [e.name[len("read weights ") :] for e in session.plan.timeline if "read weights" in e.name]
        predicted = sum(map(extents.__getitem__, reads))
        # Up to what the windows hold is found there in either direction of a pass (docs/plan.md).
        assert predicted - 4 * held <= moved <= predicted
        small, large = session.weights.high_water()
        assert (small.bytes_used, large.bytes_used) == tuple(each.slot_bytes for each in windows)
