"""A comparison on the testbeds: its run folder, references, resuming and failures."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import scipy.stats
import torch

import tokenprune as tp
from tokenprune.errors import UserError
from tokenprune.experiments.common.grid import cells
from tokenprune.experiments.common.outcome import Outcome
from tokenprune.experiments.common.questions import held_out
from tokenprune.experiments.common.request import CompareRequest
from tokenprune.experiments.common.setting import check
from tokenprune.experiments.compare import loop
from tokenprune.experiments.compare.run import run as compare
from tokenprune.experiments.compare.runner import ModelRunner

SMALL = CompareRequest(
    methods=("uniform", "fastv:layer=3"), retention=(0.25,), questions=10, batch_size=5
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run") / "small"


@pytest.fixture(scope="module")
def finished(folder: Path) -> Outcome:
    return compare(replace(SMALL, out=folder))


def test_the_run_folder(finished: Outcome, folder: Path) -> None:
    assert finished.status == "complete"
    assert (finished.answered, finished.wanted, finished.new) == (50, 50, 50)
    for name in ("accuracy.png", "accuracy.pdf", "accuracy-by-kind.png", "accuracy-by-cost.pdf"):
        assert (folder / "plots" / name).stat().st_size > 10_000

    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "complete"
    asked = manifest["experiment"]
    assert asked["methods"] == ["uniform", "fastv:layer=3"]
    assert asked["dtype"] == "float32"
    assert all(len(asked[name]) == 64 for name in ("weights", "processor", "data", "code"))
    assert manifest["versions"]["torch"]

    frame = pd.read_parquet(folder / "answers.parquet")
    assert len(frame) == 50
    assert not frame.duplicated(["model", "method", "parameters", "retention", "question_id"]).any()
    assert set(frame["status"]) == {"ok"}
    full = frame[frame["method"] == "uncompressed"]
    assert full["agrees"].all()
    assert (full["kept_patches"] == full["patch_tokens"]).all()
    assert (full["flops"] == full["uncompressed_flops"]).all()
    for _, row in frame[frame["method"] == "uniform"].iterrows():
        assert row["kept_patches"] == int(0.25 * row["patch_tokens"])
        assert row["layer_average"] == row["kept_patches"] + row["kept_separators"]
    pruned = frame[frame["retention"] < 1]
    assert (pruned["flops"] < pruned["uncompressed_flops"]).all()
    assert (folder / "summary.csv").read_text().count("\n") == 1 + 5 * 9


def test_every_number_of_the_ledger_is_in_the_tables(finished: Outcome, folder: Path) -> None:
    pipe = tp.load("testbed-next")
    item = held_out(1, seed=0)[0]
    method = tp.create("uniform", retention=0.25)
    with tp.compress(pipe.model, method) as trace, torch.no_grad():
        pipe.model(**pipe.prepare([item.images[0].open()], [item.question]))
    told = trace.ledger
    frame = pd.read_parquet(folder / "answers.parquet")
    row = frame.set_index(["method", "question_id"]).loc[("uniform", item.id)]
    numbers = {n: v for n, v in vars(told).items() if isinstance(v, int | float)}
    assert {"vision_flops", "uncompressed_vision_flops", "selector_bytes"} <= set(numbers)
    for name in numbers.keys() - {"requested"}:
        assert row[name] == numbers[name], name
        assert name in finished.summary
    assert row["kv_entries"] == sum(told.kv_per_layer)
    assert list(row["visual_per_layer"]) == list(told.visual_per_layer)


def test_the_answers_are_those_of_a_plain_generate(finished: Outcome, folder: Path) -> None:
    pipe = tp.load("testbed-next")
    frame = pd.read_parquet(folder / "answers.parquet")
    given = frame[frame["method"] == "fastv"].set_index("question_id")["answer"]
    for item in held_out(3, seed=0):
        inputs = pipe.prepare([item.images[0].open()], [item.question])
        with tp.compress(pipe.model, tp.create("fastv", layer=3, retention=0.25)):
            ids = pipe.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        assert pipe.decode(ids, inputs) == [given[item.id]]


def test_divergence_is_that_of_the_answer_tokens_distribution(
    finished: Outcome, folder: Path
) -> None:
    pipe = tp.load("testbed-next")
    frame = pd.read_parquet(folder / "answers.parquet").set_index(["method", "question_id"])
    fastv = tp.create("fastv", layer=3, retention=0.25)
    for item in held_out(3, seed=0):
        inputs = pipe.prepare([item.images[0].open()], [item.question])
        probabilities = []
        for compressor in (None, fastv):
            with tp.compress(pipe.model, compressor), torch.no_grad():
                logits = pipe.model(**inputs).logits[0, -1].double()
            probabilities.append(logits.softmax(-1).numpy())
        expected = scipy.stats.entropy(*probabilities)
        assert frame.loc[("fastv", item.id), "kl"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
        assert frame.loc[("uncompressed", item.id), "kl"] == 0
    summary = finished.summary.set_index(["method", "kind"]).loc[("fastv", "overall")]
    assert summary["kl"] == pytest.approx(frame.loc["fastv", "kl"].mean())
    assert summary["kl_low"] <= summary["kl"] <= summary["kl_high"]


def test_divergence_with_impossible_tokens_is_finite() -> None:
    full, short = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.25, 0.75]).log()
    assert loop.divergence(full, short) == pytest.approx(math.log(4))
    assert loop.divergence(full, full) == 0


def test_the_references_see_no_image_and_the_thumbnail_alone(
    finished: Outcome, folder: Path
) -> None:
    pipe = tp.load("testbed-next")
    frame = pd.read_parquet(folder / "answers.parquet").set_index(["method", "question_id"])
    for item in held_out(4, seed=0):
        blind, low = (frame.loc[(name, item.id)] for name in ("image-free", "thumbnail-only"))
        assert (blind["patch_tokens"], blind["kept_patches"]) == (0, 0)
        assert (low["kept_patches"], low["kept_separators"]) == (144, 0)
        assert math.isnan(low["retention"])
        assert low["patch_tokens"] > 144
        prompt = pipe.prompt(item.question, 1)
        inputs = pipe.processor.tokenizer(prompt.replace("<image>", ""), return_tensors="pt")
        ids = pipe.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        assert pipe.decode(ids, inputs) == [blind["answer"]]
        right = {item.answer} & {blind["answer"], low["answer"]}
        assert set(frame.xs(item.id, level=1)["easy"]) == {bool(right)}
    assert finished.summary["retention"].isna().sum() == 2 * 9


def test_several_seeds_are_one_method(tmp_path: Path) -> None:
    found = cells(["uniform", "random", "random:seed=7"], [0.5], seeds=3)
    assert [str(cell) for cell in found] == [
        "uncompressed",
        "uniform at 0.5",
        "random at 0.5",
        "random:seed=1 at 0.5",
        "random:seed=2 at 0.5",
        "random:seed=7 at 0.5",
    ]
    assert [cell.label for cell in found[2:]] == ["random"] * 3 + ["random:seed=7"]
    assert len({cell.key for cell in found}) == 6
    with pytest.raises(UserError, match="--seeds must be at least 1"):
        compare(CompareRequest(seeds=0, out=tmp_path))


def test_the_same_command_again_computes_nothing(finished: Outcome, folder: Path) -> None:
    before = {name: (folder / name).read_bytes() for name in ("answers.jsonl", "answers.parquet")}
    again = compare(replace(SMALL, out=folder, batch_size=3))
    assert (again.status, again.new) == ("complete", 0)
    assert {name: (folder / name).read_bytes() for name in before} == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"max_new_tokens": 4}, "max_new_tokens: 8 there, 4 here"),
    ],
)
def test_another_experiment_in_the_folder(
    finished: Outcome, folder: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError) as caught:
        compare(replace(SMALL, out=folder, **changes))
    assert said in str(caught.value)


def test_interrupted_then_resumed(
    finished: Outcome,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = 0
    original = ModelRunner.generate

    def impatient(self: Any, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(ModelRunner, "generate", impatient)
    request = replace(SMALL, out=tmp_path)
    first = compare(request)
    assert (first.status, first.answered, first.wanted) == ("interrupted", 10, 50)
    assert json.loads((tmp_path / "manifest.json").read_text())["status"] == "interrupted"
    assert len(pd.read_parquet(tmp_path / "answers.parquet")) == 10
    second = compare(request)
    assert (second.status, second.new) == ("complete", 40)
    for name in ("answers.parquet", "summary.csv"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_only_what_is_in_the_journal_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file system loses the last line."""
    original = loop.run

    def losing(*arguments: Any, **options: Any) -> None:
        original(*arguments, **options)
        path = tmp_path / "answers.jsonl"
        path.write_bytes(path.read_bytes()[:-5])

    monkeypatch.setattr(loop, "run", losing)
    outcome = compare(replace(SMALL, out=tmp_path, questions=2))
    assert (outcome.status, outcome.answered) == ("failed", outcome.wanted - 1)
    (why,) = outcome.failures.values()
    assert "1 of 2 answers are not in the journal" in why.error
    monkeypatch.undo()
    again = compare(replace(SMALL, out=tmp_path, questions=2))
    assert (again.status, again.new) == ("complete", 1)


