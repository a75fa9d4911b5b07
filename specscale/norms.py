"""The norms of a weight's matrices: how each is measured, with what a constraint needs beside it.

Pure functions of tensors that write nothing, so that a step can read every weight before it writes the first one.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from specscale.bounds import Bounds, frobenius_bounds, spectral_bounds
from specscale.linalg import concat, scaled_to_one, smaller_gram, widest_dtype
from specscale.shards import Groups, ShardedMatrices, summed
from specscale.solvers import DenseMatrices, Solver, State


class Measurement(NamedTuple):
    """What a `Norm` finds in weights of `k_i` matrices each, `k` in all."""

    norm: Tensor
    """`(k,)`: the norm of each matrix; NaN or infinite where the matrix is."""
    residual: Tensor
    """`(k,)`: the solver's residual; zero where the norm is exact."""
    error: Tensor
    """`(k,)`: the solver's own estimate of the relative error of `norm`; zero where it is exact."""
    num_iterations: Tensor
    """`(k,)`: the solver's iterations, see `Triple`; zero where there are none."""
    factors: list[Any]
    """What a constraint needs beside the norm, by weight: see each norm."""
    states: list[dict[str, Tensor]]
    """The solver's state to continue from, by weight."""


def _exactly(norm: Tensor, factors: list[Any]) -> Measurement:
    """A measurement without a solver."""
    zero = torch.zeros_like(norm)
    return Measurement(norm, zero, zero, zero, factors, [{} for _ in factors])


class Norm(ABC):
    """A norm, and how it is measured. The defaults are those of a norm that needs no solver."""

    name: ClassVar[str]
    """Which norm it is: constraints on norms of one name have comparable targets."""

    @classmethod
    def with_solver(cls, solver: Solver) -> Self:
        return cls()

    @property
    def reads_shards(self) -> bool:
        """Whether it measures matrices of which each process holds a part."""
        return False

    def scratch_elements(self, m: int, n: int) -> int:
        """Elements that a measurement of one matrix `(m, n)` keeps beside it until all are measured."""
        return 0

    def operations(self, m: int, n: int) -> int:
        """About how many operations a measurement of one matrix `(m, n)` takes; 0 where it is not worth sharing.

        What measures at any cost must also measure no matrices, `(0, m, n)`: see `specscale.sharing`.
        """
        return 0

    def init_state(
        self, key: Tensor, shape: tuple[int, int], dtype: torch.dtype, side: int | None = None
    ) -> dict[str, Tensor]:
        """The solver's state for matrices `(k, *shape)` before the first measurement; see `Solver.init_state`."""
        return {}

    def next_num_iterations(self, num_iterations: int | None, error: float | None) -> int | None:
        """The iterations of a step that reads nothing back, after one that needed so many and left `error`."""
        return None

    @abstractmethod
    def of_orthogonal(self, gain: float, m: int, n: int) -> float:
        """The norm of `gain` times a semi-orthogonal matrix `(m, n)`."""

    @abstractmethod
    def measure(
        self,
        matrices: Iterable[Tensor | ShardedMatrices],
        states: Sequence[State],
        *,
        to_convergence: bool = False,
        num_iterations: int | None = None,
    ) -> Measurement:
        """The norms of weights as matrices `(k_i, m_i, n_i)`, of one dtype, float32 or wider. Nothing is written.

        All of them are dense, or all are sharded.
        """

    @abstractmethod
    def certify(self, matrices: Tensor, key: Tensor, tolerance: float, miss: float) -> Bounds:
        """Certified bounds on the norms of `matrices (k, m, n)`, at any cost; `key (k,)` seeds random numbers."""


@dataclass(frozen=True)
class FrobeniusNorm(Norm):
    """`||W||_F`."""

    name = "frobenius"

    @property
    def reads_shards(self) -> bool:
        return True

    def of_orthogonal(self, gain: float, m: int, n: int) -> float:
        return gain * math.sqrt(min(m, n))

    def measure(
        self,
        matrices: Iterable[Tensor | ShardedMatrices],
        states: Sequence[State],
        *,
        to_convergence: bool = False,
        num_iterations: int | None = None,
    ) -> Measurement:
        norms: list[Tensor] = []
        squares: dict[int, Groups] = {}
        # One weight after another, since each may be a copy.
        for one in matrices:
            dtype = one.dtype
            if isinstance(one, ShardedMatrices):
                squares[len(norms)] = one.sums
                norms.append(one.square_sums(widest_dtype(one.tensor.device)))
            else:
                norms.append(self._norms(one))
        for number, total in zip(squares, summed([norms[i] for i in squares], list(squares.values())), strict=True):
            norms[number] = total.sqrt()
        return _exactly(concat(norms).to(dtype), [None] * len(norms))

    def _norms(self, matrices: Tensor) -> Tensor:
        """The norms of `matrices (k, m, n)`, in their dtype or a wider one."""
        # Rows first: short sums keep float32 accurate, and a float64 total cannot overflow.
        # The compiler of torch 2.9 keeps an axis of length 1 that it should reduce.
        rows = torch.linalg.vector_norm(matrices, dim=-1).reshape(matrices.shape[:-1])
        return torch.linalg.vector_norm(rows, dim=-1, dtype=widest_dtype(rows.device)).reshape(rows.shape[:-1])

    def certify(self, matrices: Tensor, key: Tensor, tolerance: float, miss: float) -> Bounds:
        return frobenius_bounds(matrices)


