"""How a weight tensor is read as a batch of matrices, and how matrices are written into it."""

import math
from dataclasses import dataclass
from functools import cached_property

from einops import rearrange
from torch import Tensor


@dataclass(frozen=True)
class MatrixView:
    """A weight tensor read as a batch of `count` matrices, one row per output.

    `axes` names the tensor's axes in einops' notation: `o` is the outputs (fan-out), `i` the input channels, and `k`,
    if it is there, counts the matrices. All axes but `k` and `o`, flattened, are the columns (fan-in); `"channels"`
    gains are taken from `o` and `i`.

    >>> MatrixView("o i")                      # a linear layer: one matrix (o, i)
    >>> MatrixView("(k o) i", count=3)         # a fused qkv: three matrices
    >>> MatrixView("(k o) i h w", count=2)     # a convolution in two groups: two matrices (o, i h w)
    >>> MatrixView("i o h w")                  # a transposed convolution: outputs are the second axis
    >>> MatrixView("k i o", count=8)           # eight experts, stacked and transposed
    >>> MatrixView("(k o) i", count=512)       # a linear layer of 512 outputs, each row a matrix of its own

    Raises:
        TypeError: `axes` is no string, or `count` no integer.
        ValueError: `axes` does not name each axis once, or has no `o`; `count` is less than 1, or more than 1 where
            `axes` has no `k`.
    """

    axes: str
    count: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.axes, str) or not isinstance(self.count, int):
            raise TypeError(f"{self}: axes must be a string, as in 'o i', and count a number of matrices")
        names = self._names
        if len(set(names)) < len(names) or not all(map(str.isidentifier, names)) or not _is_balanced(self.axes):
            raise ValueError(f"{self}: axes must name each axis once, as in 'o i' or '(k o) i h w'")
        if "o" not in self._names:
            raise ValueError(f"{self}: axes must name the outputs o, as in 'o i' or '(k o) i h w'")
        if self.count < 1 or (self.count > 1 and "k" not in self._names):
            raise ValueError(f"{self}: count must be 1, or axes must say by k where the matrices are, as in '(k o) i'")

    @cached_property
    def _names(self) -> list[str]:
        return self.axes.replace("(", " ").replace(")", " ").split()

    def _read(self, tensor: Tensor, columns: str) -> Tensor:
        """The tensor as `k o` and the columns, which the pattern `columns` may merge."""
        lengths = {"k": self.count} if "k" in self._names else {}
        names = " ".join(name for name in self._names if name not in ("k", "o"))
        return rearrange(tensor, f"{self.axes} -> {'k' if lengths else '1'} o {columns.format(names)}", **lengths)

    def split(self, weight: Tensor) -> Tensor:
        """The tensor as `(k, o, i, ...)`, a view in every memory format: writing to it writes the weight.

        Splitting and permuting axes never copies; merging them, as `matrices` does, may.
        """
        return self._read(weight, "{}")

    def matrices(self, weight: Tensor) -> Tensor:
        """The batch of matrices `(k, m, n)`, for reading only: a copy where the strides allow no view."""
        return self._read(weight, "({})")

    def matrix_shape(self, weight: Tensor) -> tuple[int, int]:
        """`(m, n)` of one matrix."""
        _, m, *columns = self.split(weight).shape
        return m, math.prod(columns)

    def write_(self, weight: Tensor, matrices: Tensor) -> None:
        """Write a batch of matrices `(k, m, n)` into the tensor."""
        split = self.split(weight)
        split.copy_(matrices.reshape(split.shape))

    def channels(self, weight: Tensor) -> tuple[int, int]:
        """`(d_out, d_in)` of one matrix: the lengths of `o` and `i`, or all columns where no axis is called `i`."""
        _, d_out, *columns = self.split(weight).shape
        names = [name for name in self._names if name not in ("k", "o")]
        return d_out, columns[names.index("i")] if "i" in names else math.prod(columns)


def _is_balanced(axes: str) -> bool:
    """Whether every parenthesis is closed before the next one opens."""
    found = "".join(sign for sign in axes if sign in "()")
    return found == "()" * (len(found) // 2)
