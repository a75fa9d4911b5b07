"""Every block of Python in the README and the docs runs, a page's blocks one after another."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [page for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))) if "```python\n" in page.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_blocks_run(page):
    names = {}
    for block in page.read_text().split("```python\n")[1:]:
        exec(block.split("```")[0], names)
