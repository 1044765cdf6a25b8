"""Estimates against the real runs they stand for, to the byte, and against numbers worked out by hand."""

from __future__ import annotations

import functools
import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("transformers")

from memtrain.optim.autograd.chunked_loss import chunked_cross_entropy
from memtrain.planner.estimate import LifetimeKind, ModelEstimate, TensorClass
from memtrain.planner.tracing.attention import AttentionKernelError
from memtrain.planner.tracing.blocks import BlocksNotFoundError
from memtrain.planner.tracing.chunked_loss import chunked
from memtrain.planner.tracing.estimator import UntraceableError, estimate_config, estimate_module
from memtrain.planner.tracing.fake_model import UnknownModelError
from memtrain.planner.tracing.live_bytes import LiveBytes
from tests.planner.tracing_models import CONFIGS, ROWS, TOKENS, real_model, really_saved

BF16, F32 = torch.bfloat16, torch.float32


@functools.cache
def small(name: str, dtype: torch.dtype = BF16, attention: str = "default", **more: Any) -> ModelEstimate:
    return estimate_config(
        CONFIGS[name], batch=ROWS, sequence=TOKENS, dtype=dtype, attention=attention, **more
    )


def test_the_reference_layer() -> None:
    # optim.md 3.9's measured figure: d=512, f=1376, 8 heads, bf16, 2 rows of 256 tokens.
    config = {**CONFIGS["dense"], "hidden_size": 512, "intermediate_size": 1376}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 8}
    found = estimate_config(config, batch=2, sequence=256)
    (part,) = found.classes
    shared = sum(tensor.size_bytes for tensor in found.shared)
    tokens, d, f = 512, 512, 1376
    assert part.saved_bytes + shared == 23464 * tokens
    assert shared == 2 * 256 * 64 * 2  # cos and sin of one row, 64 wide, bf16
    assert {c.value: size / tokens for c, size in part.class_bytes().items()} == {
        "norm_internal": 2 * (4 * d + 2 * d + 4),  # input in fp32, normalised in bf16, reciprocal deviation
        "norm_output": 2 * 2 * d,
        "qkv": 3 * 2 * d,
        "attention_output": 2 * d + 4 * 8,
        "mlp_gate": 2 * f,
        "mlp_activation": 2 * f,
        "mlp_up": 2 * f,
        "mlp_product": 2 * f,
    }
    kept = [t for t in part.saved if not t.nearly_free]
    # q, k, v, attention with its log-sum-exp, the residual that the second norm took, gate and up.
    assert sum(t.size_bytes for t in kept) == tokens * (3 * 2 * d + 2 * d + 32 + 4 * d + 4 * f)
    assert [t.token_axis for t in part.saved if t.tensor_class is TensorClass.QKV] == [0, 2, 2]


def test_nearly_free_says_what_it_needs() -> None:
    (part,) = small("dense").classes
    products = [t for t in part.saved if t.tensor_class is TensorClass.MLP_PRODUCT]
    (product,) = products
    assert [part.saved[i].tensor_class for i in product.recompute_from] == [
        TensorClass.MLP_ACTIVATION,
        TensorClass.MLP_UP,
    ]
    # It reads both factors and writes their product.
    assert product.recompute_moved_bytes == 3 * ROWS * TOKENS * 112 * 2
    first = part.saved[0]
    assert (first.tensor_class, first.dtype) == (TensorClass.NORM_INTERNAL, "float32")
    assert first.nearly_free
    assert first.recompute_from_input  # which autograd itself does not keep in bf16
    assert not any(t.tensor_class is TensorClass.BLOCK_INPUT for t in part.saved)
    for place, tensor in enumerate(part.saved):
        assert all(i < place for i in tensor.recompute_from)


