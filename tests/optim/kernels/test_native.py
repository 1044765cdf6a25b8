"""Compiling on this machine: once, kept, and with a warning and the same result where it fails."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from memtrain.optim.kernels import adamw, adamw8bit, native, sign, split_adamw
from memtrain.optim.kernels.pointwise import AdamStep
from memtrain.optim.kernels.sign import LionStep, PlainStep
from tests.optim.kernels.pointwise_cases import Case, assert_same

STEP = AdamStep(lr=1e-2, step=5)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache on disk and in the process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._library.cache_clear()
    yield tmp_path / "memtrain" / "kernels"
    native._library.cache_clear()


def fast_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the time; for tests of how libraries are kept."""
    monkeypatch.setattr(native, "_FLAGS", [*native._FLAGS, "-O0"])


def test_a_kernel_is_compiled_once_and_kept(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast_compiler(monkeypatch)
    assert native.function("sign", "plain") is not None
    kept = list(fresh.iterdir())
    assert [path.suffix for path in kept] == [".so"]
    assert fresh.stat().st_mode & 0o777 == 0o700
    native._library.cache_clear()
    compile_again = subprocess.run

    def only_versions(command: list[str], **options: object) -> object:
        assert command[1:] == ["--version"], "compiled a second time"
        return compile_again(command, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(subprocess, "run", only_versions)
    assert native.function("sign", "plain") is not None
    assert list(fresh.iterdir()) == kept


def test_all_can_be_compiled_beforehand(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast_compiler(monkeypatch)
    names = [path.name.partition("-")[0] for path in native.compile_all()]
    assert names == sorted(path.stem for path in native._SOURCES.glob("*.cpp"))
    assert {"adamw", "adamw8bit", "sign", "split_adamw"} <= set(names)
    assert len(list(fresh.iterdir())) == len(names)


@pytest.mark.parametrize("kept", [b"", b"not a library"])
def test_half_a_library_in_the_cache_is_compiled_again(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, kept: bytes
) -> None:
    fast_compiler(monkeypatch)
    path = native._compiled("sign")
    path.write_bytes(kept)
    assert native.function("sign", "plain") is not None
    assert path.stat().st_size > 1000


def test_of_two_that_compile_at_once_one_waits(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads stand in for processes: a lock belongs to the opened directory, and each opens its own."""
    fast_compiler(monkeypatch)
    run, compiling, both = native._run, list[str](), threading.Barrier(2)

    def counted(command: list[str], *, timeout: float) -> str:
        if "-o" in command:
            compiling.append(command[-1])
        elif not both.broken:
            both.wait(30)  # neither looks for the library before the other has begun
        return run(command, timeout=timeout)

    monkeypatch.setattr(native, "_run", counted)
    with ThreadPoolExecutor(2) as threads:
        made = set(threads.map(native._compiled, ["sign", "sign"]))
    assert len(made) == len(compiling) == 1
    assert list(fresh.iterdir()) == list(made)


def test_where_directories_cannot_be_locked_compilers_do_not_disturb_one_another(
    fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in its own directory, and the last to finish replaces the others' whole library."""
    fast_compiler(monkeypatch)
    monkeypatch.setattr(native.fcntl, "flock", _no_locks)
    run, others = native._run, []

    def while_another_compiles(command: list[str], *, timeout: float) -> str:
        if "-o" in command and not others:
            others.append(None)
            others.append(native._compiled("sign"))
        return run(command, timeout=timeout)

    monkeypatch.setattr(native, "_run", while_another_compiles)
    assert native._compiled("sign") == others[1]
    assert [path.name for path in fresh.iterdir()] == [others[1].name]
    assert native.function("sign", "plain") is not None


def _no_locks(descriptor: int, operation: int) -> None:
    raise OSError(errno.ENOLCK, "no locks available")


def test_what_is_missing_is_compiled_and_said(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fast_compiler(monkeypatch)
    names = [path.stem for path in sorted(native._SOURCES.glob("*.cpp"))]
    native._compiled("sign")
    assert native.compile_missing() == [name for name in names if name != "sign"]
    said = capsys.readouterr().err
    assert "compiling CPU kernels (adamw, adamw8bit, " in said
    assert "sign," not in said
    assert native.compile_missing() == []
    assert capsys.readouterr().err == ""


def test_what_cannot_be_compiled_is_told_when_it_is_called(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert native.compile_missing() == []
    assert native.main() == 1
    assert "install g++ or set CXX. no C++ compiler: looked for $CXX" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_a_cache_that_cannot_be_written_names_the_remedy(fresh: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.warns(native.NativeKernelWarning, match="set XDG_CACHE_HOME to a folder"):
            assert native.function("sign", "plain") is None
    finally:
        tmp_path.chmod(0o700)


def test_the_remedy_for_a_read_only_cache_is_another_place() -> None:
    assert "set XDG_CACHE_HOME" in native.remedy(OSError(errno.EROFS, "read-only file system", "/cache"))
    assert "install g++" in native.remedy(FileNotFoundError("no C++ compiler"))


@pytest.mark.parametrize("failure", ["no home", "no directory"])
def test_without_a_cache_everything_runs_as_plain_torch(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, failure: str, tmp_path: Path
) -> None:
    """Containers run under numbers that no user has; a cache directory may be a file, or read-only."""
    if failure == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(native.os.path, "expanduser", lambda path: path)
    else:
        (tmp_path / "memtrain").write_text("")
    weight = torch.ones(5)
    with pytest.warns(native.NativeKernelWarning, match="compiled or loaded"):
        sign.plain_(weight, torch.ones(5), PlainStep(lr=0.5))
    assert weight.tolist() == [0.5] * 5


def test_flags_and_sources_are_part_of_the_name(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(name: str) -> str:
        return native._digest(native._SOURCES / f"{name}.cpp", native._flags(name), "g++")

    before = digest("sign")
    assert digest("adamw") != before
    monkeypatch.setattr(native, "_FLAGS", [*native._FLAGS, "-DOTHER"])
    assert digest("sign") != before


@pytest.mark.parametrize("failure", ["none", "broken"])
def test_without_a_compiler_everything_runs_as_plain_torch(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, failure: str, tmp_path: Path
) -> None:
    if failure == "none":
        monkeypatch.setattr(native.shutil, "which", lambda name: None)
        message = "no C[+][+] compiler"
    else:
        compiler = tmp_path / "broken"
        compiler.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo "cannot do that" >&2; exit 1; }\n')
        compiler.chmod(0o700)
        monkeypatch.setenv("CXX", str(compiler))
        message = "cannot do that"
    expected = {}
    for state in ("fp32", "int8"):
        case = Case((5, 123), torch.bfloat16, "split24", torch.bfloat16, state)
        adamw.reference(case.operands(), case.first, case.second, STEP, state)
        expected[state] = case
    case = Case((5, 123), torch.bfloat16, "split24", torch.bfloat16, "fp32")
    with pytest.warns(native.NativeKernelWarning, match=message):
        adamw.adamw_(
            case.weight, case.gradient, case.first, case.second, STEP, master=case.master, keys=case.keys
        )
    assert_same(case, expected["fp32"])
    case = Case((5, 123), torch.bfloat16, "split24", torch.bfloat16, "int8")
    with pytest.warns(native.NativeKernelWarning, match="adamw8bit"):
        adamw8bit.adamw8bit_(
            case.weight, case.gradient, case.first, case.second, STEP, master=case.master, keys=case.keys
        )
    assert_same(case, expected["int8"])
    plain = Case((5, 123), torch.float32, "none", torch.float32, "fp32")
    start = plain.weight.clone()
    with pytest.warns(native.NativeKernelWarning, match="sign"):
        sign.plain_(plain.weight, plain.gradient, PlainStep(lr=0.5))
    # Said once: from here on warnings would be errors.
    sign.plain_(plain.weight, plain.gradient, PlainStep(lr=0.5, rule="sgd"))
    after = start - 0.5 * plain.gradient.sign() - 0.5 * plain.gradient
    torch.testing.assert_close(plain.weight, after)
    sign.lion_(plain.weight, plain.gradient, plain.first, LionStep(lr=0.5))
    with pytest.warns(native.NativeKernelWarning, match="split_adamw"):
        split_adamw.split_adamw_(
            plain.weight,
            plain.gradient,
            {"value": torch.zeros(5, 2)},
            {"value": torch.zeros(5, 2)},
            torch.tensor([7, 3]),
            "columns",
            STEP,
            PlainStep(lr=0.5),
        )
    native._library.cache_clear()
    assert not fresh.exists() or not list(fresh.glob("*.so"))


def test_addresses_are_given_of_what_c_has_alone():
    """Another dtype, as torch's default may be, would be read or written beyond its end."""
    with pytest.raises(TypeError, match="float64"):
        native.pointer(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(TypeError, match="float16"):
        native.gradient(torch.zeros(3, dtype=torch.float16))
    with pytest.raises(TypeError, match="int32"):
        native.pointer(torch.zeros(3, dtype=torch.int32), torch.int64)
    with pytest.raises(TypeError):
        native.values(torch.zeros(3, 3).T[:2])
