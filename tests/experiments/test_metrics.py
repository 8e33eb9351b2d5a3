"""Scores of single answers, against values computed by hand."""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from places import ROOT

from tokenprune import registry
from tokenprune.errors import UnknownNameError, UserError
from tokenprune.experiments.common.questions import Question
from tokenprune.experiments.metrics import (
    Metric,
    check_metrics,
    metric_of,
    metrics,
    scored,
    with_metric,
)
from tokenprune.experiments.metrics.anls import edit_distance
from tokenprune.experiments.metrics.choice import chosen
from tokenprune.experiments.metrics.normal import normal
from tokenprune.experiments.metrics.vqa import official


def question(*answers: str, choices: tuple[str, ...] | None = None) -> Question:
    return Question("q", (), "What?", answers[0], answers=answers, choices=choices)


def score(name: str, prediction: str, *answers: str, choices: tuple[str, ...] = ()) -> float:
    return metrics.get(name)().score(prediction, question(*answers, choices=choices or None))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Yes.", "yes"),
        ("  two\n words ", "two words"),
        ("THE Dog", "a dog"),
        ("Two.", "2"),
        ("none", "0"),
        ("Twenty-one", "21"),
        ("twenty one", "21"),
        ("nineteen", "19"),
        ("ninety-nine", "99"),
        ("one hundred", "100"),
        ("three thousand", "3000"),
        ("1,234,567", "1234567"),
        ("1,000.", "1000"),
        ("１２", "12"),  # full width
        ("ﬁre", "fire"),  # a ligature
        ("Straße", "STRASSE"),
        ("don’t", "dont"),
        ("T-shirt", "t shirt"),
        ("“blue”", "blue"),
        ("(blue)", "blue"),
        ("−5", "-5"),  # a minus sign
        (".5", "0.5"),
        ("5 %", "5%"),
        ("salt\u00a0lake", "salt lake"),
        ("A.", "a"),  # an article alone is a letter
    ],
)
def test_equal_answers_have_one_normal_form(one: str, other: str) -> None:
    assert normal(one) == normal(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("-5", "5"),
        ("3.5", "35"),
        ("5%", "5"),
        ("$5", "5"),
        ("12:30", "1230"),
        ("1,5", "15"),
        ("C++", "C"),
        ("O-", "O"),
        ("two three", "5"),
        ("twenty ten", "30"),
        ("a", "the"),
        ("", "a"),
        ("?", ""),
        ("猫", "犬"),
    ],
)
def test_different_answers_have_different_normal_forms(one: str, other: str) -> None:
    assert normal(one) != normal(other)


def test_a_leading_yes_or_no_decides_about_yes_or_no() -> None:
    assert score("exact", "Yes, it is", "yes") == 1
    assert score("exact", "No, there is none.", "no") == 1
    assert score("exact", "Yes, it is", "no") == 0
    assert score("exact", "no no", "no") == 0, "two in a row are no explanation"
    assert score("exact", "yes, two", "2") == 0
    assert score("exact", "kitten", "cat", "kitten") == 1, "any true answer counts"


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("The dog!", "dog"),
        ("T-shirt", "t shirt"),  # no space beside the hyphen: a space
        ("t- shirt", "t shirt"),  # a space beside it: deleted
        ("black-and-white - grey", "blackandwhite grey"),  # then everywhere
        ("1,000", "1000"),
        ("1,000-2,000", "10002000"),  # a comma between digits deletes all marks
        ("red,green", "red green"),
        ("2.5", "2.5"),
        ("st. louis.", "st louis"),
        ("no.5", "no.5"),
        ("Ten", "10"),
        ("eleven", "eleven"),  # the official list ends at ten
        ("none", "0"),
        ("a\tb\n", "b"),
        ("an", ""),
        ("don't", "dont"),
        ("ill", "ill"),
        ("i'll", "i'll"),  # not among the contractions
        ("dog's", "dog's"),
        ("yes: no", "yes: no"),  # a colon is no mark of the list
    ],
)
def test_official_normalisation_of_vqa(text: str, form: str) -> None:
    assert official(text) == form


@pytest.mark.parametrize("matches", range(11))
def test_vqa_leaves_out_each_annotator(matches: int) -> None:
    answers = ["yes"] * matches + [f"other {index}" for index in range(10 - matches)]
    # The ten leave-one-out accuracies, one by one.
    shares = [min(1, (matches - (index < matches)) / 3) for index in range(10)]
    assert score("vqa", "Yes.", *answers) == pytest.approx(sum(shares) / 10)


def test_vqa_vectors() -> None:
    assert score("vqa", "two", *["2"] * 10) == 1, "both sides are normalised"
    assert score("vqa", "a", *["b"] * 10) == 0
    found = [score("vqa", "x", *["x"] * n, *["y"] * (10 - n)) for n in (1, 2, 3, 4)]
    assert found == pytest.approx([0.3, 0.6, 0.9, 1.0])
    with pytest.raises(UserError, match="several annotators"):
        metrics.get("vqa")().check(question("yes"))


