"""A comparison in shards, on stand-ins for workers: the answers of a single process."""

from __future__ import annotations

import heapq
import itertools
import pickle
import random
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from stand import CELLS, Stand, questions
from typer.testing import CliRunner

import tokenprune as tp
from tokenprune.cli import app
from tokenprune.console import filled
from tokenprune.errors import UserError
from tokenprune.experiments.checks import scale
from tokenprune.experiments.cluster.pool import ATTEMPTS, Died, Event, Pool
from tokenprune.experiments.common.answers import answers_frame
from tokenprune.experiments.common.journal import Journal, Sheet, Tally
from tokenprune.experiments.common.questions import held_out
from tokenprune.experiments.common.request import Cluster
from tokenprune.experiments.common.setting import Setting, with_crops
from tokenprune.experiments.compare import loop, shards
from tokenprune.experiments.crop_importance import run as crop_importance
from tokenprune.experiments.positional_bias.analysis import positional_bias, served
from tokenprune.models.loading import without_weights
from tokenprune.pipeline import Pipeline
from tokenprune.progress import silent


class Workers:
    """A transport whose workers serve at once and finish in any order.

    Attributes:
        deadly: Called with a payload; whether its worker dies of it.
        opens: Whether a worker opens, by its number.
    """

    def __init__(
        self,
        serve: Callable[[Any], Any],
        size: int = 3,
        deadly: Callable[[Any], bool] = lambda payload: False,
        opens: Callable[[int], bool] = lambda number: True,
        seed: int = 0,
    ) -> None:
        self.serve, self.size, self.deadly, self.opens = serve, size, deadly, opens
        self.random = random.Random(seed)
        self.waiting: list[tuple[float, int, Event]] = []
        self.numbers = itertools.count()

    def _later(self, event: Event) -> None:
        heapq.heappush(self.waiting, (self.random.random(), next(self.numbers), event))

    def start(self) -> Hashable:
        worker = next(self.numbers)
        self._later(Event(worker, "ready" if self.opens(worker) else "died", "out of memory"))
        return worker

    def submit(self, worker: Any, payload: Any) -> None:
        if self.deadly(payload):
            self._later(Event(worker, "died", "killed"))
        else:
            found = self.serve(pickle.loads(pickle.dumps(payload)))
            self._later(Event(worker, "done", pickle.loads(pickle.dumps(found))))

    def wait(self) -> Event:
        return heapq.heappop(self.waiting)[2]


def single(stand: Stand, path: Path, asked: list[Any], batch_size: int) -> Any:
    with Journal(path) as journal:
        loop.run(stand, CELLS, asked, journal, batch_size=batch_size)
    return answers_frame("m", CELLS, asked, Journal(path))


def sharded(workers: Workers, path: Path, asked: list[Any], batch_size: int) -> Any:
    keys = dict.fromkeys(cell.key for cell in CELLS)
    with Tally(path, keys, [item.id for item in asked]) as tally:
        shards.enter_all(Pool(workers), CELLS, asked, tally, batch_size=batch_size)
    return answers_frame("m", CELLS, asked, Journal(path))


def serving(stand: Stand, batch_size: int) -> Callable[[Any], Any]:
    return lambda work: shards.answer_shard(stand, CELLS, work, batch_size=batch_size)


class Chooser(Stand):
    """Fails where ``fails`` says so, by label and prompt."""

    def __init__(self, fails: Callable[[str, str], bool]) -> None:
        super().__init__()
        self.fails = fails

    def answer(self, compressor: Any, images: Any, prompts: Any) -> Any:
        label = "" if compressor is None else f"{compressor.label}@{compressor.retention}"
        for prompt in prompts:
            if self.fails(label, prompt):
                raise RuntimeError("not this one")
        return super().answer(compressor, images, prompts)


def number(prompt: str) -> int:
    return int(prompt.split()[1].rstrip("?"))


