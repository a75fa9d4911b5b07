"""The recipe on several nodes: two agents of torchrun on this machine, by the real command and by the SLURM script."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_recipe import ROOT, TORCHRUN, TRAIN, run
from test_survival import OPTIONS, assert_same_run, children, epochs_in, lines, states, wait_for

from lib import datasets
from lib.distributed import Processes, agree_on_name
from lib.presets import digits, mlp_5x2000
from train import find_difference, start_of

SCRIPT = ROOT / "recipes" / "slurm.sbatch"
EPOCHS = 14
RUN = Path("runs") / "digits" / "spectral-seed0"
# torchrun sets it where a node has several processes, and a sum depends on it.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
COMMAND = [TRAIN, *OPTIONS, "--epochs", str(EPOCHS)]


# In this process


def names_of(store, world_size, order):
    names = {}
    threads = [
        threading.Thread(target=lambda rank=rank: names.update({rank: agree_on_name(store, rank, world_size)}))
        for rank in order
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    return names


def test_processes_agree_on_a_name_of_their_own_start():
    store, found = dist.HashStore(), set()
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        names = names_of(store, 3, order)
        assert len(names) == 3
        (name,) = set(names.values())
        assert name not in found
        found.add(name)
        # A start that did not get further than this.
        store.set("asks/1", "of a process that is gone")
    assert agree_on_name(dist.HashStore(), 0, 1)


def test_a_process_that_does_not_come_is_named():
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=0.05))
    with pytest.raises(dist.DistStoreError, match=r"rank 1 has not come within 0:00:00\.05"):
        agree_on_name(store, 0, 2)
    store.set("asks/1", "of a process that is gone")
    with pytest.raises(dist.DistStoreError, match="rank 1 has not come within"):
        agree_on_name(store, 0, 2)


def test_other_options_on_another_node_are_seen_and_other_disks_are_none_of_them():
    main = start_of(digits())
    assert find_difference(start_of(replace(digits(), data_root=Path("/scratch"), num_workers=3)), main) is None
    assert find_difference(start_of(replace(digits(), lr=0.1)), main) == (
        "started with lr = 0.1, rank 0 with 0.001; give all nodes the same options and the same versions"
    )
    assert find_difference(start_of(replace(digits(), norms=("none",))), main).startswith(
        "started with norms = ['none']"
    )
    assert find_difference(main | {"torch": "1.0"}, main).startswith("started with torch = 1.0, rank 0 with 2.")


@pytest.mark.parametrize(
    ("rank", "local_rank", "downloads"), [(0, 0, 2), (1, 1, 0), (2, 0, 1), (3, 1, 0)], ids=lambda value: str(value)
)
def test_each_node_downloads_once_the_main_process_first(rank, local_rank, downloads, monkeypatch):
    """Rank 0 of two nodes asks twice, and finds the data the second time."""
    done = []

    def cifar100(_):
        done.append("read")
        empty = torch.utils.data.TensorDataset(torch.zeros(1, 3, 32, 32), torch.zeros(1))
        return datasets.Data(empty, empty, 100)

    monkeypatch.setattr(datasets, "_cifar100", cifar100)
    monkeypatch.setattr(Processes, "barrier", lambda _: done.append("barrier"))
    processes = Processes(rank, 4, torch.device("cpu"), local_rank)
    datasets.load_data(replace(mlp_5x2000(), download=True), processes)
    assert done.count("read") == downloads + 1
    assert done[-1] == "read"
    assert [part for part in done if part == "barrier"] == ["barrier"] * 2
    if rank == 2:
        assert done == ["barrier", "read", "barrier", "read"]


def test_the_slurm_script_is_shown_on_its_page_and_its_lines_fit():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert max(map(len, SCRIPT.read_text().splitlines())) <= 76
    assert '--8<-- "recipes/slurm.sbatch"' in (ROOT / "docs" / "several_machines.md").read_text()


# Two agents


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@contextmanager
def two_agents(folders, arguments, restarts=0, **variables):
    """One agent of torchrun for each folder, with a process each; what they say is in the files `said` there."""
    node = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    node += [f"--max-restarts={restarts}", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{free_port()}"]
    processes = []
    for number, (folder, own) in enumerate(zip(folders, arguments, strict=True)):
        with (folder / f"said{number}").open("w") as said:
            command = [*node, "--rdzv-id=test", *own]
            processes.append(
                subprocess.Popen(
                    command, cwd=folder, env=ENVIRONMENT | variables, stdout=said, stderr=subprocess.STDOUT
                )
            )
    try:
        yield processes
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(timeout=120)


def said_by(*folders):
    return "".join(path.read_text() for folder in folders for path in sorted(folder.glob("said?")))


class Said:
    """What both agents have said, as one file."""

    def __init__(self, folder):
        self.folder = folder

    def read_text(self):
        return said_by(self.folder)


def workers_of(agents):
    """The agents and the process ids of the workers, by rank."""
    return {rank: (agent, pid) for agent in agents for rank, pid in children(agent).items()}


def codes(agents):
    return [agent.wait(timeout=300) for agent in agents]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The run of one agent with two processes."""
    folder = tmp_path_factory.mktemp("single")
    code, output = run([*TORCHRUN, *COMMAND], folder, env=ENVIRONMENT)
    assert code == 0, output
    return folder / RUN


