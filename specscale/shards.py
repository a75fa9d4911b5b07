"""Sharded weights: which parts of a weight's matrices this process holds, and what is summed over processes.

torch gathers a DTensor for most products and norms. Here a process's shard is a few pieces of the weight's matrices,
each a view of the local tensor. A solver's block of vectors lies on the side of the matrix that is whole in every
process, and is equal in all of them. Its images lie on the other side, each process having those of its own rows. So

    A V         is local, where only rows are split,
    A^T Y       is a sum over processes, of the block's size,
    Y^T Y       is a sum of small matrices,

and no weight is gathered. Where rows and columns are split, as those of a row-wise parallel layer under `fully_shard`,
`A V` is a sum too, over the processes that hold other columns of the same rows.
"""

import functools
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from specscale.errors import Refusal
from specscale.linalg import at_least_float32, product
from specscale.views import MatrixView, SplitWeight

Index = slice | list[int]
ALL = slice(None)

Groups = tuple[Any, ...]
"""The process groups over which something is summed, one after another; empty where nothing is."""


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor, of which this process may hold a part."""
    # Whoever shards has imported it.
    return isinstance(tensor, getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ()))


def placements_of(tensor: Tensor) -> tuple[Any, ...]:
    """How the tensor is sharded: torch's placements, one for each dimension of its mesh; empty where it is whole."""
    return tuple(tensor.placements) if is_sharded(tensor) else ()  # type: ignore[attr-defined]


def num_shards_of(tensor: Tensor) -> int:
    """Over how many processes the tensor is split; 1 where it is whole."""
    if not is_sharded(tensor):
        return 1
    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    return math.prod(mesh.size(dim) for dim, one in enumerate(placements_of(tensor)) if not one.is_replicate())


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, outside of autograd: in the same memory."""
    own: Tensor = tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return own.detach()


def summed(parts: Sequence[Tensor], groups: Sequence[Groups]) -> list[Tensor]:
    """The sums of each of the tensors over its own processes; what goes the same way travels in one buffer.

    All processes must call it with as many tensors, of the same shapes, in the same order. They then hold the same
    bits. Tensors without groups are returned as they are.
    """
    found = list(parts)
    buffers: dict[tuple[Groups, torch.dtype], list[int]] = {}
    for number, (part, own) in enumerate(zip(parts, groups, strict=True)):
        if own:
            buffers.setdefault((own, part.dtype), []).append(number)
    for (own, _), numbers in buffers.items():
        flat = torch.cat([parts[number].reshape(-1) for number in numbers])
        for group in own:
            dist.all_reduce(flat, group=group)
        pieces = flat.split([parts[number].numel() for number in numbers])
        for number, piece in zip(numbers, pieces, strict=True):
            found[number] = piece.reshape(parts[number].shape)
    return found


class Part(NamedTuple):
    """A part of a weight's matrices, to be written, and where its numbers are among those of the weight."""

    split: SplitWeight
    # Not `ALL` by default: the compiler of torch 2.9 knows no slice that is a default.
    matrices: Index
    """Its place among the numbers of each matrix `(k,)`."""
    rows: Index
    """Its place among what a solver has for the rows, `(k, m)`."""
    columns: Index
    """Its place among what a solver has for the columns, `(k, n)`."""


class WeightParts(NamedTuple):
    """What this process holds of a weight."""

    num_matrices: int
    """Of the whole weight."""
    parts: list[Part]
    is_sharded: bool = False


@dataclass(frozen=True)
class Piece:
    """A part of the matrices that lies in the local tensor: some rows and columns of some of them."""

    place: tuple[slice, ...]
    """Where it is in the local tensor."""
    lengths: tuple[tuple[str, int], ...]
    """The lengths of its axes, by the names that the view has for them."""
    matrices: Index
    rows: Index
    columns: Index
    """Its matrices, rows and columns among those of the whole weight."""
    slot: slice
    """Where it is among what this process holds of the side that the images lie on."""


