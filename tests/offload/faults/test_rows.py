"""The table of faults is complete, and names tests that exist."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.offload.faults.rows import NOTICED, TESTS, faults

HERE = Path(__file__).parents[1]


def test_every_row_has_tests_and_every_test_of_a_row_is_there() -> None:
    assert list(faults()) == list(TESTS) == list(range(1, 25))
    assert faults()[4] == ("a read fails", "repeated; then an error that names the tensor")
    assert set(TESTS) > NOTICED
    defined: dict[str, set[str]] = {}
    for name in {test for tests in TESTS.values() for test in tests}:
        file, _, function = name.partition("::")
        if file not in defined:
            tree = ast.parse((HERE / file).read_text())
            defined[file] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert function in defined[file], name


def test_every_test_here_is_of_a_row() -> None:
    listed = {test for tests in TESTS.values() for test in tests}
    of_all_rows = {"test_schedules.py", "test_rows.py", "test_optimized_python.py"}
    for path in sorted((HERE / "faults").glob("test_*.py")):
        for node in ast.parse(path.read_text()).body if path.name not in of_all_rows else ():
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                known = f"faults/{path.name}::{node.name}" in listed
                assert known or node.name == "test_a_session_leaves_no_descriptor_and_no_thread", node.name
