"""What is said of runs, from runs whose numbers are known."""

import json
import runpy
import shutil
import statistics
import sys
from dataclasses import replace

import pytest
from test_recipe import ROOT

from compare import compare_all
from lib.columns import statistics_of
from lib.post import findings, published_table
from lib.presets import digits
from lib.runs import Run, group_by_condition, read_runs
from lib.summaries import header_of, record, table_rows
from report import main as report
from train import main as train


def run(norm, targets="described", seed=0, norms=(1.0, 3.0), gap=0.5, epochs=4, step=10.0, data="cifar100"):
    lines = [
        {
            "epoch": epoch,
            "train/accuracy": 0.1 * epoch,
            "test/accuracy": 0.1 * epoch - 0.05,
            "train/loss": 4.0 - 0.1 * epoch,
            "test/loss": 4.0 - 0.1 * epoch + gap * epoch / epochs,
            "lr": 1e-3,
            **{f"spectral_norm/{layer}": norm * epoch for layer, norm in enumerate(norms)},
        }
        for epoch in range(1, epochs + 1)
    ]
    summary = {"time/step_ms": step, "targets": {}, "provenance": {"commit": "abc"}}
    config = {"norm": norm, "targets": targets, "seed": seed, "preset": "mlp-5x2000", "data": data}
    return Run(config | {"steps_per_epoch": 50}, lines, [], summary)


def test_statistics_are_those_of_the_post():
    found = statistics_of(run("none"))
    assert found["test accuracy %"] == pytest.approx(35)
    assert found["accuracy gap"] == pytest.approx(5)
    assert found["loss gap"] == pytest.approx(0.5)
    # Epoch 3 of 4 is the penultimate one, and the last half are 3 and 4.
    assert found["spectral norm, mean"] == pytest.approx(statistics.mean([3, 9]))
    assert found["spectral norm, deviation"] == pytest.approx(statistics.mean([3, 4]))


def test_the_table_averages_seeds_and_measures_time_against_no_scaling():
    runs = group_by_condition([run("spectral", seed=1, step=30.0), run("spectral", step=10.0), run("none")])
    assert list(runs) == ["none", "spectral"]
    table = {row[0]: dict(zip(header_of(runs), row, strict=True)) for row in table_rows(runs)}
    assert table["spectral"]["ms / step"] == "20.00 ± 14.14"
    assert table["spectral"]["ratio to none"] == "2.000"
    assert table["none"]["test accuracy %"] == "35.00"
    alone = group_by_condition([run("spectral")])
    assert table_rows(alone)[0][-1] == "-"


def test_findings_are_told_whether_they_hold_or_not():
    good = [run("none", norms=(9, 20), gap=2), run("frobenius", norms=(4, 8), gap=1)]
    holding = findings(group_by_condition([*good, run("spectral", norms=(0.80, 0.81), gap=0.1)]))
    assert [one.holds for one in holding] == [True] * 4
    assert holding[1].numbers == "none 43.500, frobenius 18.000, spectral 2.415"
    failing = findings(group_by_condition([*good, run("spectral", "published", norms=(9, 40), gap=3)]))
    assert [one.holds for one in failing] == [False] * 4
    assert "spectral-published" in failing[0].claim
    assert findings(group_by_condition([run("spectral")])) == []


def test_ours_stand_beside_the_published_figures():
    table = published_table({"mlp-5x2000": group_by_condition([run("spectral", "published")]), "other": {}})
    row = [cell.strip() for cell in table.splitlines()[2].strip("|").split("|")]
    assert row[:8] == ["mlp-5x2000", "spectral-published", "4", "1", "35.00", "23.21", "4.10", "3.53"]
    assert row[8:] == ["6", "0.8", "3.5", "0.02"]
    assert published_table({"digits": group_by_condition([run("none")])}) == ""


