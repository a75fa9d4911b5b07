"""The polar factor of a matrix by products alone, in the matrix's own precision.

The polar factor of `W = U S V^T` is `U V^T`, the nearest matrix whose singular values all are one (Higham, "Functions
of Matrices", 2008, chapter 8). Newton-Schulz iteration `X <- X (3 I - X^T X) / 2` (Bjorck & Bowie, "An iterative
algorithm for computing the best estimate of an orthogonal matrix", 1971) takes a singular value `x` to
`x (3 - x^2) / 2`: an error is squared, but a small value grows by 3/2 only. Scaled, as `r x (3 - (r x)^2) / 2` with
`r^2 = 3 / (1 + l + l^2)`, it grows by up to 2.6: that is the best odd cubic for values in `[l, 1]`, whose two ends it
takes to the same value (Chen & Chow, "A stable scaling of Newton-Schulz for improving the sign function computation of
a Hermitian matrix", 2014; Amsel et al., "The Polar Express", 2025, section 4). Here `l` is estimated in each iteration,
by power iteration on `I - X^T X`. An estimate that is too large costs iterations and nothing else. One that follows a
value that is as good as zero would keep the others from 1, whom the scaling scatters over `[l, 1]`: it is at least what
has become of `LEAST`.
"""

import torch
from torch import Tensor

from specscale import linalg
from specscale.linalg import gram, product
from specscale.random import normal

LEAST = 1e-4
"""The smallest `l` of the first iteration: with a smaller one, rounding of the value 1 would turn its sign."""

NEAR = 80
"""Of `||I - X^T X||`, the square that a last iteration is left with, in units of rounding: 1e-5 in float32."""

ROUNDING = 8
"""What rounding alone leaves of `||I - Q^T Q||`, in its units: measured for up to 1024 columns."""

COLUMNS = 4
"""Columns of the power iteration for `l`."""

STEPS = (6, 2)
"""Its steps in the first iteration and in each later one, which goes on from the vectors of the one before."""


def polar_factor(
    matrices: Tensor, norm: Tensor, max_iterations: int, skip_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The polar factors `Q` of `matrices (k, m, n)`, float32 or wider, and an estimate of `||I - Q^T Q|| (k,)`.

    `norm (k,)` must be positive, and no singular value may be above it. Where the host may read, the iteration ends
    when all matrices have converged but those of `skip_mask (k,)`; elsewhere after `max_iterations`. 16 are enough for
    singular values from 1e-4 of `norm`, 6 for 0.1. A singular value of zero stays zero.
    """
    if matrices.shape[-2] < matrices.shape[-1]:
        factor, distance = polar_factor(matrices.mT, norm, max_iterations, skip_mask)
        return factor.mT, distance
    X = matrices / norm[:, None, None]
    count, size = len(X), X.shape[-1]
    eps = torch.finfo(X.dtype).eps
    eye = torch.eye(size, dtype=X.dtype, device=X.device)
    V = normal(torch.arange(count, device=X.device), (size, COLUMNS), X.dtype)
    floor = torch.full((count,), LEAST, dtype=X.dtype, device=X.device)
    for number in range(max_iterations):
        # `I - X^T X`, whose eigenvalues are within [0, 1].
        E = eye - gram(X)
        for _ in range(STEPS[min(number, 1)]):
            V = product(E, linalg.unit(V, dim=-2))
        distance = torch.linalg.vector_norm(V, dim=-2).amax(-1)
        is_near = distance <= (NEAR * eps) ** 0.5
        least = (1 - distance).clamp(0, 1).sqrt().maximum(floor)
        ratio = torch.where(is_near, 1, (3 / (1 + least + least.square())).sqrt())
        floor = (ratio * floor * (3 - (ratio * floor).square()) / 2).clamp_max(1)
        # `r (3 I - r^2 X^T X) / 2`.
        of_eye, of_E = ((3 * ratio - ratio**3) / 2)[:, None, None], (ratio**3 / 2)[:, None, None]
        X = product(X, E.mul_(of_E).add_(of_eye * eye))
        if linalg.can_sync(X):
            is_done = is_near if skip_mask is None else is_near | skip_mask
            if bool(is_done.all()):
                break
    # What the last iteration makes of `E` is 3/4 E^2 + 1/4 E^3, and rounding. Where it was not a plain one, no more is
    # known than what it started from.
    distance = torch.where(is_near, 0.75 * distance**2 + 0.25 * distance**3, distance)
    return X, distance.clamp_min(ROUNDING * eps)
