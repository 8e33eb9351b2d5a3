"""Methods at equal cost: what each may keep to cost as much as `uniform` at a retention."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import get_args

import pandas as pd
import torch

import tokenprune as tp
from tokenprune.adapter import Adapter
from tokenprune.compressor import Compressor
from tokenprune.cost.ledger import Ledger
from tokenprune.errors import RetentionWarning, UserError
from tokenprune.experiments.common.bench import Bench
from tokenprune.experiments.common.cells import Cell, Failure, Matched
from tokenprune.experiments.common.conversion import MEASURES, WORDS, Measure, solve
from tokenprune.experiments.common.failing import tried
from tokenprune.experiments.common.prompt import Prompt
from tokenprune.experiments.common.questions import Question
from tokenprune.experiments.common.setting import Kind
from tokenprune.layout import TokenLayout
from tokenprune.progress import Report
from tokenprune.spec import says_retention

__all__ = [
    "matched_cells",
    "realised",
    "representative",
]


_LOOKED_AT = 200  # questions at most, to find one of median length


_COSTS: dict[str, str] = {"tokens": "layer_average", "flops": "flops"}  # columns of answers


_NEAR = 0.01  # share of a cost that is as good as met


def representative(adapter: Adapter, questions: Sequence[Question]) -> Prompt:
    """The question with the median number of visual tokens, as the model sees its prompt.

    Of very many questions evenly spaced ones are looked at.
    """
    return _median(adapter, questions)[1]


def _median(adapter: Adapter, questions: Sequence[Question]) -> tuple[Question, Prompt]:
    step = -(-len(questions) // _LOOKED_AT)
    seen = [(item, tried(partial(_prompt, adapter, item))) for item in questions[::step]]
    # A question that cannot be asked fails by itself when it is asked.
    prompts = [(item, found) for item, found in seen if not isinstance(found, Failure)]
    if not prompts:
        why = next(found.error for _, found in seen if isinstance(found, Failure))
        raise UserError(f"no question can be looked at to match costs: {why}")
    ordered = sorted(prompts, key=lambda pair: pair[1].visual)
    return ordered[len(ordered) // 2]


def _prompt(adapter: Adapter, item: Question) -> Prompt:
    video = item.modality == "video"
    layouts: tuple[TokenLayout, ...]
    if video:
        layouts = (adapter.video_layout(len(item.images)),)  # type: ignore[attr-defined]
        size = None
    else:
        sizes = [picture.open().size[::-1] for picture in item.images]
        together = len(sizes) > 1
        layouts = tuple(adapter.layout(one, same_prompt=together) for one in sizes)
        size = None if together else sizes[0]
    text = adapter.prompt(item.question, 0 if video else len(layouts), int(video))
    ids = adapter.processor.tokenizer(text)["input_ids"]
    marks = [index for index, each in enumerate(ids) if each in adapter.placeholders.values()]
    return Prompt(
        adapter,
        layouts,
        text=len(ids) - len(marks),
        asking=len(ids) - 1 - marks[-1] if marks else None,
        size=adapter.model.dtype.itemsize,
        image_size=size,
    )


def matched_cells(
    adapter: Adapter,
    questions: Sequence[Question],
    specs: Iterable[str],
    retention: Iterable[float],
    kind: Kind,
    *,
    optional: Iterable[str] = (),
    report: Report = lambda *_: None,
) -> tuple[list[Cell], dict[str, str]]:
    """The uncompressed model, and every method at retentions where it costs what `uniform` does.

    Costs are forecasts on the `representative` prompt, or, of methods whose counts depend on the
    content, those of running them on it.

    Args:
        adapter: Of the model, with weights unless all costs are to be forecasts.
        questions: Where the `representative` prompt comes from.
        specs: Methods; those that say what they keep are refused.
        retention: Of `uniform`, the reference; it is added if it is not among the methods.
        kind: ``tokens`` (visual ones a layer on average), ``flops`` (of the prefill, selection
            included) or ``prefill-ms`` (measured here: choice and prefill of one prompt).
        optional: Specs that may be left out where they cannot cost so little.
        report: Told what is being done.

    Returns:
        The cells, and why some of ``optional`` are not among them.

    Raises:
        UserError: A method cannot be brought to the cost.
    """
    ratios = sorted(set(retention), reverse=True)
    methods = [tp.create("uniform", retention=0.5)]
    for spec in specs:
        method = _unsettled(spec)
        methods += [method] if method.label != methods[0].label else []
    may_fail = {_unsettled(spec).label for spec in optional}
    question, prompt = _median(adapter, questions)
    bench = Bench(adapter, prompt) if kind == "prefill-ms" else None
    real: dict[Measure, Callable[[Compressor], float]] = {
        measure: cache(partial(_real_cost, adapter, question, measure))
        for measure in get_args(Measure)
    }
    cells, left_out = [Cell()], {}
    for index, method in enumerate(methods):
        report(index, len(methods), f"matching {method.label}")
        price = bench.price(method) if bench is not None else None
        for ratio in ratios:
            if index == 0:
                reference = replace(method, retention=ratio)
                cost = price(reference) if price else _cost(prompt, reference, kind)
                cells.append(Cell(reference, matched=Matched(kind, ratio, cost, cost)))
                continue
            target = next(c.matched.target for c in cells if c.matched and c.matched.asked == ratio)
            if ratio == 1:  # every method is the uncompressed model then
                cells.append(
                    Cell(replace(method, retention=1.0), matched=Matched(kind, 1.0, target, target))
                )
                continue
            try:
                if price:
                    what = "ms of choice and prefill"
                    found = solve(prompt, method, target, price, what=what)
                else:
                    measure: Measure = "tokens" if kind == "tokens" else "flops"
                    found = solve(prompt, method, target, measure)
                    if not prompt.forecast(found.method).exact and adapter.device.type != "meta":
                        found = solve(prompt, method, target, real[measure], what=WORDS[measure])
            except UserError as error:
                sentence = f"uniform at {ratio:g} sets the cost, but {error}"
                if method.label not in may_fail:
                    raise UserError(
                        f"{sentence} Leave the method out, or ask for a larger retention."
                    ) from None
                left_out[f"{method.label} at the cost of uniform at {ratio:g}"] = str(error)
                continue
            cells.append(Cell(found.method, matched=Matched(kind, ratio, target, found.cost)))
    distinct = {repr(cell.compressor): cell for cell in cells}
    return list(distinct.values()), left_out


def realised(answers: pd.DataFrame) -> pd.DataFrame:
    """What matched methods cost on the questions that were asked, beside `uniform`.

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


def _cost(prompt: Prompt, method: Compressor, kind: Kind) -> float:
    ledger = prompt.forecast(method, draws=1).ledger
    if kind == "tokens":
        return ledger.layer_average
    return ledger.flops / ledger.uncompressed_flops


def _real_cost(adapter: Adapter, item: Question, measure: Measure, method: Compressor) -> float:
    """What ``method`` really costs on a question, where content decides how much it keeps."""
    shown = [picture.open() for picture in item.images]
    images, videos = (None, [[shown]]) if item.video else ([shown], None)
    inputs = adapter.prepare(images, [item.question], videos)

    def run() -> Ledger:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore", RetentionWarning)
            with tp.compress(adapter.model, method) as trace:
                adapter.model(**inputs, use_cache=True)
        return trace.ledger

    found = tried(run)
    if isinstance(found, Failure):
        raise UserError(f"{method.label} failed when its cost was looked up: {found.error}")
    return MEASURES[measure](found)


def _unsettled(spec: str) -> Compressor:
    """The method of ``spec``, whose retention is to be found."""
    if says_retention(spec):
        raise UserError(
            f"{spec!r} says itself what it keeps; with --match the retention is solved for, so "
            "give single methods without one."
        )
    return tp.parse(spec, retention=0.5)
