"""All kinds: what the protocol promises."""

from itertools import pairwise, product

import pytest
import torch

from memtrain.optim.projection import COORDINATE, RANDOM, SPECTRAL, Projection, ProjectionError
from memtrain.optim.storage import RandomKey
from tests.optim.live_tensors import LiveTensors

KEY = RandomKey(seed=1, parameter=2, step=3)
CPU = torch.device("cpu")
SHAPES = [(12, 7), (7, 12), (3, 6, 10)]
MATRIX_KINDS = sorted(SPECTRAL | RANDOM)
CASES = [
    *(
        (dict(kind=kind, rank=3, side=side), shape)
        for kind, side, shape in product(MATRIX_KINDS, ("left", "right", "full"), SHAPES)
    ),
    *((dict(kind=kind, density=0.5), shape) for kind, shape in product(sorted(COORDINATE), SHAPES)),
]


def name_of(case):
    return "-".join(map(str, case.values())) if isinstance(case, dict) else "x".join(map(str, case))


def refreshed(projector, gradient, key=KEY):
    stored = projector.empty("cpu")
    projector.refresh_(stored, gradient, key=key)
    return stored, projector.open(stored, CPU)


@pytest.fixture
def gradient_of():
    def make(shape, seed=0):
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.mark.parametrize(("fields", "shape"), CASES, ids=name_of)
def test_shapes_bytes_and_orthogonality(fields, shape, gradient_of):
    projector = Projection(**fields).bind(torch.Size(shape))
    gradient = gradient_of(shape)
    stored, opened = refreshed(projector, gradient)
    low = projector.down(opened, gradient)
    back = projector.up(opened, low)
    assert low.shape == projector.low_shape
    assert back.shape == gradient.shape
    assert low.dtype == back.dtype == torch.float32
    assert sum(t.numel() * t.element_size() for t in stored.values()) == projector.size_bytes()
    if projector.orthonormal:
        # Idempotent, and the norm of what is projected is the norm of R.
        again = projector.down(opened, back)
        torch.testing.assert_close(again, low, atol=2e-5, rtol=0)
        torch.testing.assert_close(back.norm(), low.norm(), atol=1e-5, rtol=0)
        assert abs(float((back * (gradient - back)).sum())) < 2e-4
    if projector.low_axis is not None:
        axis = projector.low_axis
        untouched = [size for i, size in enumerate(low.shape) if i != low.dim() + axis]
        assert untouched == [size for i, size in enumerate(shape) if i != len(shape) + axis]


@pytest.mark.parametrize(
    ("side", "shape", "low"),
    [
        ("std", (12, 7), (12, 3)),
        ("std", (7, 12), (3, 12)),
        ("std", (8, 8), (8, 3)),  # galore-torch shortens columns where both sides are equal
        ("std", (2, 7, 12), (2, 3, 12)),
        ("reverse_std", (12, 7), (3, 7)),
        ("reverse_std", (7, 12), (7, 3)),
        ("reverse_std", (8, 8), (3, 8)),
    ],
)
def test_which_side_is_shortened(side, shape, low):
    assert Projection(kind="svd", rank=3, side=side).bind(torch.Size(shape)).low_shape == low


@pytest.mark.parametrize(("fields", "shape"), CASES, ids=name_of)
def test_a_refresh_follows_from_its_key(fields, shape, gradient_of):
    projector = Projection(**fields).bind(torch.Size(shape))
    gradient = gradient_of(shape)
    _, first = refreshed(projector, gradient)
    _, second = refreshed(projector, gradient)
    assert all(torch.equal(first[name], second[name]) for name in first)
    if not projector.needs_gradient and projector.kind != "block":
        # Few rows leave few choices, and two keys may make the same.
        keys = [RandomKey(seed=1, parameter=2, step=step) for step in range(4, 8)]
        others = [refreshed(projector, gradient, key)[1] for key in keys]
        assert any(not torch.equal(first[name], other[name]) for name in first for other in others)


