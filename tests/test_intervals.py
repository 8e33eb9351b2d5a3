"""Intervals and tests against figures worked out by hand."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenprune.experiments.intervals import (
    _COSTS,
    OVERALL,
    mcnemar,
    paired_bootstrap,
    summarise,
    wilson,
)


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
    difference = np.repeat(per_image, 5)  # five questions that stand and fall together
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
            **{name: float(index) for index, name in enumerate(_COSTS)},
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
    assert other["layer_average"] == _COSTS.index("layer_average")
    assert table.loc[("other", "odd"), "n"] == 5
    assert table.loc[("other", "odd"), "vs_uniform"] == pytest.approx(0.4)


def test_a_failed_cell_has_no_figures_and_is_nobodys_reference() -> None:
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


def test_an_unfinished_cell_is_compared_on_what_both_answered() -> None:
    part = answers("uniform", 0.5, [True, False, True, True])
    table = summarise(
        pd.concat([answers("uncompressed", 1.0, [True] * 3 + [False] * 7), part]), seed=0
    ).set_index(["label", "kind"])
    row = table.loc[("uniform", OVERALL)]
    assert (row["n"], row["accuracy"], row["vs_uncompressed"]) == (4, 0.75, 0.0)


def test_one_kind_is_not_shown_twice() -> None:
    single = answers("uncompressed", 1.0, [True] * 4).assign(kind="other")
    assert list(summarise(single, seed=0)["kind"]) == [OVERALL]
