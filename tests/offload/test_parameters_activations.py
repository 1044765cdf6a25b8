"""Streamed weights under what else is done in a step: actions, forms, checkpoints, graphs, exceptions."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from memtrain.offload.activations import ActivationExecutor
from memtrain.offload.engine import Engine
from memtrain.offload.errors import SavedTensorModifiedError, WeightAwayError, WeightWindowError
from memtrain.offload.parameters import ParameterStreamer
from memtrain.optim.autograd import TiledLinear, apply_to
from memtrain.optim.autograd.tiled_linear import Tile
from memtrain.planner.actions import Action, BlockDecision, Tier
from tests.offload.latest_store import make_plan
from tests.offload.streamed import (
    DEPTH,
    WIDTH,
    assert_same,
    assert_same_weights,
    batches,
    blocks_of,
    llama,
    open_engine,
    stream,
)


def every(action: Action, saved: Tier = Tier.DEVICE, entry: Tier = Tier.DEVICE) -> list[BlockDecision]:
    return [BlockDecision(block=b, action=action, saved_tier=saved, input_tier=entry) for b in range(DEPTH)]


DECISIONS = {
    "keep": every(Action.KEEP),
    "swap": every(Action.SWAP, Tier.HOST),
    "recompute": every(Action.RECOMPUTE),
    "recompute, input swapped": every(Action.RECOMPUTE, entry=Tier.HOST),
    "nearly free": every(Action.RECOMPUTE_NEARLY_FREE),
    "attention kept": every(Action.RECOMPUTE_EXCEPT_ATTENTION),
    "attention swapped": every(Action.RECOMPUTE_EXCEPT_ATTENTION, Tier.HOST, Tier.HOST),
    "mixed": [
        BlockDecision(block=0, action=Action.SWAP, saved_tier=Tier.HOST),
        BlockDecision(block=1, action=Action.RECOMPUTE, input_tier=Tier.HOST),
        BlockDecision(block=2, action=Action.RECOMPUTE_EXCEPT_ATTENTION, saved_tier=Tier.HOST),
        BlockDecision(block=3, action=Action.KEEP),
    ],
}


def passes(model: nn.Module, count: int = 2) -> list[Tensor]:
    """Losses of several passes, and the accumulated gradients."""
    torch.manual_seed(11)
    model.zero_grad()
    found = []
    for tokens in batches(count):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        found.append(loss.detach())
    return found + [p.grad.clone() for p in model.parameters() if p.grad is not None]


@contextmanager
def streaming(model: nn.Module, **options: Any) -> Iterator[tuple[ParameterStreamer, Engine]]:
    with open_engine() as engine:
        streamer = stream(model, engine, **options)
        yield streamer, engine
        streamer.remove()


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("name", DECISIONS)
def test_under_every_action(name: str, slots: int) -> None:
    plain, model = llama(tied=True), llama(tied=True)
    expected = passes(plain)
    with streaming(model, slots=slots) as (streamer, engine):
        executor = ActivationExecutor(
            model, blocks_of(model), make_plan(DECISIONS[name], slots=3, slot_bytes=4 << 20), engine
        )
        executor.install()
        assert_same(expected, passes(model))
        assert streamer.statistics().peak_in_use == slots
        executor.remove()
        assert_same(expected, passes(model))


def test_exact_forms_use_weights_past_their_modules() -> None:
    plain, model = llama(), llama()
    expected = passes(plain)
    apply_to(model, example=lambda: model(batches(1)[0]))
    with streaming(model, slots=2):
        assert_same(expected, passes(model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_transformers_is_refused(reentrant: bool) -> None:
    """It computes a block again past the block's module, where nothing brings the weights. A session refuses
    such a model before it plans; without one, the first weight that is used says so."""
    model = llama()
    with streaming(model, slots=2):
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        with pytest.raises(WeightAwayError, match=r"model\.layers\.3\..*hold the unit"):
            passes(model)
        model.activation_checkpointing_disable()
        model.zero_grad()
        assert_same(passes(llama()), passes(model))


def test_checkpoint_around_several_blocks() -> None:
    plain, model = llama(), llama()

    def run(model: Any) -> list[Tensor]:
        hidden = model.model.embed_tokens(batches(1)[0])
        place = model.model.rotary_emb(hidden, torch.arange(11)[None])

        def all_blocks(hidden: Tensor) -> Tensor:
            for block in model.model.layers:
                hidden = block(hidden, position_embeddings=place)
            return hidden

        loss = model.lm_head(checkpoint(all_blocks, hidden, use_reentrant=False)).square().mean()
        loss.backward()
        return [loss.detach()] + [p.grad for p in model.parameters() if p.grad is not None]

    expected = run(plain)
    with streaming(model, slots=2):
        # The second forward brings all blocks before the first of them is asked for by backward.
        assert_same(expected, run(model))


def test_hooks_of_the_user_get_what_is_no_weight() -> None:
    plain, model = llama(), llama()
    expected = passes(plain)
    seen: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor.shape)
        return tensor.clone()

    with streaming(model, slots=2), torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        assert_same(expected, passes(model))
    assert seen
    assert torch.Size([WIDTH, WIDTH]) not in seen


def test_two_graphs_at_once_and_one_twice() -> None:
    plain, model = llama(tied=True), llama(tied=True)

    def run(model: Any) -> list[Tensor]:
        first, second = batches(2)
        one = model(input_ids=first, labels=first).loss
        other = model(input_ids=second, labels=second).loss
        one.backward(retain_graph=True)
        other.backward()
        one.backward()
        return [p.grad for p in model.parameters()]

    expected = run(plain)
    with streaming(model, slots=2):
        assert_same(expected, run(model))


class Twice(nn.Module):
    """A block that is called twice in a pass, a weight used without a module, and one shared by blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.layers[2].weight = self.layers[0].weight

    def forward(self, rows: Tensor) -> Tensor:
        hidden = rows @ self.table
        for block in (*self.layers, self.layers[1], self.layers[0]):
            hidden = torch.tanh(block(hidden))
        return (hidden @ self.table).square().mean()


