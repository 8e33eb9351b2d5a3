"""Checks of a method inside a model.

Each ``check_*`` raises `AssertionError` with a counter-example.  To test your own method::

    from tokenprune.testing import check_compressor

    def test_mine() -> None:
        check_compressor(Mine(retention=0.4))

To run each check as a separate test::

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_mine(check: Check) -> None:
        run(check, Mine(retention=0.4))

They run the method inside tiny random models of every registered adapter, on a ragged batch: a
prompt with one image, one of text only, and one with two images of different aspect ratios.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tokenprune
from tokenprune.compressor import Compressor, Stage
from tokenprune.cost.ledger import Ledger
from tokenprune.engine.session import compress
from tokenprune.engine.trace import Trace
from tokenprune.layout import TokenLayout
from tokenprune.testing.asserting import (
    assert_close,
    assert_refused,
    assert_same,
    assert_same_bits,
    assert_same_kept,
    columns_on,
    kept_in,
    rng_state,
    seeded,
    spying,
    vision_products,
    with_fields,
)
from tokenprune.testing.host import ROWS, Host
from tokenprune.testing.reference import reference

__all__ = [
    "check_batch_equals_single",
    "check_bfloat16",
    "check_count_in_model",
    "check_eager_agrees",
    "check_equals_reference",
    "check_full_retention_is_identity",
    "check_hidden_states",
    "check_inference_mode",
    "check_inputs_untouched",
    "check_ledger_is_true",
    "check_masked_tokens",
    "check_model_rng_untouched",
    "check_no_attention_matrix",
    "check_order_of_rows",
    "check_positions",
    "check_prompt_logits",
]


# -- checks inside a model -----------------------------------------------------------------------


def check_full_retention_is_identity(compressor: Compressor, host: Host) -> None:
    """Invariant 1: R = 1 gives bit-identical logits and ids if all separators stay."""
    compressor = with_fields(compressor, separators="all")
    for fields in ({}, {"position_ids": "compact"}, {"position_ids": "original"}):
        full = with_fields(compressor, retention=1.0, **fields)
        for side in ("left", "right"):
            inputs = host.inputs(side=side)
            plain = host.logits(inputs)
            with compress(host.model, full) as trace:
                got = host.logits(inputs)
            assert_same_bits(got, plain, f"logits at R = 1, {side} padding")
            for ledger in trace.ledgers:
                if ledger.realised != 1:
                    raise AssertionError(f"the ledger says {ledger.realised} at R = 1")
    inputs, full = host.inputs(), with_fields(compressor, retention=1.0)
    for options in ({}, {"use_cache": False}, {"num_beams": 3}):
        plain = host.generate(inputs, **options)
        with compress(host.model, full):
            assert_same(host.generate(inputs, **options), plain, f"ids at R = 1 with {options}")


def check_count_in_model(compressor: Compressor, host: Host) -> None:
    """A number of kept tokens that follows from the layout is right in the model."""
    part = next(compressor.parts())
    with compress(host.model, compressor) as trace:
        host.logits(host.inputs())
    seen: set[tuple[int, int]] = set()
    for record in trace.selections:  # of every image the first selection, by the first part
        image = record.row, record.image
        claimed = None if image in seen else part.count(record.layout)
        seen.add(image)
        if claimed not in (None, len(record.keep)):
            raise AssertionError(
                f"{part.label} keeps {len(record.keep)} of {len(record.layout)} visual tokens of "
                f"{record.layout.modality} {record.image} of row {record.row}, but its count says "
                f"{claimed}"
            )


def check_equals_reference(compressor: Compressor, host: Host) -> None:
    """Invariant 2: prefill and every decode step equal a short sequence built by hand."""
    for use_cache in (True, False):
        with compress(host.model, compressor) as trace:
            ids, logits = host.generate_with_logits(host.inputs(), use_cache=use_cache)
        for row in range(len(ROWS)):
            what = f"row {row}, use_cache={use_cache}"
            wanted = reference(host, compressor, row, ids[row, :-1].tolist())
            assert_same_kept(kept_in(trace, row), wanted.kept, what)
            steps = ids.shape[1]
            assert_close(
                logits[row], wanted.logits[-steps:], f"{what}, logits of the {steps} steps"
            )
            allowed = wanted.logits[-steps:].clone()
            never = [*host.placeholders, host.model.generation_config.eos_token_id]
            allowed[:, never] = -torch.inf
            assert_same(ids[row], allowed.argmax(-1), f"{what}, ids")


def check_prompt_logits(compressor: Compressor, host: Host) -> None:
    """Logits keep the prompt's shape; at kept columns they equal the reference, under any padding.

    A dropped column repeats the last kept column before it.
    """
    for side in ("left", "right"):
        inputs = host.inputs(side=side)
        shape = (*inputs["input_ids"].shape, host.model.lm_head.out_features)
        with compress(host.model, compressor):
            got = host.logits(inputs)
            last = host.logits(inputs, logits_to_keep=1)
        if got.shape != shape:
            raise AssertionError(f"logits of shape {tuple(got.shape)}, not {shape}")
        assert_close(last, got[:, -1:], "logits with logits_to_keep=1")
        for row in range(len(ROWS)):
            wanted = reference(host, compressor, row)
            length = len(host.prompt(row))
            mine = got[row, columns_on(side, length, shape[1])]
            left = (wanted.columns[None] <= torch.arange(length)[:, None]).sum(1) - 1
            assert_close(
                mine, wanted.logits[left], f"row {row}, {side} padding, logits of the prompt"
            )


def check_batch_equals_single(compressor: Compressor, host: Host) -> None:
    """Invariant 3: a batch of n equals n batches of one, padded on either side."""
    for side in ("left", "right"):
        inputs = host.inputs(side=side)
        with compress(host.model, compressor) as trace:
            together = host.logits(inputs)
        ledgers = trace.ledgers
        for row in range(len(ROWS)):
            alone = host.inputs([row])
            with compress(host.model, compressor) as single:
                want = host.logits(alone)[0]
            got = together[row, columns_on(side, len(want), together.shape[1])]
            what = f"row {row} of the batch, {side} padding"
            assert_same_kept(kept_in(trace, row), kept_in(single, 0), what)
            assert_close(got, want, f"{what}, logits")
            if ledgers[row] != single.ledger:
                raise AssertionError(
                    f"{what}: its ledger is {ledgers[row]}, alone it is {single.ledger}"
                )


def check_ledger_is_true(compressor: Compressor, host: Host) -> None:
    """Invariant 5: the ledger equals the tokens, KV entries and FLOPs that are observed."""
    for row in range(len(ROWS)):
        with (
            compress(host.model, compressor) as trace,
            spying(host) as calls,
            vision_products(host) as products,
            torch.no_grad(),
        ):
            out = host.model(**host.inputs([row]), use_cache=True)
        ledger, layouts = trace.ledger, host.layouts(row)
        _check_processed(ledger, [call.length for call in calls], out.past_key_values, row)
        _check_vision_flops(ledger, sum(products), sum(layout.views for layout in layouts), row)
        _check_kept(ledger, trace, layouts, row)
        if ledger.requested != compressor.retention:
            raise AssertionError(f"row {row}: R = {ledger.requested}")
        if ledger.selector_bytes < 0:
            raise AssertionError(f"row {row}: {ledger.selector_bytes} selector bytes")
    _check_batch_ledgers(compressor, host)


def _check_processed(ledger: Ledger, processed: Sequence[int], cache: Any, row: int) -> None:
    """Check tokens per layer and the KV cache."""
    stated = [ledger.text_tokens + visual for visual in ledger.visual_per_layer]
    cached = [layer.keys.shape[-2] for layer in cache.layers]
    if stated != processed:
        raise AssertionError(f"row {row}: layers process {processed}, the ledger says {stated}")
    if stated != cached:
        raise AssertionError(f"row {row}: the KV cache holds {cached}, the ledger says {stated}")
    tensors = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    size = sum(part.numel() * part.element_size() for part in tensors)
    if size != ledger.kv_bytes:
        raise AssertionError(f"row {row}: {size} KV bytes, not {ledger.kv_bytes}")
    average = sum(processed) / len(processed) - ledger.text_tokens
    if not math.isclose(ledger.layer_average, average):
        raise AssertionError(f"row {row}: average {average}")


def _check_vision_flops(ledger: Ledger, ran: int, views: int, row: int) -> None:
    """Check the FLOPs of the vision encoder."""
    if ran != ledger.vision_flops:
        raise AssertionError(f"row {row}: {ran} FLOPs, not {ledger.vision_flops}")
    full = ledger.uncompressed_vision_flops
    if ran > full:
        raise AssertionError(
            f"row {row}: the vision encoder takes {ran} FLOPs, uncompressed {full}"
        )
    if bool(views) != bool(ran):
        raise AssertionError(f"row {row}: {views} views take {ran} FLOPs")


def _check_kept(ledger: Ledger, trace: Trace, layouts: Sequence[TokenLayout], row: int) -> None:
    """Check the numbers of patch tokens and separators against the selections."""
    patches = sum(len(layout.patches) for layout in layouts)
    if ledger.patch_tokens != patches:
        raise AssertionError(f"row {row}: {ledger.patch_tokens}, not {patches}")
    last = {record.image: record for record in trace.selections}
    kept = [layout.take(last[i].keep) for i, layout in enumerate(layouts)]
    per_view = tuple(layout.view_sizes for layout in kept)
    if ledger.kept_per_view != per_view:
        raise AssertionError(f"row {row}: {ledger.kept_per_view}, {per_view}")
    if ledger.kept_patches != sum(map(sum, per_view)):
        raise AssertionError(f"row {row}: kept_patches")
    entries = sum(map(len, kept))
    if ledger.kept_patches + ledger.kept_separators != entries:
        raise AssertionError(f"row {row}: separators")
    if ledger.visual_per_layer[-1] != entries:
        raise AssertionError(f"row {row}: last layer")
    before = {one.image: one for one in trace.selections if one.stage is not Stage.LLM}
    entered = [
        layout.take(before[i].keep) if i in before else layout for i, layout in enumerate(layouts)
    ]
    patches = sum(len(layout.patches) for layout in entered)
    if ledger.entered_patches != patches:
        raise AssertionError(f"row {row}: {patches} patch tokens enter the language model")
    separators = sum(map(len, entered)) - patches
    if ledger.entered_separators != separators:
        raise AssertionError(f"row {row}: {separators} separators enter the language model")


def _check_batch_ledgers(compressor: Compressor, host: Host) -> None:
    """In a batch a layer is as wide as its longest prompt; padding does not count as tokens."""
    with compress(host.model, compressor) as trace, spying(host) as calls, torch.no_grad():
        out = host.model(**host.inputs(), use_cache=True)
    for layer, (call, cached) in enumerate(zip(calls, out.past_key_values.layers, strict=True)):
        stated = [ledger.kv_per_layer[layer] for ledger in trace.ledgers]
        if call.length != max(stated):
            raise AssertionError(f"layer {layer}: {call.length} wide, the ledgers say {stated}")
        rows, _, entries, _ = cached.keys.shape
        padding = sum(max(stated) - each for each in stated)
        if rows * entries - padding != sum(stated):
            raise AssertionError(
                f"layer {layer}: {rows} x {entries} KV entries, {padding} of padding, not {stated}"
            )


def check_eager_agrees(compressor: Compressor, host: Host) -> None:
    """Invariant 6: the same result under sdpa and eager attention."""
    found = []
    for attention in ("sdpa", "eager"):
        other = host.like(attention=attention)
        with compress(other.model, compressor) as trace:
            inputs = other.inputs()
            logits = other.logits(inputs)[inputs["attention_mask"].bool()]
            ids = other.generate(inputs)
        found.append((logits, ids, [record.keep for record in trace.selections]))
    assert_same_kept(found[1][2], found[0][2], "eager instead of sdpa attention")
    assert_close(found[1][0], found[0][0], "logits under eager instead of sdpa attention")
    assert_same(found[1][1], found[0][1], "ids under eager instead of sdpa attention")


class _Squares(TorchDispatchMode):
    """Records the shape of every float tensor of the form of attention: (batch, heads, N, N)."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, tuple | list) else [out]:
            if isinstance(item, Tensor) and item.is_floating_point() and item.ndim == 4:
                _, heads, rows, columns = item.shape
                if heads not in (1, 3) and rows == columns and rows >= 16:  # 3: pixels
                    self.found.add(tuple(item.shape))
        return out


