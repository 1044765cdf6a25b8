"""The harness, and every kernel compiled for every target."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from memtrain.optim.kernels.aot import KernelSpec, KernelVariant, all_specs
from memtrain.optim.kernels.lazy import MissingTritonError, require_triton, triton_kernel

ROOT = Path(__file__).resolve().parents[3]


@triton_kernel
def _copy_kernel(x_ptr, y_ptr, count, BLOCK: tl.constexpr):  # noqa: F821
    pass


def variant(**changes: object) -> KernelVariant:
    settings = {
        "label": "fp32",
        "signature": {"x_ptr": "*fp32", "y_ptr": "*fp32", "count": "i32"},
        "constexprs": {"BLOCK": 128},
        "moved_bytes": 8.0,
        "least_bytes": 8.0,
    }
    return KernelVariant(**{**settings, **changes})  # type: ignore[arg-type]


def test_a_spec_is_checked_against_the_functions_arguments_without_triton() -> None:
    spec = KernelSpec(kernel=_copy_kernel, element="element", variants=[variant()])
    assert spec.name == "copy"
    with pytest.raises(ValueError, match=r"missing \['count'\], unknown \['n'\]"):
        KernelSpec(
            kernel=_copy_kernel,
            element="element",
            variants=[variant(signature={"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32"})],
        )


def test_a_variant_moves_at_least_the_least() -> None:
    assert variant(moved_bytes=10.0).bytes_ratio == 1.25
    with pytest.raises(ValueError, match=r"moved_bytes must be >= least_bytes > 0, got 7\.0 and 8\.0"):
        variant(moved_bytes=7.0)
    with pytest.raises(ValueError, match="power of two"):
        variant(num_warps=3)


def test_without_triton_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(MissingTritonError, match=r"memtrain\[kernels\]"):
        require_triton()


def test_importing_every_kernel_imports_no_triton() -> None:
    code = (
        "import sys; from memtrain.optim.kernels.aot import all_specs; assert all_specs(); "
        "sys.exit('triton' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_names_of_kernels_are_unique() -> None:
    names = [spec.name for spec in all_specs()]
    assert len(names) == len(set(names))
    for spec in all_specs():
        assert len({variant.label for variant in spec.variants}) == len(spec.variants) > 0


@pytest.mark.venv_optim
def test_every_kernel_compiles_without_spills_and_moves_what_it_must() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/kernels.py"), "--first"],
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    summary = json.loads(run.stdout.splitlines()[-1])
    assert summary["kernels"] == len(all_specs())
    assert summary["spills"] == 0, run.stdout
    assert summary["worst_bytes_ratio"] <= 1.05, run.stdout
