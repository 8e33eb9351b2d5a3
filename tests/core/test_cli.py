"""The command line: reading of options, output and exit status."""

import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import PIL.Image
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner, Result

import tokenprune as tp
from tokenprune import console
from tokenprune.cli import app
from tokenprune.console import spread
from tokenprune.cost.ledger import FIGURES
from tokenprune.experiments.common.csv_files import read_csv
from tokenprune.experiments.common.journal import Journal
from tokenprune.experiments.common.request import CompareRequest
from tokenprune.experiments.compare import command
from tokenprune.experiments.compare.tables import _divergence_table, tables
from tokenprune.spec import split


def invoke(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[CompareRequest]:
    """The requests that the command would run."""
    requests: list[CompareRequest] = []
    monkeypatch.setattr(command, "_compare", lambda one, *_, **__: requests.append(one) or 0)
    return requests


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["-m", "a", "b", "c"], ["-m", "a", "-m", "b", "-m", "c"]),
        (["-m", "a", "--seed", "1", "b"], ["-m", "a", "--seed", "1", "b"]),
        (["-m", "a", "-r", "1", ".5"], ["-m", "a", "-r", "1", "-r", ".5"]),
        (["-r", "-0.5"], ["-r", "-0.5"]),
        (["-m=a", "b"], ["-m=a", "-m", "b"]),
        (["-m"], ["-m"]),
        (["--seed", "1"], ["--seed", "1"]),
        (["a", "-m", "b"], ["a", "-m", "b"]),
    ],
)
def test_spread(words: list[str], expected: list[str]) -> None:
    assert spread(words, {"-m", "-r"}) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["a,b"], ["a", "b"]),
        (["a:x=1,y=2,b:z=3"], ["a:x=1,y=2", "b:z=3"]),
        (["a:x=1, y=2 , b", "c"], ["a:x=1, y=2", "b", "c"]),
        (["a,", ""], ["a"]),
    ],
)
def test_split(given: list[str], expected: list[str]) -> None:
    assert list(split(given)) == expected


@pytest.mark.parametrize(
    "words",
    [
        "--methods globalcom2:alpha=0.3,tau=5 fastv:layer=3 --retention 0.5 0.25",
        "--methods globalcom2:alpha=0.3,tau=5,fastv:layer=3 --retention 0.5,0.25",
        "-m globalcom2:alpha=0.3,tau=5 -m fastv:layer=3 -r 0.5 -r 0.25",
        "--methods=globalcom2:alpha=0.3,tau=5 fastv:layer=3 --retention=0.5,0.25",
    ],
)
def test_lists_can_be_written_in_every_usual_way(asked: list[CompareRequest], words: str) -> None:
    assert invoke("compare", *words.split(), "--seed", "4").exit_code == 0
    assert asked[0].methods == ("globalcom2:alpha=0.3,tau=5", "fastv:layer=3")
    assert asked[0].retention == (0.5, 0.25)
    assert asked[0].seed == 4


def test_groups_of_options_reach_the_request(asked: list[CompareRequest]) -> None:
    words = "--attn eager --device-map auto --quantize 8bit --revision v1 --split val"
    texts = ["--suffix", "Be brief.", "--template", "{question}!", "--system", "You see."]
    assert invoke("compare", *words.split(), *texts).exit_code == 0
    assert asked == [
        CompareRequest(
            attn="eager", device_map="auto", quantize="8bit", revision="v1", split="val",
            suffix="Be brief.", template="{question}!", system="You see.",
        )
    ]  # fmt: skip


