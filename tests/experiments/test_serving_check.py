"""The check of a server, with a stand-in for the server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image

from tokenprune.errors import UserError
from tokenprune.experiments.common.questions import held_out
from tokenprune.experiments.serving_check import server
from tokenprune.experiments.serving_check.command import _table
from tokenprune.experiments.serving_check.run import Checked, CheckRequest, _compared, malformed
from tokenprune.experiments.serving_check.server import (
    Reply,
    Server,
    embeds_part,
    image_part,
    running,
)
from tokenprune.progress import silent

REQUEST = CheckRequest("testbed-next", "uniform@0.5", questions=3, clients=2)
RIGHT = Reply((5, 2), 0.75, 33)


class _Fake:
    """Answers as told, and refuses malformed embeddings if told to."""

    is_alive, block_size = True, 16

    def __init__(self, *replies: Reply, refuses: bool = True) -> None:
        self.replies, self.refuses = replies, refuses

    def ask(self, image: dict[str, Any], question: str, max_new_tokens: int) -> Reply:
        if "index" in image:
            return self.replies[image["index"]]
        if self.refuses:
            raise UserError("the server answers 400")
        return RIGHT


def _row(fake: Any) -> dict[str, Any]:
    parts = [{"index": index} for index in range(3)]
    return _compared(fake, [RIGHT] * 3, held_out(3, 0), parts, 8, REQUEST)


def _checked(row: dict[str, Any]) -> Checked:
    return Checked(pd.DataFrame([{"served": "uniform@0.5", **row}]), "in the server.")


def test_equal_answers_pass() -> None:
    row = _row(_Fake(RIGHT, RIGHT, RIGHT))
    assert (row["same_ids"], row["same_prompts"], row["malformed"]) == (3, 3, row["sent"])
    assert (row["prompt"], row["blocks"], row["probability"]) == (33, 3, 0)
    assert _checked(row).passed
    assert _table("testbed-next", _checked(row)).row_count == 1


@pytest.mark.parametrize(
    "fake",
    [
        _Fake(RIGHT, Reply((6, 2), 0.75, 33), RIGHT),
        _Fake(RIGHT, RIGHT, Reply((5, 2), 0.75, 34)),
        _Fake(RIGHT, RIGHT, RIGHT, refuses=False),
    ],
    ids=["other ids", "other length", "takes malformed embeddings"],
)
def test_a_difference_fails(fake: _Fake) -> None:
    assert not _checked(_row(fake)).passed


def test_the_difference_of_probabilities_is_the_largest() -> None:
    row = _row(_Fake(RIGHT, Reply((5, 2), 0.5, 33), Reply((5, 2), 0.8, 33)))
    assert row["probability"] == pytest.approx(0.25)


def test_malformed_embeddings_are_of_every_kind() -> None:
    assert len({part["uuid"] for part in malformed(8)}) == 6


class _Handler(BaseHTTPRequestHandler):
    asked: list[Any] = []  # noqa: RUF012  # of all instances

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        bad = body["max_tokens"] == 99
        tokens = [{"logprob": -0.6931471805599453}]
        choice = {"token_ids": [7, 2], "logprobs": {"content": tokens}}
        said = {"error": "no"} if bad else {"choices": [choice], "prompt_token_ids": [1, 2, 3]}
        self._reply(400 if bad else 200, json.dumps(said))

    def do_GET(self) -> None:
        self._reply(200, 'vllm:cache_config_info{block_size="128"} 1.0')

    def _reply(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def there() -> Iterator[Server]:
    with HTTPServer(("127.0.0.1", 0), _Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield Server(f"http://127.0.0.1:{listening.server_port}")
        listening.shutdown()


def test_requests(there: Server) -> None:
    reply = there.ask(image_part(Image.new("RGB", (3, 2))), "What?", 4)
    assert (reply.ids, reply.prompt) == ((7, 2), 3)
    assert reply.probability == pytest.approx(0.5)
    assert there.block_size == 128
    assert there.is_alive
    content = _Handler.asked[-1]["messages"][0]["content"]
    assert content[0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert content[1] == {"type": "text", "text": "What?"}
    with pytest.raises(UserError, match=r"answers 400: .*no"):
        there.ask(embeds_part(torch.zeros(2, 4), "name"), "What?", 99)
    assert not Server("http://127.0.0.1:1").is_alive


def test_a_server_that_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'UserError: fastv cannot be served.'\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setattr(server.sys, "executable", str(script))
    with (
        pytest.raises(UserError, match="stopped while it started: UserError: fastv cannot"),
        running("m", "fastv@1", dtype="float32", longest=64, timeout=60, progress=silent),
    ):
        pass
