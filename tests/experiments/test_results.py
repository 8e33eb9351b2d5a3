"""The run folder: no answer is lost or repeated, and other files are not changed."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
import tracemalloc
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image

import tokenprune as tp
from tokenprune.errors import UserError
from tokenprune.experiments.common.answers import answers_frame
from tokenprune.experiments.common.cells import Cell, Failure
from tokenprune.experiments.common.files import WriteError
from tokenprune.experiments.common.journal import Journal
from tokenprune.experiments.common.provenance import git_state
from tokenprune.experiments.common.questions import Picture, Question
from tokenprune.experiments.common.references import references
from tokenprune.experiments.common.run_folder import RunFolder, asked_for

EXPERIMENT: dict[str, Any] = {
    "model": "m",
    "methods": ["uniform", "fastv"],
    "retention": [0.5],
    "data": "a" * 64,
}


def record(answer: str, **changes: float) -> dict[str, Any]:
    counts = dict.fromkeys(
        ("patch_tokens", "kept_patches", "separators", "kept_separators", "text_tokens"), 10
    )
    costs = {"kv_bytes": 64, "layer_average": 7.5, "flops": 1e9, "selector_flops": 0.0}
    return {"answer": answer, **counts, **costs, "uncompressed_flops": 2e9, **changes}


# --- the journal ----------------------------------------------------------------------------------


def test_a_partial_last_line_is_missing_and_can_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with Journal(path) as journal:
        journal.add("cell", {"q1": {"answer": "a"}, "q2": {"answer": "b"}})
    whole = path.read_bytes()
    for cut in range(whole.index(b"\n") + 1, len(whole)):
        path.write_bytes(whole[:cut])
        complete = cut >= len(whole) - 1  # only the line end is gone
        with Journal(path) as journal:
            assert set(journal.answers) == {("cell", "q1")} | (
                {("cell", "q2")} if complete else set()
            )
            journal.add("cell", {"q1": {"answer": "x"}, "q2": {"answer": "b"}})
        again = Journal(path)
        assert again.answers == {("cell", "q1"): {"answer": "a"}, ("cell", "q2"): {"answer": "b"}}
        good = [line for line in path.read_text().splitlines() if line.endswith("}")]
        assert len(good) == 2


def test_a_partial_line_is_removed_before_anything_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    first, second = b'{"cell": "c", "question": "q1", "answer": "a"}\n', b'{"cell": "c", "question"'
    path.write_bytes(first + second)
    with Journal(path) as journal:
        assert path.read_bytes() == first
        journal.add("c", {"q2": {"answer": "b"}})
    assert [json.loads(line)["question"] for line in path.read_text().splitlines()] == ["q1", "q2"]
    path.write_bytes(first[:-1])
    with Journal(path) as journal:
        assert path.read_bytes() == first, "nothing but its end was missing"
    path.write_bytes(second)
    with Journal(path):
        assert path.read_bytes() == b""


class Full:
    """A file on a disk that takes ``room`` more bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, data: Any) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written: int = self.file.write(data[: self.room])
        self.room -= written
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()


@pytest.mark.parametrize("room", [0, 1, 60, 100, 10_000])
def test_a_full_disk_leaves_complete_lines_and_is_reported(tmp_path: Path, room: int) -> None:
    path = tmp_path / "answers.jsonl"
    records = {f"q{index}": {"answer": "a" * index} for index in range(20)}
    full = pytest.raises(WriteError, match=r"answers\.jsonl.*No space left on device")
    with full, Journal(path) as journal:
        journal.add("before", {"q": {"answer": "x"}})
        journal._file = Full(journal._file, room)  # type: ignore[assignment]
        journal.add("cell", records)
        journal.add("cell", {f"more {index}": {"answer": "a" * 999} for index in range(99)})
    content = path.read_bytes()
    assert content.endswith(b"\n")
    lines = [json.loads(line) for line in content.splitlines()]
    assert lines[0]["cell"] == "before"
    assert [line["question"] for line in lines[1:21]] == list(records)[: len(lines) - 1]
    assert len(content) <= content.index(b"\n") + 1 + room


WRONG: list[tuple[str, Any]] = [
    *(("cell", 3), ("question", None), ("answer", 3), ("answer", ["a"]), ("flops", "much")),
    *(("flops", True), ("kept_patches", 2.5), ("kept_patches", 10**30), ("kl", {})),
    *(("visual_per_layer", 3), ("visual_per_layer", ["a"])),
]


