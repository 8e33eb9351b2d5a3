"""What is measured, as commands: comparisons, their data, statistics and plots."""

if __name__ != "tokenprune.experiments":
    raise ImportError(
        f"{__file__} was imported as {__name__!r}; its name is 'tokenprune.experiments'. "
        "Install the checkout (pip install -e .) and import 'tokenprune.experiments'."
    )
