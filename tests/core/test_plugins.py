"""``module:Class`` and ``--plugin`` execute the named module and nothing else."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tokenprune.cli import app
from tokenprune.errors import UserError
from tokenprune.plugins import import_plugins, own_class
from tokenprune.registry import strategies

MARK = "from pathlib import Path\nPath('executed').touch()\n"
METHOD = """
import tokenprune as tp
from dataclasses import dataclass
from tokenprune.strategies.uniform import Uniform

@tp.register("{name}-norm")
@dataclass(frozen=True, kw_only=True)
class Norm(tp.ScoringCompressor):
    def score(self, tokens):
        return tokens.features.norm(dim=-1)

if True:
    class Like(Uniform):
        pass

class Helper:
    pass

def pattern():
    pass

Made = type("Made", (Norm,), {{}})
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory whose imported modules are removed after the test."""
    monkeypatch.chdir(tmp_path)
    strategies.names()  # ours are imported once per process
    known, registered = set(sys.modules), dict(strategies._classes)
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    strategies._classes.clear()
    strategies._classes.update(registered)


@pytest.mark.parametrize("name", ["Norm", "Like"])
def test_a_class_that_the_source_defines_is_loaded(name: str, here: Path) -> None:
    (here / "own_a.py").write_text(MARK + METHOD.format(name="own-a"))
    found = own_class(f"own_a:{name}")
    assert found is not None
    assert found.__name__ == name
    assert (here / "executed").exists()


@pytest.mark.parametrize("name", ["Helper", "pattern", "Made", "tp", "Nothing", "Path"])
def test_a_module_without_a_compressor_in_its_source_is_not_executed(name: str, here: Path) -> None:
    (here / "uniforn.py").write_text(MARK + METHOD.format(name="own-b"))
    with pytest.raises(UserError, match=r"not a class derived.*uniforn\.py.*--plugin uniforn"):
        own_class(f"uniforn:{name}")
    assert not (here / "executed").exists()


def test_its_parent_packages_are_not_executed(here: Path) -> None:
    package = here / "own_package"
    (package / "inner").mkdir(parents=True)
    for folder in (package, package / "inner"):
        (folder / "__init__.py").write_text(MARK)
    (package / "base.py").write_text(MARK + METHOD.format(name="own-c"))
    (package / "inner" / "more.py").write_text(
        "from ..base import Norm as Base\n"
        "from .. import base\n"
        "class First(Base): ...\n"
        "class Second(base.Norm): ...\n"
        "class Third(base.Helper): ...\n"
    )
    (package / "loop.py").write_text("class One(Two): ...\nclass Two(One): ...\n")
    for wrong in ("own_package.inner.more:Third", "own_package.loop:One"):
        with pytest.raises(UserError, match="not a class derived"):
            own_class(wrong)
    for wrong in ("own_package.inner.none:Third", "own_package.base.more:Norm"):
        with pytest.raises(UserError, match="cannot import"):
            own_class(wrong)
    assert not (here / "executed").exists()
    for right in ("First", "Second", "Base"):
        found = own_class(f"own_package.inner.more:{right}")
        assert found is not None
    assert (here / "executed").exists()


def test_other_texts_are_specs() -> None:
    for spec in ("fastv", "fastv:layer=3", "fastv:layer", "a b:c", "..x:Y", ":Y", "x:", "a..b:C"):
        assert own_class(spec) is None


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import tokenprune as tp\nclass X(tp.Compressor:", r"cannot import 'own_d': .*line 2"),
        ("import none_such_module", "No module named 'none_such_module'"),
        ("1 / 0", r"failed: ZeroDivisionError: division by zero \(.*own_d\.py, line 1\)"),
        ("raise SystemExit('bye')", "failed: SystemExit: bye"),
    ],
)
def test_modules_that_fail_are_sentences(source: str, said: str, here: Path) -> None:
    defined = "\nimport tokenprune as tp\nclass X(tp.Compressor): ...\n"
    (here / "own_d.py").write_text(source + defined)
    with pytest.raises(UserError, match=said):
        own_class("own_d:X")


def test_a_plugin_registers_its_methods(here: Path) -> None:
    (here / "own_e.py").write_text(METHOD.format(name="own-e"))
    words = ["convert", "own-e-norm@0.5"]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 2
    assert "no method is called 'own-e-norm'" in refused.output
    done = CliRunner().invoke(app, [*words, "--plugin", "own_e"])
    assert done.exit_code == 0, done.output
    shown = CliRunner().invoke(app, ["list", "own-e-norm", "--plugin", "own_e"])
    assert shown.exit_code == 0, shown.output
    assert own_class("own_e:Made") is not None  # an imported module is inspected directly


@pytest.mark.parametrize("name", ["own_f.py", "./own_f", "own_g", "", "own_f.more"])
def test_plugins_that_are_not_modules_are_refused(name: str, here: Path) -> None:
    (here / "own_f.py").write_text(MARK)
    with pytest.raises(UserError, match="there is no module"):
        import_plugins([name])
    assert not (here / "executed").exists()
