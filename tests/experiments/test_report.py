"""The page about a run: complete, and safe for any content of answers."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import random
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from report_pages import (
    Page,
    change,
    data_of,
    finished_run,
    lines_of,
    own_run,
    page_of,
    rewrite,
)
from typer.testing import CliRunner

import tokenprune as tp
from tokenprune.cli import app
from tokenprune.errors import UserError
from tokenprune.experiments.common.patch_boxes import ViewSize, patch_boxes
from tokenprune.experiments.common.questions import held_out
from tokenprune.experiments.common.request import CompareRequest
from tokenprune.experiments.compare.run import run as compare
from tokenprune.experiments.report.gallery import _data_uri, _views, planner
from tokenprune.experiments.report.run import ReportRequest, _bound, _script_safe
from tokenprune.experiments.report.run import run as report
from tokenprune.layout import Kind
from tokenprune.models import testbed


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("run") / "testbed")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, which a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own_run(tmp_path_factory.mktemp("own"))


# --- what the page holds --------------------------------------------------------------------------


def test_the_page_of_a_finished_run(run: Path) -> None:
    written = report(ReportRequest(folder=run))
    assert (written.folder, written.files) == (run, ("report.html",))
    assert (written.answered, written.wanted, written.notes) == (20, 20, ())
    page = Page(page_of(written).read_text(encoding="utf-8"))
    for element, attributes in page.elements:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            place = attributes.get(name)
            if place is not None:
                assert place.startswith(("data:", "#", "https://arxiv.org/abs/")), (element, place)
                assert element == "a" or place.startswith("data:"), "a link, not something loaded"
    (style,) = (text for text in page.silent if "color-scheme" in text)
    assert "url(" not in style
    assert "@import" not in style
    manifest = json.loads((run / "manifest.json").read_text())
    experiment = manifest["experiment"]
    for said in (
        "complete",
        experiment["weights"],
        experiment["data"],
        experiment["code"],
        manifest["versions"]["transformers"],
        manifest["git"]["commit"] if manifest["git"] else "",
        "arXiv 2403.06764",
        "eprint = {2403.06764}",
        "@software{tokenprune,",
        "layer average",
    ):
        assert said in page.text
    assert len(page.all("img")) == 3, "accuracy, by cost, by kind"
    assert not list(run.glob(".report*")), "no temporary file is left"


def test_the_script_receives_the_journal(run: Path) -> None:
    report(ReportRequest(folder=run))
    data, lines = data_of(run / "report.html"), lines_of(run)
    keys = {
        ("uncompressed", 1.0): "uncompressed",
        **{
            (label, r): repr(tp.create(label, retention=r))
            for label in ("uniform", "fastv")
            for r in (0.5, 0.1)
        },
    }
    assert [(cell["label"], cell["keep"]) for cell in data["cells"]] == list(keys)
    journal = {(line["cell"], line["question"]): line for line in lines}
    assert len(data["questions"]) == 20
    for item in data["questions"]:
        full = journal["uncompressed", item["id"]]["answer"]
        for index, key in enumerate(keys.values()):
            line = journal[key, item["id"]]
            assert item["answers"][index] == line["answer"]
            assert item["right"][index] == str(int(line["answer"] == item["truth"]))
            assert item["same"][index] == str(int(line["answer"] == full))
            assert item["kept"][index] == line.get("kept")
        pairs = [(i, j) for i in range(5) for j in range(5)]
        for i, j in pairs:
            equal = item["answers"][i] == item["answers"][j]
            assert (item["ways"][i] == item["ways"][j]) == equal
    unlike = [item["same"].count("0") for item in data["questions"]]
    assert unlike == sorted(unlike, reverse=True), "the most informative ones first"
    assert len(data["media"]) == len({json.dumps(item["media"]) for item in data["questions"]})


def test_how_many_and_which(run: Path, tmp_path: Path) -> None:
    few = report(ReportRequest(folder=run, questions=3, out=tmp_path / "few.html"))
    assert (few.answered, few.wanted) == (3, 20)
    first = report(ReportRequest(folder=run, questions=3, first=True, out=tmp_path / "first.html"))
    ids = [item["id"] for item in data_of(page_of(first))["questions"]]
    assert ids == list(dict.fromkeys(line["question"] for line in lines_of(run)))[:3]
    none = report(ReportRequest(folder=run, questions=0, out=tmp_path / "none.html"))
    assert page_of(none).stat().st_size < page_of(few).stat().st_size
    assert data_of(page_of(none))["pictures"] == []


@settings(max_examples=30)
@given(size=st.tuples(st.integers(8, 300), st.integers(8, 300)), several=st.booleans())
def test_the_lattices_are_the_patches(size: tuple[int, int], several: bool) -> None:
    for name in ("testbed-next", "testbed-onevision"):
        notes: list[str] = []
        adapter = planner({"experiment": {"model": name}}, notes, Path("."))
        assert adapter is not None, notes
        layout = adapter.layout(size, same_prompt=several)
        if 0 in layout.canvas_shape and layout.grid != (0, 0):
            continue
        view = ViewSize.of(adapter)
        expected, (height, width) = patch_boxes(layout, size, view), size
        found = np.full_like(expected, np.nan)
        for part in _views(layout, size, view):
            left, top, right, bottom = np.array(part["box"]) * (width, height, width, height)
            rows, cols = np.array(part["rows"]), np.array(part["cols"])
            for row in range(rows.shape[1]):
                for col in range(cols.shape[1]):
                    x = left + cols[:, col] * (right - left)
                    y = top + rows[:, row] * (bottom - top)
                    found[part["at"] + row * part["step"] + col] = [x[0], y[0], x[1], y[1]]
        found = found.clip(0, (width, height, width, height))
        np.testing.assert_allclose(found, expected, atol=2e-5 * max(size) + 1e-6)
        assert np.isnan(found[(layout.kind == Kind.SEPARATOR).numpy()]).all()


@given(st.text())
def test_no_text_ends_the_script_element(text: str) -> None:
    safe = _script_safe({"a": text})
    assert not set(safe) & set("<>&\u2028\u2029")
    assert json.loads(safe)["a"] == text.encode("utf-8", "backslashreplace").decode()


# --- runs that are not as they should be ----------------------------------------------------------


def test_a_report_on_own_data_and_missing_images(own: Path, tmp_path: Path) -> None:
    whole = report(ReportRequest(folder=own / "run", out=tmp_path / "whole.html"))
    assert whole.notes == ()
    data = data_of(page_of(whole))
    assert [len(data["media"]), len(data["pictures"])] == [5, 3], "each picture once"
    assert all(all(item["kept"][1]) for item in data["questions"])
    page = Page(page_of(whole).read_text(encoding="utf-8"))
    assert len(page.all("script")) == 3
    assert len(page.all("b")) == len(data["cells"]) + 2, "of the table alone, with the references"

    moved = Path(shutil.copytree(own, tmp_path / "moved"))
    (moved / "1.png").unlink()
    change(moved / "run", request={"data": str(moved / "gone.jsonl")})
    gone = report(ReportRequest(folder=moved / "run"))
    assert any("give its place with --data" in note for note in gone.notes)
    assert data_of(page_of(gone))["pictures"] == []
    assert gone.answered == 4, "answers stand in answers.parquet"
    found = report(ReportRequest(folder=moved / "run", data=moved / "my.jsonl"))
    assert any("images are missing" in note for note in found.notes)
    again = data_of(page_of(found))
    assert again["pictures"].count(None) == 1
    by_id = {item["id"]: item for item in again["questions"]}
    assert by_id["second"]["kept"][1] is None
    assert by_id["line-1"]["kept"][1]
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):
        report(ReportRequest(folder=moved / "run", data=moved / "nowhere.jsonl"))

    file = moved / "my.jsonl"
    (moved / "1.png").write_bytes((own / "1.png").read_bytes())
    file.write_text(file.read_text().replace("two?", "2?"))
    changed = report(ReportRequest(folder=moved / "run", data=file))
    assert any("have changed since the run" in note for note in changed.notes)


def test_a_run_without_records_of_kept_tokens(run: Path) -> None:
    lines = lines_of(run)
    for line in lines:
        line.pop("kept", None)
    rewrite(run, lines)
    written = report(ReportRequest(folder=run))
    assert any("did not record what was kept" in note for note in written.notes)
    assert all(not any(item["kept"]) for item in data_of(page_of(written))["questions"])


def test_a_record_of_another_image_is_not_drawn(run: Path) -> None:
    lines = lines_of(run)
    for line in lines:
        if line["cell"].startswith("FastV"):
            line["kept"] = ["AAAA"]
    rewrite(run, lines)
    data = data_of(page_of(report(ReportRequest(folder=run))))
    for item in data["questions"]:
        assert [bool(kept) for kept in item["kept"]] == [False, True, True, False, False]


def test_an_interrupted_run(run: Path) -> None:
    """Killed while writing a line, before any table or figure was written."""
    lines = lines_of(run)
    rewrite(run, lines[:55])
    with (run / "answers.jsonl").open("a") as file:
        file.write('{"cell": "uncomp')
    for name in ("answers.parquet", "summary.csv"):
        (run / name).unlink()
    shutil.rmtree(run / "plots")
    change(run, status="running")
    written = report(ReportRequest(folder=run))
    page = Page(page_of(written).read_text(encoding="utf-8"))
    assert "This run is not finished" in page.text
    assert "55 answers" in page.text
    assert len(page.all("img")) == 1
    said = sum(
        len([a for a in q["answers"] if a is not None])
        for q in data_of(page_of(written))["questions"]
    )
    assert said == 55


def test_a_failed_run(run: Path) -> None:
    key = repr(tp.create("fastv", retention=0.5))
    lines = [line for line in lines_of(run) if line["cell"] != key]
    why = {"cell": key, "error": "RuntimeError: <b>luck</b>", "traceback": "Traceback <i>"}
    rewrite(run, [*lines, why])
    (run / "summary.csv").unlink()
    change(run, status="failed", failures=[why | {"cell": "fastv at 0.5"}])
    written = report(ReportRequest(folder=run))
    page = Page(page_of(written).read_text(encoding="utf-8"))
    assert "fastv at 0.5 : RuntimeError: <b>luck</b>" in page.text
    assert "Traceback <i>" in page.text
    failed = [cell["failed"] for cell in data_of(page_of(written))["cells"]]
    assert failed == [False, False, False, True, False]


def test_a_run_without_answers(run: Path) -> None:
    rewrite(run, [])
    for name in ("answers.parquet", "summary.csv"):
        (run / name).unlink()
    shutil.rmtree(run / "plots")
    change(run, status="interrupted")
    written = report(ReportRequest(folder=run))
    assert (written.answered, written.wanted) == (0, 0)
    assert "No answers yet" in Page(page_of(written).read_text()).text


def test_methods_whose_code_is_not_here_keep_their_masks(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of one's own class is read by what it recorded; nothing of it is imported."""
    (run / "answers.parquet").unlink()
    kept = {line["cell"]: line["kept"] for line in lines_of(run) if line.get("kept")}
    manifest = json.loads((run / "manifest.json").read_text())
    cells = [
        cell | {"label": "far_away:Mine", "key": "Mine(retention=0.1)"}
        if (cell["label"], cell["retention"]) == ("fastv", 0.1)
        else cell
        for cell in manifest["cells"]
    ]
    change(run, cells=cells, experiment=manifest["experiment"] | {"methods": ["far_away:Mine"]})
    old = next(cell["key"] for cell in manifest["cells"] if cell not in cells)
    rewrite(run, [line | {"cell": line["cell"].replace(old, "Mine(retention=0.1)")}
                  for line in lines_of(run)])  # fmt: skip
    written = report(ReportRequest(folder=run))
    assert not written.notes
    found = data_of(page_of(written))
    mine = [cell["label"] for cell in found["cells"]].index("far_away:Mine")
    assert all(question["kept"][mine] for question in found["questions"])
    assert kept[old] in [question["kept"][mine] for question in found["questions"]]


