"""The scaling step: every weight is measured before the first one is written.

On a CPU, the solver stops when its error is small enough, and weights that are not finite stop the step. On an
accelerator a step reads nothing back: the host reads the norms and errors of the step before, and waits for them only
if it is a whole step ahead. On CUDA, `specscale.grouped` takes the step of the weights that its kernels fit, all in a
few launches; the others go the way that is written here, in torch operations, as on any device. A step can be captured
in a CUDA graph and replayed.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specscale import linalg
from specscale.constraints import Constraint
from specscale.errors import ADVICE, non_finite
from specscale.linalg import concat, no_grad_full_precision
from specscale.norms import Measurement
from specscale.plans import Plan, Plans, is_capturing
from specscale.state import MEASURED, NormScaling
from specscale.weights import Weight

NumIterations = Mapping[Constraint, int | None]
"""The solver's iterations in a step that reads nothing back, by constraint."""

Scale = Callable[[Plan, NumIterations, Tensor | None], list["Result"]]
"""A step that reads nothing back."""


class ScalingStep:
    """Takes scaling steps, and keeps between them what the host may not wait for."""

    def __init__(self) -> None:
        self.known: PendingStats | None = None
        """What the host knows: of the last step, or on an accelerator of the one before."""
        self._last: PendingStats | None = None
        self._is_checked = True
        """Whether the last step's weights are known to be finite."""
        self._plans = Plans()
        self._graphs: CapturedSteps | None = None

    @no_grad_full_precision
    def take(self, weights: list[Weight], skip: Tensor | None = None) -> None:
        """Put the weights back on their targets; where the tensor `skip` is positive, no weight changes.

        Raises:
            Refusal: a weight holds NaN or infinity: on a CPU at this step, which then writes nothing; elsewhere at the
                last one, which left that weight alone.
        """
        if not weights:
            return
        # Through the module, so that a test can run an accelerator's step on a CPU.
        if all(linalg.can_sync(weight.parameter) for weight in weights):
            self._take_with_sync(weights, skip)
        else:
            self._take_without_sync(weights, skip)

    def _take_with_sync(self, weights: list[Weight], skip: Tensor | None) -> None:
        batches = measure_weights(weights)
        stats = PendingStats([Result.of(batch) for batch in batches])
        if bad := stats.non_finite():
            raise non_finite(bad, f"no weight was scaled. {ADVICE}")
        project_weights_(batches, skip)
        self.known = self._last = stats
        for weight in weights:
            weight.scaling.mark_current(weight.parameter)

    def _take_without_sync(self, weights: list[Weight], skip: Tensor | None) -> None:
        constraints = dict.fromkeys(weight.scaling.constraint for weight in weights)
        is_compiling = torch.compiler.is_compiling()
        # A compiled step keeps the iterations that it was compiled with: a change would compile it anew.
        last = None if is_compiling else self._last
        planned = {constraint: next_num_iterations(constraint, last) for constraint in constraints}
        # The step before has ended, unless the host is a whole step ahead. Its error is raised once, so that training
        # can go on from good weights.
        is_checked, self._is_checked = self._is_checked, True
        if not is_checked and last is not None and (bad := last.non_finite()):
            raise non_finite(bad, f"the last step did not scale it. {ADVICE}")
        if last is not None:
            self.known = last
        # Before any capture of ours: what a plan allocates and copies must not become part of a graph.
        plan = Plan(weights, by_kernels=False) if is_compiling else self._plans.of(weights)
        results = scale(plan, planned, skip) if self._graphs is None else self._graphs.take(scale, plan, planned, skip)
        if not is_compiling:
            self._last, self._is_checked = PendingStats(results), False
        for weight in weights:
            weight.scaling.mark_current(None if is_compiling else weight.parameter)

    def capture(self, weights: Iterable[Weight]) -> None:
        """Replay steps from CUDA graphs from now on, where these weights allow it; else a warning says why not."""
        blocker = capture_blocker(weight.parameter for weight in weights)
        if blocker is not None:
            _warn_of_no_graph(blocker, stacklevel=4)
        self._graphs = CapturedSteps() if blocker is None else None


def next_num_iterations(constraint: Constraint, last: "PendingStats | None") -> int | None:
    """The solver's iterations in a step after the last one."""
    return constraint.norm.next_num_iterations(*((None, None) if last is None else last.worst(constraint)))


def scale(plan: Plan, num_iterations: NumIterations, skip: Tensor | None) -> list["Result"]:
    """A step that reads nothing back: by kernels where they fit, else in torch operations."""
    results = []
    for group in plan.groups:
        group.take(num_iterations[group.weights[0].scaling.constraint], skip)
        results.append(Result(group.weights, group.stats))
    batches = measure_and_project_(plan.rest, num_iterations, skip) if plan.rest else []
    return results + [Result.of(batch) for batch in batches]


