"""Products whose operands are made or gathered as they are loaded: random signs, sampled rows."""

from __future__ import annotations

import pytest
import torch

from memtrain.optim.kernels import rademacher, wta_gradient
from memtrain.optim.storage import RandomKey
from tests.optim.kernels.compare import close
from tests.optim.kernels.traffic import count_traffic

KEY = RandomKey(seed=1, parameter=2, step=3)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PATHS = ["public", pytest.param("triton", marks=pytest.mark.venv_optim)]


@pytest.fixture(autouse=True)
def _products(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("venv_optim"):
        request.getfixturevalue("bf16_products")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "rank"), [((5, 23, 123), 64), ((1, 7), 32), ((70, 40), 96), ((0, 8), 32)])
def test_signs_are_the_projectors(path: str, dtype: torch.dtype, shape: tuple[int, ...], rank: int) -> None:
    # Small whole numbers: every partial sum is exact, and rounding happens once.
    x = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    run = rademacher._triton_project if path == "triton" else rademacher.rademacher_project
    z = run(x, KEY, rank)
    close(z, rademacher.reference(x, KEY, rank).to(dtype), rounds=1)


@pytest.mark.parametrize("rank", [1, 5, 33])
def test_any_rank_on_a_cpu(rank: int) -> None:
    x = torch.arange(6.0).view(2, 3)
    assert torch.equal(rademacher.rademacher_project(x, KEY, rank), rademacher.reference(x, KEY, rank))


@pytest.mark.venv_optim
def test_a_keys_offset_moves_the_signs() -> None:
    x = torch.eye(4, 64).bfloat16()
    z = rademacher._triton_project(x, KEY.skip(5), 32)
    assert torch.equal(z.float(), rademacher.reference(x, KEY.skip(5), 32))
    assert not torch.equal(z.float(), rademacher.reference(x, KEY, 32))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "count", "outputs", "inputs"),
    [(123, 37, 57, 123), (5, 1, 1, 1), (40, 64, 130, 20), (9, 0, 3, 4)],
)
def test_gradient_of_sampled_rows(
    path: str, dtype: torch.dtype, tokens: int, count: int, outputs: int, inputs: int
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    dy = torch.randn(tokens, outputs, generator=generator).to(dtype)
    kept = torch.randn(count, inputs, generator=generator).to(dtype)
    rows = torch.randint(0, tokens, (count,), generator=generator)
    # Powers of two keep bf16 exact where Triton's interpreter cuts it.
    factors = 2.0 ** torch.randint(-2, 3, (count,), generator=generator).float()
    run = wta_gradient._triton_gradient if path == "triton" else wta_gradient.wta_weight_gradient
    gradient = run(dy, kept, rows, factors)
    close(gradient, wta_gradient.reference(dy, kept, rows, factors), rounds=16)


@pytest.mark.venv_optim
def test_traffic_is_what_the_specs_say() -> None:
    x = torch.ones(8, 4096).bfloat16()
    moved = {variant.label: variant.moved_bytes for variant in rademacher.SPECS[0].variants}
    with count_traffic() as traffic:
        rademacher._triton_project(x, KEY, 256)
    assert traffic.moved_bytes() == moved["bf16 rank 256 of 4096"] * x.numel()
    dy, kept = torch.ones(9, 300).bfloat16(), torch.ones(5, 200).bfloat16()
    rows, factors = torch.tensor([8, 1, 0, 4, 5]), torch.ones(5)
    with count_traffic(dy=dy, kept=kept, rows=rows, factors=factors) as traffic:
        wta_gradient._triton_gradient(dy, kept, rows, factors)
    moved_bytes = traffic.moved_bytes(cached=["dy", "kept", "rows", "factors"])
    assert moved_bytes == wta_gradient._moved_bytes(5, 300, 200, 2) * kept.numel()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        rademacher.rademacher_project(torch.ones(2, 3), KEY, 0)
    dy, kept, rows, factors = torch.ones(3, 4), torch.ones(2, 5), torch.tensor([0, 2]), torch.ones(2)
    with pytest.raises(ValueError, match=r"got \(3, 4\), \(2, 5\), \(2,\), \(1,\)"):
        wta_gradient.wta_weight_gradient(dy, kept, rows, factors[:1])
    with pytest.raises(ValueError, match=r"rows int64 and factors fp32, got torch\.float32, torch\.int32"):
        wta_gradient.wta_weight_gradient(dy, kept, rows.int(), factors)
