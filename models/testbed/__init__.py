"""Small trained models that are part of the package, and the scenes that they are trained on."""

if __name__ != "tokenprune.models.testbed":
    raise ImportError(
        f"{__file__} was imported as {__name__!r}; its name is 'tokenprune.models.testbed'. "
        "Install the checkout (pip install -e .) and import 'tokenprune.models.testbed'."
    )

from difflib import get_close_matches
from pathlib import Path

__all__ = ["TRAINED_ON", "names", "path"]

TRAINED_ON = {
    "testbed-next": ("image",),
    "testbed-onevision": ("image", "video", "multi-image"),
    "testbed-qwen": ("image",),
}
"""Modalities of the questions that each embedded model was trained on."""

_FOLDER = Path(__file__).parent


def names() -> tuple[str, ...]:
    """Names of the embedded models, sorted."""
    return tuple(sorted(config.parent.name for config in _FOLDER.glob("*/config.json")))


def path(name: str) -> Path:
    """Folder with the weights and processor of the embedded model `name`."""
    if name not in names():
        near = get_close_matches(name, names(), 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise LookupError(f"no embedded model is called {name!r}.{hint} Known: {list(names())}.")
    return _FOLDER / name
