"""The first singular triple of each matrix in a batch: block LOBPCG, power iteration and the exact SVD.

Everything here is a function of tensors. A solver keeps what it wants to remember in a dictionary of tensors, its
state, which the caller stores; random numbers are a function of a key in that state, so that equal states give equal
results on every rank and after every resume.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from specscale.algebra import dominant, gram, normal, rayleigh_ritz, signs, unit

State = Mapping[str, Tensor]

CONVERGED = 1e-5
"""The residual of a block that is as good as float32 makes it."""

JUMP = 0.1
"""How far, relative, the first iteration raises the largest value of a block that a jump of the weight has left behind.

A residual of `r` raises it by at least `sqrt(1 + r^2) - 1`, and a jump beside the first column leaves that none.
"""


class Triple(NamedTuple):
    """The first singular triple of each matrix `(k, m, n)`, and what is known beside it."""

    value: Tensor
    """`(k,)`: the largest singular value."""
    left: Tensor
    """`(k, m)`: its left singular vector, of unit length (zero where the matrix is zero)."""
    right: Tensor
    """`(k, n)`: its right singular vector, of unit length."""
    next_value: Tensor
    """`(k,)`: the second singular value; an iterative solver estimates it from below."""
    residual: Tensor
    """`(k,)`: `||W^T u - s v|| / s` of the triple that the last iteration set out from, and improved on, less what lies
    within a block. Zero where the solver is exact."""
    error: Tensor
    """`(k,)`: the solver's own estimate of how far, relative, `value` is too low. Zero where the solver is exact."""
    num_iterations: int
    """Iterations that were taken, all matrices alike; zero where the solver is exact."""

    def transposed(self) -> "Triple":
        """The triple of the transposed matrices."""
        return self._replace(left=self.right, right=self.left)


class Solver(Protocol):
    """What a solver is: a cold state for a batch of matrices, and a step that improves on a state."""

    def cold(self, matrices: Tensor, key: Tensor) -> dict[str, Tensor]:
        """A state that knows nothing of `matrices (k, m, n)`; `key (k,)`, int64, seeds its random numbers."""

    def solve(
        self, matrices: Tensor, state: State, *, to_convergence: bool = False, num_iterations: int | None = None
    ) -> tuple[Triple, dict[str, Tensor]]:
        """The triples of `matrices (k, m, n)`, float32 or wider, and the state to go on from.

        An adaptive solver decides on the host when to stop, or, given `num_iterations`, takes exactly so many and
        reads nothing back.
        """

    def workspace(self, m: int, n: int) -> int:
        """The numbers, counted as of the matrix's dtype, that a solve of one matrix `(m, n)` works with beside it."""

    def pace(self, num_iterations: int | None, error: float | None) -> int | None:
        """The `num_iterations` to take after a solve of so many that left `error`; None where nothing is known."""


