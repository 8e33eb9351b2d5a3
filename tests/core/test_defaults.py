"""What a method keeps depends neither on PyTorch's default dtype nor on its default device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

import tokenprune as tp
from tokenprune.compressor import Compressor, Selection
from tokenprune.engine.tower import dry_run
from tokenprune.experiments.crop_importance.run import DropCrop
from tokenprune.layout import TokenLayout
from tokenprune.signals import Signal
from tokenprune.spec import parse
from tokenprune.synthetic import sample_tokens
from tokenprune.testing.host import Host

pytestmark = pytest.mark.filterwarnings("ignore::tokenprune.errors.RetentionWarning")

SPECS = [
    *tp.list_methods(),
    *("uniform:pattern=dispersed", "fastv:allocator=globalcom2", "feature-norm:allocator=max"),
    *("sparsevlm:version=2.0", "prumerge:adaptive=true", "cdpruner:relevance=text"),
]
DEFAULTS = [torch.float64, torch.bfloat16, torch.float16, "meta"]


@contextmanager
def default(value: torch.dtype | str) -> Iterator[None]:
    """A default dtype, or a default device: on ``meta`` nothing can be computed by mistake."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    if isinstance(value, str):
        torch.set_default_device(value)
    else:
        torch.set_default_dtype(value)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(None if device.type == "cpu" else device)


def _layouts() -> dict[str, TokenLayout]:
    return {
        "image": TokenLayout.anyres((2, 2), (4, 4), (1, 7, 0, 8)),
        "single": TokenLayout.single((4, 4)),
        "video": TokenLayout.video(5, (4, 4)),
    }


def _chosen(spec: str) -> list[Selection]:
    """The tokens that every cut of a method keeps, of synthetic images and a video."""
    method = parse(spec, retention=0.4)
    steps: list[Compressor] = [method.at(cut) for cut in method.cuts[:2]] or [method]
    return [
        part(sample_tokens(part.needs, layout)) for part in steps for layout in _layouts().values()
    ]


@pytest.mark.parametrize("spec", SPECS)
def test_methods_keep_the_same_whatever_the_defaults(spec: str) -> None:
    expected = _chosen(spec)
    for value in DEFAULTS:
        with default(value):
            found = _chosen(spec)
        for one, other in zip(found, expected, strict=True):
            assert one.keep.tolist() == other.keep.tolist(), value
            assert (one.features is None) == (other.features is None)
            if one.features is not None and other.features is not None:
                assert one.features.dtype == other.features.dtype
                assert torch.equal(one.features, other.features)


def _entries(layout: TokenLayout) -> list[Tensor]:
    return [getattr(layout, item.name) for item in fields(layout) if item.type == "Tensor"]


@pytest.mark.parametrize("value", DEFAULTS)
def test_synthetic_tokens_do_not_depend_on_the_defaults(value: Any) -> None:
    pipe = tp.load("testbed-next")
    tome, layout = tp.create("tome", retention=0.5), pipe.adapter.layout((112, 112))
    dropper = DropCrop(which="random", signal=Signal("cls_logits"), seed=3)

    def made() -> list[Tensor]:
        tokens = sample_tokens(frozenset({Signal("cls_logits")}), _layouts()["image"])
        pixels = pipe.adapter.dummy_images([(112, 112)])["pixel_values"]
        tower = dry_run(pipe.adapter, tome, layout)
        own = [tokens.features, tokens.signals[Signal("cls_logits")], pixels, *tower.groups]
        return [*own, torch.tensor([dropper.crop(tokens) or 0], device="cpu")]

    expected, layouts = made(), _layouts()
    with default(value):
        found = made()
        for name, one in _layouts().items():
            for mine, theirs in zip(_entries(one), _entries(layouts[name]), strict=True):
                assert torch.equal(mine, theirs)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


@pytest.fixture(scope="module")
def host() -> Host:
    return Host.tiny("LLaVA-NeXT", "llama")


@pytest.mark.parametrize("value", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("spec", ["random", "globalcom2", "fastv", "pyramiddrop", "dart", "tome"])
def test_in_a_model(host: Host, spec: str, value: torch.dtype) -> None:
    def kept() -> list[list[int]]:
        with tp.compress(host.model, parse(spec, retention=0.4)) as trace, torch.no_grad():
            host.model(**host.inputs())
        return [chosen.keep.tolist() for chosen in trace.selections]

    expected = kept()
    with default(value):
        assert kept() == expected
