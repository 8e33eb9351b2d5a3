"""What methods cost on a model of which there may be nothing but a config.

Tokens, FLOPs and bytes are forecasts (`tokenprune.forecast`): the strategies' own code on made-up
tokens, the ledger's arithmetic.  Conventions are the ledger's.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

import tokenprune as tp
from tokenprune.compressor import Compressor
from tokenprune.errors import UserError
from tokenprune.experiments.csv_files import write_csv
from tokenprune.experiments.limits import check_number
from tokenprune.experiments.results import replace_file
from tokenprune.forecast import Forecast, forecast
from tokenprune.ledger import DecoderShape, Ledger
from tokenprune.models.adapter import Adapter
from tokenprune.models.configs import adapter_without_weights
from tokenprune.registry import strategies
from tokenprune.tokens import TokenLayout

__all__ = [
    "Prompt",
    "activation_bytes",
    "analytic_break_even",
    "asks",
    "break_even",
    "chosen",
    "costs",
    "equivalent",
    "expanded",
    "layers",
    "pays_from",
    "prompt_of",
    "read_size",
    "says_retention",
    "write",
]

ALL = "all"
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
DRAWS = 5  # of made-up content, the median of which is told
_SIZE = re.compile(r"([hw]?)([0-9]{1,6})([hw]?)\s*[x×,]\s*([hw]?)([0-9]{1,6})([hw]?)")
QUESTION = 32  # tokens that methods see of a question where no text is counted


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt on a model: all that its cost depends on.

    Attributes:
        adapter: Of the model, with or without weights.
        layouts: Of its images and videos.
        text: Its tokens that are not visual.
        asking: How many of them lie behind the images, or are to be seen there though nobody counts
            them; None for all.
        size: Bytes of a number.
        image_size: (height, width) of its image where one was given.
    """

    adapter: Adapter
    layouts: tuple[TokenLayout, ...]
    text: int = 0
    asking: int | None = None
    size: int = 2
    image_size: tuple[int, int] | None = None
    _told: dict[Any, Forecast] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def shape(self) -> DecoderShape:
        """Of the decoder."""
        return DecoderShape.of(self.adapter.language_model.config)

    @property
    def visual(self) -> int:
        """Visual tokens, separators included."""
        return sum(map(len, self.layouts))

    @property
    def patches(self) -> int:
        """Patch tokens."""
        return sum(len(layout.patches) for layout in self.layouts)

    @cached_property
    def weight_bytes(self) -> int:
        """Of the whole model, tower and projector included, ``size`` bytes a number."""
        counts: list[int] = [weight.numel() for weight in self.adapter.model.parameters()]
        return self.size * sum(counts)

    def forecast(self, method: Compressor | None, draws: int = DRAWS) -> Forecast:
        """What ``method`` costs on it; told again without computing it again."""
        if (method, draws) not in self._told:
            self._told[method, draws] = forecast(
                self.adapter,
                method,
                self.layouts,
                self.text,
                asking=self.asking,
                size=self.size,
                draws=draws,
            )
        return self._told[method, draws]

    def square(self, side: int) -> "Prompt":
        """The same with a single view of ``side`` x ``side`` patches and no separator."""
        layout = TokenLayout.single((side, side), newline=False)
        return Prompt(self.adapter, (layout,), self.text, self.asking, self.size)


def prompt_of(
    model: str,
    image_size: tuple[int, int] | None = None,
    *,
    patches: tuple[int, int] | None = None,
    text: int = 0,
    dtype: str = "bfloat16",
) -> Prompt:
    """One image in front of ``text`` tokens, on a model known by its config alone.

    Args:
        model: As for `models.configs.config_of`.
        image_size: (height, width) in pixels; the adapter's layout says how many tokens that is.
            None stands for a thumbnail and 2x2 whole crops **without separators**, which is how the
            efficiency tables of the field count: 2880 tokens on LLaVA-NeXT.
        patches: (rows, columns) of a single view without separators, in place of an image.
        text: Tokens of the prompt that are not visual; those tables count none.  Methods that look
            at the question then see one of `QUESTION` tokens that nobody counts.
        dtype: Of weights and KV cache.

    Raises:
        UserError: Unknown model or dtype, a size that is none, both an image and patches, or more
            tokens than the decoder knows positions.
    """
    if dtype not in SIZES:
        raise UserError(f"dtype must be one of {', '.join(SIZES)}, got {dtype!r}.")
    check_number("text_tokens", text)
    if image_size is not None and patches is not None:
        raise UserError("give --image-size or --patches, not both.")
    adapter = adapter_without_weights(model)
    if patches is not None:
        adapter.check_length(math.prod(patches), text)
        layout = TokenLayout.single(patches, newline=False)
    elif image_size is None:
        rows, cols = adapter.view_shape
        box = (0, 2 * rows, 0, 2 * cols)
        layout = TokenLayout.anyres((2, 2), adapter.view_shape, box, newlines=False)
    else:
        layout = adapter.layout(image_size)
    adapter.check_length(len(layout) + text)
    asking = None if text else QUESTION
    return Prompt(adapter, (layout,), text, asking, SIZES[dtype], image_size)


