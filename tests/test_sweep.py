"""The sweep by its real command, and its grid written out."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from queue import Queue

import pytest

from lib.presets import NORMS
from lib.runs import read_runs
from lib.summaries import header_of, table_rows
from sweep import Options, Task, failure_reason, find_problem, grid, train, visible_devices

SWEEP = str(Path(__file__).parent.parent / "recipes" / "sweep.py")


def sweep(cwd, *arguments):
    done = subprocess.run([sys.executable, SWEEP, *arguments], cwd=cwd, capture_output=True, text=True, timeout=240)
    return done.returncode, done.stdout + done.stderr


def test_the_post_in_twenty_runs():
    names = [task.name for task in grid(Options())]
    both = ["none", "frobenius", "spectral"]
    mlp = [*both, "spectral-published"]
    resnet = both + [f"{norm}-published" for norm in both]
    expected = [(preset, one) for preset in ("mlp-5x2000", "mlp-7x4000") for one in mlp]
    expected += [(preset, one) for preset in ("resnet34", "resnet50") for one in resnet]
    assert sorted(names) == sorted(f"{preset}/{one}-seed0" for preset, one in expected)
    assert len(grid(Options(seeds=(0, 1, 2)))) == 60


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (Options(presets=("resnet",)), "unknown preset 'resnet'; choose modular-addition, digits, mlp-5x2000"),
        (Options(jobs=0), "--jobs and --processes must be at least 1, found 0 and 1"),
        (Options(task=20), "--task must be from 0 to 19, found 20"),
    ],
)
def test_options_that_cannot_work_are_refused(options, text):
    assert find_problem(options).startswith(text)


def test_runs_of_one_process_share_gpus_and_larger_ones_have_their_own(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert find_problem(Options(jobs=9)) is None
    assert find_problem(Options(jobs=2, processes=2)) is None
    text = (
        "3 jobs of 2 processes need 6 GPUs, found 4; give fewer, or --processes 1: runs of one process can share a GPU"
    )
    assert find_problem(Options(jobs=3, processes=2)) == text
    devices = ["4", "5", "GPU-6", "7"]
    shared = [visible_devices(slot, 1, devices) for slot in range(9)]
    assert shared == [["4"], ["5"], ["GPU-6"], ["7"]] * 2 + [["4"]]
    assert [visible_devices(slot, 2, devices) for slot in range(2)] == [["4", "5"], ["GPU-6", "7"]]
    assert [visible_devices(slot, 1, ["0"]) for slot in range(3)] == [["0"]] * 3


@pytest.mark.parametrize(("jobs", "visible", "expected"), [(3, None, "1"), (3, "5,7", "7"), (1, "5,7", "5,7")])
def test_a_run_sees_the_gpus_of_its_slot(jobs, visible, expected, monkeypatch, capfd, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    program = "import os; print('sees', os.environ['CUDA_VISIBLE_DEVICES'])"
    monkeypatch.setattr(Task, "command", lambda *_: [sys.executable, "-c", program])
    slots = Queue()
    slots.put(1)
    assert train(Task("digits", "none", "described", 0), Options(jobs=jobs, out=tmp_path), [], slots)
    assert capfd.readouterr().out == f"digits/none-seed0: sees {expected}\n"
    assert slots.get_nowait() == 1


FAILING = """
import os, sys, time
if os.environ["RANK"] != "0":
    # Ended by torchrun: what two ranks say at once may be mixed up within a line.
    time.sleep(60)
print("epoch 1")
print("a warning", file=sys.stderr)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), 9)
raise ValueError("first line\\nlast line")
"""


@pytest.mark.parametrize(
    ("how", "processes", "reason"),
    [
        ("raises", 2, "last line"),
        pytest.param("killed", 1, r"Signal 9 \(SIGKILL\) received by PID \d+", marks=pytest.mark.slow),
    ],
)
def test_of_a_failed_run_one_line_says_why_and_where_its_log_is(how, processes, reason, monkeypatch, capfd, tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    options = Options(processes=processes, out=tmp_path)
    command = Task.command
    monkeypatch.setattr(
        Task, "command", lambda *arguments: [*command(*arguments)[:5], str(tmp_path / "failing.py"), how]
    )
    slots = Queue()
    slots.put(0)
    assert not train(task := Task("digits", "none", "described", 0), options, [], slots)
    log = tmp_path / "digits" / "none-seed0.log"
    *progress, last = capfd.readouterr().out.splitlines()
    assert progress == [f"{task.name}: epoch 1"]
    assert re.fullmatch(rf"digits/none-seed0: failed: {reason} \(see {log}\)", last)
    assert "a warning" in log.read_text()
    assert ("Traceback" in log.read_text()) or how == "killed"


def test_the_reason_of_a_failure_without_a_traceback():
    assert failure_reason("") == ""
    assert failure_reason("[rank1]: RuntimeError: one\n\n") == "RuntimeError: one"
    report = (
        "W1126 1 torch/distributed/elastic/agent/api.py:7] Received 15\nTraceback\nSignalException: got signal: 15\n"
    )
    assert failure_reason(report) == "SignalException: got signal: 15"


@pytest.mark.slow
def test_a_sweep_skips_what_is_done_and_goes_on(tmp_path):
    grid_options = ["--presets", "digits", "--norms", "none", "spectral", "--targets", "described"]
    rest = ["--", "--epochs", "2", "--wandb", "disabled"]
    code, output = sweep(tmp_path, *grid_options, "--task", "1", *rest)
    assert code == 0, output
    runs = tmp_path / "runs"
    assert (runs / "digits" / "spectral-seed0" / "summary.json").exists()
    assert not (runs / "digits" / "none-seed0").exists()
    assert not (runs / "comparison.md").exists()
    code, output = sweep(tmp_path, *grid_options, "--jobs", "2", *rest)
    assert code == 0, output
    assert "2 runs, 1 finished already" in output
    assert "digits/none-seed0:      none  epoch 2/2" in output
    assert "digits/spectral-seed0:" not in output
    assert not list(runs.glob("**/*.log"))
    table = (runs / "comparison.md").read_text()
    assert "| none |" in table
    assert "| spectral |" in table
    code, output = sweep(tmp_path, *grid_options, "--list")
    assert output.split() == ["0", "digits/none-seed0", "finished", "1", "digits/spectral-seed0", "finished"]
    shutil.rmtree(runs / "digits" / "none-seed0")
    code, output = sweep(tmp_path, *grid_options, "--", "--epochs", "0", "--wandb", "disabled")
    assert code == 1
    assert "none-seed0: failed: train: --epochs must be at least 1, found 0 (see runs/digits/none-seed0.log)" in output
    assert "Traceback" not in output
    assert "sweep: digits/none-seed0 did not go through; the same command tries again" in output


@pytest.mark.slow
def test_all_norms_are_compared_in_one_table(tmp_path):
    grid_options = ["--presets", "digits", "--norms", *NORMS, "--targets", "described", "--jobs", "2"]
    code, output = sweep(tmp_path, *grid_options, "--", "--epochs", "2", "--wandb", "disabled", "--spectra")
    assert code == 0, output
    runs = read_runs(tmp_path / "runs" / "digits")
    rows = {row[0]: dict(zip(header_of(runs), row, strict=True)) for row in table_rows(runs)}
    assert list(rows) == list(NORMS)
    worst = {name: row["worst norm / target"] for name, row in rows.items()}
    assert worst.pop("none") == "-"
    assert float(worst.pop("spectral")) > 1
    assert all(0 < float(value) <= 1.001 for value in worst.values()), worst
    assert all(len(seeds[0].snapshots) == 0 for seeds in runs.values())