@pytest.mark.slow
def test_two_agents_train_as_one_does(single, tmp_path):
    with two_agents([tmp_path] * 2, [COMMAND] * 2) as agents:
        assert codes(agents) == [0, 0], said_by(tmp_path)
    assert epochs_in(Said(tmp_path)) == list(range(1, EPOCHS + 1))
    assert_same_run(tmp_path / RUN, single)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "variables"), [(0, {}), (1, {}), (1, {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})], ids=str
)
def test_a_killed_process_of_a_node_comes_back_on_both(rank, variables, single, tmp_path):
    said = Said(tmp_path)
    with two_agents([tmp_path] * 2, [COMMAND] * 2, restarts=1, **variables) as agents:
        wait_for(lambda: len(epochs_in(said)) > 2, agents[0])
        os.kill(workers_of(agents)[rank][1], signal.SIGKILL)
        assert codes(agents) == [0, 0], said_by(tmp_path)
    # Only the first epoch was saved by the clock.
    assert epochs_in(said).count(1) == 1
    assert epochs_in(said).count(2) == 2
    assert_same_run(tmp_path / RUN, single)


@pytest.mark.slow
@pytest.mark.parametrize("receiver", ["worker", "agent"])
def test_sigterm_on_one_node_stops_and_saves_on_both(receiver, tmp_path):
    said = Said(tmp_path)
    with two_agents([tmp_path] * 2, [[TRAIN, *OPTIONS, "--epochs", "100000"]] * 2) as agents:
        wait_for(lambda: len(epochs_in(said)) > 2, agents[0])
        agent, worker = workers_of(agents)[1]
        os.kill(worker if receiver == "worker" else agent.pid, signal.SIGTERM)
        assert codes(agents) == [1, 1], said_by(tmp_path)
    last = max(epochs_in(said))
    assert re.findall("train: .*", said_by(tmp_path)) == [
        f"train: stopped by SIGTERM; {RUN}/checkpoint.pt holds epoch {last}; the same command with --resume goes on"
    ]
    assert states(tmp_path / RUN)["epoch"] == last
    assert [line["epoch"] for line in lines(tmp_path / RUN)] == list(range(1, last + 1))