class Result(NamedTuple):
    """What a step leaves to be read by the host about all matrices of some weights."""

    weights: list[Weight]
    stats: Tensor
    """`(3, k)`: norms, errors and numbers of iterations."""

    @classmethod
    def of(cls, batch: "Batch") -> "Result":
        found = batch.measurement
        return cls(batch.weights, torch.stack([found.norm, found.error, found.num_iterations]))


class Batch(NamedTuple):
    """Weights that are measured together, and what was found."""

    weights: list[Weight]
    measurement: Measurement


def measure_weights(weights: Iterable[Weight], num_iterations: NumIterations | None = None) -> list[Batch]:
    """Measure the weights without modifying them; with `num_iterations`, nothing is read back."""
    batches = []
    for batch in _batches(weights):
        constraint = batch[0].scaling.constraint
        matrices = (weight.scaling.matrices(weight.parameter) for weight in batch)
        states = [weight.scaling.solver_state() for weight in batch]
        count = num_iterations[constraint] if num_iterations else None
        batches.append(Batch(batch, constraint.norm.measure(matrices, states, num_iterations=count)))
    return batches


def _batches(weights: Iterable[Weight]) -> Iterator[list[Weight]]:
    """Weights of one constraint, dtype and device: as many as measuring them takes no more than the largest weight."""
    weights = list(weights)
    largest = max((weight.parameter.numel() for weight in weights), default=0)
    open_batches: dict[object, tuple[list[Weight], int]] = {}
    for weight in weights:
        constraint, parameter = weight.scaling.constraint, weight.parameter
        scratch = weight.view.count * constraint.norm.scratch_elements(*weight.view.matrix_shape(parameter))
        if scratch and (parameter.dtype.itemsize < 4 or not parameter.is_contiguous()):
            # It is read as a copy, which is held until the batch is measured.
            scratch += parameter.numel()
        key = (constraint, parameter.dtype, parameter.device)
        batch, total = open_batches.get(key, ([], 0))
        if batch and total + scratch > largest:
            yield batch
            batch, total = [], 0
        open_batches[key] = [*batch, weight], total + scratch
    yield from (batch for batch, _ in open_batches.values())


def project_weights_(batches: list[Batch], skip: Tensor | None) -> None:
    """Put every measured weight back on its target, and record what was measured.

    Skipped: matrices whose `skip_mask` is 1, those that are not finite, and all of them where the one-element tensor
    `skip` is positive.
    """
    buffers: list[Tensor] = []
    values: list[Tensor] = []
    for weights, measurement in batches:
        scalings = [weight.scaling for weight in weights]
        target = concat([scaling.target for scaling in scalings])
        skip_mask = (concat([scaling.skip_mask for scaling in scalings]) > 0) | ~measurement.norm.isfinite()
        if skip is not None:
            skip_mask = skip_mask | (skip > 0)
        splits = [weight.view.split(weight.parameter.detach()) for weight in weights]
        norm = scalings[0].constraint.project_(splits, measurement, target, skip_mask)
        _collect(scalings, measurement._replace(norm=norm), buffers, values)
    torch._foreach_copy_(buffers, values)


def measure_and_project_(weights: list[Weight], num_iterations: NumIterations, skip: Tensor | None) -> list[Batch]:
    """A step that reads nothing back."""
    batches = measure_weights(weights, num_iterations)
    project_weights_(batches, skip)
    return batches


@no_grad_full_precision
def solve_anew_(scaling: NormScaling, weight: Tensor) -> None:
    """Measure one weight to convergence, from the solver's initial state, and record what was measured."""
    state = scaling.init_solver_state(weight)
    measurement = scaling.constraint.norm.measure([scaling.matrices(weight)], [state], to_convergence=True)
    buffers: list[Tensor] = []
    values: list[Tensor] = []
    _collect([scaling], measurement, buffers, values)
    torch._foreach_copy_(buffers, values)


def _collect(
    scalings: list[NormScaling], measurement: Measurement, buffers: list[Tensor], values: list[Tensor]
) -> None:
    """Append the buffers of the scalings, and beside each what the measurement found for it: one copy writes all."""
    counts = [scaling.view.count for scaling in scalings]
    for name in MEASURED:
        buffers += [scaling.get_buffer(name) for scaling in scalings]
        values += getattr(measurement, name).split(counts)
    for scaling, state in zip(scalings, measurement.states, strict=True):
        buffers += [scaling.get_buffer(name) for name in state]
        values += state.values()


