"""When a network generalizes: what the two factors do to it, which runs are asked for, what is shown, the command."""

import sys

import pytest
import torch
from test_recipe import ROOT, run
from torch import nn

from delay import DECAYS, Cell, Options, plan, prepare, steps_text, study
from lib.modular_addition import pairs
from lib.studies import read_record

NUMBERS = torch.arange(97)
ANY_PAIRS = torch.stack([NUMBERS, NUMBERS.flip(0)], 1)


def cell(layers, logits, decay=0.0):
    return Cell(layers, logits, decay, seed=0, steps=50)


def test_the_logits_start_at_their_scale_whatever_the_norm_of_the_layers():
    plain, _ = prepare(cell(None, 1.0))
    for layers, logits in ((1.0, 1.0), (2.0, 1.0), (0.5, 1.0), (2.0, 2.0), (1.0, 2.0)):
        model, _ = prepare(cell(layers, logits))
        torch.testing.assert_close(model(ANY_PAIRS), logits**3 * plain(ANY_PAIRS))
        for layer, free in zip(model, plain, strict=False):
            if isinstance(layer, nn.Linear):
                assert layer.weight.norm().item() == pytest.approx(layers * free.weight.norm().item(), rel=1e-5)


def train_five_steps(model, optimizer):
    (inputs, sums), _ = pairs(seed=0)
    for group in optimizer.param_groups:
        group["eps"] = 1e-200
    for start in range(0, 500, 100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs[start:][:100]), sums[start:][:100]).backward()
        optimizer.step()
    return model(ANY_PAIRS)


@pytest.mark.parametrize("logits", [1.0, 2.0])
def test_a_norm_acts_by_the_scale_of_the_logits_and_by_the_relative_rate_alone(logits):
    """Layers at twice their norm, with rates to match, train like layers at their norm with as large logits."""
    torch.set_default_dtype(torch.float64)
    try:
        expected = train_five_steps(*prepare(cell(1.0, logits)))
        unmatched = train_five_steps(*prepare(cell(2.0, logits)))
        model, optimizer = prepare(cell(2.0, logits))
        (group,) = optimizer.param_groups
        # The embedding, then the weight and the bias of each layer; a bias is added to activations of factor 2, 4, 8.
        factors = [1, 2, 2, 2, 4, 2, 8]
        optimizer.param_groups = [
            group | {"params": [parameter], "lr": factor * group["lr"]}
            for parameter, factor in zip(group["params"], factors, strict=True)
        ]
        found = train_five_steps(model, optimizer)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected)
    assert (unmatched - expected).abs().max() > 0.1


def test_the_series_share_the_run_at_the_initial_norms_and_other_seeds_follow_where_the_first_learned():
    options = Options(factors=(0.7, 1.0, 2.0), seeds=3, reference_seeds=0)
    grid = [one for one in plan({}, options) if one.layers is not None]
    factors = [(0.7, 0.7), (0.7, 1), (1, 0.7), (1, 1), (2, 2), (2, 1), (1, 2)]
    assert [(one.layers, one.logits) for one in grid] == factors
    assert {one.seed for one in grid} == {0}
    results = {one: {"train": 300 if one.logits == 2 else None, "test": None} for one in plan({}, options)}
    more = [(one.layers, one.logits, one.seed) for one in plan(results, options) if one not in results]
    assert more == [(2, 2, 1), (1, 2, 1), (2, 2, 2), (1, 2, 2)]


def test_the_best_decay_is_the_one_that_learns_the_test_pairs_first():
    options = Options(seeds=0, reference_seeds=3)
    results = {one: {"train": 100, "test": None} for one in plan({}, options)}
    assert {one.decay for one in results} == {0.0, *DECAYS}
    results[Cell(None, 1.0, 0.3, 0, options.steps)] = {"train": 900, "test": 800}
    more = [one for one in plan(results, options) if one not in results]
    assert more == [Cell(None, 1.0, 0.3, seed, options.steps) for seed in (1, 2)]


def test_a_median_counts_the_runs_that_did_not_get_there():
    def results(*steps):
        return [{"test": one} for one in steps]

    assert steps_text(results(300, 500, 400), "test") == "400"
    assert steps_text(results(300, None, 400), "test") == "400 (2 of 3)"
    assert steps_text(results(300, None, None), "test") == "- (1 of 3)"


def test_the_committed_table_is_that_of_the_record():
    whole = study(Options())
    results = read_record(whole, ROOT / "docs" / "results" / "delay.json")
    assert (ROOT / "docs" / "results" / "delay.md").read_text() == whole.table(results)
    assert set(results) == set(plan(results, Options()))


@pytest.mark.slow
def test_the_command(tmp_path):
    small = [
        "--factors",
        "1",
        "2",
        "--seeds",
        "1",
        "--reference-seeds",
        "2",
        "--steps",
        "1",
        "--jobs",
        "1",
        "--out",
        "out",
    ]
    code, said = run([sys.executable, str(ROOT / "recipes" / "delay.py"), *small], tmp_path)
    assert code == 0, said
    whole = study(Options())
    results = read_record(whole, tmp_path / "out" / "delay.json")
    assert {one.steps for one in results} == {1}
    assert {(one.layers, one.logits) for one in results} == {(None, 1), (1, 1), (2, 2), (2, 1), (1, 2)}
    assert all(one["train"] is None and 0 <= one["test accuracy"] < 0.1 for one in results.values())
    assert (tmp_path / "out" / "delay.md").read_text() == whole.table(results)
    assert whole.table(results) in said
    assert (tmp_path / "out" / "delay.png").exists()
