"""The page of the demo, driven in a browser that cannot reach anything but this machine."""

from __future__ import annotations

import io
import shutil
import socket
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from tokenprune.experiments.demo.run import DemoRequest, run
from tokenprune.experiments.demo.source import scene

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")

pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium"),
    pytest.mark.skipif(find_spec("gradio") is None, reason="needs pip install -e '.[demo]'"),
    pytest.mark.skipif(find_spec("playwright") is None, reason="needs pip install -e '.[dev]'"),
    pytest.mark.filterwarnings("ignore"),  # of Gradio and its packages
    pytest.mark.slow,
]

LOCAL = ("127.0.0.1", "::1", "localhost")
WAIT = 60_000  # milliseconds, on a busy machine


@pytest.fixture(scope="module")
def reached() -> Iterator[list[str]]:
    """The hosts that this process connects to."""
    hosts: list[str] = []
    connect, resolve = socket.socket.connect, socket.getaddrinfo

    def connected(self: socket.socket, address: Any) -> Any:
        hosts.append(address[0] if isinstance(address, tuple) else "a socket of this machine")
        return connect(self, address)

    def resolved(host: Any, *given: Any, **options: Any) -> Any:
        hosts.append(str(host))
        return resolve(host, *given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connected)
        patch.setattr(socket, "getaddrinfo", resolved)
        yield hosts


@pytest.fixture(scope="module")
def served(reached: list[str]) -> Iterator[Any]:
    page = run(DemoRequest(methods=("globalcom2", "fastv")))
    yield page
    page.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


class Tab:
    """The open page.

    Attributes:
        requests: Addresses that the browser asked for.
    """

    def __init__(self, browser: Any, url: str) -> None:
        self.requests: list[str] = []
        self.page = browser.new_page(viewport={"width": 1400, "height": 1000})
        self.page.set_default_timeout(WAIT)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)
        self.shows("uncompressed", "globalcom2@0.25", "fastv@0.25")

    def shows(self, *specs: str) -> None:
        """Wait until the cards are those of ``specs``."""
        self.page.wait_for_function(
            """specs => JSON.stringify(specs) == JSON.stringify(
                [...document.querySelectorAll(".tp-card")].map(card => card.dataset.spec))""",
            arg=list(specs),
        )

    def says(self, text: str) -> None:
        """Wait until the area of the cards contains ``text``."""
        self.page.wait_for_function(
            "text => document.querySelector('#tp-shown').textContent.includes(text)", arg=text
        )

    def ask(self, question: str) -> None:
        field = self.page.locator("#tp-question textarea, #tp-question input")
        field.fill(question)
        field.press("Enter")

    def upload(self, *files: Path) -> None:
        clear = self.page.locator("#tp-files button[aria-label=Clear]")
        if clear.count():
            clear.click(force=True)
            self.page.locator("#tp-files .file-preview").wait_for(state="detached")
        self.page.set_input_files("#tp-files input[type=file]", list(map(str, files)))

    def texts(self, selector: str) -> list[str]:
        return list(self.page.locator(selector).all_inner_texts())


@pytest.fixture
def tab(browser: Any, served: Any) -> Iterator[Tab]:
    opened = Tab(browser, served.url)
    yield opened
    opened.page.close()