def rows_of(compressor: Any) -> list[Any]:
    return compressor if isinstance(compressor, list) else [compressor]


@pytest.mark.filterwarnings("ignore:the shared work of cells")
@pytest.mark.parametrize("method", ["fastv:layer=3", "uniform"])
def test_a_failing_method_is_not_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    original = ModelRunner.generate

    def broken(self: Any, compressor: Any, *rest: Any) -> Any:
        if any(one and one.label == method for one in rows_of(compressor)):
            raise RuntimeError("out of memory")
        return original(self, compressor, *rest)

    monkeypatch.setattr(ModelRunner, "generate", broken)
    methods = (*SMALL.methods, "first")
    outcome = compare(replace(SMALL, methods=methods, out=tmp_path, questions=5))
    assert outcome.status == "failed"
    (cell,) = outcome.failures
    assert str(cell) == f"{method} at 0.25"
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["failures"][0]["error"] == "RuntimeError: out of memory"
    assert "Traceback" in manifest["failures"][0]["traceback"]
    table = outcome.summary.set_index(["label", "kind"])
    assert pd.isna(table.loc[(method, "overall"), "accuracy"])
    for other in {*methods} - {method}:
        assert table.loc[(other, "overall"), "n"] == 5
    frame = pd.read_parquet(tmp_path / "answers.parquet")
    assert list(frame["status"][frame["label"] == method]) == ["failed"] * 5
    assert frame["correct"][frame["label"] == method].isna().all()


