"""Offloaded gradients: accumulation, norms and scalings equal those of ordinary tensors; the rest is
refused."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from memtrain.offload.engine import Engine
from memtrain.offload.errors import OffloadError, PlanMismatchError, UnsupportedGradientOperation
from memtrain.offload.gradients import GradientStore, exclusive_fingerprints
from memtrain.offload.offloaded_grad import OffloadedGrad, StaleGradientError
from memtrain.offload.shards import FlatIndex
from memtrain.offload.tiers import MemoryStore
from memtrain.planner.actions import Tier
from tests.offload.late_device import LateDevice
from tests.offload.training import open_engine

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def engine() -> Iterator[Engine]:
    with open_engine() as opened:
        yield opened


def store_for(engine: Engine, *parameters: nn.Parameter, slots: int = 3, **more: Any) -> GradientStore:
    index = FlatIndex([("u", [(f"p{i}", p) for i, p in enumerate(parameters)])], 50_000)
    return GradientStore(
        engine=engine, index=index, tiers={"u": Tier.HOST}, slots=slots, slot_bytes=32 << 10, **more
    )


def values(seed: int, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (307, 251)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def produce(parameter: nn.Parameter, gradient: Tensor) -> None:
    """A backward pass that gives ``parameter`` this gradient."""
    (parameter * gradient).sum().backward()


def pair(
    engine: Engine, dtype: torch.dtype = torch.float32, **more: Any
) -> tuple[nn.Parameter, nn.Parameter, Any]:
    """An offloaded parameter and an ordinary one."""
    one, other = nn.Parameter(values(0, dtype)), nn.Parameter(values(0, dtype))
    return one, other, store_for(engine, one, **more)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slots", [1, 3])
def test_accumulation_is_bit_equal(engine: Engine, dtype: torch.dtype, slots: int) -> None:
    one, other, _ = pair(engine, dtype, slots=slots)
    for seed in range(1, 5):
        for parameter in (one, other):
            produce(parameter, values(seed, dtype))
        assert isinstance(one.grad, OffloadedGrad)
        assert torch.equal(one.grad.materialize(), other.grad)
        for norm_dtype in (None, torch.float32):
            ours = torch.linalg.vector_norm(one.grad, dtype=norm_dtype)
            assert torch.equal(ours, torch.linalg.vector_norm(other.grad, dtype=norm_dtype))
        assert torch.equal(one.grad.norm(float("inf")), other.grad.norm(float("inf")))


def reads(store: GradientStore) -> list[str]:
    """Names of the gradients that the tier is asked for from now on."""
    asked: list[str] = []
    tier = next(iter(store.homes.values())).store
    original = tier.read

    def read(extent: Any, buffer: Tensor, offset: int = 0) -> Any:
        asked.append(extent.name.removeprefix("gradient of "))
        return original(extent, buffer, offset)

    tier.read = read  # type: ignore[method-assign]
    return asked


def test_what_is_added_to_next_is_read_ahead_and_read_once(engine: Engine) -> None:
    shape = (256, 257)  # five chunks of 32 KiB in bf16
    ours = [nn.Parameter(values(i, torch.bfloat16, shape)) for i in range(4)]
    plain = [nn.Parameter(p.detach().clone()) for p in ours]
    store = store_for(engine, *ours, slots=4)
    asked = reads(store)
    chunks = {name: len(home.chunks) for name, home in store.homes.items()}
    for seed in range(3):
        asked.clear()
        for parameters in (ours, plain):
            sum((p * values(seed * 7 + i, p.dtype, shape)).sum() for i, p in enumerate(parameters)).backward()
        if seed:
            assert {name: asked.count(name) for name in chunks} == chunks
            first = [asked.index(name) for name in chunks]
            last = [len(asked) - 1 - asked[::-1].index(name) for name in chunks]
            order = sorted(range(4), key=first.__getitem__)
            # The second to come is begun before the first is over only where its turn is known: from the
            # second gradient of a pass on.
            assert all(first[b] > last[a] for a, b in zip(order, order[2:], strict=False))
    for p, q in zip(ours, plain, strict=True):
        assert torch.equal(p.grad.materialize(), q.grad)


def test_what_was_read_ahead_is_forgotten_when_it_is_replaced(engine: Engine) -> None:
    """Passes that break off, come in another order, or begin anew find no old bytes."""
    shape = (256, 257)
    ours = [nn.Parameter(values(i, torch.float32, shape)) for i in range(3)]
    plain = [nn.Parameter(p.detach().clone()) for p in ours]
    store_for(engine, *ours, slots=4)
    script: list[tuple[int, ...] | None] = [
        (0, 1, 2),
        (0, 1, 2),
        (0,),
        None,
        (2, 1, 0),
        (1,),
        (0, 2),
        (2, 0, 1),
    ]
    for seed, members in enumerate(script):
        for parameters in (ours, plain):
            if members is None:
                for p in parameters:
                    p.grad = None
                continue
            for member in members:  # each a pass of its own, so that the order is ours
                produce(parameters[member], values(seed * 5 + member, torch.float32, shape))
        for p, q in zip(ours, plain, strict=True):
            assert (p.grad is None) == (q.grad is None)
            if seed in (3, 7) and p.grad is not None:
                assert torch.equal(p.grad.materialize(), q.grad)


def test_a_gradient_that_others_see_is_not_written_to(engine: Engine) -> None:
    """Both leaves of a sum get the same tensor; hooks may keep it; expanded ones have one element."""
    a, b = nn.Parameter(values(0)), nn.Parameter(values(1))
    x, y = nn.Parameter(values(0)), nn.Parameter(values(1))
    store_for(engine, a, b)
    kept: dict[str, list[Tensor]] = {"ours": [], "plain": []}
    a.register_hook(lambda g: kept["ours"].append(g))
    x.register_hook(lambda g: kept["plain"].append(g))
    for seed in range(3):
        for left, right in ((a, b), (x, y)):
            ((left + right) * values(seed)).sum().backward()
            (left.view(-1) + right.view(-1)).sum().backward()
            torch.cat([left, right]).pow(2).sum().backward()
            left.sum().backward()
    assert all(torch.equal(p, q) for p, q in zip(kept["ours"], kept["plain"], strict=True))
    assert torch.equal(a.grad.materialize(), x.grad)
    assert torch.equal(b.grad.materialize(), y.grad)


def test_exclusive_gradients_are_recognised(engine: Engine) -> None:
    """Two ways in which autograd hands over memory of its own: one may take either without a copy."""
    assert len(exclusive_fingerprints(torch.device("cpu"))) == 2
    parameter, _, store = pair(engine)
    taken: list[int] = []
    home = store.homes["p0"]
    original, copies = store._write, []
    store._write = lambda home, gradient: (taken.append(gradient.data_ptr()), original(home, gradient))[1]
    home.materialize = lambda: copies.append(1)  # type: ignore[method-assign]
    for seed in range(3):
        nn.functional.linear(values(seed, shape=(2, 5, 251)), parameter).pow(2).sum().backward()
        produce(parameter, values(seed))
    assert len(taken) == 6
    assert copies == []


def test_the_real_gradient_is_dropped_at_once(engine: Engine) -> None:
    parameter, _, _ = pair(engine)
    seen: list[weakref.ref[Any]] = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: Tensor) -> Tensor:
            return weight.sum()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            result = torch.full((307, 251), 2.0)
            seen.append(weakref.ref(result.untyped_storage()))
            return result

    for _ in range(2):
        Watched.apply(parameter).backward()
    gc.collect()
    assert [ref() for ref in seen] == [None, None]
    assert parameter.grad.materialize().unique().tolist() == [4.0]


SCALINGS: dict[str, Callable[[Tensor], Any]] = {
    "mul": lambda g: g.mul_(0.37),
    "mul tensor": lambda g: g.mul_(torch.tensor(0.37)),
    "div": lambda g: g.div_(3),
    "div tensor": lambda g: g.div_(torch.tensor(3.0)),
    "two": lambda g: g.mul_(1 / 3).div_(0.7),
    "foreach": lambda g: torch._foreach_mul_([g, torch.ones(3)], 0.1),
    "foreach list": lambda g: torch._foreach_mul_([torch.ones(3), g], [2.0, 0.1]),
    "foreach tensor": lambda g: torch._foreach_mul_([g], torch.tensor(0.1)),
    "foreach div": lambda g: torch._foreach_div_([g], 7.0),
    "zero": lambda g: g.zero_(),
    "foreach zero": lambda g: torch._foreach_zero_([g, torch.ones(2)]),
    "zero times nan": lambda g: g.zero_().mul_(float("nan")),
    "inf": lambda g: g.mul_(float("inf")),
    "large": lambda g: g.mul_(3e38),
}


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaling_waits_and_is_bit_equal(engine: Engine, kind: str, dtype: torch.dtype) -> None:
    one, other, _ = pair(engine, dtype)
    for parameter in (one, other):
        produce(parameter, values(1, dtype))
        SCALINGS[kind](parameter.grad)
    same = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(one.grad.materialize(), other.grad, **same)
    torch.testing.assert_close(
        torch.linalg.vector_norm(one.grad), torch.linalg.vector_norm(other.grad), **same
    )
    torch.testing.assert_close(one.grad.norm(float("inf")), other.grad.norm(float("inf")), **same)
    assert one.grad.finite() == bool(other.grad.isfinite().all())
    for parameter in (one, other):
        produce(parameter, values(2, dtype))
    torch.testing.assert_close(one.grad.materialize(), other.grad, **same)


def test_a_zeroed_gradient_keeps_the_sign_of_zero_as_pytorch(engine: Engine) -> None:
    one, other, _ = pair(engine)
    for parameter in (one, other):
        produce(parameter, values(1))
        parameter.grad.zero_()
        produce(parameter, torch.full((307, 251), -0.0))
    assert torch.equal(one.grad.materialize().signbit(), other.grad.signbit())


def test_the_operand_of_a_scaling_may_change_afterwards(engine: Engine) -> None:
    one, _, _ = pair(engine)
    produce(one, values(1))
    factor = torch.tensor(0.5)
    one.grad.mul_(factor)
    factor.fill_(9.0)
    assert torch.equal(one.grad.materialize(), values(1) * 0.5)


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("order", [2.0, float("inf")])
def test_clip_grad_norm_over_offloaded_and_ordinary(
    engine: Engine, foreach: bool | None, order: float
) -> None:
    ours = [nn.Parameter(values(i, shape=(300 - 290 * (i % 2), 300))) for i in range(4)]
    plain = [nn.Parameter(p.detach().clone()) for p in ours]
    store = store_for(engine, *ours)
    assert list(store.homes) == ["p0", "p2"]
    for parameters in (ours, plain):
        for i, p in enumerate(parameters):
            produce(p, values(10 + i, shape=tuple(p.shape)))
    for _ in range(2):  # the second finds scaled gradients
        norms = [torch.nn.utils.clip_grad_norm_(p, 1.0, order, foreach=foreach) for p in (ours, plain)]
        assert torch.equal(*norms)
    for p, q in zip(ours, plain, strict=True):
        assert torch.equal(p.grad.clone(), q.grad)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_unscale_and_element_checks(engine: Engine, bad: float) -> None:
    one, other, _ = pair(engine)
    gradient = values(1)
    gradient[7, 9] = bad
    found = []
    for parameter in (one, other):
        produce(parameter, gradient)
        found_inf, inverse = torch.zeros(1), torch.tensor([0.25])
        torch._amp_foreach_non_finite_check_and_unscale_([parameter.grad, torch.ones(2)], found_inf, inverse)
        found.append(found_inf.item())
    assert found == [float(bad != 3e38)] * 2
    assert torch.equal(one.grad.materialize().nan_to_num(), other.grad.nan_to_num())
    for check in (torch.isfinite, torch.isnan, Tensor.isinf):
        assert torch.equal(check(one.grad), check(other.grad))
    assert one.grad.finite() == (bad == 3e38)


def test_an_overflowing_norm_is_not_a_non_finite_gradient(engine: Engine) -> None:
    one, _, _ = pair(engine)
    produce(one, torch.full((307, 251), 1e30))
    assert torch.isinf(torch.linalg.vector_norm(one.grad))
    assert one.grad.finite()


def test_reading_it_as_an_ordinary_tensor(engine: Engine) -> None:
    one, _, _ = pair(engine, torch.bfloat16)
    gradient = values(1, torch.bfloat16)
    produce(one, gradient)
    one.grad.mul_(0.5)
    expected = gradient * 0.5
    assert torch.equal(one.grad.clone(), expected)
    assert torch.equal(one.grad.float(), expected.float())
    assert torch.equal(torch.zeros(307, 251).copy_(one.grad), expected.float())
    assert torch.equal(one.grad.detach().clone(), expected)
    assert type(one.grad.clone()) is Tensor
    assert repr(one.grad) == "OffloadedGrad(p0, shape=(307, 251), dtype=torch.bfloat16)"
    assert (one.grad.shape, one.grad.dtype, one.grad.numel()) == ((307, 251), torch.bfloat16, 77057)
    one.grad = one.grad.materialize()
    produce(one, gradient)  # an ordinary gradient leaves with the next backward
    assert torch.equal(one.grad.materialize(), expected + gradient)


UNSUPPORTED: dict[str, Callable[[Tensor], Any]] = {
    "aten.sum": lambda g: g.sum(),
    "aten.mul": lambda g: g * 2,
    "aten.clamp_": lambda g: g.clamp_(-1, 1),
    "aten.mul_": lambda g: g.mul_(torch.ones(307, 251)),
    "aten.linalg_vector_norm": lambda g: g.norm(3),
    "aten.copy_": lambda g: g.copy_(torch.ones(307, 251)),
    "aten._foreach_clamp_min_": lambda g: torch._foreach_clamp_min_([g], -1.0),
    "aten.view": lambda g: g.view(-1),
}


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_everything_else_raises_by_name(engine: Engine, kind: str) -> None:
    one, _, _ = pair(engine)
    produce(one, values(1))
    with pytest.raises(UnsupportedGradientOperation, match=rf"{kind}.* gradient of p0.*materialize\(\)"):
        UNSUPPORTED[kind](one.grad)
    assert torch.equal(one.grad.materialize(), values(1))


def test_sparse_gradients_are_refused(engine: Engine) -> None:
    embedding = nn.Embedding(1000, 100, sparse=True)
    store_for(engine, embedding.weight)
    with pytest.raises(UnsupportedGradientOperation, match=r"p0 is torch.sparse_coo"):
        embedding(torch.tensor([1])).sum().backward()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_a_gradient_with_a_graph_is_refused(engine: Engine) -> None:
    one, _, _ = pair(engine)
    with pytest.raises(UnsupportedGradientOperation, match=r"gradient of p0 has a graph .*autograd\.grad"):
        one.pow(2).sum().backward(create_graph=True)
    one.grad = None
    (gradient,) = torch.autograd.grad(one.pow(3).sum(), one, create_graph=True)
    gradient.sum().backward()
    assert torch.equal(one.grad.materialize(), 6 * one.detach())


def test_a_window_of_a_flat_buffer_is_refused(engine: Engine) -> None:
    """Plain PyTorch would accumulate into the buffer, and whoever reads the buffer expects that."""
    one, _, _ = pair(engine)
    flat = torch.zeros(2 * 77057)
    one.grad = flat[77057:].view(307, 251)
    with pytest.raises(
        UnsupportedGradientOperation,
        match=r"p0 was assigned .* window of 308228 bytes of .* 616456",
    ):
        produce(one, values(1))
    one.grad = None
    produce(one, values(1))
    produce(one, values(2))
    assert torch.equal(one.grad.materialize(), values(1) + values(2))


def test_windows_that_autograd_makes_leave_as_any_gradient(engine: Engine) -> None:
    a, b = nn.Parameter(values(0)), nn.Parameter(values(1))
    x, y = nn.Parameter(values(0)), nn.Parameter(values(1))
    sizes: list[int] = []
    x.register_post_accumulate_grad_hook(lambda p: sizes.append(p.grad.untyped_storage().nbytes()))
    store_for(engine, a, b)
    for _ in range(2):
        for left, right in ((a, b), (x, y)):
            torch.cat([left, right]).pow(3).sum().backward()
    assert sizes[0] == 2 * 308228  # the premise: one storage holds both gradients
    assert torch.equal(a.grad.materialize(), x.grad)
    assert torch.equal(b.grad.materialize(), y.grad)


def test_stale_handles(engine: Engine) -> None:
    one, _, _ = pair(engine)
    produce(one, values(1))
    old = one.grad
    one.grad = None
    assert torch.equal(old.materialize(), values(1))  # as an ordinary tensor would be
    produce(one, values(2))
    with pytest.raises(
        StaleGradientError, match=r"stood for gradient 1 of p0, which was replaced by gradient 2"
    ):
        old.materialize()
    with pytest.raises(StaleGradientError):
        old.mul_(2)
    assert "stale" in repr(old)
    produce(one, values(3))
    assert torch.equal(one.grad.materialize(), values(2) + values(3))


def test_one_asks_before_bytes_are_overwritten(engine: Engine) -> None:
    asked: list[str] = []
    one, _, _ = pair(engine, before_overwrite=asked.append)
    produce(one, values(1))
    produce(one, values(2))
    one.grad.mul_(2)
    one.grad.zero_()
    assert asked == ["u", "u"]


def test_memory_is_the_ring_and_close_gives_everything_back(engine: Engine) -> None:
    one, _, store = pair(engine)
    produce(one, values(1))
    assert store._ring.size_bytes == 3 * (32 << 10)
    assert engine.store(Tier.HOST).used_bytes == 311_296  # 77057 * 4 = 308228 bytes in 76 pages
    store.close()
    assert engine.store(Tier.HOST).used_bytes == 0
    assert one.grad is None
    produce(one, values(1))
    assert type(one.grad) is Tensor


def test_gradients_that_leave_need_a_ring(engine: Engine) -> None:
    with pytest.raises(
        PlanMismatchError, match="that of p0 leave the device, but the plan has 0 gradient slots"
    ):
        store_for(engine, nn.Parameter(values(0)), slots=0)


@pytest.mark.parametrize("failing", ["ring", "hooks"])
def test_a_store_that_cannot_be_made_leaves_nothing(monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    parameter = nn.Parameter(values(0))
    device = LateDevice()
    if failing == "ring":
        monkeypatch.setattr(device, "register", refuse)
    else:
        monkeypatch.setattr(parameter, "register_post_accumulate_grad_hook", refuse)
    with Engine({Tier.HOST: MemoryStore(Tier.HOST, 1 << 20)}, device) as engine:
        with pytest.raises(OffloadError, match="refused"):
            store_for(engine, parameter)
        assert engine.store(Tier.HOST).used_bytes == 0
        assert device.registered == {}
        assert not parameter._backward_hooks
        assert not parameter._post_accumulate_grad_hooks
        produce(parameter, values(1))
        assert type(parameter.grad) is Tensor


def refuse(*_: Any) -> Any:
    raise OffloadError("refused")
