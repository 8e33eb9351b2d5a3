"""``--help`` and completion in the shell."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from tokenprune.cli import app


def help_of(*command: str, width: int = 80) -> str:
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": str(width)})
    assert result.exit_code == 0
    return result.output


@pytest.mark.parametrize("width", [60, 80])
def test_help_lists_the_commands_in_the_order_of_use_in_whole_sentences(width: int) -> None:
    text = help_of(width=width).partition("Commands:")[2]
    names = re.findall(r"^  (\S+)", text, re.MULTILINE)
    assert names[:5] == ["list", "compare", "pairs", "table", "report"]
    assert names.index("audit") > names.index("efficiency") > names.index("masks")
    assert "..." not in text
    sentences = re.split(r"^  \S+ +", text, flags=re.MULTILINE)[1:]
    assert all(sentence.rstrip().endswith(".") for sentence in sentences)


def test_options_come_in_the_order_of_use() -> None:
    options = re.findall(r"^  (?:-\w, )?(--[\w-]+)", help_of("compare"), re.MULTILINE)
    assert options[:5] == ["--model", "--methods", "--retention", "--data", "--questions"]
    assert options.index("--match") < options.index("--out") < options.index("--device")
    assert options[-3:] == ["--plugin", "--trust-remote-code", "--help"]


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("compare -m fas", ["fastervlm", "fastv"]),
        ("compare -m uniform globalc", ["globalcom2"]),
        ("compare -m uniform --model testbed-n", ["testbed-next"]),
        ("efficiency --config llava-v1.6-3", ["llava-v1.6-34b"]),
        ("compl", ["complementarity"]),
    ],
)
def test_completion(typed: str, offered: list[str]) -> None:
    words = f"tokenprune {typed}"
    asked = {
        "_TOKENPRUNE_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    code = (
        "import sys\nfrom tokenprune.cli import app\n"
        "try:\n    app(prog_name='tokenprune')\n"
        "finally:\n    print('torch' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | asked, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.split() == offered
    assert done.stderr.strip() == "False", "PyTorch would make it slow"
