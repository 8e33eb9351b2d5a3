"""The pair of functions in vLLM's signature, against `tokenprune.compress` on the same tensors."""

from __future__ import annotations

import pytest
import torch

import tokenprune as tp
from tokenprune.engine import vision
from tokenprune.errors import UserError
from tokenprune.serving.vllm_video import video_pair
from tokenprune.testing.host import ROWS, tiny_host

pytestmark = pytest.mark.filterwarnings("ignore::tokenprune.errors.RetentionWarning")

ROW = next(index for index, row in enumerate(ROWS) if row.frames)


@pytest.mark.parametrize("q", [0.5, 0.9])
@pytest.mark.parametrize("spec", ["divprune", "uniform", "feature-norm", "gprune", "last"])
def test_the_mask_marks_what_compress_keeps(spec: str, q: float) -> None:
    host = tiny_host("Qwen2.5-VL", "qwen2_5_vl_text")
    with tp.compress(host.model, spec, retention=round(1 - q, 9)) as trace, torch.no_grad():
        host.model(**host.inputs((ROW,)))
    kept = [one for one in trace.selections if one.layout.modality == "video"]
    call = host.media(ROW)["video"]
    videos = vision.encode(host.adapter, "video", call)
    count, mask = video_pair(spec)
    assert kept
    for record, tokens, size in zip(kept, videos, call["video_grid_thw"], strict=True):
        marks = mask(tokens.features, size, 2, q)
        assert marks.dtype == torch.bool
        assert torch.equal(marks.nonzero()[:, 0], record.keep)
        frames, rows, cols = size.tolist()
        assert count(rows * cols // 4, frames, q) == int(marks.sum())


def test_nothing_is_dropped_at_a_rate_of_zero() -> None:
    count, mask = video_pair("divprune")
    assert count(6, 3, 0.0) == 18
    assert mask(torch.randn(18, 4), (3, 4, 6), 2, 0.0).all()


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("divprune@0.5", "leave the retention out"),
        ("fastervlm", "needs cls_attention"),
        ("fastv", "in front of the language model alone"),
        ("spatial-pool", "depends on the video"),
        ("vidcom2", "depends on the video"),
    ],
)
def test_what_a_pair_cannot_express_is_refused(spec: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        video_pair(spec)
    if "retention" not in said:
        assert "divprune" in str(caught.value)
