"""What the README promises."""

import re
from pathlib import Path

import pytest

import tokenprune as tp

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture
def readme() -> str:
    if not README.is_file():
        pytest.skip("README.md is not installed with the package")
    return README.read_text()


def test_the_example_strategy_is_registered_by_being_pasted(readme: str) -> None:
    from tokenprune.registry import strategies

    code = re.search(r"```python\n(from dataclasses.*?)```", readme, re.S)
    assert code
    scope = {"__name__": "readme_example"}
    exec(compile(code[1], "README.md", "exec"), scope)
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
