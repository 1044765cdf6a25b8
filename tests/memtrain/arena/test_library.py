"""Compiling the allocator: beforehand, and for another torch."""

from pathlib import Path

import pytest
import torch

from memtrain.arena import __main__ as command
from memtrain.arena import library


def test_it_is_compiled_beforehand(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main() == 0
    assert Path(capsys.readouterr().out.strip()).is_file()


def test_the_command_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise FileNotFoundError("no C++ compiler")

    monkeypatch.setattr(library, "load", fail)
    assert command.main() == 1
    assert "install g++ or set CXX" in capsys.readouterr().err


def test_another_torch_gets_a_library_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    before = library._flags()
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert library._flags() != before


def test_installed_again_it_stays() -> None:
    assert library.load().memtrain_arena_install() == 0