@pytest.mark.parametrize(("fields", "shape"), CASES, ids=name_of)
def test_overlap_of_a_basis_with_itself_changes_nothing(fields, shape, gradient_of):
    projector = Projection(**fields).bind(torch.Size(shape))
    _, opened = refreshed(projector, gradient_of(shape))
    low = projector.down(opened, gradient_of(shape, 1))
    overlap = projector.overlap(opened, opened)
    torch.testing.assert_close(overlap.apply(low), low, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(overlap.apply_squared(low), low, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["svd", "semi_orthogonal", "columns", "rows", "randk", "block"])
def test_overlap_is_down_of_up(kind, gradient_of):
    """Low coordinates in the old basis, lifted and seen from the new basis, for any low gradient."""
    size = {"density": 0.6} if kind in COORDINATE else {"rank": 4}
    projector = Projection(kind=kind, **size).bind(torch.Size((9, 6)))
    stored, old = refreshed(projector, gradient_of((9, 6)))
    old = {name: tensor.clone() for name, tensor in old.items()}
    projector.refresh_(stored, gradient_of((9, 6), 1), key=RandomKey(seed=1, parameter=2, step=9))
    new = projector.open(stored, CPU)
    low = projector.down(old, gradient_of((9, 6), 2))
    expected = projector.down(new, projector.up(old, low))
    torch.testing.assert_close(projector.overlap(old, new).apply(low), expected, atol=1e-5, rtol=1e-5)


def test_gaussian_overlap_is_least_squares(gradient_of):
    """From Gaussian coordinates of a gradient within the old span, the new ones are found exactly."""
    projector = Projection(kind="gaussian", rank=4, side="left").bind(torch.Size((20, 6)))
    _, old = refreshed(projector, None)
    _, new = refreshed(projector, None, RandomKey(seed=5, parameter=0, step=0))
    gradient = old["left"] @ gradient_of((4, 6))
    moved = projector.overlap(old, new).apply(projector.down(old, gradient))
    torch.testing.assert_close(moved, projector.down(new, gradient), atol=1e-4, rtol=1e-4)


def test_overlap_of_dependent_random_vectors():
    """Two equal columns: what they say of a gradient within their span is still found exactly."""
    projector = Projection(kind="rademacher", rank=2, side="left").bind(torch.Size((2, 3)))
    old = {"left": torch.tensor([[1.0, 1.0], [-1.0, -1.0]])}
    new = {"left": torch.tensor([[1.0, 1.0], [1.0, -1.0]])}
    gradient = torch.tensor([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]])
    moved = projector.overlap(old, new).apply(projector.down(old, gradient))
    torch.testing.assert_close(moved, projector.down(new, gradient))


@pytest.mark.parametrize("kind", ["svd", "eigh"])
@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("side", ["left", "right", "full"])
def test_exact_spectral_bases_keep_the_leading_singular_values(kind, side, shape, gradient_of):
    gradient = gradient_of(shape)
    projector = Projection(kind=kind, rank=3, side=side).bind(torch.Size(shape))
    _, opened = refreshed(projector, gradient)
    kept = torch.linalg.svdvals(projector.down(opened, gradient))[..., :3]
    torch.testing.assert_close(kept, torch.linalg.svdvals(gradient)[..., :3], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("basis_dtype", "least"), [("fp32", 1e-5), ("bf16", 1e-3)])
def test_power_iteration_follows_a_fixed_gradient_to_its_singular_space(basis_dtype, least):
    u, _ = torch.linalg.qr(torch.randn(30, 30, generator=torch.Generator().manual_seed(0)))
    gradient = u @ torch.diag(0.7 ** torch.arange(30.0)) @ u[:20].mT[:, :20] @ torch.eye(20)
    projector = Projection(kind="power", rank=4, basis_dtype=basis_dtype).bind(gradient.shape)
    stored = projector.empty("cpu")
    best = torch.linalg.svdvals(gradient)[:4].square().sum()
    missing = []
    for step in range(6):
        projector.refresh_(stored, gradient, key=RandomKey(seed=0, parameter=0, step=step))
        low = stored["right"].float().mT @ gradient.mT  # without the rounding of a product in bf16
        missing.append(float(1 - low.square().sum() / best))
    assert missing[0] < 1e-2  # the cold start: a sketch and two iterations
    assert abs(missing[-1]) < least  # a rounded basis is not quite orthonormal
    assert all(
        later <= earlier + least / (10 if basis_dtype == "fp32" else 1)
        for earlier, later in pairwise(missing)
    )


