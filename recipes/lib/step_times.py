"""The time of a training step under several conditions, in turns, against no scaling; and the floor under it."""

import copy
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from lib.clock import Clock
from lib.launches import Launch, launches
from lib.workloads import Batch, Workload
from specscale import NormScaler

CAPTURED = "{}, captured"
"""The name of a condition whose scaling is replayed from CUDA graphs."""
TORCH, COLD_POWER = "torch spectral_norm", "power, 500 cold"
SLOW_ROUNDS = 3
"""The timed rounds of the slow `COLD_POWER`."""


def synchronize(device: torch.device) -> None:
    """Wait for the device, where there is something to wait for."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@dataclass
class Condition:
    """A model in training, with the scaling whose steps are timed. Two conditions may share a model."""

    name: str
    workload: Workload
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaling: NormScaler | None
    device: torch.device
    step_ms: list[float] = field(default_factory=list)
    """The mean time of a step, by turn."""
    scaling_ms: list[float] = field(default_factory=list)
    """The mean time of the scaling in a step, by turn."""
    num_iterations: list[dict[str, int]] = field(default_factory=list)
    """The solver's iterations by layer in the last step, by turn."""
    launched: list[Launch] = field(default_factory=list)
    """The launches of one scaling step."""
    launched_iterations: int = 0
    """The iterations that the step had launches for: a layer may have needed fewer."""

    @contextmanager
    def attached(self, clock: Clock) -> Iterator[None]:
        """Within the block, the optimizer's steps scale, with the clock around the scaling."""
        if self.scaling is None:
            yield
            return
        # Hooks run in the order in which they are registered.
        hooks = [self.optimizer.register_step_post_hook(clock.start)]
        self.scaling.attach(self.optimizer)
        hooks.append(self.optimizer.register_step_post_hook(clock.stop))
        try:
            yield
        finally:
            self.scaling.detach()
            for hook in hooks:
                hook.remove()

    def turn(self, batches: Sequence[Batch]) -> None:
        """Train on the batches, one after another as in training, and keep the mean times of a step."""
        step_clock, scaling_clock = Clock(self.device), Clock(self.device)
        with self.attached(scaling_clock):
            # Every turn starts with an idle device.
            synchronize(self.device)
            with step_clock.span():
                for batch in batches:
                    self.workload.train_step(self.model, self.optimizer, batch)
        self.step_ms.append(sum(step_clock.take_ms()) / len(batches))
        self.scaling_ms.append(sum(scaling_clock.take_ms()) / len(batches))
        if self.scaling is not None:
            self.num_iterations.append(self.scaling.num_iterations)
        # The other models need the memory.
        self.optimizer.zero_grad()

    def forget(self) -> None:
        """Drop what was measured, at the end of the warm-up."""
        for values in (self.step_ms, self.scaling_ms, self.num_iterations):
            values.clear()

    def count_launches(self, batch: Batch) -> None:
        """Record the launches of the scaling step that follows a training step."""
        if self.scaling is not None and self.name != COLD_POWER:
            self.workload.train_step(self.model, self.optimizer, batch)
            synchronize(self.device)
            self.launched = launches(self.scaling.step, self.device)
            counts = Counter({one.name: one.count for one in self.launched})
            # Each group of weights has its own launches; torch operations do not tell.
            known = max(self.scaling.num_iterations.values(), default=0)
            self.launched_iterations = counts["rayleigh_ritz"] // counts["images"] if counts["images"] else known
            self.optimizer.zero_grad()

    def mean_iterations(self) -> float | None:
        """The mean over the layers that are solved by iteration, and over turns; None if no layer is."""
        counts = [count for turn in self.num_iterations for count in turn.values() if count]
        return statistics.mean(counts) if counts else None

    def floor_bytes(self) -> float | None:
        """The bytes that a scaling step has to move: see `bytes_of_step`."""
        if self.scaling is None or self.name == COLD_POWER:
            return None
        turns = self.num_iterations or [self.scaling.num_iterations]
        return statistics.mean(bytes_of_step(self.scaling, turn) for turn in turns)


