"""Which process measures which batch of a step, and how what is found travels to the others.

Under data parallelism every process holds the same weights, so that all make the same list of batches. Each batch that
is worth it is measured by one of them, chosen by shapes alone. Then one all-gather brings what was found to all, bit
for bit, and every process writes every weight as it would without.
"""

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

from specscale.errors import Refusal
from specscale.linalg import widest_dtype
from specscale.norms import Measurement
from specscale.shards import is_sharded
from specscale.weights import Weight

Measure = Callable[[list[Weight]], Measurement]

ALIGNMENT = 64
"""Bytes: each tensor begins at a multiple of it, as torch's own do, and so at a multiple of its items' size."""


def operations(batch: list[Weight]) -> int:
    """About how many operations measuring the batch takes; 0 where it is not worth sharing."""
    return sum(
        weight.view.count * weight.scaling.constraint.norm.operations(*weight.scaling.matrix_shape(weight.parameter))
        for weight in batch
    )


def owners(costs: Sequence[int], num_ranks: int) -> list[int | None]:
    """The rank that takes each batch, the costliest first and each to where least is; None where the cost is 0.

    One batch alone is everyone's: the others would only wait for it.
    """
    chosen: list[int | None] = [None] * len(costs)
    loads = [0] * num_ranks
    costly = [number for number, cost in enumerate(costs) if cost]
    if len(costly) > 1:
        for number in sorted(costly, key=lambda number: -costs[number]):
            rank = chosen[number] = loads.index(min(loads))
            loads[rank] += costs[number]
    return chosen


def refuse_sharded(weights: Iterable[Weight]) -> None:
    """Refuse weights that are solved by all processes together: one alone would wait for the others."""
    for weight in weights:
        if is_sharded(weight.parameter):
            raise Refusal(
                f"the weight of {weight.name!r} is sharded, so that every process has work of its own; "
                "share is for DistributedDataParallel, where every process holds whole weights"
            )


class Sharing:
    """Shares the measuring of batches among the processes of a group, by one collective a step.

    Raises:
        Refusal: there is no such group, this process is not in it, a weight is sharded, or the processes hold other
            weights or targets (ValueError); `group` is no process group (TypeError).
    """

    def __init__(self, group: Any, weights: list[Weight]) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise Refusal(
                "torch.distributed is not initialized; call torch.distributed.init_process_group in every process first"
            )
        # That is what torch.distributed.new_group returns in the processes that are not in it.
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise Refusal("this process is not in the process group; call share in the processes that are")
        if not (group is None or isinstance(group, dist.ProcessGroup)):
            raise Refusal(f"expected a torch.distributed.ProcessGroup, found {type(group).__name__}", TypeError)
        refuse_sharded(weights)
        self._group: dist.ProcessGroup | None = group
        self._rank = dist.get_rank(group)
        self.num_ranks = dist.get_world_size(group)
        self._forms: dict[Hashable, Form] = {}
        if self.num_ranks > 1:
            self._refuse_others(weights)

    def _refuse_others(self, weights: list[Weight]) -> None:
        """Refuse weights or targets that are not those of all processes: what travels would be of another weight."""
        own = {weight.name: _described(weight) for weight in weights}
        all_of_them: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(all_of_them, own, group=self._group)
        for rank, other in enumerate(all_of_them):
            if list(other) != list(own):
                raise Refusal(f"rank {rank} has other weights under this scaling than rank {self._rank}")
            if different := [name for name in own if own[name] != other[name]]:
                raise Refusal(
                    f"the weight of {different[0]!r} or its target is another on rank {rank} than on rank "
                    f"{self._rank}; give all processes the same seed, or load the same weights, before "
                    "apply_norm_scaling"
                )

    def measure(self, batches: list[list[Weight]], measure: Measure) -> list[Measurement]:
        """What `measure` finds in each batch, here or in another process. Every process must call this alike."""
        # They may have been sharded since.
        refuse_sharded(itertools.chain.from_iterable(batches))
        ranks = owners([operations(batch) for batch in batches], self.num_ranks)
        found = {
            number: measure(batch)
            for number, (batch, rank) in enumerate(zip(batches, ranks, strict=True))
            if rank is None or rank == self._rank
        }
        if any(rank is not None for rank in ranks):
            found |= self._exchange(batches, ranks, found)
        return [found[number] for number in range(len(batches))]

    def _exchange(
        self, batches: list[list[Weight]], ranks: list[int | None], found: dict[int, Measurement]
    ) -> dict[int, Measurement]:
        """The measurements of all batches that have a rank, by number.

        A rank takes its own ones as they have travelled too, so that all ranks go on from tensors that lie alike in
        memory.
        """
        forms = {number: self._form(batches[number]) for number, rank in enumerate(ranks) if rank is not None}
        numbers = [[number for number in forms if ranks[number] == rank] for rank in range(self.num_ranks)]
        layouts = [[one for number in own for one in forms[number].layouts] for own in numbers]
        length = max(sum(one.num_bytes for one in own) for own in layouts)
        device = batches[next(iter(forms))][0].parameter.device
        sent = torch.empty(length, dtype=torch.uint8, device=device)
        if numbers[self._rank]:
            leaves = [leaf for number in numbers[self._rank] for leaf in _tensors(found[number])]
            torch._foreach_copy_(_views(sent, layouts[self._rank]), leaves)
        received = torch.empty(self.num_ranks, length, dtype=torch.uint8, device=device)
        dist.all_gather(list(received), sent, group=self._group)
        result = {}
        for own, memory, of_rank in zip(numbers, received, layouts, strict=True):
            tensors = iter(_views(memory, of_rank))
            for number in own:
                result[number] = forms[number].filled(tensors)
        return result

    def _form(self, batch: list[Weight]) -> "Form":
        # An averaged or a loaded state may have another dtype than the weight.
        key = tuple(
            (
                weight.scaling,
                weight.parameter.shape,
                weight.parameter.dtype,
                weight.parameter.device,
                *(one.dtype for one in weight.scaling.solver_state().values()),
            )
            for weight in batch
        )
        if key not in self._forms:
            self._forms[key] = Form.of(batch)
        return self._forms[key]


