"""A comparison on two local workers of Ray, one of which is killed."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from tokenprune.experiments.common.request import Cluster, CompareRequest
from tokenprune.experiments.compare.run import run as compare

pytest.importorskip("ray", reason="needs Ray: pip install 'tokenprune[ray]'")


def workers() -> list[int]:
    """Process ids of the workers that hold a model."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if entry.read_bytes().startswith(b"ray::_Seat"):
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


def test_with_a_killed_worker_the_rows_are_those_of_one_process(tmp_path: Path) -> None:
    request = CompareRequest(
        methods=("uniform", "fastv", "tome", "globalcom2"),
        retention=(0.5,),
        questions=24,
        batch_size=2,
        device="cpu",
        max_new_tokens=2,
    )
    one = compare(replace(request, out=tmp_path / "one"))
    killed: list[int] = []

    def kill(done: int, total: int, doing: str) -> None:
        if done and not killed:
            killed.append(workers()[0])
            os.kill(killed[0], signal.SIGKILL)

    many = compare(replace(request, out=tmp_path / "many", cluster=Cluster(workers=2)), kill)
    import ray

    assert not ray.is_initialized(), "a run stops what it starts"
    assert killed
    assert not workers()
    assert many.status == "complete"
    assert many.new == one.new == 7 * 24
    tables = [pd.read_parquet(run.folder / "answers.parquet") for run in (one, many)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    pd.testing.assert_frame_equal(one.summary, many.summary, check_exact=True)
    lines = (many.folder / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 7 * 24, "nothing twice"

    # One process goes on where workers stopped, and the other way round.
    (many.folder / "answers.jsonl").write_text("\n".join(lines[:-30]) + "\n")
    rest = compare(replace(request, out=many.folder))
    assert rest.new == 30
    table = pd.read_parquet(many.folder / "answers.parquet")
    pd.testing.assert_frame_equal(tables[0], table, check_exact=True)
