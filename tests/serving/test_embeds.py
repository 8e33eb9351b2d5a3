"""What a server receives, against what `tokenprune.compress` puts in front of the decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processors import tiny_pipeline
from torch import Tensor

import tokenprune as tp
from tokenprune import serving
from tokenprune.errors import UserError
from tokenprune.models.testbed.scenes import questions
from tokenprune.pipeline import Pipeline

pytestmark = pytest.mark.filterwarnings("ignore::tokenprune.errors.RetentionWarning")

SELECTED = ("globalcom2@0.25", "uniform:separators=none@0.4", "divprune:separators=rows@0.1")
MERGED = ("spatial-pool@0.25", "tome@0.25", "downsample@0.5", "tome@0.5 + globalcom2@0.5")
WITH_CLS = ("visionzip@0.25", "prumerge+@0.25", "hired@0.25")
BEDS = ("testbed-next", "testbed-onevision")


@cache
def _pipe(name: str) -> Pipeline:
    """A testbed, perhaps in another dtype, or a tiny model."""
    bed, _, dtype = name.partition(":")
    return tp.load(bed, dtype=dtype or "auto") if bed in BEDS else tiny_pipeline(name)


def _images(count: int, seed: int = 0) -> list[Image.Image]:
    """Noise of unlike sizes."""
    draw, sizes = np.random.default_rng(seed), ((90, 120), (112, 112), (40, 130), (150, 64))
    return [
        Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes[:count]
    ]


def _entering(pipe: Pipeline, spec: str, prepare: Callable[[], Any]) -> list[Tensor]:
    """What enters the first decoder layer under `tp.compress`, (S, D) for each prompt."""
    seen: list[Tensor] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    inputs = prepare()
    with tp.compress(pipe, spec) as trace, torch.no_grad():
        # Registered last, so that it runs after the hooks of the context.
        layer = pipe.adapter.decoder_layers[0]
        handle = layer.register_forward_pre_hook(note, with_kwargs=True)
        pipe.model(**inputs)
        handle.remove()
    lengths = [ledger.tokens_per_layer[0] for ledger in trace.ledgers]
    return [row[-length:] for row, length in zip(seen[0], lengths, strict=True)]


def _assert_same(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    assert [len(one) for one in found] == [len(one) for one in wanted]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def _cases() -> list[tuple[str, str]]:
    each = {
        "testbed-next": SELECTED + MERGED + WITH_CLS,
        "testbed-next:bfloat16": ("visionzip@0.25",),
        "testbed-onevision": SELECTED + MERGED,
        "LLaVA-1.5": (*SELECTED[:2], *MERGED[2:], *WITH_CLS),
        "InternVL": (SELECTED[0], "spatial-pool@0.25"),
    }
    return [(name, spec) for name, specs in each.items() for spec in specs]


@pytest.mark.parametrize(("name", "spec"), _cases())
def test_features_are_those_in_front_of_the_decoder(name: str, spec: str) -> None:
    """A ragged batch: images of unlike sizes, texts in front of and after them, one without."""
    pipe, images = _pipe(name), _images(3)
    word = "" if name.startswith(BEDS) else "w7 "
    texts = [f"{word}<image>\nw9", f"{word}<image>\nw9 w10 w11", f"{word}<image>\nw8 w5", "w9 w7"]
    shown = [[image] for image in images] + [[]]
    wanted = _entering(pipe, spec, lambda: pipe.prepare(shown, texts))
    _assert_same(serving.prompt_embeds(pipe, shown, texts, spec), wanted)
    features = serving.image_embeds(pipe, images, spec)
    placeholder = pipe.adapter.facts.placeholders["image"]
    for row, kept, image, text in zip(wanted, features, images, texts, strict=False):
        ids = pipe.prepare([image], [text])["input_ids"][0]
        before = int((ids == placeholder).nonzero()[0])
        _assert_same([kept], [row[before : before + len(kept)]])
        assert len(row) == len(kept) + int((ids != placeholder).sum())


@pytest.mark.parametrize("spec", ["globalcom2@0.3", "spatial-pool@0.3", "tome@0.3"])
def test_several_images_and_videos_of_a_prompt(spec: str) -> None:
    pipe, images = _pipe("testbed-onevision"), _images(4)
    video = np.random.default_rng(5).integers(0, 256, (3, 56, 56, 3), dtype=np.uint8)
    texts = ["What is this?", "How many?", "What moves?"]
    shown: list[list[Any]] = [images[:2], images[2:3], images[3:]]
    videos = [[], [], [video]]
    wanted = _entering(pipe, spec, lambda: pipe.prepare(shown, texts, videos))
    _assert_same(serving.prompt_embeds(pipe, shown, texts, spec, videos=videos), wanted)
    together = serving.image_embeds(pipe, images[:2], spec, same_prompt=True)
    alone = serving.image_embeds(pipe, images[:2], spec)
    # Two placeholders in the text, which stand for the two images.
    ids = pipe.processor.tokenizer(pipe.prompt(texts[0], 2))["input_ids"]
    assert len(wanted[0]) == len(ids) - 2 + sum(map(len, together))
    assert [*map(len, alone)] != [*map(len, together)]  # alone, an image has crops


def _answers(pipe: Pipeline, prompts: Sequence[Tensor]) -> Tensor:
    """(B, new) ids of plain generation from embeddings, padded on the left."""
    width = max(map(len, prompts))
    embeds = torch.stack(
        [torch.nn.functional.pad(one, (0, 0, width - len(one), 0)) for one in prompts]
    )
    mask = torch.stack([torch.arange(width) >= width - len(one) for one in prompts])
    ids: Tensor = pipe.model.generate(
        inputs_embeds=embeds, attention_mask=mask.long(), max_new_tokens=5, do_sample=False
    )
    return ids


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        *((bed, spec) for bed in BEDS for spec in ("globalcom2@0.25", "tome@0.25")),
        ("testbed-next", "visionzip@0.25"),
        ("testbed-onevision", "spatial-pool@0.25"),
        ("LLaVA-1.5", "prumerge+@0.25"),
        ("InternVL", "uniform@0.25"),
    ],
)
def test_answers_are_those_under_compress(name: str, spec: str) -> None:
    pipe = _pipe(name)
    items = questions(5, seed=11)
    texts = [item.question for item in items] + ["Hello there, how are you?"]
    if name not in BEDS:
        texts = [f"<image> w9 w{index + 10}" for index in range(5)] + ["w6 w9"]
    shown = [[item.image] for item in items[:3]] + [[image] for image in _images(2)] + [[]]
    prompts = serving.prompt_embeds(pipe, shown, texts, spec)
    inputs = pipe.prepare(shown, texts)
    with tp.compress(pipe, spec):
        ids = pipe.model.generate(**inputs, max_new_tokens=5, do_sample=False)
    wanted = ids[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(_answers(pipe, prompts), wanted)


def test_what_a_server_cannot_take_is_a_sentence() -> None:
    pipe, image = _pipe("testbed-onevision"), _images(1)[0]
    video = np.zeros((2, 8, 8, 3), np.uint8)
    for entry in (video, [image, image]):
        with pytest.raises(UserError, match=r"entry 1 of the images is a list or a video"):
            serving.image_embeds(pipe, [image, entry], "uniform@0.5")
    with pytest.raises(UserError, match=r"fastv drops tokens between decoder layers"):
        serving.image_embeds(pipe, [image], "fastv", retention=0.5)
    with pytest.raises(UserError, match=r"leave out retention=0\.5"):
        serving.image_embeds(pipe, [image], tp.parse("uniform@0.5"), retention=0.5)
    with pytest.raises(UserError, match=r"a compressed prompt has .* tokens"):
        serving.prompt_embeds(pipe, [image], ["? " * 4096], "uniform@0.5")
    with pytest.raises(UserError, match="takes images only"):
        serving.prompt_embeds(_pipe("testbed-next"), [[]], ["?"], "uniform@0.5", videos=[video])
    assert serving.image_embeds(pipe, [], "uniform@0.5") == []
