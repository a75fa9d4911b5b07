"""The benchmarks by their real options, on a model that is small enough."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from test_recipe import ROOT, run

from lib.benchmarks import SolverOptions, StepOptions, main, run_command
from specscale import Block

SMALL = ["--width", "80", "--batch-size", "16", "--num-threads", "1", "--out", "out"]


def benchmark(kind, folder, *options, message=""):
    command = [sys.executable, str(ROOT / "recipes" / "benchmark.py"), kind, *SMALL, *options]
    code, said = run(command, folder)
    assert code == 0, said
    assert message in said
    return results(kind, folder, said)


def results(kind, folder, said):
    """What the three files hold, of which the table is printed too."""
    stem = f"{kind}-mlp-5x2000-width-80-adam-0.001"
    assert {path.name for path in (folder / "out").iterdir()} == {f"{stem}.{end}" for end in ("json", "md", "png")}
    assert (folder / "out" / f"{stem}.md").read_text().splitlines()[2] in said
    return json.loads((folder / "out" / f"{stem}.json").read_text())


def test_the_solvers_are_compared_on_one_training_run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # The command in this process: a new one would import torch again.
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "solver", *SMALL, "--steps", "4", "--every", "2"])
    threads = torch.get_num_threads()
    try:
        run_command("")
    finally:
        torch.set_num_threads(threads)
    found = results("solver", tmp_path, capsys.readouterr().out)
    rows = {row["solver"]: row for row in found["solvers"]}
    assert rows["svd"]["max error"] < 1e-5
    assert rows["block"]["max error"] < 10 * Block().tolerance < rows["power, 1 warm"]["max error"]
    assert 3 <= rows["block"]["reads of W"] < 41 == rows["power, 20 warm"]["reads of W"]
    assert found["worst |u^T W' v / t - 1|"] < 1e-5
    assert (found["threads"], found["torch"]) == (1, torch.__version__)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found["commit"] == "unknown" or head.stdout.startswith(found["commit"].removesuffix("-dirty"))


@pytest.mark.slow
def test_an_interrupted_comparison_goes_on_to_the_same_results(tmp_path, monkeypatch):
    steps = ["--steps", "4", "--every", "2"]
    found = benchmark("solver", tmp_path, *steps)
    options = SolverOptions(width=80, batch_size=16, steps=4, every=2, out=tmp_path / "again" / "out")
    options = replace(options, num_threads=1, checkpoint_minutes=0)
    batches, threads = list(islice(options.batches(options.workload()), 3)), torch.get_num_threads()

    def interrupted(*_):
        yield from batches
        raise KeyboardInterrupt

    monkeypatch.setattr(SolverOptions, "batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(options)
    for changes, text in [
        ({}, "holds an unfinished run; --resume goes on, --overwrite measures again"),
        ({"resume": True, "every": 1}, "was begun with every = 2, found 1; --resume with the same options, or give"),
        ({"resume": True, "overwrite": True}, "--resume and --overwrite exclude each other"),
    ]:
        with pytest.raises(SystemExit, match=text):
            main(replace(options, **changes))
    torch.set_num_threads(threads)
    resumed = benchmark("solver", tmp_path / "again", *steps, "--resume", message="goes on after step 3 of 4")
    for result in ("solvers", "worst |u^T W' v / t - 1|"):
        assert resumed[result] == found[result]


@pytest.mark.filterwarnings("ignore:capture. no CUDA graph")
def test_the_conditions_are_timed_in_turns(tmp_path, capsys):
    norms = ("none", "frobenius", "spectral", "clipped")
    options = StepOptions(width=80, batch_size=16, steps=3, turn=2, norms=norms, reference=False, out=tmp_path / "out")
    main(replace(options, amp=True, channels_last=True, fused=True, capture=True))
    found = results("step", tmp_path, capsys.readouterr().out)
    rows = {row["condition"]: row for row in found["conditions"]}
    assert (found["steps"], found["lr"], found["turn"]) == (3, 1e-3, 2)
    captured = ["frobenius, captured", "spectral, captured"]
    # An exact decomposition cannot be captured.
    assert list(rows) == [*norms, "torch spectral_norm", *captured]
    assert rows["none"]["ratio to none"] == pytest.approx(1)
    assert all(row["ms / step"] > row["ms scaling"] >= 0 for row in rows.values())
    assert rows["spectral"]["scaling / none"] > 0 == rows["none"]["scaling / none"]
    assert rows["frobenius"]["launches"] == rows["frobenius, captured"]["launches"] > 0
    # A spectral step has as many as its iterations, which need not be the same in the next one.
    assert min(rows[name]["launches"] for name in ("spectral", "spectral, captured")) > 100
    # The bytes of an iteration are 20 a parameter, and those of a norm 12.
    floors = [rows[norm]["floor, ms"] for norm in ("frobenius", "spectral")]
    assert floors[0] > 0
    assert floors[1] / floors[0] > 0.999 * 20 / 12
    assert rows["spectral"]["iterations"] >= 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (StepOptions(preset="gpt-24x2048", data_root=Path("data")), "--data-root has no data for gpt-24x2048, which"),
        (StepOptions(optimizer="nadam", fused=True), "--fused: torch has no fused step of nadam; choose adam or adamw"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, text):
    with pytest.raises(SystemExit, match=text):
        options.batches(options.workload())


def test_the_times_need_a_step_without_scaling():
    with pytest.raises(SystemExit, match="--norms must hold none, whose step the others are compared with"):
        main(StepOptions(norms=("spectral",)))
