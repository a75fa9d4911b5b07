"""How a matrix is lowered to keep its norm at a target, from what a solver knows on some of its directions.

Let `V` be the solver's directions and `S = (W V)^T W V`. `R = (1 - V V^T) W^T W V` couples them with the rest, whose
largest singular value is `b`. In these coordinates, `W^T W` is

    [ S   R^T ]
    [ R   B   ]    with ||B|| = b^2.

For any `l > b`, its largest eigenvalue is at most `l^2` if the largest eigenvalue of the Schur complement
`S + R^T R / (l^2 - b^2)` is (Golub & Van Loan, "Matrix Computations", section 3.2.11). For `W (1 - V F V^T)`, the Schur
complement is multiplied by `1 - F` from both sides: so `F` lowers its eigenvalues to `l^2`. Pure functions.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from specscale import linalg
from specscale.linalg import multiplier, norm_from_gram

SAFETY = 3.0
"""The factor on `R`, which is an estimate, and for what the estimate of `b` has missed."""


class Lowering(NamedTuple):
    """`W <- factor W (1 - V F V^T)`, for matrices `(k, m, n)` that are above their targets."""

    part: Tensor
    """`F (k, b, b)`."""
    factor: Tensor
    """`(k,)`: 1 where lowering the directions is enough."""


def lowering(target: Tensor, squares: Tensor, coupling: Tensor, rest: Tensor) -> Lowering:
    """How to lower matrices to their `target (k,)`.

    From `S (k, b, b)`, `squares`, `R^T R (k, b, b)`, `coupling`, and `b (k,)`, `rest`.
    """
    tiny = torch.finfo(target.dtype).tiny
    couples = SAFETY**2 * coupling
    least = target.square()
    level = torch.maximum(least, rest.square() + norm_from_gram(couples))
    complement = couples / (level - rest.square()).clamp_min(tiny)[:, None, None]
    part = excess_part(squares + complement, level)
    factor = torch.where(level > least, target / level.sqrt(), 1)
    return Lowering(part, factor)


def excess_part(squares: Tensor, level: Tensor) -> Tensor:
    """`F (k, b, b)`, so that `(1 - F) squares (1 - F)` has no eigenvalue above `level (k,)`.

    It is `max(0, 1 - (squares / level)^(-1/2))`, which changes no smaller one.
    """
    relative = squares / level.clamp_min(torch.finfo(level.dtype).tiny)[:, None, None]
    # Through the module, so that a test can run an accelerator's step on a CPU.
    if linalg.can_sync(relative):
        finite = torch.where(relative.isfinite().all(-1).all(-1)[:, None, None], relative, 0)
        values, vectors = torch.linalg.eigh(finite)
        part = 1 - values.clamp_min(1).rsqrt()
        return multiplier(vectors)(vectors * part[:, None], vectors.mT)
    return _excess_part_by_products(relative)


def _excess_part_by_products(relative: Tensor) -> Tensor:
    """`max(0, 1 - relative^(-1/2))` by products of matrices, whose errors near 1 are at most 1e-4 of the largest.

    The sign of `relative - 1` and the inverse root by Newton-Schulz iterations (Higham, "Functions of Matrices", 2008,
    sections 5.3 and 6.7), the sign first by an odd polynomial that grows faster near zero.
    """
    multiply = multiplier(relative)
    identity = torch.eye(relative.shape[-1], dtype=relative.dtype, device=relative.device)
    above = relative - identity
    length = torch.linalg.matrix_norm(above, keepdim=True).clamp_min(torch.finfo(above.dtype).tiny)
    sign = above / length
    for _ in range(NUM_GROWING):
        square = multiply(sign, sign)
        sign = multiply(sign, GROWING[0] * identity + multiply(square, GROWING[1] * identity + GROWING[2] * square))
    for _ in range(NUM_SETTLING):
        sign = multiply(sign, 1.5 * identity - 0.5 * multiply(sign, sign))
    # The larger of `relative` and 1.
    larger = identity + (above + multiply(above, sign)) / 2
    larger = (larger + larger.mT) / 2
    length = torch.linalg.matrix_norm(larger, keepdim=True)
    root, inverse = larger / length, identity.expand_as(larger)
    for _ in range(NUM_ROOT):
        step = 1.5 * identity - 0.5 * multiply(inverse, root)
        root, inverse = multiply(root, step), multiply(step, inverse)
    return identity - inverse / length.sqrt()


GROWING = (3.0, -3.2, 1.2)
"""`x -> 3 x - 3.2 x^3 + 1.2 x^5`: of the sign of `x`, at most 1.22, and near 1 closer to it from both sides."""
NUM_GROWING, NUM_SETTLING, NUM_ROOT = 11, 5, 17
"""Enough for values up to a hundred times the level."""
