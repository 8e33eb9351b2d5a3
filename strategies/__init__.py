"""Compression methods, one file each.  To add one, copy uniform.py."""

if __name__ != "tokenprune.strategies":
    raise ImportError(
        f"{__file__} was imported as {__name__!r}; its name is 'tokenprune.strategies'. "
        "Install the checkout (pip install -e .) and import 'tokenprune.strategies'."
    )
