"""`sample_package/`, a method in a separate package, installed as a user does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from places import TESTS

import tokenprune

pytest.importorskip("setuptools", reason="installing without a download needs setuptools here")
HERE = TESTS / "sample_package"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip installed the package, offline."""
    folder = tmp_path_factory.mktemp("installed")
    source = shutil.copytree(HERE, tmp_path_factory.mktemp("source") / "package")
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps"]
    pip += ["--no-build-isolation", "--quiet", "--target", str(folder), str(source)]
    done = subprocess.run(pip, capture_output=True, text=True)
    if "No module named pip" in done.stderr:
        pytest.skip("there is no pip in this environment")
    assert done.returncode == 0, done.stderr
    return folder


def _run(installed: Path, *arguments: str) -> str:
    """Standard output of ``tokenprune ...`` where the package is installed."""
    paths = [
        str(installed),
        str(Path(tokenprune.__file__).parents[1]),
        *os.environ.get("PYTHONPATH", "").split(os.pathsep),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [sys.executable, "-m", "tokenprune", *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_list_shows_it(installed: Path) -> None:
    assert any(line.startswith("contrast ") for line in _run(installed, "list").splitlines())


@pytest.mark.slow
def test_list_knows_its_options(installed: Path) -> None:
    card = _run(installed, "list", "contrast")
    assert "farthest from the mean" in card
    assert "power=2.0" in card


def test_compare_runs_it_beside_ours(installed: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    methods = ["--methods", "contrast:power=1", "uniform"]
    options = ["--retention", "0.25", "--questions", "2", "--out", str(out)]
    options += ["--metric", "first-letter"]
    _run(installed, "compare", *methods, *options)
    answers = pd.read_parquet(out / "answers.parquet")
    assert set(answers["method"]) > {"uncompressed", "contrast", "uniform"}
    assert "power=1.0" in answers[answers["method"] == "contrast"].to_string()
    assert answers["answer"].notna().all()
    assert set(answers["metric"]) == {"first-letter"}
    right = answers["answer"].str[0] == answers["truth"].str[0]
    assert answers["score"].eq(right.astype(float)).all()


@pytest.mark.slow
def test_audit_checks_it(installed: Path) -> None:
    said = _run(installed, "audit", "contrast")
    assert "Audit of contrast" in said
    assert "FAIL" not in said