def test_a_line_of_wrong_types_is_no_entry(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    good = {"cell": "c", "question": "q1", "answer": "a", "flops": 1.0, "kept_patches": 2}
    wrong: list[Any] = [
        *({**good, "question": "q2", name: value} for name, value in WRONG),
        *([], 3, None, "text", {}, {"cell": "c"}, {"cell": "c", "error": "E"}),
    ]
    path.write_text("\n".join(map(json.dumps, [*wrong, good])) + "\n" + "[" * 100_000 + "\n")
    journal = Journal(path)
    assert journal.answers == {("c", "q1"): {"answer": "a", "flops": 1.0, "kept_patches": 2}}
    assert journal.failures == {}
    assert journal.unreadable == len(wrong) + 1


def test_equal_texts_and_figures_of_a_journal_are_kept_once(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    names = [f"figure{index}" for index in range(20)]
    with path.open("w") as file:
        for index in range(3000):
            entry = {
                "cell": "c" * 150,
                "question": f"q{index}",
                "answer": "yes",
                "list": [300, 301],
            }
            file.write(json.dumps(entry | dict.fromkeys(names, 1234.5)) + "\n")
    tracemalloc.start()
    journal = Journal(path)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(journal.answers) == 3000
    assert journal.answers["c" * 150, "q7"]["list"] == [300, 301]
    assert size / 3000 < 1600, "bytes a record"


def test_answers_are_in_the_file_as_soon_as_they_are_added(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path\n"
        "from tokenprune.experiments.common.journal import Journal\n"
        "with Journal(Path(sys.argv[1])) as journal:\n"
        "    journal.add('cell', {'q1': {'answer': 'a'}})\n"
        "    os._exit(9)\n"
    )
    path = tmp_path / "answers.jsonl"
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 9
    assert Journal(path).answers == {("cell", "q1"): {"answer": "a"}}


def test_a_failure_counts_until_the_cell_is_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    try:
        raise MemoryError("first line\nsecond line")
    except MemoryError as error:
        failure = Failure.of(error)
    assert failure.error == "MemoryError: first line"
    assert "Traceback" in failure.traceback
    assert "second line" in failure.traceback
    with Journal(path) as journal:
        journal.add("a", {"q1": {"answer": "x"}})
        journal.fail("a", failure)
        journal.fail("b", failure)
    journal = Journal(path)
    assert journal.failures == {"a": failure, "b": failure}
    assert set(journal.answers) == {("a", "q1")}
    with journal:
        journal.add("a", {"q2": {"answer": "y"}})
        assert journal.failures == {"b": failure}
    assert Journal(path).failures == {"b": failure}


def test_any_text_survives(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    nasty = "line\nbreak   \ud800 \0 ü 語"
    with Journal(path) as journal:
        journal.add("cell", {nasty[:4]: {"answer": nasty}, "q2": {"answer": "b"}})
    assert len(Journal(path).answers) == 2


# --- the folder -----------------------------------------------------------------------------------


def test_the_manifest_exists_from_the_start(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path / "a" / "run", EXPERIMENT, {"python": "3"})
    manifest = json.loads((folder.path / "manifest.json").read_text())
    assert manifest["status"] == "running"
    assert manifest["experiment"] == EXPERIMENT
    assert manifest["python"] == "3"
    folder.close("interrupted")
    folder = RunFolder.open(folder.path, EXPERIMENT, {"python": "3"})
    folder.close("failed", [{"cell": "x", "error": "E", "traceback": "T"}])
    manifest = json.loads((folder.path / "manifest.json").read_text())
    assert [session["status"] for session in manifest["sessions"]] == ["interrupted", "failed"]
    assert manifest["status"] == "failed"
    assert manifest["failures"][0]["error"] == "E"
    assert manifest["seconds"] >= 0


def test_another_experiment_is_refused_and_unchanged(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, EXPERIMENT, {}).close("complete")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    other = EXPERIMENT | {"methods": ["uniform"], "data": "b" * 64}
    with pytest.raises(UserError) as caught:
        RunFolder.open(tmp_path, other, {})
    assert "methods: uniform, fastv there, uniform here" in str(caught.value)
    assert "other data" in str(caught.value)
    assert "retention" not in str(caught.value)
    assert "--out" in str(caught.value)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_only_one_process_works_in_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    first = RunFolder.open(tmp_path, EXPERIMENT, {})
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="another process is writing"):
        RunFolder.open(tmp_path, EXPERIMENT, {})
    assert (tmp_path / "manifest.json").read_bytes() == before
    first.close("complete")
    RunFolder.open(tmp_path, EXPERIMENT, {}).close("complete")


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="not the folder of a run"):
        RunFolder.open(tmp_path, EXPERIMENT, {})
    (tmp_path / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(UserError, match="not the manifest of a run"):
        RunFolder.open(tmp_path, EXPERIMENT, {})
    assert len(list(tmp_path.iterdir())) == 2


def test_a_refusal_names_the_files_that_differ(tmp_path: Path) -> None:
    experiment = EXPERIMENT | {"code": "c" * 64}
    files = {"code": {"a.py": "1", "b.py": "2", "c.py": "3"}}
    RunFolder.open(tmp_path, experiment, {"files": files}).close("complete")
    changed = {"code": {"a.py": "1", "b.py": "9", "d.py": "4"}}
    with pytest.raises(UserError, match=r"other code: b\.py, c\.py, d\.py\)"):
        RunFolder.open(tmp_path, experiment | {"code": "d" * 64}, {"files": changed})
    many = {"code": {f"{index:02}.py": "1" for index in range(30)}}
    with pytest.raises(UserError, match=r"09\.py and 23 more\)"):
        RunFolder.open(tmp_path, experiment | {"code": "d" * 64}, {"files": many})


def test_a_damaged_manifest_does_not_block_the_journal(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path, EXPERIMENT, {})
    with Journal(folder.journal) as journal:
        journal.add("cell", {"q1": {"answer": "a"}})
    folder.close("interrupted")
    whole = (tmp_path / "manifest.json").read_bytes()
    for torn in (b"", whole[: len(whole) // 2], b"\0" * len(whole), b"[" * 100_000, b"null"):
        (tmp_path / "manifest.json").write_bytes(torn)
        RunFolder.open(tmp_path, EXPERIMENT, {}).close("interrupted")
        assert json.loads((tmp_path / "manifest.json").read_text())["experiment"] == EXPERIMENT
    sessions = json.loads((tmp_path / "manifest.json").read_text())["sessions"]
    assert len(sessions) == 6, "earlier sessions are known as well"
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match="another experiment"):
        RunFolder.open(tmp_path, EXPERIMENT | {"retention": [0.1]}, {})
    for name in ("manifest.json", "manifest.backup.json"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match="not the manifest of a run"):
        RunFolder.open(tmp_path, EXPERIMENT, {})
    assert Journal(folder.journal).answers == {("cell", "q1"): {"answer": "a"}}


def test_the_seconds_of_a_killed_run_count(tmp_path: Path) -> None:
    folder = RunFolder.open(tmp_path, EXPERIMENT, {})
    if folder._lock is not None:
        os.close(folder._lock)  # as if the process were killed
    with Journal(folder.journal) as journal:
        journal.add("cell", {"q1": {"answer": "a"}})
    begun = datetime.fromisoformat(folder.manifest["sessions"][0]["started"]).timestamp()
    os.utime(folder.journal, (begun + 90, begun + 90))
    again = RunFolder.open(tmp_path, EXPERIMENT, {})
    first = again.manifest["sessions"][0]
    assert (first["seconds"], first["status"]) == (90, "killed")
    again.close("complete")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert 90 <= manifest["seconds"] < 100
    assert [session["status"] for session in manifest["sessions"]] == ["killed", "complete"]


def test_the_next_start_removes_temporary_files(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, EXPERIMENT, {}).close("interrupted")
    (tmp_path / "plots").mkdir()
    for path in (tmp_path / ".tokenprune-1.json", tmp_path / "plots" / ".tokenprune-2.png"):
        path.write_text("half")
    RunFolder.open(tmp_path, EXPERIMENT, {}).close("complete")
    assert not list(tmp_path.rglob(".tokenprune-*"))


def test_paths_are_relative_where_they_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclasses.dataclass
    class Request:
        data: Path
        paths: tuple[Path, ...]
        out: Path | None = None

    here = tmp_path / "project"
    here.mkdir()
    monkeypatch.chdir(here)
    words = ["/usr/local/bin/tokenprune", "compare", f"--data={here}/my.jsonl", "/elsewhere/x"]
    monkeypatch.setattr(sys, "argv", words)
    elsewhere = Path("/elsewhere/x.png")
    for data in (Path("my.jsonl"), here / "my.jsonl", Path("runs/../my.jsonl")):
        told = asked_for(Request(data, (here / "a.png", elsewhere)), Path("runs/one"))
        assert told["request"]["data"] == "../../my.jsonl"
        assert told["request"]["paths"] == ["../../a.png", "/elsewhere/x.png"]
        assert told["command"] == ["tokenprune", "compare", "--data=my.jsonl", "/elsewhere/x"]
    beside = asked_for(Request(tmp_path / "far" / "my.jsonl", ()), tmp_path / "far" / "run")
    assert beside["request"]["data"] == "../my.jsonl"
    (tmp_path / "disk" / "run").mkdir(parents=True)
    (here / "linked").symlink_to(tmp_path / "disk")  # ".." leads out of its target
    linked = asked_for(Request(Path("my.jsonl"), ()), Path("linked/run"))
    found = here / "linked" / "run" / linked["request"]["data"]
    assert os.path.realpath(found) == str(here / "my.jsonl")


# --- the tidy table -------------------------------------------------------------------------------


def test_answers_frame(tmp_path: Path) -> None:
    picture = Picture("p", Image.new("RGB", (2, 2)))
    questions = [
        Question("q1", (picture,), "Is it red?", "Yes", "colour"),
        Question("q2", (picture,), "How many?", "2", "count"),
    ]
    full, half, whole = (
        Cell(),
        Cell(tp.create("uniform", retention=0.5)),
        Cell(tp.create("uniform", retention=1.0)),
    )
    broken = Cell(tp.create("fastv", retention=0.5, layer=3))
    assert whole.key == full.key != half.key
    with Journal(tmp_path / "answers.jsonl") as journal:
        journal.add(full.key, {"q1": record("yes."), "q2": record("3")})
        journal.add(half.key, {"q1": record("no", kept_patches=5)})
        journal.add(broken.key, {"q1": record("yes")})
        journal.fail(broken.key, Failure("E", "T"))
    frame = answers_frame("m", [full, half, whole, broken], questions, journal)
    assert len(frame) == 2 + 1 + 2 + 2, "no row for what is still to be computed"

    rows = frame.set_index(["label", "retention", "question_id"]).sort_index()
    assert list(rows.loc[("uncompressed", 1.0), "correct"]) == [True, False]
    assert list(rows.loc[("uniform", 1.0), "answer"]) == ["yes.", "3"], "R = 1 is shared"
    row = rows.loc[("uniform", 0.5, "q1")]
    assert (row["correct"], row["agrees"], row["kept_patches"]) == (False, False, 5)
    assert (row["truth"], row["image_id"], row["kind"]) == ("Yes", "p", "colour")
    assert "separators='all'" in row["parameters"]

    failed = rows.loc[("fastv:layer=3", 0.5, "q2")]
    assert failed["status"] == "failed"
    assert pd.isna(failed[["answer", "correct", "agrees", "flops", "kept_patches"]]).all()

    frame.to_parquet(tmp_path / "answers.parquet")
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "answers.parquet"), frame, check_dtype=False
    )


def test_easy_questions_need_little_of_the_image(tmp_path: Path) -> None:
    picture = Picture("p", Image.new("RGB", (2, 2)))
    questions = [Question(f"q{i}", (picture,), "Is it red?", "yes") for i in range(4)]
    cells = [Cell(), *references({"image"})]
    assert [cell.key for cell in cells][:2] == ["uncompressed", "image-free"]
    assert len({cell.key for cell in cells}) == 3
    said = {
        "image-free": ["yes", "no", "no", "no"],
        "thumbnail-only": ["no", "Yes.", "no", "yes"],
    }
    with Journal(tmp_path / "answers.jsonl") as journal:
        for cell in cells[1:]:
            records = [record(answer, kept_patches=5) for answer in said[cell.name]]
            records[3]["kept_patches"] = 10  # this image has no crops, its thumbnail is all of it
            journal.add(cell.key, {f"q{i}": entry for i, entry in enumerate(records)})
        journal.add("uncompressed", {f"q{i}": record("yes") | {"kl": 0.0} for i in range(4)})
    frame = answers_frame("m", cells, questions, journal)
    full = frame[frame["label"] == "uncompressed"]
    assert list(full["easy"]) == [True, True, False, False]
    assert list(full["kl"]) == [0.0] * 4
    assert frame["retention"].isna().sum() == 8
    assert answers_frame("m", cells[:1], questions, journal)["easy"].isna().all()
    assert [cell.label for cell in references({"video"})] == ["image-free"]


def test_git_state(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text("")
    assert git_state(tmp_path) is None

    def git(*words: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *words], check=True, capture_output=True)

    git("init")
    assert git_state(tmp_path) is None, "the package is not part of that repository"
    git("add", "__init__.py")
    git("commit", "-m", "first")
    state = git_state(tmp_path)
    assert state is not None
    assert len(state["commit"]) == 40
    assert not state["dirty"]
    (tmp_path / "__init__.py").write_text("changed = True")
    assert git_state(tmp_path) == state | {"dirty": True}
