"""Every figure of every experiment, drawn from made-up results."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from PIL import Image

import tokenprune as tp
from tokenprune.experiments.ablation import figures as ablation
from tokenprune.experiments.common.patch_boxes import ViewSize
from tokenprune.experiments.common.request import FigureOptions
from tokenprune.experiments.common.summary import OVERALL
from tokenprune.experiments.compare import figures as compare
from tokenprune.experiments.complementarity import figures as complementarity
from tokenprune.experiments.crop_importance import figures as crop_importance
from tokenprune.experiments.efficiency import figures as efficiency
from tokenprune.experiments.masks import figures as masks
from tokenprune.experiments.masks.look import SALIENCY, Mask, MaskedPrompt, Medium
from tokenprune.experiments.positional_bias import figures as positional_bias
from tokenprune.layout import TokenLayout
from tokenprune.synthetic import sample_tokens

MODEL = "llava-v1.6-vicuna-7b-hf"

LONG = "globalcom2:alpha=0.3,score=cls_attention,tau=5.0"

FEW = ("uniform", "globalcom2@0.5 + fastv@0.5", "fastv", LONG)

ALL = (*tp.list_methods(), LONG)

KINDS = ("existence", "colour", "count", "position", "digit")

Case = Callable[[FigureOptions], list[Figure]]


def summary(
    methods: tuple[str, ...] = FEW,
    retentions: tuple[float, ...] = (0.5, 0.25, 0.1),
    kinds: tuple[str, ...] = KINDS,
    match: str | None = None,
) -> pd.DataFrame:
    """As `summary.summarise` returns it; accuracies near 97 %, so that ticks are not whole."""
    rng = np.random.default_rng(0)
    rows = []
    for label in ("uncompressed", *methods):
        full = label == "uncompressed"
        for asked, kind in itertools.product((1.0,) if full else retentions, (OVERALL, *kinds)):
            kept = asked * (0.4 if match and label == "fastv" else 1)
            right = 0.98 if full else 0.975 - 0.04 * (1 - kept) * rng.random()
            rows.append(
                {
                    **{"method": label, "label": label, "retention": kept, "kind": kind},
                    **{"asked_retention": asked, "status": "ok", "n": 500, "accuracy": right},
                    **{"accuracy_low": right - 0.02, "accuracy_high": right + 0.01},
                    **{"flops": kept * (1 + 0.5 * rng.random()), "uncompressed_flops": 1.6},
                    "match": None if full else match,
                }
            )
    return pd.DataFrame(rows)


def comparison(**changes: object) -> Case:
    table = summary(**changes)  # type: ignore[arg-type]
    return lambda options: list(compare.drawn(table, MODEL, options).values())


def sweeps(names: tuple[str, ...], retentions: tuple[float, ...]) -> Case:
    """Sweeps of an option with numbers, of one with names, and of two options."""
    values = {
        "numbers": ("alpha", "", ("0", "0.25", "0.5", "1")),
        "names": ("normalisation", "", ("default", "cls_attention", "proportional")),
        "both": ("tau", "alpha", ("1", "10", "100")),
    }
    rows = [
        {"sweep": name, "method": LONG, "first": values[name][0], "second": values[name][1]}
        | {"first_value": one, "second_value": two, "label": name + one + two}
        | {"retention": ratio, "n": 200, "accuracy": 0.9 + 0.01 * place}
        for name in names
        for ratio in retentions
        for place, one in enumerate(values[name][2])
        for two in (values[name][2] if values[name][1] else ("",))
    ]
    table = pd.DataFrame(rows)
    overall = table.assign(kind=OVERALL, accuracy_low=0.88, accuracy_high=0.97)
    full = overall.head(1).assign(method="uncompressed", label="uncompressed", accuracy=0.98)
    everything = pd.concat([overall, full])
    return lambda options: [ablation.figure(table, everything, MODEL, options)]


def whole_views(kinds: tuple[str, ...]) -> Case:
    parts = pd.DataFrame(
        [
            {"kind": kind, "shown": shown, "n": 40, "relative": 0.9}
            | {"relative_low": 0.8, "relative_high": 1.0}
            for kind in (OVERALL, *kinds)
            for shown in ("crops only", "thumbnail only", "no image")
        ]
    )
    return lambda options: [complementarity.figure(parts, MODEL, options=options)]


def dropped_crops(groups: tuple[str, ...], *, located: bool) -> Case:
    drops = pd.DataFrame(
        [
            {"group": group, "dropped": which, "drop": 0.1, "low": -0.05, "high": 0.25}
            for group in groups
            for which in crop_importance.DROPPED
        ]
    )
    places = itertools.product(range(12), range(1, 5))
    crops = pd.DataFrame(
        [
            {"image_id": image, "crop": rank - 1, "rank": rank, "region": rank}
            | {"centred": 0.5 - 0.2 * rank + 0.01 * image}
            for image, rank in places
        ]
    )
    objects = pd.DataFrame({"rank": [1, 1, 2, 3, 4, 1], "crops": 4}) if located else pd.DataFrame()
    return lambda options: [
        crop_importance.figure(drops, crops, objects, MODEL, "saliency", options=options)
    ]


def costs(methods: tuple[str, ...], retentions: tuple[float, ...] = (0.5, 0.25, 0.1)) -> Case:
    cells = [(label, share) for label in methods for share in retentions]
    cells.insert(0, ("uncompressed", 1.0))
    shares = [
        {"method": label, "label": label, "retention": share, "flops_share": share}
        | {"kv_bytes": 1e9 * share}
        for label, share in cells
    ]
    layers = [
        {"label": label, "retention": share, "layer": layer}
        | {"visual_tokens": 2880 * (1 if layer < 2 else share)}
        for label, share in cells
        for layer in range(32)
    ]
    tables = pd.DataFrame(shares), pd.DataFrame(layers)
    return lambda options: [
        efficiency.cost_by_retention(tables[0], "What methods cost", "2880 tokens", options),
        efficiency.tokens_by_layer(tables[1], "Where tokens are processed", "no text", options),
    ]


def bias(methods: tuple[str, ...]) -> Case:
    rng = np.random.default_rng(0)
    conditions = ("normal", "reversed-crops", "flip-lr", "exchanged-crops", "all")
    grid = pd.DataFrame(
        [(view, row, col) for view in range(5) for row in range(4) for col in range(4)]
    )
    grid.columns = pd.Index(["view", "row", "col"])
    down, across = (grid["view"] - 1) // 2, (grid["view"] - 1) % 2
    grid["slot"] = grid["view"] - 1
    grid["y"] = (grid["row"] + 4 * down + 0.5) / 8
    grid["x"] = (grid["col"] + 4 * across + 0.5) / 8
    grid["token"] = grid.index
    grid["position"] = (grid.index + 0.5) / len(grid)
    same = {"retention": 0.25, "modality": "image", "slots": 4, "grid": "2x2", "score": np.nan}
    tokens = pd.concat(
        grid.assign(method=method, image=image, condition=condition, level=level, **same)
        for method in methods
        for image in range(3)
        for condition, level in (("normal", "normal"), ("reversed-crops", "selector"))
    )
    tokens["kept"] = rng.random(len(tokens)) < 0.25
    statistics = pd.DataFrame(
        [
            {"method": method, "condition": condition, "level": level, "equivariance": 0.5}
            | {"equivariance_low": 0.2, "equivariance_high": 0.9}
            for method in methods
            for condition in conditions
            for level in ("selector", "pipeline")
        ]
    ).assign(retention=0.25, modality="image")
    return lambda options: [
        figure for _, figure in positional_bias.figures(tokens, statistics, MODEL, options)
    ]


def kept(methods: tuple[str, ...], retentions: tuple[float, ...] = (0.25,)) -> Case:
    """Masks of made-up selections; the last figures if there are several pages."""
    layout = TokenLayout.anyres((2, 2), (4, 4), (0, 8, 0, 8))
    tokens = sample_tokens(frozenset({SALIENCY}), layout, seed=0)
    everything = layout.patches
    shown = [Mask("uncompressed", 1.0, (everything,), "seven")]
    for label, share in itertools.product(methods, retentions):
        keep = everything[torch.rand(len(everything), generator=torch.Generator()) < share]
        answer = "a long answer that goes on and on and on and on and on, until it is cut"
        shown.append(Mask(label, share, (keep,), answer, "before the LLM"))
    image = Image.linear_gradient("L").convert("RGB")
    seen = MaskedPrompt(
        MODEL, ViewSize(56, (56, 56), "stretch"), (Medium((image,), tokens),),
        tuple(shown), "Which digit is on the red triangle?", "seven", "logits of CLS attention",
    )  # fmt: skip
    return lambda options: [*masks.pages(seen, options)[-2:], masks.heat(seen, options)]


def cases() -> Iterator[tuple[str, Case]]:
    yield "compare, few methods", comparison()
    yield "compare, one method and retention", comparison(methods=("fastv",), retentions=(0.25,))
    yield "compare, three kinds, matched", comparison(kinds=KINDS[:3], match="flops")
    yield "compare, all methods", comparison(methods=ALL)
    yield (
        "compare, all methods matched",
        comparison(methods=ALL, retentions=(0.25,), match="prefill-ms"),
    )
    yield "ablation, all kinds of panels", sweeps(("numbers", "names", "both"), (0.5, 0.1))
    yield "ablation, one panel", sweeps(("names",), (0.25,))
    yield "complementarity", whole_views(KINDS)
    yield "complementarity, one kind", whole_views(())
    groups = (OVERALL, *KINDS, "object dropped", "object spared")
    yield "crop importance", dropped_crops(groups, located=True)
    yield "crop importance, nothing located", dropped_crops(groups[:1], located=False)
    yield "efficiency", costs(FEW)
    yield "efficiency, all methods", costs(ALL)
    for number in (1, 7):
        yield f"positional bias, {number} methods", bias((LONG, *ALL)[:number])
    yield "masks", kept(FEW[1:3])
    yield "masks, all methods", kept(ALL[:9])
