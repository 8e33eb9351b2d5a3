"""Serves a page to try methods on one image, on this machine alone unless told otherwise."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from tokenprune.errors import UserError
from tokenprune.experiments.common.limits import check_number
from tokenprune.experiments.common.request import ModelRequest
from tokenprune.experiments.common.setting import load_model
from tokenprune.experiments.demo.answers import Answerer, chosen
from tokenprune.pictures import MAX_PIXELS
from tokenprune.progress import ProgressCallback, silent

__all__ = [
    "HOST",
    "MODELS",
    "DemoRequest",
    "ServedPage",
    "run",
]


HOST = "127.0.0.1"


MODELS = ("testbed-next", "testbed-onevision", "testbed-qwen")


METHODS = ("globalcom2", "fastv", "uniform")


@dataclass(frozen=True, kw_only=True)
class DemoRequest:
    """What to serve.

    Attributes:
        models: Models that the page offers, as for `tokenprune.load`.
        methods: Specs that the page begins with, two to four.
        device: None for CUDA if there is a GPU, otherwise the CPU.
        dtype: As in `tokenprune.load`.
        trust_remote_code: As in `tokenprune.load`.
        max_new_tokens: Maximum length of an answer.
        max_image_pixels: Number of pixels of the largest image or video; None for
            `tokenprune.pictures.MAX_PIXELS`.
        host: Address to listen on.  The default can be reached from this machine alone.
        port: None for the first free port from 7860 on.
    """

    models: Sequence[str] = MODELS
    methods: Sequence[str] = METHODS
    device: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False
    max_new_tokens: int = 8
    max_image_pixels: int | None = None
    host: str = HOST
    port: int | None = None

    def loading(self) -> dict[str, Any]:
        """The arguments of `tokenprune.load` that differ from its defaults."""
        given: dict[str, Any] = {}
        if self.device is not None:
            given["device"] = self.device
        if self.dtype != "auto":
            given["dtype"] = self.dtype
        if self.trust_remote_code:
            given["trust_remote_code"] = True
        return given


class ServedPage:
    """A page that is being served.

    Attributes:
        url: Its address.
        answerer: The models behind it.
        close: Stops serving and deletes what was uploaded.
    """

    def __init__(self, url: str, answerer: Answerer, stop: Callable[[], None]) -> None:
        self.url = url
        self.answerer = answerer
        self.close = stop

    def wait(self) -> None:
        """Block until an exception, such as that of Ctrl-C."""
        threading.Event().wait()


def run(request: DemoRequest, progress: ProgressCallback = silent) -> ServedPage:
    """Load the models and serve the page.

    Raises:
        UserError: Gradio is not installed, a number or a method is invalid, a model cannot be
            loaded or has no language model, or the address is taken.
    """
    for name in ("max_new_tokens", "max_image_pixels", "port"):
        check_number(name, getattr(request, name))
    chosen(request.methods, 0.5)
    if not find_spec("gradio"):
        raise UserError(
            "tokenprune demo needs Gradio, which is not installed; run pip install -e '.[demo]'."
        )
    models = {}
    for name in dict.fromkeys(request.models):
        asked = ModelRequest(
            model=name,
            device=request.device,
            dtype=request.dtype,
            trust_remote_code=request.trust_remote_code,
        )
        if name.startswith("timm/"):
            raise UserError(f"{name} has no language model to answer; use tokenprune masks.")
        models[name] = load_model(asked, progress)
    progress(0, 0, "starting the page")
    answerer = Answerer(models, request.max_new_tokens)
    limit = MAX_PIXELS if request.max_image_pixels is None else request.max_image_pixels
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="tokenprune-demo-"))
        stack.enter_context(_uploads_in(folder))
        from tokenprune.experiments.demo.page import build, serve

        blocks = build(answerer, request.methods, request.loading(), limit)
        url = serve(blocks, request.host, request.port)
        stack.callback(blocks.close, verbose=False)
        return ServedPage(url, answerer, stack.pop_all().close)


@contextmanager
def _uploads_in(folder: str) -> Iterator[None]:
    """While open, pages store uploads in ``folder``."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    os.environ["GRADIO_TEMP_DIR"] = folder
    try:
        yield
    finally:
        del os.environ["GRADIO_TEMP_DIR"]
        if before is not None:
            os.environ["GRADIO_TEMP_DIR"] = before