def check_no_attention_matrix(compressor: Compressor, host: Host) -> None:
    """Invariant 6: no N x N attention is computed or requested, and no kernel becomes eager."""
    kinds = _attention_kinds(host)
    chunk, tokenprune.attention.CHUNK = tokenprune.attention.CHUNK, 4  # views have 16 patches
    try:
        with compress(host.model, compressor), spying(host) as calls:
            inside = _attention_kinds(host)
            for row in range(len(ROWS)):
                with _Squares() as squares:
                    host.logits(host.inputs([row]))
                if squares.found:
                    raise AssertionError(f"attention matrices: {sorted(squares.found)}")
    finally:
        tokenprune.attention.CHUNK = chunk
    if inside != kinds:
        raise AssertionError(f"the attention kernel was switched from {kinds} to {inside}")
    if any(call.attentions for call in calls):
        raise AssertionError("output_attentions was requested")


def _attention_kinds(host: Host) -> list[tuple[str, str]]:
    return [
        (name, module.config._attn_implementation)
        for name, module in host.model.named_modules()
        if hasattr(module, "config")
    ]


def check_order_of_rows(compressor: Compressor, host: Host) -> None:
    """Invariant 8: a selection depends neither on the row's index nor on the other rows."""
    with compress(host.model, compressor) as trace:
        host.logits(host.inputs((0, 1, 2)))
        straight = [kept_in(trace, row) for row in range(3)]
        for order in ((2, 0, 1), (2, 2, 0), (1, 0, 0)):
            host.logits(host.inputs(order))
            for place, row in enumerate(order):
                what = f"prompt {row} in row {place} of the batch {order}"
                assert_same_kept(kept_in(trace, place), straight[row], what)


