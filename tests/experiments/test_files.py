"""Files are complete or absent, and temporary files of killed processes are removed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tokenprune.errors import UserError
from tokenprune.experiments.common.files import (
    WriteError,
    check_writable,
    replace_file,
    sweep,
    try_lock,
)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")

    def die_halfway() -> None:
        with replace_file(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        die_halfway()
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]
    assert path.read_text() == "old"
    with replace_file(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_a_failing_write_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")
    said = pytest.raises(WriteError, match=r"table\.csv.*No space left on device.*Make room")
    with said, replace_file(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert [p.name for p in tmp_path.iterdir()] == ["table.csv"]
    assert path.read_text() == "old"


def test_content_and_folder_are_on_the_disk_in_this_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "manifest.json"
    done: list[str] = []
    sync, rename = os.fsync, os.replace

    def synced(handle: int) -> None:
        status = os.fstat(handle)
        folder = (status.st_dev, status.st_ino) == (
            os.stat(tmp_path).st_dev,
            tmp_path.stat().st_ino,
        )
        done.append("folder" if folder else f"file of {status.st_size}")
        sync(handle)

    def renamed(source: Path, target: Path) -> None:
        done.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    with replace_file(path) as temporary:
        temporary.write_text("whole")
    assert done == ["file of 5", "rename", "folder"]


def test_temporary_files_of_killed_processes_are_removed(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    below = tmp_path / "plots"
    below.mkdir()
    left = [tmp_path / ".tokenprune-a.json", below / ".tokenprune-b.png"]
    own = [tmp_path / ".hidden", tmp_path / "tokenprune-notes.txt", tmp_path / ".tokenprune-folder"]
    for path in [*left, *own[:2]]:
        path.write_text("")
    own[2].mkdir()
    with left[0].open() as held:
        assert try_lock(held.fileno())
        sweep(tmp_path, below=True)
        assert left[0].exists(), "another process is writing it"
        assert not left[1].exists()
    with replace_file(tmp_path / "table.csv") as temporary:
        temporary.write_text("")
        sweep(tmp_path)
        assert temporary.exists()
    assert not left[0].exists()
    assert all(path.exists() for path in own)


def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="cannot write to the output folder"):
            check_writable(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        check_writable(tmp_path)
