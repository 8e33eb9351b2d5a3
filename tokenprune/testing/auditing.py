"""Runs all checks on one method, and sorts out what they find."""

from __future__ import annotations

import inspect
import os
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from tokenprune.compressor import Compressor
from tokenprune.errors import RetentionWarning
from tokenprune.progress import ProgressCallback, silent
from tokenprune.testing import runner
from tokenprune.testing.asserting import Check
from tokenprune.testing.host import Host

__all__ = ["Finding", "audit"]


@dataclass(eq=False)
class Finding:
    """The outcome of one check, or of all checks that end in the same exception.

    Attributes:
        about: What the check means; or a counter-example; or an exception, with file and line.
        failed: Whether the checks fail.
        checks: Their names in words.
    """

    about: str
    failed: bool
    checks: list[str] = field(default_factory=list)


def audit(
    compressor: Compressor, where: Sequence[Host], progress: ProgressCallback = silent
) -> list[Finding]:
    """Run all checks.

    Args:
        compressor: The method.
        where: The tiny models to check it in.
        progress: Called before every check.

    Returns:
        The findings in the order of the checks.  An exception of the method is reported once, at
        the first check that it ends.
    """
    findings: list[Finding] = []
    raised: dict[tuple[str, str, int], Finding] = {}
    files = _files(compressor)
    for index, check in enumerate(runner.CHECKS):
        name = check.__name__.removeprefix("check_").replace("_", " ")
        failed = sum(len(one.checks) for one in findings if one.failed)
        progress(index, len(runner.CHECKS), f"{name}, {failed} failed")
        error = _error_of(check, compressor, where)
        if error is None:
            finding = Finding((check.__doc__ or "").strip().splitlines()[0], failed=False)
        else:
            file, line = _place(error, files)
            if isinstance(error, AssertionError) and file not in files:
                finding = Finding(str(error) or "the check failed", failed=True)
            else:
                kind = type(error).__name__
                said = f"{kind}: {error} ({_shown(file)}, line {line})"
                finding = raised.setdefault((kind, file, line), Finding(said, failed=True))
        finding.checks.append(name)
        if finding not in findings:
            findings.append(finding)
    return findings


def _error_of(check: Check, compressor: Compressor, where: Sequence[Host]) -> Exception | None:
    """What one check raises."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RetentionWarning)
            runner.run(check, compressor, where)
    except Exception as error:
        return error
    return None


def _files(compressor: Compressor) -> set[str]:
    """The files that define the method, without those of the core's base classes."""
    classes = {cls for part in compressor.parts() for cls in type(part).__mro__}
    files = set()
    for cls in classes:
        core = cls.__module__.startswith("tokenprune.")
        if issubclass(cls, Compressor) and (not core or ".strategies." in cls.__module__):
            with suppress(OSError, TypeError):  # a class of a REPL
                files.add(inspect.getfile(cls))
    return files


def _shown(file: str) -> str:
    """``file``, relative to the working directory if it is below."""
    below = os.path.relpath(file)
    return file if below.startswith("..") else below


def _place(error: BaseException, files: set[str]) -> tuple[str, int]:
    """File and line where ``error`` was raised: the last in ``files``, or else the last of all."""
    while isinstance(error, AssertionError) and isinstance(error.__cause__, AssertionError):
        error = error.__cause__  # `runner.run` adds the name of the model
    frames = traceback.extract_tb(error.__traceback__)
    mine = [frame for frame in frames if frame.filename in files]
    last = (mine or frames)[-1]
    return last.filename, last.lineno or 0