def check_model_rng_untouched(compressor: Compressor, host: Host) -> None:
    """Invariant 8: a compressed forward neither changes nor uses the global generators."""
    kept = []
    for seed in (1, 2):
        with seeded(seed), compress(host.model, compressor) as trace:
            before = rng_state()
            host.logits(host.inputs())
            if rng_state() != before:
                raise AssertionError("a compressed forward drew from a global generator")
            kept.append([record.keep for record in trace.selections])
    assert_same_kept(kept[1], kept[0], "with another global seed")


def check_positions(compressor: Compressor, host: Host) -> None:
    """Invariant 9: ``compact`` renumbers the kept tokens, ``original`` keeps their ids; exactly."""
    for positions in ("auto", "compact", "original"):
        method = with_fields(compressor, position_ids=positions)
        for row in range(len(ROWS)):
            with compress(host.model, method), spying(host) as calls:
                got = host.logits(host.inputs([row]))
            wanted = reference(host, method, row)
            for index, (call, want) in enumerate(zip(calls, wanted.positions, strict=True)):
                what = f"position_ids={positions}, row {row}, layer {index}, position ids"
                if host.multimodal:
                    rotary = host.adapter.language_model.rotary_emb(got, want[:, None])
                    assert_close(call.rotary[0], rotary[0], what)
                    continue
                assert_same(call.positions.expand(1, -1)[0], want, what)
                if positions == "compact":
                    assert_same(want, torch.arange(len(want)), f"{what} of the reference")
                if positions == "original" and index == len(calls) - 1:
                    assert_same(want, wanted.columns, f"{what} of the reference")
            assert_close(
                got[0, -1], wanted.logits[-1], f"position_ids={positions}, row {row}, logits"
            )


