"""Every notebook runs from top to bottom in a real kernel, and is committed with its outputs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

nbformat = pytest.importorskip("nbformat")
jupyter_client = pytest.importorskip("jupyter_client")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

FOLDER = ROOT / "experiments" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST = 400_000  # bytes

pytestmark = pytest.mark.skipif(not NOTEBOOKS, reason="notebooks are not part of the package")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A kernel for all notebooks, which imports PyTorch once; each starts with no variables."""
    manager = jupyter_client.KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(tmp_path_factory.mktemp("notebooks")), env=os.environ)
    yield manager
    manager.shutdown_kernel(now=True)


def executed(notebook: Any, kernel: Any) -> Any:
    client = nbclient.NotebookClient(notebook, km=kernel, timeout=600)
    return client.execute(cleanup_kc=False)


def figures(notebook: Any) -> int:
    """The number of pictures that a reader sees."""
    return sum(
        any(kind.startswith("image/") for kind in output.get("data", {}))
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, kernel: Any) -> None:
    clear = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("%reset -f")])
    executed(clear, kernel)
    notebook = nbformat.read(path, as_version=4)
    shown = figures(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    assert figures(executed(notebook, kernel)) == shown


@pytest.mark.slow
def test_a_class_of_a_notebook_may_change(kernel: Any) -> None:
    """Its answers are computed again; a name that is taken is refused in a sentence."""
    source = """
from dataclasses import dataclass
import tokenprune as tp
from tokenprune.experiments.common.request import CompareRequest
from tokenprune.experiments.compare.run import run

@tp.register("changing")
@dataclass(frozen=True, kw_only=True)
class Changing(tp.ScoringCompressor):
    def score(self, tokens):
        return {score}

outcome = run(CompareRequest(methods=("changing",), retention=(0.1,), questions=2))
print("new answers:", outcome.new)
"""
    cells = [source.format(score=f"tokens.features[:, {column}]") for column in (0, 0, 1)]
    cells.append(
        "try:\n    tp.register('changing')(type('Other', (Changing,), {}))\n"
        "except tp.UserError as error:\n    print(error)"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    texts = [
        "".join(output.text for output in cell.outputs if output.get("name") == "stdout")
        for cell in executed(notebook, kernel).cells
    ]
    first, again, changed, taken = texts
    assert "new answers: 0" not in first
    assert "new answers: 0" in again
    assert "new answers: 0" not in changed
    assert "'changing' is taken: Changing (__main__)" in taken


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_as_it_ran(path: Path) -> None:
    """Outputs are there, complete, in order and small, without errors and paths of a machine."""
    assert path.stat().st_size < LARGEST
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in code]
    assert counts == sorted(counts)
    assert any(cell.outputs for cell in code)
    kinds = {output.output_type for cell in code for output in cell.outputs}
    assert "error" not in kinds
    text = path.read_text(encoding="utf-8")
    for word in ("/home/", "/root/", "/tmp/", "/work/", "site-packages", "Traceback"):
        assert word not in text, word
    for cell in code:
        if "figure(" in cell.source or "masks(" in cell.source:
            assert figures(nbformat.v4.new_notebook(cells=[cell])), cell.source
