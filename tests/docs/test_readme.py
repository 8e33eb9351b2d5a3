"""Tables of the README are generated, its code runs, and its links exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from places import ROOT
from transformers import AutoModelForImageTextToText, AutoProcessor

import tokenprune as tp

README = ROOT / "README.md"


@pytest.fixture
def readme() -> str:
    if not README.is_file():
        pytest.skip("README.md is not installed with the package")
    return README.read_text(encoding="utf-8")


def _blocks(readme: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", readme, re.DOTALL)


def test_it_is_short(readme: str) -> None:
    assert len(readme.splitlines()) <= 130


def test_its_tables_are_those_of_the_stored_results_and_the_cards(readme: str) -> None:
    """Generated in a new process, in which no test has registered a method."""
    code = "import sys; sys.path.insert(0, 'docs/_generate'); import readme; print(end=readme.filled(open('README.md', encoding='utf-8').read()))"  # noqa: E501
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    assert done.stdout == readme, "run python docs/_generate/readme.py"


def test_the_example_runs(
    readme: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On a testbed in place of the 7B checkpoint."""
    Image.new("RGB", (60, 40), "red").save(tmp_path / "photo.jpg")
    pipe = tp.load("testbed-next")
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda _: pipe.model)
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda _: pipe.processor)
    monkeypatch.chdir(tmp_path)
    exec(compile(_blocks(readme)[0], "README.md", "exec"), {"__name__": "readme_example"})
    assert "Ledger(patch tokens" in capsys.readouterr().out


def test_the_example_strategy_is_registered_by_being_pasted(readme: str) -> None:
    from tokenprune.registry import strategies

    exec(compile(_blocks(readme)[1], "README.md", "exec"), {"__name__": "readme_plugin"})
    try:
        assert isinstance(tp.create("norm", retention=0.5), tp.ScoringCompressor)
    finally:
        del strategies._classes["norm"]


def test_links_lead_somewhere(readme: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", readme):
        if not target.startswith("http"):
            assert (README.parent / target).exists(), target


def test_the_first_screen_has_the_two_commands(readme: str) -> None:
    first = "\n".join(readme.splitlines()[:15])
    assert "pip install -e . && tokenprune compare " in first
    assert "pip install -e '.[dev]' && pytest " in first


def test_every_command_that_is_named_exists(readme: str) -> None:
    from click import Context
    from typer.main import get_command

    from tokenprune.cli import app

    group: Any = get_command(app)
    known = set(group.list_commands(Context(group)))
    named = set(re.findall(r"`tokenprune ([a-z-]+)", readme))
    assert named
    assert named <= known
