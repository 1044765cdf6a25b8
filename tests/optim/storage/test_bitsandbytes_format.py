"""bitsandbytes' states read without it, against what bitsandbytes makes and reads itself."""

from __future__ import annotations

import pytest
import torch

from memtrain.optim.storage.bitsandbytes_format import moments_from_bitsandbytes


def test_worked_out_by_hand() -> None:
    book = torch.linspace(-1, 1, 256)
    codes = torch.zeros(2, 150, dtype=torch.uint8)
    codes[0, 0], codes[1, 149] = 255, 255
    entry = {"state1": codes, "absmax1": torch.tensor([2.0, 5.0]), "qmap1": book}
    first, second = moments_from_bitsandbytes(entry)
    assert second is None
    assert first.shape == (2, 150)
    assert first[0, :2].tolist() == [2.0, -2.0]
    assert first.view(-1)[[255, 256, 299]].tolist() == [-2.0, -5.0, 5.0]  # the second block begins at 256


def test_what_is_not_such_a_state_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not an entry of a bitsandbytes optimizer: it holds \['exp_avg'\]"):
        moments_from_bitsandbytes({"exp_avg": torch.zeros(3)})
    with pytest.raises(ValueError, match="state1: 512 codes without a scale for each 256"):
        moments_from_bitsandbytes(
            {
                "state1": torch.zeros(512, dtype=torch.uint8),
                "absmax1": torch.zeros(1),
                "qmap1": torch.zeros(256),
            }
        )


@pytest.mark.venv_optim
@pytest.mark.parametrize("numel", [100, 4096, 5000])
def test_reads_what_bitsandbytes_keeps(numel: int) -> None:
    import bitsandbytes

    parameter = torch.nn.Parameter(torch.randn(numel, generator=torch.Generator().manual_seed(0)))
    parameter.grad = torch.randn(numel, generator=torch.Generator().manual_seed(1))
    optimizer = bitsandbytes.optim.AdamW8bit([parameter], lr=1e-3)
    optimizer.step()
    entry = optimizer.state_dict()["state"][0]
    tensors = optimizer.state[parameter]
    assert (tensors["state1"].dtype == torch.uint8) == (numel >= 4096)
    first, second = moments_from_bitsandbytes(entry)
    assert second is not None
    # After one step: a tenth of the gradient and a thousandth of its square, to what 8 bits hold.
    assert (first - 0.1 * parameter.grad).norm() < 0.03 * first.norm()
    assert (second - 0.001 * parameter.grad**2).norm() < 0.03 * second.norm()
    if numel >= 4096:
        read = bitsandbytes.functional.dequantize_blockwise(
            tensors["state1"], absmax=tensors["absmax1"], code=tensors["qmap1"], blocksize=256
        )
        torch.testing.assert_close(first, read.float().view_as(first))
