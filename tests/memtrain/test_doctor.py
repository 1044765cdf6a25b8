from __future__ import annotations

from pathlib import Path

import pytest

from memtrain.cli.doctor import examine


def test_a_usable_swap_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = examine(tmp_path, measure=False)
    told = " ".join(capsys.readouterr().out.split())
    for word in ("torch", "NUMA nodes", "control group", "file system", "direct I/O", "locked memory limit"):
        assert word in told
    if code == 0:  # the tests' directory may lie on tmpfs
        assert "nothing stands in the way" in told
    else:
        assert "in the way: swap directory" in told


def test_a_missing_swap_directory_stands_in_the_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert examine(tmp_path / "none", measure=True) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "in the way: swap directory: swap directory" in told
    assert "does not exist: create it" in told
    assert "now, no nvme" in told
