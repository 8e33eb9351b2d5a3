"""What MkDocs calls while it builds the site: generated pages, inserted tables, links to the code.

A line ``<!-- insert: NAME ARGUMENTS -->`` of a page is replaced by what `INSERTS` makes of it.
Commands that a page inserts the output of run while the site is built.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import commands
import lmms
import methods
import reference
import results
import signals
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
GENERATED = {"methods": methods.pages, "commands": commands.pages, "reference": reference.pages}


def drawing(name: str) -> str:
    """A drawing from `docs/images`, inside the page, so that it takes the page's colours."""
    return f'<div class="figure">\n{(ROOT / "docs" / "images" / f"{name}.svg").read_text()}</div>'


INSERTS: dict[str, Callable[[str], str]] = {
    "drawing": drawing,
    "help": commands.options_of,
    "commands": commands.table,
    "methods": methods.table,
    "families": methods.families,
    "public-names": reference.public_names,
    "signals": signals.table,
    "axes": signals.axes,
    "modules": reference.table,
    "output": commands.output_of,
    **lmms.INSERTS,
    **results.INSERTS,
}
_INSERT = re.compile(r"^<!-- insert: (\S+) ?(.*?) -->$", re.MULTILINE)
_OUTSIDE = re.compile(r"\[([^\]]+)\]\((?:\.\./)+([^)#]+)(?:#[^)]*)?\)")


@cache
def pages(folder: str) -> dict[str, str]:
    """Path in the site and Markdown of every generated page of ``folder``."""
    return {f"{folder}/{name}.md": text for name, text in GENERATED[folder]().items()}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the generated pages where the navigation says ``generated``."""
    for section in config.nav or []:
        for title, entries in section.items():
            if isinstance(entries, list) and "generated" in entries:
                folder = entries[0].split("/")[0]
                written = {
                    f"{folder}/{path.name}" for path in (ROOT / "docs" / folder).glob("*.md")
                }
                there = [*pages(folder), *sorted(written - set(pages(folder)) - set(entries))]
                section[title] = [name for name in entries if name != "generated"] + there
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, and the stored plots that pages show."""
    for folder in GENERATED:
        for name, text in pages(folder).items():
            if files.get_file_from_path(name) is None:
                files.append(File.generated(config, name, content=text))
    for path in results.plots():
        name = f"results/{path.relative_to(results.FOLDER)}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace inserts, and links that lead out of `docs/` by the path that they lead to."""

    def inserted(found: re.Match[str]) -> str:
        name, arguments = found.groups()
        if name not in INSERTS:
            raise PluginError(f"{page.file.src_uri}: no insert is called {name!r}.")
        return INSERTS[name](arguments)

    def named(found: re.Match[str]) -> str:
        text, path = found.groups()
        inside = (Path(page.file.src_uri).parent / found[0].split("](")[1][:-1]).as_posix()
        if not inside.startswith(".."):
            return found[0]
        if not (ROOT / path).exists():
            raise PluginError(f"{page.file.src_uri}: there is no {path}.")
        return text if path in text else f"{text} (`{path}`)"

    return _OUTSIDE.sub(named, _INSERT.sub(inserted, markdown))
