"""CSV files are safe in a spreadsheet and are read back unchanged."""

import csv
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tokenprune.experiments.common.csv_files import read_csv, write_csv

ODD = ["NA", "None", "nan", "null", "N/A", "", "1", "-5", "-5.5e3", "plain", "'quoted", "a,b"]
FORMULAS = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "＝1", "'=1", "-"]


def written(table: pd.DataFrame, path: Path) -> list[list[str]]:
    write_csv(table, path)
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("dtype", ["object", "str", "category"])
def test_formulas_are_written_as_text_and_read_back(tmp_path: Path, dtype: Any) -> None:
    path = tmp_path / "a.csv"
    names = [*FORMULAS, *filter(None, ODD)]
    table = pd.DataFrame({"kind": pd.Series(names, dtype=dtype), "=n": -1.5})
    (head, *rows) = written(table, path)
    assert head == ["kind", "'=n"]
    assert [row[0] for row in rows] == [f"'{one}" for one in FORMULAS] + names[len(FORMULAS) :]
    assert {row[1] for row in rows} == {"-1.5"}, "numbers stay numbers"
    back = read_csv(path)
    assert back["kind"].tolist() == names
    assert back["=n"].tolist() == [-1.5] * len(names)
    assert list(table.columns) == ["kind", "=n"], "what was given is as it was"


def test_only_empty_cells_are_missing(tmp_path: Path) -> None:
    table = pd.DataFrame({"kind": ["NA", "nan", "x"], "value": [1.0, None, 2.0]})
    write_csv(table, tmp_path / "a.csv")
    back = read_csv(tmp_path / "a.csv")
    assert back["kind"].tolist() == ["NA", "nan", "x"]
    assert back["value"].isna().tolist() == [False, True, False]
