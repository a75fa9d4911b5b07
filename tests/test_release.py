"""The package as it is released: one version, complete metadata, and what is in the wheel and in the source archive."""

import re
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import hatchling.build
import pytest
import yaml

import specscale
from specscale.__main__ import main

ROOT = Path(__file__).parent.parent
FOLDERS = ["specscale", "recipes", "tests", "docs"]
FILES = ["pyproject.toml", "README.md", "LICENSE", "CITATION.cff", "CHANGELOG.md", "CONTRIBUTING.md", "mkdocs.yml"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, zipfile.ZipFile(build(patch, tmp_path_factory, "wheel")) as archive:
        yield archive


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, tarfile.open(build(patch, tmp_path_factory, "sdist")) as archive:
        yield [name.split("/", 1)[1] for name in archive.getnames()]


def build(patch, tmp_path_factory, kind):
    """The path of what the build backend makes of this checkout."""
    folder = tmp_path_factory.mktemp(kind)
    patch.chdir(ROOT)
    return folder / getattr(hatchling.build, f"build_{kind}")(str(folder))


def metadata(wheel):
    return Parser().parsestr(wheel.read(f"specscale-{specscale.__version__}.dist-info/METADATA").decode())


def test_the_version_is_the_same_everywhere(wheel, capsys):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    heading = re.search(r"^## (\S+) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"specscale {specscale.__version__}\n"
    assert re.fullmatch(r"\d+\.\d+\.\d+", specscale.__version__)
    assert metadata(wheel)["Version"] == specscale.__version__
    assert citation["version"] == heading[1] == specscale.__version__
    assert str(citation["date-released"]) == heading[2]


def test_the_metadata_is_complete(wheel):
    data = metadata(wheel)
    holder = re.search(r"Copyright \(c\) \d+ (.+)", (ROOT / "LICENSE").read_text())[1]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert data["Author"] == data["Maintainer"] == citation["authors"][0]["name"] == holder
    # The form of PEP 639, which allows no classifier of the license beside it.
    assert data["License-Expression"] == citation["license"] == "MIT"
    assert not [line for line in data.get_all("Classifier") if line.startswith("License")]
    assert data["Summary"] == citation["abstract"]
    assert data["Description-Content-Type"] == "text/markdown"
    assert data.get_payload().strip() == (ROOT / "README.md").read_text().strip()
    assert citation["references"][0]["url"] in data["Project-URL"]
    # The oldest Python is stated twice.
    assert f"Programming Language :: Python :: {data['Requires-Python'].removeprefix('>=')}" in data.get_all(
        "Classifier"
    )
    assert "Typing :: Typed" in data.get_all("Classifier")
    needed = [line for line in data.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(re.match(r"\w+", line)[0] for line in needed) == ["einops", "torch"]


def test_the_wheel_holds_the_package_alone(wheel):
    info = f"specscale-{specscale.__version__}.dist-info"
    names = set(wheel.namelist())
    assert {name for name in names if not name.startswith(f"{info}/")} == files_of("specscale")
    assert "specscale/py.typed" in names
    assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_the_source_archive_holds_tests_recipes_and_docs(sdist):
    assert {name.split("/")[0] for name in sdist} == {*FOLDERS, *FILES, ".ci", ".gitignore", "PKG-INFO"}
    for folder in FOLDERS:
        assert files_of(folder) <= set(sdist)


def files_of(folder):
    """The files of a folder, without what Python and the linters keep there."""
    paths = [path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()]
    kept = [path for path in paths if not any(part.startswith((".", "__pycache__")) for part in path.parts[:-1])]
    return {path.as_posix() for path in kept}


def test_an_import_loads_the_dependencies_and_nothing_else():
    code = (
        "import sys, torch, einops; before = set(sys.modules); import specscale.integrations; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) - {"torch", "einops"} == {"specscale"}