def test_a_block_called_twice_and_weights_of_the_root() -> None:
    plain = Twice()
    model = copy.deepcopy(plain)
    rows = torch.randn(5, WIDTH)
    named = list(model.named_parameters())
    units = [("prologue", named[:1])]
    units += [(f"layers.{i}", [(n, p) for n, p in named if n.startswith(f"layers.{i}.")]) for i in range(3)]
    with open_engine() as engine:
        streamer = ParameterStreamer(
            model,
            [(f"layers.{i}", block) for i, block in enumerate(model.layers)],
            units,
            tiers={name: Tier.HOST for name, _ in units},
            engine=engine,
            slots=2,
        )
        streamer.install()
        assert streamer.streamed == ("prologue", "layers.0", "layers.1")
        for _ in range(2):
            for one in (plain, model):
                one(rows).backward()
        for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad), name
        assert streamer.statistics().peak_in_use == 2
        streamer.remove()


def test_second_derivatives() -> None:
    plain, model = (llama(depth=2).double() for _ in range(2))
    for one in (plain, model):
        one.set_attn_implementation("eager")

    def run(model: Any) -> list[Tensor]:

        rows = torch.linspace(-1, 1, WIDTH, dtype=torch.float64)[None].requires_grad_()
        with torch.no_grad():
            place = model.model.rotary_emb(rows[None], torch.arange(1)[None])
        hidden = rows[None]
        for block in model.model.layers:
            hidden = block(hidden, position_embeddings=place)
        (slope,) = torch.autograd.grad(hidden.sum(), rows, create_graph=True)
        slope.square().sum().backward()
        return [rows.grad] + [p.grad for p in model.parameters() if p.grad is not None]

    expected = run(plain)
    with open_engine() as engine:
        streamer = stream(model, engine, slots=2, units=["model.layers.0", "model.layers.1"])
        assert_same(expected, run(model))
        streamer.remove()


def test_evaluation_between_passes() -> None:
    plain, model = llama(), llama()

    def run(model: Any) -> list[Tensor]:
        first, second, third = batches(3)
        found = [model(input_ids=first, labels=first).loss]
        with torch.no_grad():
            found.append(model(input_ids=second).logits)
        with torch.inference_mode():
            found.append(model(input_ids=third).logits.clone())
        found[0].backward()  # after others have used the windows
        return [t.detach() for t in found] + [p.grad for p in model.parameters()]

    expected = run(plain)
    with streaming(model, slots=2) as (streamer, _):
        written = streamer.statistics().bytes_written
        assert_same(expected, run(model))
        assert streamer.statistics().bytes_written == written


class Trip(Exception):
    pass


@pytest.mark.parametrize("when", ["forward", "backward"])
@pytest.mark.parametrize("action", ["none", "recompute", "swap"])
def test_goes_on_after_an_exception(when: str, action: str) -> None:
    plain, model = llama(tied=True), llama(tied=True)
    expected = passes(plain)
    with streaming(model, slots=2) as (streamer, engine):
        executor = None
        if action != "none":
            plan = make_plan(DECISIONS[action], slots=3, slot_bytes=4 << 20)
            executor = ActivationExecutor(model, blocks_of(model), plan, engine)
            executor.install()

        def trip(*_: Any) -> None:
            raise Trip

        inner = model.model.layers[1].mlp.act_fn
        hook = (
            inner.register_forward_hook(trip)
            if when == "forward"
            else model.model.layers[1].mlp.register_full_backward_hook(trip)
        )
        for _ in range(2):
            with pytest.raises(Trip):
                passes(model)
        hook.remove()
        assert_same(expected, passes(model))
        assert all(unit.users == 0 for unit in streamer._units.values())
        if executor is not None:
            executor.remove()
        assert_same_weights(plain, streamer, model)