class PendingStats:
    """The results of a step on their way to the host, which waits for them only when it reads them."""

    def __init__(self, results: list[Result]) -> None:
        self._weights = [result.weights for result in results]
        # A copy that does not block goes to pinned memory, which `to` allocates.
        self._stats = [result.stats.to("cpu", non_blocking=True) for result in results]
        self._copied = []
        for device in {result.stats.device for result in results if not result.stats.is_cpu}:
            event = torch.Event(device=device)
            # Without a stream, it would be the one of the current device, which may be another.
            event.record(torch.accelerator.current_stream(device))
            self._copied.append(event)
        self._numbers: list[list[list[float]]] | None = None

    def _read(self) -> list[tuple[list[Weight], list[list[float]]]]:
        """Weights, and the norms, errors and numbers of iterations of all their matrices."""
        if self._numbers is None:
            for event in self._copied:
                event.synchronize()
            # Not by operations of torch, which take longer on so few numbers.
            self._numbers = [stats.tolist() for stats in self._stats]
        return list(zip(self._weights, self._numbers, strict=True))

    def _of_weights(self, row: int) -> Iterator[tuple[Weight, list[float]]]:
        """The numbers of each weight's matrices."""
        for weights, stats in self._read():
            numbers = iter(stats[row])
            for weight in weights:
                yield weight, list(itertools.islice(numbers, weight.view.count))

    def non_finite(self) -> list[str]:
        """The weights that held NaN or infinity."""
        if all(math.isfinite(norm) for _, (norms, _, _) in self._read() for norm in norms):
            return []
        return [weight.name for weight, norms in self._of_weights(0) if not all(map(math.isfinite, norms))]

    def num_iterations(self) -> dict[str, int]:
        """The solver's iterations by the weight's name: the most of its matrices."""
        return {weight.name: int(max(counts)) for weight, counts in self._of_weights(2)}

    def worst(self, constraint: Constraint) -> tuple[int, float] | tuple[None, None]:
        """The most iterations and the largest error of the weights under a constraint; None if the step had none.

        A weight that is not finite, which was left alone, has no error.
        """
        own = [stats for weights, stats in self._read() if weights[0].scaling.constraint == constraint]
        if not own:
            return None, None
        errors = (error for _, errors, _ in own for error in errors if not math.isnan(error))
        return int(max(count for _, _, counts in own for count in counts)), max(errors, default=0.0)


def capture_blocker(parameters: Iterable[Tensor]) -> str | None:
    """Why a step over these parameters cannot be captured in a CUDA graph; None where it can."""
    devices = {parameter.device for parameter in parameters}
    if types := sorted({device.type for device in devices} - {"cuda"}):
        return f"weights are on {' and '.join(types)}"
    return f"weights are on {len(devices)} devices, and a graph has one" if len(devices) > 1 else None


def _warn_of_no_graph(reason: str, stacklevel: int) -> None:
    warnings.warn(f"capture: no CUDA graph, since {reason}; steps run as they are", stacklevel=stacklevel)


class CapturedSteps:
    """Steps that read nothing back, as CUDA graphs: one launch instead of hundreds.

    A graph works at fixed addresses, for fixed iterations; so there is one for each plan and number of iterations. The
    first step of a combination runs as it is, which is also the warm-up that a capture needs; the second is captured.
    After a capture that fails, all steps run as they are.
    """

    def __init__(self) -> None:
        self._pool: Any = None
        self._skip: Tensor | None = None
        self._failed = False

    def take(self, scale: Scale, plan: Plan, num_iterations: NumIterations, skip: Tensor | None) -> list[Result]:
        """What `scale` does with the other arguments, replayed; the next replay overwrites what it returns."""
        if self._failed or is_capturing():
            return scale(plan, num_iterations, skip)
        if skip is not None:
            # It is a new tensor at every step, and not always at the same address.
            self._skip = torch.empty_like(skip) if self._skip is None else self._skip
            skip = self._skip.copy_(skip)
        # A graph reads its own captures' `_skip`.
        key = (self, tuple(num_iterations.items()), skip is None)
        if key not in plan.graphs:
            plan.graphs[key] = None
            return scale(plan, num_iterations, skip)
        captured: tuple[torch.cuda.CUDAGraph, list[Result]] | None = plan.graphs[key]
        if captured is None:
            graph = torch.cuda.CUDAGraph()
            # The stats of one replay are read before the next: graphs can share their memory.
            self._pool = torch.cuda.graph_pool_handle() if self._pool is None else self._pool
            try:
                # A capture only records: the weights are as they were if it fails.
                # Another thread's work, such as that of a loader that pins memory, must not spoil it.
                with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                    results = scale(plan, num_iterations, skip)
            except RuntimeError as error:
                self._failed = True
                _warn_of_no_graph(str(error).strip().splitlines()[0], stacklevel=3)
                return scale(plan, num_iterations, skip)
            captured = plan.graphs[key] = graph, results
        graph, results = captured
        graph.replay()
        return results
