"""What a compressor encodes of a block, what it leaves alone, what that loses, and what it refuses."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memtrain.optim.autograd.group_codec import GroupCodec
from memtrain.optim.autograd.lossy_backward import LossyBackwardError
from memtrain.optim.autograd.quantized_saved import SavedTensorCompressor

TOKENS, FEATURES, HIDDEN = 96, 64, 256


class MLP(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(FEATURES, HIDDEN, dtype=dtype)
        self.down = nn.Linear(HIDDEN, FEATURES, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(2, TOKENS // 2, FEATURES, generator=torch.Generator().manual_seed(1)).to(dtype)
    return x.requires_grad_()


def gradients(run: Callable[[Tensor], Tensor], parameters: list[Tensor], x: Tensor) -> list[Tensor]:
    y = run(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    return list(torch.autograd.grad(y, [*parameters, x], weights))


def relative_errors(got: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [float((a - b).double().norm() / b.double().norm()) for a, b in zip(got, expected, strict=True)]


def saved_storages(run: Callable[[], Any]) -> list[Tensor]:
    """One tensor per storage that autograd saves in plain PyTorch."""
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        keep = run()
    del keep
    return list(seen.values())


@pytest.mark.parametrize(
    ("options", "reference"),
    # A GELU MLP with groups of 64, before: .76 %, 11.5 % rounded to the nearest, 16 % at random.
    [
        ({"bits": 8, "group": 64}, 0.0076),
        ({"bits": 4, "group": 64, "stochastic": False}, 0.115),
        ({"bits": 4, "group": 64}, 0.16),
    ],
)
def test_gradient_error_of_a_gelu_mlp(options: dict[str, Any], reference: float) -> None:
    block, x = MLP(), inputs()
    parameters = [block.up.weight, block.down.weight]
    expected = gradients(block, parameters, x)
    output = block(x)
    SavedTensorCompressor(GroupCodec(**options)).attach(block)
    assert torch.equal(block(x), output)
    errors = relative_errors(gradients(block, parameters, x), expected)
    assert errors[0] == pytest.approx(reference, rel=0.15)
    # Half of GELU's outputs are near zero: what feeds the second weight has a wider spread within a group.
    assert errors[0] < errors[1] < 1.45 * reference


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_saved_bytes_are_the_codecs_formula(dtype: torch.dtype) -> None:
    block, x = MLP(dtype), inputs(dtype)
    plain = saved_storages(lambda: block(x))
    activations = [t for t in plain if t.shape not in (block.up.weight.shape, block.down.weight.shape)]
    compressor = SavedTensorCompressor(GroupCodec(bits=8))
    compressor.attach(block)
    y = block(x + 0)
    # the input, GELU's input and its output, each once
    expected = sum(
        compressor.codec.size_bytes(n) for n in (TOKENS * FEATURES, TOKENS * HIDDEN, TOKENS * HIDDEN)
    )
    assert compressor.stored_bytes == expected
    assert sum(t.untyped_storage().nbytes() for t in activations if t.grad_fn or t is not x) > 1.9 * expected
    y.sum().backward()
    del y
    gc.collect()
    assert compressor.stored_bytes == 0


def test_a_storage_is_encoded_once_for_views_nodes_and_blocks() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = x.chunk(3, dim=-1)  # three views of one storage, saved by two products
            return (q * k) @ v.transpose(-1, -2)

    block = Twice()
    compressor = SavedTensorCompressor()
    compressor.attach(block)
    leaf = torch.randn(16, 3 * FEATURES, requires_grad=True)
    x = leaf * 1.0
    first, second = block(x), block(x)
    product = compressor.codec.size_bytes(16 * FEATURES)  # of each block its own
    assert compressor.stored_bytes == compressor.codec.size_bytes(16 * 3 * FEATURES) + 2 * product
    (got,) = torch.autograd.grad(first.sum() + second.sum(), leaf)
    plain = Twice()
    (expected,) = torch.autograd.grad(2 * plain(leaf * 1.0).sum(), leaf)
    assert relative_errors([got], [expected])[0] < 0.02


def test_a_storage_that_changed_is_another_one() -> None:
    class Changes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 2.0
            first = y.sin()  # saves y
            y.mul_(3.0)
            return first + y.sin()  # saves y again, another version

    block = Changes()
    compressor = SavedTensorCompressor()
    compressor.attach(block)
    leaf = torch.randn(40, FEATURES, requires_grad=True)
    x = leaf * 1.0
    y = block(x)
    assert compressor.stored_bytes == 2 * compressor.codec.size_bytes(40 * FEATURES)
    (got,) = torch.autograd.grad(y.sum(), leaf)
    expected = 2 * (2 * leaf).cos() + 6 * (6 * leaf).cos()
    assert relative_errors([got], [expected.detach()])[0] < 0.1


def test_a_small_window_of_a_large_storage_is_encoded_alone() -> None:
    class Window(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[3:7, :30].sin()

    block = Window()
    compressor = SavedTensorCompressor()
    compressor.attach(block)
    leaf = torch.randn(50, 40, requires_grad=True)
    y = block(leaf * 1.0)
    assert compressor.stored_bytes == compressor.codec.size_bytes(4 * 30)
    (got,) = torch.autograd.grad(y.sum(), leaf)
    assert relative_errors([got[3:7, :30]], [leaf[3:7, :30].cos().detach()])[0] < 0.02


def test_parameters_buffers_masks_tables_and_indices_are_left_alone() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(FEATURES, FEATURES))
            self.register_buffer("scale", torch.rand(TOKENS, FEATURES))

        def forward(self, x: Tensor, mask: Tensor, index: Tensor) -> Tensor:
            x = (x * self.scale) @ self.weight.t()
            x = x.masked_fill(mask < 0, 0.0) * mask.clamp_min(-1)
            return x[index]

    block = Block()
    compressor = SavedTensorCompressor()
    compressor.attach(block)
    leaf = torch.randn(TOKENS, FEATURES, requires_grad=True)
    mask = torch.zeros(TOKENS, FEATURES).masked_fill(torch.rand(TOKENS, FEATURES) < 0.2, -torch.inf)
    index = torch.randperm(TOKENS)
    y = block(leaf * 1.0, mask, index)
    # x * scale, saved by the matrix product, and mask.clamp_min(-1), which the product saves
    assert compressor.stored_bytes == 2 * compressor.codec.size_bytes(TOKENS * FEATURES)
    (got,) = torch.autograd.grad(y.sum(), leaf)
    assert bool(got.isfinite().all())


def test_row_statistics_are_left_alone() -> None:
    class Norm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            rstd = x.square().mean(-1, keepdim=True).rsqrt()
            return x * rstd

    block = Norm()
    compressor = SavedTensorCompressor()
    compressor.attach(block)
    y = block(torch.randn(TOKENS, FEATURES, requires_grad=True) * 1.0)
    assert compressor.stored_bytes == compressor.codec.size_bytes(TOKENS * FEATURES)
    assert y.shape == (TOKENS, FEATURES)


def test_an_output_is_kept_as_it_is() -> None:
    class Exponential(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.exp()  # saves its result

    block, leaf = Exponential(), torch.randn(TOKENS, FEATURES, requires_grad=True)
    compressor = SavedTensorCompressor()
    compressor.attach(block)
    y = block(leaf * 1.0)
    assert compressor.stored_bytes == 0
    (got,) = torch.autograd.grad(y.sum(), leaf, retain_graph=True)
    assert torch.equal(got, y)
    with torch.no_grad():
        y.mul_(2.0)
    with pytest.raises(LossyBackwardError, match="changed in place"):
        y.sum().backward()


def test_the_loss_stays_exact_and_half_precision_is_encoded() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        block, x = MLP(dtype), inputs(dtype)
        expected = block(x)
        compressor = SavedTensorCompressor()
        compressor.attach(block)
        assert torch.equal(block(x), expected)
        y = block(x)
        assert compressor.stored_bytes > 0
        y.sum().backward()


def test_accumulation_and_walking_a_graph_twice() -> None:
    block, x = MLP(), inputs()
    SavedTensorCompressor().attach(block)
    y = block(x).square().sum()
    y.backward(retain_graph=True)
    once = block.up.weight.grad.clone()
    y.backward()
    assert torch.equal(block.up.weight.grad, 2 * once)
    # T7: micro-batches add up to the batch, as far as each is quantised in groups of its own
    block.up.weight.grad = None
    for half in x.detach().split(1):
        block(half.requires_grad_()).square().sum().backward()
    assert relative_errors([block.up.weight.grad], [once])[0] < 1e-6


def test_a_scaled_loss_scales_the_gradient_exactly() -> None:
    # T8, with a power of two as GradScaler has
    block, x = MLP(), inputs()
    SavedTensorCompressor(GroupCodec(bits=4)).attach(block)
    plain, scaled = (torch.autograd.grad(block(x).sum() * c, block.up.weight)[0] for c in (1, 1024))
    assert torch.equal(scaled, 1024 * plain)


def test_second_derivatives_are_refused() -> None:
    block, x = MLP(), inputs()
    SavedTensorCompressor().attach(block)
    with pytest.raises(LossyBackwardError, match="second derivative"):
        torch.autograd.grad(block(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_around_a_block(reentrant: bool) -> None:
    block, x = MLP(), inputs()
    parameters = [block.up.weight, block.down.weight]
    expected = gradients(block, parameters, x)
    compressor = SavedTensorCompressor()
    compressor.attach(block)
    y = checkpoint(block, x, use_reentrant=reentrant)
    assert compressor.stored_bytes == 0  # neither encoded, nor is the checkpoint made void
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    y.backward(weights)
    got = [block.up.weight.grad, block.down.weight.grad, x.grad]
    errors = relative_errors(got, expected)
    assert max(errors) < (0.012 if reentrant else 1e-6)


def test_a_region_around_checkpoints_encodes_their_inputs() -> None:
    first, second, leaf = MLP(), MLP(), inputs()
    compressor = SavedTensorCompressor()
    model = nn.ModuleList([first, second])
    with compressor.region(model, leaf) as result:
        y = result(
            checkpoint(second, checkpoint(first, leaf * 1.0, use_reentrant=False), use_reentrant=False)
        )
    assert compressor.stored_bytes == 2 * compressor.codec.size_bytes(TOKENS * FEATURES)
    parameters = [first.up.weight, second.down.weight]
    got = torch.autograd.grad(y.sum(), [*parameters, leaf])
    expected = torch.autograd.grad(second(first(leaf * 1.0)).sum(), [*parameters, leaf])
    assert max(relative_errors(list(got), list(expected))) < 0.03


def test_random_rounding_is_the_same_in_a_second_run() -> None:
    block, x = MLP(), inputs()
    SavedTensorCompressor(GroupCodec(bits=4)).attach(block)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            gradients(block, [block.up.weight], x), gradients(block, [block.up.weight], x), strict=True
        )
    )


def test_autocast_copies_of_weights_are_left_alone() -> None:
    block, x = MLP(), inputs()
    compressor = SavedTensorCompressor()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = gradients(block, [block.up.weight], x)
        compressor.attach(block)
        y = block(x)
        sizes = (TOKENS * FEATURES, TOKENS * HIDDEN, TOKENS * HIDDEN)
        assert compressor.stored_bytes == sum(compressor.codec.size_bytes(n) for n in sizes)
        del y
        got = gradients(block, [block.up.weight], x)
    assert max(relative_errors(got, expected)) < 0.02


def test_hooks_around_a_block_are_handed_codes() -> None:
    """Whoever moves what autograd saves moves the codes, and what is not encoded; the result is the same."""
    block, x = MLP(), inputs()
    compressor = SavedTensorCompressor()
    compressor.attach(block)
    wanted = gradients(block, [block.up.weight], x)
    handed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        handed.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = block(x)
        codes = [tensor for tensor in handed if tensor.dtype == torch.int8]
        assert sum(tensor.numel() for tensor in codes) == sum(
            -(-n // 128) * 128 for n in (TOKENS * FEATURES, TOKENS * HIDDEN, TOKENS * HIDDEN)
        )
        del y
        got = gradients(block, [block.up.weight], x)
    assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


def test_hooks_around_a_block_live_no_longer_than_the_graph() -> None:
    class Hooks:
        def pack(self, tensor: Tensor) -> Tensor:
            return tensor

    block, x, hooks = MLP(), inputs(), Hooks()
    SavedTensorCompressor().attach(block)
    alive = weakref.ref(hooks)
    gc.disable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(hooks.pack, lambda tensor: tensor):
            y = block(x)
        del hooks
        assert alive() is not None
        y.sum().backward()
        assert alive() is None
    finally:
        gc.enable()


def test_hooks_inside_a_block_count_instead() -> None:
    class Offloads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autograd.graph.save_on_cpu():
                return x.sin()

    block, x = Offloads(), inputs()
    compressor = SavedTensorCompressor()
    compressor.attach(block)
    y = block(x * 1.0)
    assert compressor.stored_bytes == 0
    (got,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(got, x.cos())


def test_an_error_in_a_block_leaves_no_hooks_behind() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("in forward")

    block = Fails()
    compressor = SavedTensorCompressor()
    compressor.attach(block)
    with pytest.raises(KeyError, match="in forward"):
        block(inputs())
    y = inputs().sin().sum()
    assert compressor.stored_bytes == 0
    y.backward()


def test_two_threads_in_one_block() -> None:
    block, x = MLP(), inputs()
    with_gradients_entered, without_left = threading.Event(), threading.Event()

    def meet(*_: object) -> None:
        if torch.is_grad_enabled():
            with_gradients_entered.set()
            assert without_left.wait(10)
        else:
            assert with_gradients_entered.wait(10)

    block.up.register_forward_hook(meet)
    compressor = SavedTensorCompressor()
    compressor.attach(block)

    def evaluate() -> None:
        with torch.no_grad():
            block(x)
        without_left.set()

    with ThreadPoolExecutor(1) as pool:
        evaluation = pool.submit(evaluate)
        y = block(x)
        evaluation.result()
    assert compressor.stored_bytes > 0
    y.sum().backward()
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None


def test_remove_without_gradients_and_copies() -> None:
    block, x = MLP(), inputs()
    compressor = SavedTensorCompressor()
    attachment = compressor.attach(block)
    with torch.no_grad():
        block(x)
    twin = copy.deepcopy(block)
    y = twin(x)
    assert compressor.stored_bytes == 0  # the copy has a compressor of its own
    y.sum().backward()
    assert block.up.weight.grad is None
    assert twin.up.weight.grad is not None
    attachment.remove()
    attachment.remove()
    assert not block._forward_pre_hooks
    assert not block._forward_hooks


def test_frozen_and_unused_parameters_and_empty_batches() -> None:
    block = MLP()
    block.up.weight.requires_grad_(False)
    block.spare = nn.Parameter(torch.zeros(3))
    SavedTensorCompressor().attach(block)
    block(torch.zeros(0, FEATURES, requires_grad=True)).sum().backward()
    block(inputs()).sum().backward()
    assert block.up.weight.grad is None
    assert block.spare.grad is None
    assert block.down.weight.grad is not None


def test_a_nan_stays_visible() -> None:
    block = MLP()
    SavedTensorCompressor().attach(block)
    x = inputs().detach()
    x[0, 0, 0] = torch.inf
    block(x.requires_grad_()).sum().backward()
    assert not bool(block.up.weight.grad.isfinite().all())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_block() -> None:
    block, x = MLP(), inputs()
    parameters = [block.up.weight, block.down.weight]
    expected = gradients(block, parameters, x)
    compressor = SavedTensorCompressor()
    compiled = torch.compile(block, backend="aot_eager")
    with compressor.region(block, x) as result:
        y = result(compiled(x))
    assert compressor.stored_bytes > 0
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    got = list(torch.autograd.grad(y, [*parameters, x], weights))
    errors = relative_errors(got, expected)
    assert 1e-4 < max(errors) < 0.012


@pytest.mark.filterwarnings("ignore::DeprecationWarning", r"ignore:The \.grad attribute:UserWarning")
def test_hooks_inside_a_compiled_model_break_its_graph_or_are_refused() -> None:
    block, x = MLP(), inputs()
    parameters = [block.up.weight, block.down.weight]
    compressor = SavedTensorCompressor()
    compressor.attach(block)
    expected = gradients(block, parameters, x)
    compiled = torch.compile(block, backend="aot_eager")
    assert max(relative_errors(gradients(compiled, parameters, x), expected)) < 1e-5
    y = compiled(x)
    assert compressor.stored_bytes > 0
    del y
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="saved-tensor hooks are entered and left"):
        torch.compile(block, backend="aot_eager", fullgraph=True)(x)
    torch._dynamo.reset()
