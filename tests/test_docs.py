"""What the README and the docs say: every block of Python runs, every test and public name that is named is there."""

import ast
import inspect
import json
import os
import re
import socket
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml

import gan
import gpt
import specscale
from compare import comparison
from lib.post import published_table
from lib.runs import Run, group_by_condition
from specscale.constraints import CONSTRAINTS

ROOT = Path(__file__).parent.parent
DOCS = sorted({*ROOT.glob("docs/**/*.md")} - {*ROOT.glob("docs/results/*.md")})
PAGES = [page for page in (ROOT / "README.md", *DOCS) if "```python" in page.read_text()]
REFERENCE = sorted(ROOT.glob("docs/reference*.md"))
MAX_LINES = 100
"""The length of a page, in lines of at most 120 characters: about two screens."""
CODE_WIDTH = 76
"""Characters of a line of code that fit beside the navigation and the table of contents."""


def blocks_of(text, language=r"\w+"):
    return re.findall(rf"^```{language}(?: [^\n]*)?\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


# That of torch 2.9's distributed checkpoints.
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_run(page, tmp_path, monkeypatch):
    """A page's blocks one after another."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    text = page.read_text()
    if "init_process_group" in text:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        process = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        for name, value in process.items():
            monkeypatch.setenv(name, str(value))
    names = {}
    # A page may add a constraint, and W&B a variable, by which later processes would find its own.
    with mock.patch.dict(CONSTRAINTS), mock.patch.dict(os.environ):
        try:
            for block in blocks_of(text, "python"):
                exec(block, names)
        finally:
            # Where a block fails before it does so itself, the tests that follow must not.
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.stem)
def test_a_page_is_short_and_its_code_fits_its_box(page):
    text = page.read_text()
    assert len(text.splitlines()) <= MAX_LINES
    for block in blocks_of(text):
        assert max(map(len, block.splitlines())) <= CODE_WIDTH, block


def public_names():
    """Every public name of the package, and every method and property of its handle and of its schedules."""
    for name in specscale.__all__:
        yield name, rf"\b{name}\b"
    for name, _ in inspect.getmembers(specscale.NormScaler):
        if not name.startswith("_"):
            yield f"NormScaler.{name}", rf"\.{name}\b"
    for name in ("Constant", "Linear", "Cosine"):
        yield f"schedules.{name}", rf"schedules\.{name}\("


@pytest.mark.parametrize(("name", "use"), list(public_names()))
def test_every_public_name_has_an_example_in_the_reference(name, use):
    """The block behind the name's own entry uses it."""
    entries = [entry for page in REFERENCE for entry in re.split(r"^::: specscale\.", page.read_text(), flags=re.M)[1:]]
    (own,) = [entry for entry in entries if entry.split("\n")[0] == name]
    examples = "".join(blocks_of(own, "python"))
    assert re.search(use, examples)


def test_the_site_asks_no_other_site_for_anything():
    text = (ROOT / "mkdocs.yml").read_text()
    config = yaml.safe_load(text)
    assert config["theme"]["font"] is False
    assert "http" not in text
    for page in DOCS:
        assert not re.search(r"!\[[^]]*\]\(http|<(script|img|link|iframe)\b", page.read_text()), page
    for asset in (ROOT / "docs" / "assets").iterdir():
        assert not re.search(r"https?:|//[a-z]+\.[a-z]|@import", asset.read_text()), asset


def test_each_line_of_the_support_matrix_names_a_test_of_both_norms():
    tests = {
        node.name
        for path in ROOT.glob("tests/test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and "norm" in {argument.arg for argument in node.args.args}
    }
    rows = re.findall(r"^\| [^|]+ \| `(\w+)` \|$", (ROOT / "docs" / "support.md").read_text(), flags=re.M)
    assert len(rows) >= 30
    for test in rows:
        assert test in tests


@pytest.mark.parametrize("preset", ["mlp-5x2000", "mlp-5x256", "resnet18-quarter", "modular-addition"])
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