def test_the_page_follows_its_fields_without_a_request_to_another_machine(
    tab: Tab, served: Any, reached: list[str]
) -> None:
    asked = scene(0)
    full = tab.texts(".tp-answer")
    tab.page.locator("#tp-retention input[type=range]").fill("0.5")
    tab.shows("uncompressed", "globalcom2@0.5", "fastv@0.5")
    pipe = served.answerer.models["testbed-next"]
    (record,) = pipe.select("globalcom2", [asked.images[0].open()], retention=0.5)
    total = len(record.layout.patches)
    tab.says(f"{record.kept_patches} of {total} ({100 * record.kept_patches / total:.3g} %)")
    methods = tab.page.locator("#tp-methods input")
    methods.fill("fastv:layer=1")
    methods.press("Enter")
    tab.shows("uncompressed", "globalcom2@0.5", "fastv@0.5", "fastv:layer=1@0.5")
    methods.fill("os:system")
    methods.press("Enter")
    tab.says("'os:system'")
    methods.press("Backspace")
    methods.press("Tab")  # closes the list
    tab.shows("uncompressed", "globalcom2@0.5", "fastv@0.5", "fastv:layer=1@0.5")
    tab.page.locator("#tp-scenes button").nth(3).click()
    tab.page.wait_for_function(
        "text => document.querySelector('#tp-question textarea, #tp-question input').value == text",
        arg=scene(3).question,
    )
    assert full[0].startswith(asked.answer)
    elsewhere = [url for url in tab.requests if urlsplit(url).hostname not in (*LOCAL, None)]
    assert elsewhere == [], "the browser"
    assert len(tab.requests) > 10
    assert {host for host in reached if host not in LOCAL} <= {"a socket of this machine"}
    assert set(reached) & set(LOCAL), "the list works"


def test_the_buttons_copy_the_lines(tab: Tab, browser: Any) -> None:
    tab.page.locator("#tp-recipe button").first.click()
    tab.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    for name, first in (("tp-python", "import tokenprune as tp\n"), ("tp-command", "python -c ")):
        tab.page.locator(f"#{name}-copy").click()
        copied = tab.page.evaluate("() => navigator.clipboard.readText()")
        assert copied == tab.page.locator(f"#{name} pre").text_content()
        assert copied.startswith(first)


def test_uploads_and_their_refusals(tab: Tab, tmp_path: Path, served: Any) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    whole = (tmp_path / "photo.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(whole[:3000])
    (tmp_path / "film.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(100))
    (tmp_path / "large.png").write_bytes(whole + bytes(21_000_000))
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    clip = io.BytesIO()
    frames = [Image.new("RGB", (56, 56), colour) for colour in ("red", "green", "blue")]
    frames[0].save(clip, "GIF", save_all=True, append_images=frames[1:])
    (tmp_path / "clip.gif").write_bytes(clip.getvalue())
    tab.upload(tmp_path / "photo.png")
    tab.says("testbed-next is a small model trained on drawings")
    tab.page.locator("#tp-recipe button").first.click()
    tab.page.wait_for_function(
        "() => document.querySelector('#tp-python pre').textContent.includes(\"['photo.png']\")"
    )
    for name, said in (
        ("broken.png", "annot decode the image 'broken.png'"),
        ("huge.png", "9000 x 9000 pixels, more than the limit"),
        ("clip.gif", "takes images only; choose testbed-onevision"),
    ):
        tab.upload(tmp_path / name)
        tab.says(said)
    tab.page.locator("#tp-model input").click()
    tab.page.get_by_role("option", name="testbed-onevision").click()
    tab.shows("uncompressed", "globalcom2@0.25", "fastv@0.25")
    for name, said in (("film.mp4", "Invalid file type"), ("large.png", "maximum allowed size")):
        tab.page.reload()
        tab.shows("uncompressed", "globalcom2@0.25", "fastv@0.25")
        tab.upload(tmp_path / name)
        tab.page.get_by_text(said).first.wait_for()
    tab.ask("")
    tab.says("question is empty")


def test_two_tabs_show_different_scenes(tab: Tab, browser: Any, served: Any) -> None:
    other = Tab(browser, served.url)
    other.page.locator("#tp-scenes button").nth(1).click()
    tab.page.locator("#tp-retention input[type=range]").fill("0.1")
    tab.shows("uncompressed", "globalcom2@0.1", "fastv@0.1")
    other.page.wait_for_function(
        "text => document.querySelector('#tp-question textarea, #tp-question input').value == text",
        arg=scene(1).question,
    )
    other.shows("uncompressed", "globalcom2@0.25", "fastv@0.25")
    assert tab.texts(".tp-answer")[0].startswith(scene(0).answer)
    other.page.close()


def test_only_this_machine_can_open_the_page(served: Any) -> None:
    port = urlsplit(served.url).port
    with socket.socket() as free:  # the same port on another address of this machine is not taken
        free.bind(("127.0.0.2", port))
    assert urlsplit(served.url).hostname == "127.0.0.1"
