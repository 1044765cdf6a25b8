"""Placement on nodes that are there: guest_checks.py inside two virtual machines (qemu_guest.py).

Each check of the guest is a test here. The first also boots its machine: some 15 s of processor time for the
one, 90 for the other, of which torch's import is half.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from memtrain.planner.actions import Action, Tier
from tests.offload import guest_checks, qemu_guest
from tests.offload.guest_training import plan_for_the_guest
from tests.offload.qemu_guest import Outcome, kernels, run_in_guest

pytestmark = pytest.mark.qemu

PROGRAM = Path(guest_checks.__file__)
TIMEOUT_SECONDS = 900.0
"""Ten times what it takes on an idle machine: the guest is tested, not this machine."""


def require() -> None:
    reason = qemu_guest.missing()
    if not reason:
        return
    if os.environ.get("CI") == "true" and os.geteuid() == 0 and shutil.which("apt-get"):
        pytest.fail(f"{reason} (in CI, as root and with apt, these tests are not skipped)")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    require()
    return run_in_guest(
        kernels()[0],
        PROGRAM,
        "plain",
        tmp_path_factory.mktemp("plain"),
        cxl=False,
        timeout_seconds=TIMEOUT_SECONDS,
    )


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    require()
    folder = tmp_path_factory.mktemp("full")
    plan = plan_for_the_guest()
    # The planner's part of it: what is only moved goes, what the optimizer computes on stays.
    assert plan.status in ("optimal", "gap")
    assert {(block.action, block.saved_tier) for block in plan.blocks} == {(Action.SWAP, Tier.CXL)}
    assert {(s.gradient_tier, s.optimizer_tier) for s in plan.states} == {(Tier.DEVICE, Tier.DEVICE)}
    (folder / "plan.json").write_text(plan.to_json())
    return run_in_guest(
        kernels()[-1],
        PROGRAM,
        f"full {folder / 'plan.json'}",
        folder,
        cxl=True,
        timeout_seconds=TIMEOUT_SECONDS,
    )


def passed(outcome: Outcome, check: str) -> None:
    assert check in outcome.results, f"the guest did not come to it: {outcome.describe()}"
    assert not outcome.results[check], outcome.results[check]


@pytest.mark.parametrize("check", [check.__name__ for check in guest_checks.PLAIN])
def test_without_weighted_interleave(plain: Outcome, check: str) -> None:
    passed(plain, check)


@pytest.mark.parametrize("check", [check.__name__ for check in guest_checks.FULL])
def test_with_cxl_devices(full: Outcome, check: str) -> None:
    passed(full, check)


def test_the_guests_ended_by_themselves(plain: Outcome, full: Outcome) -> None:
    assert plain.exit_code == 0, plain.describe()
    assert full.exit_code == 0, full.describe()