def check_inputs_untouched(compressor: Compressor, host: Host) -> None:
    """The user's tensors are not changed and get no attributes."""
    inputs = host.inputs()
    before = {name: values.clone() for name, values in inputs.items()}
    attributes = {name: set(vars(values)) for name, values in inputs.items()}
    with compress(host.model, compressor):
        host.logits(inputs)
        host.generate(inputs)
    if list(inputs) != list(before):
        raise AssertionError(f"the inputs are now {list(inputs)}")
    for name, values in inputs.items():
        if not torch.equal(values, before[name]):
            raise AssertionError(f"{name} was written to")
        if set(vars(values)) != attributes[name]:
            raise AssertionError(f"{name} has new attributes {vars(values)}")


def check_bfloat16(compressor: Compressor, host: Host) -> None:
    """The model runs in bfloat16: finite logits of that dtype, and a ledger close to float32's."""
    half = host.like(dtype=torch.bfloat16)
    inputs = half.inputs()
    with compress(half.model, compressor) as trace:
        logits = half.logits(inputs)
        half.generate(inputs)
    if logits.dtype != torch.bfloat16:
        raise AssertionError(f"logits in {logits.dtype}")
    if not logits.isfinite().all():
        raise AssertionError("some logits in bfloat16 are not finite")
    with compress(host.model, compressor) as exact:
        host.logits(host.inputs())
    for row, (mine, theirs) in enumerate(zip(trace.ledgers, exact.ledgers, strict=True)):
        if mine.patch_tokens != theirs.patch_tokens:
            raise AssertionError(f"row {row}: {mine}, {theirs}")
        difference = abs(mine.kept_patches - theirs.kept_patches)
        views = sum(map(len, theirs.kept_per_view))
        if difference > views:
            raise AssertionError(f"row {row}: bfloat16 keeps {difference} tokens more or fewer")


