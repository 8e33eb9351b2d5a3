"""How many tokens stay, where the size of an image decides it."""

from __future__ import annotations

import pytest

import tokenprune as tp
from tokenprune import serving
from tokenprune.errors import UserError
from tokenprune.layout import TokenLayout
from tokenprune.spec import create, parse
from tokenprune.testing.host import Host

# 14 entries: a thumbnail of 4, and 2 canvas rows of 4 patches with a separator each.
LAYOUT = TokenLayout.anyres((1, 2), (2, 2), (0, 2, 0, 4))

BY_SIZE = {
    *("divprune", "downsample", "dycoke", "fastervlm", "feature-norm", "first", "gprune"),
    *("holitom", "last", "prumerge", "prumerge+", "random", "scope", "spatial-pool", "uniform"),
    *("visionzip", "vispruner"),
}


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        ("uniform@0.5", 6 + 2),
        ("uniform:separators=none@0.5", 6),
        ("uniform:separators=rows@0.5", None),  # a canvas row may keep no token
        ("uniform:separators=none@1", 12),
        ("uniform:separators=rows@1", 14),
        ("first@0.3", 3 + 2),  # 3.6 is rounded down
        ("divprune@0.3", 4 + 2),  # 3.6 is rounded
        ("gprune@0.4", 1 + 3 + 2),  # of 4 and of 8 tokens
        ("spatial-pool@0.4", 1 + 3 + 2),  # 1 x 1 of 2 x 2, 1 x 3 of 2 x 4
        ("globalcom2@0.5", None),
        ("globalcom2:total=exact@0.5", 6 + 2),
        ("globalcom2:allocator=topk@0.5", 6 + 2),
        ("prumerge:adaptive=true@0.5", None),
        ("hired@0.5", None),
        ("vidcom2@0.5", None),
        ("tome@0.5", None),
        ("uniform@0.5 + fastv@0.5", None),
    ],
)
def test_counts_by_hand(spec: str, count: int | None) -> None:
    assert parse(spec).count(LAYOUT) == count


def test_downsampling_by_hand() -> None:
    """R = 0.3 of 4 x 4 patches is 4, so that each view has 2 x 2 coarse patches.

    The canvas shows rows 1 to 6 of 8: of all coarse patches a part.  R allows 19 of 64 tokens; in
    proportion to 16 and four times 12 tokens these are 5, 4, 4, 3 and 3, of which 4 are there.
    """
    layout = TokenLayout.anyres((2, 2), (4, 4), (1, 7, 0, 8))
    assert parse("downsample@0.3").count(layout) == 4 + 4 + 4 + 3 + 3 + 6


def test_one_view_needs_no_division() -> None:
    """LLaVA-1.5 has no crops, so that methods that divide the budget by content have a count."""
    layout = TokenLayout.single((4, 4), newline=False)
    assert parse("globalcom2@0.25").count(layout) == parse("hired@0.25").count(layout) == 4


def test_exactly_these_methods_have_a_count() -> None:
    """In front of the language model, on an image with crops."""
    methods = [create(name, retention=0.25) for name in tp.list_methods()]
    found = {
        one.name
        for one in methods
        if one.stage is not tp.Stage.LLM and one.count(LAYOUT) is not None
    }
    assert found == BY_SIZE | {"cdpruner"}  # which needs the prompt


def test_a_server_refuses_what_content_decides() -> None:
    adapter = Host.tiny("LLaVA-NeXT").adapter
    for name in BY_SIZE:
        serving.check_counted(adapter, create(name, retention=0.25))
    serving.check_counted(adapter, parse("globalcom2:total=exact@0.25"))
    for spec in ("globalcom2@0.25", "tome@0.25", "uniform:separators=rows@0.25"):
        with pytest.raises(UserError, match=r"content .* decides how many .*image_embeds.*divpru"):
            serving.check_counted(adapter, parse(spec))
    with pytest.raises(UserError, match="the size: globalcom2:total=exact, divprune"):
        serving.check_counted(adapter, parse("globalcom2@0.25"))
