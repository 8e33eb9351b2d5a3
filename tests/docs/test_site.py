"""The documentation site builds without a warning, and reading it needs no network."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from places import ROOT

from tokenprune.registry import strategies

LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
"""Elements that make a browser load something, and where they say what."""

# The theme's script names two libraries: one for browsers without ResizeObserver, which all have
# since 2020, and one for diagrams of the class `mermaid`, of which there are none.
NEVER_LOADED = ("https://unpkg.com/resize-observer-polyfill", "https://unpkg.com/mermaid@")

pytestmark = [
    pytest.mark.skipif(
        not (ROOT / "mkdocs.yml").is_file(), reason="the documentation is not part of the package"
    ),
    pytest.mark.skipif(
        not find_spec("mkdocs") or not find_spec("mkdocstrings") or not find_spec("material"),
        reason="needs the extra: pip install -e '.[docs]'",
    ),
    pytest.mark.slow,
]


class Page(HTMLParser):
    """What a page loads, links to, and can be linked to by."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.classes: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect one element."""
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self.classes |= set(given.get("class", "").split())
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif LOADS.get(tag) in given and given.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(given[LOADS[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site.  Proxies lead nowhere, so that nothing can be fetched."""
    folder = tmp_path_factory.mktemp("site")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_reading_it_needs_no_network(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        assert [url for url in page.loaded if urlsplit(url).netloc] == [], path
        assert "mermaid" not in page.classes
    for path in site.rglob("*.css"):
        css = re.sub(r"/\*.*?\*/", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", css), path
    for path in site.rglob("assets/javascripts/*.js"):
        found = re.findall(
            r"https?://[\w./@-]+\.js|https?://unpkg[\w./@-]+", path.read_text("utf-8")
        )
        assert [url for url in found if not url.startswith(NEVER_LOADED)] == [], path


def test_links_inside_it_lead_somewhere(pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists(), f"{path.name}: {link}"
            if parts.fragment and not parts.fragment.startswith("__") and target in pages:
                assert unquote(parts.fragment) in pages[target].anchors, f"{path.name}: {link}"


def test_every_method_has_a_page(site: Path) -> None:
    for name in strategies.names():
        if strategies.get(name).__module__.startswith("tokenprune."):
            text = (site / "methods" / f"{name}.html").read_text(encoding="utf-8")
            assert "<h1 id=" in text
            assert strategies.get(name).card.arxiv in text


def test_figures_are_those_of_the_stored_results(site: Path) -> None:
    """Read from the stored file by other means than those that make the pages."""
    with (ROOT / "experiments/results/testbed-next/summary-all.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "overall"]
    (row,) = (row for row in rows if (row["label"], row["retention"]) == ("fastv", "0.25"))
    shown = f"{100 * float(row['accuracy']):.1f}"
    for page in ("results.html", "methods/fastv.html"):
        assert shown in (site / page).read_text(encoding="utf-8"), page
