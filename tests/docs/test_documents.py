"""Every command and every Python block of the documentation runs.

They run in a folder with the files that the pages mention.  Checkpoints of the Hub are
replaced by a testbed, GPUs by the CPU, and what takes long is asked for less of.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image
from places import ROOT
from typer.testing import CliRunner

import tokenprune as tp
from tokenprune import facts, pipeline
from tokenprune.cli import app
from tokenprune.experiments.demo.run import ServedPage
from tokenprune.experiments.metrics import metrics
from tokenprune.models import testbed
from tokenprune.registry import strategies
from tokenprune.testing import runner
from tokenprune.testing.__main__ import app as testing_app

DOCS = ROOT / "docs"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in sorted([ROOT / "README.md", *DOCS.rglob("*.md")])
    if path.is_file()
}
ELSEWHERE = {"docs/adding-a-model.md", "README.md"}  # test_docs.py, test_readme.py

LESS = {
    "ablation": ("--questions 3",),
    "benchmark": ("--quick", "--only loops"),
    "compare": ("--questions 2", "--retention 0.5"),
    "complementarity": ("--questions 3",),
    "crop-importance": ("--questions 3",),
    "efficiency": ("--retention 0.5",),
    "efficiency --measure": ("--repeats 1",),
    "positional-bias": ("--images 3",),
    "validity --model": ("--questions 2",),
}
"""Options that a command gets unless its line has them."""

INSTEAD = {
    "llava-hf/llava-v1.6-vicuna-7b-hf": "testbed-next",
    "cuda": "cpu",
    "--methods all": "--methods uniform dart globalcom2",
    " RUN": " runs/first",
    "tests/data/golden": str(ROOT / "tests" / "data" / "golden"),
    "experiments/results": str(ROOT / "experiments" / "results"),
    "logs/ten": str(ROOT / "tests" / "data" / "lmms"),
}
"""What stands in for what a machine may not have."""

MODULE = '''
from dataclasses import dataclass
from torch import Tensor
import tokenprune as tp

@tp.register("norm")
@dataclass(frozen=True, kw_only=True)
class Norm(tp.ScoringCompressor):
    """Keep the longest features."""

    card = tp.Card(paper="Feature norm (baseline)")

    def score(self, tokens: tp.VisualTokens) -> Tensor:
        return tokens.features.norm(dim=-1)

@tp.register("mine")
@dataclass(frozen=True, kw_only=True)
class Mine(Norm):
    """Keep the longest features, too."""
'''

METRICS = """
def first_word(prediction, question):
    return float(prediction.split()[:1] == question.answer.split()[:1])