class Layout(NamedTuple):
    """How a tensor lies in memory, without gaps, and where it belongs."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, nothing: Tensor, count: int) -> "Layout":
        """That of a tensor about `count` matrices, from `nothing (0, ...)`, which is about none."""
        like = torch.empty_strided((count, *nothing.shape[1:]), nothing.stride(), dtype=nothing.dtype, device="meta")
        # The axes keep their order in memory: a product's last digits may depend on it.
        return cls(tuple(like.shape), torch.empty_like(like).stride(), nothing.dtype, nothing.device)

    @property
    def num_bytes(self) -> int:
        """The bytes that it takes, with those up to where the next one may begin."""
        return -(-math.prod(self.size) * self.dtype.itemsize // ALIGNMENT) * ALIGNMENT


class Form(NamedTuple):
    """A measurement without its numbers."""

    leaves: list[Layout | None]
    """Of its tensors, in their order; None where it has None."""
    tree: pytree.TreeSpec

    @classmethod
    def of(cls, batch: list[Weight]) -> "Form":
        """What measuring a batch finds: measuring none of its matrices costs next to nothing and shows it."""
        matrices, states = [], []
        for weight in batch:
            scaling, parameter = weight.scaling, weight.parameter
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            matrices.append(parameter.new_empty((0, *scaling.matrix_shape(parameter)), dtype=dtype))
            states.append({name: one[:0] for name, one in scaling.solver_state().items()})
        nothing = batch[0].scaling.constraint.norm.measure(matrices, states, num_iterations=1)
        sizes = [weight.view.count for weight in batch]
        leaves, tree = pytree.tree_flatten(nothing)
        # First the numbers about all matrices, then what there is by weight.
        by_weight = [zip(part, sizes, strict=True) for part in (nothing.factors, nothing.states)]
        counts = [size for part in by_weight for own, size in part for _ in pytree.tree_leaves(own)]
        counts = [sum(sizes)] * (len(leaves) - len(counts)) + counts
        layouts = [
            Layout.of(leaf, count) if isinstance(leaf, Tensor) else None
            for leaf, count in zip(leaves, counts, strict=True)
        ]
        return cls(layouts, tree)

    @property
    def layouts(self) -> list[Layout]:
        return [leaf for leaf in self.leaves if leaf is not None]

    def filled(self, tensors: Iterator[Tensor]) -> Measurement:
        """The measurement with the next ones of the tensors, each on the device where it belongs."""
        leaves = [None if leaf is None else next(tensors).to(leaf.device) for leaf in self.leaves]
        return pytree.tree_unflatten(leaves, self.tree)  # type: ignore[no-any-return]


def _tensors(measurement: Measurement) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(measurement) if isinstance(leaf, Tensor)]


def _views(memory: Tensor, layouts: Sequence[Layout]) -> list[Tensor]:
    """Tensors of these layouts in `memory`, uint8, one after another."""
    ends = list(itertools.accumulate((one.num_bytes for one in layouts), initial=0))
    views = []
    for start, one in zip(ends, layouts, strict=False):
        part = memory[start : start + math.prod(one.size) * one.dtype.itemsize].view(one.dtype)
        views.append(part.as_strided(one.size, one.stride))
    return views


def _described(weight: Weight) -> tuple[Any, ...]:
    """What must be the same in every process: it tells different numbers apart by their sums."""
    scaling, parameter = weight.scaling, weight.parameter
    buffers = {name: scaling.get_buffer(name) for name in (*scaling.held_buffers, *scaling.solver_state())}
    sums = {
        name: None if one.is_meta else float(one.detach().sum(dtype=widest_dtype(one.device))).hex()
        for name, one in {"weight": parameter, **buffers}.items()
    }
    return tuple(parameter.shape), str(parameter.dtype), sums