def asks(prompt: Prompt, method: Compressor) -> bool:
    """Whether what ``method`` keeps or costs depends on how long the question is."""
    told = [
        replace(prompt, asking=words).forecast(method, draws=1).ledger for words in (1, QUESTION)
    ]
    return told[0] != told[1]


def read_size(text: str) -> tuple[int, int]:
    """(height, width) of ``672x1008``, height first as in ``transformers``, or ``1008wx672h``.

    Raises:
        UserError: Not two positive numbers of at most six digits.

    >>> read_size("672x1008"), read_size("1008wx672h"), read_size("h672xw1008")
    ((672, 1008), (672, 1008), (672, 1008))
    """
    found = _SIZE.fullmatch(text.strip().lower())
    if found:
        marks = [found[1] + found[3], found[4] + found[6]]
        sides = int(found[2]), int(found[5])
        if min(sides) and marks in (["", ""], ["h", "w"], ["w", "h"]):
            return sides if marks != ["w", "h"] else (sides[1], sides[0])
    raise UserError(
        f"cannot read the size {text!r}; write HEIGHTxWIDTH, such as 672x1008, or say which is "
        "which: 1008wx672h; a side has at most six digits."
    )


def chosen(specs: Iterable[str], retention: Iterable[float]) -> list[Compressor]:
    """Every method at every retention, most tokens first; each once.

    Methods that say themselves what they keep (``uniform@0.3``, ``fastv:retention=0.3``, chains)
    are there once.
    """
    ratios = sorted(set(retention), reverse=True)
    found: dict[str, Compressor] = {}
    for spec in specs:
        if says_retention(spec):
            methods = [tp.parse(spec)]
        else:
            methods = [tp.parse(spec, retention=ratio) for ratio in ratios]
        for method in methods:
            found.setdefault(repr(method), method)
    return list(found.values())


def expanded(
    specs: Iterable[str], check: Callable[[Compressor], None]
) -> tuple[list[str], dict[str, str]]:
    """``all`` replaced by the methods that pass ``check``, and why the others do not.

    ``check`` raises `UserError` for a method that does not run, as `Adapter.check` does.
    """
    methods: list[str] = []
    skipped: dict[str, str] = {}
    for spec in specs:
        if spec != ALL:
            methods.append(spec)
            continue
        for name in strategies.names():
            try:
                check(tp.create(name, retention=0.5))
            except UserError as error:
                skipped[name] = str(error)
            else:
                methods.append(name)
    return methods, skipped


def says_retention(spec: str) -> bool:
    """Whether ``spec`` says itself what it keeps: ``@0.5``, ``retention=0.5``, or a chain.

    >>> [says_retention(spec) for spec in ("fastv", "fastv@0.5", "sparsevlm:schedule=retention")]
    [False, True, False]
    """
    return "@" in spec or " + " in spec or bool(re.search(r"\bretention\s*=", spec))


def activation_bytes(shape: DecoderShape, tokens: int, size: int) -> int:
    """Bytes that a decoder layer holds at its peak while it processes ``tokens`` tokens.

    In the MLP: hidden states in front of the layer and behind attention, normalised ones, and the
    three intermediate products of a gated MLP.  Attention without an N×N matrix needs less.
    """
    return tokens * size * (3 * shape.hidden + 3 * shape.intermediate)


