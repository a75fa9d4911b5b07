"""`benchmark.py gpu`: on a CPU, by its real command; and what it measures with."""

import itertools
import json
import os
import sys
import textwrap

import pytest
import torch
from test_recipe import ROOT, run
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from lib import gpu_benchmark
from lib.gpu_benchmark import Record
from lib.gpu_parts import Part, Skipped, all_parts, run_part
from lib.launches import launches, profiled
from lib.scaling_checks import (
    applied_values,
    largest_difference,
    precision_switches,
    recorded,
    refuse_to_wait,
    switches,
)
from lib.step_times import bytes_of_step, take_turns
from lib.workloads import GPT, GPTSizes
from specscale import apply_norm_scaling

MAY_BE_MISSING = ("tyro", "wandb", "matplotlib", "docstring_parser", "typeguard", "tqdm", "sklearn", "scipy")


def gpu(folder, *options, missing=()):
    """The exit status, `gpu.json` and what was printed, where some modules cannot be imported."""
    for name in missing:
        (folder / f"{name}.py").write_text(f"raise ImportError('{name} is not here')")
    command = [sys.executable, str(ROOT / "recipes" / "benchmark.py"), "gpu", "--device", "cpu", "--tiny"]
    code, said = run([*command, "--out", "out", *options], folder, env={**os.environ, "PYTHONPATH": str(folder)})
    return code, json.loads((folder / "out" / "gpu.json").read_text()), said


@pytest.mark.slow
def test_every_part_runs_on_a_cpu_with_torch_and_little_else(tmp_path):
    code, found, said = gpu(tmp_path, missing=MAY_BE_MISSING)
    assert code == 0, said
    parts = found["parts"]
    assert [(name, part["status"]) for name, part in parts.items()] == [(name, "ran") for name in all_parts()]
    record = Record.read(tmp_path / "out")
    assert (tmp_path / "out" / "gpu.md").read_text() == record.summary() + record.details()
    assert f"{record.details()}\n{record.summary()}\nout/gpu: .json, .md\n" in said
    assert parts["tests"]["tables"]["Tests that are marked cuda"][0]["tests"] > 0
    for check in ("replay", "repeats"):
        (rows,) = parts[check]["tables"].values()
        assert {row["norm"] for row in rows} == {"frobenius", "spectral"}
        assert all(row["met"] for row in rows), rows
    (rows,) = parts["errors"]["tables"].values()
    assert all(row["mean error"] < 2e-3 and row["switches kept"] for row in rows), rows
    assert {row["switch"] for row in rows} == set(switches(torch.device("cpu")))
    for name, part in parts.items():
        if name.startswith("step "):
            rows = {row["condition"]: row for row in part["tables"]["Median times"]}
            # The largest model leaves no memory for a fourth.
            capped = [] if name == "step gpt-24x2048" else ["cap"]
            assert list(rows) == ["none", "frobenius", "spectral", *capped, "spectral, captured"]
            assert all(row["launches"] > 0 for row in rows.values() if row["condition"] != "none")


def test_the_tests_are_skipped_where_pytest_could_not_run_them(tmp_path):
    code, found, said = gpu(tmp_path, "--only", "tests", missing=["hypothesis"])
    assert (code, list(found["parts"])) == (0, ["tests"]), said
    assert found["parts"]["tests"]["status"] == "skipped"
    assert "hypothesis is not installed." in (tmp_path / "out" / "gpu.md").read_text()


@pytest.fixture
def record(tmp_path):
    values = {"began": 0.0, "budget, s": 1e12, "parts": {name: {"status": "waiting"} for name in ("one", "two")}}
    record = Record(tmp_path, values)
    record.save()
    return record


def test_a_part_that_raises_is_on_record_with_its_traceback(record):
    def fail(context):
        raise RuntimeError("the kernel is wrong")

    assert not run_part(record, "one", Part(fail, 1), torch.device("cpu"), False)
    assert Record.read(record.folder).parts["one"]["status"] == "raised"
    assert "RuntimeError: the kernel is wrong" in (record.folder / "gpu.md").read_text()


def test_a_part_keeps_what_it_found_beside_a_traceback(record):
    results = {"tables": {"Found": [{"kernel": "update", "launches": 1}]}, "traceback": "one raised"}
    assert not run_part(record, "one", Part(lambda context: results, 1), torch.device("cpu"), False)
    assert record.parts["one"]["status"] == "raised"
    text = (record.folder / "gpu.md").read_text()
    assert "| update | 1 |" in text
    assert "one raised" in text


def test_the_summary_counts_the_aims_that_are_met(record):
    table = [
        {"condition": "none", "ratio to none": 1.0, "aim": None, "met": None},
        {"condition": "spectral", "ratio to none": 1.2, "aim": 1.1, "met": False},
        {"condition": "spectral, captured", "ratio to none": 1.05, "aim": 1.1, "met": True},
    ]
    record.end("one", "ran", tables={"Median times": table})
    text = record.summary()
    assert "| one | ran | - | 1 of 2 |" in text
    assert "| one, spectral | 1.200 | 1.100 | no |\n| one, spectral, captured | 1.050 | 1.100 | yes |" in text


def test_a_part_is_skipped_by_its_own_reason_or_for_want_of_time(record):
    def skip(context):
        raise Skipped("nothing to do")

    assert run_part(record, "one", Part(skip, 1), torch.device("cpu"), False)
    assert record.parts["one"]["notes"] == ["nothing to do."]
    assert run_part(record, "two", Part(skip, 1e13), torch.device("cpu"), False)
    assert "s are left of 1000000000000" in record.parts["two"]["notes"][0]


