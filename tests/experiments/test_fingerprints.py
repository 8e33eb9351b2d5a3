"""Whatever can change an answer is in the fingerprint, and nothing else."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest

import tokenprune as tp
from tokenprune.experiments.common.provenance import (
    DECISIVE,
    answer_files,
    code_files,
    digests,
    environment,
    model_files,
)
from tokenprune.experiments.common.questions import held_out
from tokenprune.experiments.compare.runner import ModelRunner

METHOD = """
from dataclasses import dataclass
from tokenprune.compressor import ScoringCompressor
{imports}

@dataclass(frozen=True, kw_only=True)
class Mine({base}):
    def score(self, tokens):
        return tokens.features.norm(dim=-1)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder from which modules are imported, for one test only."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def names_of(module: str) -> dict[str, str]:
    return code_files([importlib.import_module(module).Mine(retention=0.5)])


def test_imports_and_data_files_of_a_package_are_covered(place: Path) -> None:
    package = place / "their_package"
    files = {
        "__init__.py": "",
        "methods/__init__.py": "",
        "methods/mine.py": METHOD.format(imports="from ..bases import Base", base="Base"),
        "bases.py": METHOD.format(imports="", base="ScoringCompressor").replace("Mine", "Base")
        + "\n    def later(self):\n        from their_package.helpers import first\n",
        "helpers/__init__.py": "",
        "helpers/first.py": "from .. import second\n",
        "second.py": "VALUE = 1\n",
        "data/table.json": "[1]",
        "template.jinja": "{{ a }}",
    }
    aside = {
        "unused.py": "VALUE = 1\n",
        "tests/test_mine.py": "# a test\n",
        "tests/expected.json": "[1]",
        "README.md": "words",
        "runs/one/answers.jsonl": "",
        "runs/one/plot.png": "",
    }
    for name, text in (files | aside).items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    first = names_of("their_package.methods.mine")
    theirs = {name for name in first if name.startswith("their_package/")}
    assert theirs == {f"their_package/{name}" for name in files}
    for name, text in (files | aside).items():
        (package / name).write_text(f"{text}# changed\n")
        second = names_of("their_package.methods.mine")
        changed = {one for one in first if first[one] != second[one]}
        assert changed == ({f"their_package/{name}"} if name in files else set()), name
        first = second


def test_data_files_of_a_single_module_are_covered(place: Path) -> None:
    (place / "their_module.py").write_text(
        METHOD.format(imports="import their_helper, json, numpy", base="ScoringCompressor")
        + "\nTABLE = 'their table.npy'\n"
    )
    (place / "their_helper.py").write_text("import torch\n")
    (place / "their table.npy").write_text("1")
    for other in ("unused.py", "other.npy", "my.jsonl"):
        (place / other).write_text("")
    theirs = {name for name in names_of("their_module") if not name.startswith("tokenprune/")}
    assert theirs == {"their_module.py", "their_helper.py", "their table.npy"}


def test_no_module_is_executed_to_find_it(place: Path) -> None:
    (place / "their_module.py").write_text(
        METHOD.format(imports="", base="ScoringCompressor") + "\ndef f():\n    import their_bomb\n"
    )
    (place / "their_bomb.py").write_text("raise SystemExit('executed')\n")
    assert "their_bomb.py" in names_of("their_module")


def test_options_are_part_of_a_method() -> None:
    assert "tokenprune/budget.py" in code_files([tp.parse("fastv:allocator=globalcom2@0.5")])
    chain = code_files([tp.parse("globalcom2@0.5 + fastv@0.5")])
    assert {f"tokenprune/strategies/{name}.py" for name in ("globalcom2", "fastv")} <= set(chain)
    assert "tokenprune/strategies/uniform.py" not in chain


