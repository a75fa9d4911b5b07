"""The main command's preset: which conditions get the pairs right that the network has not seen."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from test_recipe import ROOT, TORCHRUN, TRAIN, lines, run
from test_summaries import run as finished_run

from compare import outcome
from lib import figures
from lib.datasets import Preprocessing, load_data, train_loader
from lib.distributed import Processes
from lib.models import build_model, init_and_scale
from lib.modular_addition import pairs
from lib.presets import PRESETS, digits, modular_addition
from lib.runs import group_by_condition
from lib.summaries import header_of, table_rows
from lib.tasks import TASKS, task_of
from train import find_problem
from train import main as train

ALONE = Processes(0, 1, torch.device("cpu"))


def test_every_pair_is_in_one_split_with_its_sum():
    train, test = pairs(seed=0)
    assert (len(train[0]), len(test[0])) == (3764, 5645)
    every = torch.cat([train[0], test[0]])
    assert torch.equal(every.unique(dim=0), torch.cartesian_prod(torch.arange(97), torch.arange(97)))
    for inputs, sums in (train, test):
        assert torch.equal(sums, (inputs[:, 0] + inputs[:, 1]) % 97)
    assert not torch.equal(pairs(seed=1)[0][0], train[0])


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_epoch_of_steps_passes_over_the_data_as_often_as_it_takes(world_size):
    config, data = modular_addition(), load_data(modular_addition(), ALONE)
    shards = [list(train_loader(data, config, rank, world_size, epoch=3)) for rank in range(world_size)]
    assert {len(shard) for shard in shards} == {50}
    (whole,) = [list(train_loader(data, config, 0, 1, epoch=3))]
    for step, (_, _, index) in enumerate(whole):
        assert len(index) == 512
        parts = torch.cat([shard[step][2] for shard in shards])
        assert torch.equal(parts.sort().values, index.sort().values)
    counts = torch.cat([index for *_, index in whole]).bincount(minlength=len(data.train))
    # 25,600 of 3764 pairs: six whole passes, and a part of the seventh.
    assert counts.unique().tolist() == [6, 7]


def test_numbers_go_into_the_model_as_they_are():
    data = load_data(modular_addition(), ALONE)
    preprocessing = Preprocessing(data, ALONE.device, torch.channels_last)
    preprocessing.draw_augmentation(0, 1)
    inputs, _, index = data.train[:5]
    assert preprocessing.train(inputs, index) is inputs


@pytest.mark.parametrize("norm", ["none", "decay", "frobenius", "spectral"])
def test_the_init_is_the_models_own_and_gives_the_targets(norm):
    config = modular_addition()
    torch.manual_seed(0)
    plain = build_model(config, (2,), 97)
    torch.manual_seed(0)
    model = build_model(config, (2,), 97)
    scaling = init_and_scale(config, norm, model, (2,))
    if norm in ("none", "decay"):
        assert scaling is None
    else:
        order = {"frobenius": "fro", "spectral": 2}[norm]
        targets = {weight.name: weight.scaling.target.item() for weight in scaling.weights}
        exact = {name: torch.linalg.matrix_norm(plain[int(name)].weight.double(), order).item() for name in "246"}
        assert targets == pytest.approx(exact, rel=1e-5)
        scaling.remove()
    for own, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(own, other)


def test_the_settings():
    config = modular_addition()
    assert next(iter(PRESETS)) == config.preset == config.data
    assert config.norms == ("none", "decay", "frobenius", "spectral")
    assert (config.lr, config.weight_decay, config.epochs * config.steps_per_epoch) == (1e-2, 1.0, 1000)
    shapes = [tuple(one.weight.shape) for one in build_model(config, (2,), 97) if hasattr(one, "weight")]
    assert shapes == [(97, 64), (256, 128), (256, 256), (97, 256)]


def result(norm, train, test, data="modular-addition"):
    one = finished_run(norm, data=data, epochs=20)
    for line in one.epochs:
        line["train/accuracy"] = train
        line["test/accuracy"] = test if line["epoch"] >= 8 else 0.0
    return one


def test_what_is_said_is_what_the_preset_is_for():
    accuracies = {"none": (1, 0.01), "decay": (1, 0.995), "frobenius": (1, 1), "spectral": (0.98, 0.01)}
    runs = group_by_condition(result(norm, *both) for norm, both in accuracies.items())
    text = outcome(runs)
    assert [text.count(word) for word in ("Not seen:", "Seen:", "the post")] == [1, 3, 0]
    assert "Not seen: with their spectral norms held at the initial ones, it gets the others wrong (train 98.0" in text
    table = {row[0]: dict(zip(header_of(runs), row, strict=True)) for row in table_rows(runs)}
    assert {name: row["steps to 99 % in test"] for name, row in table.items()} == {
        "none": "-",
        "decay": "400",
        "frobenius": "400",
        "spectral": "-",
    }


@pytest.mark.parametrize("data", TASKS)
def test_the_findings_of_the_post_are_asked_of_its_data_alone(data):
    runs = group_by_condition(result(norm, 1.0, 1.0, data) for norm in ("none", "frobenius", "spectral"))
    claims = [one.claim for one in task_of(runs).findings(runs)]
    assert any("the spectral norms are in the order" in claim for claim in claims) == (data == "cifar100")
    assert bool(claims) == (data != "digits")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            replace(digits(), model="pair-mlp"),
            "--model pair-mlp and --data modular-addition go together, found pair-mlp with digits",
        ),
        (
            replace(modular_addition(), model="mlp"),
            "--model pair-mlp and --data modular-addition go together, found mlp with modular-addition",
        ),
        (
            replace(modular_addition(), targets="published"),
            "--targets published has no effect with --init model: targets are the norms of that init",
        ),
        (
            replace(modular_addition(), init="scaled-orthogonal"),
            "--model pair-mlp needs --init model or --targets channels, found scaled-orthogonal and described",
        ),
        (replace(digits(), steps_per_epoch=0), "--steps-per-epoch must be at least 1, found 0"),
    ],
)
def test_options_that_cannot_work_are_refused(options, text):
    assert find_problem(options, world_size=2) == text


def check_that_frobenius_scaling_alone_generalizes(folder, output):
    accuracy = {norm: lines(folder / f"{norm}-seed0") for norm in ("none", "frobenius")}
    assert all("test/accuracy" in line for history in accuracy.values() for line in history)
    assert accuracy["none"][-1]["train/accuracy"] > 0.99
    assert accuracy["none"][-1]["test/accuracy"] < 0.02
    assert accuracy["frobenius"][-1]["test/accuracy"] > 0.99
    assert all((folder / f"{norm}-seed0" / "checkpoint.pt").exists() for norm in accuracy)
    targets = json.loads((folder / "frobenius-seed0" / "summary.json").read_text())["targets"]
    assert list(targets) == ["2", "4", "6"]
    assert "Seen: without scaling, the network fits the pairs that it sees and gets the others wrong" in output
    assert (folder / "accuracy.png").exists()


def test_a_short_run_generalizes_under_frobenius_scaling_alone(tmp_path, capsys, monkeypatch):
    # The others are drawn by test_summaries.
    monkeypatch.setattr(figures, "FIGURES", {"accuracy": figures.accuracy})
    # Half as wide as the preset's network.
    config = replace(modular_addition(), width=128, out=tmp_path, wandb="disabled")
    train(replace(config, norms=("none",), epochs=5, compare=False))
    train(replace(config, norms=("frobenius",), epochs=10))
    check_that_frobenius_scaling_alone_generalizes(tmp_path / "modular-addition", capsys.readouterr().out)


@pytest.mark.slow
def test_the_main_command_shows_what_it_is_for(tmp_path):
    code, output = run([*TORCHRUN, TRAIN, "modular-addition"], tmp_path)
    assert code == 0, output
    folder = tmp_path / "runs" / "modular-addition"
    check_that_frobenius_scaling_alone_generalizes(folder, output)
    assert output.count("Seen: ") == 4
    last = {norm: lines(folder / f"{norm}-seed0")[-1]["test/accuracy"] for norm in ("decay", "spectral")}
    assert last["decay"] > 0.99 > 0.5 > last["spectral"]


# What a signal does to a run is shown by test_survival, in one process.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options", "last"),
    [
        (
            "train.py",
            ["modular-addition", "--epochs", "4"],
            r"train: stopped by SIGINT; \S+none-seed0/checkpoint.pt holds epoch (\d); the same command .* goes on",
        ),
        (
            "sweep.py",
            ["--presets", "modular-addition", "--targets", "described", "--", "--epochs", "4"],
            "sweep: interrupted; the same command goes on",
        ),
    ],
)
def test_an_interruption_ends_in_one_line_that_says_how_to_go_on(script, options, last, tmp_path, capsys):
    command = [sys.executable, str(ROOT / "recipes" / script), *options]
    # A session of its own: Ctrl-C in a terminal reaches every process in it.
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **streams) as process:
        for line in process.stdout:
            if "epoch 1/4" in line:
                break
        os.killpg(process.pid, signal.SIGINT)
        rest = process.stdout.read()
    assert process.returncode == 130, rest
    said = re.fullmatch(last, rest.splitlines()[-1])
    assert said, rest
    assert "Traceback" not in rest
    if script == "train.py":
        config = replace(modular_addition(), norms=("none",), epochs=4, out=tmp_path / "runs", wandb="disabled")
        train(replace(config, resume=True, compare=False))
        assert re.findall(r"epoch (\d+)/4", capsys.readouterr().out)[0] == str(int(said[1]) + 1)
