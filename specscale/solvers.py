"""The first singular triple of each matrix in a batch: block LOBPCG, power iteration and the exact SVD.

Pure functions of tensors. What a solver carries from one step to the next is a dictionary of tensors, its state, which
the caller stores; random numbers are a function of a key in that state, so that equal states give equal results on
every rank and after every resume.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from specscale.linalg import add_product, dominant_eigenvectors, gram, product, rayleigh_ritz, scaled_to_one, unit
from specscale.random import normal, signs

State = Mapping[str, Tensor]

CONVERGED = 1e-5
"""The residual below which float32's rounding lets a block become no better."""

JUMP = 0.1
"""The relative rise of a block's largest value in its first iteration from which the weight is taken to have jumped.

A residual of `r` raises the value by at least `sqrt(1 + r^2) - 1`, and a jump that the first column does not see leaves
its residual at zero.
"""


class Matrices(Protocol):
    """Matrices `W (k, m, n)`, float32 or wider, as a solver reads them.

    `Block` reads a large matrix through the two products alone, so that a shard or a kernel can stand in for it. Both
    products are whole and equal on every rank: a row shard gathers `W X` and sums `W^T Y` over the ranks. A matrix that
    `Block` solves exactly, `Power` and `SVD` need `dense`.
    """

    @property
    def shape(self) -> tuple[int, int, int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def mT(self) -> "Matrices":
        """The transposed matrices."""

    def matmat(self, columns: Tensor) -> Tensor:
        """`W X` for `X (k, n, b)`."""

    def rmatmat(self, columns: Tensor) -> Tensor:
        """`W^T Y` for `Y (k, m, b)`."""

    def dense(self) -> Tensor:
        """`W` itself, `(k, m, n)`."""


@dataclass(frozen=True)
class DenseMatrices:
    """Matrices that are a tensor `(k, m, n)`."""

    tensor: Tensor

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

    def matmat(self, columns: Tensor) -> Tensor:
        return product(self.tensor, columns)

    def rmatmat(self, columns: Tensor) -> Tensor:
        return product(self.tensor.mT, columns)

    def dense(self) -> Tensor:
        return self.tensor


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
    num_iterations: int
    """Iterations that were taken, the same for all matrices; zero where the solver is exact."""

    def transposed(self) -> "Triple":
        """The triple of the transposed matrices."""
        return self._replace(left=self.right, right=self.left)


class Solver(Protocol):
    """A solver makes an initial state for matrices of a shape, and improves on a state step by step."""

    def init_state(self, key: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
        """The state before the first solve, for matrices `(k, *shape)` of a dtype, float32 or wider, on `key`'s device.

        `key (k,)`, int64, seeds each matrix's random numbers.
        """

    def solve(
        self, matrices: Matrices, state: State, *, to_convergence: bool = False, num_iterations: int | None = None
    ) -> tuple[Triple, dict[str, Tensor]]:
        """The triples of `matrices (k, m, n)`, and the state to continue from.

        `Block` decides on the host when to stop; with `num_iterations` it takes exactly so many and reads nothing back.
        `to_convergence` iterates until float32's rounding allows no progress, for the first solve. The other solvers
        take neither.
        """

    def scratch_elements(self, m: int, n: int) -> int:
        """How many elements a solve of one matrix `(m, n)` allocates beside it, in the matrix's dtype."""

    def next_num_iterations(self, num_iterations: int | None, error: float | None) -> int | None:
        """The `num_iterations` of the next solve, after one that took so many and left `error` (None before the first).

        None where the solver takes no such number.
        """


@dataclass(frozen=True)
class Block:
    """Warm-started block LOBPCG: a persistent block of vectors, refined by as many iterations as its error needs.

    One iteration is a Rayleigh-Ritz step for `A = W^T W` on `[V, R, P]`: the block, its residuals and its last
    directions (Knyazev, "Toward the optimal preconditioned eigensolver", 2001, algorithm 4.1). It needs three products
    with `W`: `W^T (W V)` for the residuals, and `W [R, P]`; a second iteration has `W V` already. The error left in the
    singular value is estimated from the residuals and the spread of the block, see `_residual_and_error`. The
    last column of the block does not follow the others: it searches outside them, by power iteration with fresh noise
    added at each step, so that a singular value that overtakes the block from outside is found. A block in its first
    step, and one whose weight has jumped, is solved to a stricter tolerance.

    The block lives on the matrix's shorter side. A matrix whose shorter side is at most four blocks is solved from its
    Gram matrix instead, exactly and without state.
    """

    width: int = 16
    """Columns of the block; products with multiples of 16 are the fastest."""
    tolerance: float = 2e-4
    """Iterate until the estimated relative error of the singular value is at most this."""
    max_iterations: int = 8
    """The most iterations of one step; a thorough solve takes up to 60."""

    def __post_init__(self) -> None:
        if self.width < 2 or self.max_iterations < 1 or not self.tolerance > 0:
            raise ValueError(f"{self}: width must be at least 2, max_iterations at least 1 and tolerance positive")

    def _is_small(self, m: int, n: int) -> bool:
        return min(m, n) <= 4 * self.width

    def _thorough(self, tolerance: float, limit: int) -> tuple[float, int]:
        """Tolerance and limit of a solve after a jump or in the first step, where these are not stricter already."""
        return min(tolerance, self.tolerance / 20), max(limit, 60)

    def init_state(self, key: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
        if self._is_small(*shape):
            return {}
        basis = torch.linalg.qr(normal(key, (min(shape), self.width), dtype)).Q
        # `age` counts the solves since the initial state; with the key it seeds the noise.
        return {
            "basis": basis,
            "direction": torch.zeros_like(basis),
            "key": key.clone(),
            "age": torch.zeros_like(key),
        }

    def solve(
        self, matrices: Matrices, state: State, *, to_convergence: bool = False, num_iterations: int | None = None
    ) -> tuple[Triple, dict[str, Tensor]]:
        _, m, n = matrices.shape
        oriented = matrices if m >= n else matrices.mT
        if self._is_small(m, n):
            triple, state = self._solve_small(oriented.dense()), {}
        else:
            tolerance: float | None = self.tolerance
            limit = self.max_iterations
            if to_convergence:
                tolerance, limit = 0, 300
            elif num_iterations is not None:
                tolerance, limit = None, num_iterations
            elif not bool(state["age"].all()):
                tolerance, limit = self._thorough(self.tolerance, limit)
            triple, state = self._iterate(oriented, state, tolerance, limit)
            if to_convergence:
                state["age"] = torch.zeros_like(state["age"])
        return triple if m >= n else triple.transposed(), dict(state)

    def scratch_elements(self, m: int, n: int) -> int:
        if self._is_small(m, n):
            return 3 * m * n + min(m, n) ** 2
        # `[V, R, P]` and its image, as they are and in float64, and the state before and after.
        return 12 * self.width * (m + n)

    def next_num_iterations(self, num_iterations: int | None, error: float | None) -> int | None:
        if num_iterations is None or error is None:
            return 2
        if not error <= self.tolerance:
            return min(num_iterations + 1, self.max_iterations)
        return max(num_iterations - 1, 1) if error <= self.tolerance / 4 else num_iterations

    def _solve_small(self, matrices: Tensor) -> Triple:
        scaled, scale = scaled_to_one(matrices)
        right = dominant_eigenvectors(gram(scaled), min(2, scaled.shape[-1])).to(matrices.dtype)
        image = product(scaled, right)
        values = image.norm(dim=-2) * scale[..., None]
        next_value = values[..., 1] if values.shape[-1] > 1 else torch.zeros_like(values[..., 0])
        return Triple(values[..., 0], unit(image[..., 0]), right[..., 0], next_value, *_exact(next_value))

    def _iterate(
        self, matrices: Matrices, state: State, tolerance: float | None, limit: int
    ) -> tuple[Triple, dict[str, Tensor]]:
        """Iterate until `tolerance` or for `limit` iterations; with a tolerance of None nothing is read back."""
        # The weight may have another dtype than it had when the state was made.
        V, P = (state[name].to(matrices.dtype) for name in ("basis", "direction"))
        WV = matrices.matmat(V)
        # Two products in a row would leave float32's range where the entries are near 1e20.
        scale = WV.abs().amax(dim=(-2, -1))
        finite = scale.isfinite()
        unscale = torch.where(finite & (scale > 0), scale.reciprocal(), 1)[:, None, None]
        probe, num_iterations, residual_limit = V[..., -1:], 0, torch.inf
        while True:
            AV = matrices.rmatmat(WV * unscale) * unscale
            if num_iterations == 0:
                probe = unit(AV[..., -1:], dim=-2)
            R = add_product(AV, V, product(V.mT, AV), alpha=-1)
            S = torch.cat([V, R, P], dim=-1)
            WS = torch.cat([WV, matrices.matmat(S[..., self.width :])], dim=-1)
            # A factorisation of what is not finite would raise.
            gram_s, gram_ws = (torch.where(finite[:, None, None], gram(tall), 0) for tall in (S, WS))
            C, values = rayleigh_ritz(gram_s, gram_ws, self.width)
            residual, error = _residual_and_error(gram_s, gram_ws, values, torch.where(finite, scale, 0).double() ** 2)
            overlap = C.mT @ (gram_s[..., self.width :] @ C[..., self.width :, :])
            C, overlap = C.to(V.dtype), overlap.to(V.dtype)
            step = product(S[..., self.width :], C[..., self.width :, :])
            V = add_product(step, V, C[..., : self.width, :])
            num_iterations += 1
            if tolerance is not None:
                worst_residual, worst_error = torch.stack([residual.max(), error.max()]).tolist()
                if num_iterations == 1 and (rise := _rise(gram_ws, values)) > JUMP:
                    # A jump stands out, so that its value converges before its vectors do. A step that puts it back
                    # among the other values leaves the norm off by up to half the residual.
                    tolerance, limit = self._thorough(tolerance, limit)
                    residual_limit = 2 * self.tolerance / (1 + rise)
                elif (worst_error <= tolerance and worst_residual <= residual_limit) or worst_residual <= CONVERGED:
                    break
            if num_iterations >= limit:
                break
            WV = product(WS, C)
            # Without its part in V, where the two would cancel.
            P = add_product(step, V, overlap, alpha=-1)
        left, right, leading = (product(WS, C[..., :1]) * unscale)[..., 0], V[..., 0], V[..., :-1]
        value = scale * (left.norm(dim=-1) / right.norm(dim=-1).clamp_min(torch.finfo(right.dtype).tiny))
        next_value = values[..., 1:].amax(-1).to(value.dtype)
        value, next_value = (torch.where(finite, one, torch.nan) for one in (value, next_value))
        residual, error = residual.to(value.dtype), error.to(value.dtype)
        triple = Triple(value, unit(left), unit(right), next_value, residual, error, num_iterations)
        probe = probe + 0.1 / probe.shape[-2] ** 0.5 * signs(state["key"] + (state["age"] << 32), probe.shape[1:])
        probe = unit(probe - product(leading, product(leading.mT, probe)), dim=-2)
        # The probe replaces the last column, which is therefore no part of the new block.
        P = add_product(step, leading, overlap[..., :-1, :], alpha=-1)
        keep = finite[:, None, None]
        return triple, {
            "basis": torch.where(keep, torch.cat([leading, probe], dim=-1), state["basis"]),
            "direction": torch.where(keep, P, state["direction"]),
            "key": state["key"],
            "age": state["age"] + 1,
        }


def _rise(gram_ws: Tensor, values: Tensor) -> float:
    """How far, relative, a Rayleigh-Ritz step has raised the largest value of any block: a host sync."""
    before, after = gram_ws.diagonal(dim1=-2, dim2=-1)[..., : values.shape[-1]].amax(-1).sqrt(), values.amax(-1)
    tiny = torch.finfo(values.dtype).tiny
    return (after.clamp_min(tiny) / before.clamp_min(tiny) - 1).max().item()


def _residual_and_error(gram_s: Tensor, gram_ws: Tensor, values: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`||r|| / s^2` of the longest column before a Rayleigh-Ritz step, and the relative error after it, `(k,)` both.

    From the Gram matrices of `[V, R, P]` and of its image, where the residuals are `scale` times `R`, and the Ritz
    values after the step.

    The error is estimated as `rho (rho / gap)^2 / 16`, with `rho` the root mean square of the residuals and `gap` how
    far, relative, the block's last value lies below its first: in a crowded spectrum, a residual of the same length
    means a larger error. The exponents and the 16 are a fit to errors against exact values, on trajectories of two MLPs
    and a ResNet: on each, the ratio of error to estimate had a median of about 1 and lay between 0.2 and 4 in nine of
    ten cases, while `||r||` alone did not predict the error. Weights that drift in two directions only had errors of
    three times the estimate.
    """
    width = values.shape[-1]
    squares = gram_ws.diagonal(dim1=-2, dim2=-1)[..., :width]
    residuals = gram_s.diagonal(dim1=-2, dim2=-1)[..., width : 2 * width].sqrt() * scale[..., None]
    tiny = torch.finfo(squares.dtype).tiny
    square, top = squares.max(dim=-1, keepdim=True)
    residuals = residuals / square.clamp_min(tiny)
    # Without the last column, which searches outside the block.
    rho = residuals[..., :-1].square().mean(-1).sqrt()
    gap = 1 - values.amin(-1) / values.amax(-1).clamp_min(tiny)
    error = rho * (rho / gap.clamp_min(tiny)).square().div(16).clamp_max(1)
    return residuals.take_along_dim(top, dim=-1)[..., 0], error


def _exact(like: Tensor) -> tuple[Tensor, Tensor, int]:
    """Residual, error and iterations of an exact solver."""
    return torch.zeros_like(like), torch.zeros_like(like), 0


@dataclass(frozen=True)
class Power:
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

    def init_state(self, key: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
        return {"columns": normal(key, (min(shape), 2), dtype)} if self.warm else {"key": key.clone()}

    def scratch_elements(self, m: int, n: int) -> int:
        return m * n + n * n

    def next_num_iterations(self, num_iterations: int | None, error: float | None) -> int | None:
        return None

    def solve(
        self, matrices: Matrices, state: State, *, to_convergence: bool = False, num_iterations: int | None = None
    ) -> tuple[Triple, dict[str, Tensor]]:
        _, m, n = matrices.shape
        scaled, scale = scaled_to_one((matrices if m >= n else matrices.mT).dense())
        # The Gram matrix costs as much arithmetic as n / 2 iterations, but in one product, which runs far faster.
        use_gram = self.num_iterations > scaled.shape[-1] // 20
        square = product(scaled.mT, scaled) if use_gram else None
        size = (scaled.shape[-1], 2)
        start = state["columns"].to(scaled.dtype) if self.warm else normal(state["key"], size, scaled.dtype)
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
        triple = Triple(
            values[..., 0], unit(image[..., 0]), columns[..., 0], values[..., 1], residual, error, self.num_iterations
        )
        # Keep the old vectors if the matrix is zero: its product with them is zero too.
        kept = torch.where(values[:, None] > 0, columns, start)
        state = {"columns": kept} if self.warm else {"key": state["key"] + 1}
        return triple if m >= n else triple.transposed(), state


@dataclass(frozen=True)
class SVD:
    """The exact singular value decomposition of every matrix: for checks, and for small models."""

    def init_state(self, key: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Tensor]:
        return {}

    def scratch_elements(self, m: int, n: int) -> int:
        return 2 * m * n + min(m, n) ** 2

    def next_num_iterations(self, num_iterations: int | None, error: float | None) -> int | None:
        return None

    def solve(
        self, matrices: Matrices, state: State, *, to_convergence: bool = False, num_iterations: int | None = None
    ) -> tuple[Triple, dict[str, Tensor]]:
        scaled, scale = scaled_to_one(matrices.dense())
        left, values, right = torch.linalg.svd(scaled, full_matrices=False)
        values = values * scale[..., None]
        next_value = values[..., 1] if values.shape[-1] > 1 else torch.zeros_like(values[..., 0])
        # The vectors of equal singular values are off by rounding, one part in 1e7; the first value is not.
        return Triple(values[..., 0], left[..., 0], right[..., 0, :], next_value, *_exact(next_value)), {}


SOLVERS: dict[str, Solver] = {"block": Block(), "power": Power(), "svd": SVD()}
