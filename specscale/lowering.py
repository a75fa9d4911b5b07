"""How far a matrix has to be lowered to keep its norm at a target, from what a solver knows on some of its directions.

Let `V` be the solver's directions, `R` what couples them with the rest, `R^T = (1 - V V^T) W^T (W V)`, and `b` the
largest singular value of the rest. Once every value on `V` is lowered to at most `l`, `W^T W` is

    [ l^2       l R^T / ||W V|| ]
    [ .         b^2             ]    in norm,

whose norm is at most `(l^2 + b^2) / 2 + sqrt((l^2 - b^2)^2 / 4 + c^2)` with `c = ||R||`: see `bound`. Pure functions.
"""

import torch
from torch import Tensor

from specscale import linalg
from specscale.linalg import multiplier

SAFETY = 2.0
"""The factor on the coupling, an estimate, and for what `rest` may have missed."""

LEAST_LEVEL = 0.8
"""The values on the directions are lowered to this part of the target at least, squared, and not below the rest."""


def level_and_factor(target: Tensor, rest: Tensor, coupling: Tensor) -> tuple[Tensor, Tensor]:
    """The level to lower the values on the directions to, and the factor on the whole matrix after that.

    All `(k,)`. The factor is 1 where lowering the directions is enough.
    """
    c, t, b = SAFETY * coupling, target.square(), rest.square()
    # With this level, the bound is the target.
    room = (t - b).clamp_min(torch.finfo(t.dtype).tiny)
    level = torch.maximum(t - c.square() / room, torch.maximum(b, LEAST_LEVEL * t))
    norm = bound(level, b, c)
    # Rounding must not make it less than 1.
    factor = torch.where(norm > t * (1 + 8 * torch.finfo(t.dtype).eps), (t / norm).sqrt(), 1)
    return level.sqrt(), factor


def norm_afterwards(value: Tensor, rest: Tensor, coupling: Tensor, level: Tensor, factor: Tensor) -> Tensor:
    """An estimate of the norm `(k,)` after that, of matrices of norm `value`: without the safety: below the target."""
    top = torch.minimum(level, value)
    return factor * bound(top.square(), rest.square(), coupling).sqrt()


def bound(level_squared: Tensor, rest_squared: Tensor, coupling: Tensor) -> Tensor:
    """The norm of `[[l^2, c], [c, b^2]]`."""
    half = (level_squared - rest_squared) / 2
    return (level_squared + rest_squared) / 2 + (half.square() + coupling.square()).sqrt()


def excess_part(squares: Tensor, level: Tensor) -> Tensor:
    """`F (k, b, b)`, so that `Y (1 - F)` has no singular value above `level (k,)`, from `squares (k, b, b)`, `Y^T Y`.

    It is `max(0, 1 - level squares^(-1/2))`: what a value at most `level` keeps is all of it.
    """
    relative = squares / level.square()[:, None, None]
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
NUM_GROWING, NUM_SETTLING, NUM_ROOT = 10, 5, 14
