"""Training with sharded parameters: which modules `fully_shard` takes, and whole states for the checkpoints."""

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lib.distributed import Processes

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
"""Of whole tensors, on the main process's CPU."""


def shard(model: nn.Module, processes: Processes) -> nn.Module:
    """Shard the model's parameters over all processes, in place: block by block, and the rest at once.

    A block is what a sequence or a list of modules holds: only the parameters of one are whole at a time.
    """
    mesh = init_device_mesh(processes.device.type, (processes.world_size,))
    # The inner ones first, as `fully_shard` asks.
    for module in reversed(list(model.modules())):
        if isinstance(module, nn.Sequential | nn.ModuleList):
            for block in module:
                if any(True for _ in block.parameters()):
                    fully_shard(block, mesh=mesh)
    # Its default is to leave the root's parameters whole after a forward pass: tests and checkpoints need shards.
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    return model


class WholeModelState:
    """A sharded model's state as whole tensors, which the main process gets; all processes must call for it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def state_dict(self) -> dict[str, Any]:
        return get_model_state_dict(self._model, options=WHOLE)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_model_state_dict(self._model, state, options=WHOLE)


class WholeOptimizerState:
    """The state of a sharded model's optimizer in the same way, by the names of parameters."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self._model, self._optimizer, options=WHOLE)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_optimizer_state_dict(self._model, self._optimizer, state, options=WHOLE)
