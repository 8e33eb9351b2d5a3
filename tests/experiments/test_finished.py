"""A finished comparison is shown again without its model, and only if nothing has changed."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pandas as pd
import pytest
from click.testing import Result
from typer.testing import CliRunner

import tokenprune as tp
from tokenprune.cli import app
from tokenprune.experiments.common.questions import held_out
from tokenprune.models import testbed

DONE = "All answers already exist; nothing was computed again."
LOADS = "a model is loaded"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, questions and finished runs of `words`, with and without --out."""
    home = tmp_path_factory.mktemp("made")
    shutil.copytree(testbed.path("testbed-next"), home / "model")
    lines = []
    for index, item in enumerate(held_out(16, seed=0)[::3]):  # of two images
        item.images[0].open().save(home / f"{index}.png")
        shown = {"image": f"{index}.png", "question": item.question, "answer": item.answer}
        lines.append(json.dumps({**shown, "kind": item.kind}))
    (home / "data.jsonl").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for asked in (words(), words()[:-2]):
            assert CliRunner().invoke(app, asked).exit_code == 0
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as working directory, in which no model can be loaded."""
    home = shutil.copytree(made, tmp_path / "home")
    monkeypatch.chdir(home)

    def load(*_: object, **__: object) -> NoReturn:
        raise RuntimeError(LOADS)

    monkeypatch.setattr(tp, "load", load)
    return home


def words(**changes: str) -> list[str]:
    asked = {
        **{"model": "model", "methods": "uniform", "retention": "0.25", "data": "data.jsonl"},
        **{"device": "cpu", "out": "run"},
        **changes,
    }
    return ["compare", *(word for name, value in asked.items() for word in (f"--{name}", value))]


def ask(**changes: str) -> Result:
    return CliRunner().invoke(app, words(**changes))


def test_nothing_is_loaded_and_the_tables_are_the_same(home: Path) -> None:
    answers = pd.read_parquet("run/answers.parquet")
    summary = Path("run/summary.csv").read_bytes()
    Path("run/summary.csv").write_text("an older one")
    Path("run/answers.parquet").unlink()
    shutil.rmtree("run/plots")
    result = ask()
    assert result.exit_code == 0
    assert DONE in result.output
    assert Path("run/summary.csv").read_bytes() == summary
    pd.testing.assert_frame_equal(pd.read_parquet("run/answers.parquet"), answers)
    assert len(list(Path("run/plots").glob("*.png"))) == 3
    manifest = json.loads(Path("run/manifest.json").read_text())
    assert [session["status"] for session in manifest["sessions"]] == ["complete", "complete"]


def test_neither_pytorch_nor_transformers_is_imported(home: Path) -> None:
    script = (
        "import sys\n"
        "from tokenprune.cli import app\n"
        "try:\n"
        "    app()\n"
        "finally:\n"
        "    print(sorted({'torch', 'transformers'} & sys.modules.keys()))\n"
    )
    command = [sys.executable, "-c", script, *words()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert DONE in done.stdout
    assert done.stdout.endswith("[]\n")


def test_a_folder_named_after_the_request_is_found(home: Path) -> None:
    (folder,) = Path("runs").iterdir()
    shutil.copytree("run", "runs/another")
    output = CliRunner().invoke(app, words()[:-2]).output
    assert DONE in output
    assert folder.name in output.replace("\n", "")


def _weights(home: Path) -> None:
    file = home / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _processor(home: Path) -> None:
    file = home / "model" / "tokenizer_config.json"
    file.write_text(file.read_text() + "\n")


def _image(home: Path) -> None:
    shutil.copy(home / "5.png", home / "0.png")


def _answer(home: Path) -> None:
    file = home / "run" / "answers.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))


def _version(home: Path) -> None:
    for file in home.glob("run/manifest*.json"):
        file.write_text(file.read_text().replace('"pillow": "', '"pillow": "0.'))


@pytest.mark.parametrize("change", [_weights, _processor, _image, _answer, _version])
def test_the_model_is_loaded_where_anything_has_changed(
    home: Path, change: Callable[[Path], None]
) -> None:
    change(home)
    result = ask()
    assert str(result.exception) == LOADS
    assert DONE not in result.output


@pytest.mark.parametrize(
    "changes", [{"retention": "0.5"}, {"max-new-tokens": "9"}, {"max-image-pixels": "9"}]
)
def test_the_model_is_loaded_where_other_things_are_asked(
    home: Path, changes: dict[str, str]
) -> None:
    result = ask(**changes)
    assert DONE not in result.output
    assert str(result.exception) == LOADS


def test_other_weights_are_refused_by_name(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = shutil.copytree(made, tmp_path / "home")
    monkeypatch.chdir(home)
    _weights(home)
    result = ask()
    assert result.exit_code == 2
    assert "run holds another experiment (other weights: model.safetensors)" in result.stderr
