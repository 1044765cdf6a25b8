"""Tests marked ``venv_optim`` need Triton or a peer, which are kept out of .venv (scripts/setup_optim.sh)."""

import importlib.util
import os

import pytest

HAS_VENV_OPTIM = all(importlib.util.find_spec(name) for name in ("triton", "galore_torch", "bitsandbytes"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip them in .venv; where the environment is promised to be there, let them fail."""
    if HAS_VENV_OPTIM or os.environ.get("MEMTRAIN_REQUIRE_VENV_OPTIM"):
        return
    skip = pytest.mark.skip(reason="needs .venv-optim (sh scripts/setup_optim.sh)")
    for item in items:
        if item.get_closest_marker("venv_optim"):
            item.add_marker(skip)
