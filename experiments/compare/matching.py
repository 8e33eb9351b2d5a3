"""Methods at equal cost: the retention ratio at which each costs as much as `uniform`."""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial

import pandas as pd
import torch

import tokenprune as tp
from tokenprune.compressor import Compressor
from tokenprune.cost.ledger import Ledger
from tokenprune.errors import RetentionWarning, UserError
from tokenprune.experiments.common.bench import Bench
from tokenprune.experiments.common.cells import Cell, Failure, Matched
from tokenprune.experiments.common.conversion import MEASURES, WORDS, Measure, Solution, solve
from tokenprune.experiments.common.failing import tried
from tokenprune.experiments.common.prompt import Prompt
from tokenprune.experiments.common.questions import Question
from tokenprune.experiments.common.request import MatchedCost
from tokenprune.layout import TokenLayout
from tokenprune.pipeline import Pipeline
from tokenprune.progress import ProgressCallback, silent
from tokenprune.spec import has_retention

__all__ = [
    "matched_cells",
    "median_question",
    "realised",
    "representative",
]


_LOOKED_AT = 200  # maximum number of questions that are searched for the median length


_COSTS: dict[str, str] = {"tokens": "layer_average", "flops": "flops"}  # columns of answers


_NEAR = 0.01  # relative difference at which a cost counts as met


def representative(pipe: Pipeline, questions: Sequence[Question]) -> Prompt:
    """The prompt of the question with the median number of visual tokens.

    With very many questions, only evenly spaced ones are considered.
    """
    return _median(pipe, questions)[1]


def median_question(pipe: Pipeline, questions: Sequence[Question]) -> Question:
    """The question of the `representative` prompt."""
    return _median(pipe, questions)[0]