def check_inference_mode(compressor: Compressor, host: Host) -> None:
    """`torch.inference_mode` gives the same result."""
    with compress(host.model, compressor):
        want = host.logits(host.inputs())
        with torch.inference_mode():
            got = host.model(**host.inputs()).logits
            host.generate(host.inputs())
    assert_same_bits(got.clone(), want, "the logits under inference_mode and no_grad")


def _hidden_patterns(host: Host, row: int) -> dict[str, list[int]]:
    """Columns of a prompt that the check hides with the attention mask, by description."""
    ids = torch.tensor(host.prompt(row))
    places = torch.isin(ids, torch.tensor(host.placeholders)).nonzero().squeeze(1)
    layouts = host.layouts(row)
    first = places[: len(layouts[0])]
    view = first[layouts[0].view == 0]
    return {
        "every third visual token": places[::3].tolist(),
        "the first view": view.tolist(),
        "an image": first.tolist(),
    }


def check_masked_tokens(compressor: Compressor, host: Host) -> None:
    """Visual tokens that the attention mask hides are not ranked, kept or counted.

    Models with multimodal positions cannot number such a prompt; it is refused.
    """
    if host.multimodal:
        inputs = host.inputs()
        inputs["attention_mask"][0, -5] = 0
        with compress(host.model, compressor):
            assert_refused(lambda: host.logits(inputs), "attention mask", "a hidden visual token")
        return
    for number, name in enumerate(_hidden_patterns(host, 2)):
        inputs = host.inputs()
        hidden: dict[int, list[int]] = {1: []}
        for row in (0, 2):
            hidden[row] = _hidden_patterns(host, row)[name]
            start = inputs["input_ids"].shape[1] - len(host.prompt(row))
            inputs["attention_mask"][row, [start + column for column in hidden[row]]] = 0
        with compress(host.model, compressor) as trace:
            got = host.logits(inputs)[:, -1]
        for row, ledger in enumerate(trace.ledgers):
            what = f"row {row}, {name} hidden"
            wanted = reference(host, compressor, row, hidden_columns=hidden[row])
            assert_same_kept(kept_in(trace, row), wanted.kept, what)
            assert_close(got[row], wanted.logits[-1], f"{what}, logits")
            text = len(host.prompt(row)) - sum(map(len, host.layouts(row)))
            stated = [ledger.text_tokens + visual for visual in ledger.visual_per_layer]
            processed = [len(columns) for columns, _ in wanted.states]
            if (ledger.text_tokens, stated) != (text, processed):
                raise AssertionError(
                    f"{what}: layers process {processed}, the ledger says {stated}"
                )
        if number:
            continue
        with compress(host.model, compressor):
            ids, logits = host.generate_with_logits(inputs)
        for row in (0, 2):
            answer, columns = ids[row, :-1].tolist(), hidden[row]
            wanted = reference(host, compressor, row, answer, hidden_columns=columns, counted=False)
            what = f"row {row}, {name} hidden, logits of the steps"
            assert_close(logits[row], wanted.logits[-ids.shape[1] :], what)


def check_hidden_states(compressor: Compressor, host: Host) -> None:
    """All hidden states keep the columns of the prompt; attention outputs are refused."""
    inputs = host.inputs()
    shape = inputs["input_ids"].shape
    with compress(host.model, compressor), torch.no_grad():
        states = host.model(**inputs, output_hidden_states=True).hidden_states
        assert_refused(
            lambda: host.logits(inputs, output_attentions=True),
            "output_attentions",
            "output_attentions=True",
        )
    for row in range(len(ROWS)):
        mine = columns_on("left", len(host.prompt(row)), shape[1])
        wanted = reference(host, compressor, row)
        column = torch.arange(len(host.prompt(row)))
        for layer, (columns, want) in enumerate(wanted.states):
            what = f"row {row}, hidden states after layer {layer}"
            got = states[layer + 1]
            if got.shape[:2] != shape:
                raise AssertionError(f"{what}: shape {tuple(got.shape)}, not {tuple(shape)}")
            left = (columns[None] <= column[:, None]).sum(1) - 1
            assert_close(got[row, mine], want[left], what)


if __name__ == "__main__":
    from tokenprune.testing.__main__ import main

    main()
