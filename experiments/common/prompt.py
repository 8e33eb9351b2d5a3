"""The prompt whose cost is forecast."""

import math
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from tokenprune.adapter import Adapter
from tokenprune.compatibility import check_length
from tokenprune.compressor import Compressor
from tokenprune.cost.arithmetic import DecoderShape
from tokenprune.errors import UserError
from tokenprune.experiments.common.limits import check_number
from tokenprune.forecast import Forecast, forecast
from tokenprune.layout import TokenLayout
from tokenprune.models.loading import adapter_without_weights

__all__ = [
    "DRAWS",
    "Prompt",
    "asks",
    "prompt_of",
    "read_size",
]


SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


DRAWS = 5  # of synthetic content; the median counts


_SIZE = re.compile(r"([hw]?)([0-9]{1,6})([hw]?)\s*[x×,]\s*([hw]?)([0-9]{1,6})([hw]?)")


QUESTION = 32  # question tokens that methods receive if no text is counted


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt on a model: everything that determines its cost.

    Attributes:
        adapter: Of the model, with or without weights.
        layouts: Layouts of its images and videos.
        text: Number of its text tokens.
        asking: How many of them come after the images, or stand in for a question that is not
            counted; None for all.
        size: Bytes per number.
        image_size: (height, width) of its image, if given.
    """

    adapter: Adapter
    layouts: tuple[TokenLayout, ...]
    text: int = 0
    asking: int | None = None
    size: int = 2
    image_size: tuple[int, int] | None = None
    _found: dict[Any, Forecast] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def shape(self) -> DecoderShape:
        """The shape of the decoder."""
        return DecoderShape.of(self.adapter.language_model.config)

    @property
    def visual(self) -> int:
        """Number of visual tokens, separators included."""
        return sum(map(len, self.layouts))

    @property
    def patches(self) -> int:
        """Number of patch tokens."""
        return sum(len(layout.patches) for layout in self.layouts)

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of the weights of the whole model, ``size`` per number."""
        counts: list[int] = [weight.numel() for weight in self.adapter.model.parameters()]
        return self.size * sum(counts)

    def forecast(self, method: Compressor | None, draws: int = DRAWS) -> Forecast:
        """The forecast of ``method`` on this prompt; computed once."""
        if (method, draws) not in self._found:
            self._found[method, draws] = forecast(
                self.adapter,
                method,
                self.layouts,
                self.text,
                asking=self.asking,
                size=self.size,
                draws=draws,
            )
        return self._found[method, draws]

    def square(self, side: int) -> "Prompt":
        """The prompt with a single view of ``side`` x ``side`` patches and no separator."""
        native = self.adapter.facts.vision.native
        layout = TokenLayout.single((side, side), newline=False, native=native)
        return Prompt(self.adapter, (layout,), self.text, self.asking, self.size)


def prompt_of(
    model: str,
    image_size: tuple[int, int] | None = None,
    *,
    patches: tuple[int, int] | None = None,
    text: int = 0,
    dtype: str = "bfloat16",
) -> Prompt:
    """One image in front of ``text`` tokens, on a model of which only the config is needed.

    Args:
        model: As for `tokenprune.models.loading.adapter_without_weights`.
        image_size: (height, width) in pixels, for the adapter's layout.  None is
            `Adapter.usual_layout`: for families with crops a thumbnail and 2x2 full crops **without
            separators**, as in efficiency tables of papers (2880 tokens on LLaVA-NeXT); otherwise
            one view: 576 tokens on LLaVA-1.5, 1296 on Qwen2.5-VL.
        patches: (rows, columns) of a single view without separators, instead of an image size.
        text: Number of text tokens; those tables count none.  Methods that use the question then
            receive `QUESTION` tokens, which are not counted.
        dtype: Of weights and KV cache.

    Raises:
        UserError: Unknown model or dtype, a bad size, both an image and patches, or more tokens
            than the decoder has positions.
    """
    if dtype not in SIZES:
        raise UserError(f"dtype must be one of {', '.join(SIZES)}, got {dtype!r}.")
    check_number("text_tokens", text)
    if image_size is not None and patches is not None:
        raise UserError("give --image-size or --patches, not both.")
    adapter = adapter_without_weights(model)
    if patches is not None:
        check_length(adapter.facts, math.prod(patches), text)
        native = adapter.facts.vision.native
        layout = TokenLayout.single(patches, newline=False, native=native)
    elif image_size is None:
        layout = adapter.usual_layout()
    else:
        layout = adapter.layout(image_size)
    check_length(adapter.facts, len(layout) + text)
    asking = None if text else QUESTION
    return Prompt(adapter, (layout,), text, asking, SIZES[dtype], image_size)


def asks(prompt: Prompt, method: Compressor) -> bool:
    """Whether what ``method`` keeps or costs depends on how long the question is."""
    found = [
        replace(prompt, asking=words).forecast(method, draws=1).ledger for words in (1, QUESTION)
    ]
    return found[0] != found[1]


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
