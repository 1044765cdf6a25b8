"""The tracer against numbers worked out by hand, and against its promise to leave everything as it was."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memtrain.planner.profile import NearlyFree, Prefixes
from memtrain.planner.trace import profile_model
from memtrain.planner.tracing import units
from memtrain.planner.tracing.blocks import BlocksNotFoundError, find_blocks
from memtrain.planner.tracing.live_bytes import LiveBytes

transformers = pytest.importorskip("transformers")

ROWS, WIDTH, WIDE = 64, 32, 128
F32 = 4


class Block(nn.Module):
    """``x + down(relu(up(x)))``: saves x, relu's output (up's output is dead once relu has run)."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDE), nn.Linear(WIDE, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(torch.relu(self.up(x))))


class Plain(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.first = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(blocks)
        self.last = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def plain(blocks: list[nn.Module] | None = None, **options: object):  # type: ignore[no-untyped-def]
    model = Plain(blocks or [Block() for _ in range(3)])
    return profile_model(model, torch.randn(ROWS, 8), optimizer=adamw(model), elementwise=True, **options)


def test_bytes_of_a_plain_block() -> None:
    profile = plain()
    assert [b.name for b in profile.blocks] == ["blocks.0", "blocks.1", "blocks.2"]
    for block in profile.blocks:
        x, wide = ROWS * WIDTH * F32, ROWS * WIDE * F32
        assert block.input_bytes == x
        assert block.saved_bytes == x + wide
        assert block.saved_tensors == 2
        assert block.attention_bytes == 0
        # relu holds its input and output while it runs; then down's output and the sum are small beside it.
        assert block.forward_transient_bytes == wide
        assert block.recomputable
        assert block.forward_seconds > 0
        assert block.backward_seconds > 0


def test_seconds_are_what_the_clock_said(monkeypatch: pytest.MonkeyPatch) -> None:
    # A clock that is a second later each time it is looked at: every part takes one second.
    ticks = itertools.count()
    monkeypatch.setattr("memtrain.planner.tracing.clock.now", lambda device: float(next(ticks)))
    profile = plain()
    assert [(b.forward_seconds, b.backward_seconds) for b in profile.blocks] == [(1.0, 1.0)] * 3
    assert (profile.prologue_forward_seconds, profile.prologue_backward_seconds) == (1.0, 1.0)
    assert (profile.epilogue_forward_seconds, profile.epilogue_backward_seconds) == (1.0, 1.0)


def test_units_by_hand() -> None:
    profile = plain(master_weights=False)
    per_block = WIDTH * WIDE * 2 + WIDE + WIDTH
    assert [u.name for u in profile.units] == ["prologue", "blocks.0", "blocks.1", "blocks.2", "epilogue"]
    assert [u.weight_bytes for u in profile.units] == [
        F32 * n for n in (9 * WIDTH, per_block, per_block, per_block, WIDTH + 1)
    ]
    # Every parameter is below 65,536 elements: gradient and two fp32 moments stay in memory.
    assert [u.resident_state_bytes for u in profile.units] == [u.weight_bytes * 3 for u in profile.units]
    assert {(u.gradient_bytes, u.state_bytes) for u in profile.units} == {(0, 0)}
    assert (profile.state_bytes_per_element, profile.state_tensors) == (8, 2)
    assert profile.update_workspace_bytes_per_element == 0
    assert profile.elementwise
    assert profile.largest_gradient_bytes == WIDTH * WIDE * F32
    assert profile.weight_bytes == sum(u.weight_bytes for u in profile.units)


def test_master_weights_add_four_bytes_an_element() -> None:
    model = Plain([Block(), Block()]).bfloat16()
    profile = profile_model(
        model, torch.randn(ROWS, 8).bfloat16(), optimizer=adamw(model), elementwise=True, master_weights=True
    )
    assert (profile.state_bytes_per_element, profile.state_tensors) == (12, 3)
    assert profile.gradient_bytes_per_element == 2
    assert profile.update_workspace_bytes_per_element == 2  # the bf16 gradient's bytes again, to widen it


@pytest.mark.parametrize("half", [True, False])
def test_the_lower_half_of_a_master_takes_two_bytes(half: bool) -> None:
    """Of large parameters; a bias keeps its master whole. Nothing is widened in a slot, and an update reads
    the weight."""
    wide = 2048
    blocks = [nn.Sequential(nn.Linear(WIDTH, wide), nn.ReLU(), nn.Linear(wide, WIDTH)) for _ in range(2)]
    model, large = Plain([*blocks]).bfloat16(), WIDTH * wide
    assert large == 65536
    asked: list[int] = []

    def keeps_half(group: dict[str, Any], parameter: Tensor) -> bool:
        asked.append(parameter.numel())
        return group["lr"] == 1e-3

    profile = profile_model(
        model,
        torch.randn(ROWS, 8).bfloat16(),
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3 if half else 1e-2, fused=True),
        elementwise=True,
        master_weights=True,
        keeps_half=keeps_half,
    )
    assert set(asked) == {large}
    state = 10 if half else 12
    assert (profile.state_bytes_per_element, profile.state_tensors) == (state, 3)
    assert profile.update_workspace_bytes_per_element == (0 if half else 2)
    block = profile.units[1]
    assert block.state_bytes == state * 2 * large
    assert block.resident_state_bytes == (2 + 12) * (wide + WIDTH)
    assert block.overwritten is not half


