"""Takes the picture of the demo that the documentation shows: ``python docs/_generate/demo.py``.

It needs Chromium and the extras ``demo`` and ``dev``.
"""

from __future__ import annotations

import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from tokenprune.console import quiet
from tokenprune.experiments.demo.run import DemoRequest, run

FILE = Path(__file__).resolve().parents[1] / "images" / "demo.png"
SIZE = {"width": 1320, "height": 1000}


def main() -> None:
    """Serve the page, open it, and save what it shows."""
    quiet()
    served = run(DemoRequest(methods=("globalcom2", "fastv", "uniform")))
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
            page = browser.new_page(viewport=SIZE, color_scheme="light")
            page.goto(served.url)
            page.wait_for_function("() => document.querySelectorAll('.tp-card').length == 4")
            page.wait_for_function("() => [...document.images].every(image => image.complete)")
            page.wait_for_timeout(1000)  # the indicators of progress fade
            taken = Image.open(io.BytesIO(page.screenshot()))
            browser.close()
    finally:
        served.close()
    taken.convert("RGB").quantize(256).save(FILE, optimize=True)
    print(f"{FILE.name}: {FILE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