def test_an_older_run_of_a_method_that_is_not_registered(run: Path) -> None:
    experiment = json.loads((run / "manifest.json").read_text())["experiment"]
    change(run, cells=[], experiment=experiment | {"methods": ["uniform", "someones-own"]})
    written = report(ReportRequest(folder=run))
    assert any("someones-own" in note for note in written.notes)
    assert written.answered == 20
    assert data_of(page_of(written))["questions"][0]["kept"][1]


def test_a_missing_model(run: Path) -> None:
    experiment = json.loads((run / "manifest.json").read_text())["experiment"]
    change(run, experiment=experiment | {"model": "someone/model-7b"})
    written = report(ReportRequest(folder=run))
    assert any("No masks: the configuration of someone/model-7b" in note for note in written.notes)
    assert data_of(page_of(written))["pictures"], "images are there nevertheless"


def test_a_local_model_is_found_from_anywhere(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(testbed.path("testbed-next"), run.parent / "model")
    experiment = json.loads((run / "manifest.json").read_text())["experiment"]
    change(run, experiment=experiment | {"model": "./model"}, model_folder="../model")
    monkeypatch.chdir("/")
    written = report(ReportRequest(folder=run))
    assert not written.notes
    assert data_of(page_of(written))["questions"][0]["kept"][1]


def test_arrows_are_against_uniform(run: Path) -> None:
    """A method that is always wrong where uniform is right, and uniform itself."""
    (run / "answers.parquet").unlink()
    truths = {item.id: item.answer for item in held_out(20, seed=0)}
    lines = lines_of(run)
    for line in lines:
        bad = line["cell"].startswith("FastV")
        line["answer"] = "never" if bad else truths[line["question"]]
    rewrite(run, lines)
    written = report(ReportRequest(folder=run))
    text = Page(page_of(written).read_text(encoding="utf-8")).text
    assert (
        "10 % uniform 20 100.0 83.9–100.0 +0.0 (-16.1 to +16.1) 100.0 100 100 100 100 100 " in text
    )
    assert "fastv 20 0.0 ↓ 0.0–16.1 -100.0 (-100.0 to -100.0)" in text
    assert "↑ ↓ significantly better or worse than uniform at the same retention" in text
    assert "no arrows" not in text
    rewrite(run, [line for line in lines_of(run) if not line["cell"].startswith("Uniform")])
    cells = json.loads((run / "manifest.json").read_text())["cells"]
    change(run, cells=[cell for cell in cells if cell["label"] != "uniform"])
    text = Page(page_of(report(ReportRequest(folder=run))).read_text(encoding="utf-8")).text
    assert "fastv 20 0.0 0.0–16.1" in text
    assert "This run has no uniform, so there are no arrows." in text


@pytest.mark.parametrize("command", ["report", "pairs"])
def test_a_folder_that_cannot_be_written(run: Path, tmp_path: Path, command: str) -> None:
    """Another place for what is written; the folder stays as it is."""
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    out = tmp_path / "elsewhere" / "file"
    found = CliRunner().invoke(app, [command, str(run), "--out", str(out)])
    assert found.exit_code == 0, found.output
    assert f"Written to {out}" in found.stdout
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_other_folders_are_refused(tmp_path: Path) -> None:
    other = '{"experiment": {"methods": ["fastv"]}}'  # of another analysis
    for content in (None, "{}", "no", other):
        if content is not None:
            (tmp_path / "manifest.json").write_text(content)
        result = CliRunner().invoke(app, ["report", str(tmp_path)])
        assert result.exit_code == 2
        assert "is not the folder of a comparison" in result.stderr
    with pytest.raises(UserError, match="must be at least 0"):
        report(ReportRequest(folder=tmp_path, questions=-1))


def test_the_command_prints_the_path_of_the_page(run: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(run), "--questions", "2"])
    assert result.exit_code == 0, result.output
    assert f"Written to {run / 'report.html'}" in result.stdout
    assert "2 of 20 questions" in result.stdout