@pytest.mark.parametrize("elementwise", [True, False])
def test_the_caller_says_whether_the_optimizer_is_elementwise(elementwise: bool) -> None:
    model = Plain([Block(), Block()])
    momentum = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    profile = profile_model(model, torch.randn(ROWS, 8), optimizer=momentum, elementwise=elementwise)
    assert profile.elementwise is elementwise
    assert profile.state_bytes_per_element == 4


@pytest.mark.parametrize(
    ("elements", "probed"), [(10, 65536), (131_071, 65536), (131_072, 131_072), (3 << 20, 1 << 20)]
)
def test_the_probe_of_the_optimizer_is_no_larger_than_the_model(elements: int, probed: int) -> None:
    half = elements // 2
    parameters = [nn.Parameter(torch.empty(n, device="meta")) for n in (half, elements - half)]
    assert units.probe_elements(torch.optim.SGD(parameters)) == probed


def test_the_group_with_the_most_state_counts() -> None:
    model = Plain([Block(), Block()])
    first, rest = list(model.first.parameters()), list(model.blocks.parameters())
    groups = [{"params": first}, {"params": rest, "momentum": 0.9}]
    optimizer = torch.optim.SGD(groups, lr=0.1, foreach=False)
    profile = profile_model(model, torch.randn(ROWS, 8), optimizer=optimizer, elementwise=True)
    assert profile.state_bytes_per_element == 4
    groups = [{"params": first}, {"params": rest, "weight_decay": 0.1}]
    optimizer = torch.optim.SGD(groups, lr=0.1, foreach=False)
    profile = profile_model(model, torch.randn(ROWS, 8), optimizer=optimizer, elementwise=True)
    assert (profile.state_bytes_per_element, profile.state_tensors) == (0, 0)
    assert profile.update_workspace_bytes_per_element == 4  # gradient + weight_decay * weight


