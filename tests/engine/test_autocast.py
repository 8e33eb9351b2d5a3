"""Under ``torch.autocast`` every method runs and selects the same tokens."""

from __future__ import annotations

import pytest
import torch
from families import full_hosts
from torch import Tensor

import tokenprune as tp
from tokenprune.compatibility import check_compatible
from tokenprune.compressor import Compressor
from tokenprune.encoder import EncoderTokens, Reduction
from tokenprune.engine.session import compress
from tokenprune.errors import UserError
from tokenprune.layout import TokenLayout
from tokenprune.precision import autocasts, like_now
from tokenprune.signals import Signal
from tokenprune.spec import create, parse
from tokenprune.strategies.tome import ToMe
from tokenprune.synthetic import sample_tokens
from tokenprune.testing.host import Host
from tokenprune.tokens import VisualTokens

pytestmark = pytest.mark.filterwarnings("ignore::tokenprune.errors.RetentionWarning")

CPU = torch.device("cpu")
METHODS = [
    *tp.list_methods(),
    "cdpruner:relevance=text",
    "cdpruner:relevance=none",
    "sparsevlm:version=2.0",
    "globalcom2@0.6 + fastv@0.6",
    "tome@0.6 + pact@0.6",
]
each_method = pytest.mark.parametrize("spec", METHODS)


def _method(spec: str) -> Compressor:
    if "@" in spec:
        return parse(spec)
    return parse(spec, retention=0.4)


@pytest.fixture(scope="module", params=[host.name for host in full_hosts(["qwen2"])])
def host(request: pytest.FixtureRequest) -> Host:
    return Host.tiny(request.param, "qwen2")


@each_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_method_runs(host: Host, spec: str, dtype: torch.dtype) -> None:
    method = _method(spec)
    try:
        check_compatible(host.adapter.facts, method)
    except UserError as error:
        pytest.skip(str(error))
    with torch.autocast("cpu", dtype), compress(host.model, method) as trace, torch.no_grad():
        assert host.model(**host.inputs()).logits.isfinite().all()
        assert trace.selections


@each_method
def test_a_selection_does_not_depend_on_autocast(spec: str) -> None:
    """In half precision, the products of a ranking would tie or change their order."""
    layout = TokenLayout.anyres((2, 2), (8, 8), (0, 16, 0, 16))
    for part in _method(spec).parts():
        tokens = sample_tokens(part.needs, layout, seed=3)
        for one in map(part.at, part.cuts or (0,)):
            wanted = one(tokens)
            with torch.autocast("cpu", torch.bfloat16):
                got = one(tokens)
            assert torch.equal(got.keep, wanted.keep)


def test_merging_in_the_encoder_is_selected_outside_autocast(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, reduce = [], ToMe.reduce

    def watched(self: ToMe, tokens: EncoderTokens) -> Reduction | None:
        seen.append(autocasts(CPU))
        return reduce(self, tokens)

    monkeypatch.setattr(ToMe, "reduce", watched)
    with torch.autocast("cpu", torch.bfloat16), compress(host.model, "tome", retention=0.5):
        host.model(**host.inputs([0]))
    assert seen
    assert not any(seen)


def test_signals_of_the_tower_are_products_in_float32(host: Host) -> None:
    """Queries and keys are the model's, in half precision; their products are not."""
    adapter, images = host.adapter, host.media(0)["image"]
    with (
        torch.autocast("cpu", torch.bfloat16),
        compress(host.model, create("holitom", retention=0.5)),
        adapter.tap(-1) as tapped,
        torch.no_grad(),
    ):
        (feature,) = adapter.base.get_image_features(**images).pooler_output
    assert tapped.query is not None
    assert tapped.query.dtype == torch.bfloat16
    query, key = tapped.split()
    attention = (query @ key.mT * tapped.scale).softmax(-1).mean((1, 2))
    maps = attention[:, adapter.facts.vision.prefix_tokens :, None]
    (wanted,) = adapter.pack([maps], images, "image")
    got = feature.visual.signals[Signal("received", -1)]
    torch.testing.assert_close(got, wanted[:, 0], rtol=1e-5, atol=1e-6, equal_nan=True)


def test_the_model_itself_runs_under_autocast() -> None:
    """Merged vectors pass the projector like all others."""
    line = torch.nn.Linear(4, 4)
    seen: list[Tensor] = []
    line.register_forward_hook(lambda module, args, output: seen.append(output))
    layout = TokenLayout.single((2, 2), newline=False)
    vectors = Signal("unprojected")
    tokens = VisualTokens(layout, torch.ones(4, 4), {vectors: torch.ones(4, 4)}, projector=line)

    class Mean(type(create("uniform", retention=0.5))):  # type: ignore[misc]
        def select(self, tokens: VisualTokens) -> tp.Selection:
            assert not autocasts(CPU)
            keep = torch.tensor([0, 1])
            return tp.Selection(keep, tokens.project(tokens[vectors][keep]))

    with torch.autocast("cpu", torch.bfloat16):
        Mean(retention=0.5)(tokens)
        assert like_now(line, CPU)(torch.ones(1, 4)).dtype == torch.bfloat16
    assert seen[0].dtype == torch.bfloat16
