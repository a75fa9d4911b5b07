"""Runs a function in real processes that are the ranks of a group."""

import time
import warnings
from datetime import timedelta

import torch
from torch import distributed, multiprocessing


def on_ranks(function, num_ranks, folder, *args, timeout=300):
    """What `function(*args)` returns on each rank of a group over gloo; an error where a rank raises or hangs."""
    context = multiprocessing.start_processes(
        _run, (function, num_ranks, folder, args), nprocs=num_ranks, join=False, start_method="spawn"
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


def _run(rank, function, num_ranks, folder, args):
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=120),
    )
    torch.save(function(*args), folder / f"{rank}.pt")
    distributed.destroy_process_group()
