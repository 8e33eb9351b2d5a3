"""Vectors made with the methods' official code, replayed through the public strategy API."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tokenprune import golden
from tokenprune.golden import Verdict, app, replay_folder
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
