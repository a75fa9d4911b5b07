"""The study of a language model: what is held, how rates are compared, what is asked for, the record, the command."""

import sys
from dataclasses import replace

import pytest
import torch
from test_recipe import ROOT, run
from torch import nn

from language_model import SIDES, SIZES, Cell, Options, hold, learning_rate, plan, range_text, study, working_range
from lib.studies import read_record
from lib.workloads import GPT
from specscale import NormScaler, is_norm_scaled


def after_two_steps(cell):
    """The model after two steps at a rate that moves every norm, and its norms before, as they were drawn."""
    torch.manual_seed(0)
    model = GPT(SIZES)
    drawn = {name: layer.weight.norm().item() for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    hold(model, optimizer, cell)
    at_start = model.head.weight.norm().item(), model.tokens.weight.norm(dim=1)
    for _ in range(2):
        model(torch.arange(8)[None]).square().mean().backward()
        optimizer.step()
    return model, drawn, at_start


def test_held_weights_stay_on_their_targets():
    model, drawn, _ = after_two_steps(Cell("everything", 0.5))
    for name, norm in drawn.items():
        factor = 2.0 if name == "head" else 0.5
        assert model.get_submodule(name).weight.norm().item() == pytest.approx(factor * norm, rel=1e-5)
    for embedding in (model.tokens, model.positions):
        torch.testing.assert_close(embedding.weight.norm(dim=1), torch.ones(len(embedding.weight)))


def test_released_weights_start_on_the_same_targets_and_leave_them():
    model, drawn, (head, rows) = after_two_steps(Cell("everything", released=True))
    assert head == pytest.approx(2 * drawn["head"], rel=1e-5)
    torch.testing.assert_close(rows, torch.ones(len(rows)))
    assert not is_norm_scaled(model)
    assert model.head.weight.norm().item() > 1.05 * head


def test_targets_rise_over_the_steps_of_the_run():
    model, drawn, (head, _) = after_two_steps(Cell("everything, rising to 2", steps=4))
    assert head == pytest.approx(2 * drawn["head"], rel=1e-5)
    assert NormScaler.of(model).metrics()["target/head"] == pytest.approx(3 * drawn["head"], rel=1e-5)


def test_the_learning_rate_rises_then_falls_to_zero():
    rates = [learning_rate(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[52] == pytest.approx(0.5, abs=0.02)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0)


def test_a_range_ends_where_the_loss_is_the_margin_above_the_best_or_with_the_grid():
    losses = {1e-3: 3.3, 1e-2: 3.0, 1e-1: 3.05}
    # Half of the way from 3.0 to 3.3, on a logarithmic axis.
    assert working_range(losses) == pytest.approx((10**-2.5, 1e-1))
    assert range_text(losses) == "0.0032 to 0.1000, at least 31.6 times"
    assert range_text(losses | {1.0: 3.25}) == "0.0032 to 0.3162, 100.0 times"
    # What works again beyond a rate that does not is not part of the range.
    assert working_range({1e-3: 3.0, 1e-2: 3.3, 1e-1: 3.0}) == pytest.approx((1e-3, 10**-2.5))


def test_more_seeds_are_asked_for_where_the_validation_loss_is_lowest():
    options = Options(rates=(0.1, 0.2), pilots=False, seeds=3, steps=2)
    grid = list(plan({}, options))
    assert len(grid) == len(set(grid)) == 2 * sum(map(len, SIDES.values()))
    # The test losses say the contrary.
    results = {cell: {"validation": cell.lr + cell.decay, "test": -cell.lr} for cell in grid}
    best = Cell("everything", released=True, lr=0.1, steps=2)
    results[replace(best, released=False)]["validation"] = 0.0
    more = set(plan(results, options)) - set(grid)
    seeds = {replace(best, seed=1), replace(best, seed=2)}
    assert more == seeds | {replace(cell, released=False) for cell in seeds}


def test_the_committed_table_is_that_of_its_record():
    results = ROOT / "docs" / "results"
    own = study(Options())
    assert (results / "language-model.md").read_text() == own.table(read_record(own, results / "language-model.json"))


@pytest.mark.slow
def test_the_command_measures_the_grid_and_shows_it(tmp_path):
    small = ["--steps", "2", "--rates", "0.01", "--no-pilots", "--seeds", "1", "--jobs", "1", "--out", "out"]
    code, said = run([sys.executable, str(ROOT / "recipes" / "language_model.py"), *small], tmp_path)
    assert code == 0, said
    own = study(Options())
    results = read_record(own, tmp_path / "out" / "language-model.json")
    assert len(results) == 8
    assert all(4 < result["test"] < 40 for result in results.values())  # bits; 8 are those of a guess
    assert own.table(results) in said
    assert (tmp_path / "out" / "language-model.png").stat().st_size > 10_000
