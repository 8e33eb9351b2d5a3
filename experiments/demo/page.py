"""The page itself, made with Gradio.

Nothing leaves the machine: analytics, shared links, fonts of a CDN and the programming interface
are off.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from tokenprune.compatibility import compatible_methods
from tokenprune.errors import UserError
from tokenprune.experiments.common.setting import testbed_note
from tokenprune.experiments.demo.answers import MOST, Answerer, chosen
from tokenprune.experiments.demo.cards import cards, listing, refusal
from tokenprune.experiments.demo.recipe import Recipe
from tokenprune.experiments.demo.source import SCENES, SUFFIXES, Source, scene
from tokenprune.models import testbed

__all__ = ["build", "serve"]


_FILE_SIZE = "20mb"  # of an upload


_KEPT = 3600  # seconds until an upload is deleted


_QUESTION = 2000  # characters


_WAITING = 32  # requests in the queue


_COPY = """() => {
  const area = document.createElement("textarea");
  area.value = document.querySelector("#%s pre").textContent;
  document.body.appendChild(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}"""
"""Copies the text of a box.  ``navigator.clipboard`` exists only on loopback and under HTTPS."""


@dataclass(frozen=True)
class _Page:
    """What the handlers of the page need.

    Attributes:
        answerer: The models.
        loading: Arguments of `tokenprune.load` that differ from its defaults.
        limit: Number of pixels of the largest image or video.
    """

    answerer: Answerer
    loading: dict[str, Any] = field(default_factory=dict)
    limit: int = 0

    def show(
        self,
        model: str,
        number: int,
        files: Sequence[str] | None,
        as_video: bool,
        question: str,
        specs: Sequence[str],
        retention: float,
    ) -> tuple[str, str, str]:
        """The cards, the Python lines and the command; or a sentence and no lines."""
        source = Source(tuple(map(Path, files or ())), number, as_video, self.limit)
        try:
            compressors = chosen(specs, retention)
            answers = self.answerer.answers(model, source, question, compressors)
        except UserError as error:
            return refusal(_sentence(str(error))), "", ""
        recipe = Recipe(
            model,
            source,
            answers.clip,
            question,
            compressors,
            self.answerer.max_new_tokens,
            self.loading,
        )
        hint, truth = "", None
        if files and model in testbed.names():
            hint = f"{testbed_note(model)}; choose another model."
        elif not files and question == scene(number).question:
            truth = scene(number).answer
        return cards(answers, truth, hint), listing(recipe.python), listing(recipe.command)

    def known(self, model: str) -> list[str]:
        """The methods that the model can run."""
        return compatible_methods(self.answerer.models[model].adapter.facts)

    def methods(self, model: str) -> Any:
        """The list of methods to choose from."""
        return gr.Dropdown(choices=self.known(model))


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _choose(event: gr.SelectData) -> tuple[int, None, str]:
    """The number of the scene, no uploaded file, and the scene's question."""
    number = int(event.index)
    return number, None, scene(number).question


def build(
    answerer: Answerer, methods: Sequence[str], loading: dict[str, Any], limit: int
) -> gr.Blocks:
    """The page, not served yet.

    Args:
        answerer: The models.
        methods: Specs that the page begins with.
        loading: Arguments of `tokenprune.load` that differ from its defaults, for the Python lines.
        limit: Number of pixels of the largest image or video.
    """
    page = _Page(answerer, loading, limit)
    with gr.Blocks(
        title="tokenprune demo", analytics_enabled=False, delete_cache=(_KEPT, _KEPT)
    ) as blocks:
        gr.Markdown(
            "# tokenprune\nWhat each method keeps of an image, what it costs, and what the model "
            "then answers.",
            elem_classes="tp-head",
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=340):
                fields = _fields(page, methods)
            with gr.Column(scale=5, min_width=480):
                fields["retention"] = gr.Slider(
                    0.01, 1, 0.25, step=0.01, buttons=[], elem_id="tp-retention",
                    label="Retention ratio: share of the patch tokens to keep",
                )  # fmt: skip
                shown = gr.HTML(elem_id="tp-shown", padding=False)
                with gr.Accordion("Reproduce what is shown", open=False, elem_id="tp-recipe"):
                    boxes = [
                        _box("tp-python", "Copy the Python lines"),
                        _box("tp-command", "Copy the command"),
                    ]
        _connect(page, blocks, fields, [shown, *boxes])
    return blocks


def _fields(page: _Page, methods: Sequence[str]) -> dict[str, Any]:
    """The fields on the left, by the names of the arguments of `_Page.show`."""
    names = list(page.answerer.models)
    fields: dict[str, Any] = {"number": gr.State(0)}
    fields["model"] = gr.Dropdown(names, value=names[0], label="Model", elem_id="tp-model")
    fields["scenes"] = gr.Gallery(
        [scene(index).images[0].open() for index in range(len(SCENES))],
        label="Scenes of the testbed", show_label=False, columns=4, object_fit="contain",
        format="png", allow_preview=False, selected_index=0, interactive=False, buttons=[],
        elem_id="tp-scenes",
    )  # fmt: skip
    fields["files"] = gr.File(
        label="Or your own: images, or an animated GIF", file_count="multiple",
        file_types=list(SUFFIXES), height=140, elem_id="tp-files",
    )  # fmt: skip
    fields["as_video"] = gr.Checkbox(
        label="The images are the frames of one video", elem_id="tp-video"
    )
    fields["question"] = gr.Textbox(
        scene(0).question, label="Question", max_length=_QUESTION, elem_id="tp-question"
    )
    fields["specs"] = gr.Dropdown(
        page.known(names[0]), value=list(methods), multiselect=True, allow_custom_value=True,
        max_choices=MOST, label="Two to four methods", elem_id="tp-methods",
        info="Or type a spec, such as fastv:layer=3 or uniform@0.5 + fastv@0.5.",
    )  # fmt: skip
    return fields


def _connect(page: _Page, blocks: gr.Blocks, fields: dict[str, Any], outputs: list[Any]) -> None:
    """Let the page answer whenever a field changes."""
    order = list(inspect.signature(page.show).parameters)
    asked = {
        "fn": page.show,
        "inputs": [fields[name] for name in order],
        "outputs": outputs,
        "api_visibility": "private",
        "trigger_mode": "always_last",  # what happens meanwhile is not forgotten
    }
    files, question = fields["files"], fields["question"]
    picked = fields["scenes"].select(
        _choose, None, [fields["number"], files, question],
        api_visibility="private", show_progress="hidden",
    )  # fmt: skip
    changed = fields["model"].change(
        page.methods, fields["model"], fields["specs"],
        api_visibility="private", show_progress="hidden",
    )  # fmt: skip
    for event in (picked, changed):
        event.then(show_progress="minimal", **asked)
    events = [blocks.load, files.upload, files.clear, files.delete, fields["as_video"].input]
    gr.on([*events, question.submit, question.blur], show_progress="minimal", **asked)
    gr.on([fields["retention"].input, fields["specs"].change], show_progress="hidden", **asked)


def _box(name: str, label: str) -> gr.HTML:
    """A box for a text, and a button that copies the text."""
    box = gr.HTML(elem_id=name, padding=False)
    button = gr.Button(label, size="sm", elem_id=f"{name}-copy")
    button.click(None, None, None, js=_COPY % name, api_visibility="private")
    return box


def serve(blocks: gr.Blocks, host: str, port: int | None) -> str:
    """Serve the page in threads, and return its address.

    Raises:
        UserError: The address is taken or not one of this machine.
    """
    theme = gr.themes.Default(
        primary_hue="indigo",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    )
    blocks.queue(max_size=_WAITING, default_concurrency_limit=1, api_open=False)
    try:
        with _without_proxy(host):
            _, url, _ = blocks.launch(
                server_name=host,
                server_port=port,
                share=False,
                inbrowser=False,
                prevent_thread_lock=True,
                quiet=True,
                show_error=True,
                max_file_size=_FILE_SIZE,
                allowed_paths=[],
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
                theme=theme,
                css_paths=Path(__file__).with_name("style.css"),
            )
    except OSError as error:
        where = f"{host}:{port}" if port else host
        raise UserError(
            f"cannot serve the page at {where} ({error}); choose another --port or --host."
        ) from error
    return str(url)


@contextmanager
def _without_proxy(host: str) -> Iterator[None]:
    """While open, requests to the page itself bypass a proxy."""
    before = {name: os.environ.get(name) for name in ("no_proxy", "NO_PROXY")}
    for name, value in before.items():
        os.environ[name] = ",".join(filter(None, (value, host, "localhost")))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