@dataclass(frozen=True, eq=False)
class Layout:
    """How a weight's matrices `(k, m, n)` lie in the shards of all processes, as this one sees it."""

    view: MatrixView
    shape: tuple[int, int]
    """`(m, n)` of a matrix."""
    pieces: tuple[Piece, ...]
    """What this process holds."""
    block_on_rows: bool
    """Whether the solver's block lies on the rows, and its images on the columns."""
    num_local: int
    """How many rows, or columns if the block lies on the rows, this process holds of a matrix, of all the most."""
    place: tuple[slice, ...]
    """Where the local tensor is in the whole one."""
    sums: Groups
    """The processes that hold other parts of the matrices."""
    image_sums: Groups
    """The processes that hold other parts of the side of the block, of the same images."""
    is_first: bool
    """Whether this is the first of the processes that hold the same images."""

    @property
    def other_side(self) -> int | None:
        """The length of the side that the block lies on, where that is not the one that it has in a whole weight."""
        m, n = self.shape
        if self.block_on_rows == (m < n):
            return None
        return m if self.block_on_rows else n


def layout_of(tensor: Tensor, view: MatrixView) -> Layout | None:
    """The layout of a weight; None where this process holds all of it.

    Raises:
        Refusal: the weight is sharded in a way that is not known.
    """
    if not is_sharded(tensor):
        return None
    mesh, placements = tensor.device_mesh, placements_of(tensor)  # type: ignore[attr-defined]
    if not any(one.is_shard() or _is_strided(one) or one.is_partial() for one in placements):
        return None
    is_member = mesh.get_coordinate() is not None
    groups = tuple(mesh.get_group(dim) for dim in range(mesh.ndim)) if is_member else ()
    layout = _layout(tuple(tensor.shape), mesh, placements, view, groups)
    found = tuple(local(tensor).shape)
    if found != (expected := tuple(one.stop - one.start for one in layout.place)):
        raise Refusal(
            f"a weight of the shape {tuple(tensor.shape)} has a local shape of {found} under {placements}, where "
            f"{expected} was expected; shard it by parallelize_module, fully_shard or distribute_tensor"
        )
    return layout


@functools.lru_cache(maxsize=4096)
def _layout(
    shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...], view: MatrixView, groups: Groups = ()
) -> Layout:
    """`groups`, those of the mesh, tell it from an equal one whose groups have been destroyed."""
    place = _place(shape, mesh, placements)
    sizes = view.sizes(torch.empty(shape, device="meta"))
    m, n = (math.prod(sizes[name] for name in names) for names in (view.row_names, view.column_names))
    # One process splits nothing, and has the block on the side where more processes have it.
    sharding = [dim for dim, one in enumerate(placements) if not one.is_replicate()]
    split = {dim: set(view.groups[placements[dim].dim]) for dim in sharding}
    of_rows = [dim for dim in sharding if split[dim] & set(view.row_names)]
    of_columns = [dim for dim in sharding if split[dim] & set(view.column_names)]
    if set(of_rows) & set(of_columns):
        raise Refusal(f"a weight is sharded along an axis that {view} reads as rows and as columns")
    # The block lies on the side that is whole; where both are or none is, on the shorter one.
    block_on_rows = m < n if bool(of_rows) == bool(of_columns) else bool(of_columns)
    image_dims = (of_rows if block_on_rows else of_columns) if of_rows and of_columns else []
    image_dims, dims = ([dim for dim in own if mesh.size(dim) > 1] for own in (image_dims, sharding))
    boxes = [_boxes_of(own, group, sizes) for own, group in zip(place, view.groups, strict=True)]
    pieces, num_local = _pieces(view, sizes, boxes, block_on_rows, shares_images=bool(image_dims))
    coordinate = mesh.get_coordinate()
    return Layout(
        view,
        (m, n),
        pieces,
        block_on_rows,
        num_local,
        place,
        _groups(mesh, dims),
        _groups(mesh, image_dims),
        all(coordinate[dim] == 0 for dim in image_dims),
    )


Box = tuple[slice, dict[str, tuple[int, int]]]
"""A part of a local axis, and what it is of each of the axes that the view splits the tensor's axis into."""


