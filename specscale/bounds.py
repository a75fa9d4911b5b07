"""Certified norms: exact where that is cheap, else between bounds with a stated probability of a miss."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from specscale.linalg import in_float64, unit
from specscale.random import normal

EXACT_SIDE = 1024
"""A matrix whose shorter side is at most this is decomposed."""


class Bounds(NamedTuple):
    """Where the norm of each matrix lies, in float64."""

    lower: Tensor
    """`(k,)`: attained by some vector, so that the norm is certainly no smaller."""
    upper: Tensor
    """`(k,)`: the norm is no larger, except with probability `miss`."""
    miss: float
    """The probability, over the random start, that any of these matrices has a larger norm than its `upper`."""
    method: str
    """`"sum"`, `"svd"` or `"lanczos"`."""


def frobenius_bounds(matrices: Tensor) -> Bounds:
    """The Frobenius norm of each of `matrices (k, m, n)`, summed in float64."""
    exact = torch.linalg.matrix_norm(in_float64(matrices))
    return Bounds(exact, exact, 0.0, "sum")


def spectral_bounds(matrices: Tensor, key: Tensor, tolerance: float, miss: float) -> Bounds:
    """Bounds on the spectral norm of each of `matrices (k, m, n)`, no further apart than `tolerance`, relative.

    By an SVD in float64 where the shorter side is at most 1024. Else by Lanczos iteration in float64 from a random
    start, which `key (k,)`, int64, seeds. Whatever the spectrum of an n x n matrix `A`, after `num_steps` its largest
    eigenvalue is under-estimated by more than a relative `e` with a probability of at most
    `1.648 sqrt(n) exp(-sqrt(e) (2 num_steps - 1))` (Kuczynski & Wozniakowski, "Estimating the largest eigenvalue by
    the power and Lanczos algorithms with a random start", 1992, theorem 4.2). Here `A = W^T W`, so that
    `1 - e = (1 - tolerance)^2`.
    """
    matrices = in_float64(matrices)
    if matrices.shape[-2] < matrices.shape[-1]:
        matrices = matrices.mT
    side = matrices.shape[-1]
    num_steps = lanczos_steps(side, tolerance, miss / len(matrices))
    if side <= max(EXACT_SIDE, num_steps):
        exact = torch.linalg.svdvals(matrices)[..., 0]
        return Bounds(exact, exact, 0.0, "svd")
    lower = lanczos(matrices, normal(key.to(matrices.device), (side,), matrices.dtype), num_steps)
    return Bounds(lower, lower / (1 - tolerance), miss, "lanczos")


def lanczos_steps(side: int, tolerance: float, miss: float) -> int:
    """How many steps keep a matrix with `side` columns within `tolerance`, except with probability `miss`."""
    relative = 1 - (1 - tolerance) ** 2
    return math.ceil((math.log(1.648 * math.sqrt(side) / miss) / math.sqrt(relative) + 1) / 2)


def lanczos(matrices: Tensor, start: Tensor, num_steps: int) -> Tensor:
    """The largest `||W x||`, `(k,)`, over unit `x` in the Krylov space of `W^T W` from `start (k, n)`.

    Golub-Kahan bidiagonalization (Golub & Van Loan, "Matrix Computations", section 10.4). Both bases are
    reorthogonalized twice, so that the theory holds under rounding. Once the Krylov space is exhausted, further vectors
    are zero.
    """
    # The scaled matrix has a norm of at least 1, by which `_outside` tells rounding from a vector.
    scale = matrices.abs().amax(dim=(-2, -1)).clamp_min(torch.finfo(matrices.dtype).tiny)[:, None]
    count, m, n = matrices.shape
    lefts, rights = (matrices.new_zeros(count, size, num_steps) for size in (m, n))
    bidiagonal = matrices.new_zeros(count, num_steps, num_steps)
    right = start
    for step in range(num_steps):
        right = _outside(rights[..., :step], right)
        if step:
            bidiagonal[:, step - 1, step] = right.norm(dim=-1)
        right = unit(right)
        left = _outside(lefts[..., :step], _times(matrices, right) / scale)
        bidiagonal[:, step, step] = left.norm(dim=-1)
        left = unit(left)
        rights[..., step], lefts[..., step] = right, left
        right = _times(matrices.mT, left) / scale
    return torch.linalg.svdvals(bidiagonal)[..., 0] * scale[:, 0]


def _times(matrices: Tensor, vectors: Tensor) -> Tensor:
    return (matrices @ vectors[..., None])[..., 0]


def _outside(basis: Tensor, vectors: Tensor) -> Tensor:
    """The vectors without their part in an orthonormal basis; zero where nothing but rounding is left."""
    least = 1e-12 * vectors.norm(dim=-1, keepdim=True).clamp_min(1)
    for _ in range(2):
        vectors = vectors - _times(basis, _times(basis.mT, vectors))
    return torch.where(vectors.norm(dim=-1, keepdim=True) > least, vectors, 0)
