"""The contract of methods and adapters, as checks that run without pytest."""

from tokenprune.testing.host import Host, example, hosts, refusal
from tokenprune.testing.runner import CHECKS, MODEL_CHECKS, check_compressor, run
from tokenprune.testing.strategy_checks import STRATEGY_CHECKS

__all__ = [
    "CHECKS",
    "MODEL_CHECKS",
    "STRATEGY_CHECKS",
    "Host",
    "check_compressor",
    "example",
    "hosts",
    "refusal",
    "run",
]
