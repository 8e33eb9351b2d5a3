"""How long Python programs and the command line wait for tokenprune before anything happens."""

import subprocess
import sys
from collections.abc import Callable, Iterator

from tokenprune.experiments.benchmarks.record import Figure, noise_of
from tokenprune.experiments.common.timing import Timing, timed

CASES = {
    "import tokenprune": ("-c", "import tokenprune"),
    "tokenprune --help": ("-m", "tokenprune", "--help"),
    "tokenprune list": ("-m", "tokenprune", "list"),
}
PLAIN = ("-c", "pass")


def measure(quick: bool, device: str, tell: Callable[[str], None]) -> Iterator[Figure]:
    """Seconds of new processes, and as multiples of an empty one."""
    repeats = 1 if quick else 9
    tell("an empty program")
    plain = _timed(PLAIN, repeats)
    for case, arguments in CASES.items():
        tell(case)
        taken = _timed(arguments, repeats)
        yield Figure(
            case=case, figure="time", value=1000 * taken.median, unit="ms", better="low",
            noise=noise_of(taken),
        )  # fmt: skip
        yield Figure(
            case=case, figure="time / empty program", value=taken.median / plain.median,
            better="low", noise=noise_of(taken, plain),
            note=f"an empty program takes {1000 * plain.median:.3g} ms",
        )  # fmt: skip


def _timed(arguments: tuple[str, ...], repeats: int) -> Timing:
    def run() -> None:
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)

    return timed(run, warmup=1, repeats=repeats)
