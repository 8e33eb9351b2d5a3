"""Commands that write in one go overwrite nothing, mix nothing and leave nothing empty."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tokenprune.cli import app
from tokenprune.errors import UserError
from tokenprune.experiments.common.files import check_file, check_writable
from tokenprune.experiments.common.result_folder import ResultFolder, free_path

EFFICIENCY = ("efficiency", "--config", "testbed-next", "-m", "uniform", "-r", "0.5")


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def opened(out: Path, *, force: bool = False) -> ResultFolder:
    return ResultFolder.open(out, "unused", marker="mine.json", force=force)


def test_an_earlier_result_is_replaced_only_on_request_and_as_a_whole(tmp_path: Path) -> None:
    out = tmp_path / "a" / "result"
    folder = opened(out)
    assert not (tmp_path / "a").exists(), "nothing is made before there is something to write"
    for name in ("masks-cat.png", "kept.csv"):
        out.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("first")
    folder.finish({"asked": 1}, ["masks-cat.png", "kept.csv"])
    before = contents(out)
    with pytest.raises(UserError, match=r"earlier result; .* --force"):
        opened(out)
    assert contents(out) == before
    again = opened(out, force=True)
    (out / "own notes.txt").write_text("of the user")
    (out / "kept.csv").write_text("second")
    again.finish({"asked": 2}, ["kept.csv"])
    assert contents(out).keys() == {"kept.csv", "mine.json", "own notes.txt"}
    assert json.loads((out / "mine.json").read_text())["files"] == ["kept.csv"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("notes.txt", "x"),
        ("manifest.json", '{"experiment": {}, "sessions": []}'),
        ("mine.json", '{"experiment": {}, "files": []}'),
        ("mine.json", "[1]"),
        ("mine.json", '{"files": [1]}'),
    ],
)
def test_a_folder_of_something_else_is_refused(
    tmp_path: Path, name: str, content: str, force: bool
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"did not write \\({name}\\); choose another --out"):
        opened(tmp_path, force=force)


def test_a_marker_removes_no_file_outside_its_folder(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.json").write_text('{"files": ["../precious", "old"]}')
    (out / "old").write_text("x")
    opened(out, force=True).finish({}, [])
    assert (tmp_path / "precious").exists()
    assert not (out / "old").exists()


def test_default_names_get_numbers(tmp_path: Path) -> None:
    assert free_path(tmp_path / "b.csv") == tmp_path / "b.csv"
    (tmp_path / "b.csv").touch()
    (tmp_path / "b-2.csv").touch()
    assert free_path(tmp_path / "b.csv") == tmp_path / "b-3.csv"


@pytest.mark.parametrize("place", ["file", "file/below", "x" * 300, "a\0b", "dangling"])
def test_places_that_cannot_be_written_are_refused_and_nothing_is_made(
    tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    for check in (check_writable, lambda path: check_file(path / "table.csv")):
        with pytest.raises(UserError, match="cannot write to"):
            check(tmp_path / place)
    assert {one.name for one in tmp_path.iterdir()} == {"file", "dangling"}


def test_checking_makes_no_folder(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    check_file(tmp_path / "a" / "b.csv")
    assert not list(tmp_path.iterdir())
    (tmp_path / "there").touch()
    check_file(tmp_path / "there")
    with pytest.raises(UserError, match=r"already exists; .*--force"):
        check_file(tmp_path / "there", new=True)


@pytest.mark.parametrize(
    "words",
    [
        "compare -m unifrom",
        "compare --model nowhere/at/all",
        "compare --data missing.jsonl",
        "ablation fastv:layer=1,x",
        "positional-bias missing.png",
        "masks missing.png",
        "efficiency -m unifrom",
        "efficiency --config nothing",
        "benchmark --only nothing",
        "complementarity --model nothing",
    ],
)
@pytest.mark.parametrize("out", [(), ("--out", "new/place")])
def test_bad_input_leaves_no_empty_folder(
    words: str, out: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [*words.split(), *out])
    assert result.exit_code == 2, result.output
    assert not list(tmp_path.iterdir())


def test_efficiency_overwrites_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "efficiency_testbed-next").mkdir(parents=True)
    assert CliRunner().invoke(app, EFFICIENCY).exit_code == 0
    there = tmp_path / "runs" / "efficiency_testbed-next-2"
    before = contents(there)
    refused = CliRunner().invoke(app, [*EFFICIENCY, "--out", str(there)])
    assert refused.exit_code == 2
    assert "--force" in refused.stderr
    assert contents(there) == before
    assert CliRunner().invoke(app, [*EFFICIENCY, "--out", str(there), "--force"]).exit_code == 0
    assert contents(there).keys() == before.keys()
