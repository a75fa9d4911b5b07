"""The scaling step: every weight is measured before the first one is written.

On a CPU, the solver stops when its error is small enough, and weights that are not finite stop the step. On an
accelerator a step reads nothing back: the host reads the norms and errors of the step before, and waits for them only
if it is a whole step ahead. On CUDA, `specscale.grouped` takes the step of the weights that its kernels fit, all in a
few launches; the others go the way that is written here, in torch operations, as on any device. A step can be captured
in a CUDA graph and replayed.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from specscale import linalg
from specscale.advance import Advance
from specscale.constraints import Constraint
from specscale.errors import ADVICE, Refusal, non_finite
from specscale.linalg import broadcast_to, concat, no_grad_full_precision
from specscale.norms import Measurement
from specscale.pending import PendingCopies
from specscale.plans import Plan, Plans, goes_by_kernels, is_capturing
from specscale.shards import is_sharded, parts_of
from specscale.sharing import Sharing, operations
from specscale.state import MEASURED, NormScaling
from specscale.weights import Weight, refuse_gathered, refuse_non_finite

NumIterations = Mapping[Constraint, int | None]
"""The solver's iterations in a step that reads nothing back, by constraint."""

Scale = Callable[[Plan, NumIterations, Tensor | None], list["Result"]]
"""A step that reads nothing back."""