def test_the_default_folder_says_what_was_asked_and_never_clashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "run", lambda *_, **__: None)
    paths = [
        compare(replace(SMALL, **changes)).folder
        for changes in ({}, {"seed": 1}, {"retention": (0.5,)}, {})
    ]
    assert paths[0] == paths[3]
    assert len(set(paths)) == 3
    assert all(path.parent == Path("runs") for path in paths)
    assert all("testbed-next_uniform+fastv-layer=3_10-questions_" in p.name for p in paths)


def test_own_questions(tmp_path: Path) -> None:
    lines = []
    for item in held_out(4, seed=5):
        name = f"{item.images[0].id}.png"
        item.images[0].open().save(tmp_path / name)
        fields = {"image": name, "question": item.question, "answer": item.answer}
        lines.append(json.dumps(fields))
    both = {"images": [name, name], "question": "<image> <image> Is there a red square?"}
    lines.append(json.dumps(both | {"answer": "no"}))
    path = tmp_path / "my.jsonl"
    path.write_text("\n".join(lines))
    request = CompareRequest(
        methods=("uniform",), retention=(0.5,), data=path, out=tmp_path / "run"
    )
    outcome = compare(request)
    assert (outcome.status, outcome.answered) == ("complete", 20)
    assert not (tmp_path / "run" / "plots" / "accuracy-by-kind.png").exists(), "one kind only"

    path.write_text("\n".join([*lines, lines[-1].replace("<image> <image>", "<image>")]))
    with pytest.raises(UserError, match=r"'line-6' cannot be asked: .* has 1 '<image>'"):
        check(request)


