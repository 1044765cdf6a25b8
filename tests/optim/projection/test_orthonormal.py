"""CholeskyQR2 beside Householder's QR, and columns on which Cholesky fails."""

import pytest
import torch

from memtrain.optim.projection.orthonormal import orthonormal, orthonormal_elements
from tests.optim.live_tensors import LiveTensors


def columns_of(condition, d=300, r=20, seed=0):
    """Singular values from one down to 1/condition, no column of which is special."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(d, r, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(0, -torch.tensor(float(condition)).log10().item(), r, dtype=torch.float64)
    return (u * values) @ v


@pytest.fixture
def decompositions(monkeypatch):
    """How often Householder's QR was needed."""
    calls = []
    real = torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda matrix: calls.append(1) or real(matrix))
    return calls


@pytest.mark.parametrize(("condition", "householder"), [(1, 0), (30, 0), (1e5, 1), (1e12, 1)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_orthonormal_for_any_condition_and_scale(condition, householder, scale, decompositions):
    columns = columns_of(condition)
    decompositions.clear()
    q = orthonormal((scale * columns).float())
    assert len(decompositions) == householder
    torch.testing.assert_close(q.T @ q, torch.eye(20), rtol=0, atol=2e-6)
    # What Q spans: the columns, to rounding times the condition at most.
    kept = q.double() @ (q.double().T @ columns)
    assert float((kept - columns).norm()) < 1e-5


def test_lengths_of_columns_are_no_condition(decompositions):
    """A warm power iteration: nearly orthogonal, lengths the squares of singular values."""
    generator = torch.Generator().manual_seed(1)
    columns = torch.linalg.qr(torch.randn(300, 20, generator=generator)).Q
    columns += 1e-3 * torch.randn(300, 20, generator=generator)
    decompositions.clear()
    q = orthonormal(columns * torch.logspace(0, -12, 20))
    assert not decompositions
    torch.testing.assert_close(q.T @ q, torch.eye(20), rtol=0, atol=2e-6)


def test_it_is_the_q_of_qr():
    """Up to the signs of columns: leading columns span what leading columns spanned."""
    columns = columns_of(20).float()
    theirs = torch.linalg.qr(columns.clone()).Q
    ours = orthonormal(columns)
    torch.testing.assert_close((ours.T @ theirs).abs(), torch.eye(20), rtol=0, atol=2e-5)


@pytest.mark.parametrize("columns", [torch.zeros(9, 3), torch.ones(9, 3), torch.eye(9)[:, [0, 0, 1]]])
def test_dependent_columns(columns, decompositions):
    q = orthonormal(columns.clone())
    assert decompositions
    torch.testing.assert_close(q.T @ q, torch.eye(3), rtol=0, atol=1e-6)


def test_one_bad_matrix_of_a_stack_sends_all_to_householder(decompositions):
    good, bad = columns_of(10, 40, 6).float(), torch.ones(40, 6)
    q = orthonormal(torch.stack((good, bad)))
    assert torch.isfinite(q).all()
    torch.testing.assert_close(q.mT @ q, torch.eye(6).expand(2, 6, 6), rtol=0, atol=2e-6)


@pytest.mark.parametrize("condition", [1, 1e12])
def test_peak_of_live_tensors(condition):
    """Equal where Cholesky serves, an upper bound where it does not."""
    columns = columns_of(condition, 100, 7).float()
    with LiveTensors() as live:
        orthonormal(columns * 1)
    bound = 4 * orthonormal_elements(100, 7)
    assert live.peak_bytes == bound if condition == 1 else live.peak_bytes <= bound
