"""Every experiment has the same form: a request, a run, an outcome."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import typing
from pathlib import Path

import pandas as pd
import pytest

from tokenprune import experiments
from tokenprune.experiments.common.cells import Failure
from tokenprune.experiments.common.outcome import Outcome
from tokenprune.experiments.common.request import (
    CompareRequest,
    QuestionRequest,
    Request,
    comparison,
)
from tokenprune.progress import ProgressCallback

# They read runs or tables, or start a server, and ask no questions of a model themselves; the demo
# serves a page.
OTHERS = {"choose", "demo", "export", "lmms", "merge", "published", "serving_check", "validity"}
NAMES = [
    found.name
    for found in pkgutil.iter_modules(experiments.__path__)
    if found.ispkg
    and found.name not in OTHERS
    and importlib.util.find_spec(f"{experiments.__name__}.{found.name}.command")
]


@pytest.mark.parametrize("name", NAMES)
def test_run_takes_a_request_and_progress_and_returns_an_outcome(name: str) -> None:
    run = importlib.import_module(f"{experiments.__name__}.{name}.run").run
    request, progress, *others = inspect.signature(run).parameters.values()
    types = typing.get_type_hints(run)
    assert issubclass(types["request"], Request)
    assert (request.name, progress.name) == ("request", "progress")
    assert types["progress"] == ProgressCallback
    assert types["return"] is Outcome
    assert all(other.kind is other.KEYWORD_ONLY for other in others)


def test_there_are_experiments() -> None:
    assert {"compare", "masks", "report", "efficiency", "positional_bias"} <= set(NAMES)


def test_a_comparison_has_the_model_and_questions_of_another_request() -> None:
    asked = QuestionRequest(model="m", questions=3, seed=5, max_new_tokens=2, out=Path("o"))
    made = comparison(asked, methods=("last",))
    assert made == CompareRequest(
        model="m", questions=3, seed=5, max_new_tokens=2, out=Path("o"), methods=("last",)
    )


def test_an_outcome_is_short_and_shows_its_main_table() -> None:
    first = pd.DataFrame({"accuracy": [0.1234567] * 500})
    outcome = Outcome(
        Path("runs/a&b"),
        "failed",
        tables={"ablation": first, "summary": pd.DataFrame({"kind": ["x"]})},
        answered=3,
        wanted=4,
        failures={"fastv at 0.5": Failure("RuntimeError: no", "")},
    )
    assert outcome.to_frame() is first
    assert outcome.summary["kind"].tolist() == ["x"]
    shown = repr(outcome)
    assert len(shown) < 120
    for part in ("failed", "runs", "3 of 4", "1 failed", "ablation 500x1"):
        assert part in shown
    page = outcome._repr_html_()
    assert "a&amp;b" in page
    assert "<table" in page
    assert page.count("<tr") < 100, "a long table is shortened"
    assert Outcome(Path("runs")).to_frame().empty
    assert "<table" not in Outcome(Path("runs"))._repr_html_()
