"""Prompts with placeholders, finished prompts, and images in every accepted form."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tokenprune as tp
from tokenprune.errors import UserError
from tokenprune.models import testbed
from tokenprune.prompts import chat_prompt

pytestmark = pytest.mark.skipif(
    not {"testbed-next", "testbed-onevision"} <= set(testbed.names()), reason="no testbeds"
)

ONE, VIDEO = {"image": 1, "video": 0}, {"image": 0, "video": 1}
TOKENS = {"image": "<image>", "video": "<video>"}
ASKED = "What is this?"

# As published with the checkpoints of these families.
VICUNA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ part['text'] }}{% endfor %}{{ ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'][0]['text'] + '</s>' }}{% endif %}{% endfor %}"
)
CHATML = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}{{ '<' + part['type'] + '>' }}{% endif %}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tp.load("testbed-next")


@pytest.fixture(scope="module")
def onevision() -> Any:
    return tp.load("testbed-onevision")


def talking(pipe: Any, template: str | None) -> Any:
    """The processor of ``adapter`` with another chat template."""
    processor = copy.copy(pipe.processor)
    processor.chat_template = template
    return processor


def asked(processor: Any, question: str, counts: dict[str, int] = ONE) -> str:
    return chat_prompt(question, processor, counts, TOKENS)


# --- marks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (VICUNA, f"USER: <image>\n{ASKED} ASSISTANT:"),
        (MISTRAL, f"[INST] <image>\n{ASKED} [/INST]"),
        (
            CHATML,
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n"
            f"<image>{ASKED}<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
    ids=["vicuna", "mistral", "chatml"],
)
@pytest.mark.parametrize(
    "question", ["{}", "<image>\n{}", "<image> {}", "<image>{}", "<image>\r\n{}", "\n<image>\n{}"]
)
def test_a_leading_placeholder_gives_the_prompt_without_it(
    pipe: Any, template: str, expected: str, question: str
) -> None:
    assert asked(talking(pipe, template), question.format(ASKED)) == expected


@pytest.mark.parametrize("question", [" two  spaces ", "\nin a new line", "tail\n", "a\n\nb"])
def test_the_text_itself_stays_as_it_is(pipe: Any, question: str) -> None:
    assert pipe.prompt(f"<image>\n{question}", 1) == pipe.prompt(question, 1)


@pytest.mark.parametrize(
    ("question", "counts", "content"),
    [
        ("Is it red?\n<image>", ONE, "Is it red?<image>"),
        ("<image>\n<image>\nSame?", {"image": 2, "video": 0}, "<image><image>Same?"),
        ("Is <image> like <image>?", {"image": 2, "video": 0}, "Is <image> like <image>?"),
        ("First:\n<image>\nSecond:\n<image>\nSame?", {"image": 2, "video": 0},
         "First:<image>Second:<image>Same?"),
        ("<video>\nWho?", VIDEO, "<video>Who?"),
        ("<video>\nIs <image> in it?", {"image": 1, "video": 1}, "<video>Is <image> in it?"),
        ("<image>", ONE, "<image>"),
    ],
)  # fmt: skip
def test_placeholders_keep_their_place_in_the_text(
    onevision: Any, question: str, counts: dict[str, int], content: str
) -> None:
    said = asked(onevision.processor, question, counts)
    assert said == f"<s><user>{content}<assistant>"


def test_templates_may_put_images_first(pipe: Any) -> None:
    said = asked(talking(pipe, VICUNA), "What is this?\n<image>")
    assert said == "USER: <image>\nWhat is this? ASSISTANT:"


def test_only_turn_markers_make_a_finished_prompt(pipe: Any) -> None:
    for template, finished in (
        (VICUNA, "A chat. USER: <image>\nWhat? ASSISTANT:"),
        (VICUNA, "USER:<image>\nWhat? ASSISTANT: A cat. USER: Sure? ASSISTANT:"),
        (MISTRAL, "<s>[INST]<image>\nWhat? [/INST]"),
        (CHATML, "<|im_start|>user <image>\nWhat?<|im_end|><|im_start|>assistant"),
        (CHATML, "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\nIt is"),
    ):
        assert asked(talking(pipe, template), finished) == finished
    for template, question in (
        (VICUNA, "<image>\nWhat does the USER: do?"),
        (VICUNA, "<image>\nIs ASSISTANT: in front of USER:?"),
        (MISTRAL, "<image>\nWhat does [/INST] mean?"),
        (CHATML, "<image>\nUSER: What? ASSISTANT:"),
    ):
        alone = question.removeprefix("<image>\n")
        said = asked(talking(pipe, template), question)
        assert said == asked(talking(pipe, template), alone) != question


@pytest.mark.parametrize(
    "template", [VICUNA, MISTRAL, CHATML, "own"], ids=["vicuna", "mistral", "chatml", "own"]
)
def test_what_a_template_makes_is_finished(pipe: Any, template: str) -> None:
    processor = pipe.processor if template == "own" else talking(pipe, template)
    made = asked(processor, ASKED)
    assert asked(processor, made) == made
    alone = asked(processor, ASKED, {"image": 0, "video": 0})
    assert asked(processor, alone, {"image": 0, "video": 0}) == alone
    with pytest.raises(UserError, match="has 0 '<image>' placeholders but 1 images; write one"):
        asked(processor, alone)


def test_without_a_chat_template_marks_make_a_finished_prompt(pipe: Any) -> None:
    plain = talking(pipe, None)
    assert asked(plain, "<image> What?") == "<image> What?"
    assert asked(plain, "What?") == "<image>\nWhat?"


def test_a_template_without_turn_markers(pipe: Any) -> None:
    bare = talking(
        pipe,
        "{% for part in messages[-1]['content'] %}{{ part.text or '<image>' }}{% endfor %}",
    )
    assert asked(bare, "<image>\nWhat?") == asked(bare, "What?") == "<image>What?"


@pytest.mark.parametrize("count", [0, 2])
def test_words_that_the_tokenizer_takes_as_placeholders_are_refused(pipe: Any, count: int) -> None:
    for question in ("What does the tag <image> mean?", "<image>\nWhat?"):
        with pytest.raises(UserError, match=f"has 1 '<image>' placeholders but {count} images"):
            pipe.prompt(question, count)


def test_a_template_that_drops_images_is_refused(pipe: Any) -> None:
    deaf = talking(pipe, "{{ messages[0]['content'][-1]['text'] }}")
    with pytest.raises(UserError, match="does not show 1 images"):
        asked(deaf, ASKED)


@pytest.mark.parametrize("retention", [1.0, 0.5])
def test_marked_questions_get_the_same_answers(pipe: Any, retention: float) -> None:
    image = Image.fromarray(np.arange(60 * 90 * 3, dtype=np.uint8).reshape(90, 60, 3))
    plain = pipe.prepare([image], [ASKED])
    marked = pipe.prepare([image], [f"<image>\n{ASKED}"])
    encoded = [pipe.encode([image])]
    assembled = pipe.assemble(encoded, [f"<image>\n{ASKED}"])
    assert torch.equal(plain["input_ids"], marked["input_ids"])
    assert torch.equal(plain["input_ids"], assembled["input_ids"])
    blind = pipe.assemble(encoded, [f"<image>\n{ASKED}"], without_images=True)["input_ids"]
    token = pipe.adapter.facts.placeholders["image"]
    assert blind[0].tolist() == [one for one in plain["input_ids"][0].tolist() if one != token]
    with tp.compress(pipe.model, "uniform", retention=retention):
        said = [
            pipe.model.generate(**inputs, max_new_tokens=3, do_sample=False)
            for inputs in (plain, marked)
        ]
    assert torch.equal(*said)


# --- what users hand over -------------------------------------------------------------------------

PIXELS = np.arange(40 * 30 * 3, dtype=np.uint8).reshape(40, 30, 3)


def test_images_of_every_kind_give_the_same_inputs(pipe: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(PIXELS).save(path)
    expected = pipe.prepare([Image.fromarray(PIXELS)], [ASKED])["pixel_values"]
    features = pipe.encode([Image.fromarray(PIXELS)])[0].features
    kept = pipe.select("feature-norm", [Image.fromarray(PIXELS)], retention=0.25)[0].keep
    for image in (str(path), path, io.BytesIO(path.read_bytes()), PIXELS, torch.tensor(PIXELS)):
        assert torch.equal(pipe.prepare([image], [ASKED])["pixel_values"], expected)
        assert torch.equal(pipe.encode([image])[0].features, features)
        (chosen,) = pipe.select("feature-norm", [image], retention=0.25)
        assert torch.equal(chosen.keep, kept)
    for images in ([[path]], (PIXELS,), PIXELS[None], torch.tensor(PIXELS)[None]):
        assert torch.equal(pipe.prepare(images, [ASKED])["pixel_values"], expected)


def test_rotated_and_transparent_images_in_every_model(pipe: Any, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways, clear = tmp_path / "sideways.png", Image.fromarray(PIXELS)
    Image.fromarray(PIXELS).rotate(90, expand=True).save(sideways, exif=exif)
    clear.putalpha(0)
    white = Image.new("RGB", (30, 40), "white")
    timm = tp.load("timm/vit_tiny_patch16_224", pretrained=False)
    for shown, given in ((Image.fromarray(PIXELS), Image.open(sideways)), (white, clear)):
        for host in (pipe, timm):
            (one,), (other,) = host.encode([shown]), host.encode([given])
            assert torch.equal(one.features, other.features)
        one, other = (pipe.prepare([each], [ASKED]) for each in (shown, given))
        assert torch.equal(one["pixel_values"], other["pixel_values"])
        assert torch.equal(one["image_sizes"], other["image_sizes"])


def test_videos_of_every_kind_give_the_same_inputs(onevision: Any, tmp_path: Path) -> None:
    clip = np.stack([PIXELS, 255 - PIXELS])
    images = [Image.fromarray(frame) for frame in clip]
    path = tmp_path / "clip.webp"
    images[0].save(path, save_all=True, append_images=images[1:], lossless=True)
    expected = onevision.prepare(None, [ASKED], videos=[images])["pixel_values_videos"]
    features = onevision.encode_videos([images])[0].features
    nested = [images]  # a prompt's list of videos
    for video in (clip, list(clip), path, torch.tensor(clip).permute(0, 3, 1, 2), nested):
        made = onevision.prepare(None, [ASKED], videos=[video])["pixel_values_videos"]
        assert torch.equal(made, expected)
        if video is not nested:
            assert torch.equal(onevision.encode_videos([video])[0].features, features)
    for videos in (clip[None], [[clip]]):
        made = onevision.prepare(None, [ASKED], videos=videos)["pixel_values_videos"]
        assert torch.equal(made, expected)


@pytest.mark.parametrize("height", [1, 3, 4])
def test_a_low_video_is_not_taken_for_channels(onevision: Any, height: int) -> None:
    """All rows of a frame are equal, and so are all rows of its pixel values."""
    frame = np.repeat(PIXELS[:1], height, axis=0)
    side = onevision.adapter.base.config.vision_config.image_size
    seen = onevision.prepare(None, [ASKED], videos=[[frame]])["pixel_values_videos"][0, 0]
    tall = onevision.prepare(None, [ASKED], videos=[[np.repeat(PIXELS[:1], side, axis=0)]])
    expected = tall["pixel_values_videos"][0, 0]
    assert torch.allclose(seen, expected, atol=0.01)
    encoded = onevision.encode_videos([[frame]])[0].features
    whole = onevision.encode_videos([[np.repeat(PIXELS[:1], side, axis=0)]])[0].features
    assert torch.allclose(encoded, whole, atol=0.05)


def test_inputs_that_are_not_lists_are_refused(pipe: Any, onevision: Any) -> None:
    image = Image.fromarray(PIXELS)
    for bare in (image, "photo.jpg", Path("photo.jpg"), PIXELS, torch.tensor(PIXELS)):
        for call in (
            lambda one: pipe.prepare(one, [ASKED]),
            lambda one: pipe.encode(one),
            lambda one: pipe.select("uniform", one, retention=0.5),
        ):
            with pytest.raises(UserError, match=r"images must be a list of images, .*\[image\]"):
                call(bare)
    for prompts in (ASKED, None, 7):
        with pytest.raises(UserError, match="prompts must be a list of texts"):
            pipe.prepare([image], prompts)
        with pytest.raises(UserError, match="prompts must be a list of texts"):
            pipe.assemble([pipe.encode([image])], prompts)
    with pytest.raises(UserError, match="a prompt must be a text, got None"):
        pipe.prepare([image], [None])
    with pytest.raises(UserError, match="lone surrogate"):
        pipe.prepare([image], ["what \ud800?"])
    for nothing in ([None], [[None]], [[image, None]]):
        with pytest.raises(UserError, match="None is not an image"):
            pipe.prepare(nothing, [ASKED])
    with pytest.raises(UserError, match="videos must be a list of videos"):
        onevision.prepare(None, [ASKED], videos="clip.gif")
    with pytest.raises(UserError, match="videos must be a list of videos"):
        onevision.encode_videos(np.stack([PIXELS, PIXELS]))
    with pytest.raises(UserError, match="None is not a video"):
        onevision.prepare(None, [ASKED], videos=[None])
    assert pipe.encode([]) == []


def test_image_marks_the_place_on_every_model() -> None:
    """Also where the placeholder of the model is another text."""
    tokens = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    processor = SimpleNamespace()
    text = chat_prompt("Left: <image> right: <image>", processor, {"image": 2, "video": 0}, tokens)
    assert text == "Left: <|image_pad|> right: <|image_pad|>"
    with pytest.raises(UserError, match=r"has 1 '<\|image_pad\|>' placeholders but 2 images"):
        chat_prompt("Left: <image>", processor, {"image": 2, "video": 0}, tokens)


def test_a_system_message_comes_first_or_is_refused(pipe: Any) -> None:
    shown = talking(pipe, CHATML)
    text = chat_prompt(ASKED, shown, ONE, TOKENS, system="Be brief.")
    assert text.index("Be brief.") < text.index("<image>") < text.index(ASKED)
    whole = asked(shown, text)
    assert chat_prompt(whole, shown, ONE, TOKENS, system="Other") == whole
    without = "{% for m in messages if m['role'] == 'user' %}<image>{{ m['content'][1]['text'] }}"
    with pytest.raises(UserError, match="does not show a system message"):
        chat_prompt(ASKED, talking(pipe, without + "{% endfor %}"), ONE, TOKENS, system="Be brief.")
    with pytest.raises(UserError, match="no chat template"):
        chat_prompt(ASKED, SimpleNamespace(), ONE, TOKENS, system="Be brief.")
