"""Intervals and tests against figures worked out by hand."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenprune.cost.ledger import FIGURES
from tokenprune.experiments.common.intervals import (
    holm,
    mcnemar,
    mean_score,
    paired_bootstrap,
    wilson,
)
from tokenprune.experiments.common.summary import OVERALL, compared, pairs, summarise


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_the_formula(counts: tuple[int, int]) -> None:
    successes, n = counts
    z, p = 1.959963984540054, successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert wilson(successes, n) == pytest.approx((centre - half, centre + half), abs=1e-9)


def test_wilson_by_hand() -> None:
    # 10 of 10: the lower end is n / (n + z²) = 10 / 13.8415.
    assert wilson(10, 10) == pytest.approx((10 / 13.841458820694124, 1.0))


def test_mcnemar_by_hand() -> None:
    # Six questions only the first got, one only the second: 2 * (1 + 7) / 2**7.
    first = [True] * 6 + [False] * 1 + [True] * 20 + [False] * 3
    second = [False] * 6 + [True] * 1 + [True] * 20 + [False] * 3
    assert mcnemar(first, second) == pytest.approx(0.125)
    assert mcnemar(second, first) == pytest.approx(0.125)
    assert mcnemar(first, first) == 1.0


def test_bootstrap_resamples_whole_images() -> None:
    generator = np.random.default_rng(0)
    per_image = generator.normal(size=60)
    difference = np.repeat(per_image, 5)  # five questions with equal results
    images = np.repeat(np.arange(60), 5)
    low, high = paired_bootstrap(difference, images, seed=1, resamples=20_000)
    half = 1.96 * per_image.std() / math.sqrt(60)  # of the normal approximation
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)
    alone = paired_bootstrap(difference, np.arange(300), seed=1)
    assert alone.high - alone.low < 0.6 * (high - low), "as if the questions were independent"


def test_bootstrap_is_seeded_and_leaves_the_global_generator_alone() -> None:
    np.random.seed(0)  # noqa: NPY002  # the global state is what is looked at
    before = np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]  # noqa: NPY002
    difference, images = [1, 0, -1, 1, 0, 0], list("aabbcc")
    assert paired_bootstrap(difference, images, seed=3) == paired_bootstrap(
        difference, images, seed=3
    )
    assert np.random.get_state()[1].tolist() == before  # type: ignore[index,union-attr]  # noqa: NPY002
    assert paired_bootstrap([0.25] * 6, images, seed=3) == (0.25, 0.25)


def answers(method: str, retention: float, right: list[bool | None]) -> pd.DataFrame:
    """Ten questions of two kinds about five images; None stands for a failure."""
    return pd.DataFrame(
        {
            "model": "m",
            "method": method,
            "label": method,
            "parameters": "",
            "retention": retention,
            "question_id": [f"q{i}" for i in range(len(right))],
            "image_id": [f"i{i // 2}" for i in range(len(right))],
            "kind": ["even" if i % 2 == 0 else "odd" for i in range(len(right))],
            "correct": pd.array(right, dtype="boolean"),
            "agrees": pd.array(right, dtype="boolean"),
            "status": ["failed" if value is None else "ok" for value in right],
            **{name: float(index) for index, name in enumerate(FIGURES)},
        }
    )


def test_summary() -> None:
    table = summarise(
        pd.concat(
            [
                answers("uncompressed", 1.0, [True] * 10),
                answers("uniform", 0.5, [True] * 4 + [False] * 6),
                answers("other", 0.5, [True] * 8 + [False] * 2),
            ]
        ),
        seed=0,
    ).set_index(["label", "kind"])
    assert len(table) == 9
    other = table.loc[("other", OVERALL)]
    assert (other["n"], other["accuracy"]) == (10, 0.8)
    assert (other["accuracy_low"], other["accuracy_high"]) == pytest.approx(wilson(8, 10))
    assert other["vs_uncompressed"] == pytest.approx(-0.2)
    assert other["vs_uncompressed_p"] == pytest.approx(0.5)  # 2 of 2 discordant: 2 / 2²
    assert other["vs_uniform"] == pytest.approx(0.4)
    assert other["vs_uniform_p"] == pytest.approx(0.125)  # 4 of 4 discordant: 2 / 2⁴
    assert other["vs_uniform_low"] <= 0.4 <= other["vs_uniform_high"]
    assert other["layer_average"] == FIGURES.index("layer_average")
    assert table.loc[("other", "odd"), "n"] == 5
    assert table.loc[("other", "odd"), "vs_uniform"] == pytest.approx(0.4)


def test_a_failed_cell_has_no_figures_and_is_no_reference() -> None:
    table = summarise(
        pd.concat(
            [
                answers("uncompressed", 1.0, [True] * 10),
                answers("uniform", 0.5, [True] * 4 + [None] * 6),
                answers("other", 0.5, [True] * 10),
            ]
        ),
        seed=0,
    ).set_index(["label", "kind"])
    failed = table.loc[("uniform", OVERALL)]
    assert failed["status"] == "failed"
    assert (
        failed.drop(["model", "method", "parameters", "retention", "asked_retention", "status"])
        .isna()
        .all()
    )
    assert math.isnan(table.loc[("other", OVERALL), "vs_uniform"])
    assert table.loc[("other", OVERALL), "vs_uncompressed"] == 0


def test_an_unfinished_cell_is_compared_on_common_questions() -> None:
    part = answers("uniform", 0.5, [True, False, True, True])
    table = summarise(
        pd.concat([answers("uncompressed", 1.0, [True] * 3 + [False] * 7), part]), seed=0
    ).set_index(["label", "kind"])
    row = table.loc[("uniform", OVERALL)]
    assert (row["n"], row["accuracy"], row["vs_uncompressed"]) == (4, 0.75, 0.0)


def test_one_kind_is_not_shown_twice() -> None:
    single = answers("uncompressed", 1.0, [True] * 4).assign(kind="other")
    assert list(summarise(single, seed=0)["kind"]) == [OVERALL]


# --- pairs, seeds, difficulty ---------------------------------------------------------------------


def test_holm_by_hand() -> None:
    # Sorted: 0.01 * 4, 0.02 * 3, 0.03 * 2 (not below 0.06), 0.9 * 1.
    assert list(holm([0.03, 0.01, 0.9, 0.02])) == pytest.approx([0.06, 0.04, 0.9, 0.06])
    assert list(holm([0.5, 0.6])) == [1.0, 1.0]
    with_gap = holm([0.01, math.nan, 0.04])
    assert with_gap[0] == pytest.approx(0.02)
    assert with_gap[2] == pytest.approx(0.04)
    assert math.isnan(with_gap[1])


def test_every_pair_by_hand() -> None:
    table = pd.concat(
        [
            answers("a", 0.5, [True] * 8 + [False] * 2),
            answers("b", 0.5, [True] * 4 + [False] * 5 + [True]),
            answers("c", 0.5, [True] * 10),
            answers("c", 0.1, [True] * 10),
        ]
    )
    found = pairs(table, seed=0)
    assert list(zip(found["first"], found["second"], strict=True)) == [
        ("a", "b"),
        ("a", "c"),
        ("b", "c"),
    ]
    row = found.iloc[0]
    assert (row["n"], row["only_first"], row["only_second"]) == (10, 4, 1)
    assert row["difference"] == pytest.approx(0.3)
    assert row["p"] == pytest.approx(0.375)  # 2 * (1 + 5) / 2**5
    assert row["low"] <= 0.3 <= row["high"]
    assert list(found["p_holm"]) == pytest.approx([0.75, 0.75, 0.1875])  # of 0.375, 0.5, 0.0625
    (single,) = pairs(table, seed=0, labels=["c", "a"], kind="odd").to_dict("records")
    assert (single["first"], single["second"], single["n"]) == ("c", "a", 5)
    assert single["difference"] == pytest.approx(0.2)


def test_pairs_are_compared_at_equal_cost_and_not_at_full_retention() -> None:
    table = pd.concat(
        [
            answers("a", 1.0, [True] * 4),
            answers("b", 1.0, [True] * 4),
            answers("a", 0.5, [True] * 4),
            answers("b", 0.19, [True] * 3 + [False]).assign(asked_retention=0.5),
        ]
    )
    (single,) = pairs(table, seed=0).to_dict("records")
    assert (single["retention"], single["first"], single["second"]) == (0.5, "a", "b")
    assert single["p_holm"] == single["p"]


def test_a_pair_shares_questions_or_there_is_no_row() -> None:
    other = answers("b", 0.5, [True] * 4).assign(question_id=list("wxyz"))
    failed = answers("c", 0.5, [True, None])
    assert pairs(pd.concat([answers("a", 0.5, [True] * 4), other, failed]), seed=0).empty


def test_several_seeds_are_one_row_with_their_spread() -> None:
    runs = [
        answers("random", 0.5, right).assign(parameters=f"seed={seed}")
        for seed, right in enumerate(([True] * 8 + [False] * 2, [True] * 6 + [False] * 4))
    ]
    uniform = answers("uniform", 0.5, [True] * 4 + [False] * 6)
    table = summarise(pd.concat([*runs, uniform]), seed=0).set_index(["label", "kind"])
    row = table.loc[("random", OVERALL)]
    assert (row["n"], row["seeds"]) == (10, 2)
    assert row["accuracy"] == pytest.approx(0.7)
    assert row["seed_spread"] == pytest.approx(math.sqrt(0.02))  # 0.8 and 0.6 about 0.7
    assert row["vs_uniform"] == pytest.approx(0.3)
    assert math.isnan(row["vs_uniform_p"]), "McNemar's test is of single answers"
    assert row["accuracy_low"] < 0.7 < row["accuracy_high"]
    assert math.isnan(table.loc[("uniform", OVERALL), "seed_spread"])


def test_answers_of_several_seeds_are_not_independent() -> None:
    right = pd.Series([True] * 30 + [False] * 20, index=range(50))
    images = pd.Series(range(50), index=range(50))
    once = mean_score(right.astype(float), images, seed=0)
    assert once == wilson(30, 50)
    same = [pd.concat([part] * 8) for part in (right, images)]
    again = mean_score(*same, seed=0)
    assert again == pytest.approx(once, abs=0.02), "the same answers again tell nothing new"
    certain = pd.Series([True] * 20, index=[0, 1] * 10)
    assert mean_score(certain.astype(float), images, seed=0) == wilson(2, 2)
    assert mean_score((~certain).astype(float), images, seed=0) == wilson(0, 2)


def test_easy_and_hard_questions_and_divergence() -> None:
    cell = answers("a", 0.5, [True, True, True, False, False, True, False, True, True, True])
    cell = cell.assign(
        easy=pd.array([True] * 4 + [False] * 5 + [None], dtype="boolean"),
        kl=[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
    )
    row = summarise(cell, seed=0).iloc[0]
    assert (row["easy_n"], row["hard_n"]) == (4, 5)
    assert (row["easy_accuracy"], row["hard_accuracy"]) == (0.75, 0.6)
    assert (row["hard_accuracy_low"], row["hard_accuracy_high"]) == pytest.approx(wilson(3, 5))
    assert row["kl"] == pytest.approx(0.45)
    assert row["kl_low"] < 0.45 < row["kl_high"]


def test_swapping_a_pair_negates_its_difference() -> None:
    a, b = answers("a", 0.5, [True] * 7 + [False] * 3), answers("b", 0.5, [False] * 5 + [True] * 5)
    one, other = compared(a, b, seed=0), compared(b, a, seed=0)
    assert one["difference"] == pytest.approx(-other["difference"])
    assert (one["low"], one["p"]) == (pytest.approx(-other["high"]), other["p"])
    assert one["only_first"] == other["only_second"] == 5
