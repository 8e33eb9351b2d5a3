"""The page of a report, opened in a browser."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_pages import (
    Page,
    data_of,
    finished_run,
    lines_of,
    own_run,
    page_of,
)

import tokenprune as tp
from tokenprune.experiments.report.run import ReportRequest
from tokenprune.experiments.report.run import run as report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
in_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("run") / "testbed")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, which a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return own_run(tmp_path_factory.mktemp("own"))


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[Path, str], Page]:
    """The page after its script ran.  Errors on the console fail the test."""

    def open_(path: Path, fragment: str = "") -> Page:
        command = [
            *(str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            *("--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"),
            *("--enable-logging=stderr", "--virtual-time-budget=5000", "--window-size=1300,900"),
            f"{path.as_uri()}{fragment}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert "CONSOLE" not in done.stderr, done.stderr
        page = Page(done.stdout)
        (errors,) = (item for item in page.all("pre") if item.get("id") == "errors")
        assert "hidden" in errors
        (root,) = page.all("html")
        assert root.get("data-ready") == "yes"
        return page

    return open_


def listed(page: Page) -> list[str | None]:
    return [item["data-id"] for item in page.all("li") if "data-id" in item]


@in_browser
def test_the_page_opens_and_counts_the_kept_tokens(run: Path, opened: Callable[..., Page]) -> None:
    report(ReportRequest(folder=run))
    item = data_of(run / "report.html")["questions"][4]
    page = opened(run / "report.html", f"#q={item['id']}")
    assert len(listed(page)) == 20
    assert "20 of 20 questions" in page.text
    (chosen,) = (e for e in page.all("li") if e.get("aria-selected") == "true")
    assert chosen["data-id"] == item["id"]
    cards = [card["data-cell"] for card in page.all("div") if "data-cell" in card]
    assert cards == ["uncompressed@1", "uniform@0.5", "uniform@0.1", "fastv@0.5", "fastv@0.1"]
    assert len(page.all("canvas")) == 5
    for line in lines_of(run):  # the kept bits that the script reads against the engine's ledger
        shown = "views=" not in line["cell"]  # the thumbnail alone is a reference without a card
        if line["question"] == item["id"] and "kept" in line and shown:
            assert f"{line['kept_patches']} of {line['patch_tokens']} tokens" in page.text


@in_browser
@pytest.mark.parametrize("show", ["kind=number&show=wrong&method=uniform", "keep=0.1&show=differ"])
def test_filters_of_the_address(run: Path, show: str, opened: Callable[..., Page]) -> None:
    report(ReportRequest(folder=run))
    data = data_of(run / "report.html")
    journal = {(line["cell"], line["question"]): line["answer"] for line in lines_of(run)}
    expected = []
    for item in data["questions"]:
        full = journal["uncompressed", item["id"]]
        if "uniform" in show:
            keys = [repr(tp.create("uniform", retention=r)) for r in (0.5, 0.1)]
            passes = item["kind"] == "number" and any(
                journal[key, item["id"]] != item["truth"] for key in keys
            )
        else:
            keys = [repr(tp.create(name, retention=0.1)) for name in ("uniform", "fastv")]
            passes = any(journal[key, item["id"]] != full for key in keys)
        if passes:
            expected.append(item["id"])
    assert 0 < len(expected) < 20
    page = opened(run / "report.html", f"#{show}")
    assert listed(page) == expected
    assert f"{len(expected)} of 20 questions" in page.text
    cards = {str(card["data-cell"]) for card in page.all("div") if "data-cell" in card}
    wanted = {"uniform@0.5", "uniform@0.1"} if "uniform" in show else {"uniform@0.1", "fastv@0.1"}
    assert cards == wanted | {"uncompressed@1"}


@in_browser
def test_keys_search_and_disagreement(run: Path, opened: Callable[..., Page]) -> None:
    path = page_of(report(ReportRequest(folder=run)))
    data = data_of(path)
    differ = [item["id"] for item in data["questions"] if len(set(item["ways"][1:])) > 1]
    press = """<script>
    for (const key of ["ArrowRight", "j", "ArrowLeft", "k", "k", "ArrowRight"])
      document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
    document.body.dataset.hash = location.hash;
    </script></body>"""
    path.write_text(path.read_text(encoding="utf-8").replace("</body>", press), encoding="utf-8")
    page = opened(path, "#show=disagree")
    assert listed(page) == differ
    (chosen,) = (e for e in page.all("li") if e.get("aria-selected") == "true")
    assert chosen["data-id"] == differ[1]
    (body,) = page.all("body")
    assert body["data-hash"] == f"#show=disagree&q={differ[1]}"
    word = data["questions"][3]["question"].split()[-1].upper()
    found = [q["id"] for q in data["questions"] if word.lower() in q["question"].lower()]
    assert listed(opened(path, f"#text={word}&kind=nonsense"))[: len(found)] == found


@in_browser
def test_hostile_texts_and_missing_images(own: Path, tmp_path: Path, opened: Any) -> None:
    moved = Path(shutil.copytree(own, tmp_path / "moved"))
    (moved / "1.png").unlink()
    path = page_of(report(ReportRequest(folder=moved / "run", data=moved / "my.jsonl")))
    page = opened(path, "#q=line-1")
    assert not [item for item in page.all("img") if item.get("src") == "x"]
    assert "onerror=noteError" in page.text, "shown as it was written"
    assert len(page.all("canvas")) == 2
    page = opened(path, "#q=second")
    assert page.text.count("image missing") == 1
    assert "kept tokens are not recorded" in page.text
    several = opened(path, "#q=line-4")
    assert len(several.all("canvas")) == 2, "a video is one strip"
