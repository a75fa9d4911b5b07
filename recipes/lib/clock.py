"""Timing of many steps without synchronizing with the device at each."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from specscale import NormScaler


class Clock:
    """A stopwatch that keeps every span: by CUDA events on a GPU, by the wall clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []
        self._started: Any = None

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self, *_: Any) -> None:
        self._started = self._now()

    def stop(self, *_: Any) -> None:
        self._spans.append((self._started, self._now()))

    @contextmanager
    def span(self) -> Iterator[None]:
        self.start()
        yield
        self.stop()

    def take_ms(self) -> list[float]:
        """The spans since the last call, in milliseconds."""
        if self._cuda:
            torch.cuda.synchronize()
        spans = [start.elapsed_time(end) if self._cuda else 1000 * (end - start) for start, end in self._spans]
        self._spans.clear()
        return spans

    def median_ms(self) -> float:
        """The median of the spans since the last call; 0 if there are none."""
        return statistics.median(self.take_ms() or [0.0])


def attach_timed(scaling: NormScaler, optimizer: torch.optim.Optimizer, clock: Clock) -> None:
    """Attach the norm scaling to the optimizer, with the clock around it: hooks run in the order of registration."""
    optimizer.register_step_post_hook(clock.start)
    scaling.attach(optimizer)
    optimizer.register_step_post_hook(clock.stop)
