"""How many kernels, copies and fills a piece of work launches, and how long each of them takes."""

import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

NOTHING_LAUNCHED = (torch.ops.aten._unsafe_view.default, torch.ops.aten.promote_types.default)
"""Operations that do no work on a device, beside those whose schema says that they return a view."""


class Launch(NamedTuple):
    """The launches of one name."""

    name: str
    count: int
    microseconds: float
    """All of them together."""


def launches(work: Callable[[], Any], device: torch.device) -> list[Launch]:
    """The launches of `work`, the slowest name first.

    On CUDA the kernels, copies and fills that the profiler sees. On a CPU the torch operations other than views: what
    an accelerator without a kernel of its own would launch.
    """
    if device.type == "cuda":

        def work_and_wait() -> None:
            work()
            torch.cuda.synchronize()

        return profiled(work_and_wait, ProfilerActivity.CUDA, DeviceType.CUDA)
    with CountOperations() as counted:
        work()
    return by_name(counted.spans)


def profiled(work: Callable[[], Any], activity: ProfilerActivity, device_type: DeviceType) -> list[Launch]:
    """The profiler's events on one type of device, without the ranges that users annotate."""
    with profile(activities=[activity], acc_events=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    return by_name(
        (event.name(), event.duration_ns() / 1000)
        for event in events
        if event.device_type() == device_type and not event.is_user_annotation()
    )


def by_name(spans: Iterable[tuple[str, float]]) -> list[Launch]:
    """Spans of a name and microseconds, added up by name."""
    totals: dict[str, tuple[int, float]] = {}
    for name, microseconds in spans:
        count, total = totals.get(name, (0, 0.0))
        totals[name] = count + 1, total + microseconds
    return sorted((Launch(name, *total) for name, total in totals.items()), key=lambda one: -one.microseconds)


class CountOperations(TorchDispatchMode):
    """Records every torch operation that is no view, with its time."""

    def __init__(self) -> None:
        super().__init__()
        self.spans: list[tuple[str, float]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        started = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        if not (func.is_view or func in NOTHING_LAUNCHED):
            self.spans.append((str(func), 1e6 * (time.perf_counter() - started)))
        return result
