"""Anonymous output names neither the user nor the machine."""

from __future__ import annotations

import getpass
import socket
from pathlib import Path

import pytest

from tokenprune.experiments.report.anonymous import anonymous


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/jane/data/my.jsonl", "my.jsonl"),
        ("/home/Jane Doe/my data.jsonl", "my data.jsonl"),
        ("--data=/home/jane/my data.jsonl", "--data=my data.jsonl"),
        ('File "/home/jane/venv/lib/x.py", line 3, in f', 'File "x.py", line 3, in f'),
        ("cannot read '/mnt/Jane Doe/a b.png' now", "cannot read 'a b.png' now"),
        ("see /data/x/y.json; then /etc/z/w.", "see y.json; then w."),
        (r"C:\Users\jane\my.jsonl", "my.jsonl"),
        (r"at C:\Users\jane\x.py", "at x.py"),
        ("file:///data/jane/x.png", "x.png"),
        ("/home/jane/", "user"),
        ("from jane's laptop", "from user's laptop"),
        # Other texts than absolute paths stay.
        (
            "uniform and/or fastv, 3 / 4, runs/one/a.png",
            "uniform and/or fastv, 3 / 4, runs/one/a.png",
        ),
        ("https://arxiv.org/abs/2403.06764", "https://arxiv.org/abs/2403.06764"),
        ("janet ran it", "janet ran it"),
    ],
)
def test_paths_and_names_are_replaced(text: str, expected: str) -> None:
    told = anonymous({"text": text, "elsewhere": ["/home/jane/x"]})
    assert told == {"text": expected, "elsewhere": ["x"]}


def test_the_names_of_this_machine_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(getpass, "getuser", lambda: "mrs.x")
    monkeypatch.setattr(socket, "gethostname", lambda: "alpha.lab.example")
    monkeypatch.setattr(Path, "home", lambda: Path("/srv/people/xavier"))
    told = anonymous(
        ["mrs.x@alpha.lab.example", "alpha is down", "xavier", {"alpha": 3, "b": None}]
    )
    assert told == ["user@host", "host is down", "user", {"alpha": 3, "b": None}]
