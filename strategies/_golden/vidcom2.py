"""The replay of VidCom²: its golden vectors through tokenprune's API."""

import torch

from tokenprune.layout import TokenLayout
from tokenprune.strategies.vidcom2 import VidCom2
from tokenprune.testing.golden import Case, Verdict, replay
from tokenprune.tokens import VisualTokens


@replay("vidcom2")
def vidcom2(case: Case) -> Verdict:
    """Channels, similarities, ratios, budgets and the kept set of a video."""
    verdict, given, params = Verdict(), case.tensors, case.params
    frames, size = params["frames"], params["tokens_per_frame"]
    layout = TokenLayout.video(frames, (1, size))
    newline = torch.zeros(1, params["channels"])
    tokens = VisualTokens(layout, torch.cat([given["features"], newline]))
    strategy = VidCom2(retention=params["base_ratio"], temperature=params["softmax_temperature"])
    to_video, to_frame = strategy.resemblance(tokens)
    verdict.close("video_score", to_video.view(frames, size), given["video_score"], 1e-4)
    verdict.close("frame_score", to_frame.view(frames, size), given["frame_score"], 1e-4)
    ratios = strategy.ratios(tokens, to_video)
    verdict.close("frame_ratio", ratios, given["frame_ratio"], 1e-3)
    keep = strategy.select(tokens).keep
    counts = torch.bincount(layout.view[keep], minlength=frames)
    verdict.same("frame_budget", counts, given["frame_budget"])
    verdict.same("low_var_channels", strategy.calm(tokens), given["low_var_channels"])
    verdict.same("keep_global", keep, given["keep_global"])
    verdict.same("keep_ids", layout.col[keep], given["keep_ids"])
    if "sequence_code" in given:  # a separator for every row of a frame, after the frame
        rows = torch.full((int(size**0.5),), -1)
        frame_by_frame = keep.split(counts.tolist())
        sequence = torch.cat([torch.cat([one, rows]) for one in frame_by_frame])
        verdict.same("sequence_code", sequence, given["sequence_code"])
    return verdict
