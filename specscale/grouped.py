"""The scaling step on CUDA: all weights of one dtype in a fixed number of launches, whatever their number.

A table in the device's memory has one row for each matrix: where it is, how it is strided, where its state is. A launch
runs over tiles of all matrices, or over the matrices; a tile names its row. Sums over tiles are written as partial
results and added in a fixed order, so that equal weights give equal results, bit for bit, on every rank and at every
repeat.

A spectral step is `specscale.block` with a block of 16 columns, kernel by kernel, in `1 + 6 num_iterations` launches:

    images          Y = A V                                                  once
    products        A^T Y, in parts                                          every iteration
    residuals       R = A^T Y - V (Y^T Y), parts of the Gram matrix of [V, R]
    orthogonalize   the frame in which [V, R] is orthonormal                 one program a matrix
    images_of_rest  T = (A R) M - Y K, parts of [Y, T]^T T
    rayleigh_ritz   the dominant subspace, and what is reported              one program a matrix
    combine         the new V and Y; after the last iteration (update): the new V, and the weight itself

A matrix whose error is small enough is left out of the step's further iterations: their programs end at once. One of at
most 32 columns is its own Gram matrix in the frame of unit vectors, in the first iteration's launches. A Frobenius step
is two launches: sums of squares, and the weight itself.

Sharded weights (`specscale.shards`) of the same processes are a step of their own. Its kernels read each sum over tiles
from a second table, `totals`, in which it is one part: the sum over all processes. Two kernels more an iteration add up
the parts of this process, each before an all-reduce.

This module is imported only where there are CUDA weights, since it needs Triton.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import triton.language as tl
from einops import EinopsError
from torch import Tensor

from specscale import kernels
from specscale.block import Block, basis_of
from specscale.constraints import Cap, Constraint, Frobenius, Normalize, Spectral
from specscale.kernels import SIDE, SMALL_SIZE
from specscale.norms import SpectralNormBySolver
from specscale.shards import Groups, local, numbers_of, parts_of, placements_of
from specscale.shards import layout_of as layout_of_shards
from specscale.views import SplitWeight
from specscale.weights import Weight

TILE = 64
"""Rows or columns of a tile of products."""
DEPTH = 32
"""Columns or rows that a tile of products reads at a time: as many stages as fit, two or three programs a processor."""
CHUNK = 512
"""Rows whose products with the images one program adds up: tall matrices of few columns must fill the device too."""


class Axis(NamedTuple):
    """Where the rows or the columns of a matrix lie, in elements, at two levels of strides."""

    length: int
    """Rows or columns of the inner level."""
    outer: int
    inner: int


class Layout(NamedTuple):
    """Where the elements of a matrix lie."""

    rows: Axis
    columns: Axis
    order_length: int
    """Column `j`, counted as the memory has them, is number `(j % order_length) * order_stride + j // order_length`."""
    order_stride: int


def layout_of(split: SplitWeight) -> Layout | None:
    """The layout of a weight's matrices; None where two levels do not do.

    Columns are taken in the order of memory if that is a rotation of their own order: as `channels_last` has them.
    """
    sizes = split.tensor.shape
    _, of_rows, of_columns = ([axis for axis in axes if sizes[axis] > 1] for axes in split.axes)
    # The stride of a single row says whether the kernels may read it 16 bytes at a time.
    rows, axes = _axis(split.tensor, of_rows or [split.axes[1][-1]]), of_columns
    found = []
    for first in range(max(len(axes), 1)):
        rotated = axes[first:] + axes[:first]
        columns = _axis(split.tensor, rotated)
        if rows is None or columns is None:
            continue
        leading = math.prod(sizes[axis] for axis in rotated[: len(axes) - first])
        trailing = math.prod(sizes[axis] for axis in axes[:first])
        # Memory counts `rotated`, whose last axes come first in the weight's own order.
        layout = Layout(rows, columns, trailing, leading)
        found.append((columns.length < split.shape[2], columns.inner, layout))
    return min(found, key=lambda one: one[:2])[2] if found else None


def _axis(tensor: Tensor, axes: list[int]) -> Axis | None:
    """These axes of the tensor as one, the first one outermost; None where that takes more than two levels."""
    levels: list[tuple[int, int]] = []
    for axis in axes:
        size, stride = tensor.shape[axis], tensor.stride(axis)
        if levels and levels[-1][1] == stride * size:
            levels[-1] = levels[-1][0] * size, stride
        else:
            levels.append((size, stride))
    if len(levels) > 2:
        return None
    length, inner = levels[-1] if levels else (1, 1)
    return Axis(length, levels[0][1] if len(levels) == 2 else 0, inner)


def _pointers(split: SplitWeight) -> list[int]:
    """The address of each matrix."""
    tensor = split.tensor
    steps = ([tensor.stride(axis) * number for number in range(tensor.shape[axis])] for axis in split.axes[0])
    return [tensor.data_ptr() + tensor.element_size() * sum(offsets) for offsets in itertools.product(*steps)]


class Placed(NamedTuple):
    """Where this process has rows of a matrix: of all of them, if it is not sharded."""

    pointer: int
    layout: Layout
    num_rows: int
    num_columns: int


NOWHERE = Layout(Axis(1, 0, 1), Axis(1, 0, 1), 1, 1)
"""The layout of a matrix of which this process has nothing."""


def placed_of(weight: Weight) -> list[Placed] | None:
    """Where each matrix of the weight is; None where the kernels do not read it so."""
    parameter = weight.parameter
    found: dict[int, Placed] = {}
    for part in parts_of(parameter, weight.view).parts:
        layout = layout_of(part.split)
        numbers = numbers_of(part.matrices, weight.view.count)
        if layout is None or not found.keys().isdisjoint(numbers):
            return None
        _, m, n = part.split.shape
        for number, pointer in zip(numbers, _pointers(part.split), strict=True):
            found[number] = Placed(pointer, layout, m, n)
    m, n = weight.view.matrix_shape(parameter)
    shards = layout_of_shards(parameter, weight.view)
    empty = Placed(0, NOWHERE, *((m, 0) if shards is not None and shards.block_on_rows else (0, n)))
    return [found.get(number, empty) for number in range(weight.view.count)]


def _is_in_one_piece(weight: Weight) -> bool:
    """Whether no process can have several pieces of one matrix: all must decide alike."""
    view = weight.view
    for placement in placements_of(weight.parameter):
        if not placement.is_replicate():
            names = view.groups[placement.dim]
            if len(list(itertools.dropwhile(lambda name: name in view.batch_names, names))) > 1:
                return False
    return True


def fits(weight: Weight) -> bool:
    """Whether a kernel takes the weight's step."""
    parameter, scaling = weight.parameter, weight.scaling
    shards = layout_of_shards(parameter, weight.view)
    # Where images are sums too, the kernels would have to be cut once more.
    if shards is not None and (shards.image_sums or not _is_in_one_piece(weight)):
        return False
    constraint = scaling.constraint
    # Not rows and columns: as matrices, they are so thin that a program has next to nothing to do, and so many that the
    # table of an MLP of 5 x 2000 takes the host 2.4 seconds. Torch's operations take them all at once.
    is_known = type(constraint) is Frobenius or (
        _map(constraint) is not None
        and isinstance(constraint.norm, SpectralNormBySolver)
        and isinstance(constraint.norm.solver, Block)
        and constraint.norm.solver.width == 16
    )
    state = scaling.solver_state()
    basis = basis_of(state) if "basis" in state else None
    try:
        side = (None if shards is None else shards.other_side) or min(weight.view.matrix_shape(parameter))
        placed = placed_of(weight)
    except EinopsError:
        return False
    return (
        is_known
        and parameter.dtype in _TYPES
        # A tensor without memory of its own is a subclass that wraps others.
        and (local(parameter).data_ptr() != 0 or shards is not None)
        and placed is not None
        # Buffers may have been replaced, and a weight may have another shape than its state. There torch explains.
        and all(
            buffer.device == parameter.device
            and buffer.is_contiguous()
            and buffer.dtype == torch.float32
            and len(buffer) == weight.view.count
            for buffer in scaling.buffers()
        )
        and (type(constraint) is Frobenius or basis is not None or side <= 32)
        and (basis is None or basis.shape[1:] == (side, 16))
        and (basis is None or basis.data_ptr() % 16 == 0)
    )


