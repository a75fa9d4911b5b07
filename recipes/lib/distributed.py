"""The processes of a run: their ranks, and the communication between them."""

import os
import time
import uuid
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as this one sees them. With a world size of one, nothing is communicated."""

    rank: int
    world_size: int
    device: torch.device
    local_rank: int = 0
    """The rank among the processes of the same node."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files and the messages."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every process has called this."""
        if self.world_size > 1:
            dist.barrier()

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def broadcast_object(self, value: object) -> object:
        """The main process's value, on every process."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        """The values of all processes by rank, on every process."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values


def init_process_group() -> Processes:
    """Join the processes that torchrun started; without torchrun, be the only process."""
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return Processes(0, 1, device)
    store, rank, world_size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(agree_on_name(store, rank, world_size), store)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world_size)
    return Processes(dist.get_rank(), dist.get_world_size(), device, local_rank)


def agree_on_name(store: dist.Store, rank: int, world_size: int) -> str:
    """A name that the processes of this start have in common, and those of no start before it.

    torchrun keeps one store over all its restarts: in it are the addresses of processes that are gone, and what they
    have asked here. Its own count of restarts is no such name: several nodes count each for itself. So each process
    asks under an id of its own, rank 0 answers that id, and goes on when the process has taken the name of this start.

    Raises:
        DistStoreError: a process has not come within the store's timeout.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"asks/{rank}", own)
        name = store.get(f"name for/{own}").decode()
        store.set(f"took/{name}/{rank}", "")
        return name
    end = time.monotonic() + store.timeout.total_seconds()
    for other in range(1, world_size):
        asks, taken = f"asks/{other}", f"took/{own}/{other}"
        # What is asked at first may come from a process that is gone.
        while not store.check([taken]):
            if time.monotonic() > end:
                raise dist.DistStoreError(f"rank {other} has not come within {store.timeout}")
            if store.check([asks]):
                store.set(f"name for/{store.get(asks).decode()}", own)
            time.sleep(0.005)
    return own


def destroy_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def data_parallel(model: nn.Module, processes: Processes) -> nn.Module:
    """The model with gradients averaged over the processes, each of which holds all of it.

    Buffers are not synchronized: those of the norm scaling are equal on all ranks by construction, and those of batch
    normalization follow by `broadcast_batch_norm`.
    """
    if processes.world_size == 1:
        return model
    with warnings.catch_warnings():
        # The oldest supported torch does not know the option's new name.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(model, broadcast_buffers=False)


def broadcast_batch_norm(model: nn.Module, processes: Processes) -> None:
    """Copy the running statistics of batch normalization from rank 0 to every rank."""
    if processes.world_size > 1:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for buffer in module.buffers():
                    dist.broadcast(buffer, 0)
