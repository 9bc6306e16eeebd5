"""What mkdocs calls: pages of files beside docs/, and links that hold both in the repository and on the site."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
FILES = ("CITATION.cff", "LICENSE", "data/gsm8k/LICENSE")
_LINK = re.compile(r"(?<=\]\()([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add the pages and files that are not in docs/."""
    for name in (*PAGES, *FILES):
        files.append(File.generated(config, PAGES.get(name, name), content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links to places in the repository become links to the pages that are made of them."""
    sources = {target: name for name, target in PAGES.items()}
    here = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return _LINK.sub(lambda match: _on_site(match[1], here, page.file.src_uri), markdown)


def _on_site(link: str, source: str, page: str) -> str:
    if "://" in link:
        return link
    place = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    target = PAGES.get(place, place.removeprefix("docs/"))
    return posixpath.relpath(target, posixpath.dirname(page) or ".")
