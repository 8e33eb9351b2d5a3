"""The package and its four folders: installed files, links and imports."""

from __future__ import annotations

import importlib
import os
import pickle
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from places import ROOT

import tokenprune as tp

LINKS = ("strategies", "models", "experiments")

checkout = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").exists(), reason="needs the checkout, not the wheel"
)


def _project() -> dict[str, object]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)


def _folder(package: str) -> str:
    """Folder of a package in the checkout."""
    inside = package.removeprefix("tokenprune.")
    return inside.replace(".", "/") if inside.startswith(LINKS) else package.replace(".", "/")


@checkout
def test_every_package_on_disk_is_listed() -> None:
    """A package that is not listed is importable in a checkout and absent from the wheel."""
    setup: dict = _project()["tool"]["setuptools"]  # type: ignore[index,type-arg]
    found = {"tokenprune"}
    for name in LINKS:
        for init in (ROOT / name).rglob("__init__.py"):
            found.add("tokenprune." + ".".join(init.parent.relative_to(ROOT).parts))
    for init in (ROOT / "tokenprune").glob("*/__init__.py"):
        found.add(f"tokenprune.{init.parent.name}")
    assert set(setup["packages"]) == found
    assert setup["package-dir"] == {
        "tokenprune": "tokenprune",
        **{f"tokenprune.{name}": name for name in LINKS},
    }


@checkout
def test_every_data_file_is_listed() -> None:
    """Weights, templates and all other files of a package that are not Python files."""
    setup: dict = _project()["tool"]["setuptools"]  # type: ignore[index,type-arg]
    places = {package: ROOT / _folder(package) for package in setup["packages"]}
    for package, folder in places.items():
        listed = {
            path
            for pattern in setup["package-data"].get(package, [])
            for path in folder.glob(pattern)
        }
        nested = {other for name, other in places.items() if name != package}
        for path in folder.rglob("*"):
            inside = any(parent in nested for parent in path.parents if parent != folder)
            skip = path.suffix in {".py", ".pyc", ".md"} or not path.is_file()
            skip = skip or path in {ROOT / "tokenprune" / name for name in LINKS}
            if not (skip or inside or any(parent.is_symlink() for parent in path.parents)):
                assert path in listed, f"{path.relative_to(ROOT)} would be missing from the wheel"


@checkout
@pytest.mark.parametrize("name", LINKS)
def test_the_links_are_committed_as_links(name: str) -> None:
    """The links are for editors; without symbolic links, git writes them as text files."""
    link = ROOT / "tokenprune" / name
    points_to = os.readlink(link) if link.is_symlink() else link.read_text(encoding="utf-8")
    assert points_to == f"../{name}"
    listed = subprocess.run(
        ["git", "ls-files", "-s", f"tokenprune/{name}"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode == 0 and listed.stdout:
        assert listed.stdout.startswith("120000"), "git holds a copy instead of a link"


@checkout
@pytest.mark.parametrize("name", LINKS)
def test_a_folder_is_not_importable_by_its_bare_name(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the root of a checkout ``import strategies`` would register everything twice."""
    monkeypatch.syspath_prepend(ROOT)
    with pytest.raises(ImportError, match=f"its name is 'tokenprune.{name}'"):
        importlib.import_module(name)
    assert name not in sys.modules


@pytest.mark.parametrize("name", LINKS)
def test_the_right_name_works(name: str) -> None:
    assert importlib.import_module(f"tokenprune.{name}").__name__ == f"tokenprune.{name}"


def test_no_file_shadows_the_standard_library() -> None:
    for name in LINKS:
        (folder,) = importlib.import_module(f"tokenprune.{name}").__path__
        for path in Path(folder).rglob("*.py"):
            assert path.stem not in sys.stdlib_module_names, f"{path} shadows a standard module"


def test_import_is_light() -> None:
    """``import tokenprune`` and ``--help`` must not import torch."""
    code = (
        "import sys, tokenprune; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_contract_needs_no_pytest() -> None:
    code = "import sys; sys.modules['pytest'] = None; import tokenprune.testing"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_public_names_exist() -> None:
    for name in tp.__all__:
        assert getattr(tp, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        tp.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_a_strategy_pickles_under_its_public_name() -> None:
    for name in tp.list_methods():
        method = tp.create(name, retention=0.5)
        assert type(method).__module__.startswith("tokenprune.strategies.")
        assert pickle.loads(pickle.dumps(method)) == method


@checkout
def test_strategies_do_not_know_transformers() -> None:
    """The core never imports a method or a model; methods never import transformers."""
    for path in (ROOT / "strategies").rglob("*.py"):
        text = path.read_text()
        assert "import transformers" not in text, path
        assert "from transformers" not in text, path
        assert "tokenprune.models" not in text, path
    for path in (ROOT / "tokenprune").glob("*.py"):
        if path.stem not in {"cli", "golden", "registry", "__main__", "__init__", "testing"}:
            text = path.read_text().split("if TYPE_CHECKING:")
            for package in ("strategies", "experiments"):
                assert f"from tokenprune.{package}" not in text[0], path


@checkout
def test_the_citation_is_of_this_version() -> None:
    fields = dict(
        line.split(": ", 1)
        for line in (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
        if re.match(r"[a-z-]+: ", line)
    )
    assert fields["version"] == tp.__version__
    assert fields["license"] == _project()["project"]["license"]  # type: ignore[index]
    assert fields["title"].strip('"').startswith(f"{tp.__name__}:")