def test_questions_that_cannot_be_asked_fail_alone(tmp_path: Path) -> None:
    """A truncated image, a missing one, wrong placeholders, and frames of two sizes."""
    lines = []
    for number, item in enumerate(held_out(6, seed=5)):
        item.images[0].open().save(tmp_path / f"{number}.png")
        fields = {"image": f"{number}.png", "question": item.question, "answer": item.answer}
        lines.append(json.dumps(fields | {"id": f"q{number}"}))
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "2.png").unlink()
    lines[3] = lines[3].replace('"question": "', '"question": "<image> <image> ')
    path = tmp_path / "my.jsonl"
    path.write_text("\n".join(lines))
    request = CompareRequest(
        methods=("uniform",), retention=(0.5,), data=path, out=tmp_path / "run"
    )
    with pytest.warns(RuntimeWarning, match="3 of 6 questions cannot be asked"):
        outcome = compare(request)
    assert (outcome.status, outcome.answered) == ("failed", 3 * 4)
    assert set(outcome.missing) == {"q1", "q2", "q3"}
    reasons = [next(iter(cells_of.values())).error for cells_of in outcome.missing.values()]
    for why, word in zip(
        reasons, ("cannot decode", "there is no image", "2 '<image>'"), strict=True
    ):
        assert word in why
    overall = outcome.summary.query("kind == 'overall' and method == 'uniform'").iloc[0]
    assert (overall["n"], overall["missing"]) == (3, 3)

    (tmp_path / "0.png").write_bytes(b"")
    path.write_text("\n".join(lines[:4]))
    with pytest.raises(UserError, match=r"none of the questions can be asked; the first is 'q0'"):
        compare(replace(request, out=tmp_path / "other"))


@pytest.mark.filterwarnings("ignore::tokenprune.errors.RetentionWarning")
@pytest.mark.parametrize("modality", ["video", "multi-image"])
def test_videos_and_pairs_with_every_method(tmp_path: Path, modality: Any) -> None:
    outcome = compare(
        CompareRequest(
            model="testbed-onevision",
            modality=modality,
            methods=("all",),
            retention=(0.5,),
            questions=10,
            batch_size=7,
            out=tmp_path / "run",
        )
    )
    assert outcome.status == "complete"
    assert "CLS token" in outcome.skipped["fastervlm"]
    methods = set(outcome.summary["method"]) - {"uncompressed", "image-free"}
    assert methods | set(outcome.skipped) == set(tp.list_methods())
    assert not methods & set(outcome.skipped)
    answers = pd.read_parquet(tmp_path / "run" / "answers.parquet")
    full = answers[answers["method"] == "uncompressed"]
    assert full["correct"].mean() >= 0.8
    pipe = tp.load("testbed-onevision")
    for item, said in zip(held_out(10, 0, modality), full["answer"], strict=True):
        images = [picture.open() for picture in item.images]
        videos = [images] if item.video else None
        inputs = pipe.prepare(None if videos else [images], [item.question], videos)
        ids = pipe.model.generate(**inputs)
        assert pipe.decode(ids, inputs) == [said]


def test_a_modality_that_the_model_lacks_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this model takes images only"):
        compare(CompareRequest(modality="video", questions=3, out=tmp_path / "run"))
    with pytest.raises(UserError, match="no modality is called 'videos'"):
        compare(CompareRequest(modality="videos", out=tmp_path / "run"))  # type: ignore[arg-type]