def costs(prompt: Prompt, methods: Sequence[Compressor]) -> pd.DataFrame:
    """One row for the uncompressed model and one for every method.

    Columns are those of the ledger, and ``estimate`` (whether counts depend on the content),
    ``flops_share`` (of the uncompressed prefill's FLOPs, selection included), ``equivalent`` (the
    retention of a ``pre_llm`` method with equal layer average, see `translation`),
    ``weight_bytes``, ``activation_bytes`` and ``memory_bytes``: weights, KV cache, and the larger
    of activations and selector, at one prompt; neither the tower's activations nor what libraries
    and the device's allocator take.
    """
    rows = []
    for method in (None, *methods):
        told = prompt.forecast(method)
        ledger = told.ledger
        working = activation_bytes(prompt.shape, max(ledger.tokens_per_layer), prompt.size)
        rows.append(
            {
                "method": "uncompressed" if method is None else method.name,
                "label": "uncompressed" if method is None else method.label,
                "retention": ledger.requested,
                "estimate": not told.exact,
                **ledger.figures,
                "flops_share": ledger.flops / ledger.uncompressed_flops,
                "equivalent": equivalent(ledger),
                "weight_bytes": prompt.weight_bytes,
                "activation_bytes": working,
                "memory_bytes": prompt.weight_bytes
                + ledger.kv_bytes
                + max(working, ledger.selector_bytes),
            }
        )
    return pd.DataFrame(rows)


def equivalent(ledger: Ledger) -> float:
    """Retention of a ``pre_llm`` method that keeps all separators and has the same layer average.

    ``(layer average - separators) / patch tokens``: such a method's layers all process what it
    keeps.  Not positive where not even the separators would fit.
    """
    return (ledger.layer_average - ledger.separators) / max(1, ledger.patch_tokens)


def layers(prompt: Prompt, methods: Sequence[Compressor]) -> pd.DataFrame:
    """Visual tokens that enter every decoder layer: one row per method, retention and layer."""
    rows = []
    for method in (None, *methods):
        ledger = prompt.forecast(method).ledger
        label = "uncompressed" if method is None else method.label
        for layer, visual in enumerate(ledger.visual_per_layer):
            rows.append(
                {
                    "label": label,
                    "retention": ledger.requested,
                    "layer": layer,
                    "visual_tokens": visual,
                    "tokens": visual + ledger.text_tokens,
                }
            )
    return pd.DataFrame(rows)


# --- break-even -----------------------------------------------------------------------------------


def pays_from(lengths: Sequence[int], pays: Sequence[bool]) -> int | None:
    """The shortest of ``lengths`` (ascending) from which on a method pays; None if none."""
    found = None
    for length, good in zip(reversed(lengths), reversed(pays), strict=True):
        if not good:
            break
        found = length
    return found


def break_even(
    prompt: Prompt,
    method: Compressor,
    compressed: Callable[[Ledger], float],
    uncompressed: Callable[[Ledger], float],
) -> int | None:
    """From how many visual tokens on ``method`` is cheaper than doing nothing.

    Tried on single views of 1x1, 2x2, ... patches up to as many tokens as the prompt has.

    Args:
        prompt: Gives model and text.
        method: At its retention.
        compressed: What an account costs, selection included.
        uncompressed: What the same prompt costs without a method.

    Returns:
        Visual tokens, or None where it never pays.
    """
    longest = max(2, round(prompt.visual**0.5))
    step = max(1, longest // 24)
    sides = sorted({*range(1, min(9, longest)), *range(9, longest, step), longest})
    pays = []
    for side in sides:
        ledger = prompt.square(side).forecast(method, draws=1).ledger
        pays.append(compressed(ledger) < uncompressed(ledger))
    return pays_from([side * side for side in sides], pays)


def analytic_break_even(prompt: Prompt, method: Compressor) -> int | None:
    """`break_even` in FLOPs of prefill and selection."""
    return break_even(
        prompt, method, lambda ledger: ledger.flops, lambda ledger: ledger.uncompressed_flops
    )


# --- files ----------------------------------------------------------------------------------------


def write(folder: Path, tables: dict[str, pd.DataFrame], asked: dict[str, Any]) -> None:
    """``<name>.csv`` of every table and ``efficiency.json``, what was asked; each in one step."""
    for name, table in tables.items():
        with replace_file(folder / f"{name}.csv") as temporary:
            write_csv(table, temporary)
    with replace_file(folder / "efficiency.json") as temporary:
        text = json.dumps(asked, indent=2, ensure_ascii=False, default=str)
        temporary.write_text(text + "\n", encoding="utf-8")