class RowNorm(FrobeniusNorm):
    """The norm of a row, which is a matrix of its own."""

    name = "row-wise Frobenius"


class ColumnNorm(FrobeniusNorm):
    """The norm of a column, which is a matrix of its own."""

    name = "column-wise Frobenius"

    def _norms(self, matrices: Tensor) -> Tensor:
        # Torch's norms take three to thirty times as long along the outer axes in memory; its sums are as accurate.
        return matrices.square().sum(dim=(-2, -1)).sqrt()


class SpectralNorm(Norm):
    """`||W||`, the largest singular value."""

    name = "spectral"

    def of_orthogonal(self, gain: float, m: int, n: int) -> float:
        return gain

    def certify(self, matrices: Tensor, key: Tensor, tolerance: float, miss: float) -> Bounds:
        return spectral_bounds(matrices, key, tolerance, miss)


@dataclass(frozen=True)
class SpectralNormBySolver(SpectralNorm):
    """`||W||` by a solver; the factors of a weight are its `Triple`."""

    solver: Solver

    @classmethod
    def with_solver(cls, solver: Solver) -> Self:
        return cls(solver)

    @property
    def reads_shards(self) -> bool:
        return self.solver.reads_shards

    def scratch_elements(self, m: int, n: int) -> int:
        return self.solver.scratch_elements(m, n)

    def operations(self, m: int, n: int) -> int:
        # An iteration of `Block`: three products with 16 columns. The other solvers take more, in proportion.
        return 96 * m * n

    def init_state(
        self, key: Tensor, shape: tuple[int, int], dtype: torch.dtype, side: int | None = None
    ) -> dict[str, Tensor]:
        return self.solver.init_state(key, shape, dtype, side)

    def next_num_iterations(self, num_iterations: int | None, error: float | None) -> int | None:
        return self.solver.next_num_iterations(num_iterations, error)

    def measure(
        self,
        matrices: Iterable[Tensor | ShardedMatrices],
        states: Sequence[State],
        *,
        to_convergence: bool = False,
        num_iterations: int | None = None,
    ) -> Measurement:
        read = [one if isinstance(one, ShardedMatrices) else DenseMatrices(one) for one in matrices]
        solutions = self.solver.solve(read, states, to_convergence=to_convergence, num_iterations=num_iterations)
        triples = [solution.triple for solution in solutions]
        value, residual, error, count = (
            concat([getattr(triple, name) for triple in triples])
            for name in ("value", "residual", "error", "num_iterations")
        )
        return Measurement(value, residual, error, count, triples, [solution.state for solution in solutions])


@dataclass(frozen=True)
class SpectralNormByDecomposition(SpectralNorm):
    """`||W||` by a decomposition, for small models.

    The factors of a weight are all singular values `(k, min(m, n))` in ascending order, float64, and the singular
    vectors of the shorter side `(k, min(m, n), min(m, n))`, from `eigh` of the smaller Gram matrix in float64. On an
    accelerator the host waits for it; one without float64 has it done on the CPU.
    """

    @property
    def reads_shards(self) -> bool:
        return False

    def scratch_elements(self, m: int, n: int) -> int:
        return 4 * min(m, n) ** 2

    def operations(self, m: int, n: int) -> int:
        return 2 * m * n * min(m, n) + 9 * min(m, n) ** 3

    def measure(
        self,
        matrices: Iterable[Tensor | ShardedMatrices],
        states: Sequence[State],
        *,
        to_convergence: bool = False,
        num_iterations: int | None = None,
    ) -> Measurement:
        found = []
        for one in matrices:
            assert isinstance(one, Tensor)
            scaled, scale = scaled_to_one(one)
            squares, vectors = torch.linalg.eigh(smaller_gram(scaled))
            found.append((squares.clamp_min(0).sqrt() * scale.to(squares)[:, None], vectors))
            dtype, device = one.dtype, one.device
        norm = concat([values[:, -1] for values, _ in found]).to(device, dtype)
        return _exactly(norm, found)
