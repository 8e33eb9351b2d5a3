"""Old names work for one release, and each warns with the new one."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import pytest
import torch
from PIL import Image

import tokenprune as tp
from tokenprune.compressor import Chain, Compressor, Selection
from tokenprune.deprecated import MODULES, MOVED, renamed_arguments
from tokenprune.models.llava_next import LlavaNext
from tokenprune.tokens import VisualTokens


def _name(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"tokenprune.{module}"), name)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (("primitives", "top_per_view"), ("ops.ranking", "top_per_view")),
        (("primitives", "evenly_spaced"), ("ops.spatial", "evenly_spaced")),
        (("primitives", "dpp_greedy_map"), ("ops.diversity", "dpp_greedy_map")),
        (("primitives", "density_peaks"), ("ops.clustering", "density_peaks")),
        (("primitives", "merge_weighted"), ("ops.merging", "merge_weighted")),
        (("models.adapter", "Adapter"), ("adapter", "Adapter")),
        (("models.adapter", "load"), ("models.loading", "load")),
        (("terminal", "percent"), ("units", "percent")),
        (("terminal", "ratios"), ("spec", "ratios")),
        (("ledger", "Ledger"), ("cost.ledger", "Ledger")),
        (("ledger", "DecoderShape"), ("cost.arithmetic", "DecoderShape")),
        (("engine", "compress"), ("engine.session", "compress")),
        (("engine", "Trace"), ("engine.trace", "Trace")),
        (("engine", "Chosen"), ("engine.trace", "SelectionRecord")),
        (("engine", "adapter_of"), ("adapter", "adapter_of")),
        (("compressor", "parse"), ("spec", "parse")),
        (("compressor", "create"), ("spec", "create")),
        (("budget", "ThumbnailCommand"), ("allocators", "ThumbnailCommand")),
        (("budget", "Allocator"), ("allocators", "Allocator")),
        (("tokens", "Kind"), ("layout", "Kind")),
    ],
)
def test_an_old_module_gives_the_new_one(old: tuple[str, str], new: tuple[str, str]) -> None:
    wanted = rf"tokenprune\.{old[0]}\.{old[1]} is now tokenprune\.{new[0]}\.{new[1]}"
    with pytest.warns(DeprecationWarning, match=wanted) as caught:
        found = _name(*old)
    assert found is _name(*new)
    assert caught[0].filename == __file__


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_old_name_still_works() -> None:
    for old, places in MODULES.items():
        importlib.import_module(f"tokenprune.{old}")
        for place in places:
            importlib.import_module(f"tokenprune.{place}")
    for old, names in MOVED.items():
        for name in names:
            assert _name(old, name) is not None
    for name in ("Signal", "TokenLayout", "VisualTokens"):
        assert _name("tokens", name) is getattr(tp, name)
    assert _name("testing", "check_compressor") is not None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_unknown_name_is_an_error() -> None:
    for module in ("primitives", "tokens", "engine", "compressor"):
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _name(module, "nothing")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("tokenprune.nothing")


def test_available_is_list_methods() -> None:
    with pytest.warns(DeprecationWarning, match=r"list_methods\(\)"):
        assert tp.available() == tp.list_methods()


def test_the_option_positions_is_position_ids() -> None:
    wanted = tp.create("uniform", retention=0.5, position_ids="original")
    uniform: Any = type(wanted)
    for old in (
        lambda: tp.create("uniform", retention=0.5, positions="original"),
        lambda: tp.parse("uniform:positions=original@0.5"),
        lambda: uniform(retention=0.5, positions="original"),
        lambda: replace(tp.create("uniform", retention=0.5), positions="original"),
    ):
        with pytest.warns(DeprecationWarning, match="positions= is now position_ids="):
            assert old() == wanted
    with pytest.warns(DeprecationWarning, match=r"Uniform\.positions is now Uniform\.position_ids"):
        assert wanted.positions == "original"


def test_a_plugin_with_old_names_works() -> None:
    with pytest.warns(DeprecationWarning, match="is now") as caught:

        @dataclass(frozen=True, kw_only=True)
        class Old(Compressor):
            positional = True
            positions: Literal["auto", "compact", "original"] = "original"

            def stages(self) -> Iterator[Compressor]:
                yield from (self, self)

            def select(self, tokens: VisualTokens) -> Selection:
                return Selection(tokens.layout.patches[:1])

    said = {str(one.message).partition(";")[0] for one in caught}
    assert said == {
        "Old.positional is now Old.location_aware",
        "Old.positions is now Old.position_ids",
        "Old.stages is now Old.parts",
    }
    made = Old(retention=0.5)
    assert made.location_aware
    assert made.position_ids == "original"
    assert made.keeps_positions
    assert list(made.parts()) == [made, made]
    with pytest.warns(DeprecationWarning, match="location_aware"):
        assert made.positional


def test_new_names_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        @dataclass(frozen=True, kw_only=True)
        class New(Compressor):
            location_aware: ClassVar[bool] = True

            def select(self, tokens: VisualTokens) -> Selection:
                return Selection(tokens.layout.patches[:1])

        chain = Chain.of(New(retention=0.5), tp.create("fastv", retention=0.5))
        assert [part.retention for part in chain.parts()] == [0.5, 0.5]
        assert [part.retention for part in chain.members] == [0.5, 0.5]


def test_the_parts_of_a_chain_were_a_tuple() -> None:
    first, second = tp.create("uniform", retention=0.5), tp.create("fastv", retention=0.5)
    parts: Any = Chain.of(first, second).parts
    for old in (lambda: list(parts), lambda: [parts[0], parts[1]]):
        with pytest.warns(DeprecationWarning, match=r"Chain\.parts is now Chain\.members"):
            assert old() == [first, second]
    with pytest.warns(DeprecationWarning, match=r"Chain\.members"):
        assert len(parts) == 2
    with pytest.warns(DeprecationWarning, match=r"Compressor|Chain\.stages is now Chain\.parts"):
        assert list(Chain.of(first, second).stages()) == [first, second]


def test_compress_takes_given() -> None:
    model = LlavaNext.tiny()
    signals = {tp.Signal("clip_patches"), tp.Signal("clip_text")}
    old: Any = tp.compress
    with (
        pytest.warns(DeprecationWarning, match="given= is now extra_signals="),
        old(model, "cdpruner", retention=0.5, given=signals),
    ):
        pass
    assert torch.is_grad_enabled()


def test_layout_takes_together() -> None:
    adapter: Any = tp.adapter.adapter_of(LlavaNext.tiny())
    with pytest.warns(DeprecationWarning, match="together= is now same_prompt="):
        old = adapter.layout((40, 40), together=True)
    assert torch.equal(old.view, adapter.layout((40, 40), same_prompt=True).view)


def test_encode_and_assemble_take_together_and_blind() -> None:
    pipe: Any = tp.load("testbed-next")
    image = Image.new("RGB", (60, 40))
    with pytest.warns(DeprecationWarning, match="together= is now same_prompt="):
        encoded = pipe.encode([image, image], together=True)
    with pytest.warns(DeprecationWarning, match="blind= is now without_images="):
        old = pipe.assemble([encoded], ["What is it?"], blind=True)
    new = pipe.assemble([encoded], ["What is it?"], without_images=True)
    assert old.keys() == new.keys()
    assert torch.equal(old["input_ids"], new["input_ids"])


def test_a_function_with_the_old_argument_takes_the_new_one() -> None:
    """As the method of an adapter that was written for the release before."""

    def layout(size: int, *, together: bool = False) -> tuple[int, bool]:
        return size, together

    with pytest.warns(DeprecationWarning, match="together of .*layout is now same_prompt"):
        renamed: Any = renamed_arguments(together="same_prompt")(layout)
    assert renamed(1, same_prompt=True) == (1, True)
    assert renamed(1, together=True) == (1, True)
    assert renamed(1) == (1, False)


def test_warnings_point_to_the_line_that_uses_the_old_name() -> None:
    """Python shows them only if that line is in the user's own script."""
    images = [Image.new("RGB", (30, 20))]
    pipe = tp.load("testbed-next")
    uses: list[Callable[[], object]] = [
        lambda: tp.parse("fastv:positions=compact", retention=0.5),
        lambda: tp.create("fastv", positions="compact", retention=0.5),
        lambda: tp.available(),
        lambda: pipe.choose("uniform", images, retention=0.5),
        lambda: pipe.adapter.layout((20, 30), together=True),
        lambda: importlib.import_module("tokenprune.budget").ThumbnailCommand,
        lambda: next(iter(tp.create("fastv", retention=0.5).stages())),
    ]
    for use in uses:
        with pytest.warns(DeprecationWarning, match="now|deprecated") as caught:
            use()
        assert {one.filename for one in caught} == {__file__}
