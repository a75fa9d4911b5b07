"""The targets of the next step: what a schedule does in a step, before the weights are put on their targets."""

from collections.abc import Callable, Hashable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from specscale import linalg
from specscale.errors import Refusal
from specscale.linalg import concat
from specscale.pending import PendingCopies
from specscale.plans import is_capturing
from specscale.schedules import Schedule, own_factor
from specscale.state import NormScaling
from specscale.weights import Weight

ASKED_ON_HOST = (
    "a schedule that is a function of your own is asked on the host, which a compiled step or a CUDA graph of your own "
    "leaves out; use one of specscale.schedules, or scaling.capture()"
)


class Advance:
    """Counts the steps of scheduled weights and brings their targets up to them.

    A built-in schedule is computed from the count in the buffers, where the weights are. A function of the caller's is
    asked on the host, which therefore follows the count. Where the device alone knows whether a step was skipped, it
    does so by a copy that it reads at the next step.
    """

    def __init__(self) -> None:
        self._known: dict[NormScaling, _Known] = {}

    def advance_(self, weights: list[Weight], skip: Tensor | None = None) -> None:
        """Begin the next step of those of the weights that have a schedule, in place.

        Where `skip`, one number for all weights or for each, is positive, nothing of a weight changes.

        Raises:
            Refusal: a caller's function gives no positive number, or cannot be asked. Nothing was written.
        """
        if all(weight.scaling.schedule is None for weight in weights):
            return
        offs = [None] * len(weights) if skip is None else (skip > 0).expand(len(weights)).split(1)
        groups: dict[Hashable, _Group] = {}
        asked: dict[NormScaling, int] = {}
        factors: dict[tuple[int, int], float] = {}
        for weight, off in zip(weights, offs, strict=True):
            scaling = weight.scaling
            schedule, step = scaling.schedule, None
            if schedule is None:
                continue
            if not isinstance(schedule, Schedule):
                step = asked[scaling] = self._num_steps(scaling) + 1
                if (id(schedule), step) not in factors:
                    factors[id(schedule), step] = own_factor(schedule, step)
            base = scaling.base_target
            key = (id(schedule), step, base.device, base.dtype)
            factor = None if step is None else factors[id(schedule), step]
            groups.setdefault(key, _Group([], [], factor)).add(scaling, off)
        buffers: list[Tensor] = []
        values: list[Tensor] = []
        for group in groups.values():
            group.advance(buffers, values)
        torch._foreach_copy_(buffers, values)
        self._follow(asked, may_be_skipped=skip is not None)

    def _num_steps(self, scaling: NormScaling) -> int:
        """How many steps the weight has taken."""
        count = scaling.num_steps
        # Through the module, so that a test can run an accelerator's step on a CPU.
        if linalg.can_sync(count):
            return int(count[0])
        if torch.compiler.is_compiling():
            # A compiler cannot trace a `Refusal`.
            raise RuntimeError(f"step: {ASKED_ON_HOST}")
        if is_capturing():
            raise Refusal(ASKED_ON_HOST, RuntimeError)
        known = self._known.get(scaling)
        # Another one has been loaded, or this is the first step.
        if known is None or known.buffer is not count or known.version != count._version:
            return int(count[0])
        return known.num_steps()

    def _follow(self, steps: dict[NormScaling, int], may_be_skipped: bool) -> None:
        """Keep what the host needs to know at the next step of weights that have taken this one, or may have."""
        steps = {scaling: step for scaling, step in steps.items() if not linalg.can_sync(scaling.num_steps)}
        copies = PendingCopies([scaling.num_steps[:1].clone() for scaling in steps] if may_be_skipped else [])
        for number, (scaling, step) in enumerate(steps.items()):
            count = scaling.num_steps
            read = partial(copies.number, number) if may_be_skipped else partial(int, step)
            self._known[scaling] = _Known(count, count._version, read)


class _Known(NamedTuple):
    """What the host knows of a count on a device."""

    buffer: Tensor
    version: int
    """How often the buffer had been written to then."""
    num_steps: Callable[[], int]


class _Group(NamedTuple):
    """Weights whose next targets are computed together."""

    scalings: list[NormScaling]
    offs: list[Tensor | None]
    """Of each, whether the device skips its step."""
    own_factor: float | None
    """The factor of the next step, where a caller's function has given it."""

    def add(self, scaling: NormScaling, off: Tensor | None) -> None:
        self.scalings.append(scaling)
        self.offs.append(off)

    def advance(self, buffers: list[Tensor], values: list[Tensor]) -> None:
        """Append the buffers of targets and counts, and beside each its values in the next step."""
        sizes = [scaling.view.count for scaling in self.scalings]
        before = concat([scaling.num_steps for scaling in self.scalings])
        base = concat([scaling.base_target for scaling in self.scalings])
        count = before + 1
        target = base * (self.scalings[0].factors(count) if self.own_factor is None else self.own_factor)
        offs = [
            one.to(base.device, non_blocking=True).expand(n)
            for one, n in zip(self.offs, sizes, strict=True)
            if one is not None
        ]
        if offs:
            off = concat(offs)
            target = torch.where(off, concat([scaling.target for scaling in self.scalings]), target)
            count = torch.where(off, before, count)
        buffers += [*(scaling.target for scaling in self.scalings), *(scaling.num_steps for scaling in self.scalings)]
        values += [*target.split(sizes), *count.split(sizes)]