class ScalingStep:
    """Takes scaling steps, and keeps between them what the host may not wait for."""

    def __init__(self) -> None:
        self.found: dict[NormScaling, Found] = {}
        """What the host knows: of a weight's last step, or on an accelerator of the one before."""
        self._pending: PendingStats | None = None
        self._plans = Plans()
        self._graphs: CapturedSteps | None = None
        self._sharing: Sharing | None = None
        self._advance = Advance()

    @no_grad_full_precision
    def take(self, weights: list[Weight], skip: Tensor | None = None, *, counts: bool = True) -> None:
        """Put the weights back on their targets: those of the next step of their schedules, if the step `counts`.

        Only such a step is shared: others may be taken in one process alone.

        Where `skip`, one number for all weights or for each, is positive, nothing of a weight changes, its state
        included.

        Raises:
            Refusal: a weight holds NaN or infinity: on a CPU at this step, which then writes nothing; elsewhere at the
                last one, which left that weight alone. Or a schedule gives no positive number; nothing is written.
        """
        if not weights:
            return
        if torch.compiler.is_compiling() and [weight for weight in weights if is_sharded(weight.parameter)]:
            # A compiler cannot trace a `Refusal`.
            raise RuntimeError("step: a step over sharded weights cannot be compiled; take it outside of torch.compile")
        refuse_gathered(weights)
        solve_first_(weights)
        sharing = self._sharing if counts else None
        # Through the module, so that a test can run an accelerator's step on a CPU.
        if all(linalg.can_sync(weight.parameter) for weight in weights):
            self._take_with_sync(weights, skip, counts, sharing)
        else:
            self._take_without_sync(weights, skip, counts, sharing)

    def _take_with_sync(
        self, weights: list[Weight], skip: Tensor | None, counts: bool, sharing: Sharing | None
    ) -> None:
        if skip is not None:
            is_off = (skip > 0).expand(len(weights)).tolist()
            weights = [weight for weight, off in zip(weights, is_off, strict=True) if not off]
            if not weights:
                return
        batches = measure_weights(weights, sharing=sharing)
        if bad := self._read(PendingStats([Result.of(batch) for batch in batches])):
            raise non_finite(bad, f"no weight was scaled. {ADVICE}")
        if counts:
            self._advance.advance_(weights)
        project_weights_(batches)
        for weight in weights:
            weight.scaling.mark_current(weight.parameter)

    def _take_without_sync(
        self, weights: list[Weight], skip: Tensor | None, counts: bool, sharing: Sharing | None
    ) -> None:
        is_compiling = torch.compiler.is_compiling()
        # What a compiler or a graph of the caller's records is not what runs: the host reads nothing of it.
        is_recorded = is_compiling or is_capturing()
        # The step before has ended, unless the host is a whole step ahead. Its error is raised once, so that training
        # can go on from good weights.
        if not is_recorded and self._pending is not None:
            pending, self._pending = self._pending, None
            if bad := self._read(pending):
                raise non_finite(bad, f"the last step did not scale it. {ADVICE}")
        # In place and outside of the captured graphs, which read the targets where they are.
        if counts:
            self._advance.advance_(weights, skip)
        # Before any capture of ours: what a plan allocates and copies must not become part of a graph.
        plan = Plan(weights, by_kernels=False) if is_compiling else self._plans.of(weights)
        if is_recorded and plan.num_iterations is not None:
            # Kernels for as many as have been launched are compiled; a capture must compile none.
            planned = plan.num_iterations
        else:
            # A compiled step keeps the iterations that it was compiled with: a change would compile it anew.
            planned = plan.num_iterations = next_num_iterations(weights, {} if is_compiling else self.found)
        # No collective becomes part of what is compiled or captured.
        if sharing is not None and (is_recorded or not operations(plan.rest)):
            sharing = None
        if self._graphs is None or sharing is not None:
            results = scale(plan, planned, skip, sharing)
        else:
            results = self._graphs.take(scale, plan, planned, skip)
        if not is_recorded:
            self._pending = PendingStats(results)
        for weight in weights:
            weight.scaling.mark_current(None if is_compiling else weight.parameter)

    def _read(self, stats: "PendingStats") -> list[str]:
        """Keep what a step has found; returns the names of the weights that held NaN or infinity."""
        found = list(stats.read())
        self.found |= {one.weight.scaling: one for one in found}
        return [one.weight.name for one in found if not one.is_finite]

    def capture(self, weights: Iterable[Weight]) -> None:
        """Replay steps from CUDA graphs from now on, where these weights allow it; else a warning says why not."""
        weights = list(weights)
        blocker = capture_blocker(weight.parameter for weight in weights)
        if blocker is not None:
            _warn_of_no_graph(blocker, stacklevel=5)
        self._graphs = CapturedSteps() if blocker is None else None
        self._warn_of_collectives(weights)

    def share(self, weights: list[Weight], group: Any) -> None:
        """Share the measuring of steps among the processes of a group from now on; see `Sharing` for what it raises."""
        sharing = Sharing(group, weights)
        self._sharing = sharing if sharing.num_ranks > 1 else None
        self._warn_of_collectives(weights)

    def _warn_of_collectives(self, weights: list[Weight]) -> None:
        """Say that steps that are to be captured are shared, where they are: those of weights that no kernel takes."""
        if self._graphs is None or self._sharing is None:
            return
        if operations([weight for weight in weights if not goes_by_kernels(weight)]):
            reason = f"{self._sharing.num_ranks} processes share the step, and a graph must hold no collective"
            _warn_of_no_graph(reason, stacklevel=6)


def next_num_iterations(weights: list[Weight], found: Mapping[NormScaling, "Found"]) -> NumIterations:
    """The solver's iterations, by constraint, in the step after the ones that have found this."""
    known: dict[Constraint, list[Found]] = {}
    # Weights mostly have one constraint among them, whose hash takes longer than all else here.
    known_by_id: dict[int, list[Found]] = {}
    for weight in weights:
        constraint = weight.scaling.constraint
        if id(constraint) not in known_by_id:
            known_by_id[id(constraint)] = known.setdefault(constraint, [])
        if weight.scaling in found:
            known_by_id[id(constraint)].append(found[weight.scaling])
    # `max` of a list, and without a default, is what the compiler of torch 2.9 traces.
    return {
        constraint: constraint.norm.next_num_iterations(
            max([one.num_iterations for one in own]) if own else None, max([one.error for one in own]) if own else None
        )
        for constraint, own in known.items()
    }


