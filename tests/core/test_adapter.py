"""The public steps load, prepare, encode, assemble and decode, on the testbed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

import tokenprune as tp
from tokenprune.engine.session import compress
from tokenprune.errors import UnknownNameError, UserError
from tokenprune.models import testbed
from tokenprune.models.loading import load
from tokenprune.testing.host import example

pytestmark = [
    pytest.mark.skipif("testbed-next" not in testbed.names(), reason="the testbed is not built"),
    pytest.mark.filterwarnings("ignore::tokenprune.errors.RetentionWarning"),
]

QUESTIONS = ["What digit is on the red square?", "Is there a cat?", "How many squares are there?"]


def _image(width: int, height: int) -> Image.Image:
    draw = torch.Generator().manual_seed(width)
    pixels = torch.randint(0, 255, (height, width, 3), generator=draw, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


IMAGES = [[_image(60, 90)], [], [_image(120, 40), _image(50, 50)]]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tp.load("testbed-next")


def _generate(pipe: Any, inputs: Any, **options: Any) -> torch.Tensor:
    options = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, **options}
    ids: torch.Tensor = pipe.model.generate(
        **inputs, suppress_tokens=[pipe.adapter.facts.placeholders["image"]], **options
    )
    return ids


def test_the_example_of_the_readme(pipe: Any) -> None:
    inputs = pipe.prepare(images=[_image(60, 60)], prompts=[QUESTIONS[0]])
    with tp.compress(pipe.model, "globalcom2", retention=0.25) as trace:
        ids = pipe.model.generate(**inputs, max_new_tokens=8)
    assert len(pipe.decode(ids, inputs)) == 1
    assert 0 < trace.ledger.realised <= 0.5
    (chosen,) = trace.selections
    assert len(chosen.layout) == int(
        (inputs["input_ids"] == pipe.adapter.facts.placeholders["image"]).sum()
    )
    for image in trace.ledger.kept_per_view:
        assert len(image) == chosen.layout.views


# Beams differ for the engine, not for a method: one for each stage and kind of signal.
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in tp.list_methods()),
        *((name, {"num_beams": 2}) for name in ("uniform", "globalcom2", "fastv")),
    ],
)
def test_encoding_once_gives_what_pixels_give(
    pipe: Any, name: str, options: dict[str, Any]
) -> None:
    """The images of a comparison are encoded once and shared by all cells."""
    method = example(name)
    with compress(pipe.model, method) as trace:
        pixels = _generate(pipe, pipe.prepare(IMAGES, QUESTIONS), **options)
        kept = [chosen.keep.tolist() for chosen in trace.selections]
    encoded = [pipe.encode(images, method.needs, method) for images in IMAGES]
    with compress(pipe.model, method) as trace:
        for _ in range(2):  # beams expand their inputs in place; the second call must not see that
            ids = _generate(pipe, pipe.assemble(encoded, QUESTIONS), **options)
            assert torch.equal(ids, pixels)
            assert [chosen.keep.tolist() for chosen in trace.selections] == kept


def test_a_batch_of_prompts_equals_prompts_alone(pipe: Any) -> None:
    inputs = pipe.prepare(IMAGES, QUESTIONS)
    with compress(pipe.model, "fastv", retention=0.4):
        together = _generate(pipe, inputs)[:, inputs["input_ids"].shape[1] :]
        for row in range(3):
            alone = pipe.prepare(IMAGES[row : row + 1], QUESTIONS[row : row + 1])
            ids = _generate(pipe, alone)[:, alone["input_ids"].shape[1] :]
            assert torch.equal(ids[0], together[row])


def test_placeholders_that_do_not_match_the_images(pipe: Any) -> None:
    token = pipe.placeholder_texts["image"]
    with pytest.raises(UserError, match=r"has 2 .* placeholders but 1 images"):
        pipe.prepare([IMAGES[0]], [f"{token} and {token}?"])
    with pytest.raises(UserError, match="2 image lists for 1 prompts"):
        pipe.prepare(IMAGES[:2], QUESTIONS[:1])
    with pytest.raises(UserError, match=r"has 1 .* placeholders but 0 images"):
        pipe.prepare(None, [f"{token}?"])


def test_a_prompt_with_its_own_turn_markers_is_taken_as_it_is(pipe: Any) -> None:
    text = f"<user>{pipe.placeholder_texts['image']} {QUESTIONS[0]}<assistant>"
    assert pipe.prompt(text, 1) == text


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_images_of_any_mode(pipe: Any, mode: str) -> None:
    inputs = pipe.prepare([IMAGES[0][0].convert(mode)], QUESTIONS[:1])
    assert inputs["pixel_values"].shape[2] == 3


def test_unknown_things_are_sentences() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'testbed-next'"):
        load("testbed-nxt")
    with pytest.raises(UnknownNameError, match="Did you mean 'float32'"):
        load("testbed-next", dtype="float3")
    with pytest.raises(UnknownNameError, match="no device is called 'gpu'"):
        load("testbed-next", device="gpu")
    with pytest.raises(UserError, match=r"cannot load 'nobody/nothing'"):
        load("nobody/nothing")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda_is_a_sentence() -> None:
    with pytest.raises(UserError, match="no CUDA device"):
        load("testbed-next", device="cuda")


def test_a_folder_with_another_kind_of_model(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}'
    )
    with pytest.raises(UnknownNameError, match="model class with an adapter is called 'LlamaFor"):
        load(str(tmp_path))


def test_dtype_is_passed_on() -> None:
    assert tp.load("testbed-next", dtype="bfloat16").model.dtype == torch.bfloat16
    assert tp.load("testbed-next").model.dtype == torch.float32
