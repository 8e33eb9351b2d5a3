"""Options of the model and of the prompt: names, refusals, lengths of answers, and resuming."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tokenprune as tp
from tokenprune.cli import app
from tokenprune.errors import UserError
from tokenprune.experiments.common import loading
from tokenprune.experiments.common.cells import Cell
from tokenprune.experiments.common.journal import Journal
from tokenprune.experiments.common.loading import check_loading, load_arguments
from tokenprune.experiments.common.questions import held_out
from tokenprune.experiments.common.reading import manifest_of, questions_of
from tokenprune.experiments.common.request import CompareRequest
from tokenprune.experiments.compare import loop
from tokenprune.experiments.compare.run import answer, run
from tokenprune.experiments.datasets.files import read_data
from tokenprune.models.published import HUB_IDS, KNOWN, hub_id
from tokenprune.pipeline import Pipeline

# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llava-v1.6-vicuna-7b", "llava-hf/llava-v1.6-vicuna-7b-hf"),
        ("llava-v1.5-7b", "llava-hf/llava-1.5-7b-hf"),
        ("llama3-llava-next-8b", "llava-hf/llama3-llava-next-8b-hf"),
        ("llava-onevision-qwen2-7b-ov", "llava-hf/llava-onevision-qwen2-7b-ov-hf"),
        ("qwen2.5-vl-7b-instruct", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("InternVL3-2B", "OpenGVLab/InternVL3-2B-hf"),
        ("llava-hf/llava-1.5-7b-hf", None),
        ("testbed-next", None),
        ("llava-v1.6-vicuna-8b", None),
    ],
)
def test_names_of_published_models(name: str, expected: str | None) -> None:
    assert hub_id(name) == expected


def test_every_known_model_has_a_hub_id() -> None:
    assert HUB_IDS.keys() == KNOWN.keys()


def test_the_hub_id_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["compare", "--model", "llava-v1.6-vicuna-7b", "--questions", "1"]
    found = CliRunner().invoke(app, words)
    printed = "llava-v1.6-vicuna-7b is llava-hf/llava-v1.6-vicuna-7b-hf on the Hugging Face Hub."
    assert found.stderr.splitlines()[0] == printed
    assert found.exit_code == 2  # it is not on this machine, and tests run offline
    (tmp_path / "llava-v1.6-vicuna-7b").mkdir()
    assert "on the Hugging Face Hub" not in CliRunner().invoke(app, words).stderr


# --- the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"attn": "spda"}, "Did you mean 'sdpa'"),
        ({"quantize": "4bits"}, "Did you mean '4bit'"),
        ({"device_map": "balance"}, "Did you mean 'balanced'"),
        ({"device": "cpu", "device_map": "auto"}, "either --device or --device-map"),
        ({"revision": "main"}, "testbed-next is on this machine"),
        ({"model": "timm/vit_tiny_patch16_224", "attn": "sdpa"}, "has no language model"),
    ],
)
def test_bad_options_of_a_model(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_loading(CompareRequest(**given))


def test_a_name_that_is_too_long_for_a_path_is_no_folder() -> None:
    check_loading(CompareRequest(model="é" * 1200))


def test_quantising_needs_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--quantize 8bit needs bitsandbytes, .* pip install"):
        check_loading(CompareRequest(quantize="8bit"))


def test_options_reach_the_model() -> None:
    asked = CompareRequest(model="a/b", device_map="auto", attn="eager", revision="v1")
    assert load_arguments(asked) == {
        "dtype": "auto",
        "trust_remote_code": False,
        "device_map": "auto",
        "attn_implementation": "eager",
        "revision": "v1",
    }


def test_only_the_decoder_is_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    pipe = tp.load("testbed-next", **load_arguments(CompareRequest(quantize="4bit", device="cpu")))
    kinds = {name: type(module).__name__ for name, module in pipe.model.named_modules()}
    decoder = {kinds[name] for name in kinds if "language_model" in name and name.endswith("_proj")}
    rest = {
        kind for name, kind in kinds.items() if "language_model" not in name and "Linear" in kind
    }
    assert (decoder, rest) == ({"Linear4bit"}, {"Linear"})
    (item,) = held_out(1, 0)
    assert pipe([item.images[0].open()], item.question, max_new_tokens=2)


# --- prompts and answers --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    return tp.load("testbed-next")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six questions about two images, with limits of their own and answers that are lists."""
    lines = []
    for index, item in enumerate(held_out(6, 0)):
        name = f"{item.image_id}.png"
        item.images[0].open().save(tmp_path / name)
        more = {"max_new_tokens": 2} if index % 2 else {}
        asked = {"image": name, "question": item.question, "answers": [item.answer, "?"]}
        lines.append(json.dumps({"id": f"q{index}", **asked, **more}))
    path = tmp_path / "my.jsonl"
    path.write_text("\n".join(lines))
    return path


