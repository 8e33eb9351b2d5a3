"""Methods side by side: every method at every retention ratio, on one model and the same questions.

The outer loop runs over batches of questions, the inner one over cells (a method at a retention
ratio).  So the vision encoder sees every image once, and after an interruption all cells have
answered the same questions.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from tokenprune.compatibility import check_compatible
from tokenprune.compressor import Compressor
from tokenprune.errors import UserError
from tokenprune.experiments.cluster.run import (
    Hardware,
    Pool,
    description,
    hardware,
    on_one_worker,
    workers,
)
from tokenprune.experiments.common.answers import answers_frame
from tokenprune.experiments.common.cells import Cell, CellRecord, Failure
from tokenprune.experiments.common.files import WriteError
from tokenprune.experiments.common.grid import ALL, cells, expanded
from tokenprune.experiments.common.journal import Journal, Sheet, Tally
from tokenprune.experiments.common.loading import options_of_answers
from tokenprune.experiments.common.outcome import Outcome
from tokenprune.experiments.common.provenance import (
    DECISIVE,
    ENGINE,
    Files,
    code_roots,
    digests,
    environment,
    functions_in,
    model_files,
    split_code,
)
from tokenprune.experiments.common.questions import Question, fingerprint
from tokenprune.experiments.common.references import references
from tokenprune.experiments.common.request import FIGURES, CompareRequest, FigureOptions
from tokenprune.experiments.common.run_folder import (
    BEFORE,
    UNCOMPRESSED,
    Growth,
    RunFolder,
    asked_for,
    folder_name,
    stored_path,
)
from tokenprune.experiments.common.setting import Setting, prepare, with_faults_noted
from tokenprune.experiments.common.summary import summarise
from tokenprune.experiments.common.times import TIMES, read_times, with_times
from tokenprune.experiments.compare import figures, loop
from tokenprune.experiments.compare.cut_short import warn_of_cut_answers
from tokenprune.experiments.compare.finished import FILES
from tokenprune.experiments.compare.growing import Earlier, check_known, portions
from tokenprune.experiments.compare.matching import matched_cells
from tokenprune.experiments.compare.measuring import measure
from tokenprune.experiments.compare.runner import ModelRunner
from tokenprune.experiments.compare.shards import enter_all, server
from tokenprune.experiments.compare.sharing import separate, together
from tokenprune.models import testbed
from tokenprune.pipeline import Pipeline
from tokenprune.progress import ProgressCallback, silent
from tokenprune.registry import strategies

__all__ = [
    "accuracy_so_far",
    "answer",
    "draw",
    "run",
]


def run(
    request: CompareRequest,
    progress: ProgressCallback = silent,
    *,
    name: str = "",
    columns: Sequence[Cell] | None = None,
    setting: Setting | None = None,
) -> Outcome:
    """Compare methods, or resume a comparison that was interrupted.

    Args:
        request: What to compare.
        progress: Called before every step.
        name: Of another experiment that runs its cells here; the folder is named after it.
        columns: The cells of that experiment, instead of methods and retention ratios.  The
            uncompressed model and the references are added.
        setting: The model and its questions, if they are loaded already.

    Raises:
        UserError: Bad input, before the model answers a question.
    """
    if request.cluster is not None and request.measure:
        raise UserError(
            "--measure times the model in this process; leave --ray out, or give --measure without "
            "--ray when the run is finished."
        )
    setting = setting or prepare(request, progress, keep_faulty=True, load=description)
    earlier = Earlier.read(None if name else request.out)
    if earlier is not None:
        setting = replace(setting, questions=earlier.questions(setting.questions))
    setting = replace(setting, questions=with_faults_noted(setting, request.max_new_tokens))
    skipped: dict[str, str] = {}
    if columns is None:
        columns, skipped = _columns(request, setting, progress)
    beside = [Cell(), *references({item.modality for item in setting.questions})]
    columns = [*beside, *(cell for cell in columns if cell not in beside)]
    work = _Work(setting, columns, earlier)
    if earlier is not None:
        work = replace(work, columns=earlier.columns(columns))
    for cell in work.cells:
        if cell.compressor:
            check_compatible(setting.pipe.adapter.facts, cell.compressor)
    if request.cluster is None:
        work = replace(work, there=hardware(setting.pipe))
        return _recorded(request, work, name, skipped, progress)
    serve = server(
        work.cells,
        max_new_tokens=request.max_new_tokens,
        batch_size=_batch_size(request),
        timeout=request.timeout_per_batch,
    )
    with workers(request, serve, progress) as (pool, there):
        return _recorded(request, replace(work, there=there, pool=pool), name, skipped, progress)


def _recorded(
    request: CompareRequest,
    work: "_Work",
    name: str,
    skipped: Mapping[str, str],
    progress: ProgressCallback,
) -> Outcome:
    """Fill the folder of the run, and record how that ended."""
    folder = _opened(request, work, name, skipped)
    try:
        outcome = _fill(folder, request, work, progress)
    except BaseException as error:
        with suppress(WriteError):  # reported by the first error
            folder.close("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
        raise
    failures = [{"cell": str(cell), **asdict(why)} for cell, why in outcome.failures.items()]
    folder.manifest["missing"] = {
        question: {str(cell): why.error for cell, why in cells_of.items()}
        for question, cells_of in outcome.missing.items()
    }
    folder.close(outcome.status, failures)
    return replace(outcome, skipped=skipped)


@dataclass(frozen=True)
class _Work:
    """What to answer: the questions of a setting, in every one of ``columns``.

    Attributes:
        setting: Model and questions.
        columns: The cells; of an earlier run, the record of one whose method is unknown here.
        earlier: The run that this adds to.
        there: Where the model runs.
        pool: The workers that have it; None if it runs here.
    """

    setting: Setting
    columns: Sequence[Cell | CellRecord]
    earlier: Earlier | None = None
    there: Hardware = field(default_factory=Hardware)
    pool: Pool[Any] | None = None

    @property
    def cells(self) -> list[Cell]:
        """The columns whose methods are known."""
        return [cell for cell in self.columns if isinstance(cell, Cell)]

    @property
    def pipe(self) -> Pipeline:
        return self.setting.pipe

    @property
    def questions(self) -> Sequence[Question]:
        return self.setting.questions


def _columns(
    request: CompareRequest, setting: Setting, progress: ProgressCallback
) -> tuple[list[Cell], dict[str, str]]:
    """The cells of the methods, and why methods of ``all`` are not among them."""
    methods, skipped = expanded(
        request.methods, partial(check_compatible, setting.pipe.adapter.facts)
    )
    if request.match is None:
        return cells(methods, request.retention, request.seeds), skipped
    questions = [item for item in setting.questions if not item.fault]
    asked = questions, methods, request.retention, request.match
    optional = set(methods) - set(request.methods)
    if request.cluster is None:
        found, left_out = matched_cells(setting.pipe, *asked, optional=optional, progress=progress)
    else:
        serve = partial(_matched, optional=optional)
        found, left_out = on_one_worker(request, serve, asked, progress)
    return found, skipped | left_out


def _matched(
    pipe: Pipeline, asked: tuple[Any, ...], *, optional: set[str]
) -> tuple[list[Cell], dict[str, str]]:
    """In a worker: the cells of equal cost."""
    return matched_cells(pipe, *asked, optional=optional)


def _opened(
    request: CompareRequest, work: _Work, name: str, skipped: Mapping[str, str]
) -> RunFolder:
    """The folder of the run, which holds nothing else."""
    earlier = work.earlier
    if earlier is not None:
        check_known(earlier.path, work.columns, work.questions)
    surroundings = environment()
    core: list[type | str] = [type(work.pipe.adapter), __name__]
    files, own, carried = _files(work, core)
    experiment = _experiment(request, work, surroundings["versions"], files)
    experiment |= {"name": name} if name else {}
    path = request.out or Path("runs") / folder_name(experiment)
    details = _details(request, work.there, path) | {"files": files} | surroundings
    details["own_code"] = {label: sorted(some) for label, some in own.items() if some} | carried
    details["functions"] = functions_in(files["code"])
    details["cells"] = [asdict(_record(cell)) for cell in work.columns]
    compressors = [cell.compressor for cell in work.cells if cell.compressor]
    details["finished"] = {
        "code": code_roots(compressors, core),
        "skipped": skipped,
        "registered": strategies.names() if ALL in request.methods else None,
    }
    if request.match is not None or name or carried:
        details["finished"] = None
    growth = None
    if earlier is not None:
        details["requests"] = earlier.requests(details["request"])
        growth = Growth(earlier.manifest["experiment"], earlier.changed(own))
    return RunFolder.open(path, experiment, details, growth)


def _files(
    work: _Work, core: Sequence[type | str]
) -> tuple[dict[str, Files], dict[str, Files], dict[str, list[str]]]:
    """Every file that answers depend on; label to the method's own; those of unknown methods."""
    methods: dict[str, list[Compressor]] = {}
    for cell in work.cells:
        if cell.compressor:
            methods.setdefault(cell.label, []).append(cell.compressor)
    code, own = split_code(methods, {*core, ENGINE})
    carried: dict[str, list[str]] = {}
    if work.earlier is not None:
        carried, old = work.earlier.carried(work.columns)
        code = old | code
    for some in own.values():
        code |= some
    return {**model_files(work.pipe.path), "code": dict(sorted(code.items()))}, own, carried


