"""Loading models from folders, and refusals."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import tokenprune as tp
from tokenprune.adapter import adapter_of
from tokenprune.errors import UnknownNameError, UserError
from tokenprune.models import testbed
from tokenprune.models.testbed.scenes import questions
from tokenprune.pipeline import Pipeline
from tokenprune.testing.host import Host


@pytest.fixture(scope="module")
def bed() -> Pipeline:
    return tp.load("testbed-next")


def test_no_photo_is_refused_for_its_shape(bed: Pipeline) -> None:
    for size in [(1, 1), (1, 400), (400, 1), (7, 300), (1000, 30), (57, 56)]:
        with tp.compress(bed.model, "globalcom2", retention=0.5) as trace:
            bed.model(**bed.prepare([Image.new("RGB", size)], ["How many objects are there?"]))
        assert trace.ledger.kept_patches >= 1


def test_as_many_image_lists_as_prompts(bed: Pipeline) -> None:
    photo = Image.new("RGB", (112, 112))
    with pytest.raises(UserError, match="2 image lists for 1 prompts"):
        bed.prepare([photo, photo], ["one"])


def test_a_local_folder_loads_like_the_testbed(bed: Pipeline, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(testbed.path("testbed-next"), folder)
    mine = tp.load(str(folder), dtype="bfloat16", attn_implementation="eager")
    assert mine.path == folder
    assert mine.model.dtype == torch.bfloat16
    assert mine.model.config.text_config._attn_implementation == "eager"
    item = questions(1, seed=5)[0]
    with tp.compress(mine.model, "globalcom2", retention=0.5) as trace:
        mine.model.generate(**mine.prepare([item.image], [item.question]), max_new_tokens=2)
    assert 0 < trace.ledger.realised <= 0.5


def test_bad_names_devices_and_dtypes_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'testbed-next'"):
        tp.load("testbed-nxt")
    with pytest.raises(UnknownNameError, match="no dtype is called 'float31'"):
        tp.load("testbed-next", dtype="float31")
    with pytest.raises(UnknownNameError, match="no device is called 'gpu'"):
        tp.load("testbed-next", device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device"):
            tp.load("testbed-next", device="cuda")
    with pytest.raises(UserError, match="cannot load"):
        tp.load(str(tmp_path / "nothing" / "here"))


def test_a_model_class_without_an_adapter_is_a_sentence(tmp_path: Path) -> None:
    config = json.loads((testbed.path("testbed-next") / "config.json").read_text())
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnknownNameError, match="no model class with an adapter"):
        tp.load(str(tmp_path))
    with pytest.raises(UnknownNameError, match="LlavaNextForConditionalGeneration"):
        adapter_of(torch.nn.Linear(1, 1))


def test_globalcom2_runs_on_a_tower_without_cls_by_attention_received(siglip: Host) -> None:
    size = (20, 24)
    count = len(siglip.adapter.layout(size))
    ids = torch.tensor([[5] + [63] * count + [6, 7]])
    images = siglip.adapter.dummy_images([size])
    with tp.compress(siglip.model, "globalcom2:score=received", retention=0.5) as trace:
        siglip.model(input_ids=ids, **images)
    eager = copy.deepcopy(siglip.model)
    eager.set_attn_implementation("eager")
    views = images["pixel_values"][0]
    attention = eager.model.vision_tower(views, output_attentions=True).attentions[-1]
    received = attention.mean((1, 2))  # over heads and queries
    thumbnail = received[0].argsort(descending=True, stable=True)[:8].sort().values
    assert torch.equal(trace.selections[0].keep[:8], thumbnail)


def test_layers_that_are_not_there_are_sentences(siglip: Host) -> None:
    for spec, said in [
        ("fastv:layer=4", "layers 0 to 3"),
        ("globalcom2:score=received,layer=-4", "vision encoder, which has 3"),
    ]:
        with (
            pytest.raises(UserError, match=said),
            tp.compress(siglip.model, spec, retention=0.5),
        ):
            pass
