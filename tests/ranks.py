"""Checks that several processes run together, each a process of its own as under torchrun, over gloo.

One start runs many checks, one after another, since a start takes seconds.
"""

import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

TIMEOUT = 900
"""Seconds after which a start is given up: a check that hangs must not hang the tests."""
PRELOADED = ["torch.distributed.fsdp", "torch.distributed.tensor.parallel", "pytest", "specscale"]
"""What the server imports once, from which the processes of all starts are forked."""
multiprocessing.set_forkserver_preload(PRELOADED)
FORKSERVER = multiprocessing.get_context("forkserver")


def outcomes(world, checks):
    """What became of each check, functions by name, on `world` processes: None, or the first error's text.

    After an error the processes are out of step, and the checks that follow are not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        ranks = [FORKSERVER.Process(target=_work, args=(rank, world, checks, folder)) for rank in range(world)]
        for one in ranks:
            one.start()
        end = time.monotonic() + TIMEOUT
        while any(one.is_alive() for one in ranks) and time.monotonic() < end:
            time.sleep(0.02)
            if any(one.exitcode for one in ranks):
                # The others may wait for it.
                end = min(end, time.monotonic() + 5)
        for one in ranks:
            if one.is_alive():
                one.kill()
            one.join()
        errors = [path.read_text() for path in sorted(Path(folder).glob("error.*"), key=_time)]
        done = set.intersection(*({path.name[2:] for path in Path(folder).glob(f"{r}.*")} for r in range(world)))
        missing = [name for name in checks if name not in done]
        found = dict.fromkeys(checks)
        if missing:
            found |= dict.fromkeys(missing, f"not run, since {missing[0]!r} failed")
            found[missing[0]] = errors[0] if errors else "a process hung or ended"
        return found


def _time(path):
    return path.stat().st_mtime_ns


def _work(rank, world, checks, folder):
    torch.set_num_threads(1)
    # What pytest asks of this package in its own process.
    warnings.filterwarnings("error", module=r"specscale|sharded")
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    for name, check in checks.items():
        try:
            torch.manual_seed(0)
            check()
        except BaseException:
            Path(folder, f"error.{rank}").write_text(f"{name}, rank {rank} of {world}:\n{traceback.format_exc()}")
            os._exit(1)
        Path(folder, f"{rank}.{name}").touch()
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(function, num_ranks, folder, *args, timeout=300):
    """What `function(*args)` returns on each rank of a group over gloo; an error where a rank raises or hangs."""
    context = start_processes(
        _run_one, (function, num_ranks, folder, args), nprocs=num_ranks, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + timeout
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, "the ranks hang"
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(num_ranks)]


def _run_one(rank, function, num_ranks, folder, args):
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=120),
    )
    torch.save(function(*args), folder / f"{rank}.pt")
    dist.destroy_process_group()
