"""Finds the columns of each image in a forward."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tokenprune.encoder import EncoderCompressor
from tokenprune.engine.forward import Pass, Span
from tokenprune.engine.numbering import runs_of
from tokenprune.errors import UserError
from tokenprune.layout import listed
from tokenprune.tokens import VisualTokens

__all__ = [
    "find_spans",
    "refuse_missing_images",
    "warn_of_embeds",
]


def find_spans(
    state: Pass,
    seen: Mapping[str, Sequence[Sequence[Tensor]]],
    encoder: EncoderCompressor | None,
) -> list[Span]:
    """The visual tokens of a forward, image by image, in the order of the placeholders.

    Args:
        state: The forward; its `Pass.prompts` are filled in.
        seen: Modality to the features that each encoder call returned.
        encoder: The method that the context runs inside the vision encoder, or None.

    Raises:
        UserError: Placeholders and features do not match in number or order, or the features were
            encoded outside the context or with another encoder method.
    """
    found = {name: [feature for call in calls for feature in call] for name, calls in seen.items()}
    if not state.given.placeholders or not any(found.values()):
        return []
    visual, real = state.look()
    spans: list[Span] = []
    encoded = torch.stack([visual[name] for name, some in found.items() if some]).any(0)
    deep = encoded.flatten().cumsum(0).view_as(encoded) - 1
    for modality, features in found.items():
        if not features:
            continue
        where = visual[modality].nonzero()
        if len(where) != sum(map(len, features)):
            raise UserError(
                f"this forward has {len(where)} {modality} placeholders but "
                f"{sum(map(len, features))} visual tokens; an image split over several "
                "forwards (prefill_chunk_size) is not supported under compression."
            )
        first = 0
        for feature in features:
            record = getattr(feature, "visual", None)
            if record is None:
                raise UserError(
                    f"the {modality} features were not encoded inside this context, so their "
                    "layout is unknown; pass pixel_values, or features from pipe.assemble "
                    "(prefill_chunk_size is not supported under compression)."
                )
            _check_encoding(record, encoder)
            place = where[first : first + len(feature)]
            _check_place(place, record.layout.modality)
            spans.append(_span(state, feature, record, place, real, deep))
            first += len(feature)
    # The order in the prompt numbers its images and videos.
    spans.sort(key=lambda span: (span.row, span.first))
    before: Counter[int] = Counter()
    for span in spans:
        span.image = before[span.row]
        before[span.row] += 1
    return spans


def _span(
    state: Pass,
    feature: Tensor,
    record: VisualTokens,
    place: Tensor,
    real: Tensor,
    deep: Tensor,
) -> Span:
    """The span of an image.

    Args:
        state: The forward.
        feature: The encoder's features (N, D).
        record: The encoder's record.
        place: (N, 2) row and column of its placeholders.
        real: (B, S) columns that the attention mask does not hide.
        deep: (B, S) number of each column among the visual tokens of the batch.
    """
    row, columns, device = int(place[0, 0]), place[:, 1], state.columns.device
    there = listed(real[row, columns])
    tokens = replace(
        record, features=feature.to(device), layout=record.layout.to(device), levels=()
    )
    return Span(
        row=row,
        first=int(columns[0]),
        last=int(columns[-1]),
        columns=columns[there],
        index=there,
        tokens=tokens if len(there) == len(columns) else tokens.take(there),
        layout=record.layout.host,
        carrier=feature,
        placed=columns,
        runs=runs_of(columns),
        deep=deep[row, columns[there]],
        there=there,
        entered=there,
        record=record,
    )


def _check_place(place: Tensor, modality: str) -> None:
    """Raise `UserError` if the placeholders of an image, at ``place`` (N, 2), are not one run.

    A video may have a run for each frame.
    """
    rows, columns = place[:, 0], place[:, 1]
    apart = modality == "image" and int(columns[-1] - columns[0]) >= len(columns)
    if apart or rows[0] != rows[-1]:
        raise UserError(
            f"the {len(place)} tokens of one {modality} do not fit one run of placeholders; give "
            "the images and videos in the order of their placeholders, not in another order."
        )


def _check_encoding(record: VisualTokens, encoder: EncoderCompressor | None) -> None:
    """Raise `UserError` unless features were encoded as this context would encode them."""
    found = record.encoding.by if record.encoding is not None else ""
    wanted = repr(encoder) if encoder is not None else ""
    if found != wanted:
        raise UserError(
            f"these features were encoded by {found or 'the plain vision encoder'}, but this "
            f"context runs {wanted or 'the plain vision encoder'}; encode them with "
            "pipe.encode(images, signals, compressor), or pass pixel_values."
        )


def refuse_missing_images(placeholders: Mapping[str, Tensor]) -> None:
    """Raise `UserError` for placeholders without features, which the model would read as text."""
    for modality, where in placeholders.items():
        if where.any():
            raise UserError(
                f"the prompt has {int(where.sum())} {modality} placeholders, but no {modality} "
                "reached this forward; pass pixel_values with the prompt (prefill_chunk_size "
                "is not supported under compression)."
            )


def warn_of_embeds() -> None:
    """Warn that nothing is compressed in ``inputs_embeds`` that contain visual features."""
    warnings.warn(
        "inputs_embeds that already contain visual features cannot be distinguished from text, "
        "so nothing is compressed; pass input_ids with pixel_values instead.",
        stacklevel=2,
    )
