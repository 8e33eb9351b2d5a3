"""Outcomes in a notebook."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tokenprune.errors import UserError
from tokenprune.experiments.common.outcome import Outcome


def test_a_notebook_shows_the_figures_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    Image.new("RGB", (3000, 1000), "red").save(tmp_path / "plots" / "accuracy.png")
    Image.new("RGB", (20, 10), "blue").save(tmp_path / "masks.png")
    outcome = Outcome(tmp_path)
    shown = outcome.figure("accuracy", width=600)
    assert shown.size == (600, 200)
    assert shown.convert("RGB").getpixel((9, 9)) == (255, 0, 0)
    assert outcome.figure().size == (900, 300), "the first by name"
    assert outcome.figure("masks").size == (20, 10), "none is enlarged"
    with pytest.raises(UserError, match=r"no figure is called 'acuracy'. Did you mean 'accuracy'"):
        outcome.figure("acuracy")
    with pytest.raises(UserError, match="has no figure"):
        Outcome(tmp_path / "empty").figure()