def scale(
    plan: Plan, num_iterations: NumIterations, skip: Tensor | None, sharing: Sharing | None = None
) -> list["Result"]:
    """A step that reads nothing back: by kernels where they fit, else in torch operations."""
    results = []
    for group in plan.groups:
        group.take(num_iterations[group.weights[0].scaling.constraint], plan.part(skip, group.weights))
        results.append(Result(group.weights, group.stats))
    if plan.rest:
        batches = measure_weights(plan.rest, num_iterations, sharing)
        project_weights_(batches, [plan.part(skip, batch.weights) for batch in batches])
        results += [Result.of(batch) for batch in batches]
    return results


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


def measure_weights(
    weights: Iterable[Weight], num_iterations: NumIterations | None = None, sharing: Sharing | None = None
) -> list[Batch]:
    """Measure the weights without modifying them; with `num_iterations`, nothing is read back.

    With `sharing`, other processes measure some of them.
    """

    def measure(batch: list[Weight]) -> Measurement:
        constraint = batch[0].scaling.constraint
        matrices = (weight.scaling.operand(weight.parameter) for weight in batch)
        states = [weight.scaling.solver_state() for weight in batch]
        count = num_iterations[constraint] if num_iterations else None
        return constraint.norm.measure(matrices, states, num_iterations=count)

    batches = list(_batches(weights))
    found = [measure(batch) for batch in batches] if sharing is None else sharing.measure(batches, measure)
    return [Batch(batch, measurement) for batch, measurement in zip(batches, found, strict=True)]


MOST_OPERATIONS = 96 * 2**23
"""The most operations of a batch, but for a weight alone: on a CPU, more are several batches, to be shared.

A batch's digits depend on its composition, which is therefore the same whether it is shared or not. One more costs as
much as 2^20 elements of a weight.
"""


FREE_SCRATCH = 2**18
"""Elements of memory that every batch may take: a batch takes as long as its small problems, however many they are."""


def _batches(weights: Iterable[Weight]) -> Iterator[list[Weight]]:
    """Weights of one constraint, dtype and device, to be measured together.

    As many as take no more memory than the largest weight or `FREE_SCRATCH`, and on a CPU no more than
    `MOST_OPERATIONS`. Sharded ones are one batch: what they sum over processes travels together.
    """
    weights = list(weights)
    are_sharded = [is_sharded(weight.parameter) for weight in weights]
    sizes = [w.parameter.numel() for w, sharded in zip(weights, are_sharded, strict=True) if not sharded]
    most_scratch = max([FREE_SCRATCH, *sizes])
    open_batches: dict[object, tuple[list[Weight], int, int]] = {}
    for weight, sharded in zip(weights, are_sharded, strict=True):
        parameter = weight.parameter
        scratch, cost = (0, 0) if sharded else _scratch_and_cost(weight)
        key = (weight.scaling.constraint, parameter.dtype, parameter.device, sharded)
        batch, total, total_cost = open_batches.get(key, ([], 0, 0))
        if batch and (total + scratch > most_scratch or total_cost + cost > MOST_OPERATIONS):
            yield batch
            batch, total, total_cost = [], 0, 0
        open_batches[key] = [*batch, weight], total + scratch, total_cost + cost
    yield from (batch for batch, *_ in open_batches.values())


def _scratch_and_cost(weight: Weight) -> tuple[int, int]:
    """The elements of memory and, on a CPU, the operations that it takes to measure a weight in a batch."""
    parameter, norm = weight.parameter, weight.scaling.constraint.norm
    shape = weight.scaling.matrix_shape(parameter)
    scratch = weight.view.count * norm.scratch_elements(*shape)
    if scratch and (parameter.dtype.itemsize < 4 or not parameter.is_contiguous()):
        # It is read as a copy, which is held until the batch is measured.
        scratch += parameter.numel()
    # Elsewhere, a batch takes nearly as long as several.
    return scratch, weight.view.count * norm.operations(*shape) if linalg.can_sync(parameter) else 0