"""

pytestmark = [
    pytest.mark.skipif(not PAGES, reason="the documentation is not part of the package"),
    pytest.mark.filterwarnings(
        "ignore"
    ),  # of other packages; warnings of ours are tested elsewhere
]


def fences(page: str, *languages: str) -> list[str]:
    """The code blocks of a page that are in one of the languages."""
    found = re.findall(r"^```([\w-]*)[^\n]*\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL)
    return [code for language, code in found if language in languages]


def commands(page: str) -> list[str]:
    """The lines of a page that run tokenprune."""
    lines = [line for code in fences(page, "bash") for line in code.splitlines()]
    if page == "README.md":
        lines += re.findall(r"`(tokenprune [\w-]+ [^`]+)`", PAGES[page])
    return [line for line in lines if re.match(r"(tokenprune|python -m tokenprune\S*) ?", line)]


def blocks(page: str) -> list[str]:
    """The Python blocks of a page, in their order."""
    return [] if page in ELSEWHERE else fences(page, "python")


@pytest.fixture(scope="session")
def things(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, questions, a module and finished runs."""
    folder = tmp_path_factory.mktemp("documents")
    for index, name in enumerate(["photo", "left", "right", "1", "2", "3"]):
        Image.new("RGB", (112, 84), (40 * index, 90, 160)).save(folder / f"{name}.jpg")
    asked = {"question": "How many objects are there?", "answer": "two"}
    lines = [{"image": "photo.jpg", **asked}, {"image": "left.jpg", **asked}]
    (folder / "my.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "textvqa" / "train_images").mkdir(parents=True)
    shutil.copy(folder / "photo.jpg", folder / "textvqa" / "train_images" / "a.jpg")
    item = {"question_id": 1, "image_id": "a", "question": "What?", "answers": ["two"] * 10}
    (folder / "textvqa" / "TextVQA_0.5.1_val.json").write_text(json.dumps({"data": [item]}))
    (folder / "my_module.py").write_text(MODULE)
    (folder / "my_metrics.py").write_text(METRICS)
    line = "compare --questions 2 --methods uniform last --retention 0.5 --out"
    result = CliRunner().invoke(app, [*line.split(), str(folder / "runs" / "first")])
    assert result.exit_code == 0, result.output
    shutil.copytree(folder / "runs" / "first", folder / "runs" / "second")
    return folder


@pytest.fixture
def desk(things: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of these things to work in; what a page registers is forgotten afterwards."""
    folder = shutil.copytree(things, tmp_path / "desk")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    strategies.names()  # finds them all, once; a copy would take them along
    monkeypatch.setattr(strategies, "_classes", dict(strategies._classes))
    metrics.names()
    monkeypatch.setattr(metrics, "_classes", dict(metrics._classes))
    monkeypatch.setattr(runner, "CHECKS", runner.CHECKS[:3])
    monkeypatch.setattr(ServedPage, "wait", lambda _: None)
    yield folder
    for name in ("my_module", "my_metrics"):
        sys.modules.pop(name, None)


def words(line: str) -> list[str]:
    """The arguments of a line as they are run here."""
    for what, other in INSTEAD.items():
        line = line.replace(what, other)
    given = shlex.split(line, comments=True)
    if given[0] == "python":
        return given[3:]
    if not {"--check", "--data"} & set(given):
        fewer = [
            option
            for of, options in LESS.items()
            if {*of.split()} <= {*given}
            for option in options
        ]
        given += [
            word for option in fewer if option.split()[0] not in given for word in option.split()
        ]
    return given[1:]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_run(desk: Path, page: str) -> None:
    if page.endswith("/demo.md") and not find_spec("gradio"):
        pytest.skip("needs the extra: pip install -e '.[demo]'")
    if page.endswith("/serving-check.md") and not find_spec("vllm"):
        pytest.skip("needs vLLM, as .ci/vllm installs it")
    for line in commands(page):
        called = testing_app if line.startswith("python") else app
        result = CliRunner().invoke(called, words(line))
        worse = "--against" in line and result.exit_code == 1  # than on that file's machine
        assert worse or result.exit_code == 0, f"{line}\n{result.output}\n{result.exception}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_python_runs(desk: Path, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block after block in one module, as a reader types them."""
    module = ModuleType("blocks_of_a_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # its classes can be pickled
    for code in blocks(page):
        here = code.replace("llava-hf/llava-v1.6-vicuna-7b-hf", str(testbed.path("testbed-next")))
        exec(compile(here, page, "exec", dont_inherit=True), module.__dict__)


def names_of_the_glossary() -> list[str]:
    """What its third column calls a name of the package: ``tp.load``, ``Trace.ledger`` ..."""
    rows = re.findall(r"^\| \*\*.+? \| .+? \| (.*?) \| .*? \|$", PAGES["docs/glossary.md"], re.M)
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    return [name for name in names if re.match(r"(tp|trace|tokenprune)\.|[A-Z]", name)]


def test_names_in_the_glossary_exist() -> None:
    assert len(names_of_the_glossary()) > 50
    for name in names_of_the_glossary():
        owner, _, attribute = name.partition("(")[0].rpartition(".")
        space = {**vars(facts), **vars(pipeline), **{one: getattr(tp, one) for one in tp.__all__}}
        if owner == "tokenprune":
            assert find_spec(name), name
        elif owner in ("", "tp"):
            assert attribute in space, name
        else:
            found = space[owner.replace("trace", "Trace")]
            documented = "".join(kind.__doc__ or "" for kind in found.__mro__)
            assert hasattr(found, attribute) or re.search(rf"\b{attribute}\b", documented), name


def test_blocks_and_commands_are_found() -> None:
    assert len([line for page in PAGES for line in commands(page)]) > 30
    assert len([code for page in PAGES for code in blocks(page)]) > 10


def test_every_command_has_a_page_with_an_example() -> None:
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    names = re.findall(r"^\W*([a-z-]+) {2,}", shown.partition("Commands")[2], re.MULTILINE)
    assert len(names) > 10
    for name in names:
        assert any(line.split()[1] == name for line in commands(f"docs/commands/{name}.md")), name