@pytest.mark.slow
def test_nodes_that_were_started_otherwise_end_in_one_line(tmp_path):
    with two_agents([tmp_path] * 2, [COMMAND, [*COMMAND, "--lr", "0.5"]]) as agents:
        assert codes(agents) == [1, 1]
    (said,) = re.findall("train: (.*)", said_by(tmp_path))
    assert re.fullmatch(
        r"rank 1: started with lr = (0.5, rank 0 with 0.001|0.001, rank 0 with 0.5); give all nodes the same options "
        "and the same versions",
        said,
    )
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_nodes_that_do_not_see_one_folder_end_in_one_line(single, tmp_path):
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    shutil.copytree(single, folders[0] / RUN)
    (folders[0] / RUN / "summary.json").unlink()
    with two_agents(folders, [[*COMMAND, "--resume"]] * 2) as agents:
        assert codes(agents) == [1, 1]
    (said,) = re.findall("train: (.*)", said_by(*folders))
    epochs = rf"({EPOCHS} for rank 0 and at 0|0 for rank 0 and at {EPOCHS}) here"
    assert re.match(rf"rank 1: {RUN} is at epoch {epochs}; give an --out that all processes see", said)


# The SLURM script, with commands of SLURM's names

SRUN = """#!/bin/bash
# One task on each of two nodes; the code is the highest of theirs.
"$@" & first=$!
"$@" & second=$!
echo $first $second > tasks
wait $first; code=$?
wait $second; other=$?
exit $((code > other ? code : other))
"""
SCONTROL = """#!/bin/bash
if [ "$*" = "show hostnames nodes[1-2]" ]; then
    printf 'localhost\\nelsewhere\\n'
else
    echo "$*" >> asked
fi
"""
TORCHRUN_STUB = f"""#!/bin/bash
exec {sys.executable} -m torch.distributed.run "$@"
"""


@contextmanager
def batch_job(folder, options):
    """The SLURM script as sbatch runs it: a copy of it, started in a folder with `recipes`."""
    binaries = folder / "bin"
    binaries.mkdir(exist_ok=True)
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "torchrun": TORCHRUN_STUB}.items():
        (binaries / name).write_text(text)
        (binaries / name).chmod(0o755)
    if not (folder / "recipes").exists():
        (folder / "recipes").symlink_to(ROOT / "recipes")
    shutil.copy(SCRIPT, folder / "slurm_script")
    # The ports that the system gives to others are above.
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "nodes[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1"}
    environment = ENVIRONMENT | job | {"PATH": f"{binaries}:{os.environ['PATH']}"}
    with (folder / "said0").open("w") as said:
        command = ["bash", "slurm_script", *options]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=said, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        if process.poll() is None:
            for task in (folder / "tasks").read_text().split():
                os.kill(int(task), signal.SIGTERM)
        process.wait(timeout=120)


@pytest.mark.slow
def test_the_slurm_script_saves_at_sigterm_is_put_back_and_goes_on(single, tmp_path):
    options, said, asked = COMMAND[1:], Said(tmp_path), tmp_path / "asked"
    with batch_job(tmp_path, options) as job:
        wait_for(lambda: len(epochs_in(said)) > 2, job)
        for task in (tmp_path / "tasks").read_text().split():
            os.kill(int(task), signal.SIGTERM)
        # torchrun would start its processes again, were it not stopped itself.
        assert job.wait(timeout=120) == 1
    (stopped,) = re.findall("train: (.*)", said.read_text())
    assert stopped.startswith(f"stopped by SIGTERM; {RUN}/checkpoint.pt holds epoch {max(epochs_in(said))};")
    assert asked.read_text() == "requeue 4711\n"
    with batch_job(tmp_path, options) as job:
        assert job.wait(timeout=300) == 0, said.read_text()
    assert_same_run(tmp_path / RUN, single)
    assert asked.read_text() == "requeue 4711\n"


@pytest.mark.slow
def test_the_slurm_script_does_not_put_back_what_would_fail_again(tmp_path):
    with batch_job(tmp_path, [*OPTIONS, "--epochs", "0"]) as job:
        assert job.wait(timeout=300) == 1
    assert "train: --epochs must be at least 1" in said_by(tmp_path)
    assert not (tmp_path / "asked").exists()