def test_no_arguments_are_the_defaults(asked: list[CompareRequest]) -> None:
    assert invoke("compare").exit_code == 0
    assert asked == [CompareRequest()]


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("-m fastw", "Did you mean 'fastv'"),
        ("-m fastv:layr=3", "Did you mean 'layer'"),
        ("-m fastv:layer=many", "layer='many' is not valid"),
        ("-m fastv:3", "cannot read '3'"),
        ("-m fastv:layer=99", "layer"),
        ("-r 1.5", "at most 1"),
        ("-r 50", "for 50 % write 0.5"),
        ("-r 0", "larger than 0"),
        ("-r -0.5", "larger than 0"),
        ("-r nan", "larger than 0"),
        ("-r half", "got 'half'"),
        ("--model testbed-nxt", "Did you mean 'testbed-next'"),
        ("--model ./no/such/folder", "no/such/folder"),
        ("--dtype float31", "Did you mean 'float32'"),
        ("--device cdua", "cdua"),
        ("--questions 0", "--questions must be at least 1"),
        ("--batch-size 0", "--batch-size must be at least 1"),
        ("--max-new-tokens -1", "--max-new-tokens must be at least 1"),
        ("--seed -1", "--seed"),
        ("--data no.jsonl", "cannot read the data file 'no.jsonl'"),
        ("--out file/run", "cannot write to the output folder"),
        ("--out .", "not the folder of a run"),
    ],
)
def test_bad_input_is_a_sentence(
    words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    given = words if "--questions" in words or "--data" in words else f"{words} --questions 5"
    result = invoke("compare", *given.split())
    assert result.exit_code == console.BAD_INPUT
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert result.stderr.rstrip()[-1] in ".)"
    assert "Traceback" not in result.output
    assert not list(tmp_path.rglob("answers.jsonl")), "nothing was computed"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_refused_without_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("compare", "--device", "cuda", "--questions", "5")
    assert result.exit_code == console.BAD_INPUT
    assert "no CUDA device" in result.stderr


@pytest.mark.parametrize(
    "words", ["compare --methods --out x", "efficiency -m fastv -r --out x", "compare -m -r 0.5"]
)
def test_an_option_name_is_not_taken_as_a_value(words: str) -> None:
    result = invoke(*words.split())
    assert result.exit_code == console.BAD_INPUT
    assert "needs at least one value" in result.stderr


def test_unknown_options_and_commands() -> None:
    result = invoke("compare", "--retentoin", "0.5")
    assert result.exit_code == console.BAD_INPUT
    assert "--retention" in result.stderr
    assert invoke("compair").exit_code == console.BAD_INPUT


# --- running --------------------------------------------------------------------------------------

SMALL = ("compare", "-m", "uniform", "fastv", "-r", "0.25", "--questions", "5")


def test_a_comparison_and_the_same_again(tmp_path: Path) -> None:
    first = invoke(*SMALL, "--out", str(tmp_path / "run"))
    assert first.exit_code == console.OK, first.output
    for word in (
        "uncompressed",
        "uniform",
        "fastv",
        "100 %",
        "25 %",
        "digit",
        "25 answers in",
        "image-free",
    ):
        assert word in first.stdout
    assert str(tmp_path / "run") in first.stdout
    assert "\x1b" not in first.output, "no colours where there is no terminal"
    second = invoke(*SMALL, "--out", str(tmp_path / "run"))
    assert second.exit_code == console.OK
    assert "nothing was computed again" in second.stdout
    third = invoke(*SMALL, "--seed", "1", "--out", str(tmp_path / "run"))
    assert third.exit_code == console.BAD_INPUT
    assert "seed: 0 there, 1 here" in third.stderr


def test_several_seeds(tmp_path: Path) -> None:
    words = ["compare", "-m", "random", "-r", "0.25", "--questions", "5", "--seeds", "3"]
    result = invoke(*words, "--out", str(tmp_path))
    assert result.exit_code == console.OK, result.output
    frame = pd.read_parquet(tmp_path / "answers.parquet")
    each = frame[frame["method"] == "random"].groupby("parameters")["correct"].mean()
    assert len(each) == 3
    spread = "random at 0.25: 3 seeds, whose accuracies have a standard deviation of "
    assert f"{spread}{100 * each.std():.1f} points" in result.stdout
    assert "fastv" not in result.stdout


def _answer(label: str, number: int, kind: str, *, correct: bool) -> dict[str, Any]:
    """A row of ``answers.parquet``."""
    asked = {"question_id": f"q{number}", "image_id": f"i{number}", "question": "?", "kind": kind}
    said = {"truth": "yes", "answer": "yes" if correct else "no", "correct": correct}
    names = {"model": "m", "method": label.partition(":")[0], "parameters": "{}", "label": label}
    return {**names, "retention": 0.25, **asked, **said, "agrees": True, "status": "ok"}


def test_pairs_of_a_run(tmp_path: Path) -> None:
    rows = [
        _answer(label, i, "count" if i < 4 else "digit", correct=i < right)
        for label, right in (("globalcom2:alpha=0.3,tau=5", 10), ("uniform", 4), ("fastv", 9))
        for i in range(12)
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "answers.parquet")
    result = invoke("pairs", str(tmp_path))
    assert result.exit_code == console.OK, result.output
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 80
    assert re.search(r"uniform +\+50\.0 \(\+25\.0 to \+\d\d\.\d\) +0\.031 +0\.094", result.stdout)
    written = pd.read_csv(tmp_path / "pairs.csv")
    assert list(written["only_first"]) == [6, 1, 0]
    assert (
        invoke("pairs", str(tmp_path), "--kind", "digit", "-m", "fastv", "uniform").exit_code == 0
    )
    assert list(pd.read_csv(tmp_path / "pairs-digit.csv")["n"]) == [8]
    for words, said in (
        (["--methods", "fastw"], "Did you mean 'fastv'"),
        (["--kind", "counts"], "Did you mean 'count'"),
        (["--methods", "fastv"], "at least two"),
    ):
        bad = invoke("pairs", str(tmp_path), *words)
        assert (bad.exit_code, said in bad.stderr) == (console.BAD_INPUT, True), bad.output
    bad = invoke("pairs", str(tmp_path / "nowhere"))
    assert (bad.exit_code, "no answers.parquet" in bad.stderr) == (console.BAD_INPUT, True)


@pytest.mark.parametrize("kind", ["../../x", "/abs", "a/b", "..", "$x$", "a b", "=1+1", "é" * 99])
def test_kinds_of_questions_do_not_become_paths(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "deep" / "run"
    folder.mkdir(parents=True)
    rows = [
        _answer(label, i, kind, correct=i < right)
        for label, right in (("uniform", 2), ("fastv", 3))
        for i in range(4)
    ]
    pd.DataFrame(rows).to_parquet(folder / "answers.parquet")
    before = set(tmp_path.rglob("*"))
    result = invoke("pairs", str(folder), "--kind", kind)
    assert result.exit_code == console.OK, result.output
    (new,) = set(tmp_path.rglob("*")) - before
    assert new.parent == folder
    assert re.fullmatch(r"pairs-[0-9a-f]{12}\.csv", new.name)
    assert read_csv(new)["kind"].tolist() == [kind]


def _data(folder: Path, **changes: Any) -> Path:
    """A data file of one question about a red picture."""
    PIL.Image.new("RGB", (8, 6), "red").save(folder / "a.png")
    path = folder / "my.jsonl"
    path.write_text(json.dumps({"image": "a.png", "question": "Red?", "answer": "yes"} | changes))
    return path


def test_check_reads_everything_and_computes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tokenprune.models.loading.load", None)  # would fail
    data = str(_data(tmp_path, question="<image>\nRed?"))
    fine = invoke("compare", "--data", data, "--check")
    assert fine.exit_code == console.OK, fine.output
    assert fine.stdout.startswith("Questions: 1, images and frames: 1.")
    assert not (tmp_path / "runs").exists()
    for changes, words, said in (
        ({"image": "b.png"}, [], "there is no image"),
        ({"question": "<image> or <image>?"}, [], "has 2 '<image>' placeholders but 1 images"),
        ({"image": None, "video": ["a.png"]}, [], "'image', 'images' and 'video'"),
        ({}, ["--max-image-pixels", "47"], "8 x 6 pixels, more than the limit of 47"),
        ({}, ["-m", "fastw"], "Did you mean 'fastv'"),
    ):
        bad = invoke("compare", "--data", str(_data(tmp_path, **changes)), "--check", *words)
        assert (bad.exit_code, said in bad.stderr) == (console.BAD_INPUT, True), bad.output


def test_control_characters_of_messages_are_escaped(tmp_path: Path) -> None:
    bad = invoke("compare", "--data", str(tmp_path / "a\x1b[2J.jsonl"), "--check")
    assert bad.exit_code == console.BAD_INPUT
    assert "\x1b" not in bad.stderr
    assert "\\x1b[2J" in bad.stderr


@pytest.mark.parametrize(
    "words", [("masks", "\udcff.png"), ("report", "\udcff"), ("list", "\udcff")]
)
def test_arguments_that_no_file_can_hold_are_refused(words: tuple[str, ...]) -> None:
    bad = invoke(*words)
    assert (bad.exit_code, "is not UTF-8" in bad.stderr) == (console.BAD_INPUT, True)


def test_kinds_that_look_like_missing_values_stay_themselves(tmp_path: Path) -> None:
    kinds = ["NA", "None", "nan", "null", "=1+1", "$\\frac{1$"]
    lines = [json.loads(_data(tmp_path, kind=kind).read_text()) for kind in kinds]
    data = tmp_path / "my.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)))
    run = str(tmp_path / "run")
    done = invoke("compare", "--data", str(data), "-m", "uniform", "-r", "0.5", "--out", run)
    assert done.exit_code == console.OK, done.output
    summary = read_csv(tmp_path / "run" / "summary.csv")
    assert list(pd.unique(summary["kind"])) == ["overall", *kinds]
    assert "'=1+1" in (tmp_path / "run" / "summary.csv").read_text()
    for name in ("report", "table"):
        assert invoke(name, run).exit_code == console.OK
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(f">{kind}<" in page for kind in kinds)


def test_a_failing_method_is_shown_and_changes_the_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("[bold]no[/bold] luck")

    monkeypatch.setattr(type(tp.create("uniform", retention=0.5)), "select", fail)
    result = invoke(*SMALL, "--out", str(tmp_path))
    assert result.exit_code == console.FAILED
    assert "FAILED uniform at 0.25: RuntimeError: [bold]no[/bold] luck" in result.stdout
    rows = [line for line in result.stdout.splitlines() if "uniform " in line and "│" not in line]
    assert any(re.search(r"uniform +FAILED", line) for line in rows)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals are another matter there")
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_keeps_what_was_computed(tmp_path: Path, kind: signal.Signals) -> None:
    command = [sys.executable, "-m", "tokenprune", "compare", "--questions", "80"]
    command += ["--batch-size", "5", "-r", "0.25", "--out", str(tmp_path)]
    journal = tmp_path / "answers.jsonl"
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A shell that runs the tests in the background has them ignore Ctrl-C, and their children.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, **pipes, preexec_fn=heed) as process:
        limit = time.monotonic() + 240
        while not journal.exists() or journal.stat().st_size < 1000:
            assert process.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.05)
        os.kill(process.pid, kind)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == console.INTERRUPTED
    assert b"the same command resumes the run" in output
    kept = len(Journal(journal).answers)
    assert f"{kept} of 560 answers".encode() in output
    assert kept == len(journal.read_text().splitlines())
    assert len(pd.read_parquet(tmp_path / "answers.parquet")) == kept


