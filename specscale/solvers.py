"""What a solver of first singular triples is, and the two plain ones: power iteration and the exact SVD.

Pure functions of tensors. What a solver carries from one step to the next is a dictionary of tensors, its state, which
the caller stores, floating-point throughout, so that whatever averages or casts a model's buffers can do so to these.
Random numbers are a function of an age in that state: equal states give equal results on every rank and after every
resume.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from specscale.linalg import product, scaled_to_one, unit
from specscale.random import keys, normal
from specscale.shards import Groups, Index

State = Mapping[str, Tensor]


class Matrices(Protocol):
    """Matrices `A (k, m, n)`, float32 or wider, as a solver reads them: dense ones, or shards.

    `Block` reads a large matrix through the two products alone. Of a sharded one (`specscale.shards`), the products are
    this process's parts of sums over processes, and `m` counts its own rows there.
    """

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the whole matrices."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def mT(self) -> "Matrices":
        """The transposed matrices."""

    @property
    def block_on_rows(self) -> bool:
        """Whether a block of vectors lies on the rows, and not on the columns."""

    @property
    def scale(self) -> Tensor | None:
        """`(k,)`: about the norm of each matrix, where that is known before any product."""

    @property
    def sums(self) -> Groups:
        """The processes over which `A^T Y` and Gram matrices of images are summed."""

    @property
    def image_sums(self) -> Groups:
        """The processes over which `A X` is summed."""

    def matmat(self, columns: Tensor) -> Tensor:
        """`A X` for `X (k, n, b)`."""

    def rmatmat(self, columns: Tensor) -> Tensor:
        """`A^T Y` for `Y (k, m, b)`."""

    def once(self, numbers: Tensor) -> Tensor:
        """What is computed of images, as this process contributes it to `sums`."""

    def dense(self) -> Tensor:
        """`A` itself, `(k, m, n)`, where its columns are whole in every process."""


@dataclass(frozen=True)
class DenseMatrices:
    """Matrices that are a tensor `(k, m, n)`."""

    tensor: Tensor
    scale: None = None
    sums: Groups = ()
    image_sums: Groups = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        k, m, n = self.tensor.shape
        return k, m, n

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def mT(self) -> "DenseMatrices":
        return DenseMatrices(self.tensor.mT)

    @property
    def block_on_rows(self) -> bool:
        return self.tensor.shape[1] < self.tensor.shape[2]

    def matmat(self, columns: Tensor) -> Tensor:
        return product(self.tensor, columns)

    def rmatmat(self, columns: Tensor) -> Tensor:
        return product(self.tensor.mT, columns)

    def once(self, numbers: Tensor) -> Tensor:
        return numbers

    def dense(self) -> Tensor:
        return self.tensor


class Subspace(NamedTuple):
    """What a solver knows of matrices `W (k, m, n)` on `b` directions near the first singular vectors."""

    left: Tensor
    """`(k, m, b)`: `W V / scale`."""
    right: Tensor
    """`(k, n, b)`: `V`, with orthonormal columns."""
    squares: Tensor
    """`(k, b, b)`: `left^T left`."""
    scale: Tensor
    """`(k,)`: what keeps `left` within the range of its dtype."""
    rest: Tensor
    """`(k,)`: an estimate of `||W (1 - V V^T)|| / scale`, the largest value outside; zero where `V` has all."""
    coupling: Tensor
    """`(k, b, b)`: an estimate of `R^T R`, `R = (1 - V V^T) W^T left / scale`; zero where `V` are singular vectors."""

    def transposed(self) -> "Subspace":
        return self._replace(left=self.right, right=self.left)

    def part(self, matrices: Index, rows: Index, columns: Index) -> "Subspace":
        """What is known of some rows and columns of some of the matrices."""
        left, right = self.left[matrices][:, rows], self.right[matrices][:, columns]
        return Subspace(left, right, *(one[matrices] for one in self[2:]))


class Triple(NamedTuple):
    """The first singular triple of each matrix `(k, m, n)`, and how well it is known."""

    value: Tensor
    """`(k,)`: the largest singular value `s`."""
    left: Tensor
    """`(k, m)`: its left singular vector `u`, of unit length (zero where the matrix is zero)."""
    right: Tensor
    """`(k, n)`: its right singular vector `v`, of unit length."""
    next_value: Tensor
    """`(k,)`: the second singular value; an iterating solver estimates it from below."""
    residual: Tensor
    """`(k,)`: `||W^T u - s v|| / s` of the triple that the last iteration started from, and improved on, less the part
    that lies within the block. Zero where the solver is exact."""
    error: Tensor
    """`(k,)`: the solver's own estimate of how far, relative, `value` is too low. Zero where the solver is exact."""
    num_iterations: Tensor
    """`(k,)`, in the dtype of the values: the iterations until the error was small enough, or all that were taken. Zero
    where the solver is exact."""
    subspace: Subspace | None
    """None where the solver was not asked for it: see `Block.keeps_subspace`."""

    def transposed(self) -> "Triple":
        """The triple of the transposed matrices."""
        subspace = None if self.subspace is None else self.subspace.transposed()
        return self._replace(left=self.right, right=self.left, subspace=subspace)

    def part(self, matrices: Index, rows: Index, columns: Index) -> "Triple":
        """What is known of some rows and columns of some of the matrices."""
        return Triple(
            value=self.value[matrices],
            left=self.left[matrices][:, rows],
            right=self.right[matrices][:, columns],
            next_value=self.next_value[matrices],
            residual=self.residual[matrices],
            error=self.error[matrices],
            num_iterations=self.num_iterations[matrices],
            subspace=None if self.subspace is None else self.subspace.part(matrices, rows, columns),
        )

    def with_left(self, change: Callable[[Tensor], Tensor]) -> "Triple":
        """With other left vectors."""
        subspace = None if self.subspace is None else self.subspace._replace(left=change(self.subspace.left))
        return self._replace(left=change(self.left), subspace=subspace)


