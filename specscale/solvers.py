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

State = Mapping[str, Tensor]


class Triple(NamedTuple):
    """The first singular triple of each matrix `(..., m, n)`, and what is known beside it."""

    value: Tensor
    """`(...)`: the largest singular value."""
    left: Tensor
    """`(..., m)`: its left singular vector, of unit length (zero where the matrix is zero)."""
    right: Tensor
    """`(..., n)`: its right singular vector, of unit length."""
    next_value: Tensor
    """`(...)`: the second singular value; an iterative solver estimates it from below."""


class Solver(Protocol):
    """What a solver is: a cold state for a batch of matrices, and a step that improves on a state."""

    def cold(self, matrices: Tensor, key: Tensor) -> dict[str, Tensor]:
        """A state that knows nothing of `matrices (k, m, n)`; `key (k,)`, int64, seeds its random numbers."""

    def solve(
        self, matrices: Tensor, state: State, *, to_convergence: bool = False
    ) -> tuple[Triple, dict[str, Tensor]]:
        """The triples of `matrices (k, m, n)`, float32 or wider, and the state to go on from."""


def normal(key: Tensor, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Standard normal numbers `(k, *size)` from int64 keys `(k,)`, by a counter-based generator.

    A hash of (key, position), so there is no generator to store, to seed or to synchronise, and every device and rank
    draws the same (the idea of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
    """
    count = torch.Size(size).numel()
    position = torch.arange(2 * count, device=key.device)
    bits = _hash32(_hash32(key[:, None]) + position)
    uniform = (bits.double() + 0.5) / 2**32
    radius, angle = uniform[:, :count], uniform[:, count:]
    return ((-2 * radius.log()).sqrt() * (2 * torch.pi * angle).cos()).to(dtype).reshape(-1, *size)


def _hash32(x: Tensor) -> Tensor:
    """A 32-bit integer hash (xor-shift-multiply), in int64, whose wrapping products keep the low 32 bits right."""
    mask = 0xFFFFFFFF
    x = (x ^ (x >> 32)) & mask
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
    return x ^ (x >> 16)


def _gram(a: Tensor) -> Tensor:
    """`a^T a` in float64: small, and its eigenvalues are squares."""
    a = a.double()
    return a.mT @ a


def _unit(x: Tensor, dim: int = -1) -> Tensor:
    """`x` at unit length along `dim`; a zero vector stays zero."""
    return x / x.norm(dim=dim, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def _complement(basis: Tensor, directions: Tensor) -> Tensor:
    """An orthonormal basis of what `directions (..., n, c)` add to the orthonormal `basis (..., n, b)`.

    By eigenvectors of the Gram matrix (Stathopoulos & Wu, "A block orthogonalization procedure with constant
    synchronization requirements", 2002), whose dependent directions become zero columns instead of noise, so that the
    shape does not depend on the rank.
    """
    directions = _unit(directions - basis @ (basis.mT @ directions), dim=-2)
    directions = directions - basis @ (basis.mT @ directions)
    values, vectors = torch.linalg.eigh(_gram(directions))
    inverse_root = torch.where(values > 1e-8, values.clamp_min(1e-300).rsqrt(), 0)
    directions = directions @ (vectors * inverse_root[..., None, :]).to(directions.dtype)
    directions = directions - basis @ (basis.mT @ directions)
    # One Newton step for the polar factor squares what the float32 product left of the error.
    return 1.5 * directions - 0.5 * directions @ (directions.mT @ directions)


def _finite_or_nan(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices scaled to a largest entry of 1, and the scales; one that is not finite becomes zero.

    The scale keeps squares from over- and underflowing; the zero keeps a factorisation from raising.
    """
    scale = matrices.abs().amax(dim=(-2, -1)) if matrices.numel() else matrices.new_zeros(matrices.shape[:-2])
    finite = torch.isfinite(scale) & (scale > 0)
    divisor = torch.where(finite, scale, torch.inf)[..., None, None]
    return torch.where(finite[..., None, None], matrices / divisor, 0), scale


@dataclass(frozen=True)
class Block:
    """Warm-started block LOBPCG: a persistent block, refined by as many iterations as its residual asks for.

    One iteration is a Rayleigh-Ritz step on `[V, R, P]`: the block, its residuals and its last directions (Knyazev,
    "Toward the optimal preconditioned eigensolver", 2001, algorithm 4.1), on `W^T W` by products with `W` alone. The
    error of the singular value is about the square of the residual. The block lives on the matrix's shorter side; a
    matrix whose shorter side is at most three blocks is solved by its Gram matrix instead, exactly and without state.
    """

    width: int = 16
    """Columns of the block."""
    tolerance: float = 5e-3
    """Iterate until `||W^T u - s v|| / s` is at most this."""
    max_iterations: int = 8
    """The most iterations of one step."""

    def __post_init__(self) -> None:
        if self.width < 2 or self.max_iterations < 1 or not self.tolerance > 0:
            raise ValueError(f"{self}: width must be at least 2, max_iterations at least 1 and tolerance positive")

    def _is_small(self, m: int, n: int) -> bool:
        return min(m, n) <= 3 * self.width

    def cold(self, matrices: Tensor, key: Tensor) -> dict[str, Tensor]:
        _, m, n = matrices.shape
        if self._is_small(m, n):
            return {}
        dtype = torch.promote_types(matrices.dtype, torch.float32)
        basis = torch.linalg.qr(normal(key, (min(m, n), self.width), dtype)).Q
        return {"basis": basis, "direction": torch.zeros_like(basis)}

    def solve(
        self, matrices: Tensor, state: State, *, to_convergence: bool = False
    ) -> tuple[Triple, dict[str, Tensor]]:
        tall = matrices.shape[-2] >= matrices.shape[-1]
        oriented = matrices if tall else matrices.mT
        if self._is_small(*matrices.shape[-2:]):
            triple, state = self._solve_small(oriented), {}
        else:
            tolerance, limit = (1e-5, 300) if to_convergence else (self.tolerance, self.max_iterations)
            triple, state = self._iterate(oriented, state["basis"], state["direction"], tolerance, limit)
        if not tall:
            triple = triple._replace(left=triple.right, right=triple.left)
        return triple, dict(state)

    def _solve_small(self, matrices: Tensor) -> Triple:
        scaled, scale = _finite_or_nan(matrices)
        right = torch.linalg.eigh(_gram(scaled)).eigenvectors.flip(-1)[..., :2].to(matrices.dtype)
        image = scaled @ right
        values = image.norm(dim=-2) * scale[..., None]
        next_value = values[..., 1] if values.shape[-1] > 1 else torch.zeros_like(values[..., 0])
        return Triple(values[..., 0], _unit(image[..., 0]), right[..., 0], next_value)

    def _iterate(
        self, matrices: Tensor, basis: Tensor, direction: Tensor, tolerance: float, limit: int
    ) -> tuple[Triple, dict[str, Tensor]]:
        entry = basis, direction
        basis = 1.5 * basis - 0.5 * basis @ (basis.mT @ basis)
        image = matrices @ basis
        scale = image.abs().amax(dim=(-2, -1))
        finite = torch.isfinite(scale)
        # A product of two reads would leave float32's range where the entries are near 1e20.
        unscale = torch.where(finite & (scale > 0), scale.reciprocal(), 1)[:, None, None]
        image = torch.where(finite[:, None, None], image * unscale, 0)
        for _ in range(limit):
            back = (matrices.mT @ image) * unscale
            back = torch.where(finite[:, None, None], back, 0)
            residuals = back - basis @ (basis.mT @ back)
            complement = _complement(basis, torch.cat([residuals, direction], dim=-1))
            beyond = torch.where(finite[:, None, None], (matrices @ complement) * unscale, 0)
            images = torch.cat([image, beyond], dim=-1)
            ritz = torch.linalg.eigh(_gram(images)).eigenvectors.flip(-1)[..., : self.width].to(image.dtype)
            direction = complement @ ritz[..., self.width :, :]
            basis = torch.cat([basis, complement], dim=-1) @ ritz
            image = images @ ritz
            values = image.norm(dim=-2)
            value, left, right = values[..., 0], _unit(image[..., 0]), _unit(basis[..., 0])
            gradient = (matrices.mT @ left[..., None])[..., 0] * unscale[..., 0]
            residual = (gradient - value[..., None] * right).norm(dim=-1) / value.clamp_min(
                torch.finfo(value.dtype).tiny
            )
            if bool((torch.where(finite, residual, 0) <= tolerance).all()):
                break
        undo = torch.where(finite, unscale[:, 0, 0].reciprocal(), torch.nan)
        basis, direction = (
            torch.where(finite[:, None, None], new, old) for new, old in zip((basis, direction), entry, strict=True)
        )
        triple = Triple(value * undo, left, right, values[..., 1] * undo)
        return triple, {"basis": basis, "direction": direction}


@dataclass(frozen=True)
class Power:
    """Power iteration on `W^T W` from fresh noise at every step, as in the Norm Scaling post: the reference, and slow.

    A second column, kept orthogonal to the first and without influence on it, estimates the next singular value.
    """

    num_iterations: int = 500
    """Iterations of one step."""

    def __post_init__(self) -> None:
        if self.num_iterations < 1:
            raise ValueError(f"{self}: num_iterations must be at least 1")

    def cold(self, matrices: Tensor, key: Tensor) -> dict[str, Tensor]:
        return {"key": key.clone()}

    def solve(
        self, matrices: Tensor, state: State, *, to_convergence: bool = False
    ) -> tuple[Triple, dict[str, Tensor]]:
        scaled, scale = _finite_or_nan(matrices)
        gram = scaled.mT @ scaled
        columns = normal(state["key"], (gram.shape[-1], 2), gram.dtype)
        for _ in range(self.num_iterations):
            first, second = (gram @ columns).split(1, dim=-1)
            first = _unit(first, dim=-2)
            second = _unit(second - first * (first.mT @ second), dim=-2)
            columns = torch.cat([first, second], dim=-1)
        image = scaled @ columns
        values = image.norm(dim=-2) * scale[..., None]
        triple = Triple(values[..., 0], _unit(image[..., 0]), columns[..., 0], values[..., 1])
        return triple, {"key": state["key"] + 1}


@dataclass(frozen=True)
class SVD:
    """The exact singular value decomposition of every matrix: for checks, and for small models."""

    def cold(self, matrices: Tensor, key: Tensor) -> dict[str, Tensor]:
        return {}

    def solve(
        self, matrices: Tensor, state: State, *, to_convergence: bool = False
    ) -> tuple[Triple, dict[str, Tensor]]:
        scaled, scale = _finite_or_nan(matrices)
        left, values, right = torch.linalg.svd(scaled, full_matrices=False)
        values = values * scale[..., None]
        next_value = values[..., 1] if values.shape[-1] > 1 else torch.zeros_like(values[..., 0])
        # Equal singular values leave rounding of one part in 1e7 to the pair: the value of the very pair is exact.
        return Triple(values[..., 0], left[..., 0], right[..., 0, :], next_value), {}


SOLVERS: dict[str, Solver] = {"block": Block(), "power": Power(), "svd": SVD()}