# --- showing --------------------------------------------------------------------------------------


def test_tables_fit_into_80_columns() -> None:
    rows = []
    kinds = ("overall", "existence", "colour", "count", "position", "digit", "reading", "other")
    cells = (
        ("uncompressed", 1.0),
        ("thumbnail-only", math.nan),
        ("globalcom2", 0.25),
        ("fastv", 0.25),
    )
    for label, retention in cells:
        for kind in kinds:
            row: dict[str, Any] = {"method": label, "label": label, "retention": retention}
            row |= {"kind": kind, "status": "failed" if label == "fastv" else "ok", "n": 500}
            row |= {
                "accuracy": 1.0,
                "accuracy_low": 0.9924 if kind == "overall" else 0.963,
                "accuracy_high": 1.0,
            }
            row |= {"agreement": 1.0} | dict.fromkeys(FIGURES, 2880.0)
            row |= {"flops": 41.7e12, "uncompressed_flops": 41.7e12}
            row |= {"vs_uniform": -0.1, "vs_uniform_p": 0.04 if label == "globalcom2" else None}
            ends = ("", "_low", "_high")
            row |= {f"vs_uniform{end}": math.nan for end in ends[1:]} | {
                "easy_n": 400,
                "hard_n": 100,
            }
            for part in ("easy_accuracy", "hard_accuracy"):
                row |= {part: 1.0, f"{part}_low": 0.963, f"{part}_high": 1.0}
            row |= {f"kl{end}": 10.001 for end in ends}
            rows.append(row)
    found = list(tables(pd.DataFrame(rows)))
    assert len(found) == 3, "overall, loyalty, and seven kinds"
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    for table in found:
        console.print(table)
    text = console.export_text()
    assert all(kind in text for kind in kinds[1:]), "in two tables"
    assert "left out" not in text
    assert re.search(r"globalcom2 +100\.0 \(99\.2–100\.0\) +↓", text)
    assert "100.0 (99.2–100.0)  " in text
    assert "100 96–100" in text
    assert "TFLOPs" in text
    assert "…" not in text
    assert text.count("FAILED") == 9
    assert re.search(r"thumbnail-only +100 99–100 +10\.0 10\.0–10\.0 *\n", text)
    assert "accuracy in % on the 400 questions" in re.sub(r"\s+", " ", text)