@pytest.mark.parametrize("kind", sorted(SPECTRAL))
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-18, 1e12, 1e25])
def test_spectral_bases_are_orthonormal_for_any_scale_and_rank(kind, scale):
    """A gradient of rank one, of zeros, or so small that its square underflows."""
    gradient = scale * torch.outer(torch.arange(1.0, 11.0), torch.arange(1.0, 8.0))
    projector = Projection(kind=kind, rank=3).bind(gradient.shape)
    _, opened = refreshed(projector, gradient)
    basis = opened["right"]
    torch.testing.assert_close(basis.mT @ basis, torch.eye(3), atol=1e-5, rtol=0)
    if scale:
        kept = projector.up(opened, projector.down(opened, gradient))
        torch.testing.assert_close(kept, gradient, atol=0, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
@pytest.mark.parametrize("side", ["left", "right", "full"])
def test_random_projections_are_unbiased(kind, side, gradient_of):
    """The mean of 1,000 ways down and up is the gradient within four standard errors."""
    gradient = gradient_of((6, 5))
    projector = Projection(kind=kind, rank=3, side=side).bind(gradient.shape)
    draws = []
    for step in range(1000):
        _, opened = refreshed(projector, None, RandomKey(seed=7, parameter=0, step=step))
        draws.append(projector.up(opened, projector.down(opened, gradient)))
    stacked = torch.stack(draws)
    error = (stacked.mean(0) - gradient).abs()
    assert bool((error < 4.5 * stacked.std(0) / 1000**0.5).all())


def test_seeded_bases_store_a_key_and_have_the_stated_entries():
    shape = torch.Size((64, 200))
    rademacher = Projection(kind="rademacher", rank=16).bind(shape)
    stored, opened = refreshed(rademacher, None)
    assert rademacher.size_bytes() == 24
    assert stored["seed"].tolist() == [1, 2, 3]
    assert set(opened["left"].unique().tolist()) == {-0.25, 0.25}
    gaussian = Projection(kind="gaussian", rank=16).bind(shape)
    entries = refreshed(gaussian, None)[1]["left"]
    assert abs(float(entries.std()) - 0.25) < 0.02
    assert abs(float(entries.mean())) < 0.03


def test_columns_rows_and_block_select_what_they_say(gradient_of):
    gradient = gradient_of((10, 6))
    columns = Projection(kind="columns", density=0.5).bind(gradient.shape)
    _, opened = refreshed(columns, None)
    assert len(set(opened["index"].tolist())) == 3
    assert torch.equal(columns.down(opened, gradient), gradient[:, opened["index"]])
    block = Projection(kind="block", rank=4).bind(gradient.shape)
    stored = block.empty("cpu")
    starts = []
    for _ in range(5):
        block.refresh_(stored, None, key=KEY)
        starts.append(int(stored["start"]))
    # Ten rows in blocks of four: the third overlaps the second.
    assert starts == [0, 4, 6, 0, 4]


def test_rank_beyond_the_matrix_is_refused_with_the_limit():
    with pytest.raises(ProjectionError, match=r"rank 8 exceeds 7.*\(12, 7\).*give rank <= 7"):
        Projection(kind="svd", rank=8).bind(torch.Size((12, 7)))
    # Random vectors of the longer side there are twelve of, singular vectors seven.
    assert Projection(kind="semi_orthogonal", rank=8, side="left").bind(torch.Size((12, 7))).low_shape == (
        8,
        7,
    )
    with pytest.raises(ProjectionError, match="rank 8 exceeds 7"):
        Projection(kind="power", rank=8, side="left").bind(torch.Size((12, 7)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(kind="magic", rank=1), "projection 'magic' is unknown"),
        (dict(rank=1, side="up"), "side 'up' is unknown"),
        (dict(rank=1, basis_dtype="fp8"), "basis_dtype 'fp8' is unknown"),
        (dict(), "either rank or density"),
        (dict(rank=1, density=0.5), "either rank or density"),
        (dict(rank=0), "rank must be at least 1, got 0"),
        (dict(density=1.5), r"density must be in \(0, 1\], got 1.5"),
        (dict(kind="columns", rank=2, side="left"), "chooses its side itself"),
        (dict(kind="rows", rank=2, basis_dtype="bf16"), "no basis to hold"),
        (dict(kind="randk", rank=2), "takes density and no rank"),
    ],
)
def test_fields_that_cannot_be_honoured(fields, message):
    with pytest.raises(ProjectionError, match=message):
        Projection(**fields)


