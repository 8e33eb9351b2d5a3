"""Names: discovery, duplicates, suggestions, entry points, notebooks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import tokenprune.strategies
from tokenprune.adapter import adapter_of
from tokenprune.compressor import Chain, Compressor, Selection
from tokenprune.engine.session import compress
from tokenprune.errors import UnknownNameError, UserError
from tokenprune.models.llava_next import LlavaNext
from tokenprune.registry import Registry, adapters, register, strategies
from tokenprune.spec import create, parse
from tokenprune.tokens import VisualTokens


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable empty package, new for every test."""
    name = f"plugins_{tmp_path.name}"
    folder = tmp_path / name
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def _registry(package: Path, group: str = "tokenprune.nothing") -> Registry[Any]:
    return Registry("strategy", package.name, group)


def test_a_file_in_the_folder_is_enough(package: Path) -> None:
    registry = _registry(package)
    holder = f"{package.name}.registry_of_the_test"
    (package / "registry_of_the_test.py").write_text("registry = None\n")
    import importlib

    importlib.import_module(holder).registry = registry
    (package / "mine.py").write_text(
        f"from {holder} import registry\nclass Mine: ...\nregistry.add('mine', Mine)\n"
    )
    (package / "_private.py").write_text("raise RuntimeError('imported')\n")
    assert registry.names() == ["mine"]
    assert registry.get("mine").__name__ == "Mine"


def test_every_file_of_the_real_folder_registers_something() -> None:
    folder = Path(tokenprune.strategies.__file__).parent
    files = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}
    modules = {strategies.get(name).__module__.rsplit(".", 1)[1] for name in strategies.names()}
    assert files == modules


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean 'globalcom2'\?.*Known: .*uniform"):
        create("globalcomm2", retention=0.5)
    with pytest.raises(UnknownNameError, match="Did you mean 'layer'"):
        create("fastv", retention=0.5, layr=3)
    with pytest.raises(UnknownNameError, match="Did you mean 'LLaVA-NeXT'"):
        adapters.get("LLaVA-Next")
    with pytest.raises(LookupError, match="no method is called 'zzz'"):
        strategies.get("zzz")


def test_a_taken_name_is_refused_and_names_both(package: Path) -> None:
    registry = _registry(package)

    class First: ...

    class Second: ...

    registry.add("mine", First)
    with pytest.raises(UserError, match=r"'mine' is taken: .*First.* before .*Second") as caught:
        registry.add("mine", Second)
    assert Path(__file__).name in str(caught.value)
    assert registry.get("mine") is First


def test_a_notebook_cell_may_run_twice(package: Path) -> None:
    registry = _registry(package)
    cell = "class Mine: ...\nregistry.add('mine', Mine)\n"
    for _ in range(2):
        exec(cell, {"registry": registry, "__name__": "a_notebook"})
    assert registry.names() == ["mine"]
    other = "class Theirs: ...\nregistry.add('mine', Theirs)\n"
    with pytest.raises(UserError, match=r"Mine \(a_notebook\)"):
        exec(other, {"registry": registry, "__name__": "a_notebook"})


def _distribution(folder: Path, group: str, entry: str) -> None:
    info = folder / "other-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{entry}\n")


def test_a_package_that_cannot_be_loaded_is_a_warning(package: Path) -> None:
    """`test_sample_package.py` tests entry points that work."""
    group = f"tokenprune.{package.name}"
    _distribution(package.parent, group, f"theirs = {package.name}_gone:Theirs")
    (package / "ours.py").touch()
    registry = _registry(package, group)
    registry.add("ours", object)
    with pytest.warns(UserWarning, match="'theirs' of other cannot be loaded.*ModuleNotFound"):
        assert registry.names() == ["ours"]


def test_an_entry_point_may_use_the_decorator_too(package: Path) -> None:
    """The method is registered while its module loads, then again as an entry point."""
    group = f"tokenprune.{package.name}"
    module = f"{package.name}_self"
    (package / "shared.py").write_text("registry = None\n")
    import importlib

    registry = _registry(package, group)
    importlib.import_module(f"{package.name}.shared").registry = registry
    (package.parent / f"{module}.py").write_text(
        f"from {package.name}.shared import registry\n"
        "class Theirs: ...\nregistry.add('theirs', Theirs)\n"
    )
    _distribution(package.parent, group, f"theirs = {module}:Theirs")
    assert registry.names() == ["theirs"]


def test_registering_one_of_your_own_does_not_hide_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    registry: Registry[Any] = Registry("strategy", strategies.package, strategies.group)
    registry.add("mine", object)
    registry._classes.update(strategies._classes)  # modules are imported once per process
    assert {"mine", "uniform"} <= set(registry.names())


def test_the_decorator_names_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(strategies._classes)
    monkeypatch.setattr(strategies, "_classes", before)

    @register("nothing-but-the-first")
    @dataclass(frozen=True, kw_only=True)
    class First(Compressor):
        def select(self, tokens: VisualTokens) -> Selection:
            return Selection(tokens.layout.patches[:1])

    assert First.name == "nothing-but-the-first"
    assert create("nothing-but-the-first", retention=0.5) == First(retention=0.5)
    assert First(retention=0.5).label == "nothing-but-the-first"


