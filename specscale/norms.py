"""The norms that can be held: how each is measured and how weights are put back on their targets.

Pure functions of tensors, in the two halves of a step: `measure` only reads, so that every weight can be looked at
before the first one is written; `restore_` writes.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from specscale.algebra import join, short_gram
from specscale.certificates import Bounds, frobenius_bounds, spectral_bounds
from specscale.solvers import Solver, State, finite_or_zero


class Measurement(NamedTuple):
    """What `measure` found out about a batch of matrices."""

    norm: Tensor
    """`(k,)`: the norm of each matrix; NaN or infinite where the matrix is."""
    residual: Tensor
    """`(k,)`: the solver's residual; zero where the norm is exact."""
    error: Tensor
    """`(k,)`: the relative error of `norm`, by the solver's own estimate; zero where it is exact."""
    num_iterations: int
    """The solver's iterations, all matrices alike; zero where there are none."""
    factors: Any
    """What `restore_` needs to know of the matrices."""
    state: dict[str, Tensor]
    """The state to go on from."""


class Norm(Protocol):
    """A norm that can be held."""

    @property
    def name(self) -> str: ...

    @property
    def order(self) -> int:
        """Of the Schatten norm that it is; zero stands for infinity. A checkpoint tells by it what its targets are."""

    def workspace(self, m: int, n: int) -> int | None:
        """The numbers that measuring one matrix `(m, n)` works with beside it, where equally shaped weights are worth a
        copy, so as to be measured together; else None."""

    def of_orthogonal(self, gain: float, m: int, n: int) -> float:
        """The norm of `gain` times a semi-orthogonal matrix `(m, n)`."""

    def cold(self, matrices: Tensor, key: Tensor) -> dict[str, Tensor]:
        """The state for `matrices (k, m, n)` before the first measurement."""

    def pace(self, num_iterations: int | None, error: float | None) -> int | None:
        """The iterations of a step that reads nothing back, after one of so many that left `error`, if known."""

    def measure(
        self,
        matrices: Iterable[Tensor],
        state: State,
        *,
        to_convergence: bool = False,
        num_iterations: int | None = None,
    ) -> Measurement:
        """The norms `(k,)` of matrices `(k_i, m_i, n_i)`, float32 or wider; of one shape if there is a `workspace`."""

    def restore_(self, splits: list[Tensor], measurement: Measurement, target: Tensor, hold: Tensor) -> Tensor:
        """Put the matrices behind `splits`, each `(k_i, o, ...)`, back on `target (k,)` in place, unless in `hold`.

        Returns the norms `(k,)` that the matrices then have.
        """

    def certify(self, matrices: Tensor, key: Tensor, tolerance: float, miss: float) -> Bounds:
        """What the norms of `matrices (k, m, n)` truly are, at any price; `key (k,)` seeds random numbers."""


def _like(factor: Tensor, split: Tensor) -> Tensor:
    """`(k,)` or `(k, o)` with trailing axes of size one, for broadcasting against `split (k, o, ...)`."""
    return factor.reshape(*factor.shape, *[1] * (split.ndim - factor.ndim))


@dataclass(frozen=True)
class Frobenius:
    """`W <- W t / ||W||_F`: the Norm Scaling post's Frobenius norm scaling."""

    name = "frobenius"
    order = 2

    def workspace(self, m: int, n: int) -> int | None:
        return None

    def of_orthogonal(self, gain: float, m: int, n: int) -> float:
        return gain * math.sqrt(min(m, n))

    def cold(self, matrices: Tensor, key: Tensor) -> dict[str, Tensor]:
        return {}

    def pace(self, num_iterations: int | None, error: float | None) -> int | None:
        return None

    def measure(
        self,
        matrices: Iterable[Tensor],
        state: State,
        *,
        to_convergence: bool = False,
        num_iterations: int | None = None,
    ) -> Measurement:
        # Rows first: short sums keep float32 accurate, and the float64 total cannot overflow.
        # One after another, since a matrix may be a copy.
        rows = [torch.linalg.vector_norm(one, dim=-1) for one in matrices]
        norms = [torch.linalg.vector_norm(one, dim=-1, dtype=torch.float64) for one in rows]
        norm = torch.cat(norms).to(rows[0].dtype)
        return Measurement(norm, torch.zeros_like(norm), torch.zeros_like(norm), 0, None, {})

    def restore_(self, splits: list[Tensor], measurement: Measurement, target: Tensor, hold: Tensor) -> Tensor:
        norm = measurement.norm.to(target.dtype)
        hold = hold | (norm == 0)
        factor = torch.where(hold, 1, target / norm)
        for split, own in zip(splits, factor.split([len(split) for split in splits]), strict=True):
            split.mul_(_like(own, split))
        return torch.where(hold, norm, target)

    def certify(self, matrices: Tensor, key: Tensor, tolerance: float, miss: float) -> Bounds:
        return frobenius_bounds(matrices)


