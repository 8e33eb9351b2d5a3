"""Compiled code, threads, copies, and forwards that bypass the hooks of a context."""

from __future__ import annotations

import contextvars
import copy
import io
import pickle
import threading
import types
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenprune as tp
from tokenprune.engine.cache import CACHE
from tokenprune.engine.vision import encode as run_encoder
from tokenprune.errors import UserError
from tokenprune.signals import Signal
from tokenprune.testing.host import Host

pytestmark = pytest.mark.filterwarnings("ignore:this model or a part of it was compiled")

METHODS = ("uniform", "fastv", "tome")  # one of each stage


class Expected:
    """What an untouched model computes on one batch, plain and compressed."""

    def __init__(self) -> None:
        torch.set_num_threads(1)  # as in the tests, so that numbers are the same to the last bit
        host = Host.tiny("LLaVA-NeXT")
        self.inputs = host.inputs()
        self.plain = host.logits(self.inputs)
        self.compressed: dict[str, tuple[Tensor, list[Any]]] = {}
        for method in METHODS:
            with tp.compress(host.model, method, retention=0.4) as trace:
                logits = host.logits(self.inputs)
            assert not torch.allclose(logits, self.plain, atol=1e-2)
            self.compressed[method] = logits, kept(trace)

    def check(self, method: str, logits: Tensor, trace: tp.Trace) -> None:
        want, selections = self.compressed[method]
        torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-5)
        assert kept(trace) == selections


@pytest.fixture(scope="module")
def expected() -> Expected:
    return Expected()


def kept(trace: tp.Trace) -> list[Any]:
    return [(one.row, one.layer, one.keep.tolist()) for one in trace.selections]


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Any], **options: Any) -> Tensor:
    found: Tensor = model(**inputs, **options).logits
    return found


# -- compiled code -------------------------------------------------------------------------------


def _module(path: str) -> Callable[[nn.Module], Any]:
    return lambda model: model.get_submodule(path).compile(backend="eager")