@pytest.mark.parametrize(
    ("said", "truths", "expected"),
    [
        ("hello", ["hello"], 1),
        ("Hello  World ", ["hello world"], 1),
        ("helo", ["hello"], 1 - 1 / 5),
        ("sitting", ["kitten"], 1 - 3 / 7),
        ("ab", ["ax"], 0.5),  # at the threshold
        ("abc", ["axy"], 0),  # 1/3
        ("", ["x"], 0),
        ("kitten", ["dog", "kitten"], 1),
    ],
)
def test_anls(said: str, truths: list[str], expected: float) -> None:
    assert score("anls", said, *truths) == pytest.approx(expected)


def test_edit_distance_equals_the_recursive_definition() -> None:
    def slow(one: str, other: str) -> int:
        if not one or not other:
            return len(one) + len(other)
        same = slow(one[1:], other[1:]) + (one[0] != other[0])
        return min(same, slow(one[1:], other) + 1, slow(one, other[1:]) + 1)

    words = ["", "a", "ab", "ba", "abc", "cab", "bcaa"]
    assert all(edit_distance(x, y) == slow(x, y) for x in words for y in words)


@pytest.mark.parametrize(
    ("said", "truth", "right"),
    [
        ("105", "100", True),
        ("95", "100", True),
        ("1.05", "1", True),  # 1.05 - 1 > 0.05 in floats
        ("105.1", "100", False),
        ("-95", "-100", True),
        ("95", "-100", False),
        ("0", "0.0", True),
        ("0.01", "0", False),
        ("5%", "0.05", True),
        ("5%", "5", False),
        ("$1,040.", "1000", True),
        ("1e3", "1000", True),
        ("nan", "3", False),
        ("inf", "1e308", False),
        ("1_0", "10", False),
        ("Blue.", "blue", True),
        ("blues", "blue", False),
        ("two", "2", True),
    ],
)
def test_relaxed(said: str, truth: str, right: bool) -> None:
    assert score("relaxed", said, truth) == right


COLOURS = ("red", "blue", "light blue", "green")


@pytest.mark.parametrize(
    ("said", "place"),
    [
        *[(text, 1) for text in ("B", "b", "(B)", "B.", "b)", "**B**", "B. blue", "(B) blue")],
        *[(text, 1) for text in ("B: blue", "B blue", "The answer is B", "the answer is (b).")],
        *[(text, 1) for text in ("Answer: B", "option B", "The correct option is B because.")],
        *[(text, 1) for text in ("blue", "Blue.", "the answer is blue", "It is blue", "I'd say B")],
        *[(text, 2) for text in ("light blue", "It is light blue", "C", "Ｃ")],
        ("B. red", 1),  # the letter wins
        ("e.g. blue", 1),
        *[(text, None) for text in ("B or C", "A dog", "the answer is a dog", "E", "", "purple")],
        ("red or blue", None),
    ],
)
def test_choice(said: str, place: int | None) -> None:
    assert chosen(said, COLOURS) == place


def test_choice_compares_letters_and_texts_of_options() -> None:
    for truth in ("B", "blue", "(b)"):
        assert score("choice", "B.", truth, choices=COLOURS) == 1
        assert score("choice", "A", truth, choices=COLOURS) == 0
    assert score("choice", "D) all", "D") == 1
    assert chosen("A", ("B", "A")) == 0, "a letter alone is that of an option, not its text"
    with pytest.raises(UserError, match="not options"):
        metrics.get("choice")().check(question("purple", choices=COLOURS))
    with pytest.raises(UserError, match="not options"):
        metrics.get("choice")().check(question("blue"))
    with pytest.raises(UserError, match="are equal"):
        metrics.get("choice")().check(question("A", choices=("two", "2")))


@pytest.mark.parametrize(
    ("said", "truth", "right"),
    [
        ("Yes", "yes", True),
        ("Yes, it is not a cat.", "yes", True),
        ("no.", "No", True),
        ("There is no dog. Yes.", "no", True),
        ("There isn’t a dog", "no", True),
        ("It is not there", "no", True),
        ("I would say yes", "yes", True),
        ("know", "no", False),
        ("nothing", "no", False),
        ("I see a dog", "yes", False),
        ("", "no", False),
    ],
)
def test_yes_no(said: str, truth: str, right: bool) -> None:
    assert score("yes-no", said, truth) == right


def test_yes_no_needs_yes_or_no() -> None:
    with pytest.raises(UserError, match="needs the answer yes or no"):
        metrics.get("yes-no")().check(question("blue"))