def test_the_dtype_with_the_most_state_counts() -> None:
    model = Plain([Block(), Block()])
    model.register_parameter("wide", nn.Parameter(torch.zeros(1, dtype=torch.float64)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    profile = profile_model(
        model,
        torch.randn(ROWS, 8),
        optimizer=optimizer,
        elementwise=True,
    )
    assert profile.state_bytes_per_element == 8  # the fp64 parameter's momentum


class Rehearsed:
    """Says what it was asked, and answers with round numbers."""

    def __init__(self, prefixes: Prefixes | str) -> None:
        self.asked: list[tuple[str, str, int]] = []
        self.answer = prefixes

    def nearly_free(self, name: str, forward: Any, args: Any, kwargs: Any) -> NearlyFree:
        hidden = forward(*args, **kwargs)
        assert hidden.requires_grad
        self.asked.append(("nearly free", name, hidden.shape[0]))
        return NearlyFree(stored_bytes=1, stored_tensors=2, forward_seconds=3.0, backward_bytes=4)

    def prefixes(
        self, name: str, forward: Any, args: Any, kwargs: Any, *, lengths: Any, largest_bytes: int
    ) -> Prefixes | str:
        self.asked.append(("prefixes", name, largest_bytes))
        assert lengths(16) == (2, 4, 6, 8, 10, 12, 14)
        return self.answer

    def forms(self, name: str) -> dict[str, str]:
        return {}

    def missing_forms(self, name: str) -> dict[str, str]:
        return {"exact": "why not"}

    def in_form(self, name: str, form: str) -> Any:
        raise AssertionError(f"{name} has no form {form}")


def test_blocks_of_one_kind_are_rehearsed_once() -> None:
    prefixes = Prefixes(
        tokens=8,
        lengths=(4,),
        differences=(0.5,),
        overhead_seconds=0.1,
        cut_bytes=8,
        whole_bytes=0,
        largest_bytes=8,
        probe_bytes=0,
        witness_bytes=0,
    )
    rehearsal = Rehearsed(prefixes)
    found = plain(rehearsal=rehearsal)
    # The largest storage that a block saves is what relu leaves.
    assert rehearsal.asked == [("prefixes", "blocks.0", ROWS * WIDE * F32), ("nearly free", "blocks.0", ROWS)]
    for block in found.blocks:
        assert (block.prefixes, block.prefix_reason) == (prefixes, "")
        assert block.nearly_free == NearlyFree(
            stored_bytes=1, stored_tensors=2, forward_seconds=3.0, backward_bytes=4
        )


def test_why_tokens_cannot_be_cut_is_kept_and_what_may_not_be_recomputed_is_not_rehearsed() -> None:
    block = plain(rehearsal=Rehearsed("it looks ahead")).blocks[0]
    assert (block.prefixes, block.prefix_reason) == (None, "it looks ahead")
    rehearsal = Rehearsed("")
    block = plain([InPlace(), InPlace()], rehearsal=rehearsal).blocks[0]
    assert (block.nearly_free, block.prefixes, rehearsal.asked) == (None, None, [])


def test_a_storage_that_is_forgotten_counts_no_longer() -> None:
    with LiveBytes() as live:
        kept, elsewhere = torch.ones(100), torch.ones(1000)
        live.forget(elsewhere)
        assert live.now_bytes == 400
        del elsewhere
        assert live.now_bytes == 400
        del kept
    assert live.now_bytes == 0


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2) + self.down(self.up(x.detach()))


class Normed(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


class Counting(Block):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) + self.calls


@pytest.mark.parametrize(
    ("block", "reason"), [(InPlace, "in place"), (Normed, "buffer"), (Counting, "two forwards")]
)
def test_what_may_not_be_recomputed(block: type[nn.Module], reason: str) -> None:
    profile = plain([block(), block()])
    assert not profile.blocks[0].recomputable
    assert reason in profile.blocks[0].reason


def test_dropout_is_recomputable_and_measured_in_training_mode() -> None:
    model = Plain([Block(dropout=0.5), Block(dropout=0.5)]).eval()
    profile = profile_model(model, torch.randn(ROWS, 8), optimizer=adamw(model), elementwise=True)
    assert profile.blocks[0].recomputable
    mask = profile.blocks[0].saved_bytes - (ROWS * WIDTH + ROWS * WIDE) * F32
    assert mask in (ROWS * WIDTH, ROWS * WIDTH * F32)  # bool or fp32, by torch's choice of kernel
    assert not model.training


LLAMA = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


def llama(**options: object) -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **options}))


