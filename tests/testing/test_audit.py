"""The audit command, and compressors of users on the command line."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tokenprune import console
from tokenprune.cli import app
from tokenprune.errors import UserError
from tokenprune.plugins import own_class
from tokenprune.registry import strategies
from tokenprune.spec import registered
from tokenprune.testing.strategy_checks import check_documented


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


@pytest.mark.parametrize(
    ("fault", "check", "said"),
    [
        ("Inverted", "keeps what stands out", "is the ranking inverted?"),
        ("Unsorted", "selection form", "not sorted and unique"),
        ("Repeated", "selection form", "not sorted and unique"),
        ("OneTooMany", "budget", "at most"),
        ("InvertedWords", "keeps what stands out", "is the ranking inverted?"),
        ("KeepsTheWorst", "keeps the best scores", "drops a score of"),
        ("SometimesTooMany", "budget", "at most"),
        ("PeeksAtPlaces", "follows content", "upside down"),
        ("PeeksAtTheCanvas", "follows content", "with the image of 2x2 crops upside down"),
        ("HidesItsDraws", "deterministic", "a second time"),
        ("GlobalTorch", "rng untouched", "global generator"),
        ("Counting", "batch equals single", "of the batch"),
    ],
)
def test_audit_finds_the_fault(
    monkeypatch: pytest.MonkeyPatch, fault: str, check: str, said: str
) -> None:
    from tokenprune.testing import runner

    named = f"check_{check.replace(' ', '_')}"
    monkeypatch.setattr(
        runner, "CHECKS", tuple(one for one in runner.CHECKS if one.__name__ == named)
    )
    result = CliRunner().invoke(app, ["audit", f"broken:{fault}"], env={"COLUMNS": "400"})
    assert result.exit_code == 1, result.output
    assert "0 of 1 checks passed" in result.output
    assert said in result.output


@pytest.mark.parametrize(
    "words",
    [
        "compare -r 0.5 --questions 2 -m",
        "positional-bias --images 2 -m",
        "efficiency --patches 4x4 -m",
        "masks -m",
    ],
)
def test_an_own_class_works_in_every_command(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_module: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*words.split(), f"{own_module}:Mine", "--out", str(tmp_path / "run"))
    assert result.exit_code == console.OK, result.output
    assert f"{own_module}-norm" in result.output


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the working directory, with a registered class `Mine` and an unnamed one."""
    name = f"own{tmp_path.name[-2:].strip('_')}"
    source = (
        "from dataclasses import dataclass\n"
        "from tokenprune.compressor import ScoringCompressor\n"
        "from tokenprune.registry import register\n"
        f"@register('{name}-norm')\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Mine(ScoringCompressor):\n"
        "    def score(self, tokens):\n"
        "        return tokens.features.norm(dim=-1)\n"
        "class Nameless(ScoringCompressor):\n"
        "    score = Mine.score\n"
    )
    (tmp_path / f"{name}.py").write_text(source)
    yield name
    strategies._classes.pop(f"{name}-norm", None)
    sys.modules.pop(name, None)


def test_own_classes_in_specs(
    own_module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chain = f"{own_module}:Mine@0.5 + fastv:layer=3@0.5"
    assert registered(chain) == f"{own_module}-norm@0.5 + fastv:layer=3@0.5"
    for spec in ("fastv:layer=3", "fastv:layer", "fastv@0.5", "fastv"):
        assert registered(spec) == spec
    with pytest.raises(UserError, match="has no name yet"):
        registered(f"{own_module}:Nameless")
    with pytest.raises(UserError, match="not a class derived"):
        registered(f"{own_module}:Other")


def test_audit_of_a_sound_method() -> None:
    result = CliRunner().invoke(app, ["audit", "uniform:separators=none"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "checks passed" in result.output
    assert "FAIL" not in result.output


def write_method(module: str, body: str, card: str = "") -> None:
    Path(f"{module}.py").write_text(
        "from dataclasses import dataclass\n"
        "from tokenprune.compressor import ScoringCompressor\n"
        "from tokenprune.registry import Card\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Mine(ScoringCompressor):\n"
        "    'Keep the longest tokens.'\n"
        f"    card = Card({card})\n"
        "    def score(self, tokens):\n"
        f"        {body}\n"
    )


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return tokens.features.nrom(dim=-1)", "AttributeError: 'Tensor' object has no attribute"),
        ("assert tokens.features.mean() > 1e9, 'too dull'", "AssertionError: too dull"),
    ],
)
def test_an_exception_of_the_method_is_reported_once_with_file_and_line(
    body: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"typo{len(body)}"
    monkeypatch.chdir(tmp_path)
    write_method(module, body, card="paper='Longest tokens (unpublished)'")
    result = CliRunner().invoke(app, ["audit", f"{module}:Mine"], env={"COLUMNS": "300"})
    assert result.exit_code == 1
    failing = [line for line in result.output.splitlines() if "FAIL" in line]
    mine = [line for line in failing if f"({module}.py, line 9)" in line]
    assert len(mine) == 1, failing
    assert said in mine[0]
    assert re.search(r"and \d\d more checks", mine[0])
    assert len(failing) <= 2, "PyTorch's compiler reports the exception as one of its own"
    assert re.search(r"^documented +ok", result.output, re.MULTILINE)


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ("paper='Longest tokens (unpublished)'", ""),
        ("paper='Longest tokens (baseline)'", ""),
        ("paper='Longest tokens'", 'Card(paper="Longest tokens (unpublished)")'),
        ("", "(unpublished)"),
    ],
)
def test_an_unpublished_method_says_so(
    card: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"unpublished{len(card)}"
    monkeypatch.chdir(tmp_path)
    write_method(module, "return tokens.features.norm(dim=-1)", card)
    method = own_class(f"{module}:Mine")
    assert method is not None
    if not said:
        check_documented(method(retention=0.5))
        return
    with pytest.raises(AssertionError, match=re.escape(said)):
        check_documented(method(retention=0.5))


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("nowhere.at_all:Mine", "cannot import 'nowhere.at_all'"),
        ("broken:FAULTS", "is not a class derived from Compressor"),
        ("unifrm", "Did you mean 'uniform'"),
        ("uniform:separator=none", "separators"),
        ("cdpruner", "cdpruner:relevance=text"),
    ],
)
def test_audit_of_nothing_is_a_sentence(method: str, said: str) -> None:
    result = CliRunner().invoke(app, ["audit", method])
    assert result.exit_code == 2
    assert said in result.output