def finite_or_zero(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices scaled to a largest entry of 1, and the scales; one that is not finite becomes zero.

    The scale keeps squares from over- and underflowing; the zero keeps a factorisation from raising.
    """
    scale = matrices.abs().amax(dim=(-2, -1)) if matrices.numel() else matrices.new_zeros(matrices.shape[:-2])
    finite = torch.isfinite(scale) & (scale > 0)
    divisor = torch.where(finite, scale, torch.inf)[..., None, None]
    return torch.where(finite[..., None, None], matrices / divisor, 0), scale


@dataclass(frozen=True)
class Block:
    """Warm-started block LOBPCG: a persistent block, refined by as many iterations as its error asks for.

    One iteration is a Rayleigh-Ritz step on `[V, R, P]`: the block, its residuals and its last directions (Knyazev,
    "Toward the optimal preconditioned eigensolver", 2001, algorithm 4.1), on `W^T W` by products with `W` alone: two
    for the residuals and one for the images of `R` and `P`, of which the first is known in a second iteration. The
    error that is left in the singular value is estimated from the residuals and the spread of the block, see
    `_errors`. The last column of the block does not follow the others: it searches outside them, by power iteration
    that is stirred with fresh noise, so that a singular value that has overtaken the block from outside is found. A
    block that is cold, or that a jump of the weight has left behind, is solved thoroughly.

    The block lives on the matrix's shorter side; a matrix whose shorter side is at most four blocks is solved by its
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
        """Tolerance and limit of a block that must find its matrix first, where these are not stricter already."""
        return min(tolerance, self.tolerance / 20), max(limit, 60)

    def cold(self, matrices: Tensor, key: Tensor) -> dict[str, Tensor]:
        _, m, n = matrices.shape
        if self._is_small(m, n):
            return {}
        dtype = torch.promote_types(matrices.dtype, torch.float32)
        basis = torch.linalg.qr(normal(key, (min(m, n), self.width), dtype)).Q
        # `age` counts the solves since the cold start; with the key it seeds the noise.
        return {
            "basis": basis,
            "direction": torch.zeros_like(basis),
            "key": key.clone(),
            "age": torch.zeros_like(key),
        }

    def solve(
        self, matrices: Tensor, state: State, *, to_convergence: bool = False, num_iterations: int | None = None
    ) -> tuple[Triple, dict[str, Tensor]]:
        tall = matrices.shape[-2] >= matrices.shape[-1]
        oriented = matrices if tall else matrices.mT
        if self._is_small(*matrices.shape[-2:]):
            triple, state = self._solve_small(oriented), {}
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
        return triple if tall else triple.transposed(), dict(state)

    def workspace(self, m: int, n: int) -> int:
        if self._is_small(m, n):
            return 3 * m * n + min(m, n) ** 2
        # `[V, R, P]` and their images, as they are and in float64, and the state before and after.
        return 12 * self.width * (m + n)

    def pace(self, num_iterations: int | None, error: float | None) -> int | None:
        if num_iterations is None or error is None:
            return 2
        if not error <= self.tolerance:
            return min(num_iterations + 1, self.max_iterations)
        return max(num_iterations - 1, 1) if error <= self.tolerance / 4 else num_iterations

    def _solve_small(self, matrices: Tensor) -> Triple:
        scaled, scale = finite_or_zero(matrices)
        right = dominant(gram(scaled), min(2, scaled.shape[-1])).to(matrices.dtype)
        image = scaled @ right
        values = image.norm(dim=-2) * scale[..., None]
        next_value = values[..., 1] if values.shape[-1] > 1 else torch.zeros_like(values[..., 0])
        return Triple(values[..., 0], unit(image[..., 0]), right[..., 0], next_value, *_exact(next_value))

    def _iterate(
        self, matrices: Tensor, state: State, tolerance: float | None, limit: int
    ) -> tuple[Triple, dict[str, Tensor]]:
        # The weight may have another dtype than it had when the state was made.
        basis, direction = (state[name].to(matrices.dtype) for name in ("basis", "direction"))
        image = matrices @ basis
        # A product of two reads would leave float32's range where the entries are near 1e20.
        scale = image.abs().amax(dim=(-2, -1))
        finite = scale.isfinite()
        unscale = torch.where(finite & (scale > 0), scale.reciprocal(), 1)[:, None, None]
        probe, num_iterations, enough = basis[..., -1:], 0, torch.inf
        while True:
            back = (matrices.mT @ (image * unscale)) * unscale
            if num_iterations == 0:
                probe = unit(back[..., -1:], dim=-2)
            residuals = torch.baddbmm(back, basis, basis.mT @ back, alpha=-1)
            space = torch.cat([basis, residuals, direction], dim=-1)
            images = torch.cat([image, matrices @ space[..., self.width :]], dim=-1)
            # What is not finite would make a factorisation raise.
            products, energies = (torch.where(finite[:, None, None], gram(tall), 0) for tall in (space, images))
            ritz, values = rayleigh_ritz(products, energies, self.width)
            residual, error = _errors(products, energies, values, torch.where(finite, scale, 0).double() ** 2)
            within = ritz.mT @ (products[..., self.width :] @ ritz[..., self.width :, :])
            ritz, within = ritz.to(basis.dtype), within.to(basis.dtype)
            step = space[..., self.width :] @ ritz[..., self.width :, :]
            basis = torch.baddbmm(step, basis, ritz[..., : self.width, :])
            num_iterations += 1
            if tolerance is not None:
                farthest, worst = torch.stack([residual.max(), error.max()]).tolist()
                if num_iterations == 1 and (rise := _rise(energies, values)) > JUMP:
                    # What has jumped stands out, so that its value is exact before its vectors are. A step that puts
                    # it back among the others leaves the norm off by up to half the residual.
                    tolerance, limit = self._thorough(tolerance, limit)
                    enough = 2 * self.tolerance / (1 + rise)
                elif (worst <= tolerance and farthest <= enough) or farthest <= CONVERGED:
                    break
            if num_iterations >= limit:
                break
            image = images @ ritz
            # A direction must not lie in the block, where it would cancel.
            direction = torch.baddbmm(step, basis, within, alpha=-1)
        left, right, leading = (images @ ritz[..., :1] * unscale)[..., 0], basis[..., 0], basis[..., :-1]
        value = scale * (left.norm(dim=-1) / right.norm(dim=-1).clamp_min(torch.finfo(right.dtype).tiny))
        next_value = values[..., 1:].amax(-1).to(value.dtype)
        value, next_value = (torch.where(finite, found, torch.nan) for found in (value, next_value))
        residual, error = residual.to(value.dtype), error.to(value.dtype)
        triple = Triple(value, unit(left), unit(right), next_value, residual, error, num_iterations)
        probe = probe + 0.1 / probe.shape[-2] ** 0.5 * signs(state["key"] + (state["age"] << 32), probe.shape[1:])
        probe = unit(probe - leading @ (leading.mT @ probe), dim=-2)
        # The last column does not stay in the block.
        direction = torch.baddbmm(step, leading, within[..., :-1, :], alpha=-1)
        keep = finite[:, None, None]
        return triple, {
            "basis": torch.where(keep, torch.cat([leading, probe], dim=-1), state["basis"]),
            "direction": torch.where(keep, direction, state["direction"]),
            "key": state["key"],
            "age": state["age"] + 1,
        }


def _rise(energies: Tensor, values: Tensor) -> float:
    """How far, relative, a Rayleigh-Ritz step has raised the largest value of any block: the host waits for it."""
    before, after = energies.diagonal(dim1=-2, dim2=-1)[..., : values.shape[-1]].amax(-1).sqrt(), values.amax(-1)
    tiny = torch.finfo(values.dtype).tiny
    return (after.clamp_min(tiny) / before.clamp_min(tiny) - 1).max().item()


def _errors(products: Tensor, energies: Tensor, values: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`||r|| / s^2` of the longest column before a Rayleigh-Ritz step, and the relative error after it, `(k,)` both.

    From the Gram matrices of `[V, R, P]`, with residuals that are `scale` times `R`, and the values after the step.

    The error is estimated as `rho (rho / gap)^2 / 16`, with `rho` the root mean square of the residuals and `gap` how
    far, relative, the block's last value lies below its first: a crowded spectrum makes a residual of the same length
    mean more. The exponents and the 16 are a fit to errors against exact values, on trajectories of two MLPs and a
    ResNet: on each, the ratio of error to estimate had a median of about 1 and lay between 0.2 and 4 in nine of ten
    cases, while `||r||` alone said nothing about the error. Weights that drift in two directions only had errors of
    three times the estimate.
    """
    width = values.shape[-1]
    squares = energies.diagonal(dim1=-2, dim2=-1)[..., :width]
    rests = products.diagonal(dim1=-2, dim2=-1)[..., width : 2 * width].sqrt() * scale[..., None]
    tiny = torch.finfo(squares.dtype).tiny
    square, top = squares.max(dim=-1, keepdim=True)
    rests = rests / square.clamp_min(tiny)
    # The last column is not one of the block: it searches.
    rho = rests[..., :-1].square().mean(-1).sqrt()
    gap = 1 - values.amin(-1) / values.amax(-1).clamp_min(tiny)
    error = rho * (rho / gap.clamp_min(tiny)).square().div(16).clamp_max(1)
    return rests.take_along_dim(top, dim=-1)[..., 0], error


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
    """Go on from the last step's vectors instead of from noise. One iteration a step is what `spectral_norm` does."""

    def __post_init__(self) -> None:
        if self.num_iterations < 1:
            raise ValueError(f"{self}: num_iterations must be at least 1")

    def cold(self, matrices: Tensor, key: Tensor) -> dict[str, Tensor]:
        dtype = torch.promote_types(matrices.dtype, torch.float32)
        return {"columns": normal(key, (min(matrices.shape[-2:]), 2), dtype)} if self.warm else {"key": key.clone()}

    def workspace(self, m: int, n: int) -> int:
        return m * n + n * n

    def pace(self, num_iterations: int | None, error: float | None) -> int | None:
        return None

    def solve(
        self, matrices: Tensor, state: State, *, to_convergence: bool = False, num_iterations: int | None = None
    ) -> tuple[Triple, dict[str, Tensor]]:
        tall = matrices.shape[-2] >= matrices.shape[-1]
        scaled, scale = finite_or_zero(matrices if tall else matrices.mT)
        # Many iterations are cheaper on the Gram matrix, which is as much arithmetic as n / 2 of them, but much faster.
        many = self.num_iterations > scaled.shape[-1] // 20
        square = scaled.mT @ scaled if many else None
        size = (scaled.shape[-1], 2)
        given = state["columns"].to(scaled.dtype) if self.warm else normal(state["key"], size, scaled.dtype)
        columns = given
        for _ in range(self.num_iterations):
            start = unit(columns[..., 0])
            columns = square @ columns if square is not None else scaled.mT @ (scaled @ columns)
            value = (start * columns[..., 0]).sum(-1)
            residual = (columns[..., 0] - value[..., None] * start).norm(dim=-1) / value.clamp_min(
                torch.finfo(value.dtype).tiny
            )
            first = unit(columns[..., :1], dim=-2)
            second = columns[..., 1:]
            # Twice, since what is left of a matrix of rank one is rounding, and that is no more orthogonal.
            for _ in range(2):
                second = unit(second - first * (first.mT @ second), dim=-2)
            columns = torch.cat([first, second], dim=-1)
        image = scaled @ columns
        values = image.norm(dim=-2) * scale[..., None]
        # Half of it bounds the distance from some singular value, though it need not be the first.
        error = residual / 2
        triple = Triple(
            values[..., 0], unit(image[..., 0]), columns[..., 0], values[..., 1], residual, error, self.num_iterations
        )
        # From nothing there is no way on.
        kept = torch.where(values[:, None] > 0, columns, given)
        state = {"columns": kept} if self.warm else {"key": state["key"] + 1}
        return triple if tall else triple.transposed(), state


@dataclass(frozen=True)
class SVD:
    """The exact singular value decomposition of every matrix: for checks, and for small models."""

    def cold(self, matrices: Tensor, key: Tensor) -> dict[str, Tensor]:
        return {}

    def workspace(self, m: int, n: int) -> int:
        return 2 * m * n + min(m, n) ** 2

    def pace(self, num_iterations: int | None, error: float | None) -> int | None:
        return None

    def solve(
        self, matrices: Tensor, state: State, *, to_convergence: bool = False, num_iterations: int | None = None
    ) -> tuple[Triple, dict[str, Tensor]]:
        scaled, scale = finite_or_zero(matrices)
        left, values, right = torch.linalg.svd(scaled, full_matrices=False)
        values = values * scale[..., None]
        next_value = values[..., 1] if values.shape[-1] > 1 else torch.zeros_like(values[..., 0])
        # Equal singular values leave rounding of one part in 1e7 to the pair: the value of the very pair is exact.
        return Triple(values[..., 0], left[..., 0], right[..., 0, :], next_value, *_exact(next_value)), {}


SOLVERS: dict[str, Solver] = {"block": Block(), "power": Power(), "svd": SVD()}