def batch(tokens: int = 32) -> dict[str, Tensor]:
    ids = torch.randint(128, (1, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def test_bytes_of_a_llama_block() -> None:
    model, tokens = llama(), 32
    profile = profile_model(model, batch(tokens), optimizer=adamw(model), elementwise=True)
    hidden, queries, keys, wide = 64, 64, 32, 96
    # Two norms: input, normalised (also the product's other factor is a parameter), output, and 1/rms.
    norms = 2 * (3 * hidden + 1)
    attention = queries + 2 * keys + queries + 4  # q, k, v, output, and lse per head
    mlp = 4 * wide  # gate, up, silu, product
    elements = norms + attention + mlp
    assert profile.blocks[0].saved_bytes == pytest.approx(tokens * F32 * elements, abs=0)
    assert profile.blocks[0].attention_bytes == tokens * F32 * (queries + 4)
    assert profile.blocks[0].input_bytes == tokens * F32 * hidden
    assert 0 < profile.blocks[0].attention_seconds <= profile.blocks[0].forward_seconds


def test_attention_that_leaves_more_than_rows_is_not_cut() -> None:
    """Rows of tiles, for example: here 8704 bytes of 1024 tokens. Where what is beside rows is known to be
    stored whole, as a GPU kernel's random state is, the rows are cut all the same."""
    prefixes = Prefixes(
        tokens=1024,
        lengths=(512,),
        differences=(0.0,),
        overhead_seconds=0.0,
        cut_bytes=0,
        whole_bytes=0,
        largest_bytes=0,
        probe_bytes=0,
        witness_bytes=0,
    )
    model = llama()
    profile = profile_model(
        model, batch(32), optimizer=adamw(model), elementwise=True, rehearsal=Rehearsed(prefixes)
    )
    assert profile.blocks[0].prefixes is None
    assert "leave 8704 bytes, 0 of them whole, and the others are no 1024" in profile.blocks[0].prefix_reason
    known = dataclasses.replace(prefixes, attention_whole_bytes=512)
    profile = profile_model(
        model, batch(32), optimizer=adamw(model), elementwise=True, rehearsal=Rehearsed(known)
    )
    assert profile.blocks[0].prefixes == known


def test_a_tied_embedding_belongs_to_the_prologue_and_its_gradient_waits() -> None:
    model = llama()
    profile = profile_model(model, batch(), optimizer=adamw(model), elementwise=True)
    embedding = 128 * 64 * F32
    assert profile.persistent_backward_bytes == embedding
    assert profile.units[0].weight_bytes == embedding
    assert profile.units[-1].weight_bytes == 64 * F32
    assert profile.epilogue_peak_bytes >= profile.epilogue_saved_bytes > 0
    assert profile.prologue_peak_bytes >= embedding
    model = llama(tie_word_embeddings=False)
    assert (
        profile_model(model, batch(), optimizer=adamw(model), elementwise=True).persistent_backward_bytes == 0
    )


class Positioned(Plain):
    """Reads weights without calling their modules, before and after the blocks; ``spare`` is never read."""

    def __init__(self) -> None:
        super().__init__([Block(), Block()])
        self.position, self.spare = nn.Embedding(2 * ROWS, WIDTH), nn.Linear(2, 2)
        self.blocks[1].offset = nn.Embedding(ROWS, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) + self.position.weight[:ROWS] + self.blocks[1].offset.weight
        for block in self.blocks:
            x = block(x)
        return nn.functional.linear(x, self.last.weight, self.last.bias)


def test_a_weight_read_before_the_blocks_belongs_to_the_prologue_whoever_reads_it() -> None:
    model = Positioned()
    profile = profile_model(model, torch.randn(ROWS, 8), optimizer=adamw(model), elementwise=True)
    inner = {f"blocks.1.{name}.{kind}" for name in ("up", "down") for kind in ("weight", "bias")}
    assert set(profile.units[0].parameters) == {
        *("first.weight", "first.bias", "position.weight", "blocks.1.offset.weight"),
        *("spare.weight", "spare.bias"),
    }
    assert set(profile.units[2].parameters) == inner
    assert profile.units[3].parameters == ("last.weight", "last.bias")


def test_a_head_read_first_as_a_table_belongs_to_the_prologue() -> None:
    class Tied(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.last.weight[0, :8])

    model = Tied([Block(), Block()])
    profile = profile_model(model, torch.randn(ROWS, 8), optimizer=adamw(model), elementwise=True)
    assert "last.weight" in profile.units[0].parameters
    assert profile.units[-1].parameters == ("last.bias",)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "plain"])
