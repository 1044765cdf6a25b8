"""A run that is saved around a refresh and goes on in a new process is the run that was not interrupted."""

import subprocess
import sys

import pytest
import torch

from tests.optim.resume_cases import CASES, MORE, STOPS, dtypes_of, run, weights


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Directory with, per case, dtype and stop, the state saved, the weights expected and those resumed."""
    directory = tmp_path_factory.mktemp("resume")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as the new process has: sums depend on it
    for case in CASES:
        for dtype in dtypes_of(case):
            for stop in STOPS:
                params = weights(dtype)
                optimizer = CASES[case](params)
                run(optimizer, params, 0, stop)
                path = directory / f"{case}-{str(dtype)[6:]}-{stop}"
                saved = {
                    "case": case,
                    "step": stop,
                    "weights": [parameter.detach() for parameter in params],
                    "optimizer": optimizer.state_dict(),
                }
                torch.save(saved, path.with_suffix(".saved"))
                run(optimizer, params, stop, MORE)
                torch.save([parameter.detach() for parameter in params], path.with_suffix(".expected"))
    torch.set_num_threads(threads)
    subprocess.run([sys.executable, "-m", "tests.optim.resume_cases", str(directory)], check=True)
    return directory


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize(
    ("case", "dtype"), [(case, dtype) for case in CASES for dtype in dtypes_of(case)], ids=str
)
def test_twenty_more_steps_are_bitwise_the_same(resumed, case, dtype, stop):
    path = resumed / f"{case}-{str(dtype)[6:]}-{stop}"
    expected = torch.load(path.with_suffix(".expected"), weights_only=True)
    found = torch.load(path.with_suffix(".resumed"), weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_bf16_weights_keep_fp32_states(resumed):
    saved = torch.load(resumed / "galore-bfloat16-6.saved", weights_only=True)
    state = saved["optimizer"]["state"][0]
    assert saved["weights"][0].dtype == torch.bfloat16
    assert {tensor.dtype for tensor in state.values()} == {torch.float32, torch.int64}
