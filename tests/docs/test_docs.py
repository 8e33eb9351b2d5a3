"""The code in docs/ runs."""

from __future__ import annotations

import re

import pytest
from places import ROOT

from tokenprune.registry import adapters
from tokenprune.spec import create
from tokenprune.testing.host import RETENTION, Host
from tokenprune.testing.runner import MODEL_CHECKS, run

DOCS = ROOT / "docs"

pytestmark = [
    pytest.mark.skipif(not DOCS.is_dir(), reason="the documents are not part of the package"),
    pytest.mark.filterwarnings("ignore::tokenprune.errors.RetentionWarning"),
]


def _blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def new_family(monkeypatch: pytest.MonkeyPatch) -> Host:
    """The adapter of the page, registered for one test only."""
    adapters.names()  # finds them all, once; a copy would take them along
    monkeypatch.setattr(adapters, "_classes", dict(adapters._classes))
    exec(_blocks("adding-a-model.md")[1], {"__name__": "new_family"})
    return Host.tiny("VipLLaVA")


@pytest.mark.parametrize("name", ["uniform", "globalcom2", "fastv"])
def test_the_new_family_keeps_the_contract(new_family: Host, name: str) -> None:
    for check in MODEL_CHECKS:
        run(check, create(name, retention=RETENTION), [new_family])


def test_the_worked_example_is_the_code() -> None:
    """The page shows the adapter without types and comments."""

    def bare(code: str) -> list[str]:
        return [re.sub(r"\s|#.*", "", line) for line in code.splitlines()]

    source = bare((DOCS.parent / "models" / "llava_next.py").read_text(encoding="utf-8"))
    shown = bare(_blocks("adding-a-model.md")[0])
    assert [x for x in shown if x not in source and not x.startswith(("def", "hosts"))] == []


def test_the_stated_numbers_of_lines_are_correct() -> None:
    page = (DOCS / "adding-a-model.md").read_text(encoding="utf-8")
    for name, lines in re.findall(r"\[`(\w+\.py)`\][^|]*\| (\d+) \|", page):
        text = (DOCS.parent / "models" / name).read_text(encoding="utf-8")
        assert len(text.splitlines()) == int(lines), name
