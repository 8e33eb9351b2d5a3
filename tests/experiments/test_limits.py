"""Invalid numbers, prompts and paths are refused before anything runs."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pandas as pd
import pytest
import torch
import typer.main
from click import Context
from PIL import Image
from transformers import LlamaConfig
from typer.testing import CliRunner, Result

import tokenprune as tp
from tokenprune import console
from tokenprune.allocators import ThumbnailCommand
from tokenprune.cli import app
from tokenprune.compatibility import check_length
from tokenprune.errors import UserError, unknown
from tokenprune.experiments.common.limits import LIMITS, check_lengths, check_number
from tokenprune.experiments.common.questions import Picture, Question
from tokenprune.experiments.common.request import CompareRequest
from tokenprune.experiments.common.setting import Setting
from tokenprune.experiments.compare.run import run as compare
from tokenprune.experiments.masks.look import look
from tokenprune.plugins import own_class
from tokenprune.registry import strategies
from tokenprune.spec import parse
from tokenprune.testing.host import Host

DIGITS = "9" * 4301  # more than Python reads as a number
NO_NUMBERS = ("nan", "inf", "-inf", "1e400", str(10**20), f"-{10**20}", DIGITS, f"-{DIGITS}")


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


# --- options --------------------------------------------------------------------------------------

# Arguments that complete a command; the files need not exist.
COMPLETE = {
    "audit": ["uniform"],
    "report": ["run"],
    "pairs": ["run"],
    "ablation": ["fastv:layer=1,2"],
    "convert": ["uniform", "--config", "testbed-next"],
    "efficiency": ["--config", "testbed-next"],
}


def numeric() -> Iterator[tuple[str, str]]:
    """Every option of every command that is a number, or a list of retentions."""
    group: Any = typer.main.get_command(app)
    context = Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        hints = get_type_hints(command.callback)
        for option in command.params:
            hint = hints.get(option.name)
            kinds = {hint, *get_args(hint)}
            if kinds & {int, float} or option.name == "retention":
                yield name, option.opts[0]


def test_there_are_numeric_options() -> None:
    found = set(numeric())
    assert len(found) > 30
    assert {("compare", "--questions"), ("convert", "--tokens"), ("masks", "--retention")} < found


@pytest.mark.parametrize(("name", "option"), sorted(numeric()))
def test_nan_and_infinity_are_refused_at_once(
    name: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [name, *COMPLETE.get(name, [])]
    if option == "--text-tokens":
        words = [word.replace("uniform", "uniform@0.5") for word in words]
    for value in NO_NUMBERS:
        started = time.monotonic()
        result = invoke(*words, f"{option}={value}")
        assert result.exit_code == console.BAD_INPUT, (value[:30], result.output)
        assert "Traceback" not in result.output
        assert time.monotonic() - started < 10
    assert not list(tmp_path.rglob("answers.jsonl")), "nothing was computed"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("masks --max-new-tokens 0", "--max-new-tokens must be at least 1"),
        ("masks --seed -1", "--seed must be at least 0"),
        ("pairs run --seed -1", "--seed must be at least 0"),
        ("efficiency --config testbed-next --repeats 0", "--repeats must be at least 1"),
        ("efficiency --config testbed-next --batch-size -2", "--batch-size must be at least 1"),
        ("efficiency --config testbed-next --layers 2", "add --measure"),
        ("efficiency --config testbed-next --measure --layers 0", "--layers must be at least 1"),
        ("efficiency --config testbed-next --text-tokens -1", "--text-tokens must be at least 0"),
        ("efficiency --config testbed-next -r ,", "--retention needs at least one value"),
        ("efficiency --config testbed-next -m ,", "--methods needs at least one value"),
        ("masks -m ,", "--methods needs at least one value"),
        ("pairs run -m ,", "--methods needs at least one value"),
        ("convert uniform@0.5 --config testbed-next --patches 999x999", "4096 positions"),
        ("convert uniform@0.5 --config testbed-next --text-tokens 4000", "4096 positions"),
        ("convert uniform@0.5 --config testbed-next --image-size 1x1000000", "six digits"),
    ],
)
def test_other_invalid_numbers(
    words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*words.split())
    assert result.exit_code == console.BAD_INPUT, result.output
    assert said in " ".join(result.stderr.split())


def test_the_bounds_of_the_limits() -> None:
    for name, (low, high) in LIMITS.items():
        check_number(name, low)
        check_number(name, high)
        check_number(name, None)
        for value in (low - 1, high + 1, 10**5000, -(10**5000), math.nan, math.inf, 2.0):
            with pytest.raises(UserError, match="--" + name.replace("_", "-")):
                check_number(name, value)  # type: ignore[arg-type]
    check_number("questions", 0, least=0)


@pytest.mark.parametrize("path", ["/", "folder", "file/below"])
@pytest.mark.parametrize("words", ["report run", "benchmark --quick --only growth"])
def test_a_file_that_cannot_be_written(
    words: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tokenprune.experiments.report.run.manifest_of", lambda folder: {})
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    result = invoke(*words.split(), "--out", path)
    assert result.exit_code == console.BAD_INPUT
    assert "cannot write to" in result.stderr


# --- methods --------------------------------------------------------------------------------------


def plain(hint: Any) -> Any:
    """The annotation without limits, options and None."""
    while get_origin(hint) is not None and get_origin(hint) not in (tuple, Literal):
        hint = next(one for one in get_args(hint) if one is not type(None))
    return plain(get_args(hint)[0]) if get_origin(hint) is tuple else hint


FIELDS = [
    (name, field.name)
    for name in strategies.names()
    for field in dataclasses.fields(strategies.get(name))
    if plain(get_type_hints(strategies.get(name), include_extras=True)[field.name]) in (int, float)
]


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_every_number_of_every_method_has_bounds(name: str, field: str) -> None:
    kept = {} if field == "retention" else {"retention": 0.5}
    for text in NO_NUMBERS:
        with pytest.raises(UserError):
            parse(f"{name}:{field}={text}", **kept)
    for value in (math.nan, math.inf, -math.inf, 10**20, -(10**20), 10**5000):
        for given in (value, (0.5, value)):
            with pytest.raises(UserError):
                tp.create(name, **kept, **{field: given})


def test_there_are_numbers_in_methods() -> None:
    assert {("gprune", "steps"), ("gprune", "threshold"), ("fitprune", "shares")} < set(FIELDS)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("gprune:steps=100000000000000000000", "less than or equal to 1000"),
        ("fitprune:steps=1001", "less than or equal to 1000"),
        ("gprune:temperature=1e-300", "greater than or equal to 0.000001"),
        ("vidcom2:temperature=1e-300", "greater than or equal to 0.000001"),
        ("pyramiddrop:depths=0.5/0.25", "must rise"),
        ("pyramiddrop:depths=0.5/0.5", "must rise"),
        ("sparsevlm:depths=0.5/0.25", "must rise"),
        ("pyramiddrop:cut=4", "cut=4 of 3 cuts"),
        ("sparsevlm:cut=4", "cut=4 of 3 cuts"),
        ("fitprune:shares=0.5/0.25,cut=3", "cut=3 of 2 cuts"),
        ("fastv:layer=2,layer=3", "'layer' is given twice"),
        ("fastv:retention=0.5@0.25", "'retention' is given twice"),
        ("uniform:name=x", "no option of uniform is called 'name'"),
        ("uniform:spec=x", "no option of uniform is called 'spec'"),
        ("..x:Y", "cannot read 'Y' in '..x:Y'"),
        ("pyramiddrop:depths=" + "/".join(["0.5"] * 100_000), "is too long"),
        (" + ".join(["fastv@0.5"] * 100_000), "is too long"),
        ("fastv:layer=" + "(" * 100_000, "is too long"),
    ],
)
def test_invalid_specs(spec: str, said: str) -> None:
    own_class(spec)  # as every command does; imports nothing
    started = time.monotonic()
    with pytest.raises(UserError, match=said.replace("(", r"\(")) as caught:
        parse(spec) if "@" in spec else parse(spec, retention=0.5)
    assert time.monotonic() - started < 1
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("path", ["..x:Y", ".x:Y", "x.:Y", "x..y:Y", ":Y", ".:Y", "x:1"])
def test_names_that_no_module_can_have(path: str) -> None:
    assert own_class(path) is None


def test_the_label_of_a_chain_keeps_every_digit() -> None:
    for share in (1 / 3, 0.1234567890123, 0.5, 1 - 1e-12):
        chain = parse(f"uniform@{share!r} + fastv@{share!r}")
        assert parse(chain.label) == chain
    assert parse("uniform@0.50 + fastv@0.25").label == "uniform@0.5 + fastv@0.25"


# --- messages -------------------------------------------------------------------------------------


def test_messages_with_any_input_can_be_printed() -> None:
    assert str(UserError("a\x1b[31mb\0c\udcffd\re")) == r"a\x1b[31mb\x00c\udcffd\re"
    assert str(UserError("é 数 ² „x“\n- y\tz")) == "é 数 ² „x“\n- y\tz"
    long = str(UserError("begin " + "x" * 100_000 + " end."))
    assert long.startswith("begin ")
    assert long.endswith(" end.")
    assert len(long) < 2000
    assert "characters" in long
    assert "'uniform'" in str(unknown("strategy", "unifrom", ["uniform"]))
    assert len(str(unknown("strategy", "x" * 10**6, ["uniform"]))) < 2000


# --- prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rope", "known"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 100),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, 400),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, 200),
        (
            {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 25,
            },
            100,
        ),
    ],
)
def test_positions_with_rotary_scaling(host: Host, rope: dict[str, Any], known: int) -> None:
    config = LlamaConfig(max_position_embeddings=100, rope_parameters=rope)
    host.adapter.language_model.config.max_position_embeddings = 100
    host.adapter.language_model.config.rope_parameters = config.rope_parameters
    assert host.adapter.facts.decoder.positions == known
    check_length(host.adapter.facts, known)
    check_length(host.adapter.facts, known - 3, 3)
    with pytest.raises(UserError, match=f"knows {known} positions"):
        check_length(host.adapter.facts, known - 3, 4)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tp.load("testbed-next")


@pytest.fixture
def untouched(pipe: Any) -> Iterator[None]:
    """Neither the vision encoder nor the language model runs."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the model was run")

    modules = (pipe.adapter.vision_tower, pipe.adapter.language_model)
    handles = [module.register_forward_pre_hook(refuse) for module in modules]
    yield
    for handle in handles:
        handle.remove()