# -- specs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "fields"),
    [
        ("uniform", {}),
        ("fastv:layer=3", {"layer": 3}),
        ("globalcom2:alpha=0.3,tau=1", {"alpha": 0.3, "tau": 1.0}),
        (" random : seed = 4 ", {"seed": 4}),
        ("uniform:separators=none,position_ids=original", {"separators": "none"}),
    ],
)
def test_specs_are_read_and_typed(spec: str, fields: dict[str, Any]) -> None:
    built = parse(spec, retention=0.5)
    for name, value in fields.items():
        assert getattr(built, name) == value
        assert type(getattr(built, name)) is type(value)
    assert parse(built.label, retention=0.5) == built


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("fastv:3", "write name:option=value"),
        ("fastv:layer=two", "fastv: layer='two' is not valid"),
        ("fastv:layer=0", "fastv: layer='0' is not valid"),
        ("globalcom2:alpha=1.5", "alpha='1.5' is not valid"),
        ("globalcom2:score=norm", "score='norm' is not valid"),
        ("uniform:separators=some", "separators='some' is not valid"),
        ("fastv:allocator=topp", "Did you mean 'topk'"),
    ],
)
def test_bad_specs_are_sentences(spec: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        parse(spec, retention=0.5)


def test_a_strategy_without_retention_says_how_to_give_it() -> None:
    with pytest.raises(UserError, match=r"fastv needs a retention.*retention=0\.25"):
        create("fastv")


def test_spec_options_win_over_fields() -> None:
    assert parse("uniform:retention=0.1", retention=0.5).retention == 0.1


@pytest.mark.parametrize("spec", ["pyramiddrop:depths=0.3/0.6", "fitprune:shares=0.9/0.5/0.5"])
def test_several_values_of_one_field(spec: str) -> None:
    method = parse(spec, retention=0.3)
    assert method.label == spec
    assert parse(method.label, retention=0.3) == method
    with pytest.raises(UserError, match=r"depths=.*valid number"):
        parse("pyramiddrop:depths=0.3/x", retention=0.3)


def test_label_of_a_chain_names_its_parts() -> None:
    chain = Chain.of(create("uniform", retention=0.5), create("fastv", retention=0.2, layer=3))
    assert chain.label == "uniform@0.5 + fastv:layer=3@0.2"


# -- models --------------------------------------------------------------------------------------


def test_adapter_is_found_by_a_parent_class() -> None:
    model = LlavaNext.tiny()
    model.__class__ = type("Mine", (type(model),), {})
    assert isinstance(adapter_of(model), LlavaNext)


def test_a_model_without_an_adapter_is_a_sentence() -> None:
    from torch import nn

    with (
        pytest.raises(UnknownNameError, match=r"no model class with an adapter is called 'Linear'"),
        compress(nn.Linear(1, 1), "uniform", retention=0.5),
    ):
        pass


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("fastv:layer=4", "cuts in front of decoder layer 4; this model has layers 0 to 3"),
        ("globalcom2:layer=3", "asks for layer 3 of the vision encoder, which has 3"),
    ],
)
def test_what_the_model_lacks_is_refused_before_it_runs(spec: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence), compress(LlavaNext.tiny(), spec, retention=0.5):
        pass


def test_an_encoder_without_cls_is_refused_with_an_alternative(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, facts = LlavaNext.tiny(), LlavaNext.vision_facts
    monkeypatch.setattr(LlavaNext, "vision_facts", lambda self: replace(facts(self), has_cls=False))
    with (
        pytest.raises(UserError, match=r"needs the attention of a CLS token.*fastv.*uniform"),
        compress(model, "globalcom2:score=cls_attention", retention=0.5),
    ):
        pass


def test_fields_need_a_name() -> None:
    ready = create("uniform", retention=0.5)
    with (
        pytest.raises(UserError, match=r"\['retention'\] need a method's name"),
        compress(LlavaNext.tiny(), ready, retention=0.2),
    ):
        pass


def test_specs_with_their_own_retention_and_chains() -> None:
    assert parse("uniform@0.3") == create("uniform", retention=0.3)
    assert parse("fastv:layer=3@0.5") == create("fastv", retention=0.5, layer=3)
    chain = parse("globalcom2:tau=5@0.5 + fastv:layer=3@0.4")
    assert isinstance(chain, Chain)
    assert chain.retention == pytest.approx(0.2)
    assert parse(chain.label) == chain
    for spec, said in [
        ("globalcom2 + fastv@0.5", "write for instance globalcom2@0.5"),
        ("fastv@0.5 + globalcom2@0.5", "at most one pre_llm method followed by llm"),
        ("uniform@1.5", "retention must be larger than 0"),
        ("uniform@", "retention"),
        ("unifrom@0.5 + fastv@0.5", "Did you mean 'uniform'"),
    ]:
        with pytest.raises(UserError, match=said):
            parse(spec)
    with pytest.raises(UserError, match=r"has the retention 0\.3 in its spec and 0\.5"):
        parse("uniform@0.3", retention=0.5)
    with pytest.raises(UserError, match="has its own retention and options"):
        parse("uniform@0.3 + fastv@0.5", retention=0.5)