class Solution(NamedTuple):
    """What a solver finds in a batch of matrices."""

    triple: Triple
    state: dict[str, Tensor]
    """The state to continue from."""

    def transposed(self) -> "Solution":
        """The solution of the transposed matrices; a state lies on the shorter side, whichever that is."""
        return self._replace(triple=self.triple.transposed())


class Solver(Protocol):
    """A solver makes an initial state for matrices of a shape, and improves on a state step by step."""

    reads_shards: ClassVar[bool]
    """Whether it solves matrices of which each process holds a part."""

    def init_state(
        self, key: Tensor, shape: tuple[int, int], dtype: torch.dtype, side: int | None = None
    ) -> dict[str, Tensor]:
        """The state before the first solve, for matrices `(k, *shape)` of a dtype, float32 or wider, on `key`'s device.

        `key (k,)`, int64, seeds each matrix's random numbers. `side` is the length of the side that a block lies on,
        where that is not the shorter one.
        """

    def solve(
        self,
        matrices: Sequence[Matrices],
        states: Sequence[State],
        *,
        to_convergence: bool = False,
        num_iterations: int | None = None,
    ) -> list[Solution]:
        """The triples of each batch of `matrices (k_i, m_i, n_i)`, all of one dtype and device, and the states after.

        `Block` decides on the host when to stop; with `num_iterations` it takes exactly so many and reads nothing back.
        `to_convergence` iterates until float32's rounding allows no progress, for the first solve. The other solvers
        take neither.
        """

    def scratch_elements(self, m: int, n: int) -> int:
        """How many elements a solve of one matrix `(m, n)` allocates beside it, in the matrix's dtype."""

    def next_num_iterations(self, num_iterations: int | None, error: float | None) -> int | None:
        """The `num_iterations` of the next solve, after one that needed so many and left `error` (None at the first).

        None where the solver takes no such number.
        """


class _BatchByBatch(ABC):
    """A solver that solves one batch of matrices after another, always in the same number of iterations."""

    reads_shards: ClassVar[bool] = False

    def solve(
        self,
        matrices: Sequence[Matrices],
        states: Sequence[State],
        *,
        to_convergence: bool = False,
        num_iterations: int | None = None,
    ) -> list[Solution]:
        return [self._solve(one, state) for one, state in zip(matrices, states, strict=True)]

    @abstractmethod
    def _solve(self, matrices: Matrices, state: State) -> Solution:
        """The triples of `matrices (k, m, n)`, and the state after."""

    def next_num_iterations(self, num_iterations: int | None, error: float | None) -> int | None:
        return None


