"""The recipe with sharded parameters, by its real command."""

import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from test_recipe import TRAIN, lines, run

from lib.presets import digits
from train import find_problem

OPTIONS = ["digits", "--norms", "spectral", "--epochs", "6", "--wandb", "disabled", "--no-compare"]


def command(num_processes, *options):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    return [*torchrun, TRAIN, *OPTIONS, *options]


def test_what_cannot_be_sharded_is_refused_before_anything_is_trained(monkeypatch):
    sharded = replace(digits(), parallel="fsdp")
    assert "start it by torchrun" in find_problem(sharded, 1)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    assert find_problem(sharded, 2) is None
    problem = "--parallel fsdp has no clipped with the solver block: it needs whole matrices"
    assert find_problem(replace(sharded, norms=("spectral", "clipped")), 2) == problem
    problem = "--parallel fsdp has no spectral with the solver svd: it needs whole matrices"
    assert find_problem(replace(sharded, solver="svd"), 2) == problem


@pytest.mark.slow
def test_shards_train_as_whole_models_do_and_resume_on_another_number_of_processes(tmp_path):
    for parallel in ("ddp", "fsdp"):
        code, output = run(command(2, "--parallel", parallel, "--out", parallel), tmp_path)
        assert code == 0, output
    whole, sharded = (lines(tmp_path / parallel / "digits" / "spectral-seed0") for parallel in ("ddp", "fsdp"))
    assert len(whole) == len(sharded) == 6

    def assert_same(history, rel):
        for one, other in zip(sharded, history, strict=True):
            for key in ("train/loss", "test/loss"):
                assert one[key] == pytest.approx(other[key], rel=rel)
            assert one["test/accuracy"] == pytest.approx(other["test/accuracy"], abs=0.01)
            for key in (key for key in one if key.startswith("spectral_norm/")):
                assert one[key] == pytest.approx(other[key], rel=1e-2)

    assert_same(whole, 1e-3)
    stopped = tmp_path / "stopped" / "digits" / "spectral-seed0"
    options = ("--parallel", "fsdp", "--out", "stopped", "--checkpoint-minutes", "0")
    with subprocess.Popen(command(2, *options), cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        while not (stopped / "checkpoint.pt").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, output = process.communicate(timeout=120)
    assert "stopped by SIGTERM" in output
    before = lines(stopped)
    assert 0 < len(before) < 6
    code, output = run(command(1, *options, "--resume"), tmp_path)
    assert code == 0, output
    resumed = lines(stopped)
    assert resumed[: len(before)] == before == sharded[: len(before)]
    assert_same(resumed, 1e-3)
