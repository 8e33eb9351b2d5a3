"""Every notebook runs from top to bottom."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
from places import ROOT

from tokenprune.registry import strategies

FOLDER = ROOT / "experiments" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

pytestmark = pytest.mark.skipif(not NOTEBOOKS, reason="notebooks are not part of the package")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cell by cell in one namespace, as a kernel does it, without needing a kernel."""
    module = ModuleType(f"notebook_{path.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # classes of cells can be pickled
    strategies.names()
    monkeypatch.setattr(strategies, "_classes", dict(strategies._classes))
    notebook = json.loads(path.read_text(encoding="utf-8"))
    with warnings.catch_warnings():
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                assert not cell["outputs"], f"{cell['id']}: clear the outputs before committing"
                source = "".join(cell["source"])
                exec(compile(source, f"{path.name}:{cell['id']}", "exec"), module.__dict__)
