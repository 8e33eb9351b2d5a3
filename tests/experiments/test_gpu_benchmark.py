"""The GPU benchmark: its rehearsal on the CPU, and what it refuses and leaves out."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
import torch

from tokenprune.adapter import adapter_of
from tokenprune.experiments.benchmarks import gpu
from tokenprune.experiments.benchmarks.record import table
from tokenprune.experiments.common.bench import Bench
from tokenprune.experiments.common.prompt import Prompt
from tokenprune.models.loading import adapter_without_weights
from tokenprune.registry import adapters
from tokenprune.spec import create


def _parts(note: str) -> dict[str, float]:
    """Milliseconds of every part of a prefill."""
    words = [part.rsplit(" ", 2) for part in note.split(", ")]
    return {name: float(value) for name, value, _ in words}


def test_the_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "METHODS", ("fastv",))
    monkeypatch.setattr(gpu, "RETENTION", (0.25,))
    out = tmp_path / "gpu.csv"
    assert gpu.main(["--tiny", "--out", str(out)]) == 0
    frame = table(out)
    assert frame["quick"].all()
    cells = [
        f"{model}, sdpa, batch {rows}, {method}"
        for model in ("LLaVA-NeXT", "Qwen2.5-VL")
        for rows in (1, 2)
        for method in ("R = 1", "fastv@0.25")
    ]
    assert list(frame["case"].unique()) == cells
    found = frame.set_index(["case", "figure"])["value"]
    notes = frame.set_index(["case", "figure"])["note"]
    for case in cells:
        parts = _parts(notes[case, "prefill"])
        assert found[case, "prefill"] == pytest.approx(sum(parts.values()) / 1000, rel=0.01)
        if not case.endswith("R = 1"):
            full = found[case.rpartition(", ")[0] + ", R = 1", "prefill"]
            assert found[case, "speed-up"] == pytest.approx(full / found[case, "prefill"])
            assert (
                parts["selection"] / 1000
                <= 1.01 * found[case, "prefill"] * (found[case, "selection / prefill"])
            )
    one, two = (frame[frame["case"] == f"LLaVA-NeXT, sdpa, batch {n}, R = 1"] for n in (1, 2))
    peaks = [part.set_index("figure")["value"]["peak memory"] for part in (one, two)]
    assert peaks[0] < peaks[1] < 2 * peaks[0]  # weights count once


def test_cells_without_time_are_named(tmp_path: Path) -> None:
    out = tmp_path / "gpu.csv"
    assert gpu.main(["--tiny", "--out", str(out), "--minutes", "-1"]) == 0
    frame = table(out)
    assert list(frame["case"]) == ["LLaVA-NeXT", "Qwen2.5-VL"]
    assert set(frame["figure"]) == {"left out"}


def test_running_out_of_memory_costs_one_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "METHODS", ("uniform",))
    true = Bench.run

    def run(self: Bench, method: object) -> object:
        if method is not None and method.retention == 0.5:  # type: ignore[attr-defined]
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return true(self, method)  # type: ignore[arg-type]

    monkeypatch.setattr(Bench, "run", run)
    frame = pd.DataFrame(next(gpu.measure(tiny=True)))
    lost = frame[frame["figure"] == "out of memory"]
    assert list(lost["case"]) == ["LLaVA-NeXT, sdpa, batch 1, uniform@0.5"]
    assert "LLaVA-NeXT, sdpa, batch 1, uniform@0.1" in set(frame["case"])


def test_results_are_written_only_on_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    assert gpu.main(["--tiny"]) == 2
    assert "--out" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert gpu.main([]) == 2
        assert "no CUDA device" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("subject", "patches"), [(gpu.LARGE[0], 2880), (gpu.LARGE[1], 54 * 54)])
def test_the_large_shapes(subject: gpu.Subject, patches: int) -> None:
    """A thumbnail and four crops of 24 x 24; 1512 pixels in squares of 28."""
    adapter = adapter_without_weights(subject.name)
    assert len(adapter.layout(subject.image_size).patches) == patches
    weights = sum(one.numel() for one in adapter.model.parameters())
    assert 7e9 < weights < 8.5e9
    language = adapter.language_model.config
    assert language.num_hidden_layers == {"llama": 32}.get(language.model_type, 28)


def test_a_bench_of_native_images_runs_what_the_ledger_states() -> None:
    """The prompt has its rows and columns: the hidden sizes follow from the grid of the image."""
    family = adapters.get("Qwen2.5-VL")
    adapter = adapter_of(family.tiny())  # type: ignore[attr-defined]
    layout = adapter.layout((32, 48))
    bench = Bench(adapter, Prompt(adapter, (layout,), 8, size=4, image_size=(32, 48)), 2, 1)
    run = bench.run(create("uniform", retention=0.5))
    assert len(layout.patches) == 8 * 12
    assert run.ledger.visual_per_layer == (48,) * 4
    assert math.isfinite(run.decode.median)
