"""Common mistakes on the command line get one sentence that says what to do."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import tokenprune as tp
from tokenprune.cli import app
from tokenprune.errors import UserError
from tokenprune.experiments.common.run_folder import RunFolder
from tokenprune.experiments.datasets.files import read_data


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (60, 40), "red").save("cat.png")
    Path("file").write_text("x")
    return tmp_path


def refused(*words: str) -> str:
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 2, result.output
    said = result.stderr.strip()
    assert said.startswith("error: ")
    assert "\n" not in said, "one sentence"
    assert len(said) < 400
    return said


def line(**fields: object) -> str:
    return json.dumps({"image": "cat.png", "question": "What?", "answer": "cat"} | fields)


# --- data files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_is_recognised(indent: int | None) -> None:
    Path("array.json").write_text("\n" + json.dumps([json.loads(line())] * 2, indent=indent))
    said = refused("compare", "--data", "array.json")
    assert "begins with '[', as a JSON array does; write one object per line" in said
    assert "jq -c '.[]' array.json" in said


@pytest.mark.parametrize("field", ["image", "images", "video"])
def test_an_address_of_an_image_is_refused(field: str) -> None:
    url = "https://example.com/cat.png"
    fields = {"question": "What?", "answer": "cat", field: url if field == "image" else [url]}
    Path("data.jsonl").write_text(json.dumps(fields))
    said = refused("compare", "--data", "data.jsonl")
    assert f"line 1: {url!r} is a remote address; download it and write the path" in said


def test_all_bad_lines_are_listed() -> None:
    lines = [line(), "nope", line(answer=None), line(image="gone.png"), "", line(kind="")]
    Path("data.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError) as caught:
        read_data(Path("data.jsonl"))
    first, *others = str(caught.value).splitlines()
    assert first.startswith("4 lines of data.jsonl cannot be used; each line is an object such as")
    assert [re.match(r"  line (\d)", one)[1] for one in others] == ["2", "3", "4", "6"]  # type: ignore[index]
    for words, one in zip(("not JSON", "'answer'", "gone.png", "'kind'"), others, strict=True):
        assert words in one


def test_of_many_bad_lines_the_first_are_explained_and_all_are_numbered() -> None:
    lines = [line() if number in (20, 30) else "nope" for number in range(1, 41)]
    Path("data.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError) as caught:
        read_data(Path("data.jsonl"))
    said = str(caught.value).splitlines()
    assert said[0].startswith("38 lines of data.jsonl")
    assert [one.split(":")[0].strip() for one in said[1:9]] == [f"line {n}" for n in range(1, 9)]
    assert said[9:] == ["  and the lines 9-19, 21-29, 31-40"]
    assert len(str(caught.value)) < 1500, "nothing is cut out of its middle"


def test_lines_after_the_last_question_that_is_asked_may_be_bad() -> None:
    Path("data.jsonl").write_text(f"{line()}\nnope\n")
    assert len(read_data(Path("data.jsonl"), count=1)) == 1


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["compare", "efficiency", "masks", "positional-bias"])
@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("file", "'file': it is a file; give the folder that holds config.json"),
        ("./nowhere", "'./nowhere': there is no such folder"),
        ("/nowhere/at/all", "'/nowhere/at/all': there is no such folder"),
        ("testbed-nxt", "Did you mean 'testbed-next'"),
    ],
)
def test_a_model_path_that_does_not_exist(command: str, model: str, said: str) -> None:
    result = CliRunner().invoke(app, [command, "--model", model])
    assert result.exit_code == 2
    assert said in result.stderr


def test_an_unreachable_hub_is_noticed_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    refused("compare", "--model", "nobody/at-all")  # imports take time
    began = time.monotonic()
    said = refused("compare", "--model", "nobody/nothing")
    assert time.monotonic() - began < 5, "six attempts would take 23 s"
    assert "no such folder and no copy of it in the cache, and the Hub cannot be reached" in said
    assert "http://127.0.0.1:1: " in said
    assert "Retry" not in caplog.text


# --- words and numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["masks", "cat.png", "What", "is", "this?"], "write the question in quotes: 'What is "),
        (["masks", "https://example.com/a.png", "What?"], "is a remote address; download it"),
        (["masks", "gone", "What?"], "there is no image 'gone'"),
        (["convert", "fastv", "--flops", "50"], "for 50 % write 0.5"),
        (["convert", "fastv", "--equivalent", "25"], "for 25 % write 0.25"),
        (["compare", "-r", "25"], "for 25 % write 0.25"),
        (["compare", "--data", "."], "the question about all images is given with --prompt"),
        (["compare", "--out", "file"], "cannot write to the output folder 'file'"),
        (["masks", "--out", "file"], "cannot write to the output folder 'file'"),
        (["report", "file"], "'file' is a file; give the folder of a run"),
        (["pairs", "file"], "'file' is a file; give the folder of a run"),
        (["table", "file"], "'file' is a file; give the folder of a run"),
    ],
)
def test_common_mistakes(words: list[str], said: str) -> None:
    assert said in refused(*words)


def test_a_folder_of_another_experiment_is_described_briefly(tmp_path: Path) -> None:
    long = {
        "methods": [f"globalcom2:alpha={share}" for share in range(200)],
        "match": [{"method": "fastv", "retention": share / 100} for share in range(1, 90)],
        **{f"field{index}": "x" * 500 for index in range(9)},
    }
    RunFolder.open(tmp_path / "run", long, {}).close("complete")
    with pytest.raises(UserError) as caught:
        RunFolder.open(tmp_path / "run", {name: [] for name in long}, {})
    said = str(caught.value)
    assert "holds another experiment (methods: globalcom2:alpha=0, globalcom2:alpha=1" in said
    assert "match: 89 entries there" in said
    assert "and 7 more differences); choose another --out" in said
    assert len(said) < 700


# --- warnings -------------------------------------------------------------------------------------


def test_a_testbed_that_is_asked_about_a_users_image_says_so() -> None:
    from tokenprune.experiments.common.setting import warn_about_testbed

    with pytest.warns(UserWarning, match=r"testbed-next is a small model .* photographs"):
        warn_about_testbed("testbed-next", own=True)


@pytest.mark.parametrize(("model", "own"), [("testbed-next", False), ("org/model", True)])
@pytest.mark.filterwarnings("error")
def test_other_models_and_its_own_images_need_no_warning(model: str, own: bool) -> None:
    from tokenprune.experiments.common.setting import warn_about_testbed

    warn_about_testbed(model, own=own)


def test_masks_of_a_photograph_warn_and_replace_earlier_ones_on_request(tmp_path: Path) -> None:
    words = ["masks", "cat.png", "-m", "uniform", "--out", "there"]
    there = tmp_path / "there"
    there.mkdir()
    for name, content in {
        "manifest.json": '{"files": ["masks-old.png"]}',
        "masks-old.png": "",
    }.items():
        (there / name).write_text(content)
    assert "--force" in refused(*words)
    assert {one.name for one in there.iterdir()} == {"manifest.json", "masks-old.png"}
    done = CliRunner().invoke(app, [*words, "--force"])
    assert done.exit_code == 0, done.output
    assert done.stderr.count("warning: testbed-next is a small model") == 1
    files = {one.name for one in there.iterdir()}
    assert {"masks.png", "masks.pdf", "kept.csv", "manifest.json"} <= files
    assert "masks-old.png" not in files


def test_random_weights_of_timm_are_said() -> None:
    with pytest.warns(UserWarning, match="timm/test_vit has random weights") as caught:
        tp.load("timm/test_vit")
    assert caught[0].filename == __file__, "the warning points to the user's line"


def test_a_testbed_loads_without_a_progress_bar(capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import logging

    before = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    try:
        tp.load("testbed-next")
        assert logging.is_progress_bar_enabled(), "the user's setting is restored"
    finally:
        if not before:
            logging.disable_progress_bar()
    assert "Loading" not in capfd.readouterr().err
