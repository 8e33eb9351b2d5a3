"""Every check fails on a seeded fault and passes without one."""

from __future__ import annotations

import pytest
from broken import FAULTS, SOUND, Fault

from tokenprune.testing.asserting import Check
from tokenprune.testing.host import Host
from tokenprune.testing.runner import CHECKS
from tokenprune.testing.strategy_checks import STRATEGY_CHECKS


def _apply(check: Check, fault: Fault, host: Host) -> None:
    if check in STRATEGY_CHECKS:
        check(fault.compressor)
    else:
        check(fault.compressor, host)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_check_can_fail(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    for fault in FAULTS[check.__name__]:  # KeyError: no fault is known on which this check fails
        with pytest.MonkeyPatch.context() as patch:
            fault.patch(patch)
            with pytest.raises(AssertionError) as caught:
                _apply(check, fault, Host.tiny("LLaVA-NeXT"))
        assert str(caught.value), f"{fault} is found, but nothing is said about it"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_check_can_pass(check: Check, host: Host) -> None:
    _apply(check, Fault(SOUND), host)


def test_every_fault_is_used() -> None:
    assert set(FAULTS) == {check.__name__ for check in CHECKS}