def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (112, 112, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


LONG = "what " * 5000


@pytest.mark.usefixtures("untouched")
def test_a_prompt_beyond_the_positions_is_not_prepared(pipe: Any) -> None:
    with pytest.raises(UserError, match="4096 positions"):
        pipe.prepare([picture()], [LONG])
    assert pipe.prepare([picture()], [LONG], longer=True)["input_ids"].shape[1] > 4096


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("method", [None, "fastv", "fitprune"])
def test_no_forward_begins_beyond_the_positions(pipe: Any, method: str | None) -> None:
    inputs = pipe.prepare([picture()], [LONG], longer=True)
    fields = {"retention": 0.5} if method else {}
    with tp.compress(pipe.model, method, **fields), pytest.raises(UserError, match="positions"):
        pipe.model(**inputs)


def test_generate_does_not_reach_the_decoder_beyond_the_positions(pipe: Any) -> None:
    inputs = pipe.prepare([picture()], [LONG], longer=True)
    handle = pipe.adapter.decoder_layers[0].register_forward_pre_hook(lambda *_: 1 / 0)
    try:
        with (
            tp.compress(pipe.model, "fastv", retention=0.5),
            pytest.raises(UserError, match="positions"),
        ):
            pipe.model.generate(**inputs, max_new_tokens=1)
    finally:
        handle.remove()


def test_a_prompt_that_fits_after_compression_is_accepted(host: Host) -> None:
    inputs = host.inputs([0])
    whole = inputs["input_ids"].shape[1]
    config = host.adapter.language_model.config
    for limit, method, fits in [
        (whole, "fastv", True),
        (whole - 1, "fastv", False),
        (whole - 1, "uniform", True),
        (whole - 1, "uniform:position_ids=original", False),
        (3, "uniform", False),
    ]:
        config.max_position_embeddings = limit
        with tp.compress(host.model, method, retention=0.5):
            if fits:
                host.model(**inputs)
            else:
                with pytest.raises(UserError, match=f"knows {limit} positions"):
                    host.model(**inputs)


LONG_ONE = Question("long", (Picture("a", picture()),), LONG, "yes")


@pytest.mark.usefixtures("untouched")
def test_questions_beyond_the_positions_are_refused(pipe: Any, tmp_path: Path) -> None:
    request = CompareRequest(methods=["uniform"], retention=[0.5], out=tmp_path / "run")
    with pytest.raises(UserError, match="'long': the prompt has"):
        compare(request, setting=Setting(pipe, [LONG_ONE]))
    assert not list(tmp_path.rglob("*.json*")), "nothing is written"
    with pytest.raises(UserError, match="positions"):
        look(pipe, [picture()], LONG, ["uniform"], 0.5)


def test_a_question_beyond_the_positions_fails_alone(pipe: Any, tmp_path: Path) -> None:
    short = dataclasses.replace(LONG_ONE, id="short", question="What?")
    request = CompareRequest(methods=["uniform"], retention=[0.5], out=tmp_path / "run")
    with pytest.warns(RuntimeWarning, match="1 of 2 questions cannot be asked"):
        outcome = compare(request, setting=Setting(pipe, [LONG_ONE, short]))
    answers = pd.read_parquet(outcome.folder / "answers.parquet")
    assert set(answers.loc[answers["status"] == "ok", "question_id"]) == {"short"}
    assert set(answers.loc[answers["status"] != "ok", "question_id"]) <= {"long"}


def test_the_length_is_that_of_the_prompt_that_is_run(pipe: Any, tmp_path: Path) -> None:
    """Of files, turned ones and several images; the longest that fits and one token more."""
    image = picture().resize((150, 60))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    shown = Picture("turned", tmp_path / "turned.jpg")
    item = Question("0", (shown,), "Which digit is on the red circle?", "3")
    length = pipe.prepare([shown.open()], [item.question])["input_ids"].shape[1]
    known = pipe.adapter.facts.decoder.positions
    check_lengths(pipe, [item], known - length)
    with pytest.raises(UserError, match=f"has {length} tokens and {known - length + 1}"):
        check_lengths(pipe, [item], known - length + 1)


def test_the_length_of_a_video_and_of_several_images() -> None:
    pipe = tp.load("testbed-onevision")
    images = tuple(Picture(str(index), picture()) for index in range(3))
    shown = [one.open() for one in images]
    video = Question("v", images, "What?", "yes", video=True)
    several = Question("s", images, "What?", "yes")
    prompts: list[tuple[Question, Callable[[], Any]]] = [
        (video, lambda: pipe.prepare(None, ["What?"], videos=[shown])),
        (several, lambda: pipe.prepare([shown], ["What?"])),
    ]
    for item, prepare in prompts:
        length = prepare()["input_ids"].shape[1]
        check_lengths(pipe, [item], pipe.adapter.facts.decoder.positions - length)
        with pytest.raises(UserError, match=f"has {length} tokens"):
            check_lengths(pipe, [item], pipe.adapter.facts.decoder.positions - length + 1)


def test_allocators_made_in_python() -> None:
    for tau in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UserError, match="tau"):
            ThumbnailCommand(tau)
    assert torch.isfinite(torch.tensor(ThumbnailCommand(5.0).tau))