def test_routing_and_dropout_are_never_nearly_free() -> None:
    (experts,) = small("experts").classes
    routing = [t for t in experts.saved if t.tensor_class is TensorClass.ROUTING]
    assert routing
    assert not any(t.nearly_free for t in routing)
    # 48 tokens go to two experts each: gate and up side by side, 96 rows of 2 * 112 in bf16.
    assert experts.class_bytes()[TensorClass.MLP_GATE] == 96 * 224 * 2
    assert any("none is dropped" in words for words in small("experts").assumptions)
    (gpt2,) = small("gpt2").classes
    masks = [t for t in gpt2.saved if t.operator == "aten::empty_like"]  # filled with random numbers
    # Of scores, 4 heads of 24 by 24 tokens in fp32, and of both outputs, 64 features in bf16; two rows.
    assert [t.size_bytes for t in masks] == [2 * 4 * 24 * 24 * 4, 2 * 24 * 64 * 2, 2 * 24 * 64 * 2]
    assert not any(t.nearly_free for t in masks)
    (on_gpu,) = small("gpt2", attention="flash").classes
    masks = [t for t in on_gpu.saved if t.operator == "aten::native_dropout"]
    assert [(t.dtype, t.size_bytes) for t in masks] == [("bool", 2 * 24 * 64)] * 2


def test_layer_norms_of_a_gpu_keep_statistics_in_fp32() -> None:
    for attention, dtype, size in (("default", "bfloat16", 2), ("flash", "float32", 4)):
        (part,) = small("gpt2", attention=attention).classes
        statistics = [t for t in part.saved if t.operator == "aten::native_layer_norm" and t.shape[-1] == 1]
        # Mean and reciprocal deviation of each token, two norms.
        assert [(t.dtype, t.size_bytes) for t in statistics] == [(dtype, ROWS * TOKENS * size)] * 4


@pytest.mark.parametrize("name", ["dense", "grouped", "mixed-windows", "gpt2"])
def test_flops_are_those_of_torchs_counter_over_the_real_run(name: str) -> None:
    attention = "eager"
    found = small(name, F32, attention)
    model, batch = real_model(CONFIGS[name], F32, attention)
    with FlopCounterMode(display=False) as forward:
        loss = model(**batch).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert found.flops(backward=False) == forward.get_total_flops()
    assert found.flops(backward=True) == backward.get_total_flops()
    # Scores and their product with the values: 4 heads of 16, 24 tokens by 24, two rows, two layers.
    proper = 2 * 2 * (2 * ROWS * 4 * TOKENS * TOKENS * 16)
    assert found.flops(backward=False, attention=True) == proper
    assert found.flops(backward=True, attention=True) == 2 * proper


def test_fused_attention_is_counted_apart() -> None:
    (part,) = small("grouped", attention="flash").classes
    product = 2 * ROWS * 4 * TOKENS * TOKENS * 16
    assert part.flops(backward=False, attention=True) == 2 * product
    assert part.flops(backward=True, attention=True) == 5 * product


def test_flash_attention_goes_backward_with_scratch() -> None:
    (part,) = small("grouped", attention="flash").classes
    (index,) = (i for i, op in enumerate(part.operations) if op.name == "memtrain::attention_backward")
    scratch = [t.size_bytes for t in part.lifetimes if (t.start, t.end) == (index, index + 1)]
    rows, heads, tokens, width = ROWS, 4, 128, 32  # 24 tokens and heads of 16, rounded up
    wide, sums = 4 * rows * heads * tokens * width, 4 * rows * heads * tokens
    # Two heads of keys: their gradients, and those of the values, for each of the four first.
    expanded = 2 * rows * heads * TOKENS * 16
    assert scratch == [wide, sums, expanded, expanded]


def test_layers_of_one_kind_share_a_class() -> None:
    assert len(small("dense").classes) == 1
    mixed = small("mixed-windows")
    assert [block.part for block in mixed.blocks] == [0, 1]
    assert [part.attention_window for part in mixed.classes] == [8, None]
    # Eager attention adds its masks to the scores, and an addition saves neither: rotary tables are left.
    assert [t.tensor_class for t in mixed.shared] == [TensorClass.OTHER] * 2
    # Both masks, [2, 1, 24, 24] in bf16, are referred to until the final norm has run.
    held = [t for t in mixed.prologue.lifetimes if t.epilogue_end and t.size_bytes == 2 * TOKENS * TOKENS * 2]
    assert [t.epilogue_end for t in held] == [10, 10]