def _pieces(
    view: MatrixView, sizes: dict[str, int], boxes: list[list[Box]], block_on_rows: bool, *, shares_images: bool
) -> tuple[tuple[Piece, ...], int]:
    """The pieces of a shard, from the boxes of each of the tensor's axes, and the length of its side of the images."""
    names = view.column_names if block_on_rows else view.row_names
    slots: dict[tuple[int, str], slice] = {}
    used = [0] * view.count

    def slot_of(side: Index, numbers: Index) -> slice:
        # Where processes add up their images, all must have the same places for the same rows, with pieces or without.
        own = numbers_of(ALL if shares_images else numbers, view.count)
        if (own[0], str(side)) not in slots:
            start = max(used[number] for number in own)
            for number in own:
                slots[number, str(side)] = slice(start, start + _length(side))
                used[number] = start + _length(side)
        return slots[own[0], str(side)]

    def index_of(ranges: dict[str, tuple[int, int]], own: list[str]) -> Index:
        return _index([ranges.get(name, (0, 1)) for name in own], [sizes.get(name, 1) for name in own])

    if shares_images:
        of_side = [own for own, group in zip(boxes, view.groups, strict=True) if set(group) & set(names)]
        for combined in itertools.product(*of_side):
            slot_of(index_of(_merged(combined), names), ALL)
    pieces = []
    for combined in itertools.product(*boxes):
        ranges = _merged(combined)
        matrices, rows, columns = (
            index_of(ranges, own) for own in (view.batch_names or ["1"], view.row_names, view.column_names)
        )
        lengths = tuple((name, stop - start) for name, (start, stop) in ranges.items())
        slot = slot_of(columns if block_on_rows else rows, matrices)
        pieces.append(Piece(tuple(one for one, _ in combined), lengths, matrices, rows, columns, slot))
    return tuple(pieces), max(used)


def _merged(boxes: Sequence[Box]) -> dict[str, tuple[int, int]]:
    return {name: own for _, box in boxes for name, own in box.items()}


def _is_strided(placement: Any) -> bool:
    return type(placement).__name__ == "_StridedShard"