@pytest.mark.parametrize(
    ("said", "truths", "expected"),
    [
        ("[0, 0, 2, 2]", ["[1, 1, 3, 3]"], 1 / 7),
        ("[0, 0, 2, 2]", ["[1, 1, 3, 3]", "[0, 0, 2, 1]"], 1 / 2),
        ("(0,0),(2,2)", ["0 0 2 2"], 1),
        ('{"bbox_2d": [0, 0, 10, 10], "label": "2 cats"}', ["[0, 0, 10, 5]"], 0.5),
        ("[0.1, 0.1, 0.2, 0.2]", ["[0.3, 0.3, 0.4, 0.4]"], 0),
        ("[2, 2, 0, 0]", ["[0, 0, 2, 2]"], 0),
        ("nothing", ["[0, 0, 2, 2]"], 0),
    ],
)
def test_iou(said: str, truths: list[str], expected: float) -> None:
    assert score("iou", said, *truths) == pytest.approx(expected)


def test_iou_needs_a_box() -> None:
    with pytest.raises(UserError, match="no box"):
        metrics.get("iou")().check(question("[1, 1, 1, 4]"))


def test_contains_compares_whole_words() -> None:
    assert score("contains", "It is a Black cat.", "black cat") == 1
    assert score("contains", "category", "cat") == 0
    assert score("contains", "there are two", "2") == 1
    assert score("contains", "cat and black", "black cat") == 0


# --- which metric ---------------------------------------------------------------------------------


def test_the_run_decides_then_the_question_then_its_form() -> None:
    plain, offered = question("blue"), question("blue", choices=COLOURS)
    named = with_metric([offered], "contains")[0]
    assert [metric_of(item).name for item in (plain, offered, named)] == [
        "exact",
        "choice",
        "contains",
    ]
    assert metric_of(with_metric([named], None)[0]).name == "contains"
    with pytest.raises(UnknownNameError, match="contains"):
        with_metric([plain], "contain")


def test_a_question_that_cannot_be_scored_is_named() -> None:
    with pytest.raises(UserError, match=r"'q' cannot be scored.*annotators"):
        check_metrics(with_metric([question("yes")], "vqa"))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_metrics.py").write_text(
        "from tokenprune.experiments.metrics import Metric\n"
        "def half(prediction, question):\n    return 0.5\n"
        "def broken(prediction, question):\n    return 1 / 0\n"
        "def large(prediction, question):\n    return 2\n"
        "class Whole(Metric):\n    def score(self, prediction, question):\n        return 1\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    return "own_metrics"


def test_a_function_and_a_class_of_a_module(own: str) -> None:
    items = with_metric([question("x")], f"{own}:half")
    assert (metric_of(items[0]).name, scored(metric_of(items[0]), "y", items[0])) == (
        "own_metrics:half",
        0.5,
    )
    whole = metric_of(with_metric([question("x")], f"{own}:Whole")[0])
    assert (whole.name, whole.score("y", question("x"))) == ("own_metrics:Whole", 1)
    for name, words in {"none": "has no 'none'", "number": "neither a function"}.items():
        with pytest.raises(UserError, match=words):
            with_metric([question("x")], f"{own}:{name}")
    with pytest.raises(UserError, match="no module 'nowhere'"):
        with_metric([question("x")], "nowhere:half")


def test_a_metric_that_fails_is_named(own: str) -> None:
    said = {"broken": "failed on 'y'.*ZeroDivisionError", "large": "from 0 to 1"}
    for name, words in said.items():
        item = with_metric([question("x")], f"{own}:{name}")[0]
        with pytest.raises(UserError, match=words):
            scored(metric_of(item), "y", item)
        with pytest.raises(UserError, match=f"'q' cannot be scored.*own_metrics:{name}"):
            check_metrics([item])


def test_a_data_file_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    item = Question("q", (), "What?", "x", metric="trap:score")
    with pytest.raises(UserError, match="only --metric imports"):
        metric_of(item)


def test_entry_points_add_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    found = registry.Registry[Metric](
        "metric", "tokenprune.experiments.metrics", "tokenprune.metrics"
    )
    entry = EntryPoint("mine", "tokenprune.experiments.metrics.exact:Exact", "tokenprune.metrics")
    asked = []
    monkeypatch.setattr(registry, "entry_points", lambda group: asked.append(group) or [entry])
    assert "mine" in found.names()
    assert asked == [metrics.group] == ["tokenprune.metrics"]


PAGE = ROOT / "docs" / "metrics.md"


@pytest.mark.skipif(not PAGE.exists(), reason="the documentation is not part of the package")
def test_the_page_lists_every_metric_and_its_examples_hold() -> None:
    text = PAGE.read_text(encoding="utf-8")
    table = text.partition("<!-- examples -->")[2].partition("<!-- end -->")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.split("\n")[3:-1]]
    for name, said, truths, choices, expected in rows:
        options = tuple(choices.split("; ")) if choices else ()
        found = score(name.strip("`"), said, *truths.split("; "), choices=options)
        assert found == pytest.approx(float(expected)), (name, said)
    ours = "tokenprune.experiments.metrics."
    built_in = {name for name in metrics.names() if metrics.get(name).__module__.startswith(ours)}
    assert {row[0].strip("`") for row in rows} == built_in
    assert built_in == set(re.findall(r"^\| `([a-z-]+)` \| (?:0 or 1|graded)", text, re.MULTILINE))
