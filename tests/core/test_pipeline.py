"""The pipeline against the same steps with transformers alone."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import tokenprune as tp
from tokenprune.adapter import adapter_of
from tokenprune.errors import UserError
from tokenprune.forecast import forecast
from tokenprune.models import testbed
from tokenprune.models.testbed.scenes import questions
from tokenprune.pipeline import Pipeline

pytestmark = pytest.mark.skipif(
    not {"testbed-next", "testbed-onevision"} <= set(testbed.names()), reason="no testbeds"
)

ITEMS = questions(3, seed=3)
OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def plain() -> tuple[Any, Any]:
    """Model and processor as transformers loads them."""
    folder = testbed.path("testbed-next")
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    return model.eval(), processor


@pytest.fixture(scope="module")
def pipe(plain: tuple[Any, Any]) -> Pipeline:
    return Pipeline(*plain)


def _messages(image: Image.Image, question: str) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def _answer(plain: tuple[Any, Any], image: Image.Image, question: str) -> str:
    """The answer by transformers alone."""
    model, processor = plain
    inputs = processor.apply_chat_template(
        _messages(image, question),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    ids = model.generate(**inputs, **OPTIONS)[:, inputs["input_ids"].shape[1] :]
    text: str = processor.batch_decode(ids, skip_special_tokens=True)[0]
    return text.strip()


@pytest.mark.parametrize("spec", [None, "globalcom2@0.25", "fastv@0.25"])
def test_answers_are_those_of_transformers(
    plain: tuple[Any, Any], pipe: Pipeline, spec: str | None
) -> None:
    """One question or several; also inside a context, which takes the pipeline like the model."""
    with tp.compress(pipe, spec and tp.parse(spec)) as trace:
        expected = [_answer(plain, item.image, item.question) for item in ITEMS]
        want = trace.ledger
        answers = [pipe(images=item.image, text=item.question, **OPTIONS) for item in ITEMS]
        assert trace.ledger == want
        together = pipe(
            images=[item.image for item in ITEMS],
            text=[item.question for item in ITEMS],
            **OPTIONS,
        )
        assert len(trace.ledgers) == len(ITEMS)
    assert answers == together == expected
    assert all(expected)


@pytest.mark.parametrize("spec", ["globalcom2@0.25", "fastv@0.25"])
def test_the_pipeline_of_transformers_is_compressed(plain: tuple[Any, Any], spec: str) -> None:
    model, processor = plain
    chat = transformers.pipeline("image-text-to-text", model=model, processor=processor)
    with tp.compress(model, tp.parse(spec)) as trace:
        for item in ITEMS:
            expected = _answer(plain, item.image, item.question)
            want = trace.ledger
            (said,) = chat(
                text=_messages(item.image, item.question),
                return_full_text=False,
                generate_kwargs=OPTIONS,
            )
            assert said["generated_text"].strip() == expected
            assert trace.ledger == want
            assert trace.ledger.realised <= 0.6


def test_images_of_every_kind(pipe: Pipeline, tmp_path: Path) -> None:
    item = ITEMS[0]
    pixels = np.array(item.image)
    path, file = tmp_path / "photo.png", io.BytesIO()
    item.image.save(path)
    item.image.save(file, format="png")
    shown = [item.image, path, str(path), file, pixels, torch.from_numpy(pixels).permute(2, 0, 1)]
    answers = [pipe(images=one, text=item.question, **OPTIONS) for one in shown]
    assert len({*answers}) == 1
    assert pipe(images=[item.image], text=item.question, **OPTIONS) == answers[0]
    blank = np.zeros_like(pixels)
    assert pipe(images=blank, text="Is there a red square?", **OPTIONS) != ""


def test_several_images_a_video_and_no_image() -> None:
    pipe = tp.load("testbed-onevision")
    frames = [item.image for item in questions(4, seed=1)]
    for images, videos in ((frames[:2], None), (None, frames), (None, None)):
        inputs = pipe.prepare([images or []], ["What is there?"], [[videos]] if videos else None)
        expected = pipe.decode(pipe.model.generate(**inputs, **OPTIONS), inputs)
        assert [pipe(images, "What is there?", videos, **OPTIONS)] == expected


def test_options_of_generate_are_passed_on(pipe: Pipeline) -> None:
    item = ITEMS[0]
    inputs = pipe.prepare([item.image], [item.question])
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "num_beams": 2}
    expected = pipe.decode(pipe.model.generate(**inputs, **options), inputs)
    assert [pipe(item.image, item.question, **options)] == expected


def test_a_pipeline_stands_for_its_model(pipe: Pipeline) -> None:
    assert adapter_of(pipe) is pipe.adapter
    assert pipe.model is pipe.adapter.model
    wrapped = torch.nn.DataParallel(pipe.model)
    assert Pipeline(wrapped, pipe.processor).adapter.model is pipe.model
    assert "LlavaNext" in repr(pipe)
    layouts = [pipe.adapter.layout((112, 112))]
    method = tp.create("fastv", retention=0.5)
    assert forecast(pipe, method, layouts).ledger == forecast(pipe.model, method, layouts).ledger
    assert copy.copy(pipe).model is pipe.model


def test_invalid_questions_are_refused(pipe: Pipeline) -> None:
    with pytest.raises(UserError, match="there is no question"):
        pipe(images=ITEMS[0].image)
    with pytest.raises(UserError, match="images must be a list of images"):
        pipe(images=ITEMS[0].image, text=["one", "two"])
    with pytest.raises(UserError, match="2 image lists for 1 prompts"):
        pipe(images=[ITEMS[0].image] * 2, text=["one"])
    with pytest.raises(UserError, match="takes images only"):
        pipe(videos=[ITEMS[0].image] * 2, text="one")
    long = "word " * 5000
    with pytest.raises(UserError, match="4096 positions"):
        pipe(text=long)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = pipe.no_such_thing


def test_the_former_interface_works_with_a_warning(pipe: Pipeline) -> None:
    image = ITEMS[0].image
    size = image.size[::-1]
    with pytest.warns(DeprecationWarning, match=r"use pipe\.adapter\.layout"):
        former = pipe.layout(size)
    assert len(former) == len(pipe.adapter.layout(size))
    with pytest.warns(DeprecationWarning, match=r"\.choose is deprecated.*use pipe\.select"):
        (record,) = pipe.choose("uniform", [image], retention=0.5)
    with pytest.warns(DeprecationWarning, match="facts.placeholders"):
        assert pipe.placeholders == pipe.adapter.facts.placeholders
    with pytest.warns(DeprecationWarning, match="without_images"):
        pipe.assemble([[]], ["one"], blind=True)  # type: ignore[call-arg]
    (wanted,) = pipe.select("uniform", [image], retention=0.5)
    assert torch.equal(record.keep, wanted.keep)
