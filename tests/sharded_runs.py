"""What each process of a test of sharded models runs: `torchrun`'s environment, without torchrun."""

import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

HERE = Path(__file__).parent


def run(function, num_processes, *arguments):
    """Call `function(*arguments)`, of a module in this folder, in so many processes of one gloo group.

    Returns what the processes have printed, by rank. Arguments are strings or paths.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": num_processes, "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    code = f"import sharded_runs, {function.__module__} as m; sharded_runs.enter(m.{function.__name__})"
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    processes = []
    for rank in range(num_processes):
        own = {name: str(value) for name, value in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        environment = os.environ | own | {"PYTHONPATH": path}
        command = [sys.executable, "-c", code, *map(str, arguments)]
        pipe = subprocess.PIPE
        processes.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True))
    found = [process.communicate(timeout=300) for process in processes]
    failed = [error for process, (_, error) in zip(processes, found, strict=True) if process.returncode]
    assert not failed, "\n".join(failed)
    return [output for output, _ in found]


def enter(function):
    """Call the function in a process of `run`, inside of the process group."""
    import torch

    # A rank that has failed must not let the others wait for minutes.
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    function(*sys.argv[1:])
    torch.distributed.destroy_process_group()
