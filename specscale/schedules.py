"""Schedules of targets: the factor of a weight's targets as a function of the number of its steps.

After `n` scaling steps of a weight, its target is the factor at `n` times its base target, which is what `target` of
`apply_norm_scaling` says; before the first one, the factor at 0. A schedule is any function from a step, an `int`, to a
positive `float`. The classes here are such functions, and are also computed where the weights are, so that a step can
be compiled, and captured in a CUDA graph.

Examples:
    >>> apply_norm_scaling(model, schedule=schedules.Cosine(final=0.1, steps=1000))
    >>> by_pattern = {"*.mlp": lambda step: 0.999**step, "*": schedules.Constant()}
    >>> apply_norm_scaling(model, schedule=by_pattern)
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specscale.errors import Refusal, positive, public_call


class Schedule(ABC):
    """A factor that is computed where the weights are."""

    @abstractmethod
    def factors(self, steps: Tensor) -> Tensor:
        """The factors at these numbers of steps, floating-point numbers."""

    def __call__(self, step: int) -> float:
        """The factor at a step."""
        return self.factors(torch.tensor(step, dtype=torch.float64, device="cpu")).item()


AnySchedule = Schedule | Callable[[int], float]


@dataclass(frozen=True)
class Constant(Schedule):
    """The same factor at every step."""

    factor: float = 1.0

    @public_call("Constant")
    def __post_init__(self) -> None:
        positive("factor", self.factor)

    def factors(self, steps: Tensor) -> Tensor:
        return torch.full_like(steps, self.factor)


@dataclass(frozen=True)
class _Ramp(Schedule):
    final: float
    """The factor at `steps`, and from then on."""
    steps: int
    initial: float = 1.0
    """The factor at step 0."""

    # Named here, so that the errors name the subclass.
    def __post_init__(self) -> None:
        public_call(type(self).__name__)(self._check)()

    def _check(self) -> None:
        positive("final", self.final)
        positive("initial", self.initial)
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise Refusal(f"steps must be a positive integer, found {self.steps!r}")

    @abstractmethod
    def progress(self, time: Tensor) -> Tensor:
        """The part of the way from `initial` to `final`, at a time from 0 to 1."""

    def factors(self, steps: Tensor) -> Tensor:
        # Written so that both ends are exact.
        done = self.progress((steps / self.steps).clamp(max=1))
        return self.initial * (1 - done) + self.final * done


class Linear(_Ramp):
    """From `initial` to `final` on a straight line in `steps` steps; then `final`."""

    def progress(self, time: Tensor) -> Tensor:
        return time


class Cosine(_Ramp):
    """From `initial` to `final` on half a period of a cosine in `steps` steps; then `final`."""

    def progress(self, time: Tensor) -> Tensor:
        return (1 - torch.cos(math.pi * time)) / 2


def check_schedule(setting: Any) -> None:
    """Refuse what is no schedule, nor a mapping from patterns to schedules; None, also of a pattern, is none."""
    for one in setting.values() if isinstance(setting, Mapping) else [setting]:
        if one is not None and (isinstance(one, type) or not callable(one)):
            raise Refusal(
                "schedule takes a function of the step, such as schedules.Cosine(final=0.1, steps=1000) or "
                f"lambda step: 0.999**step, found {one.__name__ if isinstance(one, type) else type(one).__name__}",
                TypeError,
            )


def own_factor(function: Callable[[int], float], step: int) -> float:
    """What a caller's function gives for a step.

    Raises:
        Refusal: it is no number (TypeError), or not finite and positive (ValueError).
    """
    try:
        factor = function(step)
    except Exception as error:
        error.add_note(f"raised by the schedule at step {step}")
        raise
    if isinstance(factor, Tensor) and factor.ndim == 0:
        factor = factor.item()
    return positive("schedule", factor, f" at step {step}")
