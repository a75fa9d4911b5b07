"""One scaling step over many weights: everything is measured before anything is written.

Weights of one kind are measured in batches, by shape where the kind works on copies: many layers share their launches.
"""

from collections.abc import Iterable, Iterator, Mapping
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from specscale.algebra import join
from specscale.norms import Measurement, Norm
from specscale.parametrization import MEASURED, NormScaling


class Member(NamedTuple):
    """A weight in a step."""

    scaling: NormScaling
    weight: Tensor


class Batch(NamedTuple):
    """Weights that are measured together, and what was found; the axis of the matrices runs over all of them."""

    members: list[Member]
    measurement: Measurement


def batches(members: Iterable[Member]) -> Iterator[list[Member]]:
    """Members of one kind, dtype and device, and of one shape if they are joined in a copy.

    A copy and its workspace are no larger than the largest weight, unless they are of that very weight.
    """
    members = list(members)
    largest = max((member.weight.numel() for member in members), default=0)
    open_batches: dict[object, list[Member]] = {}
    for member in members:
        kind, weight = member.scaling.kind, member.weight
        m, n = member.scaling.view.matrix_shape(weight)
        workspace = kind.workspace(m, n)
        key = (kind, None if workspace is None else (m, n), weight.dtype, weight.device)
        batch = open_batches.setdefault(key, [])
        count = sum(one.scaling.view.count for one in (*batch, member))
        if batch and workspace is not None and count * (m * n + workspace) > largest:
            yield open_batches.pop(key)
            batch = open_batches.setdefault(key, [])
        batch.append(member)
    yield from open_batches.values()


def measure(members: Iterable[Member], pace: Mapping[Norm, int | None] | None = None) -> list[Batch]:
    """What the weights' matrices are now; writes nothing. With `pace`, each kind's iterations, nothing is read back."""
    found = []
    for batch in batches(members):
        scalings = [member.scaling for member in batch]
        matrices = (member.scaling.matrices(member.weight) for member in batch)
        states = [scaling.solver_state() for scaling in scalings]
        state = {name: join([state[name] for state in states]) for name in states[0]}
        kind = scalings[0].kind
        found.append(Batch(batch, kind.measure(matrices, state, num_iterations=pace[kind] if pace else None)))
    return found


def restore_(measured: list[Batch], skip: Tensor | None) -> None:
    """Put every weight back on its target and store what was found.

    Left alone: a matrix whose target is zero, one that is not finite, and all of them where the one-element tensor
    `skip` is positive.
    """
    buffers: list[Tensor] = []
    values: list[Tensor] = []
    for members, measurement in measured:
        scalings = [member.scaling for member in members]
        target = join([scaling.target for scaling in scalings])
        hold = (target == 0) | ~measurement.norm.isfinite()
        if skip is not None:
            hold = hold | (skip > 0)
        splits = [member.scaling.view.split(member.weight) for member in members]
        norm = scalings[0].kind.restore_(splits, measurement, target, hold)
        counts = [len(split) for split in splits]
        told = {name: getattr(measurement, name) for name in MEASURED}
        for name, joined in {**measurement.state, **told, "norm": norm}.items():
            buffers += [scaling.get_buffer(name) for scaling in scalings]
            values += joined.split(counts)
    torch._foreach_copy_(buffers, values)


class Readout:
    """The norms and their errors of a step on their way to the host, which need not wait for them until it reads."""

    def __init__(self, measured: list[Batch]) -> None:
        scalings = [m.scaling for batch in measured for m in batch.members for _ in range(len(m.scaling.target))]
        self._names = [scaling.name for scaling in scalings]
        self._kinds = [scaling.kind for scaling in scalings]
        norms = torch.cat([batch.measurement.norm.double() for batch in measured])
        errors = torch.cat([batch.measurement.error.double() for batch in measured])
        # To pinned memory, which `to` takes by itself for such a copy.
        self._values = torch.stack([norms, errors]).to("cpu", non_blocking=True)
        self._copied = None
        if not norms.is_cpu:
            self._copied = torch.Event(device=norms.device)
            self._copied.record()

    def _read(self) -> list[list[float]]:
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()

    def non_finite(self) -> list[str]:
        """The weights that held NaN or infinity."""
        return list(
            dict.fromkeys(n for n, norm in zip(self._names, self._read()[0], strict=True) if not isfinite(norm))
        )

    def worst_error(self, kind: Norm) -> float | None:
        """The largest error among the weights of a kind; None where there was none of it."""
        return max((e for k, e in zip(self._kinds, self._read()[1], strict=True) if k == kind), default=None)
