"""What the README and the docs say: every block of Python runs, and every test that is named is there."""

import ast
import json
import re
from pathlib import Path
from unittest import mock

import pytest

import gan
import gpt
from compare import comparison
from lib.post import published_table
from lib.runs import Run, group_by_condition
from specscale.constraints import CONSTRAINTS

ROOT = Path(__file__).parent.parent
PAGES = [page for page in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))) if "```python\n" in page.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_blocks_run(page, tmp_path, monkeypatch):
    """A page's blocks one after another."""
    monkeypatch.chdir(tmp_path)
    names = {}
    # A page may add a constraint.
    with mock.patch.dict(CONSTRAINTS):
        for block in page.read_text().split("```python\n")[1:]:
            exec(block.split("```")[0], names)


def test_each_cell_of_the_support_matrix_is_a_test_for_that_norm():
    tests = {
        node.name
        for path in ROOT.glob("tests/test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and "norm" in {argument.arg for argument in node.args.args}
    }
    rows = re.findall(r"`(\w+) and frobenius` \| `(\w+) and spectral` \|", (ROOT / "README.md").read_text())
    assert rows
    for frobenius, spectral in rows:
        assert frobenius == spectral
        assert frobenius in tests


@pytest.mark.parametrize("preset", ["mlp-5x2000", "mlp-5x256", "resnet18-quarter"])
def test_the_experiments_tables_are_those_of_their_records(preset):
    results = ROOT / "docs" / "results"
    runs = group_by_condition(Run(**part) for part in map(run_of, json.loads((results / f"{preset}.json").read_text())))
    assert (results / f"{preset}.md").read_text() == comparison(runs)
    if preset == "mlp-5x2000":
        assert (results / "published.md").read_text().strip() == published_table({preset: runs}).strip()


def test_the_tables_of_the_critic_and_of_the_gpt_are_those_of_their_records():
    results = ROOT / "docs" / "results"
    critics = json.loads((results / "gan.json").read_text())["critics"]
    assert (results / "gan.md").read_text() == gan.table_of(critics)
    assert (results / "gpt.md").read_text() == gpt.table_of(json.loads((results / "gpt.json").read_text()))


def run_of(record):
    return {key: record[key] for key in ("config", "epochs", "snapshots", "summary")}
