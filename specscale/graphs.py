"""Scaling steps on CUDA that are captured once and replayed: one launch instead of hundreds."""

import warnings
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from specscale.step import Batch, Member


def obstacle(weights: Iterable[Tensor]) -> str | None:
    """Why a step over these weights cannot be captured in a CUDA graph; None where it can."""
    devices = {weight.device for weight in weights}
    if kinds := sorted({device.type for device in devices} - {"cuda"}):
        return f"weights are on {' and '.join(kinds)}"
    return f"weights are on {len(devices)} devices, and a graph has one" if len(devices) > 1 else None


def warn(why: str) -> None:
    warnings.warn(f"capture: no CUDA graph, since {why}; steps run as they are", stacklevel=3)


class Graphs:
    """A CUDA graph for each kind of step, from the second of its kind on.

    A graph works at fixed addresses, which are therefore part of the kind. The first step of a kind runs as it is: it
    is also the warm-up that a capture needs. After a capture that fails, all steps run as they are.
    """

    def __init__(self) -> None:
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, list[Batch]] | None] = {}
        self._pool: Any = None
        self._skip: Tensor | None = None
        self._failed = False

    def run(
        self, members: list[Member], pace: Hashable, skip: Tensor | None, step: Callable[[Tensor | None], list[Batch]]
    ) -> list[Batch]:
        """Take `step(skip)`, or replay it; what it returns is overwritten by the next replay."""
        if self._failed or torch.cuda.is_current_stream_capturing():
            return step(skip)
        if skip is not None:
            # It is a new tensor at every step, and not always at the same address.
            self._skip = torch.empty_like(skip) if self._skip is None else self._skip
            skip = self._skip.copy_(skip)
        tensors = (tensor for member in members for tensor in (member.weight, *member.scaling.buffers()))
        kind = (pace, skip is None, tuple(tensor.data_ptr() for tensor in tensors))
        if kind not in self._graphs:
            self._graphs[kind] = None
            return step(skip)
        known = self._graphs[kind]
        if known is None:
            graph = torch.cuda.CUDAGraph()
            # What one replay has found is read before the next: they can share their memory.
            self._pool = torch.cuda.graph_pool_handle() if self._pool is None else self._pool
            try:
                # A capture only records: the weights are as they were if it fails.
                with torch.cuda.graph(graph, pool=self._pool):
                    measured = step(skip)
            except RuntimeError as error:
                self._failed = True
                self._graphs.clear()
                warn(str(error).strip().splitlines()[0])
                return step(skip)
            known = self._graphs[kind] = graph, measured
        graph, measured = known
        graph.replay()
        return measured