def test_every_file_that_runs_while_answering_is_covered() -> None:
    """Seen by watching: the files whose functions run while two questions are answered."""
    pipe = tp.load("testbed-next")
    runner = ModelRunner(pipe, 2)
    methods = [tp.parse("tome@0.5 + fastv@0.5"), tp.parse("globalcom2@0.5")]
    questions = held_out(2, 0)
    root = Path(tp.__file__).parent.resolve()
    folders = {
        name: Path(importlib.import_module(f"tokenprune.{name}").__path__[0]).resolve()
        for name in ("strategies", "models", "experiments")
    }
    homes = (root, *folders.values())
    ran: set[Path] = set()

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and any(home in path.parents for home in homes):
            ran.add(path.resolve())

    sys.setprofile(watch)
    try:
        for method in methods:
            parts = [part for part in method.parts() if part.stage is tp.Stage.ENCODER]
            shown = runner.encode(questions, method.needs, parts[0] if parts else None)  # type: ignore[arg-type]
            runner.answer(method, shown, [item.question for item in questions])
    finally:
        sys.setprofile(None)
    found = answer_files(None, methods, [type(pipe.adapter), "tokenprune.experiments.compare.run"])[
        "code"
    ]
    held = set()
    for name in found:
        _, top, *inside = Path(name).parts
        held.add(folders.get(top, root / top).joinpath(*inside))
    assert len(ran) > 10
    assert ran - held == set()
    assert "tokenprune/testing/model_checks.py" not in found
    assert "tokenprune/experiments/common/plots.py" not in found


def test_every_file_of_a_model_but_texts_is_covered(tmp_path: Path) -> None:
    write(
        tmp_path,
        model_DOT_safetensors="w",
        model_DOT_safetensors_DOT_index_DOT_json="{}",
        config_DOT_json="{}",
        tokenizer_DOT_model="t",
        chat_template_DOT_json="{}",
        additional_chat_templates__tool_DOT_jinja="{}",
        text_encoder__model_DOT_safetensors="w",
        modeling_own_DOT_py="code",
        README_DOT_md="words",
    )
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.json").write_text("{}")
    found = model_files(tmp_path)
    assert set(found["weights"]) == {
        *("model.safetensors", "model.safetensors.index.json", "config.json"),
        "text_encoder/model.safetensors",
    }
    assert set(found["processor"]) == {
        *("tokenizer.model", "chat_template.json", "modeling_own.py"),
        "additional_chat_templates/tool.jinja",
    }
    before = digests(found)
    (tmp_path / "additional_chat_templates" / "tool.jinja").write_text("other")
    after = digests(model_files(tmp_path))
    assert after["weights"] == before["weights"]
    assert after["processor"] != before["processor"]
    assert digests(model_files(None)) == {"weights": None, "processor": None}


def test_versions_that_can_change_an_answer() -> None:
    assert set(DECISIVE) == {"pillow", "torch", "torchvision", "transformers", "tokenizers"}
    versions = environment()["versions"]
    assert all(versions[name] for name in DECISIVE)


NOTEBOOK = """
from dataclasses import dataclass
import tokenprune as tp

SHIFT = {shift}

def helper(values):
    return values.norm(dim=-1) * {factor} + SHIFT

def unrelated(values):
    return {other}

@dataclass(frozen=True, kw_only=True)
class Mine(tp.ScoringCompressor):
    bound = {bound}

    def score(self, tokens):
        return [helper(tokens.features) for _ in (1,)][0]

    @property
    def width(self):
        return {width}
"""


def test_a_class_of_a_notebook_is_known_by_its_code() -> None:
    """It has no file; what it computes counts, and neither its lines nor what it does not use."""

    def digests(space: str = "", **changes: int) -> Any:
        module = ModuleType("a_notebook")
        sys.modules["a_notebook"] = module
        try:
            source = NOTEBOOK.format(
                **dict.fromkeys(("shift", "factor", "other", "bound", "width"), 1) | changes
            )
            exec(compile(space + source, f"cell {len(space)}", "exec"), vars(module))
            return code_files([module.Mine(retention=0.5)])
        finally:
            del sys.modules["a_notebook"]

    first = digests()
    assert {"a_notebook.Mine", "a_notebook.helper"} <= set(first)
    assert first == digests(space="\n\n\n", other=7)
    for name in ("shift", "factor", "bound", "width"):
        assert first != digests(**{name: 2}), name
