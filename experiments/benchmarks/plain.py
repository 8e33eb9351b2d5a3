"""Selections written as plain loops from the equations of the papers: slow, short references.

Each function goes through the tokens one by one, and computes in float64.  It shares no code with
the method of the same name; the rounding of budgets is that of the method's default options.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from tokenprune.layout import Kind
from tokenprune.signals import Signal
from tokenprune.tokens import VisualTokens

Loop = Callable[[VisualTokens, float], list[int]]


def uniform(tokens: VisualTokens, retention: float) -> list[int]:
    """Token ``floor((i + 0.5) n / T)`` of the ``n`` of every view, for ``i < T``."""
    views = _views(tokens)
    kept = []
    for view, count in zip(views, _shares(tokens, retention, math.floor), strict=True):
        kept += [view[(2 * i + 1) * len(view) // (2 * count)] for i in range(count)]
    return sorted(kept)


def fastv(tokens: VisualTokens, retention: float) -> list[int]:
    """The tokens with the largest attention of the last prompt token in layer 1 (2403.06764)."""
    row, patches = tokens[Signal("llm_attention", 1)].tolist(), _patches(tokens)
    return sorted(_largest(patches, row, round(_share(len(patches), retention))))


def globalcom2(tokens: VisualTokens, retention: float) -> list[int]:
    """The thumbnail's scores divide the budget between the crops (2501.05179, equations 2 to 6)."""
    layout, score = tokens.layout, tokens[Signal("saliency")].tolist()
    views, (height, width), (down, across) = _views(tokens), layout.view_shape, layout.grid
    thumbnail = [[score[row * width + column] for column in range(width)] for row in range(height)]
    richness = [0.0] * (down * across)
    for row in range(height):
        for column in range(width):
            cell = (
                min(row // (height // down), down - 1),
                min(column // (width // across), across - 1),
            )
            richness[cell[0] * across + cell[1]] += thumbnail[row][column]
    powers = [math.exp((one - max(richness)) / 10) for one in richness]
    sigma = [one / (sum(powers) + 1e-8) for one in powers]
    mean = sum(sigma) / len(sigma)
    kept = _largest(views[0], score, math.floor(_share(len(views[0]), retention)))
    for crop, view in enumerate(views[1:]):
        ratio = min(1.0, retention * (1 + sigma[crop] - mean))
        rows, columns = (layout.canvas_row.tolist(), layout.canvas_col.tolist())
        seen = [_bilinear(thumbnail, layout.canvas_shape, rows[at], columns[at]) for at in view]
        own = [score[at] for at in view]
        lengths = [math.hypot(*values) for values in (seen, own)]
        mixed = {
            at: 0.5 * one / lengths[0] + 0.5 * other / lengths[1]
            for at, one, other in zip(view, seen, own, strict=True)
        }
        kept += _largest(view, mixed, int(ratio * len(view)))
    return sorted(kept)


def divprune(tokens: VisualTokens, retention: float) -> list[int]:
    """Max-min diversity by cosine distance (2503.02175, algorithm 1)."""
    patches = _patches(tokens)
    unit = _unit(tokens.features[torch.tensor(patches)])
    nearest = []
    for index in range(len(patches)):
        row = (1 - unit @ unit[index]).tolist()
        nearest.append(min(value for other, value in enumerate(row) if other != index))
    chosen: set[int] = set()
    for _ in range(round(_share(len(patches), retention))):
        free = (index for index in range(len(patches)) if index not in chosen)
        best = max(free, key=nearest.__getitem__)
        chosen.add(best)
        row = (1 - unit @ unit[best]).tolist()
        first = len(chosen) == 1
        for index, value in enumerate(row):
            nearest[index] = value if first else min(nearest[index], value)
    return sorted(patches[index] for index in chosen)


def cdpruner(tokens: VisualTokens, retention: float) -> list[int]:
    """Greedy MAP of the conditional DPP of every view (2506.10967, equations 4 to 8)."""
    patches = _patches(tokens)
    words = _unit(tokens.of_text(Signal("clip_text")))
    joint = _unit(tokens[Signal("clip_patches")])
    related = {at: -sum((words @ joint[at]).tolist()) / len(words) for at in patches}
    low, high = min(related.values()), max(related.values())
    quality = {at: (value - low + 1e-6) / (high - low) for at, value in related.items()}
    unit = _unit(tokens.features)
    kept: set[int] = set()
    for view, count in zip(_views(tokens), _shares(tokens, retention, round), strict=True):
        gain = {at: quality[at] ** 2 for at in view}
        factor: dict[int, list[float]] = {at: [] for at in view}
        for _ in range(count):
            best = max((at for at in view if at not in kept), key=gain.__getitem__)
            kept.add(best)
            cosines = (unit[torch.tensor(view)] @ unit[best]).tolist()
            root = math.sqrt(gain[best])
            for at, cosine in zip(view, cosines, strict=True):
                if at in kept:
                    continue
                shared = sum(a * b for a, b in zip(factor[best], factor[at], strict=True))
                factor[at].append((quality[best] * cosine * quality[at] - shared) / root)
                gain[at] -= factor[at][-1] ** 2
    return sorted(kept)


def dart(tokens: VisualTokens, retention: float) -> list[int]:
    """Every pivot selects the tokens least similar to it (2502.11494, section 4)."""
    patches, key, state = _patches(tokens), Signal("llm_keys", 1), Signal("llm_states")
    norms = tokens[key].double().abs().sum(-1).tolist()
    words = tokens.of_text(key).double().abs().sum(-1).tolist()
    image = _largest(patches, norms, 4)
    text = _largest(range(len(words)), words, 4)
    states, asking = _unit(tokens[state]), _unit(tokens.of_text(state))
    pivots = [*(states[at] for at in image), *(asking[at] for at in text)]
    count = math.floor(_share(len(patches), retention))
    kept = image[:count]
    rest = count - len(kept)
    for turn, pivot in enumerate(pivots):
        share = rest // len(pivots) + (turn < rest % len(pivots))
        cosines = (states @ pivot).tolist()
        free = [at for at in patches if at not in kept]
        kept += _largest(free, [-value for value in cosines], share)
    return sorted(kept)


def visionzip(tokens: VisualTokens, retention: float) -> list[int]:
    """The most attended tokens of every view, and targets that the others merge into (2412.04467).

    The merged vectors are computed too, and projected.
    """
    attention = tokens[Signal("cls_attention", -2)].tolist()
    keys, vectors = _unit(tokens[Signal("keys", -2)]), tokens[Signal("unprojected")].double()
    kept: list[int] = []
    for view, count in zip(_views(tokens), _shares(tokens, retention, round), strict=True):
        contextual = round(count * 10 / 64)
        dominant = _largest(view, attention, count - contextual)
        rest = sorted(set(view) - set(dominant))
        kept += dominant
        if not contextual:
            continue
        step = max(1, len(rest) // contextual)
        targets = rest[: contextual * step : step]
        merged: list[list[Tensor]] = [[] for _ in targets]
        for at in rest:
            if at not in targets:
                alike = [float(keys[at] @ keys[target]) for target in targets]
                merged[alike.index(max(alike))].append(vectors[at])
        for target, others in zip(targets, merged, strict=True):
            mean = sum(others, torch.zeros_like(vectors[target])) / max(len(others), 1)
            tokens.project((vectors[target] + mean)[None])
        kept += targets
    return sorted(kept)


LOOPS: dict[str, Loop] = {
    "uniform": uniform,
    "fastv": fastv,
    "globalcom2": globalcom2,
    "divprune": divprune,
    "cdpruner": cdpruner,
    "dart": dart,
    "visionzip": visionzip,
}
"""Name of a method to its plain loop: indices of the kept patch tokens, sorted."""


def _patches(tokens: VisualTokens) -> list[int]:
    kinds = tokens.layout.kind.tolist()
    return [at for at, kind in enumerate(kinds) if kind != Kind.SEPARATOR]


def _views(tokens: VisualTokens) -> list[list[int]]:
    """The patch tokens of every view, in sequence order."""
    view = tokens.layout.view.tolist()
    found: list[list[int]] = [[] for _ in range(tokens.layout.views)]
    for at in _patches(tokens):
        found[view[at]].append(at)
    return found


def _share(size: int, retention: float) -> Fraction:
    """The exact ``R * size`` of the decimal number R."""
    return size * Fraction(str(retention))


def _shares(
    tokens: VisualTokens, retention: float, rounded: Callable[[Fraction], int]
) -> list[int]:
    """The rounded budget in proportion to the views; the largest remainders are served first."""
    sizes = [len(view) for view in _views(tokens)]
    total = rounded(_share(sum(sizes), retention))
    quotas = [Fraction(total * size, sum(sizes)) for size in sizes]
    counts = [math.floor(quota) for quota in quotas]
    for index in sorted(range(len(sizes)), key=lambda one: (counts[one] - quotas[one], one)):
        counts[index] += sum(counts) < total
    return counts


def _largest(
    places: Iterable[int], values: Sequence[float] | dict[int, float], count: int
) -> list[int]:
    """The ``count`` places with the largest values, the largest first; ties go to the earlier."""
    return sorted(places, key=lambda at: (-values[at], at))[:count]


def _unit(vectors: Tensor) -> Tensor:
    """(P, D) float64 vectors of unit length."""
    wide = vectors.double()
    unit: Tensor = wide / wide.norm(dim=-1, keepdim=True)
    return unit


def _bilinear(picture: list[list[float]], shape: tuple[int, int], row: int, column: int) -> float:
    """Value of ``picture`` stretched to ``shape`` in the centre of a cell."""
    sides = len(picture), len(picture[0])
    low, high, part = [], [], []
    for at, large, small in zip((row, column), shape, sides, strict=True):
        centre = max((at + 0.5) * small / large - 0.5, 0.0)
        low.append(int(centre))
        high.append(min(low[-1] + 1, small - 1))
        part.append(centre - low[-1])
    (top, left), (bottom, right), (down, across) = low, high, part
    upper = (1 - across) * picture[top][left] + across * picture[top][right]
    lower = (1 - across) * picture[bottom][left] + across * picture[bottom][right]
    return (1 - down) * upper + down * lower