def test_shapes_without_matrices_are_refused():
    with pytest.raises(ProjectionError, match=r"got shape \(3, 3, 3, 3\)"):
        Projection(rank=1).bind(torch.Size((3, 3, 3, 3)))


def test_bf16_basis_halves_the_bytes_and_stays_near_orthonormal(gradient_of):
    gradient = gradient_of((40, 30))
    full = Projection(kind="svd", rank=8).bind(gradient.shape)
    half = Projection(kind="svd", rank=8, basis_dtype="bf16").bind(gradient.shape)
    assert (full.size_bytes(), half.size_bytes()) == (30 * 8 * 4, 30 * 8 * 2)
    _, opened = refreshed(half, gradient)
    basis = opened["right"].float()
    assert float((basis.mT @ basis - torch.eye(8)).abs().max()) < 4e-3
    exact = full.down(refreshed(full, gradient)[1], gradient)
    error = (half.down(opened, gradient) - exact).norm() / exact.norm()
    assert error < 8e-3


BF16_CASES = [
    ({**fields, "basis_dtype": "bf16"}, shape)
    for fields, shape in CASES
    if fields["kind"] not in COORDINATE and len(shape) == 2
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("fields", "shape"), CASES + BF16_CASES, ids=name_of)
def test_refresh_workspace_is_the_peak_of_live_tensors(fields, shape, dtype, gradient_of):
    projector = Projection(**fields).bind(torch.Size(shape))
    gradient = gradient_of(shape).to(dtype)
    stored = projector.empty("cpu")
    for first in (True, False):
        with LiveTensors(gradient, *stored.values()) as live:
            projector.refresh_(stored, gradient, key=KEY)
        assert live.peak_bytes == projector.refresh_workspace(dtype, first=first).tensor_bytes


def test_refresh_workspace_by_hand():
    """40 x 24, rank 5: the basis is of the 24 columns; G times it is 40 x 5, G^T times that 24 x 5."""

    def workspace(kind, dtype=torch.float32, basis_dtype="fp32", **first):
        projector = Projection(kind=kind, rank=5, basis_dtype=basis_dtype).bind(torch.Size((40, 24)))
        return projector.refresh_workspace(dtype, **first).tensor_bytes

    orthogonalising = 2 * 24 * 5 + 4 * 5 * 5 + 5 + 2
    assert workspace("power") == 4 * orthogonalising
    assert workspace("power", torch.bfloat16) == 4 * (orthogonalising + 40 * 24)
    # Products in bf16: the gradient once in bf16 where it is not.
    assert workspace("power", torch.bfloat16, "bf16") == 4 * orthogonalising
    assert workspace("power", torch.float32, "bf16") == 4 * orthogonalising + 2 * 40 * 24
    assert workspace("svd") == 4 * 24 * (40 + 24 + 1)
    assert workspace("eigh") == 4 * (2 * 24 * 24 + 24)
    assert workspace("columns") == workspace("gaussian") == 24
    # LAPACK: a copy, one more of a tall matrix, 4 k^2 + 7 k.
    svd = Projection(kind="svd", rank=5).bind(torch.Size((40, 24))).refresh_workspace(torch.float32)
    assert svd.library_bytes == 4 * (2 * 40 * 24 + 4 * 24 * 24 + 7 * 24)
    assert svd.bytes == svd.tensor_bytes + svd.library_bytes