def project_weights_(batches: list[Batch], skips: Iterable[Tensor | None] = repeat(None)) -> None:
    """Put every measured weight back on its target, and record what was measured.

    Matrices whose `skip_mask` is 1 and those that are not finite are not written. With `skips`, a tensor for each
    batch with one number for all of its weights or for each: where it is positive, nothing of a weight changes.
    """
    buffers: list[Tensor] = []
    values: list[Tensor] = []
    for (weights, measurement), skip in zip(batches, skips, strict=False):
        scalings = [weight.scaling for weight in weights]
        target = concat([scaling.target for scaling in scalings])
        skip_mask = (concat([scaling.skip_mask for scaling in scalings]) > 0) | ~measurement.norm.isfinite()
        is_off = None
        if skip is not None:
            off = (skip > 0).to(skip_mask.device, non_blocking=True).expand(len(weights)).split(1)
            is_off = concat([one.expand(weight.view.count) for one, weight in zip(off, weights, strict=True)])
            skip_mask = skip_mask | is_off
        parts = [parts_of(weight.parameter, weight.view) for weight in weights]
        after = scalings[0].constraint.project_(parts, measurement, target, skip_mask)
        _collect(scalings, after, measurement.norm, buffers, values, is_off)
    torch._foreach_copy_(buffers, values)


@no_grad_full_precision
def solve_anew_(scaling: NormScaling, weight: Tensor) -> None:
    """Measure one weight to convergence, from the solver's initial state, and record what was measured."""
    state = scaling.init_solver_state(weight)
    operand = scaling.operand(weight, is_known=False)
    measurement = scaling.constraint.norm.measure([operand], [state], to_convergence=True)
    buffers: list[Tensor] = []
    values: list[Tensor] = []
    _collect([scaling], measurement, measurement.norm, buffers, values)
    torch._foreach_copy_(buffers, values)
    scaling.is_unsolved = False


def solve_first_(weights: Iterable[Weight], *, to_report: bool = False) -> None:
    """Solve the weights whose values have come since they were on the meta device.

    With `to_report`, the next step solves them once more: a report, which one rank may make alone, must not change what
    the ranks compute.

    Raises:
        Refusal: one of them holds NaN or infinity (NonFiniteWeightError), or the host cannot read (RuntimeError).
    """
    weights = list(weights)
    for weight in weights:
        weight.scaling.follow_sharding_(weight.parameter)
    unsolved = [weight for weight in weights if weight.scaling.is_unsolved]
    if to_report:
        # Where a checkpoint has brought no state that the solver can use, it has brought the norms.
        unsolved = [one for one in unsolved if not (is_sharded(one.parameter) and one.scaling.norm.isfinite().all())]
    if not unsolved:
        return
    if to_report and (sharded := [weight for weight in unsolved if is_sharded(weight.parameter)]):
        raise Refusal(
            f"the weight of {sharded[0].name!r} is sharded and has not been solved since it was; attach an optimizer, "
            "or call scaling.project(), in all processes first"
        )
    if torch.compiler.is_compiling():
        # A compiler cannot trace a `Refusal`.
        raise RuntimeError(f"step: {SOLVED_ON_HOST}")
    if is_capturing():
        raise Refusal(SOLVED_ON_HOST, RuntimeError)
    refuse_non_finite(unsolved, "give it values after to_empty: load a checkpoint, or initialize the layers")
    for weight in unsolved:
        scaling, parameter = weight.scaling, weight.parameter
        scaling.follow_(parameter)
        solve_anew_(scaling, parameter)
        scaling.mark_current(parameter)
        scaling.is_unsolved = to_report


SOLVED_ON_HOST = (
    "the weights were on the meta device and have not been solved since, which a compiled step or a CUDA graph of your "
    "own cannot do; call scaling.project(), or take a step outside of it, first"
)


