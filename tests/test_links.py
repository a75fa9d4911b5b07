"""Relative links of the Markdown files, as read in the repository; `mkdocs build --strict` checks the site's."""

from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt
from mdit_py_plugins.anchors import anchors_plugin

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "other.md").write_text("# Some `code` here\n")
    (tmp_path / "page.md").write_text(
        "# Title\n\n[a](other.md#some-code-here) [b](https://example.org/none) [c](#title) `[code](none.md)`\n"
        "[d](none.md) [e](other.md#none) [f](#none) [g][reference] ![h](none.png)\n\n[reference]: gone.md\n"
    )
    assert broken_links(tmp_path / "page.md") == ["none.md", "other.md#none", "#none", "gone.md", "none.png"]


def broken_links(page):
    """The relative links and images of a page whose file, or whose heading in it, is not there."""
    broken = []
    for target in links_of(page):
        path, _, anchor = target.partition("#")
        file = page.parent / unquote(path) if path else page
        if not file.exists() or (anchor and anchor not in anchors_of(file)):
            broken.append(target)
    return broken


def links_of(page):
    inline = [part for token in parse(page) for part in token.children or ()]
    targets = [part.attrs.get("href") or part.attrs.get("src") for part in inline]
    return [target for target in targets if target and "://" not in target and not target.startswith("mailto:")]


def anchors_of(page):
    return {token.attrs.get("id") for token in parse(page)}


def parse(page):
    return MarkdownIt("gfm-like", {"linkify": False}).use(anchors_plugin, max_level=6).parse(page.read_text())
