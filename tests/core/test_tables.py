"""Tables fit the terminal: nothing is broken, and what is left out is named."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tokenprune.console import new_table
from tokenprune.tables import FittedTable, fitted

CELLS = {
    "keep": "100 %",
    "method": "holitom-inner",
    "accuracy": "100.0 (99.2–100.0)",
    "same": "100.0",
    "tokens": "1234.5",
    "of all": "100 %",
}
VALUES = {"keep": None, "method": None, "accuracy": None, "same": 1, "tokens": 3, "of all": 2}


def rendered(table: FittedTable, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(table)
    return [line.rstrip() for line in console.export_text().splitlines()]


def filled(**options: bool) -> FittedTable:
    table = new_table(title="All", caption="Same: as before.", **options)
    for name, value in VALUES.items():
        table.add_column(name, justify="right", value=value)
    table.add_row(*CELLS.values())
    return table


@pytest.mark.parametrize(
    ("width", "left_out"),
    # By hand: columns of 5, 13, 18, 5, 6 and 6 characters, each followed by two spaces but the last
    # by one: 53 + 11 = 64 for all; 57 without "same"; 49 without "of all"; 41 without "tokens".
    [
        (80, []), (64, []), (63, ["same"]), (57, ["same"]), (56, ["same", "of all"]),
        (49, ["same", "of all"]), (48, ["same", "tokens", "of all"]),
    ],
)  # fmt: skip
def test_the_least_valuable_columns_are_left_out_and_named(width: int, left_out: list[str]) -> None:
    lines = rendered(filled(), width)
    assert max(map(len, lines)) <= width
    row = next(line for line in lines if "holitom-inner" in line)
    shown = [cell for name, cell in CELLS.items() if name not in left_out]
    assert row.split() == " ".join(shown).split()
    said = " ".join(" ".join(lines).split())
    named = f"Same: as before. Columns left out at this width: {', '.join(left_out)}."
    assert (named in said) == bool(left_out)
    assert ("left out" in said) == bool(left_out)


def test_columns_that_do_not_fit_can_follow_in_further_tables() -> None:
    lines = rendered(filled(continued=True), 50)
    rows = [line.split() for line in lines if "holitom-inner" in line]
    numbers = [cell for row in rows for cell in row[3 if row[1] == "%" else 1 :]]
    text = " ".join(numbers)
    assert all(cell in text for cell in list(CELLS.values())[2:])
    assert "left out" not in " ".join(lines)
    assert max(map(len, lines)) <= 50


def test_text_wraps_between_words_and_names_do_not() -> None:
    table = new_table("method")
    table.add_column("paper", prose=True)
    table.add_column("signals", prose=True, value=1)
    table.add_row("spatial-pool", "Average pooling (baseline)", "cls_attention")
    for width in range(28, 80):
        lines = rendered(table, width)
        words = " ".join(lines).split()
        assert max(map(len, lines)) <= width
        assert {"spatial-pool", "Average", "pooling", "(baseline)"} <= set(words), width
        assert ("cls_attention" in words) == (width >= 40), width  # 12 + 10 + 13, and 5 of space


def test_a_name_wider_than_the_terminal_is_folded_not_cut() -> None:
    table = new_table("method", "accuracy")
    table.add_row("my_package.my_module:MyMethodWithAName", "95.0")
    lines = rendered(table, 30)
    assert max(map(len, lines)) <= 30
    name = "".join(line.replace("95.0", "").strip() for line in lines[2:])
    assert name == "my_package.my_module:MyMethodWithAName"


def test_the_widest_columns_shrink_first() -> None:
    assert fitted([(3, 10), (4, 20), (5, 5)], 35) == [10, 20, 5]
    assert fitted([(3, 10), (4, 20), (5, 5)], 25) == [10, 10, 5]
    assert fitted([(3, 10), (15, 20), (5, 5)], 24) == [4, 15, 5]
