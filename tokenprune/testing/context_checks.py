"""Checks of the context itself: hooks, copies, threads and compiled code."""

from __future__ import annotations

import contextvars
import functools
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokenprune.compressor import Compressor
from tokenprune.engine.cache import CACHE
from tokenprune.engine.session import compress
from tokenprune.engine.trace import Trace
from tokenprune.errors import UserError
from tokenprune.testing.asserting import (
    assert_close,
    assert_refused,
    assert_same,
    assert_same_bits,
    assert_same_kept,
    kept_in,
)
from tokenprune.testing.host import Host
from tokenprune.testing.reference_vision import images_by_hand

__all__ = [
    "check_compiled",
    "check_copies_are_plain",
    "check_decoder_by_itself",
    "check_leaving_refused",
    "check_nesting_refused",
    "check_nothing_bypasses",
    "check_restores_model",
    "check_scattered_embeds_warn",
    "check_threads",
    "check_trace_is_one_forward",
    "fingerprint",
]


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything that a context may change: attributes, hooks, classes, functions and weights."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules():
        kind = type(module)
        state[f"{name}: class"] = kind
        for key, value in vars(module).items():
            if key == "rope_deltas":  # Qwen-VL notes it in every forward
                continue
            if isinstance(value, dict):
                state[f"{name}.{key}"] = {item: id(held) for item, held in value.items()}
            else:
                state[f"{name}.{key}"] = id(value)
        for item, held in [*module.named_parameters(recurse=False), *module.named_buffers()]:
            state[f"{name}.{item}: data"] = (held.data_ptr(), held._version)
        state[f"class {kind}"] = {key: id(value) for key, value in vars(kind).items()}
        code = vars(sys.modules[kind.__module__])
        state[f"module {kind.__module__}"] = {
            key: id(value) for key, value in code.items() if callable(value)
        }
        if hasattr(module, "config"):
            state[f"{name}: config"] = repr(module.config)
    return state


def _unchanged(model: nn.Module, before: dict[str, Any], what: str) -> None:
    after = fingerprint(model)
    changed = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    if changed:
        raise AssertionError(f"{what}, these have changed: {', '.join(map(str, changed))}")


def check_restores_model(compressor: Compressor, host: Host) -> None:
    """Invariant 7: leaving the context, also by an exception, restores the model exactly."""
    inputs = host.inputs()
    plain = host.logits(inputs), host.generate(inputs)  # transformers also initialises its caches
    before = fingerprint(host.model)
    with compress(host.model, compressor):
        host.logits(inputs)
        host.generate(inputs)
    _unchanged(host.model, before, "after leaving the context")
    try:
        with compress(host.model, compressor):
            host.logits(inputs)
            raise KeyError("in the middle")
    except KeyError:
        pass
    _unchanged(host.model, before, "after an exception in the context")

    def burst(*args: Any) -> None:
        raise KeyError("in the last layer")

    for last in (host.adapter.decoder_layers[-1], host.adapter.vision_layers[-1]):
        try:
            with compress(host.model, compressor):
                handle = last.register_forward_pre_hook(burst)
                try:
                    host.logits(inputs)
                finally:
                    handle.remove()
        except KeyError:
            pass
        _unchanged(host.model, before, "after an exception in a forward")
    assert_same_bits(host.logits(inputs), plain[0], "the plain logits before and after")
    assert_same(host.generate(inputs), plain[1], "plain ids after the context")


def check_nesting_refused(compressor: Compressor, host: Host) -> None:
    """Invariant 7: a second context on one model is refused and does not affect the first."""

    def nest() -> None:
        with compress(host.model, compressor):
            raise AssertionError("a second context on the same model was not refused")

    with compress(host.model, compressor):
        want = host.generate(host.inputs())
        assert_refused(nest, "already runs inside", "a second context on the same model")
        assert_same(host.generate(host.inputs()), want, "ids after a second context was refused")
    with compress(host.model, compressor):
        assert_same(host.generate(host.inputs()), want, "ids in a new context after the refusal")