FAULTS: dict[str, Callable[[str, str], bool]] = {
    "none": lambda label, prompt: False,
    "a method": lambda label, prompt: label == "globalcom2@0.1",
    "one question": lambda label, prompt: number(prompt) == 17,
    "one question of a method": lambda label, prompt: (label, number(prompt)) == ("uniform@0.5", 2),
    "the first questions of a method": lambda label, prompt: (
        label == "uniform@0.5" and number(prompt) % 10 < 2  # of the first images
    ),
    "the last questions of a method": lambda label, prompt: (
        label == "uniform@0.5" and number(prompt) % 10 > 7
    ),
    "two questions in front": lambda label, prompt: (
        label == "uniform@0.5" and number(prompt) in (0, 10)
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("size", [3, 9, 64])
def test_rows_are_those_of_a_single_process(tmp_path: Path, fault: str, size: int) -> None:
    asked = questions(60, per_image=6)
    expected = single(Chooser(FAULTS[fault]), tmp_path / "one", asked, 4)
    workers = Workers(serving(Chooser(FAULTS[fault]), 4), size=size)
    found = sharded(workers, tmp_path / "many", asked, 4)
    assert expected.drop(columns="status").equals(found.drop(columns="status"))
    assert list(expected["status"]) == list(found["status"])
    one, many = Journal(tmp_path / "one"), Journal(tmp_path / "many")
    assert {key: why.error for key, why in one.failures.items()} == {
        key: why.error for key, why in many.failures.items()
    }
    assert {row: why.error for row, why in one.missing.items()} == {
        row: why.error for row, why in many.missing.items()
    }


def test_nothing_is_asked_twice_and_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    asked = questions(60, per_image=6)
    expected = single(Stand(), tmp_path / "one", asked, 4)
    (tmp_path / "many").write_bytes(b"")
    lines = (tmp_path / "one").read_bytes().splitlines(keepends=True)
    (tmp_path / "many").write_bytes(b"".join(lines[:100]) + lines[100][:-7])
    stand = Stand()
    found = sharded(Workers(serving(stand, 4)), tmp_path / "many", asked, 4)
    assert expected.equals(found)
    assert sum(stand.asked.values()) == 7 * 60 - 100
    assert len((tmp_path / "many").read_text().splitlines()) == 7 * 60


class Company(Stand):
    """Answers with the images that were encoded in the same batch."""

    def encode(self, questions: Any, signals: Any, encoder: Any) -> Any:
        names = "+".join(sorted(item.image_id for item in questions))
        return [[f"{item.image_id} with {names}"] for item in questions]


@pytest.mark.parametrize(
    ("count", "per_image", "size"), [(60, 6, 4), (30, 10, 3), (24, 1, 5), (40, 7, 20), (20, 20, 2)]
)
def test_an_image_is_encoded_in_the_company_that_it_has_in_one_process(
    tmp_path: Path, count: int, per_image: int, size: int
) -> None:
    asked = questions(count, per_image)
    expected = single(Company(), tmp_path / "one", asked, size)
    workers = Workers(serving(Company(), size), size=64)  # so many that a shard is one batch
    assert expected.equals(sharded(workers, tmp_path / "many", asked, size))


def test_the_task_of_a_worker_that_dies_is_repeated(tmp_path: Path) -> None:
    asked = questions(60, per_image=6)
    expected = single(Stand(), tmp_path / "one", asked, 4)
    dying = random.Random(3)
    workers = Workers(serving(Stand(), 4), deadly=lambda work: dying.random() < 0.3)
    assert expected.equals(sharded(workers, tmp_path / "many", asked, 4))


def test_a_question_that_kills_every_worker_costs_its_batch_alone(tmp_path: Path) -> None:
    asked = questions(60, per_image=1)
    workers = Workers(
        serving(Stand(), 4), size=1, deadly=lambda work: any(q.id == "q30" for q in work.questions)
    )
    sharded(workers, tmp_path / "j", asked, 4)
    journal = Journal(tmp_path / "j")
    assert {name for _, name in journal.missing} == {"q28", "q29", "q30", "q31"}
    assert len(journal.answers) == 7 * 56
    assert not journal.failures
    assert "died" in next(iter(journal.missing.values())).error


def test_a_task_is_given_up_after_so_many_workers_and_opening_too() -> None:
    pool: Pool[int] = Pool(Workers(lambda task: 2 * task, deadly=lambda task: task == 1))
    found = dict(pool.results(deque(range(5)), lambda task: task))
    assert found == {0: 0, 1: Died("killed"), 2: 4, 3: 6, 4: 8}
    assert pool.died == ATTEMPTS
    closed: Pool[int] = Pool(Workers(lambda task: task, opens=lambda number: False))
    with pytest.raises(UserError, match="before they had the model"):
        list(closed.results(deque(range(5)), lambda task: task))
    some: Pool[int] = Pool(Workers(lambda task: task, opens=lambda number: number % 3 > 0))
    assert len(list(some.results(deque(range(50)), lambda task: task))) == 50


def test_an_interrupt_keeps_what_has_arrived(tmp_path: Path) -> None:
    asked = questions(60, per_image=6)
    expected = single(Stand(), tmp_path / "one", asked, 4)

    class Stopped(Workers):
        def wait(self) -> Event:
            if next(self.numbers) > 20:
                raise KeyboardInterrupt
            return super().wait()

    stand = Stand()
    with pytest.raises(KeyboardInterrupt):
        sharded(Stopped(serving(stand, 4)), tmp_path / "many", asked, 4)
    kept = len(Journal(tmp_path / "many").answers)
    assert 0 < kept < 7 * 60
    assert expected.equals(sharded(Workers(serving(Stand(), 4)), tmp_path / "many", asked, 4))


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return tp.load("testbed-next", device="cpu")


def test_positional_bias_on_workers_gives_the_same_tables(tmp_path: Path, pipe: Pipeline) -> None:
    images = [item.images[0].open() for item in held_out(5, 0, "image")]
    asked: dict[str, Any] = {"retention": (0.25,), "batch_size": 2, "seed": 0}
    methods = ("uniform", "random", "fastv")
    one = positional_bias(pipe, methods, images, **asked)
    workers = Workers(partial(served, pipe), seed=1, deadly=lambda asked: next(deaths) == 1)
    deaths = itertools.count()
    description = without_weights("testbed-next")
    many = positional_bias(
        description, methods, images, **asked, parts=tmp_path, pool=Pool(workers)
    )
    for name in ("tokens", "statistics", "profiles"):
        pd.testing.assert_frame_equal(getattr(one, name), getattr(many, name), check_exact=True)
    assert one.skipped == many.skipped
    unused = Workers(lambda payload: pytest.fail("all parts are there"))
    again = positional_bias(
        description, methods, images, **asked, parts=tmp_path, pool=Pool(unused)
    )
    pd.testing.assert_frame_equal(one.tokens, again.tokens, check_exact=True)


def test_crops_are_scored_alike_on_workers(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def workers(request: Any, serve: Any, progress: Any) -> Iterator[Any]:
        yield Pool(Workers(partial(serve, pipe))), None

    monkeypatch.setattr(crop_importance, "workers", workers)
    monkeypatch.setattr(crop_importance, "CHUNK", 2)
    request = crop_importance.CropImportanceRequest(cluster=Cluster())
    setting, _ = with_crops(Setting(pipe, held_out(12, 0, "image")), least=2)
    droppers = crop_importance._droppers(request)
    one = crop_importance.scored(setting, droppers)
    many = crop_importance._scored(request, setting, droppers, silent)
    for expected, found in zip(one, many, strict=True):
        pd.testing.assert_frame_equal(expected, found, check_exact=True)


def test_options_of_workers_are_checked() -> None:
    for given in ({"workers": 0}, {"gpus": 1.5}, {"gpus": -1}, {"gpus": float("nan")}):
        with pytest.raises(UserError, match="must be"):
            Cluster(**given)  # type: ignore[arg-type]
    assert filled(["--ray"], {"--ray": "local"}) == ["--ray", "local"]
    assert filled(["--ray", "auto"], {"--ray": "local"}) == ["--ray", "auto"]
    alone = CliRunner().invoke(app, ["compare", "--workers", "2"])
    assert alone.exit_code == 2
    assert "give --ray too" in alone.output


def test_a_tally_knows_the_rows_of_a_journal(tmp_path: Path) -> None:
    asked = questions()
    single(Chooser(FAULTS["one question of a method"]), tmp_path / "j", asked, 4)
    journal = Journal(tmp_path / "j")
    keys = {key for key, _ in journal.answers}
    with Tally(tmp_path / "j", keys, [item.id for item in asked]) as tally:
        assert tally.done == len(journal.answers)
        assert tally.missing == journal.missing
        for item in asked:
            known = {row for row in journal.answers if row[1] == item.id}
            assert tally.answered([item.id]) == known
        assert tally.answered([item.id for item in asked]) == journal.answers.keys()
        assert all(isinstance(row, np.ndarray) for row in tally.rows.values())
    sheet = Sheet([("a", "1")], {})
    sheet.add("a", {"1": {"answer": "no"}, "2": {"answer": "yes"}})
    assert sheet.added == {"a": {"2": {"answer": "yes"}}}


def test_a_lost_node_costs_what_its_workers_had_begun(tmp_path: Path) -> None:
    columns: list[Any] = [scale._Column(number=number) for number in range(5)]
    asked = questions(1600, per_image=4)
    clock = scale.Clock(
        size=10,
        per_node=4,
        keys=[column.key for column in columns],
        row_seconds=1,
        load_seconds=10,
        fails_at=120,
    )
    scale.simulate(clock, columns, asked, tmp_path / "j")
    assert len((tmp_path / "j").read_text().splitlines()) == 5 * 1600, "nothing twice"
    # By hand: 400 batches, so 400 // (8 * 10) = 5 a shard: 20 questions, 100 rows, 100 s.  Workers
    # are ready at 10 s, so each of the four has worked for 10 s on its second shard.
    assert clock.lost == 4 * 10
    # 80 shards: until 710 s six workers finish 7 each, and the four one and, from 130 s on with a
    # new model, 5 until 630 s: 66.  At 730 s these finish 4 more, and at 810 s the six: 76.  The
    # last 4 end at 830 s.
    assert clock.now == 830