def test_an_older_summary_is_never_shown(run: Path) -> None:
    table = pd.read_csv(run / "summary.csv")
    table.assign(accuracy=0.7771).to_csv(run / "summary.csv", index=False)  # newer than all else
    report(ReportRequest(folder=run))
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert "77.7" not in page.text
    right = pd.read_parquet(run / "answers.parquet").groupby(["label", "retention"])["correct"]
    assert f"{100 * right.mean()['fastv', 0.1]:.1f}" in page.text


def test_seeds_and_matched_costs_are_as_they_were_run(tmp_path: Path) -> None:
    request = CompareRequest(
        methods=("random",), retention=(0.2,), questions=3, seeds=2, out=tmp_path
    )
    compare(request)
    report(ReportRequest(folder=tmp_path))
    cells = data_of(tmp_path / "report.html")["cells"]
    assert [cell["label"] for cell in cells] == ["uncompressed", "random"]


def test_an_anonymous_report_names_no_user_or_machine(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(own, tmp_path / "home" / "jane-doe" / "study")) / "run"
    error = {
        "cell": "x",
        "error": f"E: {folder}/x.py",
        "traceback": f'File "{folder}/y.py" JaneHost',
    }
    change(
        folder,
        request={"data": str(folder.parent / "my.jsonl")},
        command=["/home/jane-doe/bin/tokenprune", "compare", f"--data={folder}/my.jsonl"],
        failures=[error],
    )
    monkeypatch.setattr(socket, "gethostname", lambda: "JaneHost")
    (folder.parent / "2.png").unlink()  # so that a note is written
    plain = page_of(report(ReportRequest(folder=folder))).read_text(encoding="utf-8")
    assert "jane-doe" in plain
    assert "JaneHost" in plain
    result = CliRunner().invoke(app, ["report", str(folder), "--anonymous"])
    assert result.exit_code == 0, result.output
    page = (folder / "report.html").read_text(encoding="utf-8")
    for secret in ("jane-doe", "JaneHost", str(tmp_path), "/home/"):
        assert secret not in page
    assert "tokenprune compare --data=my.jsonl" in page
    shown = data_of(folder / "report.html")
    assert [item["question"] for item in shown["questions"]].count("two?") == 1