def check_decoder_by_itself(compressor: Compressor, host: Host) -> None:
    """A direct call of the language model does not depend on the previous prompt."""
    inputs, language = host.inputs([0]), host.adapter.language_model
    embeds = host.model.get_input_embeddings()(inputs["input_ids"]).detach()
    with torch.no_grad():
        plain = language(inputs_embeds=embeds).last_hidden_state
    with warnings.catch_warnings(), compress(host.model, compressor) as trace, torch.no_grad():
        warnings.simplefilter("ignore")
        host.logits(inputs)
        kept, ledger = kept_in(trace, 0), trace.ledger
        got = language(inputs_embeds=embeds).last_hidden_state
        assert_same_bits(got, plain, "hidden states of the decoder called directly")
        host.adapter.base.get_image_features(**host.media(0)["image"])
        got = language(inputs_embeds=embeds).last_hidden_state
    assert_same_bits(got, plain, "hidden states of a direct call after images were encoded")
    assert_same_kept(kept_in(trace, 0), kept, "the trace after a direct call")
    if trace.ledger != ledger:
        raise AssertionError(f"a direct call changed the ledger to {trace.ledger}")


def check_trace_is_one_forward(compressor: Compressor, host: Host) -> None:
    """Selections and ledger belong to the same prefill, the latest one with images."""

    def burst(*args: Any) -> None:
        raise KeyError("in the last layer")

    with compress(host.model, compressor) as trace:
        host.logits(host.inputs([0]))
        kept, ledger = kept_in(trace, 0), trace.ledger
        host.logits(host.inputs([1]))
        assert_same_kept(kept_in(trace, 0), kept, "selections after a text-only prompt")
        if trace.ledgers != [ledger]:
            raise AssertionError(f"a text-only prompt changed the ledgers to {trace.ledgers}")
        handle = host.adapter.decoder_layers[-1].register_forward_pre_hook(burst)
        try:
            host.logits(host.inputs([2]))
        except KeyError:
            pass
        finally:
            handle.remove()
        assert_same_kept(
            [record.keep for record in trace.selections], kept, "after a failed forward"
        )
        if trace.ledgers != [ledger]:
            raise AssertionError(f"a failed forward changed the ledgers to {trace.ledgers}")


def check_leaving_refused(compressor: Compressor, host: Host) -> None:
    """A compressed KV cache is refused outside the context."""
    inputs = host.inputs()
    with compress(host.model, compressor):
        out = host._generate(inputs, return_dict_in_generate=True)
    new = out.sequences.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(out.sequences), new).long()], 1)
    turn = {"input_ids": out.sequences, "attention_mask": mask}
    assert_refused(
        lambda: host.generate(turn, **{CACHE: out.past_key_values}),
        "compressed prompt",
        "continuing a compressed KV cache outside the context",
    )


def check_scattered_embeds_warn(compressor: Compressor, host: Host) -> None:
    """Embeddings that already contain the images are not compressed, with a warning."""
    inputs = host.inputs([0])
    embeds = host.model.get_input_embeddings()(inputs["input_ids"]).detach()
    (tokens,) = images_by_hand(host, frozenset(), 0)
    visual = torch.isin(inputs["input_ids"], torch.tensor(host.placeholders))
    embeds[visual] = tokens.features.detach()
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    given["position_ids"] = torch.arange(embeds.shape[1])[None]  # Qwen-VL would use older ones
    plain = host.logits(given)
    with warnings.catch_warnings(record=True) as caught, compress(host.model, compressor):
        warnings.simplefilter("always")
        got = host.logits(given)
    if not any("inputs_embeds" in str(each.message) for each in caught):
        raise AssertionError("embeddings that already contain an image passed without a warning")
    assert_same_bits(got, plain, "logits of scattered embeddings with and without compression")


@functools.cache
def _compiled(host: Host) -> Host:
    """A copy whose decoder layers are compiled and have run; made once for every host."""
    twin = host.like()
    for layer in twin.adapter.decoder_layers:
        layer.compile(backend="eager")
    with torch._dynamo.config.patch(recompile_limit=1000):
        twin.logits(host.inputs(), use_cache=False)
    return twin