WORKER = """
    import os, sys, time
    from pathlib import Path
    from lib.gpu_benchmark import Record

    record = Record.read(Path("."))
    if not record.parts:
        record.values["parts"] = {name: {"status": "waiting"} for name in ("dies", "hangs", "stops", "runs")}
    for name in [name for name, part in record.parts.items() if part["status"] == "waiting"]:
        record.begin(name, 0.3 if name == "hangs" else 60)
        if name == "dies":
            os._exit(7)
        if name == "hangs":
            time.sleep(60)
        record.end(name, "raised" if name == "stops" else "ran")
        if name == "stops":
            sys.exit(3)
"""


def test_a_worker_that_dies_hangs_or_gives_up_costs_one_part(record, monkeypatch):
    record.values["parts"] = {}
    record.save()
    monkeypatch.chdir(record.folder)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "recipes"))
    assert gpu_benchmark.supervise(record.folder, [sys.executable, "-c", textwrap.dedent(WORKER)])
    parts = Record.read(record.folder).parts
    assert [part["status"] for part in parts.values()] == ["raised", "raised", "raised", "ran"]
    assert parts["dies"]["traceback"] == "The worker ended in this part, status 7."
    assert parts["hangs"]["traceback"] == "Stopped: it still ran after 0 s."


class Turns:
    """A condition that counts its turns."""

    def __init__(self, name):
        self.name, self.kept = name, []

    def turn(self, batches):
        self.kept.append(batches)

    def forget(self):
        self.kept.clear()


def test_rounds_end_at_the_deadline_once_three_are_kept():
    conditions = [Turns("none"), Turns("spectral")]
    take_turns(conditions, itertools.count(), range(1, 100), warmup=2, turn=4, deadline=0)
    # The first two rounds took the batches 0 to 7.
    assert [condition.kept for condition in conditions] == [[[*range(8, 12)], [*range(12, 16)], [*range(16, 20)]]] * 2


def test_launches_are_operations_other_than_views():
    matrix = torch.randn(5, 3)
    found = launches(lambda: (matrix.t() @ matrix).view(-1).add(1).add(1), torch.device("cpu"))
    assert {one.name: one.count for one in found} == {"aten.mm.default": 1, "aten.add.Tensor": 2}
    assert all(one.microseconds > 0 for one in found)


def test_the_profiler_counts_what_ran_on_the_device():
    matrix = torch.randn(50, 50)

    def work():
        with torch.profiler.record_function("a range"):
            return matrix @ matrix @ matrix

    counts = {one.name: one.count for one in profiled(work, ProfilerActivity.CPU, DeviceType.CPU)}
    assert counts["aten::mm"] == 2
    assert "a range" not in counts
    assert not profiled(lambda: matrix @ matrix, ProfilerActivity.CPU, DeviceType.CUDA)


def test_the_bytes_of_a_step():
    model = nn.Sequential(nn.Linear(100, 70), nn.Linear(70, 10))
    scaling = apply_norm_scaling(model, "spectral")
    assert bytes_of_step(scaling, {"0": 1, "1": 0}) == 20 * 7000 + 12 * 700
    assert bytes_of_step(scaling, {"0": 2, "1": 0}) == 28 * 7000 + 12 * 700


@pytest.mark.parametrize("target", [0.5, 1.5])
def test_the_value_that_a_step_has_used_follows_from_the_weights(target):
    before = torch.randn(2, 30, 20, dtype=torch.float64)
    before /= torch.linalg.matrix_norm(before, 2)[:, None, None]
    u, _, vh = torch.linalg.svd(before)
    wrong = torch.tensor([0.97, 1.0], dtype=torch.float64)
    after = before + (target - wrong)[:, None, None] * u[:, :, :1] @ vh[:, :1]
    torch.testing.assert_close(applied_values(before, after, torch.full((2,), target)), wrong)


def test_the_guard_against_syncs_is_lifted_after_an_error(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    tracebacks = []
    with recorded(tracebacks), refuse_to_wait(torch.device("cuda")):
        raise RuntimeError(f"under {modes}")
    assert modes == ["error", "default"]
    assert "RuntimeError: under ['error']" in tracebacks[0]


def test_the_largest_difference_is_relative_to_the_tensor():
    model, other = nn.Linear(2, 1), nn.Linear(2, 1)
    with torch.no_grad():
        for one, value in ((model, 100.0), (other, 101.0)):
            one.weight.fill_(value)
            one.bias.zero_()
    assert largest_difference(other, model) == pytest.approx(0.01)


def test_the_precision_switches_are_turned_and_turned_back():
    torch.set_float32_matmul_precision("highest")
    before, seen = precision_switches(), {}
    for name, switch in switches(torch.device("cpu")).items():
        with switch:
            seen[name] = precision_switches()
        assert precision_switches() == before
    assert seen["matmul precision medium"]["float32_matmul_precision"] == "medium"
    for name in ("cuda.matmul", "global"):
        assert seen[f"{'backends' if name == 'global' else name}.fp32_precision tf32"][name] == "tf32"


def test_the_gpt_has_its_size():
    with torch.device("meta"):
        model = GPT(GPTSizes())
    weights = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    assert weights == 24 * 12 * 2048**2
