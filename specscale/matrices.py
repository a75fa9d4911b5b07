"""How a weight tensor is read as matrices, and how factors of those matrices find their way back."""

import math
from dataclasses import dataclass

from einops import rearrange
from torch import Tensor


@dataclass(frozen=True)
class MatrixView:
    """A weight tensor read as a batch of `count` matrices, one row per output.

    `axes` names the tensor's axes in einops' notation: `k` counts the matrices, `o` is the outputs, `i` the inputs,
    and all axes but `k` and `o` together are the columns.

    >>> MatrixView("(k o) i")                  # a linear layer: one matrix (o, i)
    >>> MatrixView("(k o) i", count=3)         # a fused qkv: three matrices
    >>> MatrixView("(k o) i h w", count=2)     # a convolution in two groups: two matrices (o, i h w)
    >>> MatrixView("(k i) o h w")              # a transposed convolution: outputs are the second axis
    """

    axes: str
    count: int = 1

    @property
    def _columns(self) -> str:
        names = self.axes.replace("(", " ").replace(")", " ").split()
        return " ".join(name for name in names if name not in ("k", "o"))

    def split(self, weight: Tensor) -> Tensor:
        """The tensor as `(k, o, i, ...)`, always a view, whatever the memory format: writing to it writes the weight.

        Only splitting and permuting axes never copies; merging them (`matrices`) may.
        """
        return rearrange(weight, f"{self.axes} -> k o {self._columns}", k=self.count)

    def matrices(self, weight: Tensor) -> Tensor:
        """The batch of matrices `(k, m, n)`: for reading only, since it is a copy where the strides allow no view."""
        return rearrange(weight, f"{self.axes} -> k o ({self._columns})", k=self.count)

    def matrix_shape(self, weight: Tensor) -> tuple[int, int]:
        """`(m, n)` of one matrix."""
        _, m, *columns = self.split(weight).shape
        return m, math.prod(columns)

    def write_(self, weight: Tensor, matrices: Tensor) -> None:
        """Write a batch of matrices `(k, m, n)` into the tensor."""
        split = self.split(weight)
        split.copy_(matrices.reshape(split.shape))

    def channels(self, weight: Tensor) -> tuple[int, int]:
        """`(d_out, d_in)` of one matrix: its output and input channels, without the kernel's extent."""
        shape = self.split(weight).shape
        return shape[1], shape[2]