def test_a_weight_changed_before_backward_is_refused() -> None:
    model = llama()
    with streaming(model, slots=2) as (streamer, _):
        tokens = batches(1)[0]
        loss = model(input_ids=tokens, labels=tokens).loss
        with streamer.hold("model.layers.1"), torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.add_(1.0)
        with pytest.raises(SavedTensorModifiedError, match=r"layers\.1\.mlp\.up_proj\.weight.*in place"):
            loss.backward()


def test_a_graph_outlives_the_streamer() -> None:
    plain, model = llama(), llama()
    tokens = batches(1)[0]
    plain(input_ids=tokens, labels=tokens).loss.backward()
    with streaming(model, slots=2):
        loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_kept_views_take_windows_and_keep_their_bytes() -> None:
    plain, model = llama(), llama()
    tokens = batches(1)[0]
    with streaming(model, slots=3) as (streamer, _):
        with streamer.hold("model.layers.0"):
            view = model.model.layers[0].mlp.up_proj.weight.detach()[3]
        assert torch.equal(model(tokens).logits, plain(tokens).logits)
        assert torch.equal(view, plain.model.layers[0].mlp.up_proj.weight[3])
        others = []
        for index in (1, 2):
            with streamer.hold(f"model.layers.{index}"):
                others.append(model.model.layers[index].mlp.up_proj.weight.detach())
        with pytest.raises(WeightWindowError, match=r"all 3 are taken.*views of weights.*weight windows"):
            streamer.fetch("model.layers.3")
        del view, others
        assert torch.equal(model(tokens).logits, plain(tokens).logits)


def test_a_graph_made_while_weights_are_held() -> None:
    plain, model = llama(), llama()
    plain.model.layers[2].mlp.up_proj.weight.square().sum().backward()
    with streaming(model, slots=2) as (streamer, _):
        with streamer.hold("model.layers.2"):
            penalty = model.model.layers[2].mlp.up_proj.weight.square().sum()
        with torch.no_grad():
            model(batches(1)[0])
        penalty.backward()
        weight = model.model.layers[2].mlp.up_proj.weight
        assert torch.equal(weight.grad, plain.model.layers[2].mlp.up_proj.weight.grad)


def test_parts_of_a_block_that_is_too_large() -> None:
    plain, model = llama(depth=2), llama(depth=2)
    expected = passes(plain)
    layers = list(enumerate(model.model.layers))
    parts = [
        (f"model.layers.{index}.{part}", layer.get_submodule(part))
        for index, layer in layers
        for part in ("self_attn", "mlp")
    ]
    units = [(name, [(f"{name}.{n}", p) for n, p in part.named_parameters()]) for name, part in parts]
    with open_engine() as engine:
        streamer = ParameterStreamer(
            model, parts, units, tiers=dict.fromkeys(dict(parts), Tier.HOST), engine=engine, slots=2
        )
        streamer.install()
        assert streamer.windows[-1].slot_bytes == 4 * 3 * WIDTH * 384
        assert_same(expected, passes(model))
        streamer.remove()


def test_a_layer_that_is_too_large_comes_tile_by_tile() -> None:
    torch.manual_seed(0)
    layers = [TiledLinear(nn.Linear(512, 512), out_tiles=2, in_tiles=2) for _ in range(2)]
    plain = nn.Sequential(layers[0], nn.Tanh(), layers[1])
    model = copy.deepcopy(plain)
    rows = torch.randn(3, 512)
    tiles = [(name, module) for name, module in model.named_modules() if isinstance(module, Tile)]
    units = [(name, [(f"{name}.weight", tile.weight)]) for name, tile in tiles]
    with open_engine() as engine:
        streamer = ParameterStreamer(
            model, tiles, units, tiers=dict.fromkeys(dict(tiles), Tier.HOST), engine=engine, slots=2
        )
        streamer.install()
        assert streamer.windows[-1].slot_bytes == 4 * 256 * 256
        for one in (plain, model):
            one(rows).square().mean().backward()
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
        assert streamer.statistics().peak_in_use == 2
        streamer.remove()
        assert_same(list(plain.state_dict().values()), list(model.state_dict().values()))
