"""The runner of studies: what is recorded, and when."""

import json
from dataclasses import dataclass

import pytest
from ranks import FORKSERVER

from lib import studies
from lib.studies import Study, StudyOptions, read_record, run_study


@pytest.fixture(autouse=True)
def _quick_start(monkeypatch):
    """Processes that are forked where torch has been imported."""
    monkeypatch.setattr(studies, "get_context", lambda _: FORKSERVER)


@dataclass(frozen=True)
class Cell:
    number: int


def square(cell):
    if cell.number < 0:
        raise ValueError("negative")
    return {"square": cell.number**2}


def study(plan):
    return Study(
        "squares", Cell, plan, square, lambda results: f"{len(results)} squares\n", lambda _, path: path.touch()
    )


def test_a_plan_asks_for_more_by_what_is_known_and_only_new_cells_are_measured(tmp_path, capfd):
    def plan(results):
        yield from map(Cell, (1, 2, 3))
        if len(results) >= 3:
            yield Cell(results[Cell(3)]["square"])

    options = StudyOptions(out=tmp_path, jobs=1)
    run_study(study(plan), options)
    record = read_record(study(plan), tmp_path / "squares.json")
    assert {cell.number: result["square"] for cell, result in record.items()} == {1: 1, 2: 4, 3: 9, 9: 81}
    assert (tmp_path / "squares.md").read_text() == "4 squares\n"
    lines = (tmp_path / "squares.jsonl").read_text()
    assert len(lines.splitlines()) == 4
    capfd.readouterr()
    run_study(study(lambda results: map(Cell, (1, 2, 3))), options)
    assert "done" not in capfd.readouterr().out
    assert (tmp_path / "squares.jsonl").read_text() == lines


def test_cells_that_end_after_one_has_failed_are_recorded(tmp_path):
    with pytest.raises(ValueError, match="negative"):
        run_study(study(lambda results: map(Cell, (-1, 2))), StudyOptions(out=tmp_path, jobs=2))
    known = [json.loads(line) for line in (tmp_path / "squares.jsonl").read_text().splitlines()]
    assert known == [{"cell": {"number": 2}, "result": {"square": 4}}]