def _wrapped(path: str) -> Callable[[nn.Module], Any]:
    def change(model: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        compiled = torch.compile(model.get_submodule(path), backend="eager")
        setattr(model.get_submodule(parent), name, compiled)

    return change


def _function(path: str, name: str = "forward") -> Callable[[nn.Module], Any]:
    def change(model: nn.Module) -> None:
        module = model.get_submodule(path)
        setattr(module, name, torch.compile(getattr(module, name), backend="eager"))

    return change


COMPILED = {
    "model": _module(""),
    "model.forward": _function(""),
    "base": _module("model"),
    "decoder": _module("model.language_model"),
    "a layer": _module("model.language_model.layers.2"),
    "a layer's forward": _function("model.language_model.layers.2"),
    "an attention": _module("model.language_model.layers.1.self_attn"),
    "tower": _module("model.vision_tower"),
    "get_image_features": _function("model", "get_image_features"),
    "wrapped decoder": _wrapped("model.language_model"),
    "a wrapped layer": _wrapped("model.language_model.layers.2"),
    "wrapped tower": _wrapped("model.vision_tower"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("what", COMPILED)
def test_compiled_before_the_context(
    host: Host, expected: Expected, what: str, method: str
) -> None:
    COMPILED[what](host.model)
    with tp.compress(host.model, method, retention=0.4) as trace:
        expected.check(method, logits(host.model, expected.inputs), trace)


@pytest.mark.parametrize("what", COMPILED)
def test_compiled_inside_the_context(host: Host, expected: Expected, what: str) -> None:
    with tp.compress(host.model, "fastv", retention=0.4) as trace:
        COMPILED[what](host.model)
        if what == "a wrapped layer":  # another module than the one with the hooks
            with pytest.raises(UserError, match="got past the hooks"):
                logits(host.model, expected.inputs)
        else:
            expected.check("fastv", logits(host.model, expected.inputs), trace)


@pytest.mark.parametrize("what", ["a layer", "a layer's forward", "an attention", "tower"])
def test_captured_without_hooks_before_the_context(expected: Expected, what: str) -> None:
    """The graph was captured without hooks, and dynamo does not check for them."""
    host = Host.tiny("LLaVA-NeXT")
    COMPILED[what](host.model)
    with torch._dynamo.config.patch(recompile_limit=1000):  # type: ignore[attr-defined]
        logits(host.model, expected.inputs, use_cache=False)
    for method in METHODS:
        with tp.compress(host.model, method, retention=0.4) as trace:
            got = logits(host.model, expected.inputs, use_cache=False)
            expected.check(method, got, trace)


@pytest.mark.slow
def test_the_whole_model_captured_before_the_context(expected: Expected) -> None:
    host = Host.tiny("LLaVA-NeXT")
    compiled = torch.compile(host.model, backend="eager")
    torch.testing.assert_close(logits(compiled, expected.inputs), expected.plain)
    for method in METHODS:
        with tp.compress(compiled, method, retention=0.4) as trace:
            expected.check(method, logits(compiled, expected.inputs), trace)
    torch.testing.assert_close(logits(compiled, expected.inputs), expected.plain)


def test_a_compiled_model_runs_eagerly_and_says_so(host: Host, expected: Expected) -> None:
    captured = []

    def backend(graph: Any, inputs: Any) -> Any:
        captured.append(graph)
        return graph.forward

    double = torch.compile(lambda x: 2 * x, backend=backend)
    COMPILED["a layer"](host.model)
    with (
        pytest.warns(UserWarning, match="was compiled.*runs eagerly") as caught,
        tp.compress(host.model, "uniform", retention=0.4),
    ):
        double(torch.ones(1))
    assert caught[0].filename == __file__
    assert not captured
    double(torch.ones(1))
    assert captured
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with tp.compress(Host.tiny("LLaVA-NeXT").model, "uniform", retention=0.4):
            pass


def test_contexts_may_overlap_in_any_order() -> None:
    """The first to open is the first to close; compiled code stays off until the last is closed."""
    captured = []

    def backend(graph: Any, inputs: Any) -> Any:
        captured.append(graph)
        return graph.forward

    def double(size: int) -> int:
        torch.compile(lambda x: 2 * x, backend=backend)(torch.ones(size))
        return len(captured)

    first, second = (
        tp.compress(Host.tiny("LLaVA-NeXT", seed=seed).model, "uniform", retention=0.4)
        for seed in (0, 1)
    )
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert double(2) == 0
    second.__exit__(None, None, None)
    assert double(3) == 1


def test_a_compiled_function_cannot_open_a_context(host: Host, expected: Expected) -> None:
    @torch.compile(backend="eager")
    def run() -> None:
        with tp.compress(host.model, "uniform", retention=0.4):
            pass

    with pytest.raises(UserError, match="open it around the call of that function"):
        run()
    with tp.compress(host.model, "uniform", retention=0.4) as trace:
        expected.check("uniform", logits(host.model, expected.inputs), trace)


def test_encoding_looks_into_a_compiled_tower(host: Host) -> None:
    call = host.adapter.dummy_images([(20, 30)])
    signal = frozenset({Signal("received")})
    (want,) = run_encoder(host.adapter, "image", call, signal, None)
    COMPILED["tower"](host.model)
    logits(host.model, host.inputs([0]))
    (got,) = run_encoder(host.adapter, "image", call, signal, None)
    torch.testing.assert_close(got.signals, want.signals, equal_nan=True)


# -- past the hooks ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_forward_may_be_called_by_name(host: Host, expected: Expected, method: str) -> None:
    labels = expected.inputs["input_ids"].clone()
    labels[:, :-2] = -100
    with tp.compress(host.model, method, retention=0.4) as trace:
        expected.check(method, logits(host.model.forward, expected.inputs), trace)
        with torch.no_grad():
            host.model(**expected.inputs, labels=labels)
            want = kept(trace)
            host.model.forward(**expected.inputs, labels=labels)
            assert kept(trace) == want
            hidden = host.model.model.forward(**expected.inputs).last_hidden_state
            expected.check(method, host.model.lm_head(hidden), trace)


def test_a_forward_that_the_user_replaced_is_kept(host: Host, expected: Expected) -> None:
    calls = []

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return type(self).forward(self, *args, **kwargs)

    mine = types.MethodType(forward, host.model)
    host.model.forward = mine
    with tp.compress(host.model, "fastv", retention=0.4) as trace:
        expected.check("fastv", logits(host.model, expected.inputs), trace)
    assert host.model.forward is mine
    other = types.MethodType(forward, host.model.model)
    with tp.compress(host.model, "fastv", retention=0.4) as trace:
        host.model.model.forward = other
        expected.check("fastv", logits(host.model, expected.inputs), trace)
    assert host.model.model.forward is other
    assert calls == [host.model, host.model, host.model.model]


def _exchanged(path: str) -> Callable[[nn.Module], None]:
    return lambda model: model.set_submodule(path, copy.deepcopy(model.get_submodule(path)))


def _unhooked(path: str) -> Callable[[nn.Module], None]:
    return lambda model: model.get_submodule(path)._forward_pre_hooks.clear()


def _captured(path: str) -> Callable[[nn.Module], None]:
    """A CUDA graph replays kernels without calling the modules."""

    def change(model: nn.Module) -> None:
        module = model.get_submodule(path)
        graph = copy.deepcopy(module)
        module.forward = lambda *args, **kwargs: graph(*args, **kwargs)

    return change


@pytest.mark.parametrize(
    ("method", "change"),
    [
        *(("fastv", _exchanged(f"model.language_model.layers.{index}")) for index in (1, 2, 3)),
        ("fastv", _exchanged("model.language_model.layers.1.self_attn")),
        ("uniform", _exchanged("model.language_model")),
        ("uniform", _exchanged("model")),
        ("uniform", _unhooked("model")),
        ("uniform", _unhooked("model.language_model")),
        ("fastv", _unhooked("model.language_model.layers.2")),
        ("fastv", _unhooked("model.language_model.layers.1.self_attn")),
        ("tome", _captured("model.vision_tower")),
        ("globalcom2", _captured("model.vision_tower")),
        ("uniform", _captured("model")),
        (None, _captured("model")),
        ("fastv", _captured("model.language_model")),
    ],
)
def test_a_forward_that_bypassed_the_hooks_is_refused(
    host: Host, method: str | None, change: Callable[[nn.Module], None]
) -> None:
    options = {"retention": 0.4} if method else {}
    with tp.compress(host.model, method, **options) as trace:
        change(host.model)
        with pytest.raises(UserError, match="got past the hooks on"):
            host.logits(host.inputs())
        assert not trace.selections


def test_a_replaced_encoder_is_refused(host: Host) -> None:
    base = host.model.model
    with tp.compress(host.model, "uniform", retention=0.4):
        base.get_image_features = types.MethodType(type(base).get_image_features, base)
        with pytest.raises(UserError, match="no image reached this forward"):
            host.logits(host.inputs())
        del base.get_image_features


def test_continuous_batching_is_refused(host: Host) -> None:
    class Paged:
        """A KV cache without layers."""

    with tp.compress(host.model, "uniform", retention=0.4):
        with pytest.raises(UserError, match=r"text-only.*model\.generate"):
            host.model.generate_batch(inputs=[[5, 6, 7]], max_new_tokens=2)
        with pytest.raises(UserError, match=r"Paged is not a KV cache of layers.*generate_batch"):
            host.logits(host.inputs([1]), **{CACHE: Paged()})


# -- threads -------------------------------------------------------------------------------------


def _member(call: Callable[..., Any], *args: Any) -> threading.Thread:
    return threading.Thread(target=contextvars.copy_context().run, args=(call, *args))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("method", [*METHODS, None])
def test_generations_in_threads_do_not_mix(host: Host, method: str | None, use_cache: bool) -> None:
    """The two generations alternate step by step."""
    found: dict[int, Any] = {}
    turns = threading.Barrier(2, timeout=30)

    def run(row: int, trace: tp.Trace) -> None:
        try:
            ids = host.generate(host.inputs([row]), use_cache=use_cache).tolist()
            found[row] = ids, kept(trace), trace.ledger
        except BaseException:
            turns.abort()
            raise

    def meet(*args: Any) -> None:
        turns.wait()

    with tp.compress(host.model, method, **({"retention": 0.4} if method else {})) as trace:
        for row in (0, 2):
            run(row, trace)
        alone = dict(found)
        found.clear()
        handle = host.adapter.decoder_layers[0].register_forward_pre_hook(meet)
        threads = [_member(run, row, trace) for row in (0, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        handle.remove()
    assert found == alone


def test_a_pool_of_threads(host: Host) -> None:
    def run(row: int) -> Any:
        return host.generate(host.inputs([row])).tolist()

    with ThreadPoolExecutor(4) as pool, tp.compress(host.model, "fastv", retention=0.4):
        alone = [run(row) for row in range(3)]
        work = [pool.submit(contextvars.copy_context().run, run, row) for row in (0, 1, 2, 2, 1)]
        assert [one.result() for one in work] == [alone[row] for row in (0, 1, 2, 2, 1)]


def test_the_trace_of_a_thread_that_ran_nothing_is_the_latest(host: Host) -> None:
    with tp.compress(host.model, "uniform", retention=0.4) as trace:
        thread = _member(host.logits, host.inputs([0]))
        thread.start()
        thread.join()
        assert [one.row for one in trace.selections] == [0]
        assert trace.ledger.requested == 0.4


def test_a_thread_outside_the_context_is_refused(host: Host, expected: Expected) -> None:
    """It is unknown whether the thread expects plain or compressed answers."""
    caught: list[BaseException] = []

    def run(call: Callable[[], Any]) -> None:
        try:
            call()
        except UserError as error:
            caught.append(error)

    base, plain = host.model.model, host.inputs([1])
    images = {name: expected.inputs[name] for name in ("pixel_values", "image_sizes")}
    calls = (
        lambda: host.logits(expected.inputs),
        lambda: host.generate(expected.inputs),
        lambda: host.logits(plain),
        lambda: host.model.forward(**plain),
        lambda: base.get_image_features(**images),
    )
    with tp.compress(host.model, "uniform", retention=0.4) as trace:
        want = logits(host.model, expected.inputs)
        for call in calls:
            thread = threading.Thread(target=run, args=(call,))
            thread.start()
            thread.join()
        expected.check("uniform", want, trace)
        expected.check("uniform", logits(host.model, expected.inputs), trace)
    assert len(caught) == len(calls)
    assert all("contextvars.copy_context().run" in str(error) for error in caught)
    thread = threading.Thread(target=lambda: caught.append(host.logits(expected.inputs)))
    thread.start()
    thread.join()
    assert torch.equal(caught[-1], expected.plain)


def test_encoding_in_another_thread_does_not_disturb_a_context(
    host: Host, expected: Expected
) -> None:
    """`Adapter.encode` is independent of the context and does not change its trace."""
    call = host.adapter.dummy_images([(20, 30)])
    (want,) = run_encoder(host.adapter, "image", call, frozenset(), None)
    found = []
    stop = threading.Event()

    def encode() -> None:
        while not stop.is_set():
            found.extend(run_encoder(host.adapter, "image", call, frozenset(), None))

    thread = threading.Thread(target=encode)
    with tp.compress(host.model, "tome", retention=0.4) as trace:
        thread.start()
        try:
            for _ in range(10):
                expected.check("tome", logits(host.model, expected.inputs), trace)
        finally:
            stop.set()
            thread.join()
    assert found
    assert all(torch.equal(one.features, want.features) for one in found)


# -- copies --------------------------------------------------------------------------------------


def _saved(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), _saved]
)
def test_copies_are_plain(way: Callable[[Any], Any], method: str, expected: Expected) -> None:
    host = Host.tiny("LLaVA-NeXT")  # that has not run: transformers' own hooks cannot be pickled
    hooks = [len(module._forward_pre_hooks) for module in host.model.modules()]
    own = [set(vars(module)) for module in host.model.modules()]
    with tp.compress(host.model, method, retention=0.4) as trace:
        twin = way(host.model)
        assert [set(vars(module)) for module in twin.modules()] == own
        assert [len(module._forward_pre_hooks) for module in twin.modules()] == hooks
        assert torch.equal(logits(twin, expected.inputs), expected.plain)
        expected.check(method, logits(host.model, expected.inputs), trace)
    assert torch.equal(logits(twin, expected.inputs), expected.plain)
    assert [*twin.state_dict()] == [*host.model.state_dict()]
    with tp.compress(twin, method, retention=0.4) as trace:
        expected.check(method, logits(twin, expected.inputs), trace)


def test_a_copy_keeps_the_hooks_of_others(host: Host) -> None:
    calls = []

    def mine(module: Any, args: Any) -> None:
        calls.append(module)

    host.model.register_forward_pre_hook(mine)
    host.model.has_hooks = True  # transformers marks decoders in such a way
    host.model.model.forward = types.MethodType(type(host.model.model).forward, host.model.model)
    with tp.compress(host.model, "uniform", retention=0.4):
        twin = copy.deepcopy(host.model)
    logits(twin, host.inputs())
    assert calls == [twin]
    assert twin.has_hooks
    assert isinstance(vars(twin.model)["forward"], types.MethodType)


# -- wrappers ------------------------------------------------------------------------------------


class Tuned(nn.Module):
    """What PEFT wraps around a model: it calls ``forward`` by name."""

    peft_config: Any = None

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.base_model = model

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.forward(*args, **kwargs)


@pytest.fixture
def wrappers(host: Host) -> dict[str, Any]:
    return {
        "adapter": host.adapter,
        "torch.compile": torch.compile(host.model, backend="eager"),
        "DataParallel": nn.DataParallel(host.model),
        "PEFT": Tuned(host.model),
        "several": torch.compile(nn.DataParallel(Tuned(host.model)), backend="eager"),
    }


@pytest.mark.parametrize("what", ["adapter", "torch.compile", "DataParallel", "PEFT", "several"])
def test_wrappers_are_unwrapped(
    host: Host, wrappers: dict[str, Any], expected: Expected, what: str
) -> None:
    wrapped = wrappers[what]
    labels = expected.inputs["input_ids"].clone()
    labels[:, :-2] = -100
    for method in METHODS:
        with tp.compress(wrapped, method, retention=0.4) as trace:
            runs = host.model if what == "adapter" else wrapped
            expected.check(method, logits(runs, expected.inputs), trace)
            logits(runs, expected.inputs, labels=labels)
            got = kept(trace)
            logits(host.model, expected.inputs, labels=labels)
            assert got == kept(trace)


def test_other_wrappers_are_refused_with_a_remedy(host: Host) -> None:
    spread = nn.DataParallel(host.model)
    spread.device_ids = [0, 1]
    cases = {
        "one process for each device": spread,
        "has a LlavaNextForConditionalGeneration at .0; pass that one to compress": nn.Sequential(
            host.model
        ),
        "no model class with an adapter is called 'Linear'": nn.Linear(1, 1),
        "a model or an adapter, got str": "testbed-next",
    }
    for sentence, wrapped in cases.items():
        with (
            pytest.raises(UserError, match=sentence),
            tp.compress(wrapped, "uniform", retention=0.4),  # type: ignore[arg-type]
        ):
            pass
