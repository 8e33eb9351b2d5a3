"""The texts in an exported folder."""

import json
import shlex
from collections.abc import Mapping
from typing import Any

from tokenprune.units import percent

__all__ = ["CLIENT_OF_EMBEDDINGS", "CLIENT_OF_IMAGES", "commands", "readme"]

CLIENT_OF_IMAGES = '''\
"""Ask the server about an image:  python client.py photo.jpg "What is shown?" """

import base64
import json
import sys
import urllib.request

URL = "http://127.0.0.1:8000/v1/chat/completions"

path, question = sys.argv[1:]
with open(path, "rb") as file:
    image = "data:image;base64," + base64.b64encode(file.read()).decode()
content = [
    {"type": "image_url", "image_url": {"url": image}},
    {"type": "text", "text": question},
]
body = {"model": "model", "messages": [{"role": "user", "content": content}], "max_tokens": 256}
header = {"Content-Type": "application/json"}
request = urllib.request.Request(URL, json.dumps(body).encode(), header)
with urllib.request.urlopen(request) as reply:
    print(json.load(reply)["choices"][0]["message"]["content"])
'''

CLIENT_OF_EMBEDDINGS = '''\
"""Encode an image here, and ask the server:  python client.py photo.jpg "What is shown?" """

import base64
import io
import json
import sys
import urllib.request

import torch

import tokenprune as tp
from tokenprune.serving import fingerprint, image_embeds, uuid

URL = "http://127.0.0.1:8000/v1/chat/completions"
MODEL = @MODEL@
SPEC = @SPEC@

path, question = sys.argv[1:]
pipe = tp.load(MODEL)
(embeds,) = image_embeds(pipe, [path], SPEC)
file = io.BytesIO()
torch.save(embeds.cpu(), file)
content = [
    {
        "type": "image_embeds",
        "image_embeds": base64.b64encode(file.getvalue()).decode(),
        "uuid": uuid(path, SPEC, fingerprint(pipe)),
    },
    {"type": "text", "text": question},
]
body = {"model": "model", "messages": [{"role": "user", "content": content}], "max_tokens": 256}
header = {"Content-Type": "application/json"}
request = urllib.request.Request(URL, json.dumps(body).encode(), header)
with urllib.request.urlopen(request) as reply:
    print(json.load(reply)["choices"][0]["message"]["content"])
'''


def commands(model: str, spec: str, inside: bool) -> tuple[str, str]:
    """The command that installs the plug-in, and the one that starts the server.

    Args:
        model: What vLLM loads.
        spec: The method with its retention.
        inside: Whether the server compresses the images itself.
    """
    words = ["vllm", "serve", model, "--served-model-name", "model"]
    if inside:
        words += ["--hf-overrides", json.dumps({"tokenprune": spec})]
    else:
        words.append("--enable-mm-embeds")
    return "pip install 'tokenprune[vllm]'", shlex.join(words)


def readme(about: Mapping[str, Any]) -> str:
    """The page of the folder; ``about`` as in ``serving.json``."""
    measured, plain = about["measured"], about["uncompressed"]
    cost = measured["flops"] / plain["flops"]
    low, high = percent(measured["accuracy_low"], 1), percent(measured["accuracy_high"], 1)
    install, start = about["commands"]
    return f"""\
# {about["spec"]} on {about["model"]}

| | uncompressed | {about["spec"]} |
|---|---|---|
| accuracy in % of {measured["n"]} questions | {percent(plain["accuracy"], 1)} | \
{percent(measured["accuracy"], 1)} ({low} to {high}) |
| visual tokens of an image | {plain["visual_tokens"]:.1f} | {measured["visual_tokens"]:.1f} |
| FLOPs of the decoder in % | 100 | {percent(cost, 0)} |

Measured in Hugging Face with the versions in `serving.json`. `tokenprune serving-check` compares a
server with Hugging Face.

Images are compressed {about["way"]}

```bash
{install}
{start}
```

```bash
python client.py photo.jpg "What is shown?"
```
"""