def test_a_record_is_small_and_whole():
    found = record(run("none"))
    assert found["condition"] == "none"
    assert found["epochs"][2]["train/accuracy"] == 0.3
    assert found["summary"]["provenance"] == {"commit": "abc"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    norms = ("none", "frobenius", "spectral", "clipped")
    config = replace(digits(), norms=norms, epochs=2, width=80, out=out, wandb="disabled", compare=False)
    train(config)
    train(replace(config, norms=("spectral",), targets="published", spectra=()))
    return out


@pytest.fixture(scope="module")
def said(trained):
    """The tables of the runs, which are drawn."""
    return compare_all(trained)


def test_everything_is_drawn_and_recorded(trained, said):
    folder = trained / "digits"
    pictures = ["accuracy", "curves", "excess", "iterations", "loss", "ranks", "spectra", "spectral_norms"]
    assert sorted(path.stem for path in folder.glob("*.png")) == pictures
    assert "The runs differ in spectra" in said
    assert "| spectral-published |" in said
    assert "| clipped | 2 | " in said
    records = json.loads((folder / "results.json").read_text())
    assert [one["condition"] for one in records] == list(read_runs(folder))
    assert all(one["summary"]["provenance"]["command"] for one in records)
    assert records[-1]["epochs"][1]["epoch"] == 2


def test_clipped_runs_hold_every_layer_on_its_target(trained):
    (clipped,) = read_runs(trained / "digits")["clipped"]
    for line in [*clipped.epochs]:
        for name, target in clipped.summary["targets"].items():
            assert line[f"spectral_norm/{name}"] == pytest.approx(target, rel=1e-5)


def test_the_worst_norm_over_its_target_is_that_of_the_constrained_norm(trained):
    runs = read_runs(trained / "digits")
    worst = {condition: statistics_of(seeds[0])["worst norm / target"] for condition, seeds in runs.items()}
    assert worst["none"] is None
    assert worst["frobenius"] == pytest.approx(1, abs=1e-5)
    assert worst["clipped"] == pytest.approx(1, abs=1e-5)
    assert worst["spectral"] > 1.01
    for line in runs["spectral"][0].epochs:
        for name, target in runs["spectral"][0].summary["targets"].items():
            assert line[f"excess/{name}"] == pytest.approx(line[f"spectral_norm/{name}"] / target - 1, abs=1e-9)


def test_the_report_is_one_file_and_a_wandb_spec(trained, tmp_path, monkeypatch, capsys):
    from wandb_workspaces.reports.v2 import Report

    saved = []
    monkeypatch.setattr(Report, "save", lambda one: saved.append(one))
    monkeypatch.setattr(Report, "url", "https://where.it/is")
    folder = tmp_path / "digits"
    # Of few runs, which are drawn sooner.
    for name in ("none-seed0", "spectral-seed0"):
        shutil.copytree(trained / "digits" / name, folder / name)
    report(folder, publish=True)
    assert [one.title for one in saved] == ["Norm scaling: digits"]
    assert capsys.readouterr().out.splitlines() == [f"{folder}: report.html, report.json", "https://where.it/is"]
    page = (folder / "report.html").read_text()
    assert list(folder.glob("*.png"))
    assert page.count('<img alt="') == page.count("data:image/png;base64,") == len(list(folder.glob("*.png")))
    for row in table_rows(read_runs(folder)):
        assert "".join(f"<td>{cell}</td>" for cell in row) in page
    assert "src=" not in page.replace('src="data:', "")
    spec = json.loads((folder / "report.json").read_text())
    grids = [block["metadata"] for block in spec["blocks"] if block["type"] == "panel-grid"]
    for grid in grids:
        (runs,) = grid["runSets"]
        assert [(f["key"]["name"], f["value"]) for f in runs["filters"]["filters"]] == [
            ("preset", "digits"),
            ("jobType", "train"),
        ]
        assert runs["grouping"] == [{"section": "config", "name": "condition.value"}]
    panels = [panel for grid in grids for panel in grid["panelBankSectionConfig"]["panels"]]
    drawn = [panel["config"]["metrics"] for panel in panels if panel["viewType"] == "Run History Line Plot"]
    assert drawn[:4] == [["train/accuracy"], ["test/accuracy"], ["train/loss"], ["test/loss"]]
    assert drawn[4:] == [[f"spectral_norm/{layer}"] for layer in (1, 3, 5)]
    assert all(panel["config"]["xAxis"] == "epoch" for panel in panels if "xAxis" in panel["config"])
    assert [panel["viewType"] for panel in panels[-3:]] == ["Bar Chart", "Bar Chart", "Run Comparer"]
    texts = [block["content"] for block in spec["blocks"] if block["type"] == "markdown-block"]
    assert texts[0].startswith("| condition |")


def test_only_a_published_report_needs_wandb_workspaces(trained, tmp_path, monkeypatch, capsys):
    for name in ("wandb_workspaces", "wandb_workspaces.reports"):
        monkeypatch.setitem(sys.modules, name, None)
    shutil.copytree(trained / "digits" / "none-seed0", folder := tmp_path / "digits" / "none-seed0")
    monkeypatch.chdir(tmp_path)
    # The command in this process: a new one would import torch again.
    monkeypatch.setattr(sys, "argv", ["report.py", "digits"])
    runpy.run_path(str(ROOT / "recipes" / "report.py"), run_name="__main__")
    assert capsys.readouterr().out == "digits: report.html\n"
    assert not (folder.parent / "report.json").exists()
    (folder.parent / "report.html").unlink()
    text = r"report: --publish needs wandb-workspaces \(.*\); pip install wandb-workspaces, or leave --publish out"
    with pytest.raises(SystemExit, match=text):
        report(folder.parent, publish=True)
    assert not (folder.parent / "report.html").exists()


def test_a_report_over_nothing_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"report: no finished run in .*; give a preset's folder, such as runs/digits"):
        report(tmp_path)
