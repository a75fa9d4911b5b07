"""Which weights of a step go by kernels: decided once, and again when any of them is elsewhere than it was."""

import functools
import importlib
import operator
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from specscale.constraints import Constraint
from specscale.errors import Refusal
from specscale.shards import layout_of
from specscale.weights import Weight

Fingerprint = tuple[tuple[Hashable, ...], ...]

_LOOKS: tuple[Callable[[Tensor], Hashable], ...] = (
    # The address is that of one device.
    Tensor.data_ptr,
    Tensor.stride,
    Tensor.size,
    operator.attrgetter("dtype"),
)


class Plan:
    """How some weights step, valid while `fingerprint(weights)` stays what it was."""

    def __init__(self, weights: list[Weight], *, by_kernels: bool = True) -> None:
        self.weights = weights
        self.scalings = {weight.scaling for weight in weights}
        self.groups: list[Any] = []
        """The `grouped.GroupedStep` of the weights of each constraint, dtype and device that kernels fit."""
        self.rest: list[Weight] = []
        """The weights that step in torch operations."""
        self.num_iterations: Mapping[Constraint, int | None] | None = None
        """The iterations of the last step that was taken by this plan, by constraint."""
        self.graphs: dict[Hashable, Any] = {}
        """The CUDA graphs of this step. They are kept here because they read and write the memory of `groups`."""
        groups: dict[Hashable, list[Weight]] = defaultdict(list)
        for weight in weights:
            if by_kernels and goes_by_kernels(weight):
                parameter, layout = weight.parameter, layout_of(weight.parameter, weight.view)
                sums = () if layout is None else layout.sums
                groups[weight.scaling.constraint, parameter.dtype, parameter.device, sums].append(weight)
            else:
                self.rest.append(weight)
        if groups and is_capturing():
            # Its memory would be the graph's, and each replay would copy from host memory that is someone else's.
            raise Refusal(
                "a CUDA graph is being captured, and the kernels' memory must be there before; take a step of these "
                "weights, where they now are, before the capture",
                RuntimeError,
            )
        for group in groups.values():
            self.groups.append(_grouped().GroupedStep(group))  # type: ignore[union-attr]

    def part(self, skip: Tensor | None, weights: list[Weight]) -> Tensor | None:
        """What `skip`, one number for all of the plan's weights or for each, has for some of them."""
        if skip is None or len(skip) == 1 or weights == self.weights:
            return skip
        numbers = {weight: number for number, weight in enumerate(self.weights)}
        # Views and one copy: an index would have to be copied to the device.
        return torch.cat([skip[numbers[weight]].reshape(1) for weight in weights])


class Plans:
    """The plans of a handle: the weights that step together may be others from step to step."""

    MOST = 8
    """How many plans may have the same weight: each has memory of its own."""

    def __init__(self) -> None:
        self._plans: list[tuple[Fingerprint, Plan]] = []
        """The one that was used last comes last."""
        self._captured: set[Plan] = set()
        """The plans that are in a user's graph: it is not known when that ends."""

    def of(self, weights: list[Weight]) -> Plan:
        """The plan of these weights, made anew if there is none for where they now are."""
        now = fingerprint(weights)
        # Comparisons end at the first difference, and a hash of so much takes longer than all of them.
        found = next((one for one in reversed(self._plans) if one[0] == now), None)
        if found is None:
            found = now, Plan(weights)
            for scaling in found[1].scalings:
                others = [one for one in self._plans if scaling in one[1].scalings]
                if len(others) >= self.MOST:
                    self._plans.remove(others[0])
            self._plans.append(found)
        elif found is not self._plans[-1]:
            self._plans.remove(found)
            self._plans.append(found)
        if is_capturing():
            self._captured.add(found[1])
        return found[1]


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def fingerprint(weights: list[Weight]) -> Fingerprint:
    """All that a plan depends on: a stale address would be written to after its memory has been freed.

    A plan holds its scalings, so that an id is not used twice.
    """
    scalings = [weight.scaling for weight in weights]
    parameters = [weight.parameter for weight in weights]
    # Of a DTensor, what it wraps has the address.
    tensors = [getattr(parameter, "_local_tensor", parameter) for parameter in parameters]
    for scaling in scalings:
        tensors += scaling._buffers.values()  # type: ignore[arg-type]
    # All tensors at once: at every step, this is the most of the host's work.
    return (tuple(map(id, scalings)), *(tuple(map(look, tensors)) for look in _LOOKS))


def goes_by_kernels(weight: Weight) -> bool:
    """Whether kernels take the weight's step."""
    grouped = kernels_for(weight.parameter)
    return grouped is not None and bool(grouped.fits(weight))


def kernels_for(tensor: Tensor) -> ModuleType | None:
    """`specscale.grouped`, where its kernels run on the tensor's device."""
    return _grouped() if _has_kernels(tensor.device) else None


@functools.cache
def _has_kernels(device: torch.device) -> bool:
    """Whether the kernels run on the device: NVIDIA's, from compute capability 8.0, where Triton works."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    grouped = _grouped()
    if grouped is None:
        return False
    try:
        grouped.try_to_launch(device)
    except Exception as error:
        # Triton needs a C compiler, for one.
        warnings.warn(
            f"norm scaling steps without its kernels on {device}, many times as slowly: Triton cannot launch them "
            f"({type(error).__name__}: {error})",
            stacklevel=2,
        )
        return False
    return True


@functools.cache
def _grouped() -> ModuleType | None:
    """`specscale.grouped`, if Triton is there."""
    try:
        return importlib.import_module("specscale.grouped")
    except ImportError:
        return None
