"""The index of methods and model families: correct, complete and quick to read."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import tokenprune as tp
from tokenprune import catalogue
from tokenprune.compatibility import check_compatible
from tokenprune.errors import UserError
from tokenprune.registry import adapters, strategies
from tokenprune.signals import Signal


def _index(folder: str) -> dict[str, list[dict[str, object]]]:
    (where,) = importlib.import_module(f"tokenprune.{folder}").__path__
    path = Path(where) / catalogue.INDEX
    found: dict[str, list[dict[str, object]]] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _python(code: str) -> str:
    """Output of ``code`` in a new process."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("folder", "registry"),
    [("strategies", strategies), ("models", adapters)],
    ids=["strategies", "models"],
)
def test_the_index_names_what_the_files_register(folder: str, registry: object) -> None:
    """Run ``python -m tokenprune.catalogue`` after a change to a card."""
    live = {}
    for name in registry.names():  # type: ignore[attr-defined]
        cls = registry.get(name)  # type: ignore[attr-defined]
        live[name] = cls
    for entries in _index(folder).values():
        for entry in entries:
            cls = live[str(entry["name"])]
            if folder == "models":
                assert entry["hosts"] == list(cls.hosts)
                assert entry["has_language_model"] == cls.has_language_model
                continue
            signals = {signal.name for signal in cls(retention=0.25).needs}
            card = cls.card
            assert entry == {
                "name": cls.name,
                "stage": cls.stage,
                "needs": sorted(signals),
                "paper": card.paper,
                "arxiv": card.arxiv,
                "code": card.code,
                "verified": card.verified != "",
            }


def test_index_and_registry_list_the_same_names() -> None:
    names = _python("import tokenprune as tp; print(*tp.list_methods(), *tp.list_models())").split()
    ours = {name for name in strategies.names() if "tokenprune" in strategies.get(name).__module__}
    assert ours | set(adapters.names()) <= set(names)


def test_listing_imports_no_torch() -> None:
    out = _python(
        """
        import sys, time
        from typer.testing import CliRunner
        from tokenprune.cli import app
        result = CliRunner().invoke(app, ["list"])
        assert result.exit_code == 0 and "globalcom2" in result.output, result.output
        assert "LlavaNextForConditionalGeneration" in result.output
        heavy = {"torch", "transformers", "pandas", "numpy"} & set(sys.modules)
        print(*sorted(heavy), time.process_time())
        """
    )
    *heavy, seconds = out.split()
    assert heavy == []
    assert float(seconds) < 1


def test_a_file_that_is_not_in_the_index_is_imported() -> None:
    out = _python(
        """
        import tempfile, pathlib, tokenprune as tp
        import tokenprune.strategies
        with tempfile.TemporaryDirectory() as folder:
            source = "import tokenprune.strategies.uniform as u\\n"
            source += "import tokenprune as tp\\n"
            source += "@tp.register('brand-new')\\nclass New(u.Uniform):\\n    pass\\n"
            (pathlib.Path(folder) / "brand_new.py").write_text(source)
            tokenprune.strategies.__path__.append(folder)
            names = tp.list_methods()
            print("brand-new" in names, "globalcom2" in names)
        """
    )
    assert out.split() == ["True", "True"]


def test_methods_are_listed_by_property() -> None:
    every = {name: strategies.get(name) for name in tp.list_methods()}
    assert tp.list_methods("*prune*") == sorted(name for name in every if "prune" in name)
    assert tp.list_methods("nothing*") == []
    for stage in ("encoder", "pre_llm", "llm"):
        wanted = sorted(name for name, cls in every.items() if cls.stage == stage)
        assert tp.list_methods(stage=stage) == wanted  # type: ignore[arg-type]
        assert wanted
    wanted = sorted(name for name, cls in every.items() if cls.card.verified)
    assert tp.list_methods(verified=True) == wanted
    assert tp.list_methods(verified=False) == sorted(set(every) - set(wanted))
    saliency = tp.list_methods(needs="saliency")
    assert Signal("saliency") in tp.create(saliency[0], retention=0.5).needs
    assert "uniform" in tp.list_methods(needs="")
    assert not set(tp.list_methods(needs="")) & set(tp.list_methods(needs="*"))
    assert "fastv" in tp.list_methods("fast*", stage="llm", verified=True, needs="llm_*")


@pytest.mark.parametrize("family", catalogue.families(), ids=lambda family: family.name)
def test_the_table_of_families_says_what_the_models_say(family: catalogue.Family) -> None:
    """A method without an entry can be run; the sentence of a refusal names what the entry says."""
    cls: Any = adapters.get(family.name)
    if not family.has_language_model:
        assert family.refuses == {}
        return
    facts = cls(cls.tiny()).facts
    for name in strategies.names():
        method = tp.create(name, retention=0.25)
        if family.verdict(name) == "runs":
            check_compatible(facts, method)
            continue
        what = family.verdict(name).removeprefix("needs ")
        said = what if "encoder of CLIP" not in what else "CLIP and SigLIP encoders"
        with pytest.raises(UserError, match=said):
            check_compatible(facts, method)


def test_models_are_found_by_name() -> None:
    assert tp.list_models("LLaVA*") == ["LLaVA-1.5", "LLaVA-NeXT", "LLaVA-OneVision"]
    assert "timm" in tp.list_models()


def test_an_unknown_stage_is_refused() -> None:
    with pytest.raises(UserError, match="stage must be one of encoder, pre_llm, llm"):
        tp.list_methods(stage="decoder")  # type: ignore[arg-type]


def test_completion_shows_every_public_name() -> None:
    assert set(tp.__all__) <= set(dir(tp))
    out = _python("import tokenprune as tp; print(set(tp.__all__) <= set(dir(tp)))")
    assert out.strip() == "True"


def test_the_table_covers_methods_of_plug_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    strategies.names()
    monkeypatch.setattr(strategies, "_classes", dict(strategies._classes))

    @tp.register("needs-cls")
    @dataclass(frozen=True, kw_only=True)
    class NeedsCls(tp.ScoringCompressor):
        """By the attention of the CLS token."""

        card = tp.Card(paper="CLS (test)")

        @property
        def needs(self) -> frozenset[Signal]:
            return super().needs | {Signal("cls_attention", -1)}

        def score(self, tokens: tp.VisualTokens) -> Tensor:
            return tokens[Signal("cls_attention", -1)]

    found = {one.name: one.verdict("needs-cls") for one in catalogue.families_by_method()}
    assert found["LLaVA-1.5"] == found["InternVL"] == "runs"
    assert found["LLaVA-OneVision"] == "needs a CLS token"