@dataclass(frozen=True)
class Spectral:
    """`W <- W + (t - s) u v^T` for the first singular triple `(s, u, v)`: the post's spectral norm scaling.

    Only the first singular value moves; where the second is above `t`, the norm stays above `t`.
    """

    solver: Solver
    name = "spectral"
    order = 0

    def workspace(self, m: int, n: int) -> int | None:
        return self.solver.workspace(m, n)

    def of_orthogonal(self, gain: float, m: int, n: int) -> float:
        return gain

    def cold(self, matrices: Tensor, key: Tensor) -> dict[str, Tensor]:
        return self.solver.cold(matrices, key)

    def pace(self, num_iterations: int | None, error: float | None) -> int | None:
        return self.solver.pace(num_iterations, error)

    def measure(
        self,
        matrices: Iterable[Tensor],
        state: State,
        *,
        to_convergence: bool = False,
        num_iterations: int | None = None,
    ) -> Measurement:
        joined = join(list(matrices))
        triple, state = self.solver.solve(joined, state, to_convergence=to_convergence, num_iterations=num_iterations)
        return Measurement(triple.value, triple.residual, triple.error, triple.num_iterations, triple, state)

    def restore_(self, splits: list[Tensor], measurement: Measurement, target: Tensor, hold: Tensor) -> Tensor:
        triple = measurement.factors
        value = triple.value.to(target.dtype)
        hold = hold | (value == 0)
        left = torch.where(hold, 0, target - value)[:, None] * triple.left
        # A vector that is not finite must not reach a weight that is held: zero times it is no zero.
        left, right = (torch.where(hold[:, None], 0, vectors) for vectors in (left, triple.right))
        counts = [len(split) for split in splits]
        for split, own_left, own_right in zip(splits, left.split(counts), right.split(counts), strict=True):
            # On the split tensor, not on the matrix, a rank-one update is a broadcast product in any memory format.
            split.addcmul_(_like(own_left, split), own_right.reshape(len(split), 1, *split.shape[2:]))
        return torch.where(hold, value, torch.maximum(target, triple.next_value.to(target.dtype)))

    def certify(self, matrices: Tensor, key: Tensor, tolerance: float, miss: float) -> Bounds:
        return spectral_bounds(matrices, key, tolerance, miss)


@dataclass(frozen=True)
class Clipped:
    """`W <- U min(S, t) V^T` with the first singular value at `t` always: singular value clipping.

    As Saito et al., "Temporal generative adversarial nets with singular value clipping" (2017), section 3.4, do at 1.
    It moves the first triple as `Spectral` does, and every other one that is above the target, so that the norm is the
    target exactly. By the eigenvectors of the smaller Gram matrix in float64, at every step: for small models. On an
    accelerator the host waits for them.
    """

    name = "clipped"
    order = 0

    def workspace(self, m: int, n: int) -> int | None:
        return 2 * m * n + 4 * min(m, n) ** 2

    def of_orthogonal(self, gain: float, m: int, n: int) -> float:
        return gain

    def cold(self, matrices: Tensor, key: Tensor) -> dict[str, Tensor]:
        return {}

    def pace(self, num_iterations: int | None, error: float | None) -> int | None:
        return None

    def measure(
        self,
        matrices: Iterable[Tensor],
        state: State,
        *,
        to_convergence: bool = False,
        num_iterations: int | None = None,
    ) -> Measurement:
        scaled, scale = finite_or_zero(join(list(matrices)))
        squares, vectors = torch.linalg.eigh(short_gram(scaled))
        values = squares.clamp_min(0).sqrt() * scale[:, None].double()
        norm = values[:, -1].to(scaled.dtype)
        return Measurement(norm, torch.zeros_like(norm), torch.zeros_like(norm), 0, (values, vectors), {})

    def restore_(self, splits: list[Tensor], measurement: Measurement, target: Tensor, hold: Tensor) -> Tensor:
        values, vectors = measurement.factors
        norm = measurement.norm.to(target.dtype)
        hold = hold | (norm == 0)
        above = values > target[:, None]
        above[:, -1] = True
        # What is taken off each singular value, relative.
        excess = torch.where(above, 1 - target[:, None].double() / values, 0)
        parts = ((vectors * excess[:, None]) @ vectors.mT).to(target.dtype)
        counts = [len(split) for split in splits]
        for split, part, held in zip(splits, parts.split(counts), hold.split(counts), strict=True):
            matrices = split.reshape(*split.shape[:2], -1).to(part.dtype)
            tall = matrices.shape[-2] >= matrices.shape[-1]
            correction = matrices @ part if tall else part @ matrices
            split.sub_(torch.where(held[:, None, None], 0, correction).reshape(split.shape))
        return torch.where(hold, norm, target)

    def certify(self, matrices: Tensor, key: Tensor, tolerance: float, miss: float) -> Bounds:
        return spectral_bounds(matrices, key, tolerance, miss)
