"""Time spans of many steps, measured without waiting for the device."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """A list of spans: events on CUDA, the wall clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []
        self._begun: Any = None

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self, *_: Any) -> None:
        self._begun = self._now()

    def stop(self, *_: Any) -> None:
        self._spans.append((self._begun, self._now()))

    @contextmanager
    def span(self) -> Iterator[None]:
        self.start()
        yield
        self.stop()

    def take_ms(self) -> list[float]:
        """The spans since the last call, in milliseconds."""
        if self._cuda:
            torch.cuda.synchronize()
        spans = [begin.elapsed_time(end) if self._cuda else 1000 * (end - begin) for begin, end in self._spans]
        self._spans.clear()
        return spans

    def median_ms(self) -> float:
        """Their median; 0 where there is none."""
        return statistics.median(self.take_ms() or [0.0])
