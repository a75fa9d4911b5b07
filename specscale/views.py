"""How a weight tensor is read as a batch of matrices, and how matrices are written into it."""

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from einops import EinopsError, rearrange
from torch import Tensor


class SplitWeight:
    """A weight as its matrices without a copy: `tensor` is a view, and writing to it writes the weight.

    The axes of `tensor` count the matrices, then the rows, then the columns; there may be several for each, since
    merging axes may copy. The other methods bring numbers into shapes that broadcast against it.
    """

    def __init__(self, tensor: Tensor, num_matrix_axes: int = 1, num_row_axes: int = 1) -> None:
        self.tensor = tensor
        self.num_matrix_axes = num_matrix_axes
        self.num_row_axes = num_row_axes

    @property
    def axes(self) -> tuple[range, range, range]:
        """The axes of the tensor that count the matrices, the rows and the columns."""
        rows = self.num_matrix_axes + self.num_row_axes
        return range(self.num_matrix_axes), range(self.num_matrix_axes, rows), range(rows, self.tensor.ndim)

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(k, m, n)`: the number of matrices, and the rows and columns of each."""
        sizes = self.tensor.shape
        start, end = self.num_matrix_axes, self.num_matrix_axes + self.num_row_axes
        return math.prod(sizes[:start]), math.prod(sizes[start:end]), math.prod(sizes[end:])

    def __len__(self) -> int:
        return self.shape[0]

    def matrices(self) -> Tensor:
        """The matrices `(k, m, n)`: a copy where the strides allow no view."""
        return self.tensor.reshape(self.shape)

    def per_matrix(self, numbers: Tensor) -> Tensor:
        """A number for each matrix `(k,)`, to be broadcast against `tensor`."""
        return numbers.reshape(self._sizes(True, False, False))

    def per_row(self, numbers: Tensor) -> Tensor:
        """A number for each row of each matrix `(k, m)`, to be broadcast against `tensor`."""
        return numbers.reshape(self._sizes(True, True, False))

    def per_column(self, numbers: Tensor) -> Tensor:
        """A number for each column of each matrix `(k, n)`, to be broadcast against `tensor`."""
        return numbers.reshape(self._sizes(True, False, True))

    def per_element(self, matrices: Tensor) -> Tensor:
        """Matrices `(k, m, n)` in the shape of `tensor`."""
        return matrices.reshape(self.tensor.shape)

    def _sizes(self, *along: bool) -> list[int]:
        """The shape of `tensor`, with 1 for the axes that count matrices, rows or columns, where that is false."""
        sizes = self.tensor.shape
        return [sizes[axis] if own else 1 for axes, own in zip(self.axes, along, strict=True) for axis in axes]


@dataclass(frozen=True, repr=False)
class MatrixView:
    """A weight tensor read as a batch of `count` matrices, one row per output.

    `axes` names the tensor's axes in einops' notation: `o` is the outputs (fan-out), `i` the input channels, and `k`,
    if it is there, counts the matrices. All axes but `k` and `o`, flattened, are the columns (fan-in); `"channels"`
    gains are taken from `o` and `i`. Where matrices or outputs are counted by several axes, these are called `k1`,
    `k2`, ... or `o1`, `o2`, ..., the outermost first. `lengths` gives those that the tensor's shape and `count` leave
    open.

    Examples:
        >>> MatrixView("o i")  # a linear layer: one matrix (o, i)
        >>> MatrixView("(k o) i", count=3)  # a fused qkv: three matrices
        >>> MatrixView("(k o) i h w", count=2)  # a convolution in two groups
        >>> MatrixView("i o h w")  # a transposed convolution: outputs are second
        >>> MatrixView("k i o", count=8)  # eight experts, stacked and transposed
        >>> MatrixView("(k o) i", count=512)  # each of 512 rows a matrix

        A fused qkv in which each of twelve heads has its q, k and v:

        >>> MatrixView("(o1 k o2) i", count=3, lengths={"o1": 12})

    Raises:
        TypeError: `axes` is no string, `count` no integer, or `lengths` no mapping from names to integers.
        ValueError: `axes` does not name each axis once, or has no `o`; `count` is less than 1, or more than 1 where
            `axes` has no `k`; `lengths` has another name, a number less than 1, too few numbers, or those of `k` do not
            go with `count`.
    """

    axes: str
    count: int = 1
    lengths: Mapping[str, int] | tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.axes, str) or not isinstance(self.count, int):
            raise TypeError(f"{self}: axes must be a string, as in 'o i', and count a number of matrices")
        try:
            lengths = dict(self.lengths)
        except (TypeError, ValueError):
            lengths = {"": None}  # type: ignore[dict-item]
        if not all(isinstance(name, str) and isinstance(length, int) for name, length in lengths.items()):
            raise TypeError(f"{self}: lengths must map names of axes to numbers, as in {{'o1': 12}}")
        object.__setattr__(self, "lengths", tuple(sorted(lengths.items())))
        names = self._names
        if len(set(names)) < len(names) or not all(map(str.isidentifier, names)) or not _is_balanced(self.axes):
            raise ValueError(f"{self}: axes must name each axis once, as in 'o i' or '(k o) i h w'")
        if not self.row_names:
            raise ValueError(f"{self}: axes must name the outputs o, as in 'o i' or '(k o) i h w'")
        if self.count < 1 or (self.count > 1 and not self.batch_names):
            raise ValueError(f"{self}: count must be 1, or axes must say by k where the matrices are, as in '(k o) i'")
        if not set(lengths) <= set(names) or any(length < 1 for length in lengths.values()):
            raise ValueError(f"{self}: lengths must be 1 or more, of axes that are named in axes")
        given = math.prod(lengths[name] for name in self.batch_names if name in lengths)
        num_open = sum(name not in lengths for name in self.batch_names)
        if self.batch_names and (self.count % given or (num_open == 0 and given != self.count)):
            raise ValueError(f"{self}: the lengths of {', '.join(self.batch_names)} must multiply to count")
        known = set(lengths) | (set(self.batch_names) if num_open == 1 else set())
        for group in self.groups:
            if len(open_names := [name for name in group if name not in known]) > 1:
                raise ValueError(f"{self}: lengths must say how long all but one of {', '.join(open_names)} are")
        if num_open > 1:
            raise ValueError(f"{self}: lengths must say how long all but one of {', '.join(self.batch_names)} are")

    def __repr__(self) -> str:
        lengths = f", lengths={self.lengths}" if self.lengths else ""
        return f"MatrixView(axes={self.axes!r}, count={self.count!r}{lengths})"

    @cached_property
    def _names(self) -> list[str]:
        return self.axes.replace("(", " ").replace(")", " ").split()

    @cached_property
    def groups(self) -> list[list[str]]:
        """The names of each axis of the tensor."""
        return [part.strip("()").split() for part in re.findall(r"\([^()]*\)|[^\s()]+", self.axes)]

    @cached_property
    def batch_names(self) -> list[str]:
        """The names of the axes that count the matrices."""
        return [name for name in self._names if re.fullmatch(r"k\d*", name)]

    @cached_property
    def row_names(self) -> list[str]:
        """The names of the axes that are the rows."""
        return [name for name in self._names if re.fullmatch(r"o\d*", name)]

    @cached_property
    def column_names(self) -> list[str]:
        """The names of the axes that are the columns."""
        return [name for name in self._names if name not in (*self.batch_names, *self.row_names)]

    @cached_property
    def _pattern(self) -> str:
        return f"{self.axes} -> {' '.join([*(self.batch_names or ['1']), *self.row_names, *self.column_names])}"

    @cached_property
    def _known(self) -> dict[str, int]:
        """The lengths that are given, and the one of the matrices' axes that `count` gives."""
        lengths = dict(self.lengths)
        for name in self.batch_names:
            if name not in lengths:
                lengths[name] = self.count // math.prod(lengths[own] for own in self.batch_names if own in lengths)
        return lengths

    def split(self, weight: Tensor, lengths: Mapping[str, int] | None = None) -> SplitWeight:
        """The weight as its matrices, a view in every memory format: writing to it writes the weight.

        Splitting and permuting axes never copies; merging them, as `matrices` does, may. For a part of a weight,
        `lengths` gives those of its axes.
        """
        tensor = rearrange(weight, self._pattern, **(self._known if lengths is None else lengths))
        return SplitWeight(tensor, len(self.batch_names) or 1, len(self.row_names))

    def matrices(self, weight: Tensor) -> Tensor:
        """The batch of matrices `(k, m, n)`, for reading only: a copy where the strides allow no view."""
        return self.split(weight).matrices()

    def matrix_shape(self, weight: Tensor) -> tuple[int, int]:
        """`(m, n)` of one matrix."""
        sizes = self.sizes(weight)
        # Lists, since torch's compiler traces no product of a generator.
        return math.prod([sizes[name] for name in self.row_names]), math.prod(
            [sizes[name] for name in self.column_names]
        )

    def write_(self, weight: Tensor, matrices: Tensor) -> None:
        """Write a batch of matrices `(k, m, n)` into the tensor."""
        split = self.split(weight)
        split.tensor.copy_(split.per_element(matrices))

    def channels(self, weight: Tensor) -> tuple[int, int]:
        """`(d_out, d_in)` of one matrix: the lengths of `o` and `i`, or all columns where no axis is called `i`."""
        d_out, n = self.matrix_shape(weight)
        return d_out, self.sizes(weight)["i"] if "i" in self._names else n

    def each_row(self, weight: Tensor) -> "MatrixView":
        """The weight with each row of each matrix as a matrix of its own, in the order of the weight's axes."""
        return self._each(self.row_names, weight)

    def each_column(self, weight: Tensor) -> "MatrixView":
        """The weight with each input of each matrix as a matrix of its own, in the order of the weight's axes.

        An input of a convolution is an input channel, with the kernels that all outputs have for it. Where no axis is
        called `i`, every column is an input.
        """
        return self._each(["i"] if "i" in self._names else self.column_names, weight)

    def _each(self, names: list[str], weight: Tensor) -> "MatrixView":
        """The view whose matrices are those of each index along the axes of these names."""
        sizes = self.sizes(weight)
        fresh = (f"k{number}" for number in itertools.count(1) if f"k{number}" not in self._names)
        # An axis keeps its name, at length 1, inside of a new axis that counts the matrices along it.
        new = {name: next(fresh) for name in names}
        lengths = {name: sizes[name] for name in self.batch_names} | {new[name]: sizes[name] for name in names}
        axes = []
        for group in self.groups:
            parts = [part for name in group for part in ([new[name], name] if name in new else [name])]
            axes.append(f"({' '.join(parts)})" if len(parts) > 1 else parts[0])
            if len(parts) > 1:
                lengths |= {name: 1 if name in new else sizes[name] for name in group}
        return MatrixView(" ".join(axes), self.count * math.prod(sizes[name] for name in names), lengths)

    @property
    def has_kernel(self) -> bool:
        """Whether the columns have more axes than the input channels, as those of a convolution have its kernel's."""
        return len(self.column_names) > 1

    def sizes(self, weight: Tensor) -> dict[str, int]:
        """The length of each axis, by name: from the tensor's shape alone, of which a process may hold a shard.

        Raises:
            EinopsError: the shape does not fit.
        """
        if len(self.groups) != weight.ndim:
            raise EinopsError(f"{self} names {len(self.groups)} axes, and the tensor has {weight.ndim}")
        sizes = dict(self._known)
        for group, length in zip(self.groups, weight.shape, strict=True):
            given = math.prod([sizes[name] for name in group if name in sizes])
            open_names = [name for name in group if name not in sizes]
            if length % given or (not open_names and length != given):
                raise EinopsError(f"{self} does not fit the shape {tuple(weight.shape)}")
            sizes |= dict.fromkeys(open_names, length // given)
        return sizes


def _is_balanced(axes: str) -> bool:
    """Whether every parenthesis is closed before the next one opens."""
    found = "".join(sign for sign in axes if sign in "()")
    return found == "()" * (len(found) // 2)
