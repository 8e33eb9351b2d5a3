"""The list of all checks, and the functions that run them."""

from __future__ import annotations

from collections.abc import Sequence

from tokenprune.compressor import Compressor
from tokenprune.spec import create
from tokenprune.testing.asserting import Check
from tokenprune.testing.context_checks import (
    check_compiled,
    check_copies_are_plain,
    check_decoder_by_itself,
    check_leaving_refused,
    check_nesting_refused,
    check_nothing_bypasses,
    check_restores_model,
    check_scattered_embeds_warn,
    check_threads,
    check_trace_is_one_forward,
)
from tokenprune.testing.generation_checks import (
    check_beams_agree,
    check_cache_agrees,
    check_chunked_prefill_refused,
    check_drafts_have_no_say,
    check_generate_batch_equals_single,
    check_labels,
    check_labels_everywhere,
    check_sampling_agrees,
    check_second_turn,
    check_sliding_window_refused,
    check_static_cache_refused,
    check_turns_with_labels,
)
from tokenprune.testing.host import RETENTION, Host, hosts, refusal
from tokenprune.testing.model_checks import (
    check_batch_equals_single,
    check_bfloat16,
    check_count_in_model,
    check_eager_agrees,
    check_equals_reference,
    check_full_retention_is_identity,
    check_hidden_states,
    check_inference_mode,
    check_inputs_untouched,
    check_ledger_is_true,
    check_masked_tokens,
    check_model_rng_untouched,
    check_no_attention_matrix,
    check_order_of_rows,
    check_positions,
    check_prompt_logits,
)
from tokenprune.testing.strategy_checks import STRATEGY_CHECKS

__all__ = [
    "CHECKS",
    "MODEL_CHECKS",
    "check_compressor",
    "run",
]


MODEL_CHECKS: tuple[Check, ...] = (
    check_full_retention_is_identity,
    check_count_in_model,
    check_equals_reference,
    check_prompt_logits,
    check_batch_equals_single,
    check_generate_batch_equals_single,
    check_cache_agrees,
    check_sampling_agrees,
    check_beams_agree,
    check_ledger_is_true,
    check_eager_agrees,
    check_no_attention_matrix,
    check_restores_model,
    check_nesting_refused,
    check_order_of_rows,
    check_model_rng_untouched,
    check_positions,
    check_inputs_untouched,
    check_bfloat16,
    check_inference_mode,
    check_labels,
    check_labels_everywhere,
    check_turns_with_labels,
    check_drafts_have_no_say,
    check_masked_tokens,
    check_hidden_states,
    check_decoder_by_itself,
    check_trace_is_one_forward,
    check_sliding_window_refused,
    check_second_turn,
    check_chunked_prefill_refused,
    check_static_cache_refused,
    check_leaving_refused,
    check_scattered_embeds_warn,
    check_compiled,
    check_nothing_bypasses,
    check_threads,
    check_copies_are_plain,
)


CHECKS: tuple[Check, ...] = STRATEGY_CHECKS + MODEL_CHECKS


def run(check: Check, compressor: Compressor, where: Sequence[Host] | None = None) -> None:
    """Run one check.  A model check runs in every tiny model that has what the method needs.

    Args:
        check: One of `CHECKS`.
        compressor: The method.
        where: The tiny models; all `hosts()` by default.

    Raises:
        AssertionError: The check fails, or no tiny model can run the method.
    """
    if check in STRATEGY_CHECKS:
        check(compressor)
        return
    tried = 0
    refusals = []
    for host in hosts() if where is None else where:
        refused = refusal(host, compressor)
        if refused:
            refusals.append(refused)
            continue
        tried += 1
        try:
            check(compressor, host)
        except AssertionError as error:
            raise AssertionError(f"{host.name} with {host.decoder}: {error}") from error
    if not tried:
        raise AssertionError(f"no tiny model can run {compressor}: {' '.join(refusals)}")


def check_compressor(
    compressor: Compressor | type[Compressor] | str, where: Sequence[Host] | None = None
) -> None:
    """Run every check.

    Args:
        compressor: A method, its class, or its registered name.  A class or a name is built with
            default options at ``retention=0.4``.
        where: The tiny models; all `hosts()` by default.

    Raises:
        AssertionError: A check fails, or no tiny model can run the method.
    """
    if isinstance(compressor, str):
        compressor = create(compressor, retention=RETENTION)
    elif isinstance(compressor, type):
        compressor = compressor(retention=RETENTION)
    for check in CHECKS:
        run(check, compressor, where)
