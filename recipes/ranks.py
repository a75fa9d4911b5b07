"""The processes of a run: who they are, what they agree on and what they share."""

import os
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    rank: int
    world: int
    device: torch.device

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Go on when every process has come here."""
        if self.world > 1:
            dist.barrier()

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def agree(self, said: object) -> object:
        """What the leader says, to every process."""
        box = [said]
        if self.world > 1:
            dist.broadcast_object_list(box, device=self.device)
        return box[0]


def join() -> Ranks:
    """Join the processes that torchrun started, or run alone."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        return Ranks(0, 1, device)
    dist.init_process_group("nccl" if cuda else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def distribute(model: nn.Module, ranks: Ranks) -> nn.Module:
    """The model with gradients averaged over the processes; its buffers stay each rank's own (`share_statistics`)."""
    if ranks.world == 1:
        return model
    with warnings.catch_warnings():
        # The option's new name is younger than the oldest torch that is supported.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(model, broadcast_buffers=False)


def share_statistics(model: nn.Module, ranks: Ranks) -> None:
    """Give every rank the running statistics of rank 0; the scaling's buffers are equal by construction."""
    if ranks.world > 1:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for buffer in module.buffers():
                    dist.broadcast(buffer, 0)
