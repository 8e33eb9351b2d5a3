"""The answers of the demo, and the lines that reproduce them."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

import tokenprune as tp
from tokenprune.cli import app
from tokenprune.compressor import Compressor
from tokenprune.console import BAD_INPUT
from tokenprune.errors import UserError
from tokenprune.experiments.demo import run as demo
from tokenprune.experiments.demo.answers import Answerer, chosen
from tokenprune.experiments.demo.cards import cards
from tokenprune.experiments.demo.recipe import Recipe
from tokenprune.experiments.demo.source import SCENES, Clip, Source, scene
from tokenprune.models import testbed

pytestmark = pytest.mark.filterwarnings("ignore::tokenprune.errors.RetentionWarning")

MIXED = ["globalcom2", "fastv:layer=1", "tome", "uniform@0.5 + fastv@0.5"]
VIDEO = next(index for index, (modality, _) in enumerate(SCENES) if modality == "video")
PAIR = next(index for index, (modality, _) in enumerate(SCENES) if modality == "multi-image")


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: tp.load(name) for name in testbed.names()}


@pytest.fixture
def answerer(models: dict[str, Any]) -> Answerer:
    return Answerer(models)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    noise(90, 60).save(tmp_path / "my photo.png")
    noise(60, 90, 1).save(tmp_path / "b.jpg")
    frames = [noise(40, 30, seed) for seed in range(20)]
    frames[0].save(tmp_path / "long.gif", save_all=True, append_images=frames[1:])
    (tmp_path / "broken.png").write_bytes((tmp_path / "my photo.png").read_bytes()[:2000])
    (tmp_path / "text.png").write_text("hello")
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    return tmp_path


# --- what is shown --------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "number"), [("testbed-next", 0), ("testbed-onevision", VIDEO)])
def test_answers_equal_those_of_a_plain_run(answerer: Answerer, model: str, number: int) -> None:
    pipe, asked = answerer.models[model], scene(number)
    found = answerer.answers(model, Source(number=number), asked.question, chosen(MIXED, 0.3))
    images = [picture.open() for picture in asked.images]
    for one in found.each:
        media = {"videos": [images]} if asked.video else {"images": [images]}
        inputs = pipe.prepare(media.get("images"), [asked.question], media.get("videos"))
        with tp.compress(pipe.model, one.compressor) as trace:
            ids = pipe.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        assert [one.text] == pipe.decode(ids, inputs)
        assert one.ledger == trace.ledger
        assert one.milliseconds > 0
        if one.compressor is not None:
            shown = trace.show(images if asked.video else images[0])
            assert one.drawings[0].tobytes() == shown.tobytes()
    assert [one.label for one in found.each] == ["uncompressed", *MIXED]
    places = ["all tokens", "before the LLM", "before layer 1", "in the vision encoder"]
    assert [one.where for one in found.each][:4] == places
    assert found.clip.video == asked.video


def test_the_encoder_runs_once_per_image(
    answerer: Answerer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = answerer.models["testbed-next"]
    encode, seen = pipe.encode, []
    monkeypatch.setattr(pipe, "encode", lambda *a, **k: seen.append(k) or encode(*a, **k))
    forwards: list[int] = []
    hook = pipe.adapter.vision_layers[0].register_forward_hook(lambda *_: forwards.append(1))

    def show(number: int, question: str, specs: list[str], retention: float) -> None:
        source = Source(number=number)
        answerer.answers("testbed-next", source, question, chosen(specs, retention))

    for retention in (0.1, 0.5, 0.25):
        show(0, "How many objects are there?", ["uniform", "globalcom2"], retention)
    show(0, "Is there a red square?", ["globalcom2", "fastv"], 0.25)
    assert len(seen) == len(forwards) == 1, "neither the slider nor the question encodes again"
    show(0, "Is there a red square?", ["globalcom2", "visionzip"], 0.25)
    assert len(forwards) == 2, "keys and attention of another layer"
    show(0, "Is there a red square?", ["globalcom2", "uniform"], 0.25)
    show(1, "Is there a red square?", ["globalcom2", "uniform"], 0.25)
    assert len(forwards) == 3, "another image"
    hook.remove()


def test_several_threads_get_their_own_answers(answerer: Answerer) -> None:
    prompts = [(0, 0.3), (1, 0.2), (2, 0.5), (3, 0.1)]

    def ask(number: int, retention: float, into: dict[int, Any]) -> None:
        methods = chosen(["globalcom2", "fastv"], retention)
        found = answerer.answers(
            "testbed-next", Source(number=number), scene(number).question, methods
        )
        into[number] = [(one.text, one.ledger, one.drawings[0].tobytes()) for one in found.each]

    alone: dict[int, Any] = {}
    together: dict[int, Any] = {}
    for prompt in prompts:
        ask(*prompt, alone)
    threads = [threading.Thread(target=ask, args=(*prompt, together)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert len({str(one) for one in alone.values()}) == 4


def test_the_cards_say_what_was_found(answerer: Answerer) -> None:
    methods = chosen(["uniform@0.005", "fastv"], 0.25)
    found = answerer.answers("testbed-next", Source(), "<b>how many?", methods)
    page = cards(found, truth=found.each[0].text.upper(), hint="a <hint>")
    for one in found.each:
        ledger = one.ledger
        spec = "uncompressed" if one.compressor is None else tp.spec.format(one.compressor)
        card = page.split(f'data-spec="{spec}"')[1].split("</article>")[0]
        assert f"{ledger.kept_patches} of {ledger.patch_tokens} (" in card
        assert f"{ledger.flops / 1e9:.3g} GFLOPs" in card
        assert f"{100 * ledger.flops / ledger.uncompressed_flops:.3g} %" in card
        assert ("✓" in card) == (one.text == found.each[0].text)
        assert card.count("<img") == 1
        assert card.count('class="tp-note"') == (spec == "uniform@0.005")
    assert "a &lt;hint&gt;" in page
    assert "✓" not in cards(found)


# --- the lines ------------------------------------------------------------------------------------


def run_python(code: str, folder: Path) -> list[str]:
    """What a program prints when it runs in ``folder``."""
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        exec(compile(code, "lines", "exec"), {"__name__": "__main__"})
    return printed.getvalue().splitlines()


def run_command(lines: str, folder: Path) -> pd.DataFrame:
    """The table that the lines for a shell write when they run in ``folder``."""
    if lines.startswith("python -c "):
        first, _, lines = lines.partition("\n")
        run_python(shlex.split(first)[2], folder)
    program, command, *words = shlex.split(lines)
    assert program == "tokenprune"
    with contextlib.chdir(folder):
        result = CliRunner().invoke(app, [command, "--out", "found", *words])
    assert result.exit_code == 0, f"{lines}\n{result.output}"
    return pd.read_csv(folder / "found" / "kept.csv", keep_default_na=False, dtype={"answer": str})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "names", "number", "question"),
    [
        ("testbed-next", ["my photo.png"], 0, "-Is it 'red' or \"b.png"),
        ("testbed-onevision", ["long.gif"], 0, "What\nis --first?"),
        ("testbed-onevision", [], VIDEO, scene(VIDEO).question),
        ("testbed-onevision", [], PAIR, scene(PAIR).question),
    ],
)
def test_the_lines_give_what_is_shown(
    answerer: Answerer,
    files: Path,
    model: str,
    names: list[str],
    number: int,
    question: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Figures are slow, and tested elsewhere; the table counts here.
    masks = "tokenprune.experiments.masks.run"
    monkeypatch.setattr(f"{masks}.draw", lambda *_: Figure())
    for figure in ("pages", "heat_pages"):
        monkeypatch.setattr(f"{masks}.{figure}", lambda *_: [Figure()])
    source = Source(tuple(files / name for name in names), number)
    methods = chosen(["globalcom2", "fastv:layer=1", "uniform@0.5 + fastv@0.5"], 0.3)
    found = answerer.answers(model, source, question, methods)
    recipe = Recipe(model, source, found.clip, question, methods, 8)
    printed = run_python(recipe.python, files)
    assert printed[0] == f"uncompressed: {found.each[0].text}"
    for index, one in enumerate(found.each[1:]):
        assert printed[1 + 2 * index].endswith(f": {one.text}")
        assert printed[2 + 2 * index] == repr(one.ledger), "tokens, FLOPs and bytes"
        kinds = [""] if found.clip.video else [f"-{i}" for i in range(len(one.drawings))]
        for kind, drawing in zip(kinds, one.drawings, strict=True):
            with Image.open(files / f"kept-{index}{kind}.png") as saved:
                assert saved.tobytes() == drawing.tobytes()
    table = run_command(recipe.command, files)
    groups = table.groupby(["method", "retention", "acts"], sort=False)
    assert [group["answer"].iloc[0] for _, group in groups] == [one.text for one in found.each]
    kept = [one.ledger.kept_patches for one in found.each]
    assert [sum(group["kept"]) for _, group in groups] == kept


def test_the_lines_load_the_model_and_the_methods_as_the_page_does() -> None:
    class Mine(tp.create("uniform", retention=0.5).__class__):  # type: ignore[misc]
        __module__ = "my_module"

    clip = Clip((noise(8, 8),))
    loading = {"device": "cuda:1", "dtype": "bfloat16", "trust_remote_code": True}
    methods: list[Compressor] = [tp.create("fastv", retention=0.5), Mine(retention=0.5)]
    recipe = Recipe("a/b", Source((Path("x.png"),)), clip, "?", methods, 5, loading)
    assert "tp.load('a/b', device='cuda:1', dtype='bfloat16', trust_remote_code=True)" in (
        recipe.python
    )
    assert recipe.python.startswith("import my_module\n")
    assert "max_new_tokens=5" in recipe.python
    words = shlex.split(recipe.command)
    assert words[words.index("--plugin") + 1] == "my_module"
    assert words[words.index("--device") + 1] == "cuda:1"
    assert "--trust-remote-code" in words
    assert words[-3:] == ["--prompt=?", "--", "x.png"]


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["broken.png"], "cannot decode the image 'broken.png'"),
        (["text.png"], "'text.png' is no PNG, JPEG"),
        (["huge.png"], "'huge.png' has 9000 x 9000 pixels, more than the limit of 64,000,000"),
        (["long.gif"], "the model testbed-next takes images only; choose testbed-onevision"),
        (["long.gif", "b.jpg"], "'long.gif' is animated, so it is a video; upload it alone"),
        (["b.jpg"] * 17, "got 17 files; upload at most 16"),
    ],
)
def test_bad_uploads_are_refused_with_a_sentence(
    answerer: Answerer, files: Path, names: list[str], said: str
) -> None:
    source = Source(tuple(files / name for name in names))
    methods = chosen(["uniform", "fastv"], 0.5)
    with pytest.raises(UserError) as refused, warnings.catch_warnings(action="error"):
        answerer.answers("testbed-next", source, "What?", methods)
    assert said in str(refused.value)
    assert str(files) not in str(refused.value), "where the server keeps it"


def test_a_film_counts_all_its_frames(answerer: Answerer, files: Path) -> None:
    source = Source((files / "long.gif",), limit=20 * 40 * 30 - 1)
    with pytest.raises(UserError, match="has 20 frames of 40 x 30 pixels, more than"):
        source.open()
    clip = Source((files / "long.gif",), limit=20 * 40 * 30).open()
    assert (clip.video, len(clip.pictures)) == (True, 8)
    assert clip.sampled[0] == 0
    assert clip.sampled[-1] == 19
    frames = Source((files / "b.jpg",) * 2, as_video=True).open()
    assert (frames.video, len(frames.pictures), frames.sampled) == (True, 2, ())


@pytest.mark.parametrize(
    ("question", "specs", "said"),
    [
        ("  ", ["uniform", "fastv"], "the question is empty"),
        ("?", ["uniform"], "choose two to four methods, got 1"),
        ("?", ["uniform", "fastv", "first", "last", "random"], "two to four methods, got 5"),
        ("?", ["uniform", "fastv", "uniform"], "uniform@0.5 is chosen twice"),
        ("?", ["uniform", "fastv:layers=3"], "no option of fastv is called 'layers'"),
        ("?", ["uniform", "nonsense"], "no method is called 'nonsense'"),
        ("?", ["uniform", "fastv:layer=99"], "layer 98 of the decoder, which has 6"),
        ("word " * 4000, ["uniform", "fastv"], "shorten the text"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(
    answerer: Answerer, question: str, specs: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        answerer.answers("testbed-next", Source(), question, chosen(specs, 0.5))


def test_a_spec_from_the_page_runs_no_code(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError):
        chosen(["evil:Class", "uniform"], 0.5)
    assert "evil" not in sys.modules


# --- the command ----------------------------------------------------------------------------------


def test_without_gradio_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda _: None)
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == BAD_INPUT
    assert "needs Gradio, which is not installed; run pip install -e '.[demo]'" in result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--port 70000", "--port must be at most 65535"),
        ("-m uniform", "choose two to four methods, got 1"),
        ("--model timm/vit_tiny_patch16_224", "has no language model"),
    ],
)
def test_bad_options_are_refused(words: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda _: True)
    result = CliRunner().invoke(app, ["demo", *words.split()])
    assert result.exit_code == BAD_INPUT
    assert said in result.stderr
