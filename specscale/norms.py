"""The norms of a weight's matrices: how each is measured, with what a constraint needs beside it.

Pure functions of tensors that write nothing, so that a step can read every weight before it writes the first one.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from specscale.bounds import Bounds, frobenius_bounds, spectral_bounds
from specscale.linalg import concat, scaled_to_one, smaller_gram
from specscale.solvers import DenseMatrices, Solver, State


class Measurement(NamedTuple):
    """What a `Norm` finds in a batch of matrices."""

    norm: Tensor
    """`(k,)`: the norm of each matrix; NaN or infinite where the matrix is."""
    residual: Tensor
    """`(k,)`: the solver's residual; zero where the norm is exact."""
    error: Tensor
    """`(k,)`: the solver's own estimate of the relative error of `norm`; zero where it is exact."""
    num_iterations: int
    """The solver's iterations, the same for all matrices; zero where there are none."""
    factors: Any
    """What a constraint needs beside the norm: see each norm."""
    state: dict[str, Tensor]
    """The solver's state to continue from."""


class Norm(ABC):
    """A norm, and how it is measured. The defaults are those of a norm that needs no solver."""

    name: ClassVar[str]
    """Which norm it is: constraints on norms of one name have comparable targets."""

    @classmethod
    def with_solver(cls, solver: Solver) -> Self:
        return cls()

    def scratch_elements(self, m: int, n: int) -> int | None:
        """Scratch elements per matrix `(m, n)` of a batched measurement; None disables stacking.

        Weights of one shape are stacked in a copy and measured together where that saves launches.
        """
        return None

    def init_state(self, key: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
        """The solver's state for matrices `(k, *shape)` before the first measurement; see `Solver.init_state`."""
        return {}

    def next_num_iterations(self, num_iterations: int | None, error: float | None) -> int | None:
        """The iterations of a step that reads nothing back, after one that took so many and left `error`."""
        return None

    @abstractmethod
    def of_orthogonal(self, gain: float, m: int, n: int) -> float:
        """The norm of `gain` times a semi-orthogonal matrix `(m, n)`."""

    @abstractmethod
    def measure(
        self,
        matrices: Iterable[Tensor],
        state: State,
        *,
        to_convergence: bool = False,
        num_iterations: int | None = None,
    ) -> Measurement:
        """The norms `(k,)` of matrices `(k_i, m_i, n_i)`, float32 or wider, `k` being the sum of the `k_i`.

        All are of one shape where `scratch_elements` is a number. Nothing is written.
        """

    @abstractmethod
    def certify(self, matrices: Tensor, key: Tensor, tolerance: float, miss: float) -> Bounds:
        """Certified bounds on the norms of `matrices (k, m, n)`, at any cost; `key (k,)` seeds random numbers."""


@dataclass(frozen=True)
class FrobeniusNorm(Norm):
    """`||W||_F`."""

    name = "frobenius"

    def of_orthogonal(self, gain: float, m: int, n: int) -> float:
        return gain * math.sqrt(min(m, n))

    def measure(
        self,
        matrices: Iterable[Tensor],
        state: State,
        *,
        to_convergence: bool = False,
        num_iterations: int | None = None,
    ) -> Measurement:
        # Rows first: short sums keep float32 accurate, and the float64 total cannot overflow.
        # One weight after another, since each may be a copy.
        rows = [torch.linalg.vector_norm(one, dim=-1) for one in matrices]
        norms = [torch.linalg.vector_norm(one, dim=-1, dtype=torch.float64) for one in rows]
        norm = torch.cat(norms).to(rows[0].dtype)
        return Measurement(norm, torch.zeros_like(norm), torch.zeros_like(norm), 0, None, {})

    def certify(self, matrices: Tensor, key: Tensor, tolerance: float, miss: float) -> Bounds:
        return frobenius_bounds(matrices)


class SpectralNorm(Norm):
    """`||W||`, the largest singular value."""

    name = "spectral"

    def of_orthogonal(self, gain: float, m: int, n: int) -> float:
        return gain

    def certify(self, matrices: Tensor, key: Tensor, tolerance: float, miss: float) -> Bounds:
        return spectral_bounds(matrices, key, tolerance, miss)


@dataclass(frozen=True)
class SpectralNormBySolver(SpectralNorm):
    """`||W||` by a solver; `factors` is the `Triple`."""

    solver: Solver

    @classmethod
    def with_solver(cls, solver: Solver) -> Self:
        return cls(solver)

    def scratch_elements(self, m: int, n: int) -> int | None:
        return self.solver.scratch_elements(m, n)

    def init_state(self, key: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
        return self.solver.init_state(key, shape, dtype)

    def next_num_iterations(self, num_iterations: int | None, error: float | None) -> int | None:
        return self.solver.next_num_iterations(num_iterations, error)

    def measure(
        self,
        matrices: Iterable[Tensor],
        state: State,
        *,
        to_convergence: bool = False,
        num_iterations: int | None = None,
    ) -> Measurement:
        stacked = DenseMatrices(concat(list(matrices)))
        triple, state = self.solver.solve(stacked, state, to_convergence=to_convergence, num_iterations=num_iterations)
        return Measurement(triple.value, triple.residual, triple.error, triple.num_iterations, triple, state)


@dataclass(frozen=True)
class SpectralNormByDecomposition(SpectralNorm):
    """`||W||` by a decomposition, for small models.

    `factors` are all singular values `(k, min(m, n))` in ascending order, float64, and the singular vectors of the
    shorter side `(k, min(m, n), min(m, n))`, from `eigh` of the smaller Gram matrix in float64. On an accelerator the
    host waits for it.
    """

    def scratch_elements(self, m: int, n: int) -> int | None:
        return 2 * m * n + 4 * min(m, n) ** 2

    def measure(
        self,
        matrices: Iterable[Tensor],
        state: State,
        *,
        to_convergence: bool = False,
        num_iterations: int | None = None,
    ) -> Measurement:
        scaled, scale = scaled_to_one(concat(list(matrices)))
        squares, vectors = torch.linalg.eigh(smaller_gram(scaled))
        values = squares.clamp_min(0).sqrt() * scale[:, None].double()
        norm = values[:, -1].to(scaled.dtype)
        return Measurement(norm, torch.zeros_like(norm), torch.zeros_like(norm), 0, (values, vectors), {})