def _map(constraint: Constraint) -> int | None:
    """What the kernels of a spectral step do to the weight; None where they do not know the constraint.

    By its very type: one that is derived from it may do something else.
    """
    if type(constraint) is Normalize:
        return int((kernels.SCALE_DOWN if constraint.one_sided else kernels.SCALE).value)
    known = {Spectral: kernels.MOVE_FIRST, Cap: kernels.LOWER}.get(type(constraint))
    return None if known is None else int(known.value)


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class GroupedStep:
    """The step of weights of one dtype, device and constraint, all of which `fits`, as long as they stay in place."""

    def __init__(self, weights: list[Weight]) -> None:
        self.weights = weights
        parameter = weights[0].parameter
        self.device, self.dtype = parameter.device, _TYPES[parameter.dtype]
        self.vector = 16 // parameter.element_size()
        self.map = _map(weights[0].scaling.constraint)
        self.is_spectral = self.map is not None
        self.num_matrices = sum(weight.view.count for weight in weights)
        shards = layout_of_shards(parameter, weights[0].view)
        self.sums = () if shards is None else shards.sums
        """The processes that hold other parts of the weights."""
        # The default dtype and the default device are the user's.
        own: dict[str, Any] = {"dtype": torch.float32, "device": self.device}
        self.stats = torch.zeros(3, self.num_matrices, **own)
        """The norms, the estimated errors and the numbers of iterations of the last step."""
        self._unit_vectors = torch.eye(32, 16, **own)
        self._never = torch.zeros(len(weights), **own)
        self._rows: list[list[int]] = []
        self._tiles: dict[str, list[list[int]]] = {"rows": [], "columns": [], "chunks": [], "weight": []}
        self._scratch_size = 0
        self._in_scratch: list[tuple[int, int]] = []
        for number, weight in enumerate(weights):
            self._add(number, weight)
        self._scratch = torch.empty(self._scratch_size, **own)
        for number, field in self._in_scratch:
            self._rows[number][field] = self._scratch.data_ptr() + 4 * self._rows[number][field]
        self.table = _to_device(self._rows, torch.int64, self.device)
        self.totals = self._add_totals() if self.sums else self.table
        self.tiles = {name: _to_device(tiles, torch.int32, self.device) for name, tiles in self._tiles.items()}
        self._prepared: dict[int | None, list[Callable[[Tensor], None]]] = {}
        """The launches of a step, by its number of iterations."""

    def _add(self, weight_number: int, weight: Weight) -> None:
        """A row of the table, and tiles, for each matrix of a weight."""
        scaling = weight.scaling
        placed = placed_of(weight)
        assert placed is not None
        shards = layout_of_shards(weight.parameter, weight.view)
        outputs, inputs = weight.view.matrix_shape(weight.parameter)
        is_tall = outputs >= inputs if shards is None else not shards.block_on_rows
        for k, (pointer, layout, num_rows, num_columns) in enumerate(placed):
            by_row, by_column = layout.rows, layout.columns
            m, n = (num_rows, num_columns) if is_tall else (num_columns, num_rows)
            along_i, along_j = (by_row, by_column) if is_tall else (by_column, by_row)
            order = (layout.order_length, layout.order_stride) if is_tall else (num_rows, 1)
            is_exact = n <= 32
            if is_exact:
                # Unit vectors, in any order.
                order = (1, 1)
            number = len(self._rows)
            num_i, num_j, num_chunks = -(-m // TILE), -(-n // TILE), -(-m // CHUNK)
            mode = _mode(pointer, m, n, along_i, along_j, self.vector)
            p, q = (n, m) if mode == kernels.ROWS_CONTIGUOUS.value else (m, n)
            # A matrix of which this process has nothing is reported by a program that writes nothing else.
            weight_tiles = [[a, b] for a in range(-(-p // SIDE)) for b in range(-(-q // SIDE))] or [[0, 0]]
            row = [0] * kernels.FIELDS.value
            values = {
                kernels.WEIGHT: pointer,
                kernels.M_: m,
                kernels.N_: n,
                kernels.MODE: mode,
                kernels.I_LENGTH: along_i.length,
                kernels.I_OUTER: along_i.outer,
                kernels.I_INNER: along_i.inner,
                kernels.J_LENGTH: along_j.length,
                kernels.J_OUTER: along_j.outer,
                kernels.J_INNER: along_j.inner,
                kernels.ORDER_LENGTH: order[0],
                kernels.ORDER_STRIDE: order[1],
                kernels.NUM_I: num_i,
                kernels.NUM_J: num_j,
                kernels.NUM_CHUNKS: num_chunks,
                kernels.IS_EXACT: int(is_exact),
                kernels.TARGET: scaling.target[k:].data_ptr(),
                kernels.SKIP_MASK: scaling.skip_mask[k:].data_ptr(),
                kernels.NORM: scaling.norm[k:].data_ptr(),
                kernels.NORM_BEFORE: scaling.norm_before[k:].data_ptr(),
                kernels.RESIDUAL: scaling.residual[k:].data_ptr(),
                kernels.ERROR: scaling.error[k:].data_ptr(),
                kernels.STATS: self.stats[0, number:].data_ptr(),
                kernels.NUM_MATRICES: self.num_matrices,
                kernels.NUM_TILES: len(weight_tiles),
                kernels.WEIGHT_NUMBER: weight_number,
            }
            sizes = {kernels.PARTIAL_SQUARES: 1 + len(weight_tiles)}
            if self.is_spectral:
                state = scaling.solver_state()
                basis = self._unit_vectors if is_exact else basis_of(state)[k]
                values[kernels.BASIS] = basis.data_ptr()
                if not is_exact:
                    values[kernels.INDEX], values[kernels.AGE] = k, state["age"][k:].data_ptr()
                sizes = {
                    kernels.V_: 16 * n,
                    kernels.Y_: 16 * m,
                    kernels.R_: 16 * n,
                    kernels.T_: 16 * m,
                    kernels.PRODUCTS: 16 * n * num_chunks,
                    kernels.GRAM_V: kernels.GRAM_V_SIZE * num_j,
                    kernels.GRAM_Y: kernels.GRAM_Y_SIZE * num_i,
                    kernels.SMALL: SMALL_SIZE,
                }
            for field, value in values.items():
                row[field.value] = value
            for field, size in sizes.items():
                row[field.value] = self._scratch_size
                self._in_scratch.append((number, field.value))
                # Every part starts on 64 bytes.
                self._scratch_size += -(-size // 16) * 16
            self._rows.append(row)
            self._tiles["rows"] += [[number, t] for t in range(num_i)]
            self._tiles["columns"] += [[number, t] for t in range(num_j)]
            if not is_exact:
                self._tiles["chunks"] += [[number, t, c] for t in range(num_j) for c in range(num_chunks)]
            self._tiles["weight"] += [[number, a, b, i] for i, (a, b) in enumerate(weight_tiles)]

    def _add_totals(self) -> Tensor:
        """A table in which every sum is the one part that `self._all`, to be added up over processes, holds of it."""
        sizes = [
            {kernels.GRAM_Y: kernels.GRAM_Y_SIZE, kernels.PRODUCTS: 16 * row[kernels.N_.value]}
            if self.is_spectral
            else {kernels.PARTIAL_SQUARES: 2}
            for row in self._rows
        ]
        places: list[tuple[int, Any, int]] = []
        self._num_grams = end = 0
        # All Gram matrices first: an all-reduce has them alone, or the products alone.
        for field in (kernels.GRAM_Y, kernels.PRODUCTS, kernels.PARTIAL_SQUARES):
            for number, own in enumerate(sizes):
                if field in own:
                    places.append((number, field, end))
                    end += own[field]
            self._num_grams = self._num_grams or end
        self._all = torch.zeros(end, dtype=torch.float32, device=self.device)
        totals = [list(row) for row in self._rows]
        for number, field, start in places:
            totals[number][field.value] = self._all.data_ptr() + 4 * start
        for row in totals:
            row[kernels.NUM_I.value] = row[kernels.NUM_TILES.value] = 1
            row[kernels.NUM_CHUNKS.value] = 1
        return _to_device(totals, torch.int64, self.device)

    def take(self, num_iterations: int | None, skip: Tensor | None) -> None:
        """Take the step, each matrix in as many iterations as it needs, and in `num_iterations` at most.

        Where `skip`, one number for each weight or for all, is positive, nothing of a weight changes.
        """
        off = self._never
        if skip is not None:
            off = skip.to(self.device, torch.float32, non_blocking=True).expand(len(self.weights)).contiguous()
        # Triton launches on the current device.
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            if num_iterations not in self._prepared:
                self._prepared[num_iterations] = [
                    _prepare(*launch) if isinstance(launch, Launch) else launch.take
                    for launch in self.launches(num_iterations)
                ]
            for launch in self._prepared[num_iterations]:
                launch(off)
        torch.autograd.graph.increment_version([local(weight.parameter) for weight in self.weights])

    def launches(self, num_iterations: int | None) -> Iterator["Launch | AllReduce"]:
        """The launches of a step, in order."""
        typed: dict[str, Any] = {"DTYPE": self.dtype, "VECTOR": self.vector}
        on_weight = self.tiles["weight"]
        if not self.is_spectral:
            yield Launch(kernels.squares, len(on_weight), (self.table, on_weight), typed)
            if self.sums:
                is_first = all(dist.get_rank(group) == 0 for group in self.sums)
                yield Launch(kernels.sum_squares, self.num_matrices, (self.table, self.totals), {"IS_FIRST": is_first})
                yield AllReduce(self._all, self.sums)
            yield Launch(kernels.rescale, len(on_weight), (self.totals, on_weight, SKIP), typed)
            return
        assert num_iterations is not None
        rows, columns, chunks = self.tiles["rows"], self.tiles["columns"], self.tiles["chunks"]
        products = typed | {"TILE": TILE, "DEPTH": DEPTH, "num_warps": 4, "num_stages": 4}
        both = (len(rows) + len(columns), (self.table, rows, columns, len(rows)))
        norm = self.weights[0].scaling.constraint.norm
        assert isinstance(norm, SpectralNormBySolver)
        assert isinstance(norm.solver, Block)
        yield Launch(kernels.images, *both, products)
        for number in range(num_iterations):
            first = {"FIRST": number == 0}
            is_last = number == num_iterations - 1
            if len(chunks):
                yield Launch(kernels.products, len(chunks), (self.table, chunks), products | first | {"CHUNK": CHUNK})
            if self.sums:
                tables = (self.table, self.totals)
                yield Launch(kernels.sum_products, len(columns), (*tables, columns), first | {"TILE": TILE})
                yield AllReduce(self._all if number == 0 else self._all[self._num_grams :], self.sums)
            yield Launch(kernels.residuals, len(columns), (self.totals, columns), first | {"TILE": TILE})
            yield Launch(kernels.orthogonalize, self.num_matrices, (self.table,), first)
            yield Launch(kernels.images_of_rest, len(rows), (self.table, rows), products | first)
            if self.sums:
                yield Launch(kernels.sum_grams, self.num_matrices, (self.table, self.totals), first)
                yield AllReduce(self._all[: self._num_grams], self.sums)
            args = (self.totals, SKIP, norm.solver.tolerance)
            constants = first | {"LAST": is_last, "MAP": self.map}
            yield Launch(kernels.rayleigh_ritz, self.num_matrices, args, constants)
            if not is_last:
                yield Launch(kernels.combine, *both, {"TILE": TILE})
        both = (len(on_weight) + len(columns), (self.table, on_weight, columns, len(on_weight)))
        yield Launch(kernels.update, *both, typed | {"TILE": TILE, "MAP": self.map})


SKIP: Any = object()
"""In place of the argument that is another tensor at every step."""


class Launch(NamedTuple):
    """A launch of a kernel."""

    kernel: Any
    num_programs: int
    args: tuple[Any, ...]
    constants: dict[str, Any]
    """Arguments that are compiled in, and options of the compiler."""


class AllReduce(NamedTuple):
    """A sum over processes, in place."""

    tensor: Tensor
    groups: Groups

    def take(self, _: Tensor) -> None:
        for group in self.groups:
            dist.all_reduce(self.tensor, group=group)


OPTIONS = {"enable_fp_fusion": True}
"""Options of the compiler for every kernel: Triton's own default is a global switch, and changes with its version."""


def _prepare(
    kernel: Any, num_programs: int, args: tuple[Any, ...], constants: dict[str, Any]
) -> Callable[[Tensor], None]:
    """The launch, compiled, for any `skip`: Triton's own way to it takes the host several times as long."""
    grid = (num_programs, 1, 1)
    types = (torch.float32 if arg is SKIP else arg for arg in args)
    compiled = kernel.warmup(*types, grid=grid, **constants, **OPTIONS)
    run = compiled[grid]
    args = (*args, *(constants[name] for name in kernel.arg_names[len(args) :]))
    return lambda skip: run(*(skip if arg is SKIP else arg for arg in args))


def try_to_launch(device: torch.device) -> None:
    """Compile a kernel and load it onto the device, without running it; raises where that does not work."""
    with torch.cuda.device(device):
        tensors = tuple(torch.zeros(1, dtype=dtype, device=device) for dtype in (torch.int64, torch.int32))
        _prepare(kernels.squares, 0, tensors, {"DTYPE": tl.float32, "VECTOR": 4})(SKIP)


def _to_device(values: list[list[int]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A copy that the host does not wait for."""
    tensor = torch.tensor(values, dtype=dtype, device="cpu")
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _mode(pointer: int, m: int, n: int, along_i: Axis, along_j: Axis, vector: int) -> int:
    """How the matrix's tiles can be read: 16 bytes at a time only where address, size and stride are multiples."""
    if pointer % 16 == 0:
        is_even = along_i.length == m and along_j.length == n
        if is_even and along_j.inner == 1 and n % vector == along_i.inner % vector == 0:
            return int(kernels.COLUMNS_CONTIGUOUS.value)
        if is_even and along_i.inner == 1 and m % vector == along_j.inner % vector == 0:
            return int(kernels.ROWS_CONTIGUOUS.value)
    return int(kernels.STRIDED.value)