def _median(pipe: Pipeline, questions: Sequence[Question]) -> tuple[Question, Prompt]:
    step = -(-len(questions) // _LOOKED_AT)
    seen = [(item, tried(partial(_prompt, pipe, item))) for item in questions[::step]]
    # A question that cannot be asked is reported later.
    prompts = [(item, found) for item, found in seen if not isinstance(found, Failure)]
    if not prompts:
        why = next(found.error for _, found in seen if isinstance(found, Failure))
        raise UserError(f"no question can be read to match costs: {why}")
    ordered = sorted(prompts, key=lambda pair: pair[1].visual)
    return ordered[len(ordered) // 2]


def _prompt(pipe: Pipeline, item: Question) -> Prompt:
    video = item.modality == "video"
    layouts: tuple[TokenLayout, ...]
    if video:
        layouts = (pipe.adapter.video_layout(len(item.images)),)
        size = None
    else:
        sizes = [picture.open().size[::-1] for picture in item.images]
        together = len(sizes) > 1
        layouts = tuple(pipe.adapter.layout(one, same_prompt=together) for one in sizes)
        size = None if together else sizes[0]
    text = pipe.prompt(item.question, 0 if video else len(layouts), int(video))
    ids = pipe.processor.tokenizer(text)["input_ids"]
    marks = [
        index for index, each in enumerate(ids) if each in pipe.adapter.facts.placeholders.values()
    ]
    return Prompt(
        pipe.adapter,
        layouts,
        text=len(ids) - len(marks),
        asking=len(ids) - 1 - marks[-1] if marks else None,
        size=pipe.model.dtype.itemsize,
        image_size=size,
    )


def matched_cells(
    pipe: Pipeline,
    questions: Sequence[Question],
    specs: Iterable[str],
    retention: Iterable[float],
    kind: MatchedCost,
    *,
    optional: Iterable[str] = (),
    progress: ProgressCallback = silent,
) -> tuple[list[Cell], dict[str, str]]:
    """The uncompressed model, and every method at the ratios that cost as much as `uniform`.

    Costs are forecasts for the `representative` prompt; methods whose counts depend on the content
    are run on it.

    Args:
        pipe: Of the model, with weights unless all costs are to be forecasts.
        questions: Where the `representative` prompt comes from.
        specs: Methods; those with their own retention ratio are refused.
        retention: Of `uniform`, which is added if it is not among the methods.
        kind: ``tokens`` (layer average), ``flops`` (of the prefill, selection included) or
            ``prefill-ms`` (measured here: selection and prefill of one prompt).
        optional: Specs that are left out if they cannot cost so little; with ``prefill-ms`` all.
        progress: Called before every step.

    Returns:
        The cells, and why some methods are not among them.

    Raises:
        UserError: A method cannot be brought to the cost.
    """
    ratios = sorted(set(retention), reverse=True)
    uniform = tp.create("uniform", retention=0.5)
    methods = [one for spec in specs if (one := _without_retention(spec)).label != uniform.label]
    timed = kind == "prefill-ms"
    may_fail = {one.label for one in (methods if timed else map(_without_retention, optional))}
    costs = _Costs(pipe, *_median(pipe, questions), kind)
    total = 1 + len(methods)
    progress(0, total, f"matching {uniform.label}")
    targets = costs.of(uniform, ratios)
    cells, left_out = [Cell()], dict[str, str]()
    cells += [_matched(replace(uniform, retention=one), kind, one, targets[one]) for one in ratios]
    for index, method in enumerate(methods, start=1):
        progress(index, total, f"matching {method.label}")
        needed = method.label not in may_fail
        found, why = _solved_for(method, kind, costs, targets, needed=needed)
        cells += found
        left_out |= why
    distinct = {repr(cell.compressor): cell for cell in cells}
    return list(distinct.values()), left_out


def _solved_for(
    method: Compressor,
    kind: MatchedCost,
    costs: "_Costs",
    targets: Mapping[float, float],
    *,
    needed: bool,
) -> tuple[list[Cell], dict[str, str]]:
    """The cells of ``method`` that cost the targets, and why others cannot; see `matched_cells`."""
    solve_for = tried(partial(costs.solver, method))
    if isinstance(solve_for, Failure):  # the selection is timed, and it raised
        return [], {method.label: solve_for.error}
    cells, left_out = [], {}
    for ratio, target in targets.items():
        if ratio == 1:  # every method then is the uncompressed model
            cells.append(_matched(replace(method, retention=1.0), kind, 1.0, target))
            continue
        try:
            found = solve_for(target)
        except UserError as error:
            if needed:
                raise UserError(
                    f"uniform at {ratio:g} sets the cost, but {error} Leave the method out, or "
                    "choose a larger retention."
                ) from None
            left_out[f"{method.label} at the cost of uniform at {ratio:g}"] = str(error)
        else:
            cells.append(_matched(found.method, kind, ratio, target, found.cost))
    return cells, left_out


def _matched(
    method: Compressor, kind: MatchedCost, asked: float, target: float, cost: float | None = None
) -> Cell:
    return Cell(method, matched=Matched(kind, asked, target, target if cost is None else cost))


class _Costs:
    """The costs of methods on the `representative` prompt of a comparison."""

    def __init__(
        self, pipe: Pipeline, question: Question, prompt: Prompt, kind: MatchedCost
    ) -> None:
        self.prompt, self.kind = prompt, kind
        self._bench = Bench(prompt.adapter, prompt) if kind == "prefill-ms" else None
        measure: Measure = "tokens" if kind == "tokens" else "flops"
        self._measure = measure
        self._real = cache(partial(_real_cost, pipe, question, measure))

    def of(self, method: Compressor, ratios: Iterable[float]) -> dict[float, float]:
        """Retention ratio to the cost of ``method`` at it."""
        price: Callable[[Compressor], float] = partial(_cost, self.prompt, kind=self.kind)
        if self._bench is not None:
            price = self._bench.price(method)
        return {ratio: price(replace(method, retention=ratio)) for ratio in ratios}

    def solver(self, method: Compressor) -> Callable[[float], Solution]:
        """Finds the retention ratio at which ``method`` has a given cost."""
        if self._bench is not None:
            price = self._bench.price(method)
            return lambda target: solve(
                self.prompt, method, target, price, what="ms of selection and prefill"
            )
        return partial(self._solved, method)

    def _solved(self, method: Compressor, target: float) -> Solution:
        """By forecast; by running the method if its counts depend on the content."""
        found = solve(self.prompt, method, target, self._measure)
        exact = self.prompt.forecast(found.method).exact
        if exact or self.prompt.adapter.device.type == "meta":
            return found
        words = WORDS[self._measure]
        return solve(self.prompt, method, target, self._real, what=words)


def realised(answers: pd.DataFrame) -> pd.DataFrame:
    """The cost of matched methods on the questions that were asked, relative to `uniform`.

    Args:
        answers: As in ``answers.parquet``.

    Returns:
        One row per method and retention of `uniform`, most tokens first: ``label``, ``asked``,
        ``retention`` (solved for), ``match``, ``target`` and ``cost`` (on the representative
        prompt), ``coarse`` (whether they lie more than a token apart, or more than 1 % of a cost
        that is not tokens), ``ratio`` (mean over questions of the cost over that of `uniform`),
        ``least`` and ``most`` of it; missing for measured times, which were not measured again.
    """
    columns = ["label", "asked", "retention", "match", "target", "cost", "coarse"]
    columns += ["ratio", "least", "most"]
    if "match_cost" not in answers:
        return pd.DataFrame(columns=columns)
    done = answers[(answers["status"] == "ok") & answers["match"].notna()]
    rows = []
    for asked, group in sorted(done.groupby("asked_retention"), reverse=True):
        for label, cell in group[group["retention"] < 1].groupby("label", sort=False):
            kind, target, cost = cell[["match", "match_target", "match_cost"]].iloc[0]
            allowed = 1.0 if kind == "tokens" else _NEAR * target
            row = {"label": label, "asked": asked, "retention": cell["retention"].iloc[0]}
            row |= {"match": kind, "target": target, "cost": cost}
            row |= {"coarse": abs(cost - target) > allowed}
            if kind in _COSTS:
                both = [
                    one.groupby("question_id")[_COSTS[kind]].mean()
                    for one in (cell, group[group["label"] == "uniform"])
                ]
                ratio = (both[0] / both[1]).dropna().astype(float)
                row |= {"ratio": ratio.mean(), "least": ratio.min(), "most": ratio.max()}
            rows.append(row)
    return pd.DataFrame(rows, columns=columns)


def _cost(prompt: Prompt, method: Compressor, kind: MatchedCost) -> float:
    ledger = prompt.forecast(method, draws=1).ledger
    if kind == "tokens":
        return ledger.layer_average
    return ledger.flops / ledger.uncompressed_flops


def _real_cost(pipe: Pipeline, item: Question, measure: Measure, method: Compressor) -> float:
    """The cost of running ``method`` on a question, if the content decides how much it keeps."""
    shown = [picture.open() for picture in item.images]
    images, videos = (None, [[shown]]) if item.video else ([shown], None)
    inputs = pipe.prepare(images, [item.question], videos)

    def run() -> Ledger:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore", RetentionWarning)
            with tp.compress(pipe.model, method) as trace:
                pipe.model(**inputs, use_cache=True)
        return trace.ledger

    found = tried(run)
    if isinstance(found, Failure):
        raise UserError(f"{method.label} failed when its cost was looked up: {found.error}")
    return MEASURES[measure](found)


def _without_retention(spec: str) -> Compressor:
    """The method of ``spec``, whose retention ratio is to be found."""
    if has_retention(spec):
        raise UserError(
            f"{spec!r} has its own retention; with --match the retention is solved for, so give "
            "single methods without one."
        )
    return tp.parse(spec, retention=0.5)
