"""Adapters, one file per model family, loading of checkpoints, and the testbeds."""

if __name__ != "tokenprune.models":
    raise ImportError(
        f"{__file__} was imported as {__name__!r}; its name is 'tokenprune.models'. "
        "Install the checkout (pip install -e .) and import 'tokenprune.models'."
    )