def _place(shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...]) -> tuple[slice, ...]:
    """Where this process's local tensor lies in the whole one.

    `fully_shard` splits what tensor parallelism has split, though its dimension of the mesh comes first: it calls such
    a placement strided, and the parts of later dimensions have to be found before.
    """
    place = [(0, length) for length in shape]
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise Refusal("a weight is sharded over processes that this one is not among")
    waiting: list[int] = []
    order = []
    for dim, one in enumerate(placements):
        if one.is_partial():
            raise Refusal(f"a weight is a sum that is still to be taken ({one}); redistribute it first")
        if _is_strided(one):
            waiting.append(dim)
        elif not one.is_replicate():
            order.append(dim)
    # The last one waits for the fewest.
    for dim in (*order, *reversed(waiting)):
        axis = placements[dim].dim
        start, stop = place[axis]
        # As `torch.chunk` does.
        size = -(-(stop - start) // mesh.size(dim))
        first = min(start + coordinate[dim] * size, stop)
        place[axis] = first, min(first + size, stop)
    return tuple(slice(start, stop) for start, stop in place)


def _groups(mesh: Any, dims: list[int]) -> Groups:
    """The process groups of a sum over these dimensions of a mesh."""
    if len(dims) < 2 or not mesh.mesh_dim_names:
        return tuple(mesh.get_group(dim) for dim in dims)
    names = tuple(mesh.mesh_dim_names[dim] for dim in dims)
    return ((mesh if len(names) == mesh.ndim else mesh[names])._flatten().get_group(),)


def _boxes_of(place: slice, names: list[str], sizes: dict[str, int]) -> list[Box]:
    """An interval of a tensor's axis as boxes, in order."""
    found = []
    start = 0
    for box in _boxes(place.start, place.stop, [sizes[name] for name in names]):
        length = math.prod(stop - first for first, stop in box)
        found.append((slice(start, start + length), dict(zip(names, box, strict=True))))
        start += length
    return found


def _boxes(start: int, stop: int, lengths: list[int]) -> Iterator[list[tuple[int, int]]]:
    """`[start, stop)` of a flattened index, in order, as products of ranges of the axes of these lengths."""
    if start >= stop:
        return
    if len(lengths) == 1:
        yield [(start, stop)]
        return
    inner = math.prod(lengths[1:])
    first, last = -(-start // inner), stop // inner
    if first > last:
        # Within one index of the first axis.
        base = last * inner
        for box in _boxes(start - base, stop - base, lengths[1:]):
            yield [(last, last + 1), *box]
        return
    for box in _boxes(start - (first - 1) * inner, inner, lengths[1:]) if first * inner > start else ():
        yield [(first - 1, first), *box]
    if last > first:
        yield [(first, last), *((0, length) for length in lengths[1:])]
    for box in _boxes(0, stop - last * inner, lengths[1:]):
        yield [(last, last + 1), *box]


def _index(ranges: list[tuple[int, int]], lengths: list[int]) -> Index:
    """The flattened index of a product of ranges: a slice, where it has no gaps."""
    numbers = [0]
    for (start, stop), length in zip(ranges, lengths, strict=True):
        numbers = [number * length + own for number in numbers for own in range(start, stop)]
    if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return slice(numbers[0], numbers[0] + len(numbers))
    return numbers


def numbers_of(index: Index, length: int) -> Sequence[int]:
    """The numbers that an index into so many takes."""
    return range(length)[index] if isinstance(index, slice) else index


def _length(index: Index) -> int:
    return index.stop - index.start if isinstance(index, slice) else len(index)


def parts_of(weight: Tensor, view: MatrixView) -> WeightParts:
    """What this process holds of a weight, to be written."""
    layout = layout_of(weight, view)
    own = local(weight)
    if layout is None:
        return WeightParts(view.count, [Part(view.split(own), ALL, ALL, ALL)])
    parts = []
    for piece in layout.pieces:
        sides = (piece.rows, piece.slot) if layout.block_on_rows else (piece.slot, piece.columns)
        parts.append(Part(view.split(own[piece.place], dict(piece.lengths)), piece.matrices, *sides))
    return WeightParts(view.count, parts, is_sharded=True)


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor in every process: as it is, or of a DTensor, a new one. All processes must call it."""
    if not is_sharded(tensor):
        return tensor
    mesh, placements = tensor.device_mesh, placements_of(tensor)  # type: ignore[attr-defined]
    place = _place(tuple(tensor.shape), mesh, placements)
    dims = [dim for dim, one in enumerate(placements) if not one.is_replicate() and mesh.size(dim) > 1]
    own = local(tensor)
    if not dims:
        return own
    found = own.new_zeros(tensor.shape)
    found[place] = own
    (found,) = summed([found], [_groups(mesh, dims)])
    return found


def shard_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A DTensor like another, of a whole tensor that every process has."""
    found = torch.empty_like(like.detach(), dtype=tensor.dtype)
    place = _place(tuple(like.shape), like.device_mesh, placements_of(like))  # type: ignore[attr-defined]
    local(found).copy_(tensor[place])
    return found


def as_shard(tensor: Tensor, like: Tensor) -> Tensor:
    """A DTensor like another with what the first process of its mesh has in `tensor`. All processes must call it."""
    mesh = like.device_mesh  # type: ignore[attr-defined]
    for dim in range(mesh.ndim):
        dist.broadcast(tensor, group=mesh.get_group(dim), group_src=0)
    return shard_of(tensor, like)


@dataclass(frozen=True)
class ShardedMatrices:
    """Matrices `A (k, m, n)` of which this process holds pieces, float32 or wider: a weight's, or their transposes.

    As `specscale.solvers.Matrices`, but that the products return this process's part of a sum over processes, to be
    taken by `summed`, and that images have the rows that this process holds.
    """

    layout: Layout
    tensor: Tensor
    """The local tensor."""
    scale: Tensor | None = None
    """`(k,)`: about the norm of each matrix, where that is known."""
    is_transposed: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        m, n = self.layout.shape
        return (self.layout.view.count, *((n, m) if self.is_transposed else (m, n)))

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.tensor.dtype, torch.float32)

    @property
    def mT(self) -> "ShardedMatrices":
        return replace(self, is_transposed=not self.is_transposed)

    @property
    def block_on_rows(self) -> bool:
        return self.layout.block_on_rows != self.is_transposed

    @property
    def sums(self) -> Groups:
        """The processes over which `A^T Y`, Gram matrices of images and sums of squares are summed."""
        return self.layout.sums

    @property
    def image_sums(self) -> Groups:
        """The processes over which images `A V` are summed."""
        return self.layout.image_sums

    @functools.cached_property
    def _pieces(self) -> list[tuple[Index, slice, Index, Index, Tensor]]:
        """Of each piece its matrices, its slot, its rows and its columns, and its values, of this orientation."""
        found = []
        for piece in self.layout.pieces:
            split = self.layout.view.split(self.tensor[piece.place], dict(piece.lengths))
            values = at_least_float32(split.matrices())
            if self.is_transposed:
                found.append((piece.matrices, piece.slot, piece.columns, piece.rows, values.mT))
            else:
                found.append((piece.matrices, piece.slot, piece.rows, piece.columns, values))
        return found

    @property
    def _only(self) -> Tensor | None:
        """The values, where they are one piece of all matrices with all columns: as of most weights."""
        if len(self._pieces) == 1:
            values = self._pieces[0][-1]
            if values.shape == (self.shape[0], self.layout.num_local, self.shape[2]):
                return values
        return None

    def matmat(self, columns: Tensor) -> Tensor:
        """This process's part of `A V`, `(k, its rows, b)`, for `V (k, n, b)`."""
        if self._only is not None:
            return product(self._only, columns)
        images = columns.new_zeros(len(columns), self.layout.num_local, columns.shape[-1])
        for matrices, slot, _, own, values in self._pieces:
            images[matrices, slot] += product(values, columns[matrices][:, own])
        return images

    def rmatmat(self, images: Tensor) -> Tensor:
        """This process's part of `A^T Y (k, n, b)`, from its rows of `Y`."""
        if self._only is not None:
            return product(self._only.mT, images)
        found = images.new_zeros(self.shape[0], self.shape[2], images.shape[-1])
        for matrices, slot, _, own, values in self._pieces:
            found[_both(matrices, own)] += product(values.mT, images[matrices, slot])
        return found

    def once(self, numbers: Tensor) -> Tensor:
        """What is computed of images that several processes hold: of one of them, so that `sums` has it once."""
        return numbers if self.layout.is_first else torch.zeros_like(numbers)

    def dense(self) -> Tensor:
        """The rows of this process, `(k, its rows, n)`, where the columns are whole; a matrix may have zeros more."""
        if self._only is not None:
            return self._only
        found = self.tensor.new_zeros(self.shape[0], self.layout.num_local, self.shape[2], dtype=self.dtype)
        for matrices, slot, _, own, values in self._pieces:
            assert not isinstance(own, list)
            found[matrices, slot, own] = values
        return found

    def in_place(self) -> Tensor:
        """The whole matrices with zeros for what other processes hold, `(k, m, n)`: to be summed over `sums`."""
        found = self.tensor.new_zeros(self.shape, dtype=self.dtype)
        for matrices, _, rows, own, values in self._pieces:
            found[_both(matrices, rows, own)] = values
        return found

    def rows_of(self, vectors: Tensor) -> Tensor:
        """Of numbers for all rows `(k, m, ...)`, those for this process's, `(k, its rows, ...)`."""
        found = vectors.new_zeros(len(vectors), self.layout.num_local, *vectors.shape[2:])
        for matrices, slot, rows, _, _ in self._pieces:
            found[matrices, slot] = vectors[matrices][:, rows]
        return found

    def with_scale(self, norm: Tensor | None) -> "ShardedMatrices":
        """With the norms `(k,)` of the last step as the scale; without, with what all processes find."""
        if norm is None:
            norm = self._largest()
            for group in self.sums:
                dist.all_reduce(norm, dist.ReduceOp.MAX, group=group)
        return replace(self, scale=torch.where(norm.isfinite() & (norm > 0), norm, 1).to(self.dtype))

    def _largest(self) -> Tensor:
        """`(k,)`: the largest entry of what this process holds."""
        found = self.tensor.new_zeros(self.shape[0], dtype=self.dtype)
        for matrices, _, _, _, values in self._pieces:
            found[matrices] = torch.maximum(found[matrices], values.abs().amax(dim=(-2, -1)))
        return found

    def square_sums(self, dtype: torch.dtype) -> Tensor:
        """`(k,)`: the sums of squares of what this process holds."""
        found = self.tensor.new_zeros(self.shape[0], dtype=dtype)
        for matrices, _, _, _, values in self._pieces:
            rows = torch.linalg.vector_norm(values, dim=-1)
            found[matrices] += torch.linalg.vector_norm(rows, dim=-1, dtype=dtype).square()
        return found


def _both(*indices: Index) -> tuple[Any, ...]:
    """An index of each of the first axes, of all combinations, as slices alone have it."""
    if sum(isinstance(one, list) for one in indices) < 2:
        return indices
    numbers = [range(one.start, one.stop) if isinstance(one, slice) else one for one in indices]
    return tuple(
        torch.tensor(one).reshape([-1 if axis == own else 1 for axis in range(len(indices))])
        for own, one in enumerate(numbers)
    )