def bytes_of_step(scaling: NormScaler, num_iterations: dict[str, int]) -> int:
    """The least bytes that a scaling step moves: it reads every weight `1 + 2 i` times, and updates it.

    The update reads and writes the weight once. So in float32 an iteration costs 20 B per parameter, every further one
    8, and a Frobenius or exact step, `i = 0`, 12.
    """
    return sum(weight.parameter.nbytes * (1 + 2 * num_iterations.get(weight.name, 0) + 2) for weight in scaling.weights)


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes per second, read and written, of a copy on the device: the median of ten."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    clock = Clock(device)
    for count in range(13):
        with clock.span():
            target.copy_(source)
        if count == 2:
            clock.take_ms()
    return 2 * num_bytes / (clock.median_ms() / 1000)


def make_conditions(
    workload: Workload, device: torch.device, norms: Iterable[str], captured: Iterable[str] = ()
) -> list[Condition]:
    """The conditions from one init: `norms`, which may hold `TORCH` and `COLD_POWER`, and then those of them that are
    `captured`.

    A captured condition trains the model of its eager one in turn with it. The scaling's state is on the model, so both
    are at the same point of one run, and memory holds one model less.
    """
    plain = workload.build(device)
    conditions: dict[str, Condition] = {}
    for norm in norms:
        model = plain if norm == "none" else copy.deepcopy(plain)
        scaling = None
        if norm == TORCH:
            for module in list(model.modules()):
                if isinstance(module, nn.Linear | nn.Conv2d):
                    spectral_norm(module)
        elif norm == COLD_POWER:
            scaling = workload.scale(model, "spectral", solver="power")
        elif norm != "none":
            scaling = workload.scale(model, norm)
        conditions[norm] = Condition(norm, workload, model, workload.make_optimizer(model), scaling, device)
    for norm in captured:
        eager, name = conditions[norm], CAPTURED.format(norm)
        scaling = NormScaler.of(eager.model).capture()
        conditions[name] = Condition(name, workload, eager.model, eager.optimizer, scaling, device)
    return list(conditions.values())


def take_turns(
    conditions: list[Condition],
    batches: Iterator[Batch],
    rounds: Iterable[int],
    *,
    warmup: int,
    turn: int,
    deadline: float = float("inf"),
) -> None:
    """Train in rounds: in each, every condition takes `turn` steps on the same batches, and another one comes first.

    Args:
        conditions: what is timed; the times of the rounds are kept in them.
        batches: an endless iterator.
        rounds: counts from 1; the first `warmup` ones are not kept.
        warmup: rounds of compilation, captures and first allocations.
        turn: how many steps in a row.
        deadline: on `time.monotonic`; after it, no round begins once three are kept.
    """
    for number in rounds:
        if number > warmup + 3 and time.monotonic() > deadline:
            break
        own = list(itertools.islice(batches, turn))
        first = number % len(conditions)
        for condition in conditions[first:] + conditions[:first]:
            if condition.name == COLD_POWER and number > warmup + SLOW_ROUNDS:
                continue
            condition.turn(own)
            if number == warmup:
                condition.forget()


def step_table(conditions: list[Condition], bandwidth: float) -> list[dict[str, Any]]:
    """The medians over the rounds, and their ratios to the unconstrained step of the same round; the floor of the
    scaling at the bandwidth of a copy, the launches of a scaling step and the solver's iterations."""
    plain = next(condition for condition in conditions if condition.name == "none")

    def ratio(spans: list[float]) -> float:
        # Within a round: a busy machine slows down both times of it.
        return statistics.median(span / base for span, base in zip(spans, plain.step_ms, strict=False))

    rows = []
    for condition in conditions:
        floor = condition.floor_bytes()
        rows.append(
            {
                "condition": condition.name,
                "ms / step": statistics.median(condition.step_ms),
                "ms scaling": statistics.median(condition.scaling_ms),
                "scaling / none": ratio(condition.scaling_ms),
                "ratio to none": ratio(condition.step_ms),
                "floor, ms": None if floor is None else 1000 * floor / bandwidth,
                "launches": sum(one.count for one in condition.launched) or None,
                "iterations": condition.mean_iterations(),
            }
        )
    return rows