def test_many_pictures_are_smaller(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (500, 700, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    image.info["xmp"] = image.info["exif"] = b"Jane Doe"
    large, small = (_data_uri(image, 336, room) for room in (10**9, 20_000))
    for uri, most in ((large, 336), (small, 335)):
        decoded = base64.b64decode(uri.partition(",")[2])
        assert b"Jane" not in decoded
        with Image.open(io.BytesIO(decoded)) as shown:
            assert max(shown.size) <= most
    assert len(small) < 4 * 20_000 / 3 + 100 < len(large)
    entries: list[dict[str, Any]] = [{"kept": [None, ["A" * 2**20]]} for _ in range(20)]
    notes: list[str] = []
    _bound(entries, notes)
    assert [entry["kept"] != [None, None] for entry in entries] == [True] * 12 + [False] * 8
    assert "first 12 questions" in notes[0]


# --- damaged folders ------------------------------------------------------------------------------


WRONG: list[Any] = [None, True, -1, 10**30, 1.5, "", "words", [], {}, [None], {"a": [1]}, "../../x"]


def places(value: Any, way: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """The paths to a JSON value and to all values inside it."""
    yield way
    if isinstance(value, dict | list):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(one, (*way, key))


def damaged_json(text: str, luck: random.Random) -> str:
    """The text of an object with one value replaced or removed, or cut short."""
    value = json.loads(text)
    key = luck.choice(sorted(value))
    *way, last = luck.choice(list(places(value[key], (key,))))
    inside = value
    for step in way:
        inside = inside[step]
    how = luck.randrange(8)
    if how == 0:
        return text[: luck.randrange(len(text))]
    if how == 1:
        del inside[last]
    else:
        inside[last] = luck.choice(WRONG)
    return json.dumps(value)


def damage(folder: Path, luck: random.Random) -> str:
    """Damage one file of a run folder; returns a description."""
    name = luck.choice(
        [*["manifest.json"] * 4, *["answers.jsonl"] * 3, *["answers.parquet"] * 2, "summary.csv"]
    )
    path = folder / name
    if name == "answers.parquet" and luck.random() < 0.5:
        table = pd.read_parquet(path)
        column = luck.choice(list(table.columns))
        wrong = luck.choice(["words", 3, None, True, [1]])
        dropped = luck.random() < 0.5
        (
            table.drop(columns=column)
            if dropped
            else table.assign(**{column: [wrong] * len(table)})
        ).to_parquet(path)
        (folder / "answers.jsonl").unlink()
        return f"{column} dropped" if dropped else f"{column} is {wrong!r}"
    how = luck.randrange(5)
    if how == 0:
        path.unlink()
    elif how == 1:
        path.write_bytes(luck.randbytes(200))
    elif how == 2 and name != "manifest.json":
        path.write_bytes(path.read_bytes()[: luck.randrange(path.stat().st_size)])
    elif name == "answers.jsonl":
        lines = path.read_text().splitlines()
        for _ in range(5):
            index = luck.randrange(len(lines))
            with contextlib.suppress(ValueError):  # it was cut short already
                lines[index] = damaged_json(lines[index], luck)
        path.write_text("\n".join(lines))
    elif name == "manifest.json":
        text = damaged_json(path.read_text(), luck)
        path.write_text(text)
        (folder / "manifest.backup.json").write_text(text)
        return text[:3000]
    else:
        path.unlink()
        path.mkdir()
    return f"{name}, {how}"


@pytest.mark.parametrize("seed", range(24))
def test_a_damaged_folder_is_a_sentence_or_a_table(run: Path, seed: int) -> None:
    luck = random.Random(seed)
    shutil.rmtree(run / "plots")
    what = damage(run, luck)
    for command in (
        ["report", str(run), "--questions", "2"],
        ["table", str(run)],
        ["pairs", str(run)],
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code in (0, 2), f"{command[0]} after {what}: {result.exception!r}"
        assert isinstance(result.exception, SystemExit | None), what
        assert result.exit_code == 0 or result.stderr.startswith("error: ")


def test_a_damaged_figure_is_reported(run: Path) -> None:
    (run / "plots" / "accuracy.png").write_bytes(b"no picture")
    written = report(ReportRequest(folder=run))
    assert any("accuracy.png cannot be shown" in note for note in written.notes)


def test_accuracy_without_the_image_is_among_the_results(run: Path) -> None:
    report(ReportRequest(folder=run))
    text = Page((run / "report.html").read_text(encoding="utf-8")).text
    right = pd.read_parquet(run / "answers.parquet").groupby("label")["correct"].mean()
    for label in ("image-free", "thumbnail-only"):
        assert f"{label} 20 {100 * right[label]:.1f}" in text