def check_compiled(compressor: Compressor, host: Host) -> None:
    """Layers that were compiled and ran before the context are compressed like any others."""
    inputs, twin = host.inputs() | {"use_cache": False}, _compiled(host)
    with compress(host.model, compressor) as trace:
        want, kept = host.logits(inputs), [record.keep for record in trace.selections]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "this model or a part of it was compiled")
        with compress(twin.model, compressor) as trace:
            try:
                got = twin.logits(inputs)
            except UserError as error:
                raise AssertionError(f"compiled layers were refused: {error}") from error
    assert_close(got, want, "logits of compiled layers")
    assert_same_kept([record.keep for record in trace.selections], kept, "compiled layers")


def check_nothing_bypasses(compressor: Compressor, host: Host) -> None:
    """Calls of ``forward`` run through the hooks; a decoder without hooks is refused."""
    inputs, decoder = host.inputs(), host.adapter.language_model
    with compress(host.model, compressor) as trace:
        want, kept = host.logits(inputs), [record.keep for record in trace.selections]
        with torch.no_grad():
            assert_same_bits(host.model.forward(**inputs).logits, want, "logits of model.forward")
            hidden = host.adapter.base.forward(**inputs).last_hidden_state
        head = host.model.get_output_embeddings()
        assert_same_bits(head(hidden).detach(), want, "logits of model.model.forward")
        assert_same_kept([record.keep for record in trace.selections], kept, "model.model.forward")
        # `compile` sets this attribute, and the module is then called without its hooks.
        decoder._compiled_call_impl = functools.partial(type(decoder).forward, decoder)
        try:
            assert_refused(lambda: host.logits(inputs), "got past", "a decoder without its hooks")
        finally:
            del decoder._compiled_call_impl


def check_threads(compressor: Compressor, host: Host) -> None:
    """Two threads of a context run at the same time without interference; others are refused."""
    rows = (0, 2)
    found: dict[int, tuple[Tensor, list[Tensor]]] = {}
    failed: list[Exception] = []
    meeting = threading.Barrier(len(rows), timeout=30)

    def work(row: int, trace: Trace) -> None:
        try:
            found[row] = host.logits(host.inputs([row])), kept_in(trace, 0)
        except Exception as error:
            failed.append(error)
            meeting.abort()

    def meet(*args: Any) -> None:
        meeting.wait()

    def together(trace: Trace, run: Callable[[], Callable[..., Any]]) -> None:
        threads = [threading.Thread(target=run(), args=(work, row, trace)) for row in rows]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    with compress(host.model, compressor) as trace:
        alone = {row: (host.logits(host.inputs([row])), kept_in(trace, 0)) for row in rows}
        # Both threads stop in front of the first layer until the other one arrives.
        handle = host.adapter.decoder_layers[0].register_forward_pre_hook(meet)
        try:
            together(trace, lambda: contextvars.copy_context().run)
        finally:
            handle.remove()
        if failed:
            raise AssertionError(f"one of two threads failed: {failed[0]!r}") from failed[0]
        for row in rows:
            assert_same_bits(found[row][0], alone[row][0], f"prompt {row} in a thread, logits")
            assert_same_kept(found[row][1], alone[row][1], f"prompt {row} in a thread")
        together(trace, lambda: lambda call, *args: call(*args))
    if len(failed) < len(rows) or not all(isinstance(error, UserError) for error in failed):
        raise AssertionError(f"threads outside the context were not refused: {failed}")


def check_copies_are_plain(compressor: Compressor, host: Host) -> None:
    """A copy that is made inside the context is not compressed."""
    inputs = host.inputs()
    plain, weights = host.logits(inputs), [*host.model.state_dict()]
    with compress(host.model, compressor):
        want = host.logits(inputs)
        try:
            twin = host.like()
        except Exception as error:
            raise AssertionError(f"the model could not be copied: {error!r}") from error
        assert_same_bits(twin.logits(inputs), plain, "logits of a copy inside the context")
        assert_same_bits(host.logits(inputs), want, "logits of the original after it was copied")
    assert_same_bits(twin.logits(inputs), plain, "logits of a copy after the context")
    if [*twin.model.state_dict()] != weights or [*host.model.state_dict()] != weights:
        raise AssertionError("copying inside the context changed the names of the weights")
    with compress(twin.model, compressor):
        assert_same_bits(twin.logits(inputs), want, "logits of the copy in its own context")
