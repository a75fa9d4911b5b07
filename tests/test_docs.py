"""Every block of Python in the README and the docs runs."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKS = [
    pytest.param(block.split("```")[0], id=f"{path.name}-{number}")
    for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))
    for number, block in enumerate(path.read_text().split("```python\n")[1:])
]


@pytest.mark.parametrize("block", BLOCKS)
def test_the_block_runs(block):
    exec(block, {})
