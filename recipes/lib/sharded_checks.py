"""What a scaling step of shards costs one process, beside its sums over processes: launches, waits and time."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from lib.launches import launches
from lib.scaling_checks import Rows, Setting, drift_, recorded, steps_that_wait
from lib.step_times import synchronize
from specscale import NormScaler

NUM_SHARDS = 8


def shards(setting: Setting) -> dict[str, Any]:
    """Scaling steps of whole weights, and of an eighth of each, as the first of eight processes has it."""
    rows: Rows = []
    tracebacks: list[str] = []
    with alone_of(NUM_SHARDS):
        for name in ("mlp-5x2000",) if setting.tiny else ("mlp-5x2000", "vit-b"):
            for norm in ("frobenius", "spectral"):
                for num_shards in (1, NUM_SHARDS):
                    with recorded(tracebacks):
                        model = setting.workload(name).build(setting.device)
                        scaling = setting.workload(name).scale(model, norm)
                        if num_shards > 1:
                            shard(model, setting.device)
                        rows.append({"model": name, "norm": norm, "shards": num_shards} | costs_of(scaling, setting))
    notes = [
        "The process group is torch's fake one: its all-reduces do nothing, so that their time is not in here.",
        "`host, ms` and `device, ms` are medians; `kernels, ms` is that of one profiled step.",
    ]
    return {
        "tables": {"A scaling step of whole weights and of shards": rows},
        "notes": notes,
        "traceback": "\n".join(tracebacks),
    }


@contextmanager
def alone_of(world_size: int) -> Iterator[None]:
    """Be the first process of a group whose others do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def shard(model: nn.Module, device: torch.device) -> None:
    """Shard the model, and each of its blocks by itself where it has blocks."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def costs_of(scaling: NormScaler, setting: Setting) -> dict[str, Any]:
    """What steps, each after a drift, cost."""
    device = setting.device
    waits = steps_that_wait(scaling, setting)
    generator = torch.Generator(device).manual_seed(3)
    host_ms, device_ms = [], []
    for _ in range(setting.num_steps):
        drift_(scaling, generator)
        synchronize(device)
        started = time.perf_counter()
        scaling.step()
        host_ms.append(1e3 * (time.perf_counter() - started))
        synchronize(device)
        device_ms.append(1e3 * (time.perf_counter() - started))
    drift_(scaling, generator)
    found = launches(scaling.step, device)
    return {
        "weights": len(scaling.weights),
        "host, ms": statistics.median(host_ms),
        "device, ms": statistics.median(device_ms),
        "kernels, ms": sum(one.microseconds for one in found) / 1e3,
        "launches": sum(one.count for one in found),
        "waited in steps": ", ".join(map(str, waits)) or "none",
        "met": None if device.type == "cpu" else not waits,
        "where": "; ".join(dict.fromkeys(waits.values())) or None,
    }