def test_a_window_needs_no_mask_in_flash_attention() -> None:
    windowed, plain = small("window", attention="flash"), small("grouped", attention="flash")
    assert windowed.saved_bytes == plain.saved_bytes
    assert windowed.classes[0].attention_window == 8
    capped = small("mixed-windows", attention="flash")
    assert [part.attention_window for part in capped.classes] == [8, None]
    assert len({part.saved_bytes for part in capped.classes}) == 1
    traced = small("window", attention="sdpa").classes[0]
    # On the CPU each layer makes an additive mask of its own out of the boolean one.
    assert traced.class_bytes()[TensorClass.MASK] == ROWS * TOKENS * TOKENS * 2


class Block(nn.Module):
    """``x + down(relu(up(x)))``: saves x and relu's output."""

    def __init__(self, width: int = 32, wide: int = 128) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, wide), nn.Linear(wide, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Plain(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.first, self.blocks, self.last = nn.Linear(8, 32), nn.ModuleList(blocks), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def test_an_own_module_by_hand() -> None:
    found = estimate_module(lambda: Plain([Block(), Block(), Block(wide=64)]), torch.randn(64, 8))
    assert [block.part for block in found.blocks] == [0, 0, 1]
    part = found.classes[0]
    x, wide = 64 * 32 * 4, 64 * 128 * 4
    assert part.class_bytes() == {TensorClass.BLOCK_INPUT: x, TensorClass.MLP_ACTIVATION: wide}
    assert [(op.name, op.module) for op in part.operations[: part.forward_operations]] == [
        ("aten::addmm", "up"),
        ("aten::relu", ""),
        ("aten::addmm", "down"),
        ("aten::add", ""),
    ]
    up, relu, down, add = part.operations[:4]
    assert up.flops == down.flops == 2 * 64 * 32 * 128
    assert (up.read_bytes, up.written_bytes) == (128 * 4 + x + 32 * 128 * 4, wide)
    assert (relu.read_bytes, relu.written_bytes, relu.flops) == (wide, wide, 0)
    assert (add.read_bytes, add.written_bytes) == (2 * x, x)
    forward = [
        (life.start, life.end, life.size_bytes, life.kind) for life in part.lifetimes if life.start < 4
    ]
    # up's output dies when relu has run, down's when it was added, the block's own with the end of forward.
    assert (0, 2, wide, LifetimeKind.TRANSIENT) in forward
    assert (2, 4, x, LifetimeKind.TRANSIENT) in forward
    assert (3, 4, x, LifetimeKind.OUTPUT) in forward
    assert part.forward_peak_bytes == x + 2 * wide
    kinds = [life.kind for life in part.lifetimes]
    assert kinds.count(LifetimeKind.GRADIENT) == 4
    assert kinds.count(LifetimeKind.OUTPUT_GRADIENT) == kinds.count(LifetimeKind.INPUT_GRADIENT) == 1
    # relu's output, the residual gradient and the gradient before relu, when relu goes backward.
    assert part.backward_peak_bytes >= 2 * wide + 2 * x
    units = {unit.name: sum(p.elements for p in unit.parameters) for unit in found.units}
    assert units == {
        "prologue": 8 * 32 + 32,
        "blocks.0": 2 * 32 * 128 + 128 + 32,
        "blocks.1": 2 * 32 * 128 + 128 + 32,
        "blocks.2": 2 * 32 * 64 + 64 + 32,
        "epilogue": 33,
    }


class Saving(nn.Module):
    """Its output is saved by its own relu and, as the next one's input, by the next one's product."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x))


def test_what_two_blocks_save_counts_once() -> None:
    batch = torch.randn(64, 8)
    found = estimate_module(lambda: Plain([Saving(), Saving()]), batch)
    assert found.repeated_bytes == 2 * 64 * 32 * 4
    model = Plain([Saving(), Saving()])
    assert found.saved_bytes == really_saved(model, lambda: model(batch).sum(), [batch])


class Acting(nn.Module):
    """Two of these differ in nothing but a function."""

    def __init__(self, function: Any, settings: Any = None) -> None:
        super().__init__()
        self.linear, self.function, self.settings = nn.Linear(32, 32), function, settings

    def forward(self, x: Tensor) -> Tensor:
        return x + self.function(self.linear(x))


def test_blocks_that_differ_in_a_function_are_two_classes() -> None:
    batch = torch.randn(64, 8)

    def model() -> nn.Module:
        return Plain([Acting(F.relu), Acting(torch.sin), Acting(F.relu), Acting(F.relu, {"width": 3})])

    found = estimate_module(model, batch)
    assert [block.part for block in found.blocks] == [0, 1, 0, 2]
    real = model()
    assert found.saved_bytes == really_saved(real, lambda: real(batch).sum(), [batch])


def test_a_private_setting_makes_another_class() -> None:
    found = estimate_module(lambda: Plain([Repeating(1), Repeating(3), Repeating(3)]), torch.randn(4, 8))
    assert [block.part for block in found.blocks] == [0, 1, 1]
    # A linear layer saves what it is given, [4, 32] in fp32.
    assert [part.saved_bytes for part in found.classes] == [4 * 32 * 4, 3 * 4 * 32 * 4]


class Repeating(nn.Module):
    def __init__(self, times: int) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32, bias=False)
        self._times = times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self._times):
            x = self.inner(x)
        return x


class Frozen(Plain):
    """The first layer and the first block do not learn."""

    def __init__(self) -> None:
        super().__init__([Block(), Block(), Block()])
        self.first.requires_grad_(False)
        self.blocks[0].requires_grad_(False)


def test_what_is_frozen_saves_nothing() -> None:
    found = estimate_module(Frozen, torch.randn(64, 8))
    x, wide = 64 * 32 * 4, 64 * 128 * 4
    assert [found.classes[block.part].saved_bytes for block in found.blocks] == [0, x + wide, x + wide]
    # The second block's input needs no gradient, the third's does: their classes differ in backward alone.
    assert [block.part for block in found.blocks] == [0, 1, 2]
    kinds = [[life.kind for life in part.lifetimes] for part in found.classes]
    assert [k.count(LifetimeKind.INPUT_GRADIENT) for k in kinds] == [0, 0, 1]
    assert [k.count(LifetimeKind.GRADIENT) for k in kinds] == [0, 4, 4]
    assert sum(p.elements for unit in found.units for p in unit.parameters if not p.trainable) == 288 + 8352


class Correcting(nn.Module):
    """Its square is read before it is changed in place: it does not follow from what stands there now."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        doubled = x * 2
        wave = doubled.detach() + 1
        doubled.mul_(3)
        return self.linear(wave) + self.linear(doubled)


def test_what_was_changed_in_place_is_not_nearly_free_from_what_stood_there() -> None:
    (part,) = estimate_module(lambda: Plain([Correcting(), Correcting()]), torch.randn(64, 8)).classes
    free = {tensor.operator: tensor.nearly_free for tensor in part.saved}
    assert free == {"aten::add": False, "aten::mul": True}


class Attending(nn.Module):
    """Queries in the layout ``[rows, heads, tokens, width]``: an output of the kernel's own layout."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, _ = x.shape
        q, k, v = (t.contiguous() for t in self.project(x).view(rows, tokens, 3, 4, 8).permute(2, 0, 3, 1, 4))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + attended.transpose(1, 2).reshape(rows, tokens, 32)


def test_other_layouts_of_attention() -> None:
    batch = torch.randn(2, 24, 8)
    model = Plain([Attending(), Attending()])
    real = really_saved(model, lambda: model(batch).sum(), [batch])
    for attention in ("default", "cpu"):
        found = estimate_module(lambda: Plain([Attending(), Attending()]), batch, attention=attention)
        assert found.saved_bytes == real


def test_tied_weights_belong_to_the_prologue_alone() -> None:
    found = estimate_config({**CONFIGS["dense"], "tie_word_embeddings": True}, sequence=4)
    assert [p.name for p in found.units[0].parameters] == ["model.embed_tokens.weight"]
    assert [p.name for p in found.units[-1].parameters] == ["model.norm.weight"]


def test_a_chunked_loss_keeps_no_logits() -> None:
    (whole, by_chunks) = (small("dense", forward=f).epilogue for f in (None, chunked(16)))
    hidden, head, tokens = ROWS * TOKENS * 64 * 2, 97 * 64 * 2, ROWS * TOKENS
    assert whole.class_bytes()[TensorClass.LOSS] >= tokens * 97 * 4
    assert by_chunks.class_bytes()[TensorClass.LOSS] == hidden + head
    assert by_chunks.flops(backward=False) == 3 * 2 * tokens * 64 * 97
    assert by_chunks.flops(backward=True) == 0
    # The loss that runs holds the same from forward to backward (and itself, four bytes).
    weight = torch.randn(97, 64, dtype=BF16, requires_grad=True)
    states = torch.randn(tokens, 64, dtype=BF16, requires_grad=True)
    labels = torch.zeros(tokens, dtype=torch.int64)
    with LiveBytes() as live:
        loss = chunked_cross_entropy(states, weight, labels, chunk_tokens=16)
        assert live.now_bytes == hidden + head + loss.nbytes
    logits = 16 * 97 * 2, 16 * 97 * 4
    # While it runs also the hidden states, which nobody needs afterwards, and the loss.
    assert by_chunks.forward_peak_bytes == by_chunks.held_bytes + sum(logits) + hidden + 4
    with pytest.raises(ValueError, match=">= 1, got 0"):
        chunked(0)


@pytest.mark.parametrize("attention", ["default", "flash"])
def test_an_estimate_is_the_same_whenever_garbage_is_collected(attention: str) -> None:
    def trace() -> ModelEstimate:
        return small("grouped", attention=attention, forward=chunked(16))

    threshold = gc.get_threshold()
    try:
        gc.disable()
        late = trace()
        gc.enable()
        gc.set_threshold(20)
        assert trace() == late
    finally:
        gc.set_threshold(*threshold)
        gc.enable()


def test_errors_name_the_remedy() -> None:
    with pytest.raises(UnknownModelError, match="smollm2-135m"):
        estimate_config("llama-9", sequence=8)
    with pytest.raises(UnknownModelError, match="model_type"):
        estimate_config({"hidden_size": 8}, sequence=8)
    with pytest.raises(UnknownModelError, match="'unheard'"):
        estimate_config({"model_type": "unheard"}, sequence=8)
    with pytest.raises(ValueError, match=">= 1, got 1 and 0"):
        estimate_config("llama-7b", sequence=0)
    with pytest.raises(ValueError, match="'fast'"):
        estimate_config("llama-7b", sequence=8, attention="fast")
    own_list = {"model_type": "gptj", "n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8}
    with pytest.raises(AttentionKernelError, match="gptj has a list of attention classes of its own"):
        estimate_config(own_list, sequence=8, attention="flash")
    unfused = {"model_type": "bloom", "n_head": 4, "hidden_size": 64, "n_layer": 2, "vocab_size": 97}
    with pytest.raises(AttentionKernelError, match="so flash would change nothing: choose eager"):
        estimate_config(unfused, sequence=8, attention="flash")
    with pytest.raises(AttentionKernelError, match=r"gemma2 has no attention through .*: choose eager"):
        estimate_config("gemma-2-2b", sequence=8, attention="efficient")
    with pytest.raises(AttentionKernelError, match="no dropout"):
        small("gpt2", attention="cpu")
    with pytest.raises(BlocksNotFoundError):
        estimate_module(lambda: nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8))
    with pytest.raises(TypeError, match="give forward"):
        estimate_module(lambda: _Pair([Block(), Block()]), torch.randn(4, 8))
    with pytest.raises(UntraceableError, match="depend on the values"):
        estimate_module(lambda: Plain([_Deciding(), _Deciding()]), torch.randn(4, 8))


class _Pair(Plain):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class _Deciding(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


def test_a_folder_and_a_file_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["dense"]))
    by_folder = estimate_config(tmp_path, sequence=8)
    assert by_folder == estimate_config(tmp_path / "config.json", sequence=8)
    assert by_folder == estimate_config(CONFIGS["dense"], sequence=8)
    assert ModelEstimate.from_json(by_folder.to_json()) == by_folder
