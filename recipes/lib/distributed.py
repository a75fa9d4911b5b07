"""The processes of a run: their ranks, and the communication between them."""

import os
import warnings
from dataclasses import dataclass

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


def init_process_group() -> Processes:
    """Join the processes that torchrun started; without torchrun, be the only process."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return Processes(0, 1, device)
    store, rank, world_size = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps one store over all its restarts: in it are the addresses of processes that are gone. Several
        # nodes count their restarts each for itself.
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world_size)
    return Processes(dist.get_rank(), dist.get_world_size(), device)


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