def test_everything_is_left_as_it_was(kind: str) -> None:
    sample: object = batch()
    if kind == "plain":
        model, sample = Plain([Normed(), Normed()]), (torch.randn(ROWS, 8),)
    elif kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4)
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "qwen2":
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**LLAMA)).eval()
    else:
        model = llama()
    optimizer = adamw(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    gradients = [p.grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    use_cache = getattr(getattr(model, "config", None), "use_cache", None)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    profile = profile_model(model, sample, optimizer=optimizer, elementwise=True)
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(g, torch.ones_like(g)) for g in gradients)
    assert [m.training for m in model.modules()] == modes
    assert getattr(getattr(model, "config", None), "use_cache", None) == use_cache
    assert not optimizer.state
    assert all("forward" not in m.__dict__ and not m._forward_pre_hooks for m in model.modules())
    assert all(b.recomputable for b in profile.blocks) is (kind != "plain")


def test_parameter_hooks_of_the_user_wait_until_the_model_is_measured() -> None:
    model, fired = Plain([Block(), Block()]), []
    weight = model.first.weight
    after = weight.register_post_accumulate_grad_hook(lambda _: fired.append("after"))
    weight.register_hook(lambda _: fired.append("gradient"))
    sample = torch.randn(ROWS, 8)
    profile_model(model, sample, optimizer=adamw(model), elementwise=True)
    assert fired == []
    model(sample).sum().backward()
    assert fired == ["gradient", "after"]
    after.remove()
    model(sample).sum().backward()
    assert fired == ["gradient", "after", "gradient"]
    assert model.last.weight._backward_hooks is None
    assert model.last.weight._post_accumulate_grad_hooks is None


def test_finding_blocks() -> None:
    model = Plain([Block(), Block()])
    assert [name for name, _ in find_blocks(model)] == ["blocks.0", "blocks.1"]
    assert [name for name, _ in find_blocks(model, ["blocks.1"])] == ["blocks.1"]
    assert [name for name, _ in find_blocks(model, ["blocks"])] == ["blocks.0", "blocks.1"]
    assert [name for name, _ in find_blocks(llama())] == [f"model.layers.{i}" for i in range(3)]
    with pytest.raises(BlocksNotFoundError, match=r"no module 'blocks\.7'"):
        find_blocks(model, ["blocks.7"])
    with pytest.raises(BlocksNotFoundError, match="block_names"):
        find_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


class Between(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


class Backwards(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blocks[0](self.blocks[1](self.first(x))))


class Skipping(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blocks[0](self.first(x)))


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Between, "between blocks.0 and blocks.1"), (Backwards, "blocks.1"), (Skipping, "blocks.1 did not run")],
)
def test_blocks_that_are_no_chain_are_refused(kind: type[Plain], message: str) -> None:
    model = kind([Block(), Block()])
    with pytest.raises(BlocksNotFoundError, match=message):
        profile_model(model, torch.randn(ROWS, 8), optimizer=adamw(model), elementwise=True)


def test_no_loss_and_no_step_are_refused_by_name() -> None:
    model = llama()
    with pytest.raises(TypeError, match="labels"):
        profile_model(model, {"input_ids": batch()["input_ids"]}, optimizer=adamw(model), elementwise=True)
    plain_model = Plain([Block(), Block()])
    lbfgs = torch.optim.LBFGS(plain_model.parameters())
    with pytest.raises(ValueError, match="LBFGS"):
        profile_model(plain_model, torch.randn(ROWS, 8), optimizer=lbfgs, elementwise=True)


def test_a_loss_function_is_used() -> None:
    model = Plain([Block(), Block()])
    target = torch.randn(ROWS, 1)
    profile = profile_model(
        model,
        [torch.randn(ROWS, 8)],
        optimizer=adamw(model),
        elementwise=True,
        loss_fn=lambda output, _: (output - target).square().mean(),
        micro_batches=3,
    )
    assert profile.micro_batches == 3
    assert profile.batch == f"[{ROWS}, 8] float32"