def _record(cell: Cell | CellRecord) -> CellRecord:
    return cell if isinstance(cell, CellRecord) else CellRecord.of(cell)


def answer(
    pipe: Pipeline,
    columns: Sequence[Cell],
    questions: Sequence[Question],
    journal: Journal,
    *,
    max_new_tokens: int,
    batch_size: int,
    shared: bool = True,
    timeout: float | None = None,
    progress: ProgressCallback = silent,
) -> None:
    """Add to ``journal`` every answer that it lacks.

    Args:
        pipe: Of the model.
        columns: The cells.
        questions: The questions.
        journal: The journal, which must be open.
        max_new_tokens: Maximum length of an answer.
        batch_size: Questions per batch.
        shared: Whether the shared work of cells is computed once.
        timeout: Time limit of one computation, in seconds.
        progress: Called before every step.
    """
    loop.run(
        ModelRunner(pipe, max_new_tokens),
        columns,
        questions,
        journal,
        batch_size=batch_size,
        plan=together if shared else separate,
        timeout=timeout,
        progress=progress,
    )


def accuracy_so_far(summary: pd.DataFrame, model: str) -> Figure:
    """The accuracy of a run that has drawn no figures yet; ``summary`` as in ``summary.csv``."""
    return figures.accuracy(summary, f"Accuracy of {model} so far")


