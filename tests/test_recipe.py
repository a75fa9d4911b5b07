"""The recipe by its real command: real data, real processes, real files."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from compare import main as compare
from lib import figures
from lib.checkpoint import CheckpointTimer
from lib.clock import Clock
from lib.presets import digits, mlp_5x2000
from lib.run_log import WandbRun
from lib.scaling_checks import refuse_to_wait
from specscale import NormScaler
from train import find_problem, main

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
TRAIN = str(ROOT / "recipes" / "train.py")


def run(command, cwd, **options):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=900, **options)
    return done.returncode, done.stdout + done.stderr


def lines(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in found]


def wandb_records(path):
    """The records of a `.wandb` file: LevelDB's log framing around protobuf messages."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


TWO_RUNS = """
import os, runpy, sys
import torch
from lib import distributed
from torch.optim.optimizer import register_optimizer_step_pre_hook

rank, script = os.environ["RANK"], sys.argv[1]
models, data_parallel = [], distributed.data_parallel
distributed.data_parallel = lambda model, processes: models.append(model) or data_parallel(model, processes)
sys.argv = [script, "digits"]
runpy.run_path(script, run_name="__main__")
torch.save([model.state_dict() for model in models], f"{rank}.pt")

count = 0


def poison(optimizer, *_):
    global count
    count += 1
    if count == 30 and rank == "1":
        optimizer.param_groups[0]["params"][1].data[0, 0] = torch.nan


register_optimizer_step_pre_hook(poison)
options = ["--norms", "spectral", "--epochs", "1000", "--wandb", "disabled", "--no-compare", "--out", "poisoned"]
sys.argv = [script, "digits", *options]
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as end:
    torch.save(end.code, f"{rank}.code")
sys.stdout.flush()
# At the interpreter's end, torch's threads of two groups have aborted the process, once in 17 times.
os._exit(0)
"""
"""The main command, which saves what each rank has trained, and a run whose second rank finds NaN, in one start."""


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """The folder of both runs, and what was printed."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "two_runs.py").write_text(TWO_RUNS)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "recipes")}
    code, output = run([*TORCHRUN, "two_runs.py", TRAIN], folder, env=environment)
    assert code == 0, output
    return folder, output


def assert_equal_on_both(folder):
    """Bit-equal parameters and buffers on two ranks, of the models that were saved there."""
    first, second = (torch.load(folder / f"{rank}.pt") for rank in (0, 1))
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    return first


def test_the_main_command_trains_and_compares_three_conditions(two_runs, monkeypatch):
    started, output = two_runs
    monkeypatch.chdir(started)
    trained = assert_equal_on_both(started)
    assert [any("parametrizations" in name for name in state) for state in trained] == [False, True, True]
    folder = Path("runs") / "digits"
    for norm in ("none", "frobenius", "spectral"):
        one = folder / f"{norm}-seed0"
        history = lines(one)
        assert [line["epoch"] for line in history] == list(range(1, 21))
        assert history[-1]["test/accuracy"] > 0.88
        assert [line["lr"] for line in history] == pytest.approx([1e-3] * 6 + [1e-4] * 6 + [1e-5] * 8)
        assert [key for key in history[0] if key.startswith("spectral_norm/")] == [
            f"spectral_norm/{i}" for i in (1, 3, 5)
        ]
        summary = json.loads((one / "summary.json").read_text())
        assert list(summary["targets"]) == ([] if norm == "none" else ["1", "3", "5"])
        assert (one / "checkpoint.pt").exists()
        assert json.loads((one / "config.json").read_text())["norm"] == norm
    files = list((folder / "spectral-seed0").glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 1, output
    records = list(wandb_records(files[0]))
    logged = [{i.key or i.nested_key[0]: json.loads(i.value_json) for i in r.history.item} for r in records]
    epochs = [entry["epoch"] for entry in logged if "test/accuracy" in entry]
    assert epochs == list(range(1, 21))
    config = {u.key: u.value_json for r in records for u in [*r.config.update, *r.run.config.update]}
    assert json.loads(config["width"]) == 256
    table = (folder / "comparison.md").read_text()
    assert {p.name for p in folder.glob("*.png")} >= {
        "accuracy.png",
        "loss.png",
        "spectral_norms.png",
        "spectra.png",
        "ranks.png",
    }

    for made in (*folder.glob("*.png"), folder / "comparison.md"):
        made.unlink()
    # One figure is enough: test_summaries has all of them drawn here.
    monkeypatch.setattr(figures, "FIGURES", {"accuracy": figures.accuracy})
    compare(folder)
    assert (folder / "comparison.md").read_text() == table
    assert {p.name for p in folder.glob("*.png")} == {"accuracy.png"}

    problem = find_problem(digits(), world_size=2)
    assert problem == f"{folder}/none-seed0 holds a finished run; --resume goes on, --overwrite trains again"


def test_nan_on_one_rank_stops_both_with_the_name_of_the_layer(two_runs):
    started, output = two_runs
    folder = Path("poisoned") / "digits" / "spectral-seed0"
    assert [torch.load(started / f"{rank}.code") for rank in (0, 1)] == [1, 1]
    (said,) = re.findall(r"train: (.*)", output)
    assert said.startswith("rank 1: step: the weight of '3' holds NaN or infinity; no weight was scaled. Lower")
    state = f"{folder}/checkpoint.pt holds epoch 2"
    assert said.endswith(f"{state}; once that is mended, the same command with --resume goes on")
    # Neither has lost the other while it trained.
    assert "Connection" not in output
    assert torch.load(started / folder / "checkpoint.pt")["epoch"] == 2


def test_wandb_writes_to_the_runs_folder_from_another_working_directory(tmp_path, monkeypatch):
    import wandb

    started, used = tmp_path / "started", tmp_path / "used"
    started.mkdir()
    used.mkdir()
    # A process finds W&B's own process by a variable of the environment, which the processes that it starts inherit.
    with patch.dict(os.environ):
        monkeypatch.chdir(started)
        wandb.setup()
        monkeypatch.chdir(used)
        run = WandbRun(digits(), Path("runs"), "train")
        run.log({"epoch": 1, "loss": 0.5})
        run.finish()
        # Only its end says that all is written.
        wandb.teardown()
    (file,) = used.glob("runs/wandb/offline-run-*/run-*.wandb")
    logged = [item for record in wandb_records(file) for item in record.history.item]
    assert {"0.5"} == {item.value_json for item in logged if "loss" in (item.key, *item.nested_key)}


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_the_constraint_holds_after_every_step_of_a_whole_run(norm, tmp_path, monkeypatch):
    attach, count = NormScaler.attach, 0

    def check(scaling):
        nonlocal count
        count += 1
        for weight in scaling.weights:
            (matrix,) = weight.scaling.matrices(weight.parameter).double()
            target, held = weight.scaling.target.item(), weight.scaling.norm.item()
            if norm == "frobenius":
                assert torch.linalg.matrix_norm(matrix).item() == pytest.approx(target, rel=1e-5)
                continue
            exact = torch.linalg.matrix_norm(matrix, 2).item()
            assert exact >= target * (1 - 1e-5)
            # The second singular value, where it is the larger one, is estimated from below.
            assert exact * (1 - 1e-2) <= held <= exact * (1 + 1e-5)

    def attach_and_check(scaling, optimizer):
        attach(scaling, optimizer)
        optimizer.register_step_post_hook(lambda *_: check(scaling))

    monkeypatch.setattr(NormScaler, "attach", attach_and_check)
    main(replace(digits(), norms=(norm,), epochs=6, out=tmp_path, wandb="disabled", compare=False))
    assert count == 6 * 12


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "minutes"), [("frobenius", "0"), ("spectral", "60")])
def test_a_killed_run_resumes_to_the_same_metrics(norm, minutes, tmp_path):
    options = ["digits", "--norms", norm, "--epochs", "6", "--width", "700", "--spectra", "0", "0.5", "1"]
    command = [sys.executable, TRAIN, *options, "--checkpoint-minutes", minutes, "--wandb", "disabled"]
    code, output = run([*command, "--out", "whole"], tmp_path)
    assert code == 0, output
    whole, killed = (tmp_path / out / "digits" / f"{norm}-seed0" for out in ("whole", "runs"))
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (killed / "checkpoint.pt").exists() or len(lines(killed)) < 3:
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(lines(killed)) < 6
    saved = torch.load(killed / "checkpoint.pt")["epoch"]
    assert saved == 1 if minutes == "60" else saved > 1
    code, output = run([*command, "--resume"], tmp_path)
    assert code == 0, output
    assert [int(epoch) for epoch in re.findall(r"epoch (\d)/6", output)] == list(range(saved + 1, 7))
    assert torch.load(killed / "checkpoint.pt")["epoch"] == 6
    assert lines(killed) == lines(whole)
    assert (killed / "spectra.jsonl").read_text() == (whole / "spectra.jsonl").read_text()


def test_checkpoints_are_due_after_the_first_epoch_the_last_and_the_minutes(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    timer, every = CheckpointTimer(minutes=2, num_epochs=9), CheckpointTimer(minutes=0, num_epochs=9)
    saved = []
    for epoch in range(3, 10):
        now += 50
        if timer.is_due(epoch):
            saved.append(epoch)
            now += 30
            timer.restart()
        assert every.is_due(epoch)
        every.restart()
    # The time that saving takes is no part of the minutes.
    assert saved == [3, 6, 9]


def test_data_on_the_device_changes_no_result(tmp_path):
    options = {"norms": ("spectral",), "epochs": 2, "wandb": "disabled", "compare": False}
    main(replace(digits(), out=tmp_path / "device", **options))
    main(replace(digits(), out=tmp_path / "host", data_on_device=False, num_workers=1, **options))
    on_device, on_host = (lines(tmp_path / out / "digits" / "spectral-seed0") for out in ("device", "host"))
    assert len(on_device) == 2
    assert on_device == on_host


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("norm", ["none", "frobenius", "spectral"])
def test_on_a_gpu_no_step_waits_and_the_scaling_step_is_captured(norm, tmp_path, monkeypatch):
    span, attach, capture, attached, captured = Clock.span, NormScaler.attach, NormScaler.capture, [], []

    @contextmanager
    def guarded(clock):
        with span(clock), refuse_to_wait(torch.device("cuda")):
            yield

    monkeypatch.setattr(Clock, "span", guarded)
    monkeypatch.setattr(NormScaler, "attach", lambda *both: attached.append(both) or attach(*both))
    monkeypatch.setattr(NormScaler, "capture", lambda scaling: captured.append(scaling) or capture(scaling))
    options = {"norms": (norm,), "epochs": 2, "compare": False, "wandb": "disabled"}
    main(replace(digits(), out=tmp_path / "device", **options))
    assert [scaling for scaling, _ in attached] == captured
    assert len(captured) == (norm != "none")
    assert all(optimizer.defaults["fused"] for _, optimizer in attached)
    main(replace(digits(), out=tmp_path / "host", data_on_device=False, **options))
    on_device, on_host = (lines(tmp_path / out / "digits" / f"{norm}-seed0")[-1] for out in ("device", "host"))
    assert on_device["test/accuracy"] == pytest.approx(on_host["test/accuracy"], abs=0.02)


def test_the_precision_of_products_is_set_recorded_and_kept(tmp_path, monkeypatch):
    set_to = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", set_to.append)
    options = {"norms": ("none",), "epochs": 1, "out": tmp_path, "wandb": "disabled", "compare": False}
    config = replace(digits(), matmul_precision="medium", **options)
    main(config)
    assert set_to == ["medium"]
    folder = tmp_path / "digits" / "none-seed0"
    assert json.loads((folder / "config.json").read_text())["matmul_precision"] == "medium"
    problem = find_problem(replace(config, matmul_precision="highest", resume=True), world_size=1)
    assert problem.startswith(f"{folder} was begun with matmul_precision = medium, found highest")
    assert find_problem(replace(config, data_on_device=False, checkpoint_minutes=0, resume=True), world_size=1) is None


def init(**_):
    raise OSError("disk full")


@pytest.mark.parametrize(
    ("wandb", "error"),
    [
        (None, "ModuleNotFoundError: import of wandb halted"),
        (SimpleNamespace(), "AttributeError: .* has no attribute 'init'"),
        (SimpleNamespace(init=init, Settings=dict), "OSError: disk full"),
    ],
)
def test_a_missing_or_failing_wandb_stops_no_training(wandb, error, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.warns(UserWarning, match=f"W&B logging is off: {error}"):
        main(replace(digits(), norms=("none",), epochs=1, out=tmp_path, compare=False))
    assert len(lines(tmp_path / "digits" / "none-seed0")) == 1


@pytest.mark.slow
def test_the_command_says_that_wandb_is_missing(tmp_path):
    (tmp_path / "wandb.py").write_text("raise ImportError('no wandb here')")
    command = [sys.executable, TRAIN, "digits", "--norms", "none", "--epochs", "1"]
    code, output = run(command, tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert code == 0, output
    assert "W&B logging is off: ImportError: no wandb here" in output
    assert len(lines(tmp_path / "runs" / "digits" / "none-seed0")) == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (mlp_5x2000(), "data holds no cifar-100-python; give --data-root DIR, or --download"),
        (replace(digits(), batch_size=33), "batch size 33 does not divide over 2 processes"),
        (replace(digits(), resume=True, overwrite=True), "--resume and --overwrite exclude each other"),
        (replace(digits(), epochs=0), "--epochs must be at least 1, found 0"),
        (
            replace(digits(), num_workers=4),
            "--num-workers 4 has no effect on data on the device; give --no-data-on-device too",
        ),
        (
            replace(digits(), checkpoint_minutes=-1),
            r"--checkpoint-minutes must be 0 \(every epoch\) or more, found -1",
        ),
        (
            replace(digits(), model="resnet3"),
            "unknown model 'resnet3'; choose mlp, resnet18-quarter, resnet34",
        ),
    ],
)
def test_options_that_cannot_work_are_refused(options, text):
    assert re.match(text, find_problem(options, world_size=2))


@pytest.mark.slow
def test_a_refusal_is_said_once_by_all_ranks_together(tmp_path):
    code, output = run([*TORCHRUN, TRAIN, "mlp-5x2000"], tmp_path)
    assert code == 1
    assert output.count("train: data holds no cifar-100-python") == 1
    assert not (tmp_path / "runs").exists()


def test_resuming_with_other_options_is_refused_and_seeds_are_compared(tmp_path, capsys):
    config = replace(digits(), norms=("none",), epochs=1, out=tmp_path, wandb="disabled", compare=False)
    main(config)
    assert [line["lr"] for line in lines(tmp_path / "digits" / "none-seed0")] == [1e-3]
    with pytest.raises(SystemExit, match="1"):
        main(replace(config, resume=True, lr=0.01))
    text = "none-seed0 was begun with lr = 0.001, found 0.01; --resume with the same options"
    assert text in capsys.readouterr().err
    main(replace(config, seed=1, lr=0.01))
    compare(tmp_path)
    assert "±" in capsys.readouterr().out
    assert "The runs differ in lr (0.001, 0.01)." in (tmp_path / "digits" / "comparison.md").read_text()
    with pytest.raises(SystemExit, match=f"compare: no finished run in {tmp_path / 'none'}"):
        compare(tmp_path / "none")


WORKER = """
import os, sys, torch, train
from lib.presets import digits, replace
norm, model = sys.argv[1:]
# Not both: on some CPUs, bfloat16 convolutions of maps as small as these have gradients out of unwritten memory.
on_host = {"channels_last": True, "data_on_device": False, "num_workers": 1}
options = {"amp": True} if model == "mlp" else on_host
models, data_parallel = [], train.data_parallel
train.data_parallel = lambda model, processes: models.append(model) or data_parallel(model, processes)
options |= {"model": model, "norms": (norm,), "epochs": 1, "limit_train": 512, "width": 700, "wandb": "disabled"}
train.main(replace(digits(), **options))
torch.save([model.state_dict() for model in models], f"{os.environ['RANK']}.pt")
"""


# The main command above shows it in float32.
@pytest.mark.slow
@pytest.mark.parametrize("norm", ["spectral", "frobenius"])
@pytest.mark.parametrize("model", ["mlp", "resnet18"])
def test_ranks_hold_bit_equal_parameters_and_buffers_after_an_epoch(norm, model, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "recipes")}
    code, output = run([*TORCHRUN, "worker.py", norm, model], tmp_path, env=environment)
    assert code == 0, output
    (state,) = assert_equal_on_both(tmp_path)
    assert any("parametrizations" in name for name in state)
