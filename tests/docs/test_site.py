"""The site builds without a warning, and its pages load nothing that is not there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from doc_pages import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    run = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return folder


class Loads(HTMLParser):
    """What a browser loads of a page: scripts, styles, pictures, fonts; and where its links lead."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids |= {values.get("id") or ""}
        for name in ("src", "data", "poster") + (("href",) if tag == "link" else ()):
            if values.get(name):
                self.loaded.append(values[name] or "")
        if tag == "a" and values.get("href"):
            self.links.append(values["href"] or "")


def test_pages_load_what_is_beside_them(site):
    pages = {path: Loads(path.read_text()) for path in site.rglob("*.html")}
    assert len(pages) > 20
    for path, page in pages.items():
        assert page.loaded
        for address in page.loaded:
            if path.name != "404.html":  # its addresses begin at the root
                assert (path.parent / address.partition("?")[0]).is_file(), (path.name, address)
            assert "//" not in address, (path.name, address)
        for link in page.links:
            file, _, anchor = link.partition("#")
            if "://" in link or path.name == "404.html" or file == ".":
                continue
            target = (path.parent / file).resolve() if file else path
            assert target.is_file(), (path.name, link)
            if anchor and target in pages:
                assert anchor in pages[target].ids, (path.name, link)
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", style.read_text()), style.name


def test_pictures_are_read_by_the_page(site):
    assert "pictures/passes.svg" in (site / "architecture.html").read_text()
    assert "pictures/steps.svg" in (site / "index.html").read_text()
