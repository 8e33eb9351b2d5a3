"""What runs inside lmms-eval, without lmms-eval: prompts, answers, likelihoods and records."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tokenprune as tp
from tokenprune.errors import UserError
from tokenprune.experiments.common.questions import held_out
from tokenprune.experiments.lmms.answering import (
    Answerer,
    Message,
    batches,
    compressor_of,
    generation,
    messages_of,
    talk_of,
)
from tokenprune.experiments.lmms.manifests import MODELS
from tokenprune.pipeline import Pipeline

GREEDY, _ = generation({"max_new_tokens": 4, "temperature": 0})
ASKED = held_out(6, 0)


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return tp.load("testbed-next")


def asked(pipe: Pipeline, count: int = 6) -> list[Any]:
    """Prompts of the first held-out questions."""
    return [
        talk_of(pipe, messages_of(item.question, [item.images[0].open()])) for item in ASKED[:count]
    ]


def test_a_spec_and_its_options_make_a_method() -> None:
    made = tp.create("fastv", layer=3, retention=0.25)
    assert compressor_of("fastv:layer=3", 0.25) == made
    assert compressor_of("fastv", 0.25, {"layer": 3}) == made
    assert compressor_of("'fastv:layer=3@0.25'") == made
    assert compressor_of("none") is compressor_of("none", 1) is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("none", 0.5), "leave out retention"),
        (("none", None, {"layer": 3}), "leave out layer"),
        (("fastv",), "needs a retention"),
        (("fastv", 0.5, {"layers": 3}), "layer"),
        (("fastvv", 0.5), "fastv"),
    ],
)
def test_bad_model_arguments_are_refused(arguments: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        compressor_of(*arguments)


def test_decoding_is_greedy_unless_a_temperature_is_given() -> None:
    greedy, ends = generation({"temperature": 0, "top_p": 1.0, "until": "\n\n"})
    assert (greedy["do_sample"], greedy["temperature"], greedy["top_p"]) == (False, None, None)
    assert (greedy["max_new_tokens"], ends) == (1024, ("\n\n",))
    drawn, ends = generation({"temperature": 0.7, "top_p": 0.9, "num_beams": 2, "until": ["", "a"]})
    assert (drawn["do_sample"], drawn["temperature"], drawn["top_p"]) == (True, 0.7, 0.9)
    assert (drawn["num_beams"], ends) == (2, ("a",))
    assert not generation({"do_sample": True, "temperature": 0})[0]["do_sample"]
    with pytest.warns(UserWarning, match="image_aspect_ratio"):
        generation({"image_aspect_ratio": "pad"})


def test_a_batch_has_equal_arguments_and_every_request_once() -> None:
    keys = [{"a": 1}, {"a": 2}, {"a": 1}, {"a": 1}, {"a": 2}]
    found = list(batches(keys, [5, 1, 9, 7, 2], 2))
    assert found == [[2, 3], [0], [4, 1]]


def test_marks_are_places_only_if_there_is_one_for_every_image() -> None:
    one, two = (Image.new("RGB", (4, 4), tone) for tone in (0, 255))
    [turn] = messages_of("first <image>\nthen <image> which?", [one, two])
    assert [part["type"] for part in turn["content"]] == ["text", "image", "text", "image", "text"]
    [turn] = messages_of("which <image>?", [one, two])
    assert [part["type"] for part in turn["content"]] == ["image", "image", "text"]
    video = np.zeros((2, 4, 4, 3), np.uint8)
    assert messages_of("why?", [video])[0]["content"][0]["type"] == "video"


def test_messages_make_the_prompt_of_compare(pipe: Pipeline) -> None:
    item = ASKED[0]
    picture = item.images[0].open()
    assert asked(pipe, 1)[0].text == pipe.prompt(item.question, 1)
    turns: list[Message] = [
        {"role": "user", "content": [{"type": "image", "url": picture}, _words("One <image>?")]},
        {"role": "assistant", "content": [_words("yes")]},
        {"role": "user", "content": [_words("Two?")]},
    ]
    talk = talk_of(pipe, turns)
    assert talk.text.count("<image>") == len(talk.images) == 1
    assert talk.text.index("One") < talk.text.index("yes") < talk.text.index("Two")
    with pytest.raises(UserError, match="takes only text and image"):
        talk_of(pipe, [{"role": "user", "content": [{"type": "audio", "url": b""}]}])


def _words(text: str) -> Message:
    return {"type": "text", "text": text}


@pytest.mark.parametrize("spec", ["none", "globalcom2", "fastv:layer=2"])
def test_answers_are_those_of_the_pipeline(pipe: Pipeline, spec: str) -> None:
    method = compressor_of(spec, None if spec == "none" else 0.25)
    answers = Answerer(pipe, method, {"model": "testbed-next"}).answer(asked(pipe), GREEDY)
    for item, found in zip(ASKED, answers, strict=True):  # one by one, as a reference
        with tp.compress(pipe.model, method) as trace:
            alone = pipe([item.images[0].open()], item.question, max_new_tokens=4, do_sample=False)
        assert found.text == alone
        assert found.record["kept_patches"] == trace.ledger.kept_patches
        assert found.record["visual_per_layer"] == list(trace.ledger.visual_per_layer)
        assert found.record["cell"]["retention"] == (1 if method is None else 0.25)
        assert ("kept" in found.record) == (method is not None)
    first, same = answers[0].record["media"], answers[1].record["media"]
    assert (first == same) == (ASKED[0].image_id == ASKED[1].image_id)


def test_texts_images_and_beams_share_a_batch(pipe: Pipeline) -> None:
    talks = [*asked(pipe, 2), talk_of(pipe, messages_of("Hello?", []))]
    method = compressor_of("uniform", 0.5)
    options, _ = generation({"max_new_tokens": 3, "num_beams": 2})
    found = Answerer(pipe, method, {}).answer(talks, options)
    assert [one.record["patch_tokens"] > 0 for one in found] == [True, True, False]
    assert [len(one.record.get("kept", ())) for one in found] == [1, 1, 0]
    assert found[2].record["media"] == []


def test_an_answer_ends_where_the_task_says(pipe: Pipeline) -> None:
    answerer = Answerer(pipe, None, {})
    whole = answerer.answer(asked(pipe, 1), GREEDY)[0]
    assert whole.written >= 1
    cut = answerer.answer(asked(pipe, 1), GREEDY, [whole.text[1:]])[0]
    assert cut.text == whole.text[:1]


def test_the_likelihood_is_that_of_a_forward_over_prompt_and_answer(pipe: Pipeline) -> None:
    talk = asked(pipe, 1)[0]
    inputs = pipe.prepare([list(talk.images)], [talk.text])
    words = pipe.processor.tokenizer(f"{talk.text} yes")["input_ids"]
    words = words[len(pipe.processor.tokenizer(talk.text)["input_ids"]) :]
    ids = torch.cat([inputs["input_ids"], torch.tensor([words])], 1)
    given = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        logits = pipe.model(**given).logits[0, -len(words) - 1 : -1].float()
    expected = -logits.log_softmax(-1)[range(len(words)), words].mean()
    found = Answerer(pipe, None, {}).likelihood(talk, " yes")
    assert found.loss == pytest.approx(float(expected), abs=1e-4)
    assert found.greedy == bool((logits.argmax(-1) == torch.tensor(words)).all())


def test_the_likeliest_choice_is_the_greedy_answer_when_compressed(pipe: Pipeline) -> None:
    answerer = Answerer(pipe, compressor_of("fastv:layer=2", 0.25), {})
    talk = asked(pipe, 1)[0]
    said = answerer.answer([talk], GREEDY)[0]
    other = next(word for word in ("yes", "no", "red") if word != said.text)
    chosen, left = (answerer.likelihood(talk, f" {word}") for word in (said.text, other))
    assert chosen.greedy
    assert chosen.loss < left.loss
    assert chosen.record["kept_patches"] == said.record["kept_patches"]


def test_every_model_id_has_two_classes() -> None:
    model = pytest.importorskip(
        "tokenprune.experiments.lmms.model", reason="needs pip install 'tokenprune[lmms-eval]'"
    )
    for made in MODELS.values():
        assert getattr(model, made).is_simple
        assert not getattr(model, f"{made}Chat").is_simple
        assert getattr(model, made).families == getattr(model, f"{made}Chat").families