def test_every_answer_has_the_length_of_its_question(
    pipe: Pipeline, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without an end token, every answer is as long as allowed.
    monkeypatch.setattr(pipe.model.generation_config, "eos_token_id", None)
    found = read_data(data)
    cells = [Cell(), Cell(tp.parse("uniform@0.5"))]
    with Journal(tmp_path / "answers.jsonl") as journal:
        answer(pipe, cells, found, journal, max_new_tokens=4, batch_size=4)
    assert len(journal.answers) == 2 * 6
    for (_, name), record in journal.answers.items():
        wanted = 2 if int(name[1:]) % 2 else 4
        assert record["cut_short"]
        words = pipe.processor.tokenizer(record["answer"], add_special_tokens=False)["input_ids"]
        assert len(words) <= wanted
    longest = [
        max(
            len(record["answer"].split())
            for (_, name), record in journal.answers.items()
            if int(name[1:]) % 2 == odd
        )
        for odd in (0, 1)
    ]
    assert longest[0] > longest[1]


def test_batches_do_not_mix_limits() -> None:
    items = [
        replace(item, max_new_tokens=2 if index % 3 else None)
        for index, item in enumerate(held_out(12, 0))
    ]
    batches = loop.batches(items, 4)
    assert sorted(item.id for batch in batches for item in batch) == sorted(i.id for i in items)
    assert all(len({item.max_new_tokens for item in batch}) == 1 for batch in batches)
    assert loop.batches([i for batch in batches[1:] for i in batch], 4) == batches[1:]


def test_what_changes_answers_belongs_to_a_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = {
        "data": data, "methods": ("uniform",), "retention": (0.5,), "questions": 3, "seed": 3,
        "suffix": "Be brief.", "system": "You see drawings.", "out": tmp_path / "run",
        "max_new_tokens": 1, "device": "cpu",
    }  # fmt: skip
    with pytest.warns(RuntimeWarning, match=r"of 12 answers reached the limit") as caught:
        run(CompareRequest(**plain))
    manifest, notes = manifest_of(tmp_path / "run"), list[str]()
    journal = Journal(tmp_path / "run" / "answers.jsonl")
    found = questions_of(tmp_path / "run", manifest, journal, notes)
    assert notes == []
    assert found is not None
    # A word is a token, and the end of an answer is one more.
    limits = {item.id: item.max_new_tokens or 1 for item in found}
    cut = sum(
        len(row["answer"].split()) >= limits[name] for (_, name), row in journal.answers.items()
    )
    assert 0 < cut < 12
    assert any(str(one.message).startswith(f"{cut} of 12") for one in caught)
    assert {item.id for item in found} == {name for _, name in journal.answers}
    assert all(item.question.endswith("\nBe brief.") for item in found)
    for changes, said in (
        ({"suffix": None}, "other data"),
        ({"system": None}, "system: You see drawings. there, None here"),
        ({"attn": "eager"}, "attn: None there, eager here"),
        ({"seed": 4}, "seed: 3 there, 4 here"),
    ):
        with pytest.raises(UserError, match=f"holds another experiment .*{said}"):
            run(CompareRequest(**plain | changes))