def draw(
    folder: RunFolder, model: str, summary: pd.DataFrame, options: FigureOptions = FIGURES
) -> None:
    """Write the figures of a comparison to ``plots/`` of its folder."""
    figures.draw(folder, model, summary, options)


def _batch_size(request: CompareRequest) -> int:
    return request.batch_size or (50 if request.model in testbed.names() else 4)


def _answered(
    folder: RunFolder,
    request: CompareRequest,
    work: _Work,
    wanted: int,
    progress: ProgressCallback,
) -> tuple[Journal, int, bool]:
    """The journal after all questions were asked.

    Returns:
        The journal, the number of answers that it had before, and whether the user interrupted.
    """
    columns, questions = work.columns, work.questions
    grown = len(folder.manifest.get("requests", ())) > 1 or (folder.path / BEFORE).exists()

    def tell(done: int, _: int, doing: str) -> None:
        progress(done, wanted, doing)

    if work.pool is not None:
        return _answered_elsewhere(folder.journal, request, work, tell, grown=grown)
    interrupted = False
    with Journal(folder.journal) as journal:
        before = len(journal.answers)
        try:
            for cells_of, asked in portions(columns, questions, journal, grown=grown):
                answer(
                    work.pipe,
                    cells_of,
                    asked,
                    journal,
                    max_new_tokens=request.max_new_tokens,
                    batch_size=_batch_size(request),
                    timeout=request.timeout_per_batch,
                    progress=tell,
                )
            if request.measure:
                measure(work.pipe, work.cells, questions, folder.path, progress)
        except KeyboardInterrupt:
            interrupted = True
    if interrupted or not journal.whole:
        # Read from the file, as the interrupt may come at any point.
        journal = Journal(folder.journal)
    return journal, before, interrupted


def _answered_elsewhere(
    path: Path, request: CompareRequest, work: _Work, tell: ProgressCallback, *, grown: bool
) -> tuple[Journal, int, bool]:
    """As `_answered`, by the workers."""
    assert work.pool is not None
    known = Journal(path) if grown else Sheet((), {})
    some = list(portions(work.columns, work.questions, known, grown=grown))
    keys = dict.fromkeys(cell.key for cell in work.columns)
    interrupted = False
    with Tally(path, keys, [item.id for item in work.questions]) as tally:
        before = tally.done
        try:
            for cells_of, asked in some:
                size = _batch_size(request)
                enter_all(work.pool, cells_of, asked, tally, batch_size=size, progress=tell)
        except KeyboardInterrupt:
            interrupted = True
    return Journal(path), before, interrupted


