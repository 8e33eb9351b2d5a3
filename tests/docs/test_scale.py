"""The recipes of the page about clusters can be read, and their commands be given."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from typing import Any

import pytest
import typer
import yaml
from places import ROOT

from tokenprune.cli import app

PAGE = ROOT / "docs" / "scale.md"

pytestmark = pytest.mark.skipif(
    not PAGE.exists(), reason="the documentation is not part of the package"
)


def fences(*languages: str) -> list[str]:
    found = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return [code for language, code in found if language in languages]


def recipes() -> tuple[str, dict[str, Any]]:
    """The script for Slurm, and the manifest for Kubernetes."""
    (script,) = (code for code in fences("sh") if code.startswith("#!"))
    (manifest,) = map(yaml.safe_load, fences("yaml"))
    return script, manifest


def test_commands_can_be_given() -> None:
    script, manifest = recipes()
    lines = "\n".join([script, *fences("console")]).replace("\\\n", " ")
    lines += manifest["spec"]["entrypoint"]
    commands = re.findall(r"tokenprune (compare .*)", lines)
    assert len(commands) == 3
    group: Any = typer.main.get_command(app)
    for command in commands:
        name, *words = shlex.split(command)
        context = group.get_command(None, name).make_context(name, words)
        assert context.params["ray"] in ("local", "auto", "$address")
        assert context.params["out"]


def test_recipes_can_be_read() -> None:
    script, manifest = recipes()
    if shutil.which("bash"):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    cluster = manifest["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        mounted = {mount["name"] for one in pod["containers"] for mount in one["volumeMounts"]}
        assert mounted <= {volume["name"] for volume in pod["volumes"]}
