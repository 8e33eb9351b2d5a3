"""Vectors made with the methods' official code, replayed through the public strategy API."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tokenprune import golden
from tokenprune.golden import Case, Verdict, app, replay_folder
from tokenprune.primitives import density_peaks
from tokenprune.registry import strategies

HERE = Path(__file__).parent / "data" / "golden"
SHARED = Path(__file__).parents[2] / "shared" / "golden"
METHODS = sorted(folder.name for folder in HERE.iterdir() if folder.is_dir())


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["golden", *map(str, arguments)])
    return result.exit_code, result.output


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("root", [HERE, SHARED], ids=["own", "shared"])
def test_official_vectors_are_reproduced(root: Path, method: str) -> None:
    if not root.is_dir():
        pytest.skip(f"the full set of vectors is not there ({root}); a few are in {HERE}")
    for case, verdict in replay_folder(root / method):
        assert not verdict.mismatch, f"{case.id}: {verdict}"
        assert not verdict.skipped, f"{case.id}: {verdict}"
        assert verdict.compared
        # The order is ours as well; GlobalCom²'s differs exactly by the documented defects.
        assert verdict.reordered == (method == "globalcom2"), case.id


def _ranked(scores: torch.Tensor, count: int) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: -float(scores[i]))[:count])


@pytest.fixture(scope="module")
def draw() -> torch.Generator:
    replay_folder(HERE / "fastv")
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("count", [3, 16])
def test_fastervlm_replays_several_single_views(draw: torch.Generator, count: int) -> None:
    attention = torch.rand(3, 2, 16, generator=draw)
    kept = torch.tensor([_ranked(one.mean(0), count) for one in attention])
    mask = torch.zeros(3, 16, dtype=torch.bool).scatter_(1, kept, True)
    params = {"views": 3, "patches": 16, "visual_token_num": count}
    tensors = {"cls_attention": attention, "keep_mask": mask, "sequence_code": kept}
    assert str(golden._replays["fastervlm"](Case("", "", params, tensors))) == "exact"


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("ratios", [(0.5, 0.25, 0.125), (0.7, 0.4, 0.1)])
def test_pyramiddrop_replays_any_list(
    draw: torch.Generator, ratios: tuple[float, ...], stage: int
) -> None:
    original, text = [40, 24], [3, 5]
    before = [int(n * ratios[stage - 1]) if stage else n for n in original]
    number = [int(n * ratios[stage]) for n in original]
    row = torch.rand(2, 2, 2 + max(map(sum, zip(before, text, strict=True))), generator=draw)
    score, kept, left = (torch.full((2, 60), -1.0), *torch.full((2, 2, 60), -1))
    for i, mine in enumerate(row.mean(1)):
        score[i, : before[i]] = visual = mine[2 : 2 + before[i]]
        kept[i, : number[i]] = chosen = torch.tensor(_ranked(visual, number[i]))
        end = 2 + before[i] + torch.arange(text[i])
        left[i, : 2 + number[i] + text[i]] = torch.cat([torch.arange(2), 2 + chosen, end])
    params = {
        "ratio_list": list(ratios), "stage": stage, "image_start": 2, "original_visual": original,
        "visual_before": before, "kept": number, "text_tokens": text,
    }  # fmt: skip
    tensors = {"attention_row": row, "visual_score": score, "kept": kept, "survivors": left}
    assert str(golden._replays["pyramiddrop"](Case("", "", params, tensors))) == "exact"


def test_sparsevlm_looks_a_list_up_by_layer(draw: torch.Generator) -> None:
    """Cuts behind layers 2 and 15 only take the first and the third count, 66 and 17."""
    text, visual = 6, 67
    embeds = torch.randn(1, visual + text, 8, generator=draw)
    related = (embeds[0, :visual] @ embeds[0, visual:].T).softmax(1).mean(0)
    raters = (related > related.mean()).nonzero().squeeze(1)
    states, tensors = embeds[0, :visual], {"embeds": embeds, "rater_idx": raters}
    for layer, count in ((2, 66), (15, 17)):
        heads = torch.rand(2, text, len(states), generator=draw)
        score = heads.mean(0)[raters].mean(0)
        order = score.argsort(descending=True)
        kept, recycled = order[:count].sort().values, order[count:]
        recycled = recycled[: int(0.3 * len(recycled)) + 1]
        if layer == 15:  # 16 recycled make two clusters; one would be the mean of all
            centres, cluster = density_peaks(states[recycled], 2)
            merged = torch.stack([states[recycled[cluster == c]].mean(0) for c in (0, 1)])
            tensors[f"layer{layer}_centers"] = centres
        else:
            merged = states[recycled].mean(0, keepdim=True)
        tensors |= {
            f"layer{layer}_text_to_visual": heads,
            f"layer{layer}_relation": score,
            f"layer{layer}_kept": kept,
            f"layer{layer}_recycled": recycled,
            f"layer{layer}_merged": merged,
        }
        states = torch.cat([states[kept], merged])
    tensors["final_sequence"] = torch.cat([states, embeds[0, visual:]])
    params = {
        "visual_start": 0, "visual_tokens": visual, "text_tokens": text, "retain_setting": 64,
        "pruning_layers": [2, 15],
    }  # fmt: skip
    assert str(golden._replays["sparsevlm"](Case("", "", params, tensors))) == "exact"


def test_prumerge_replays_other_grids_and_unequal_repeats(draw: torch.Generator) -> None:
    """The training path with k = 8 of 64: samples 4, 12, 20, ..., whether chosen already or not."""
    query, key, hidden = (torch.randn(2, *size, 4, generator=draw) for size in ((), (65,), (65,)))
    score = (query[:, None] @ key.mT / 2).softmax(-1)[:, 0, 1:]
    best = torch.stack([one.argsort(descending=True)[:8] for one in score])
    centres = torch.cat([best, torch.arange(4, 63, 8).repeat(2, 1)], 1)
    assert len(centres[0].unique()) != len(centres[1].unique()), "draw other ones"
    params = {
        "patches": 64, "dim": 4, "adaptive": False, "reduction_ratio": 0.125, "top_k": 8,
        "spatial_added": 8, "centers": 16, "spatial_step": 8,
    }  # fmt: skip
    tensors = {
        "query_cls": query, "key": key, "hidden_states": hidden, "cls_attn": score,
        "center_idx": centres, "output": torch.zeros(2, 17, 4),
    }  # fmt: skip
    assert str(golden._replays["prumerge"](Case("", "", params, tensors))) == "exact"


def test_divprune_replays_a_window_that_is_officially_wrong(draw: torch.Generator) -> None:
    """The visual tokens begin at 3, the official code assumes 5: it picks from its own window."""
    embeds = torch.randn(20, 4, generator=draw)
    unit = torch.nn.functional.normalize(embeds[5:15], dim=-1)
    distance = 1 - unit @ unit.T
    chosen = [int(distance.sort(0).values[1].argmax())]
    for _ in range(3):
        chosen.append(int(distance[chosen].amin(0).argmax()))
    kept = [*range(5), *(5 + i for i in sorted(chosen)), *range(15, 20)]
    params = {
        "kind": "sequence", "system_tokens": 3, "assumed_system_tokens": 5, "visual_tokens": 10,
        "ratio": 0.4,
    }  # fmt: skip
    tensors = {
        "sequence_embeds": embeds,
        "selected": torch.tensor(chosen),
        "sequence_keep": torch.tensor(kept),
    }
    assert str(golden._replays["divprune"](Case("", "", params, tensors))) == "exact"


def test_a_replay_lies_in_a_file_of_its_own_and_every_verified_card_has_one() -> None:
    replay_folder(HERE / "fastv")
    for method, function in golden._replays.items():
        assert function.__module__ == f"tokenprune.strategies._golden.{method}"
    cards = {strategies.get(name).card.verified for name in strategies.names()}
    assert cards - {""} == set(golden._replays)


def test_a_folder_of_folders_is_replayed_and_the_exit_code_is_zero() -> None:
    code, output = run(HERE)
    assert code == 0
    assert "fastv_05" in output
    assert "gc2_17" in output


def copy_with(tmp_path: Path, method: str, tensor: str, change: int) -> Path:
    """A copy of one case in which an expected value was changed."""
    folder = tmp_path / method
    folder.mkdir()
    case = json.loads((HERE / method / "cases.json").read_text())[0]
    (folder / "cases.json").write_text(json.dumps([case]))
    tensors = load_file(HERE / method / case["file"])
    tensors[tensor].view(-1)[3] += change
    save_file(tensors, folder / case["file"])
    return folder


@pytest.mark.parametrize(
    ("method", "tensor"),
    [
        ("fastv", "kept_visual"),
        ("fastv", "keep_positions"),
        ("fastv", "mean_visual_score"),
        ("globalcom2", "thumb_keep_sorted"),
        ("globalcom2", "keep_flat_sorted"),
        ("globalcom2", "llm_sequence"),
        ("globalcom2", "guide_scores"),
    ],
)
def test_a_wrong_expectation_is_a_mismatch(tmp_path: Path, method: str, tensor: str) -> None:
    code, output = run(copy_with(tmp_path, method, tensor, 1))
    assert code == 1
    assert "MISMATCH" in output


def test_ratios_are_compared_in_double_precision() -> None:
    verdict = Verdict()
    expected = torch.tensor([0.25], dtype=torch.float64)
    verdict.close("ratios", expected + 1e-12, expected, 1e-14)
    assert "ratios: entry 0" in verdict.mismatch


def test_methods_without_a_strategy_are_skipped_and_said_so(tmp_path: Path) -> None:
    shutil.copytree(HERE / "fastv", tmp_path / "nosuchmethod")
    code, output = run(tmp_path)
    assert code == 2
    assert "no strategy here replays 'nosuchmethod'" in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{tmp}"], "no cases.json"),
        ([str(HERE), "--method", "fastvv"], "Did you mean 'fastv'"),
    ],
)
def test_bad_input_is_a_sentence(tmp_path: Path, arguments: list[str], said: str) -> None:
    code, output = run(*[argument.format(tmp=tmp_path) for argument in arguments])
    assert code == 2
    assert said in output


def test_a_missing_vector_file_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "cases.json").write_text('[{"id": "a", "file": "a.safetensors", "params": {}}]')
    code, output = run(tmp_path)
    assert code == 2
    assert "cannot read the vectors" in output
