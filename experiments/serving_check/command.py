"""``tokenprune serving-check``: Hugging Face and a vLLM server, on the same questions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from tokenprune.console import (
    FAILED,
    OK,
    app,
    as_exit_status,
    complete_method,
    new_table,
    progress,
    quiet,
)
from tokenprune.experiments.common import options

if TYPE_CHECKING:
    from tokenprune.experiments.serving_check.run import Checked

__all__ = ["serving_check"]


_Spec = Annotated[
    str,
    typer.Argument(
        help="A method with its retention, such as fastervlm@0.25.", autocompletion=complete_method
    ),
]


_Clients = Annotated[int, typer.Option(metavar="N", help="Number of requests at once.")]


_Timeout = Annotated[
    float, typer.Option(metavar="SECONDS", help="Time within which a server must have started.")
]


@app.command("serving-check")
def serving_check(
    model: Annotated[str, typer.Argument(help="Embedded testbed, Hub id or local folder.")],
    spec: _Spec,
    questions: Annotated[int, typer.Option(help="Number of held-out questions.")] = 40,
    clients: _Clients = 8,
    timeout: _Timeout = 600,
    seed: options.Seed = 0,
    max_new_tokens: options.MaxNewTokens = 8,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Check that a vLLM server gives the answers of Hugging Face.

    Starts vLLM on this machine, first plain, then with the method, asks both the same questions
    from several clients at once, and sends malformed embeddings in between. Compares token ids, the
    probability of the first token, prompt lengths, blocks of the KV cache, and requests a second.

    Exit status: 0 all the same, 1 an answer or a length differs or the server took malformed
    embeddings, 2 bad input.
    """
    with as_exit_status():
        from tokenprune.experiments.serving_check.run import CheckRequest, run

        quiet()
        request = CheckRequest(
            model=model,
            spec=spec,
            questions=questions,
            seed=seed,
            max_new_tokens=max_new_tokens,
            clients=clients,
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            timeout=timeout,
        )
        options.stoppable()  # so that the server stops too
        with progress() as bar:
            checked = run(request, bar)
        Console().print(_table(model, checked))
    raise typer.Exit(OK if checked.passed else FAILED)


_COLUMNS = ("ids", "max |Δp|", "length", "prompt", "blocks", "req/s", "refused")

_CAPTION = """\
ids, length: questions with the token ids and the prompt length of Hugging Face
max |Δp|: largest difference of the probability of an answer's first token
prompt, blocks: mean number of tokens, and of KV blocks of {size} tokens
refused: malformed embeddings
Images are compressed {way}"""


def _table(model: str, checked: Checked) -> Table:
    size = checked.table["block_size"].iloc[0]
    table = new_table(
        "served",
        title=f"{model} in Hugging Face and in vLLM",
        caption=_CAPTION.format(size=size, way=checked.way),
    )
    table.columns[0].no_wrap = True
    for heading in _COLUMNS:
        table.add_column(heading, justify="right")
    for row in checked.table.itertuples():
        table.add_row(
            row.served,
            f"{row.same_ids}/{row.questions}",
            f"{row.probability:.1e}",
            f"{row.same_prompts}/{row.questions}",
            f"{row.prompt:.1f}",
            f"{row.blocks:.1f}",
            f"{row.rate:.1f}",
            f"{row.malformed}/{row.sent}",
        )
    return table