@pytest.mark.parametrize("width", [60, 80])
def test_few_questions_do_not_break_labels(width: int) -> None:
    """With the widest intervals that there are, every label of the loyalty table is in one line."""
    labels = ("uncompressed", "thumbnail-only", "downsample@0.7143", "spatial-pool@0.51")
    share = {"accuracy": 1.0, "accuracy_low": 0.839, "accuracy_high": 1.0}
    parts = ("easy_accuracy", "hard_accuracy")
    share |= {f"{part}{end}": 1.0 for part in parts for end in ("", "_low", "_high")}
    share |= {f"kl{end}": 1.725 for end in ("", "_low", "_high")} | {"easy_n": 16, "hard_n": 4}
    rows = pd.DataFrame(
        {"method": label, "label": label, "retention": 1.0 if index == 0 else 0.5}
        | share
        | {"status": "ok"}
        for index, label in enumerate(labels)
    )
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(_divergence_table(rows))
    text = console.export_text()
    assert all(label in text for label in labels)
    assert "Columns left out" in text, "instead"


def test_long_labels_break_between_options() -> None:
    assert console.method_label("fastv:layer=3") == "fastv:layer=3"
    assert console.method_label("globalcom2:alpha=0.3,tau=5") == "globalcom2:\n alpha=0.3,\n tau=5"


