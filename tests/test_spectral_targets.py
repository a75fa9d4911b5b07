"""The study of spectral targets: which runs it asks for, what a run holds, the command, and the committed table."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from test_recipe import ROOT, run

from lib.studies import read_record
from spectral_targets import Cell, Options, main, plan, settings, study_of, train

TINY = Options(data="digits", images=64, validation=32, width=16, epochs=1, targets=(1.0, 2.0), heads=(0.2,), seeds=2)


def test_the_grid_comes_first_then_other_rates_then_seeds_of_what_is_best_in_validation():
    plain = next(iter(settings(TINY).values())).plain
    results = {}

    def answer(cells):
        """Larger targets are better in validation and worse in the test, and small rates are better."""
        for cell in cells:
            value = (cell.hidden if cell.norm == "spectral" and cell.hidden != "initial" else 0) - cell.lr
            results[cell] = {"validation accuracy": value, "test accuracy": -value}

    grid = list(plan(TINY, results))
    assert {cell.seed for cell in grid} == {0}
    assert {cell.lr for cell in grid if cell.norm == "none"} == set(TINY.rates)
    assert {cell.lr for cell in grid if cell.norm == "spectral"} == {1e-3, 1e-2}
    assert {cell.head for cell in grid if cell.hidden == 2.0} == {2.0, 0.2, "free"}
    answer(grid)
    held = replace(plain, norm="spectral", hidden=2.0, head=2.0)
    free = replace(held, head="free")
    rates = [cell for cell in plan(TINY, results) if cell not in results]
    assert rates == [replace(one, lr=lr) for one in (held, free) for lr in (3e-3, 3e-2)]
    answer(rates)
    seeds = [cell for cell in plan(TINY, results) if cell not in results]
    best = [plain, replace(plain, norm="frobenius"), held, free]
    assert {cell for cell in seeds if cell.seed} == {replace(one, seed=1) for one in best}
    answer(seeds)
    # The next setting follows.
    assert {cell.depth for cell in plan(TINY, results) if cell not in results} == {5}


@pytest.mark.parametrize(("head", "norm"), [(8.0, 8.0), ("free", None)])
def test_a_run_holds_the_hidden_layers_and_the_head_on_targets_of_their_own(head, norm):
    result = train(TINY, Cell(16, 3, 2, 1e-4, "spectral", 4.0, head))
    assert result["norms"][:2] == pytest.approx([4.0, 4.0], rel=1e-4)
    if norm is None:
        assert result["norms"][2] < 1.5  # sqrt(10 / 16) at the init
    else:
        assert result["norms"][2] == pytest.approx(norm, rel=1e-4)


def test_weight_decay_pulls_on_the_norms_of_a_run_without_scaling():
    free, decayed = (train(TINY, Cell(16, 3, 2, 1e-3, decay=decay)) for decay in (0.0, 100.0))
    assert all(small < large for small, large in zip(decayed["norms"], free["norms"], strict=True))


def test_too_many_images_and_a_folder_without_data_are_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"1437 images for training and validation; give smaller numbers than \[10000, "
    ):
        train(replace(TINY, images=10_000), Cell(16, 3, 1, 1e-3))
    with pytest.raises(SystemExit, match="holds no cifar-100-python; give --data-root DIR"):
        main(Options(data_root=tmp_path))


@pytest.mark.slow
def test_the_command_measures_every_setting(tmp_path):
    small = [
        "--data",
        "digits",
        "--images",
        "64",
        "--validation",
        "32",
        "--width",
        "8",
        "--epochs",
        "1",
        "--seeds",
        "1",
    ]
    small += ["--targets", "1", "--heads", "0.2", "--rates", "1e-3", "3e-3", "1e-2", "--decays", "1", "--jobs", "1"]
    code, said = run([sys.executable, str(ROOT / "recipes" / "spectral_targets.py"), *small, "--out", "out"], tmp_path)
    assert code == 0, said
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".jsonl", ".md", ".png"}
    table = (tmp_path / "out" / "spectral_targets.md").read_text()
    assert table in said
    assert table.count("| spectral, head free |") == 3


def test_the_committed_table_is_that_of_its_record():
    study, results = study_of(Options()), Path(ROOT) / "docs" / "results"
    record = read_record(study, results / "spectral_targets.json")
    assert (results / "spectral_targets.md").read_text() == study.table(record)
