"""``tokenprune demo``: a page to try methods on one image."""

from __future__ import annotations

from typing import Annotated

import typer

from tokenprune.console import OK, ManyValues, app, as_exit_status, complete_word, progress, quiet
from tokenprune.experiments.common import options
from tokenprune.models import testbed
from tokenprune.plugins import import_plugins
from tokenprune.spec import method_specs

__all__ = ["demo"]


_Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        metavar="MODEL...",
        help="Models that the page offers: testbeds, Hugging Face Hub ids or local folders. "
        "[default: both testbeds]",
        autocompletion=complete_word(*testbed.names()),
    ),
]


_Methods = Annotated[
    list[str] | None,
    options.methods("Two to four methods to begin with.", "globalcom2 fastv uniform"),
]


_Host = Annotated[
    str,
    typer.Option(
        metavar="ADDRESS",
        help="Address to listen on. Any other than the default lets others use the page: it has no "
        "password.",
    ),
]


_Port = Annotated[
    int | None, typer.Option(metavar="N", help="[default: the first free one from 7860 on]")
]


@app.command(cls=ManyValues)
def demo(
    model: _Models = None,
    methods: _Methods = None,
    plugin: options.Plugin = None,
    max_image_pixels: options.MaxImagePixels = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    max_new_tokens: options.MaxNewTokens = 8,
    host: _Host = "127.0.0.1",
    port: _Port = None,
) -> None:
    """Serve a page to try methods on one image or video.

    Masks, answers, kept tokens and costs stand side by side, and follow a slider. Only this machine
    can open the page. It needs the extra: pip install -e '.[demo]'.

    Exit status: 0 stopped with Ctrl-C, 2 bad input.
    """
    with as_exit_status():
        import_plugins(plugin)
        from tokenprune.experiments.demo.run import METHODS, MODELS, DemoRequest, run

        quiet()
        request = DemoRequest(
            models=tuple(model or MODELS),
            methods=tuple(method_specs(methods)) if methods else METHODS,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            max_new_tokens=max_new_tokens,
            max_image_pixels=max_image_pixels,
            host=host,
            port=port,
        )
        with progress() as bar:
            page = run(request, bar)
        options.stoppable()
        typer.echo(f"Open {page.url} in a browser. Ctrl-C stops the page.")
        try:
            page.wait()
        except KeyboardInterrupt:
            typer.echo("Stopped.")
        finally:
            page.close()
    raise typer.Exit(OK)