def test_list() -> None:
    result = invoke("list")
    assert result.exit_code == 0
    for name in tp.list_methods():
        assert name in result.stdout
    for word in ("2501.05179", "2403.06764", "testbed-next", "LlavaNext"):
        assert word in result.stdout


def test_help_is_quick() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from tokenprune.cli import app\n"
        "assert CliRunner().invoke(app, ['compare', '--help']).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'pandas', 'matplotlib', 'scipy'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or None)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, f"--help imports {result.stderr}"


def test_an_interruption_has_status_130_in_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    commands: dict[str, list[str]] = {
        "ablation": ["--paper"],
        "benchmark": [],
        "compare": [],
        "complementarity": [],
        "convert": ["fastv@0.5"],
        "crop-importance": [],
        "demo": [],
        "efficiency": [],
        "export": ["runs", "--method", "uniform"],
        "masks": [],
        "positional-bias": [],
        "report": ["runs"],
        "serving-check": ["testbed-next", "uniform@0.5"],
    }
    for name, words in commands.items():
        folder = {"benchmark": "benchmarks", "convert": "efficiency"}.get(name, name)
        module = f"tokenprune.experiments.{folder.replace('-', '_')}.command"
        monkeypatch.setattr(f"{module}.quiet", interrupted)
        assert invoke(name, *words).exit_code == console.INTERRUPTED, name
    monkeypatch.setattr("tokenprune.cli.new_table", interrupted)
    assert invoke("list").exit_code == console.INTERRUPTED


def test_version() -> None:
    assert invoke("--version").stdout.strip() == tp.__version__


def test_a_methods_card_names_its_source_options_and_deviations() -> None:
    result = CliRunner().invoke(app, ["list", "globalcom2"])
    said = " ".join(result.output.split())
    assert result.exit_code == 0
    for part in ("arXiv 2501.05179", "96b2d00", "tau=10.0", "before LLM", "move into wrong rows"):
        assert part in said
    unknown = CliRunner().invoke(app, ["list", "globalcom"])
    assert unknown.exit_code == 2
    assert "Did you mean 'globalcom2'" in unknown.output