@dataclass(frozen=True)
class Power(_BatchByBatch):
    """Power iteration on `W^T W` from fresh noise at every step, as in the Norm Scaling post: the reference, and slow.

    It runs on the matrix's shorter side. A second column, kept orthogonal to the first and without influence on it,
    estimates the next singular value.
    """

    num_iterations: int = 500
    """Iterations of one step."""
    warm: bool = False
    """Continue from the last step's vectors, not from noise. One iteration a step is what `spectral_norm` does."""

    def __post_init__(self) -> None:
        if self.num_iterations < 1:
            raise ValueError(f"{self}: num_iterations must be at least 1")

    def init_state(
        self, key: Tensor, shape: tuple[int, int], dtype: torch.dtype, side: int | None = None
    ) -> dict[str, Tensor]:
        if self.warm:
            return {"columns": normal(key, (min(shape), 2), dtype)}
        return {"age": torch.zeros(len(key), dtype=dtype, device=key.device)}

    def scratch_elements(self, m: int, n: int) -> int:
        return m * n + n * n

    def _solve(self, matrices: Matrices, state: State) -> Solution:
        _, m, n = matrices.shape
        scaled, scale = scaled_to_one((matrices if m >= n else matrices.mT).dense())
        # The Gram matrix costs as much arithmetic as n / 2 iterations, but in one product, which runs far faster.
        use_gram = self.num_iterations > scaled.shape[-1] // 20
        square = product(scaled.mT, scaled) if use_gram else None
        size = (scaled.shape[-1], 2)
        start = state["columns"].to(scaled.dtype) if self.warm else normal(keys(state["age"]), size, scaled.dtype)
        columns = start
        for _ in range(self.num_iterations):
            vector = unit(columns[..., 0])
            columns = product(scaled.mT, product(scaled, columns)) if square is None else product(square, columns)
            value = (vector * columns[..., 0]).sum(-1)
            residual = (columns[..., 0] - value[..., None] * vector).norm(dim=-1) / value.clamp_min(
                torch.finfo(value.dtype).tiny
            )
            first = unit(columns[..., :1], dim=-2)
            second = columns[..., 1:]
            # Twice: with a matrix of rank one, what the first pass leaves is rounding, and not orthogonal.
            for _ in range(2):
                second = unit(second - first * product(first.mT, second), dim=-2)
            columns = torch.cat([first, second], dim=-1)
        image = product(scaled, columns)
        values = image.norm(dim=-2) * scale[..., None]
        # Half of it bounds the distance from some singular value, though it need not be the first.
        error = residual / 2
        count = torch.full_like(error, self.num_iterations)
        subspace = Subspace(
            image,
            columns,
            product(image.mT, image),
            scale,
            rest=image[..., 1].norm(dim=-1),
            coupling=torch.diag_embed((residual[:, None] * image.square().sum(-2)).square()),
        )
        triple = Triple(
            values[..., 0], unit(image[..., 0]), columns[..., 0], values[..., 1], residual, error, count, subspace
        )
        # Keep the old vectors if the matrix is zero: its product with them is zero too.
        kept = torch.where(values[:, None] > 0, columns, start)
        state = {"columns": kept} if self.warm else {"age": state["age"] + 1}
        solution = Solution(triple, state)
        return solution if m >= n else solution.transposed()


@dataclass(frozen=True)
class SVD(_BatchByBatch):
    """The exact singular value decomposition of every matrix: for checks, and for small models."""

    def init_state(
        self, key: Tensor, shape: tuple[int, int], dtype: torch.dtype, side: int | None = None
    ) -> dict[str, Tensor]:
        return {}

    def scratch_elements(self, m: int, n: int) -> int:
        return 2 * m * n + min(m, n) ** 2

    def _solve(self, matrices: Matrices, state: State) -> Solution:
        scaled, scale = scaled_to_one(matrices.dense())
        left, values, right = torch.linalg.svd(scaled, full_matrices=False)
        values = values * scale[..., None]
        next_value = values[..., 1] if values.shape[-1] > 1 else torch.zeros_like(values[..., 0])
        # The vectors of equal singular values are off by rounding, one part in 1e7; the first value is not.
        zero = torch.zeros_like(next_value)
        images = left * (values / torch.where(scale > 0, scale, 1)[..., None])[..., None, :]
        squares = product(images.mT, images)
        subspace = Subspace(images, right.mT, squares, scale, zero, torch.zeros_like(squares))
        triple = Triple(values[..., 0], left[..., 0], right[..., 0, :], next_value, zero, zero, zero, subspace)
        return Solution(triple, {})
