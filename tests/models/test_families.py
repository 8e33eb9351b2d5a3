"""The contract on the families outside `families.FULL`.

Every method runs in every family, but not every check: three methods get all of them, one for each
stage and kind of signal (no signal, the vision encoder, the decoder).  The others get the reference
built by hand, at prefill and at every decode step, and one more check, drawn with a fixed seed.
"""

from __future__ import annotations

import random

import pytest
import torch
from families import FULL
from samples import drawn

import tokenprune as tp
from tokenprune.engine.session import compress
from tokenprune.forecast import forecast
from tokenprune.spec import create, parse
from tokenprune.testing.asserting import Check
from tokenprune.testing.host import RETENTION, ROWS, Host, example, hosts, refusal
from tokenprune.testing.model_checks import check_equals_reference
from tokenprune.testing.runner import MODEL_CHECKS, run

pytestmark = pytest.mark.filterwarnings("ignore::tokenprune.errors.RetentionWarning")

HOSTS = {host.name: host for host in hosts(["llama"]) if host.name not in FULL}
WHOLE = ("uniform", "globalcom2", "fastv")
SLOW = {"check_threads", "check_compiled", "check_beams_agree", "check_labels"}


@pytest.mark.parametrize(
    ("check", "method", "family"),
    drawn(0.5, MODEL_CHECKS, WHOLE, HOSTS),
    ids=lambda one: getattr(one, "__name__", one),
)
def test_all_checks(family: str, method: str, check: Check) -> None:
    run(check, create(method, retention=RETENTION), [HOSTS[family]])


@pytest.mark.parametrize("method", [name for name in tp.list_methods() if name not in WHOLE])
@pytest.mark.parametrize("family", HOSTS)
def test_every_method(family: str, method: str) -> None:
    host, compressor = HOSTS[family], example(method)
    if refusal(host, compressor):
        pytest.skip(refusal(host, compressor))
    others = [check for check in MODEL_CHECKS if check.__name__ not in SLOW]
    for check in (check_equals_reference, random.Random(family + method).choice(others)):
        run(check, compressor, [host])


@pytest.mark.parametrize("decoder", ["mistral", "qwen2"])
@pytest.mark.parametrize("family", HOSTS)
def test_other_decoders(family: str, decoder: str) -> None:
    host = Host.tiny(family, decoder)
    for spec in ("globalcom2", "fastv", "globalcom2@0.6 + fastv@0.6"):
        fields = {} if "@" in spec else {"retention": RETENTION}
        run(check_equals_reference, parse(spec, **fields), [host])


@pytest.mark.parametrize("method", ["uniform", "globalcom2", "fastv", "visionzip"])
@pytest.mark.parametrize("family", HOSTS)
def test_the_forecast_is_the_ledger(family: str, method: str) -> None:
    host, compressor = HOSTS[family], create(method, retention=RETENTION)
    layouts = host.layouts(0)
    with compress(host.model, compressor) as trace, torch.no_grad():
        host.model(**host.inputs([0]), use_cache=True)
    real = trace.ledger
    made = forecast(host.model, compressor, layouts, real.text_tokens, asking=ROWS[0].text, size=4)
    assert made.ledger.visual_per_layer == real.visual_per_layer
    assert made.ledger.flops == pytest.approx(real.flops)
    assert made.ledger.selector_bytes == real.selector_bytes
    assert made.ledger.vision_flops == real.vision_flops
