"""The study of plasticity: what its methods do to the norms, which cells it chooses, its command and its record."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from test_recipe import ROOT, run

from lib.studies import read_record
from plasticity import METHODS, NUM_IMAGES, STUDY, Cell, Options, batches, build, dead_units, measure, plan, table

SMALL = Options(rates=(1e-2,), steps=2, grid_tasks=2, tasks=3, seeds=2)


def test_the_committed_table_is_that_of_the_record():
    results = ROOT / "docs" / "results"
    assert (results / "plasticity.md").read_text() == table(read_record(STUDY, results / "plasticity.json"))


@pytest.mark.slow
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


def test_the_best_of_each_method_and_bare_networks_at_every_rate_take_more_seeds():
    options = Options(rates=(1e-3, 1e-2), seeds=2, grid_tasks=6, tasks=9)
    results = {}
    grid = set(plan(options, results))
    assert len(grid) == 2 * sum(len(method.strengths) for method in METHODS.values())
    for cell in grid:
        # Nothing is best at the small rate, and every other method at the large one, at its last strength.
        is_best = (cell.lr == 1e-3) == (cell.method == "nothing") and cell.strength == METHODS[cell.method].strengths[
            -1
        ]
        # What is learned before the last five tasks does not count.
        results[cell] = {"accuracy": [float(not is_best)] + 5 * [0.5 + 0.1 * is_best]}
    more = [cell for cell in plan(options, results) if cell not in grid]
    chosen = {(name, 1e-2, method.strengths[-1]) for name, method in METHODS.items()} | {
        ("nothing", 1e-3, 0),
        ("layer norm", 1e-3, 0),
    }
    assert set(more) == {Cell(*cell, seed, tasks=9, steps=100) for cell in chosen for seed in (1, 2)}
    assert len(more) == 2 * len(chosen)


def test_what_the_methods_do_to_the_norms():
    cell = Cell("nothing", 3e-3, 0.0, seed=1, tasks=2, steps=20)
    free = measure(cell)["growth"]
    for name in ("Frobenius norm", "layer norm, Frobenius norm"):
        assert measure(replace(cell, method=name, strength=2.0))["growth"] == pytest.approx(2, rel=1e-3)
    for name, strength in (("L2", 1.0), ("weight decay", 3.0), ("layer norm, weight decay", 3.0)):
        assert measure(replace(cell, method=name, strength=strength))["growth"] < 0.95 * free


@torch.no_grad()
def test_layer_norm_leaves_the_init_of_the_weights_and_dead_units_are_counted():
    plain, normalized = build(0, layer_norm=False), build(0, layer_norm=True)
    for one, other in zip(plain[::2], normalized[::3], strict=True):
        assert one.weight.equal(other.weight)
    plain[2].bias[:16] = -1e3
    assert dead_units(plain, torch.randn(50, 64)) == 16 / 128


def test_new_networks_begin_alike_and_then_with_each_task():
    cell = Cell("nothing", 1e-2, 0.0, seed=1, tasks=3, steps=20)
    carried, anew = measure(cell), measure(replace(cell, method="new network"))
    assert carried["accuracy"][0] == anew["accuracy"][0]
    assert carried["accuracy"][1:] != anew["accuracy"][1:]
    assert carried["growth"] > anew["growth"]


def test_an_epoch_has_every_image_once():
    batch = list(batches(11, torch.Generator()))
    for epoch in (batch[:5], batch[5:10]):
        assert torch.cat(epoch).sort().values.equal(torch.arange(NUM_IMAGES))
    assert not batch[0].equal(batch[5])