def _fill(
    folder: RunFolder, request: CompareRequest, work: _Work, progress: ProgressCallback
) -> Outcome:
    """Compute missing answers, and write tables and plots of all answers."""
    columns, questions = work.columns, work.questions
    wanted = len({cell.key for cell in columns}) * len(questions)
    journal, before, interrupted = _answered(folder, request, work, wanted, progress)
    progress(len(journal.answers), wanted, "tables and plots")
    answers = answers_frame(request.model, columns, questions, journal)
    warn_of_cut_answers(journal, (cell.key for cell in columns), request.max_new_tokens)
    summary = with_times(summarise(answers, seed=request.seed), read_times(folder.path))
    folder.write_tables(answers, summary)
    if (
        not interrupted and "name" not in folder.manifest["experiment"]
    ):  # other experiments draw their own
        figures.draw(folder, request.model, summary, request.figures)
    failures: dict[Cell | CellRecord, Failure] = {
        c: journal.failures[c.key] for c in columns if c.key in journal.failures
    }
    if not interrupted:
        failures = dict(_lacking(columns, questions, journal)) | failures
    missing = _missing([cell for cell in columns if cell not in failures], questions, journal)
    done = "failed" if failures or missing else "complete"
    return Outcome(
        status="interrupted" if interrupted else done,
        folder=folder.path,
        answered=len(journal.answers),
        wanted=wanted,
        new=len(journal.answers) - before,
        tables={"summary": summary},
        files=(*FILES, TIMES) if (folder.path / TIMES).exists() else FILES,
        failures=failures,
        missing=missing,
    )


def _missing(
    columns: Sequence[Cell | CellRecord], questions: Sequence[Question], journal: Journal
) -> dict[str, dict[Cell | CellRecord, Failure]]:
    """Question id to the cells that failed on it alone, and why."""
    found: dict[str, dict[Cell | CellRecord, Failure]] = {}
    for item in questions:
        for cell in columns:
            if why := journal.missing.get((cell.key, item.id)):
                found.setdefault(item.id, {})[cell] = why
    return found


def _lacking(
    columns: Sequence[Cell | CellRecord], questions: Sequence[Question], journal: Journal
) -> Iterator[tuple[Cell | CellRecord, Failure]]:
    """Cells with missing answers but without a reported failure; they make the run incomplete."""
    for cell in columns:
        key = cell.key
        rows = {(key, item.id) for item in questions}
        missing = len(rows - journal.answers.keys() - journal.missing.keys())
        if missing:
            words = f"{missing} of {len(questions)} answers are not in the journal"
            yield cell, Failure(f"{words}; the same command tries them again.", "")


def _experiment(
    request: CompareRequest,
    work: _Work,
    versions: Mapping[str, str | None],
    files: Mapping[str, Files],
) -> dict[str, Any]:
    """Everything that the answers depend on; runs share a folder only if it is equal."""
    columns, questions, pipe = work.columns, work.questions, work.pipe
    methods = [cell for cell in columns if not cell.name and cell.method != UNCOMPRESSED]
    labels = [
        cell.compressor.label if isinstance(cell, Cell) and cell.compressor else cell.label
        for cell in methods
    ]
    return {
        "model": request.model,
        "methods": list(dict.fromkeys(labels)),
        "retention": list(dict.fromkeys(cell.retention for cell in methods)),
        "references": {cell.name: repr(cell.compressor) for cell in work.cells if cell.name},
        "questions": len(questions),
        "modality": sorted({item.modality for item in questions}),
        "data": fingerprint(questions),
        "seed": request.seed,
        "device": work.there.device,
        "dtype": work.there.dtype,
        "max_new_tokens": request.max_new_tokens,
        **options_of_answers(request),
        **({} if request.match is None else {"match": _match(columns)}),
        **digests(files),
        "revision": getattr(pipe.model.config, "_commit_hash", None),
        **{package: versions[package] for package in DECISIVE},
    }


def _match(columns: Sequence[Cell | CellRecord]) -> list[dict[str, Any]]:
    """The target cost of every solved retention ratio."""
    return [
        {"method": cell.label, "retention": cell.retention, **asdict(cell.matched)}
        for cell in columns
        if cell.matched is not None
    ]


def _details(request: CompareRequest, there: Hardware, folder: Path) -> dict[str, Any]:
    """Further entries of the manifest."""
    details = {**asked_for(request, folder), "device_name": there.name}
    if request.model not in testbed.names() and Path(request.model).is_dir():
        details["model_folder"] = stored_path(Path(request.model), folder)
    return details
