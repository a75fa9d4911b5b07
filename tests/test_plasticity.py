"""The study of plasticity: what its methods do to the norms, which cells it chooses, its command and its record."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from test_recipe import ROOT, run

from lib.studies import read_record
from plasticity import NUM_IMAGES, STRENGTHS, STUDY, Cell, Options, batches, measure, plan, table

SMALL = Options(rates=(1e-2,), steps=2, grid_tasks=2, tasks=3, seeds=2)


def test_the_committed_table_is_that_of_the_record():
    results = ROOT / "docs" / "results"
    assert (results / "plasticity.md").read_text() == table(read_record(STUDY, results / "plasticity.json"))


def test_a_small_run_of_the_command(tmp_path):
    sizes = "--rates 1e-2 --steps 2 --grid-tasks 2 --tasks 3 --seeds 2 --jobs 1 --out out"
    code, said = run([sys.executable, str(ROOT / "recipes" / "plasticity.py"), *sizes.split()], tmp_path)
    assert code == 0, said
    out = tmp_path / "out"
    assert {path.suffix for path in out.iterdir()} == {".json", ".jsonl", ".md", ".png"}
    results = read_record(STUDY, out / "plasticity.json")
    assert set(plan(SMALL, results)) == set(results)
    assert {len(result["accuracy"]) for result in results.values()} == {2, 3}
    assert (out / "plasticity.md").read_text() == table(results)
    assert (out / "plasticity.md").read_text() in said
    assert json.loads((out / "plasticity.json").read_text())["command"] == f"recipes/plasticity.py {sizes}"


def test_the_best_of_each_method_and_nothing_at_the_best_rate_of_new_networks_take_more_seeds():
    options = Options(rates=(1e-3, 1e-2), seeds=2, grid_tasks=6, tasks=9)
    results = {}
    grid = set(plan(options, results))
    assert len(grid) == 2 * sum(map(len, STRENGTHS.values()))
    for cell in grid:
        # Nothing is best at the small rate, all others at the large one; the decays with the strength of 1 or 1e-3.
        better = (cell.lr == 1e-3) == (cell.method == "nothing") and cell.strength in (0, 1, 1e-3)
        # What is learnt before the last five tasks does not count.
        results[cell] = {"accuracy": [float(not better)] + 5 * [0.5 + 0.1 * better]}
    more = [cell for cell in plan(options, results) if cell not in grid]
    chosen = {("nothing", 1e-3, 0), ("nothing", 1e-2, 0), ("new network", 1e-2, 0), ("weight decay", 1e-2, 1)}
    chosen |= {("L2", 1e-2, 1e-3), ("L2 to the init", 1e-2, 1e-3)}
    chosen |= {("Frobenius norm", 1e-2, 1), ("spectral norm", 1e-2, 1)}
    assert set(more) == {Cell(*cell, seed, tasks=9, steps=100) for cell in chosen for seed in (1, 2)}
    assert len(more) == 2 * len(chosen)


def test_what_the_methods_do_to_the_norms():
    cell = Cell("nothing", 3e-3, 0.0, seed=1, tasks=2, steps=50)
    free = measure(cell)["growth"]
    assert measure(replace(cell, method="Frobenius norm", strength=2.0))["growth"] == pytest.approx(2, rel=1e-3)
    assert measure(replace(cell, method="L2", strength=1.0))["growth"] < 0.9
    assert measure(replace(cell, method="L2 to the init", strength=10.0))["growth"] == pytest.approx(1, abs=0.1)
    assert measure(replace(cell, method="weight decay", strength=3.0))["growth"] < 0.9 * free


def test_new_networks_begin_alike_and_then_with_each_task():
    cell = Cell("nothing", 1e-2, 0.0, seed=1, tasks=3, steps=50)
    carried, anew = measure(cell), measure(replace(cell, method="new network"))
    assert carried["accuracy"][0] == anew["accuracy"][0]
    assert carried["accuracy"][1:] != anew["accuracy"][1:]
    assert carried["growth"] > anew["growth"]


def test_an_epoch_has_every_image_once():
    batch = list(batches(11, torch.Generator()))
    for epoch in (batch[:5], batch[5:10]):
        assert torch.cat(epoch).sort().values.equal(torch.arange(NUM_IMAGES))
    assert not batch[0].equal(batch[5])