def _collect(
    scalings: list[NormScaling],
    after: Measurement,
    norm_before: Tensor,
    buffers: list[Tensor],
    values: list[Tensor],
    is_off: Tensor | None = None,
) -> None:
    """Append the buffers of the scalings, and beside each what the measurement found for it: one copy writes all.

    `after` has the norms now, and `norm_before (k,)` are those that were measured. A matrix where `is_off (k,)` is true
    keeps its values.
    """
    counts = [scaling.view.count for scaling in scalings]
    found: list[dict[str, Tensor]] = [dict(state) for state in after.states]
    measured = {"norm": after.norm, "norm_before": norm_before, "residual": after.residual, "error": after.error}
    for name in MEASURED:
        for own, value in zip(found, measured[name].split(counts), strict=True):
            own[name] = value
    offs = [None] * len(scalings) if is_off is None else is_off.split(counts)
    for scaling, own, off in zip(scalings, found, offs, strict=True):
        for name, value in own.items():
            buffer = scaling.get_buffer(name)
            buffers.append(buffer)
            values.append(value if off is None else torch.where(broadcast_to(off, buffer), buffer, value))


class PendingStats:
    """The results of a step on their way to the host, which waits for them only when it reads them."""

    def __init__(self, results: list[Result]) -> None:
        self._weights = [result.weights for result in results]
        self._stats = PendingCopies([result.stats for result in results])

    def read(self) -> Iterator["Found"]:
        """What was found of each weight."""
        for weights, stats in zip(self._weights, self._stats.read(), strict=True):
            sizes = [weight.view.count for weight in weights]
            if sum(sizes) > 100 * len(sizes):
                # What is not finite is the largest.
                stats = torch.stack([one.amax(dim=1) for one in stats.split(sizes, dim=1)], dim=1)
                sizes = [1] * len(sizes)
            # Not by operations of torch, which take longer on few numbers.
            norms, errors, counts = stats.tolist()
            end = 0
            for weight, size in zip(weights, sizes, strict=True):
                start, end = end, end + size
                is_finite = all(map(math.isfinite, norms[start:end]))
                yield Found(weight, is_finite, max(errors[start:end]), int(max(counts[start:end])))


class Found(NamedTuple):
    """What a step has found of a weight."""

    weight: Weight
    is_finite: bool
    error: float
    """The largest error of its matrices."""
    num_iterations: int
    """The most that any of its matrices needed."""


def capture_blocker(parameters: Iterable[Tensor]) -> str | None:
    """Why a step over these parameters cannot be captured in a CUDA graph; None where it can."""
    parameters = list(parameters)
    if any(is_sharded(parameter) for parameter in parameters):
        return "weights are sharded, and a graph would hold their process group's sums"
    devices = {parameter.device for parameter in parameters}
    if types := sorted({device.type for device in devices} - {"cuda"}):
        return f"weights are on {' and '.join(types)}"
    return f"weights are on {len(devices)} devices, and a graph has one" if len(devices) > 1 else None


def _warn_of_no_graph(reason: str, stacklevel: int) -> None:
    warnings.warn(f"capture: no CUDA graph, since {reason}; steps run as they are", stacklevel=stacklevel)


class CapturedSteps:
    """Steps that read nothing back, as CUDA graphs: one launch instead of many.

    A graph works at fixed addresses, for fixed iterations; so there is one for each plan and number of iterations. The
    first step of a combination runs as it is, which is also the warm-up that a capture needs; the second is captured.
    After a capture that fails, all steps run as they are.
    """

    def __init__(self) -> None:
        self._pool: Any = None
        self._skips: dict[int, Tensor] = {}
        """The copy of `skip` that graphs read, by its length."""
        self._failed = False

    def take(self, scale: Scale, plan: Plan, num_iterations: NumIterations, skip: Tensor | None) -> list[Result]:
        """What `scale` does with the other arguments, replayed; the next replay overwrites what it returns."""
        if self._failed or is_capturing():
            return scale(plan, num_iterations, skip)
        if skip is not None:
            # It is a new tensor at every step, and not always at the same address.
            if len(skip) not in self._skips:
                self._skips[len(skip)] = torch.empty_like(skip)
            skip = self._skips[len(skip)].copy_(skip)
        # A graph reads its own captures' `_skips`.
        key = (self, tuple(num_iterations.items()), None if skip is None else len(skip))
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
