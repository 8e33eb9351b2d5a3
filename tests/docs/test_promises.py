"""Everything that the page of promises names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from places import ROOT

from tokenprune.testing import runner, strategy_checks

PAGE = ROOT / "docs" / "promises.md"

pytestmark = pytest.mark.skipif(not PAGE.is_file(), reason="documents are not part of the package")


def promises() -> list[tuple[str, list[str]]]:
    """Every promise, with the names of the tests that hold it."""
    rows = re.findall(r"^\| (.+) \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [(what, re.findall(r"`([^`]+)`", by)) for what, by in rows if what != "promise"]


def test_every_test_and_script_that_is_named_exists() -> None:
    assert len(promises()) > 20
    known = {check.__name__ for check in runner.CHECKS}
    for what, names in promises():
        assert names, what
        for name in names:
            path, _, function = name.partition("::")
            if name.startswith("check_"):
                assert name in known, name
            else:
                assert (ROOT / path).is_file(), name
            if function:
                source = (ROOT / path).read_text(encoding="utf-8")
                assert re.search(rf"^def {function}\(", source, re.MULTILINE), name


def test_every_check_that_is_named_is_applied() -> None:
    applied = {check.__name__ for check in (*strategy_checks.STRATEGY_CHECKS, *runner.MODEL_CHECKS)}
    named = {name for _, names in promises() for name in names if name.startswith("check_")}
    assert named <= applied


def test_scripts_that_are_named_run_in_ci() -> None:
    scripts = {name for _, names in promises() for name in names if "checks/" in name}
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for script in scripts:
        assert f"tokenprune.experiments.checks.{Path(script).stem} " in ci
